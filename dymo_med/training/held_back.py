"""The finished model on calibration patients: what sets, limits and figures of a bundle rest on.

Nothing is fitted here but ranks and counts, so the answers are those of new patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dymo_med.backbones import FusionBackbone
from dymo_med.calibration import Calibration
from dymo_med.comparators.base import only
from dymo_med.conformal import AS_THEY_CAME, Conformal, calibrate
from dymo_med.drawn import recovered
from dymo_med.imputers import Imputer
from dymo_med.references import References
from dymo_med.selection import Selector
from dymo_med.tasks import PLAIN, OverClasses
from dymo_med.training.loop import stream
from dymo_med.training.objectives import sampled_subsets
from dymo_med.training.selectors import remember
from dymo_med.types import Batch, ModalityMask, SubsetStatistics

_CHUNK = 64
# Up to so many modalities every combination is looked at: 127 of seven.
_MOST_MODALITIES = 7
# About so many cases are looked at, of no more patients a combination than would move its bound.
_ENOUGH_CASES, _MOST_PATIENTS, _FEWEST_PATIENTS = 5000, 99, 39

Draw = tuple[str, int, tuple[bool, ...]]


@dataclass(frozen=True)
class TriedOut:
    """Answers for held-back patients, with everything they have and with less.

    Attributes:
        groups: Per case what was looked at: observed modalities joined by `+`, each a combination
            that the patient has at least; or `AS_THEY_CAME`. A patient is in a group once.
        patients: Whose case each of the B is.
        labels: Int64 `(B,)`.
        answers: By selector, stated probabilities: float64 `(B, K)` on the CPU.
        shares: `(B, K)` as in `Batch`; None where labels say all.
        task: What is predicted.
        followed: Of survival, as in `Batch`: `(B, 3)`.
    """

    groups: tuple[str, ...]
    patients: tuple[str, ...]
    labels: Tensor
    answers: Mapping[str, Tensor]
    shares: Tensor | None = None
    task: OverClasses = PLAIN
    followed: Tensor | None = None

    def conformal(self) -> Conformal:
        """Return what prediction sets, and a regression's intervals, go by."""
        found: dict[str, dict[str, list[Any]]] = {}
        for name, p in self.answers.items():
            strange = self.task.nonconformity(p, self.labels, self.shares, self.followed)
            for kind, values in strange.items():
                found.setdefault(kind, {})[name] = values.tolist()
        return calibrate(self.groups, self.patients, **found)

    def counted(self, calibration: Calibration) -> Calibration:
        """Return the calibration with how sure, and how right, answers were for each patient.

        Args:
            calibration: Behind the answers.
        """
        if calibration.patients is None and self.followed is not None:
            return calibration  # in which of many bins a time lies is not what is asked
        came = torch.tensor([g == AS_THEY_CAME for g in self.groups], dtype=torch.bool)
        best = {name: p[came].max(1) for name, p in self.answers.items()}
        truth = self.labels[came]
        return replace(
            calibration,
            # Four digits tell as much, and less of whom they are about.
            confidence={n: tuple(round(c, 4) for c in b.values.tolist()) for n, b in best.items()},
            right={n: tuple((b.indices == truth).tolist()) for n, b in best.items()},
        )


def combinations(available: Tensor, seed: int) -> Tensor:
    """Return the combinations of modalities that are looked at, bool `(S, M)`.

    All there are; of more than seven modalities a fixed sample and those that records have.

    Args:
        available: Bool `(n, M)`: what records have.
        seed: Of the sample.
    """
    modalities = available.shape[1]
    if modalities <= _MOST_MODALITIES:
        codes = torch.arange(1, 2**modalities)
        return (codes[:, None] >> torch.arange(modalities)) % 2 == 1
    together: Tensor = torch.unique(
        torch.cat([sampled_subsets(modalities, seed), available]), dim=0
    )
    return together[together.any(1)]


def draw_cases(observed: ModalityMask, patients: Sequence[str], seed: int) -> list[Draw]:
    """Draw one record of each patient for each combination of modalities, and one as it came.

    What is drawn depends on what records have and on the seed, never on values or labels.

    Args:
        observed: What n records have.
        patients: Whose record each is.
        seed: Of the draws.

    Returns:
        Group, record and what of it is looked at; of 39 (seven modalities) to 99 patients a
        combination at most.
    """
    available = observed.available
    owned: dict[str, list[int]] = {}
    for i, patient in enumerate(patients):
        owned.setdefault(patient, []).append(i)
    order = sorted(owned)

    def drawn(group: str, fits: Tensor) -> list[tuple[str, int]]:
        generator = stream(seed, "one record of each patient", group)
        share = torch.rand(len(order), generator=generator).tolist()
        place = torch.randperm(len(order), generator=generator).tolist()
        found = []
        for rank in place:
            records = [i for i in owned[order[rank]] if fits[i]]
            if records:
                found.append((order[rank], records[int(share[rank] * len(records))]))
        return found

    everything = torch.ones(len(available), dtype=torch.bool)
    cases: list[Draw] = [
        (AS_THEY_CAME, i, tuple(available[i].tolist())) for _, i in drawn(AS_THEY_CAME, everything)
    ]
    subsets = combinations(available, seed)
    most = min(max(_ENOUGH_CASES // len(subsets), _FEWEST_PATIENTS), _MOST_PATIENTS)
    for subset in subsets:
        names = [n for n, inside in zip(observed.names, subset.tolist(), strict=True) if inside]
        group = "+".join(names)
        fits = (available | ~subset).all(1)
        cases += [(group, i, tuple(subset.tolist())) for _, i in drawn(group, fits)[:most]]
    return cases


def try_out(
    imputer: Imputer,
    backbone: FusionBackbone,
    selectors: Mapping[str, Selector],
    statistics: SubsetStatistics,
    calibration: Calibration,
    batch: Batch,
    seed: int,
    device: torch.device,
    task: OverClasses = PLAIN,
    references: References | None = None,
) -> TriedOut:
    """Return what the finished selectors answer for held-back patients.

    Args:
        imputer: The bundle's own.
        backbone: In evaluation mode.
        selectors: Fitted, by name; on other patients.
        statistics: Of the backbone.
        calibration: Fitted on other patients likewise.
        batch: n labelled calibration records, on the CPU.
        seed: Decides which record stands for a patient.
        device: Where to compute.
        task: What is predicted.
        references: Of the bundle, where one of them may have a part in its answers.
    """
    cases = draw_cases(batch.observed, batch.patient_ids, seed)
    parts: dict[str, list[Tensor]] = {name: [] for name in selectors}
    with torch.no_grad():
        for start in range(0, len(cases), _CHUNK):
            some = cases[start : start + _CHUNK]
            left = torch.tensor([case[2] for case in some])
            part = only(batch.rows(torch.tensor([case[1] for case in some])), left).to(device)
            found = recovered(
                imputer, backbone, references, part, calibration.temperature, seed=seed
            )
            recovery = found.recovery
            fuse = remember(found.fuse, left.shape[1], len(some))
            for name, selector in selectors.items():
                trace = selector.select(fuse, part.observed, recovery.candidates, statistics)
                parts[name].append(calibration.probabilities(trace.output.logits.cpu()))
    rows = torch.tensor([case[1] for case in cases], dtype=torch.int64)
    answers = {name: torch.cat(found) for name, found in parts.items()}
    return TriedOut(
        tuple(case[0] for case in cases),
        tuple(batch.patient_ids[case[1]] for case in cases),
        batch.labels[rows],
        answers,
        None if batch.shares is None else batch.shares[rows],
        task,
        None if batch.followed is None else batch.followed[rows],
    )
