"""Which of K classes somebody is in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from dymo_med.errors import ConfigError, Problem
from dymo_med.modalities.cells import as_code
from dymo_med.registry import nearest
from dymo_med.tasks.base import OverClasses, TaskEntry, number_of
from dymo_med.types import Target
from dymo_med.types.task import EntryModel


class ClassificationEntry(TaskEntry):
    """`task:` of a classification.

    Attributes:
        target: Column of the labels file.
        classes: Its values.
    """

    type: Literal["classification"]
    target: str
    classes: list[str]

    @model_validator(mode="after")
    def _several(self) -> Self:
        if len(self.classes) < 2:
            raise ValueError("classes must have at least two entries")
        return self


@dataclass(frozen=True)
class Classification(OverClasses):
    """Which of K classes somebody is in."""

    type: ClassVar[str] = "classification"
    Entry: ClassVar[EntryModel] = ClassificationEntry

    @classmethod
    def from_entry(cls, entry: ClassificationEntry, where: Callable[[str], str]) -> Self:
        """Return the task that cohort.yaml describes.

        Raises:
            ConfigError: If a class occurs twice.
        """
        if len(set(entry.classes)) != len(entry.classes):
            raise ConfigError(
                Problem(
                    where("classes"),
                    "a class occurs twice",
                    "each class once",
                    remedy="Remove one of them",
                )
            )
        return cls(entry.target, tuple(entry.classes))

    def read(
        self, cells: Mapping[str, str], blank: Set[str], where: str
    ) -> Target | Problem | None:
        """Return the class that a cell names."""
        text = cells[self.target]
        if text in blank:
            return None
        codes = [as_code(name) for name in self.classes]
        if as_code(text) in codes:
            return Target(codes.index(as_code(text)))
        remedy = f"{nearest(text, list(self.classes))}. Leave it blank if it is not known"
        if number_of(text) is not None:
            numbers = ", ".join(f'"{k}"' for k in range(len(codes)))
            remedy = (
                "Write the classes in place of numbers, or declare the numbers as classes in"
                f" cohort.yaml, for example classes: [{numbers}]"
            )
        return Problem(
            f"{where} {self.target}",
            "the class is not known",
            expected=" or ".join(self.classes),
            remedy=remedy,
        )


PLAIN = Classification("", ("0", "1"))
"""A classification of classes without names, for what is trained without a cohort."""
