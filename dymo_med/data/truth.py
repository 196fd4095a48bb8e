"""What a simulator knows of its patients: the exact answer for every set of modalities.

Any cohort may bring a `truth.csv`. Of its columns `record_id` and `posterior[NAME+NAME]`, one for
every set of modalities, are read here; others are ignored.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dymo_med.errors import ConfigError, Problem

TRUTH = "truth.csv"
_BEFORE, _AFTER = "posterior[", "]"


def every_subset(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return all sets of some names, the empty one first: name m is in set k if bit m of k is set.

    Example:
        >>> every_subset(["t1", "labs"])
        [(), ('t1',), ('labs',), ('t1', 'labs')]
    """
    return [
        tuple(name for m, name in enumerate(names) if subset >> m & 1)
        for subset in range(1 << len(names))
    ]


def posterior_column(subset: Collection[str]) -> str:
    """Return the name of the column of a set of modalities, which are in canonical order.

    Example:
        >>> posterior_column(["t1", "labs"])
        'posterior[t1+labs]'
    """
    return f"{_BEFORE}{'+'.join(subset)}{_AFTER}"


@dataclass(frozen=True)
class Truth:
    """Exact answers about the records of a cohort.

    Attributes:
        record_ids: n records.
        subsets: S sets of modalities.
        posterior: Float64 `(n, S)`: probability of the last class from exactly these modalities.
    """

    record_ids: tuple[str, ...]
    subsets: tuple[frozenset[str], ...]
    posterior: NDArray[np.float64]

    def of(self, record_id: str, observed: Collection[str]) -> float:
        """Return the exact probability of the last class for a record from some modalities.

        Raises:
            KeyError: If the record or the set of modalities is not known.
        """
        row, column = self._rows[record_id], self._columns[frozenset(observed)]
        return float(self.posterior[row, column])

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.record_ids)}

    @cached_property
    def _columns(self) -> dict[frozenset[str], int]:
        return {subset: i for i, subset in enumerate(self.subsets)}


def read_truth(folder: Path) -> Truth:
    """Read the exact answers of a cohort's `truth.csv`.

    Args:
        folder: The cohort's folder.

    Raises:
        ConfigError: If there is no such file, or it holds no posteriors.
    """
    path = Path(folder) / TRUTH
    where, expected = str(path), f"record_id and {posterior_column(['NAME', 'NAME'])}"
    remedy = "Make the cohort with `dymo-med simulate`"
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            Problem(
                where, "the exact answers cannot be read", expected, type(error).__name__, remedy
            )
        ) from None
    header = rows[0] if rows else []
    columns = [i for i, n in enumerate(header) if n.startswith(_BEFORE) and n.endswith(_AFTER)]
    if "record_id" not in header or not columns:
        raise ConfigError(Problem(where, "it holds no exact answers", expected, "", remedy))
    try:
        posterior = np.array([[float(row[i]) for i in columns] for row in rows[1:]])
        names = tuple(row[header.index("record_id")] for row in rows[1:])
    except (ValueError, IndexError):
        raise ConfigError(
            Problem(where, "a posterior is no number", "numbers from 0 to 1", "", remedy)
        ) from None
    inside = (header[i][len(_BEFORE) : -len(_AFTER)] for i in columns)
    subsets = tuple(frozenset(filter(None, text.split("+"))) for text in inside)
    return Truth(names, subsets, posterior.reshape(len(names), len(columns)))
