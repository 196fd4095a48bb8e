"""What is predicted, and everything that differs from one kind of prediction to another.

A `Task` answers for itself. Whoever holds one (`cohort.task`, `bundle.task`) says what it wants
done, and never asks which task it is; `dymo_med.tasks` holds the concrete ones, one file and one
line of the table `TASKS` each. What a task answers for, in the order in which it is asked:

1. *Reading.* `Entry` are its keys in cohort.yaml, `from_entry` makes it from them. `columns` of
   the labels file hold the target, `read` makes a `Target` of their cells, `fitted` may learn from
   the training patients' targets (bins of a time), `known` says who has one.
2. *Training.* `shortage` says what is lacking to learn from, `with_targets` puts into a batch what
   the loss is about. `pipeline` names what trains and asks its networks.
3. *Commands and pages.* `about`, `predicts`, `lacks` and `cohort_page`.
4. *Other cohorts.* `accepts` says why answers for a cohort's task cannot be judged by this one's.

Tasks whose networks answer with K probabilities (`dymo_med.tasks.base.OverClasses`) answer for
more: losses, calibration, figures, columns of tables.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self, TypeAlias

import torch
from pydantic import BaseModel
from torch import Tensor

from dymo_med.errors import Problem
from dymo_med.types.batch import Batch
from dymo_med.types.record import CohortRecord, PatientRecord
from dymo_med.types.spec import ModalitySpec

EntryModel: TypeAlias = type[BaseModel]


@dataclass(frozen=True)
class Scale:
    """The number that a regression predicts, and the bands that its networks think in.

    A network says how likely each band is, and the answer is the mean of the bands' centres by
    these probabilities. In training a true value belongs to the two bands it lies between, in
    proportion to how near it is to their centres, so that the mean is the value itself. With bands
    in the place of classes, whatever is defined on classes (prototypes, rewards, prediction sets,
    explanations) is defined on a number as well.

    Attributes:
        low: Lowest value there is.
        high: Highest value there is.
        centers: Of K bands, ascending, from `low` to `high`. A value belongs to the nearest.
        unit: For people; empty if none.

    References:
        Imani and White, Improving Regression Performance with Distributional Losses, ICML 2018;
        Schrittwieser et al., Mastering Atari, Go, Chess and Shogi by Planning with a Learned
        Model, Nature 588, 2020 (a value as shares of its two neighbours).

    Example:
        >>> scale = Scale(-1.0, 1.0, (-1.0, 0.0, 1.0))
        >>> scale.shares(torch.tensor([0.25])).tolist(), scale.band(0.25)
        ([[0.0, 0.75, 0.25]], 1)
        >>> scale.value(torch.tensor([0.0, 0.75, 0.25])).item()
        0.25
    """

    low: float
    high: float
    centers: tuple[float, ...]
    unit: str = ""

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.centers))
        ends = len(self.centers) >= 2 and (self.centers[0], self.centers[-1])
        if not rising or ends != (self.low, self.high):
            raise ValueError("The bands' centres must rise from the lowest value to the highest.")
        if len(set(self.names)) != len(self.centers):
            raise ValueError("The bands' centres are too close to each other to have names.")

    @property
    def names(self) -> tuple[str, ...]:
        """K names of bands, by their centres ("near 2 mmHg")."""
        return tuple(f"near {center:g} {self.unit}".rstrip() for center in self.centers)

    def band(self, value: float) -> int:
        """Return the index of the nearest centre, the lower one on a tie."""
        return min(range(len(self.centers)), key=lambda k: abs(value - self.centers[k]))

    def shares(self, values: Tensor) -> Tensor:
        """Return what part of each value belongs to each band.

        Args:
            values: `(n,)`, NaN = not known.

        Returns:
            Float32 `(n, K)`; rows add up to 1, or are 0 where the value is not known.
        """
        centers = torch.tensor(self.centers, dtype=torch.float64)
        known = ~values.isnan()
        inside = values.double().where(known, self.low).clamp(self.low, self.high)
        right = torch.searchsorted(centers, inside, right=True).clamp(1, len(centers) - 1)
        step = centers[right] - centers[right - 1]
        share = (inside - centers[right - 1]) / step
        found = torch.zeros(len(values), len(centers), dtype=torch.float64)
        found.scatter_(1, right[:, None] - 1, 1 - share[:, None])
        found.scatter_(1, right[:, None], share[:, None])
        return (found * known[:, None]).float()

    def value(self, shares: Tensor) -> Tensor:
        """Return the mean of the bands' centres: `(...)` from probabilities `(..., K)`."""
        return shares @ torch.tensor(self.centers, dtype=shares.dtype, device=shares.device)


@dataclass(frozen=True)
class MaskSpec:
    """Where a segmentation's masks are and what their numbers mean.

    Attributes:
        file: File inside a patient's folder.
        labels: Every number that a mask may hold besides 0.
        regions: Labels that make up each region, by the region's name in canonical order: outer
            ones before those within them.
    """

    file: str
    labels: tuple[int, ...]
    regions: Mapping[str, tuple[int, ...]]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MaskSpec:
        """Return the spec that `dataclasses.asdict` described."""
        regions = {name: tuple(labels) for name, labels in data["regions"].items()}
        return cls(data["file"], tuple(data["labels"]), regions)


@dataclass(frozen=True)
class Target:
    """What the labels file says of one record.

    Attributes:
        label: Class index; None where something is known, but not the class (a censored time).
        value: The number that the class is a band or bin of; None where there is none.
        event: Of a time, whether it is that of the event; None of other tasks.
    """

    label: int | None
    value: float | None = None
    event: bool | None = None


@dataclass(frozen=True)
class Task(ABC):
    """What is predicted, and what differs by it; see the module.

    Attributes:
        target: Column of the labels file, or file, that holds the truth.
        classes: K names in canonical order. For two classes the last is the positive one.
    """

    type: ClassVar[str]
    """Its name in `TASKS`, in cohort.yaml, and in sentences ("a regression")."""
    Entry: ClassVar[EntryModel]
    """What cohort.yaml says of it."""
    pipeline: ClassVar[str] = "fusion"
    """What trains and asks its networks: `fusion` of all modalities into K logits, or `outline`."""
    cohort_page: ClassVar[str] = "classes"
    """Which page shows a cohort."""
    stored: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Keys of `to_dict` beside target and classes, with the keys within each."""
    by_class: ClassVar[bool] = True
    """Whether patients of one class are alike, so that what only they have gives it away."""
    lacks: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Options that it has no use for, by command."""

    target: str
    classes: tuple[str, ...]

    # Reading

    @classmethod
    @abstractmethod
    def from_entry(cls, entry: Any, where: Callable[[str], str]) -> Self:
        """Return the task that cohort.yaml describes.

        Args:
            entry: An `Entry`.
            where: Place of one of its keys in the file, for messages.

        Raises:
            ConfigError: If keys do not go together.
        """

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Return the task that `to_dict` described; `ValueError` or `KeyError` if it cannot be."""
        return cls(str(stored["target"]), tuple(map(str, stored["classes"])))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; what does not apply to the task has no key."""
        return {"type": self.type, "target": self.target, "classes": self.classes}

    @property
    def scale(self) -> Scale | None:
        """The number that classes are bands of; None where they are no bands of a number."""
        return None

    @property
    def mask(self) -> MaskSpec | None:
        """The masks that classes are regions of; None where they are no regions."""
        return None

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the labels file that hold the target."""
        return (self.target,)

    @property
    def files(self) -> tuple[str, ...]:
        """Files of a patient directory that hold the target."""
        return ()

    @abstractmethod
    def read(
        self, cells: Mapping[str, str], blank: Set[str], where: str
    ) -> Target | Problem | None:
        """Return what the labels file says of a record.

        Args:
            cells: Cells of `columns`.
            blank: Words that mean "not known".
            where: File and line, for messages.

        Returns:
            None where nothing is known; what is wrong with the cells.
        """

    def misfits(
        self, specs: Sequence[ModalitySpec], where: Callable[[tuple[str, ...]], str]
    ) -> list[Problem]:
        """Return what is wrong with modalities, or with a file that the task names.

        Args:
            specs: Of the cohort.
            where: Place of a key in the file, for messages.
        """
        return []

    def fitted(self, training: Sequence[CohortRecord]) -> Self:
        """Return the task with what it learns from targets of training records; most learn nothing.

        Records are read anew by what is returned (`again`).
        """
        return self

    def again(self, record: CohortRecord) -> CohortRecord:
        """Return a record whose target was read by another task, as this one sees it."""
        return record

    def adopt(self, other: Task, record: CohortRecord) -> CohortRecord:
        """Return a record of another cohort, its target as this task would have read it.

        Args:
            other: The other cohort's task, which this one accepts.
            record: Of the other cohort.
        """
        return record

    def known(self, record: CohortRecord | PatientRecord) -> bool:
        """Return whether something is known of a record's target."""
        return record.label is not None

    def known_rows(self, batch: Batch) -> Tensor:
        """Return bool `(B,)`: the records of whose target something is known."""
        return batch.known

    # Training

    def with_targets(self, batch: Batch, records: Sequence[PatientRecord]) -> Batch:
        """Return a batch with what the loss is about, where that is more than `labels`.

        Args:
            batch: B records, collated.
            records: The same.
        """
        return batch

    @abstractmethod
    def shortage(
        self, split: str, records: Sequence[CohortRecord | PatientRecord]
    ) -> Problem | None:
        """Return what a split lacks that has to be there to learn from; `where` is left empty.

        Args:
            split: Which split.
            records: All of it, read or not; what only files can tell is not missed before.
        """

    # Pages and commands

    @property
    def unit(self) -> str:
        """Unit of what is answered, for people; empty if there is none."""
        return ""

    @property
    def about(self) -> str:
        """The task in a few words, for metadata ("classification: grade")."""
        return f"{self.type}: {self.target}"

    @property
    def in_full(self) -> str:
        """The task with its classes."""
        return f"{self.type}: {self.target} ({', '.join(self.classes)})"

    @property
    def predicts(self) -> str:
        """What is predicted, for the model card."""
        return ", ".join(self.classes)

    def accepts(self, other: Task) -> tuple[str, str, str] | None:
        """Return why answers for another cohort's task cannot be judged by this one.

        Returns:
            What is wrong, what is expected and what was got; None = they can.
        """
        if other.type != self.type:
            return "the tasks differ", f"a {self.type}", f"a {other.type}"
        if other.classes != self.classes:
            return "the classes differ", ", ".join(self.classes), ", ".join(other.classes)
        return None
