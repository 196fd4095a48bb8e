"""How good a new bundle is, by what patients have: figures from patients who were held back."""

from __future__ import annotations

from collections import defaultdict
from math import isfinite
from typing import Literal

import numpy as np

from dymo_med.conformal import AS_THEY_CAME
from dymo_med.metrics import Estimate, bootstrap
from dymo_med.training.held_back import TriedOut
from dymo_med.types import Interval, Performance, PerformanceRow

# On fewer patients an interval says nothing, and single patients would show.
FEWEST = 30
_METRICS = ("auroc", "brier", "ece")

Level = Literal["pattern", "count", "all"]


def performance(tested: TriedOut, default: str) -> Performance:
    """Return how good the default selector and measurements alone are, by what patients have.

    Nothing was fitted on these patients, so the figures are those of new patients like them; they
    are no test set all the same, since a model may have been made again because of them.

    Args:
        tested: Answers of the finished model.
        default: The default selector.

    Returns:
        Rows for each pattern and each number of observed modalities that at least `FEWEST`
        patients have at least, and for all as they came; with 95 % intervals from 1000 resamples
        of patients.
    """
    labels, patients = tested.labels.numpy(), tested.patients
    groups: dict[tuple[Level, str], list[int]] = defaultdict(list)
    for i, group in enumerate(tested.groups):
        if group == AS_THEY_CAME:
            groups["all", ""].append(i)
        else:
            groups["pattern", group].append(i)
            groups["count", str(group.count("+") + 1)].append(i)
    methods = tuple(dict.fromkeys((default, "observed_only")))
    probabilities = {m: tested.answers[m].numpy() for m in methods}
    order: dict[Level, int] = {"all": 0, "count": 1, "pattern": 2}
    rows = []
    for (level, group), index in sorted(groups.items(), key=lambda g: (order[g[0][0]], g[0][1])):
        number = len({patients[i] for i in index})
        if number < FEWEST and level != "all":
            continue
        at = np.array(index)
        found = bootstrap(
            labels[at],
            {m: p[at] for m, p in probabilities.items()},
            [patients[i] for i in index],
            metrics=_METRICS,
        )
        rows += [
            PerformanceRow(
                m, level, group, number, len(index), *(_interval(found[m][k]) for k in _METRICS)
            )
            for m in methods
        ]
    seen = {
        group: len({patients[i] for i in index})
        for (level, group), index in sorted(groups.items())
        if level == "pattern"
    }
    return Performance(tuple(rows), seen, FEWEST)


def _interval(estimate: Estimate) -> Interval:
    """Return an estimate with None for what is not defined."""
    values = (estimate.value, estimate.low, estimate.high)
    return Interval(*(v if isfinite(v) else None for v in values))
