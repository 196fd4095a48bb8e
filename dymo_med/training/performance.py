"""How good a new bundle is, by what patients have: figures from patients who were held back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Literal

import numpy as np
from torch import Tensor

from dymo_med.metrics import Estimate, bootstrap
from dymo_med.selection import Cases
from dymo_med.types import Interval, Performance, PerformanceRow

# On fewer patients an interval says nothing, and single patients would show.
FEWEST = 30
_METRICS = ("auroc", "brier", "ece")

Level = Literal["pattern", "count", "all"]


def performance(
    answers: Mapping[str, Tensor], cases: Cases, patients: Sequence[str], default: str
) -> Performance:
    """Return how good the default selector and measurements alone are, by what cases have.

    Answers are those of patients whom the selector was not fitted on. The temperature and the
    choice of the default did see the calibration split, so the figures flatter a little: they are
    there to tell well-tested combinations of modalities from others, not to replace a test set.

    Args:
        answers: What `training.selectors.held_out` returned: log-probabilities `(B, K)` by
            selector.
        cases: The same B cases.
        patients: Whose case each is.
        default: The default selector.

    Returns:
        Rows for each pattern and each number of observed modalities that at least `FEWEST`
        patients have, and for all; with 95 % intervals from 1000 resamples of patients.
    """
    labels = cases.labels.cpu().numpy()
    names = cases.observed.names
    groups: dict[tuple[Level, str], list[int]] = defaultdict(list)
    for i, row in enumerate(cases.observed.available.tolist()):
        observed = [n for n, seen in zip(names, row, strict=True) if seen]
        groups["pattern", "+".join(observed)].append(i)
        groups["count", str(len(observed))].append(i)
        groups["all", ""].append(i)
    methods = tuple(dict.fromkeys((default, "observed_only")))
    probabilities = {m: answers[m].exp().numpy() for m in methods}
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
