"""Errors a user can act on: what and where, expected, got, remedy; one exit code per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory does not hold something.

    PyTorch has a class for the memory of a GPU alone. That a number of bytes overflows is as if
    they did not fit.
    """
    if isinstance(error, MemoryError):
        return True
    said = ("out of memory", "can't allocate memory", "calculation overflowed")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an input, and what to do about it.

    Never put a field's value in here: it may be health data. Names, shapes, counts and file
    names are fine.

    Attributes:
        where: The file, key, patient or command at fault, with a line number where there is one.
        what: What is wrong, as a short clause.
        expected: What would have been right.
        got: What was found instead (a shape, a type, a name; not a patient's value).
        remedy: What the user can do, as a sentence.
    """

    where: str
    what: str
    expected: str = ""
    got: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        """Return the problem as one line of full sentences."""
        parts = [f"{self.where}: {self.what}."]
        if self.expected:
            parts.append(f"Expected {self.expected}.")
        if self.got:
            parts.append(f"Got {self.got}.")
        if self.remedy:
            parts.append(f"{self.remedy}.")
        return " ".join(parts)


class DymoMedError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        *problems: One or more problems; a reader reports all that it finds at once.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


class ConfigError(DymoMedError):
    """A command, recipe or cohort description is wrong (exit code 2)."""

    exit_code = 2


class PatientDataError(DymoMedError):
    """A patient's files are wrong (exit code 3)."""

    exit_code = 3


class RefusedError(PatientDataError):
    """A modality can be read but not be used: the quality gate refuses it (exit code 3).

    Args:
        *problems: What is wrong with it.
        checks: Which check of the gate each problem is of.
    """

    def __init__(self, *problems: Problem, checks: Sequence[str] = ()) -> None:
        super().__init__(*problems)
        self.checks = tuple(checks)


class BundleError(DymoMedError):
    """A bundle is missing, damaged or does not fit (exit code 4)."""

    exit_code = 4
