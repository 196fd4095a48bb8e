"""What of a cohort is there for whom: columns that nobody has, modalities that one class has.

Nothing here is an error. It is what `check` and `train` say, since a network can learn nothing of
what no training patient has, and learns the answer from what only one class has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from dymo_med.errors import Problem
from dymo_med.types import Cohort, ModalitySpec, PatientRecord, Split

# With fewer patients in a class, that none of them has something says little.
_FEWEST = 2
_MOST_NAMED = 8


class Survey:
    """Counts patients while records are read.

    Args:
        cohort: Whose records they are; every spec's table may be looked at.
    """

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        self._of_class: dict[int, set[str]] = defaultdict(set)
        # By modality and column (or none): patients of each class who have it.
        self._having: dict[tuple[str, str], dict[int, set[str]]] = defaultdict(
            lambda: defaultdict(set)
        )
        self._tables: dict[str, set[Split | None]] = defaultdict(set)
        self._filled: dict[tuple[str, str], set[Split | None]] = defaultdict(set)
        self._categories: dict[tuple[str, str], set[int]] = defaultdict(set)

    def add(self, record: PatientRecord) -> None:
        """Take note of one record."""
        split = self.cohort.splits.get(record.patient_id)
        if record.label is not None:
            self._of_class[record.label].add(record.patient_id)
        for spec in self.cohort.specs:
            value = record.modalities.get(spec.name)
            if value is None:
                continue
            if record.label is not None:
                self._having[spec.name, ""][record.label].add(record.patient_id)
            if not spec.columns or value.observed_fields is None:
                continue
            self._tables[spec.name].add(split)
            cells = zip(
                spec.columns, value.observed_fields.tolist(), value.values.tolist(), strict=True
            )
            for column, filled, cell in cells:
                if not filled:
                    continue
                self._filled[spec.name, column.name].add(split)
                if record.label is not None:
                    self._having[spec.name, column.name][record.label].add(record.patient_id)
                if column.type == "categorical" and split == "train":
                    self._categories[spec.name, column.name].add(round(cell))

    def notes(self) -> list[Problem]:
        """Return what is worth a look."""
        notes = []
        for spec in self.cohort.specs:
            notes += self._of_one_class(spec)
            if spec.name in self._tables:
                notes += self._of_nobody(spec)
        return notes

    def _of_nobody(self, spec: ModalitySpec) -> list[Problem]:
        """Return columns and categories of a table that no training record has."""
        where = f"Cohort {self.cohort.name}: {spec.name}"
        found = {c.name: self._filled[spec.name, c.name] for c in spec.columns}
        never = [name for name, splits in found.items() if not splits]
        untrained = [n for n, s in found.items() if s and "train" not in s]
        notes = []
        if never:
            notes.append(
                Problem(
                    where,
                    "columns that are blank in every record",
                    got=_some(never),
                    remedy="Compare their names with the files' (header in cohort.yaml), or take"
                    " them out; they are not recovered",
                )
            )
        if untrained and "train" in self._tables[spec.name]:
            notes.append(
                Problem(
                    where,
                    "columns that no training record has",
                    got=_some(untrained),
                    remedy="Take them out, or move patients who have them into train; they are not"
                    " recovered",
                )
            )
        unseen = [
            f"{column.name} ({', '.join(absent)})"
            for column in spec.columns
            if "train" in found[column.name]
            and (
                absent := [
                    value
                    for k, value in enumerate(column.values)
                    if k not in self._categories[spec.name, column.name]
                ]
            )
        ]
        if unseen:
            notes.append(
                Problem(
                    where,
                    "categories that no training record has",
                    got=_some(unseen),
                    remedy="Nothing is learned of them; join them with others under aliases, or"
                    " move patients who have them into train",
                )
            )
        return notes

    def _of_one_class(self, spec: ModalitySpec) -> list[Problem]:
        """Return whether a modality, or columns of it, give the class away by being there."""
        task = self.cohort.task
        if not task.by_class:
            return []

        def shares(name: str) -> str:
            having = self._having.get((spec.name, name), {})
            classes = {k: whom for k, whom in self._of_class.items() if len(whom) >= _FEWEST}
            there = {k: len(having.get(k, ())) for k in sorted(classes)}
            if len(there) < 2 or all(there.values()) or not any(there.values()):
                return ""
            return " and ".join(
                f"{n} of {len(classes[k])} {task.classes[k]}" for k, n in there.items()
            )

        where = f"Cohort {self.cohort.name}: {spec.name}"
        if whole := shares(""):
            return [
                Problem(
                    where,
                    "no patient of some class has the modality",
                    expected="some patient of every class",
                    got=whole,
                    remedy="Find out why, or take it out: that it is there tells the class",
                )
            ]
        parts = [f"{c.name}: {told}" for c in spec.columns if (told := shares(c.name))]
        if not parts:
            return []
        return [
            Problem(
                where,
                "no patient of some class has a value in a column",
                expected="some patient of every class",
                got="; ".join(parts[:_MOST_NAMED]),
                remedy="Find out why, or take it out: that it is there tells the class",
            )
        ]


def survey(cohort: Cohort, records: Iterable[PatientRecord]) -> list[Problem]:
    """Return what is worth a look about records that were read.

    Args:
        cohort: Theirs.
        records: With labels, as `data.patient.read_record` returns them.
    """
    found = Survey(cohort)
    for record in records:
        found.add(record)
    return found.notes()


def _some(names: Sequence[str]) -> str:
    left = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {left} more" if left > 0 else "")
