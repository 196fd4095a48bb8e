"""What methods answered for the records of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """One scenario: n records in order, every method's answer for each.

    Attributes:
        scenario: Its text.
        classes: K class names.
        modalities: M names.
        own: The bundle's selector.
        record_ids: n ids.
        patient_ids: n ids.
        labels: `(n,)` class indices.
        patterns: n patterns: observed modalities joined by `+`.
        probabilities: Per method `(n, K)`.
        candidates: Bool `(n, M)`: recovered or completed.
        admitted: Bool `(n, M)`: by the bundle's selector.
        points_to: `(n, M)`: class that a recovery alone points to; -1 = no candidate.
        sets: Bool `(n, K)`: prediction sets; None where the bundle has no calibration for them.
        calibrated_on: `(n,)` how many patients a set was calibrated on.
        subgroups: Per subgroup n levels.
        known: By column that the task fills once a record (`Task.truth_columns`, `own_columns`)
            `(n,)`, NaN where there is nothing.
        novel: Bool `(n, 2)`: whether a patient is unlike those of training, and so much that there
            is no answer; None where the bundle cannot say.
        told: By column that it fills for every method (`Task.answer_columns`), by method `(n,)`.
    """

    scenario: str
    classes: tuple[str, ...]
    modalities: tuple[str, ...]
    own: str
    record_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    labels: Integers
    patterns: tuple[str, ...]
    probabilities: Mapping[str, Floats]
    candidates: Bools
    admitted: Bools
    points_to: Integers
    sets: Bools | None
    calibrated_on: Integers
    subgroups: Mapping[str, tuple[str, ...]]
    known: Mapping[str, Floats] = field(default_factory=dict)
    told: Mapping[str, Mapping[str, Floats]] = field(default_factory=dict)
    novel: Bools | None = None

    def __len__(self) -> int:
        """Return n."""
        return len(self.record_ids)

    @property
    def patients(self) -> int:
        """How many patients the records are of."""
        return len(set(self.patient_ids))

    def rows(self, index: Integers) -> Scores:
        """Return some of the records."""

        def pick(values: Sequence[str]) -> tuple[str, ...]:
            return tuple(values[i] for i in index)

        return replace(
            self,
            record_ids=pick(self.record_ids),
            patient_ids=pick(self.patient_ids),
            labels=self.labels[index],
            patterns=pick(self.patterns),
            probabilities={m: p[index] for m, p in self.probabilities.items()},
            candidates=self.candidates[index],
            admitted=self.admitted[index],
            points_to=self.points_to[index],
            sets=None if self.sets is None else self.sets[index],
            calibrated_on=self.calibrated_on[index],
            subgroups={name: pick(levels) for name, levels in self.subgroups.items()},
            novel=None if self.novel is None else self.novel[index],
            known={column: values[index] for column, values in self.known.items()},
            told={
                column: {m: values[index] for m, values in by_method.items()}
                for column, by_method in self.told.items()
            },
        )
