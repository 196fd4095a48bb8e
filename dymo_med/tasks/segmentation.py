"""Regions of a scan, voxel by voxel."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dymo_med.errors import Problem
from dymo_med.modalities.image import plain_name
from dymo_med.tasks.base import TaskEntry
from dymo_med.types import Batch, CohortRecord, MaskSpec, ModalitySpec, PatientRecord, Target, Task
from dymo_med.types.task import EntryModel

LEAST_MASKS = 3  # of training records: one per class of volume
_REGION = re.compile(r"[A-Za-z0-9_-]{1,32}")


class SegmentationEntry(TaskEntry):
    """`task:` of a segmentation.

    Attributes:
        file: File of the mask inside the patient directory.
        labels: Every number that a mask may hold besides 0.
        regions: Labels of each region, by name; outer regions before those within them.
    """

    type: Literal["segmentation"]
    file: str
    labels: list[Annotated[int, Field(ge=1, le=255)]]
    regions: dict[str, Annotated[list[int], Field(min_length=1)]]

    @model_validator(mode="after")
    def _nested(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: a label occurs twice")
        for name, labels in self.regions.items():
            if not _REGION.fullmatch(name):
                raise ValueError("regions: a name must be letters, digits, - or _")
            if not set(labels) <= set(self.labels) or len(set(labels)) != len(labels):
                raise ValueError(f"regions: {name} must list some of the labels, each once")
        of_region = [set(labels) for labels in self.regions.values()]
        for i, (name, own) in enumerate(zip(self.regions, of_region, strict=True)):
            later = of_region[i + 1 :]
            if any(not (other <= own or other.isdisjoint(own)) for other in later):
                raise ValueError("regions must lie within each other, outer ones first, or apart")
            if len(own.difference(*later)) != 1:
                raise ValueError(f"regions: {name} must have one label that no later region has")
        return self


@dataclass(frozen=True)
class Segmentation(Task):
    """Regions of a scan; the target is the file of the masks."""

    type: ClassVar[str] = "segmentation"
    Entry: ClassVar[EntryModel] = SegmentationEntry
    pipeline: ClassVar[str] = "outline"

    stored: ClassVar[Mapping[str, tuple[str, ...]]] = {"mask": ("file", "labels", "regions")}
    by_class: ClassVar[bool] = False
    lacks: ClassVar[Mapping[str, tuple[str, ...]]] = {"train": ("--harm",)}

    masks: MaskSpec

    def __post_init__(self) -> None:
        if tuple(self.masks.regions) != self.classes:
            raise ValueError("The classes of a segmentation are the regions of its masks.")

    @classmethod
    def of(cls, mask: MaskSpec) -> Segmentation:
        """Return the segmentation of some masks."""
        return cls(mask.file, tuple(mask.regions), mask)

    @classmethod
    def from_entry(cls, entry: SegmentationEntry, where: Callable[[str], str]) -> Self:
        """Return the task that cohort.yaml describes."""
        regions = {name: tuple(labels) for name, labels in entry.regions.items()}
        mask = MaskSpec(entry.file, tuple(entry.labels), regions)
        return cls(entry.file, tuple(regions), mask)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Return the task that `to_dict` described."""
        mask = MaskSpec.from_dict(stored["mask"])
        return cls(str(stored["target"]), tuple(map(str, stored["classes"])), mask)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return super().to_dict() | {"mask": asdict(self.masks)}

    @property
    def mask(self) -> MaskSpec:
        """The masks."""
        return self.masks

    @property
    def columns(self) -> tuple[str, ...]:
        """None: masks are files."""
        return ()

    @property
    def files(self) -> tuple[str, ...]:
        """The file of the mask."""
        return (self.masks.file,)

    @property
    def about(self) -> str:
        """The task in a few words."""
        return f"{self.type}: {', '.join(self.classes)}"

    def misfits(
        self, specs: Sequence[ModalitySpec], where: Callable[[tuple[str, ...]], str]
    ) -> list[Problem]:
        """Return what is wrong: scans are volumes on one grid, and masks NIfTI files."""
        problems: list[Problem] = []
        for spec in specs:
            place = where(("modalities", spec.name))
            if len(spec.shape) != 4:
                problems.append(
                    Problem(
                        place,
                        "a segmentation looks at volumes only",
                        expected="kind: image, dims: 3",
                        remedy="Take the modality out of this description",
                    )
                )
            elif (spec.shape, spec.spacing_mm) != (specs[0].shape, specs[0].spacing_mm):
                problems.append(
                    Problem(
                        place,
                        "the scans of a segmentation must lie on one grid",
                        expected=f"size and spacing_mm of {specs[0].name}",
                        remedy="Give all of them the same",
                    )
                )
        try:
            plain_name(self.masks.file)
        except ValueError as error:
            problems.append(
                Problem(
                    where(("task", "file")),
                    str(error),
                    expected="for example seg.nii.gz",
                    remedy="Name the file as it is called in each patient directory",
                )
            )
        if not self.masks.file.endswith((".nii", ".nii.gz")):
            problems.append(
                Problem(
                    where(("task", "file")),
                    "a mask must be NIfTI",
                    expected="name.nii.gz",
                    remedy="Convert the masks",
                )
            )
        return problems

    def read(
        self, cells: Mapping[str, str], blank: Set[str], where: str
    ) -> Target | Problem | None:
        """Return nothing: masks are files."""
        return None

    def shortage(
        self, split: str, records: Sequence[CohortRecord | PatientRecord]
    ) -> Problem | None:
        """Return what is wrong where a split has too few masks to learn from."""
        needed = LEAST_MASKS if split == "train" else 1
        count = sum(r.mask is not None for r in records if isinstance(r, PatientRecord))
        unread = any(isinstance(r, CohortRecord) for r in records)
        if count >= needed or unread:
            return None
        return Problem(
            "",
            f"split '{split}' has too few records with a mask",
            expected=f"at least {needed}",
            got=str(count),
            remedy="Move patients between splits in splits.csv, or add masks",
        )

    def known(self, record: CohortRecord | PatientRecord) -> bool:
        """Return whether a record's mask is known; before its files are read nobody can say."""
        return isinstance(record, CohortRecord) or record.mask is not None

    def known_rows(self, batch: Batch) -> Tensor:
        """Return bool `(B,)`: the records whose mask is known."""
        if batch.masked is None:
            return torch.zeros(len(batch), dtype=torch.bool)
        return batch.masked
