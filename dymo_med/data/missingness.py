"""Scenarios of absence: hide part of what was observed, the same way every time.

Whether a table cell is blanked can depend on nothing (`mcar`, missing completely at random), on
another cell that is always seen (`mar`, at random) or on the cell itself (`mnar`, not at random).

References:
    Rubin, Inference and missing data, Biometrika 63(3), 1976. The logistic mechanisms are those
    of Muzellec et al., Missing Data Imputation using Optimal Transport, ICML 2020, section 5,
    with ranks among training patients in the place of values, which makes the intercept exact.
"""

from __future__ import annotations

import csv
import io
import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dymo_med.errors import ConfigError, Problem
from dymo_med.files import as_was
from dymo_med.registry import nearest
from dymo_med.types import Column, ModalitySpec, ModalityValue, PatientRecord

Kind = Literal[
    "as-is",
    "rate",
    "mean-rate",
    "batch-rate",
    "drop",
    "keep",
    "cells",
    "columns",
    "columns-most",
    "columns-least",
    "mcar",
    "mar",
    "mnar",
    "replay",
]
KINDS: tuple[Kind, ...] = (
    *("as-is", "rate", "mean-rate", "batch-rate", "drop", "keep"),
    *("cells", "columns", "columns-most", "columns-least"),
    *("mcar", "mar", "mnar", "replay"),
)
HIDDEN_COLUMNS = ("scenario", "record_id", "modality", "column")
_FORMS = (
    "as-is, rate:0.4, mean-rate:0.4, batch-rate:0.4, drop:name,name, keep:name+name, keep:*,"
    " cells:0.3, columns:0.3, columns-most:0.3, columns-least:0.3, mcar:0.3, mar:0.3, mnar:0.3 or"
    " replay:file.csv"
)

# From the lowest rank to the highest the log-odds of being blanked rise by this much: at a rate
# of one half, from 1 in 21 to 20 in 21.
_SLOPE = 6.0
# Share of the columns that `mar` keeps and lets the others depend on; as Muzellec et al.
_DRIVERS = 0.3

# `batch-rate`, as published: records that share a draw, how near their share must come to the one
# asked for, and after how many draws that is doubled.
BATCH = 128
_NEAR, _TRIES = 0.005, 100
# `keep:*` lists every pattern of so many modalities at most: 62 of them.
_MOST_LISTED = 6

Cell = tuple[str, int]


@dataclass(frozen=True)
class Scenario:
    """A rule by which observed values are hidden.

    Attributes:
        kind: `as-is` hides nothing; `rate` a share of each patient's modalities, never all;
            `mean-rate` that share on average; `batch-rate` likewise, drawn for batches of records;
            `drop` these modalities for everyone, `keep` all but these; `cells` a share of each
            patient's table cells; `columns` a share of the table columns, the same for everyone,
            `columns-most` and `columns-least` those that tell most and least about the target;
            `mcar`, `mar` and `mnar` each table cell with a probability; `replay` what a file lists.
        text: The rule in its canonical spelling; names outputs and seeds the choice.
        share: From 0 to 1: the share of `rate`, `cells` and `columns`, the expected one of
            `mean-rate`, `batch-rate`, `mcar`, `mar` and `mnar`.
        names: The modalities of `drop` (of `keep`, those that stay) in canonical order.
        digest: SHA-256 of what a `replay` hides; its text does not say which file it was.
        taken: What a `replay` hides, by record: modality and column, -1 for a whole modality.
        kept: What a `batch-rate` leaves, by record, the first one for certain (`planned`).
    """

    kind: Kind
    text: str
    share: float = 0.0
    names: tuple[str, ...] = ()
    digest: str = ""
    taken: Mapping[str, frozenset[Cell]] = field(default_factory=dict, compare=False, repr=False)
    kept: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        """Return the canonical spelling."""
        return self.text


def expanded(texts: Sequence[str], specs: Sequence[ModalitySpec]) -> list[str]:
    """Return the texts with `keep:*` replaced by every pattern in which something is missing.

    Args:
        texts: Scenarios.
        specs: Modalities of the cohort in canonical order.

    Raises:
        ConfigError: If there are too many modalities to list all patterns.

    Example:
        >>> expanded(["as-is", "keep:*"], [ModalitySpec(n, "", "", ()) for n in "ab"])
        ['as-is', 'keep:a', 'keep:b']
    """
    names = [spec.name for spec in specs]
    result = []
    for text in texts:
        if "".join(text.split()) != "keep:*":
            result.append(text)
            continue
        if len(names) > _MOST_LISTED:
            raise ConfigError(
                Problem(
                    f"scenario '{text}'",
                    f"{len(names)} modalities have too many patterns",
                    expected=f"at most {_MOST_LISTED} modalities",
                    remedy="List the patterns that matter, as keep:name+name",
                )
            )
        for size in range(1, len(names)):
            result += [f"keep:{'+'.join(kept)}" for kept in combinations(names, size)]
    return result


def planned(
    scenario: Scenario, record_ids: Sequence[str], specs: Sequence[ModalitySpec], seed: int
) -> Scenario:
    """Return the scenario with what it decides for records together; most decide nothing so.

    `batch-rate` is the published protocol of CyIN: of 128 records at a time, in the given order,
    one modality of each record is kept for certain, drawn evenly; others are kept with the
    probability that makes the expected share right. Draws are repeated until the batch's share of
    kept modalities is within 0.005 of `1 - share`, which is doubled after each 100 draws. Where
    `1 - share` is at most one modality exactly one is kept, so no more than `1 - 1/M` is hidden
    (`hidden_share`). What one record keeps depends on the others of its batch; `hidden` lists it,
    and `replay` repeats it. The share is that of complete records: what a record lacks anyway is
    not made up for, but one modality that it has stays.

    Args:
        scenario: What `parse_scenario` returned.
        record_ids: All records of the evaluation, in its order.
        specs: Modalities in canonical order.
        seed: Any integer.

    References:
        CyIN, NeurIPS 2025 (published code, snapshot da04a3d8: MissingProtocol). There, batches
        come from a shuffled loader, and draws are not seeded.
    """
    if scenario.kind != "batch-rate":
        return scenario
    names = [spec.name for spec in specs]
    kept: dict[str, tuple[str, ...]] = {}
    for start in range(0, len(record_ids), BATCH):
        batch = record_ids[start : start + BATCH]
        stays, order = _batch_draw(scenario, batch, len(names), seed)
        for record, row, ranked in zip(batch, stays.tolist(), order.tolist(), strict=True):
            kept[record] = tuple(names[m] for m in ranked if row[m])
    return replace(scenario, kept=kept)


def _batch_draw(
    scenario: Scenario, batch: Sequence[str], modalities: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return which modalities stay, bool `(n, M)`, and a random order of each record's `(n, M)`."""
    generator = _generator(seed, scenario.text, *batch)
    wanted = max(1 - scenario.share, 1 / modalities)
    chance = (wanted * modalities - 1) / max(modalities - 1, 1)
    near, tries = _NEAR, 0
    while True:
        order = generator.random((len(batch), modalities)).argsort(1)
        stays = generator.random((len(batch), modalities)) < chance
        stays[np.arange(len(batch)), order[:, 0]] = True
        tries += 1
        if abs(stays.mean() - wanted) <= near:
            # The certain one comes first.
            return stays, order
        if tries % _TRIES == 0:
            near *= 2


def hidden_share(scenario: Scenario, modalities: int) -> float | None:
    """Return the share of a complete record's modalities that is hidden; None where none is asked.

    Less than the share asked for where one modality has to stay, and for `rate` rounded to whole
    modalities.

    Args:
        scenario: What `parse_scenario` returned.
        modalities: M.

    Example:
        >>> hidden_share(Scenario("rate", "rate:0.1", share=0.1), 3)
        0.0
    """
    if scenario.kind == "rate":
        return min(round(scenario.share * modalities), modalities - 1) / modalities
    if scenario.kind in ("mean-rate", "batch-rate"):
        return min(scenario.share, 1 - 1 / modalities)
    return None


def parse_scenario(text: str, specs: Sequence[ModalitySpec]) -> Scenario:
    """Return the scenario that `text` asks for.

    Args:
        text: For example `rate:0.4`. A relative path of `replay` starts at the working folder.
        specs: Modalities of the cohort in canonical order; `columns-most`, `columns-least`,
            `mar` and `mnar` need the constants that were fitted on training patients.

    Raises:
        ConfigError: If the text asks for nothing known, the constants that it needs are not
            there, or the file to replay is not right.
    """
    kind, _, argument = (part.strip() for part in text.partition(":"))
    where = f"scenario '{text}'"
    match kind:
        case "as-is" if not argument:
            return Scenario("as-is", "as-is")
        case (
            "rate"
            | "mean-rate"
            | "batch-rate"
            | "cells"
            | "columns"
            | "columns-most"
            | "columns-least"
            | "mcar"
            | "mar"
            | "mnar"
        ):
            try:
                share = float(argument)
            except ValueError:
                share = -1.0
            if not 0 <= share <= 1:
                raise ConfigError(
                    Problem(
                        where,
                        "the share is wrong",
                        expected="a number from 0 to 1",
                        remedy="Correct it, for example rate:0.4",
                    )
                )
            if not kind.endswith("rate"):
                _require_constants(kind, where, specs)
            return Scenario(kind, f"{kind}:{share:g}", share=share)
        case "drop" | "keep":
            known = [spec.name for spec in specs]
            mark = "," if kind == "drop" else "+"
            listed = argument if kind == "drop" else argument.replace("+", ",")
            asked = [name.strip() for name in listed.split(",")]
            problems = [
                Problem(
                    where,
                    f"there is no modality '{name}'",
                    expected="modalities of the bundle",
                    remedy=nearest(name, known),
                )
                for name in asked
                if name not in known
            ]
            if problems:
                raise ConfigError(*problems)
            names = tuple(name for name in known if name in asked)
            return Scenario(kind, f"{kind}:{mark.join(names)}", names=names)
        case "replay":
            return _read_replay(argument, where, specs)
        case _:
            raise ConfigError(
                Problem(
                    where,
                    "the scenario is not known",
                    expected=_FORMS,
                    remedy=nearest(kind, list(KINDS)),
                )
            )


def apply(
    scenario: Scenario, record: PatientRecord, specs: Sequence[ModalitySpec], seed: int
) -> PatientRecord:
    """Return the record with what the scenario hides taken away.

    The choice depends on the seed, the scenario and the record's id alone (that of `columns` on
    the seed and the scenario, that of `mar` and `mnar` also on the record's cells), not on the
    order or number of records.

    `rate` hides exactly `round(share * observed)` modalities and leaves at least one; `mean-rate`
    one more or one less, so that `share * observed` are hidden on average, and leaves at least
    one; `batch-rate` what was `planned`; `cells`
    exactly `round(share * filled)` cells over all tables; the `columns` scenarios exactly
    `round(share * columns)` columns over all tables. `mcar` blanks each cell with probability
    `share`. In `mnar` the probability rises with the cell's own rank among training patients, in
    `mar` with the rank of another cell of the record, its driver: 0.3 of the columns, at least
    one, are drawn to be drivers, which are never blanked, and every other column is given one of
    them, the same for everyone. Over ranks as training patients have them `share` of the cells
    (of those that are not drivers) is blanked. Where the driver, or the fitted constants of the
    column that counts, are absent, the probability is `share`.

    Where the patient has nothing but tables, one cell stays. A table without a filled cell is
    missing. `drop` and `replay` can leave a record without any modality; the caller decides what
    that means.

    Args:
        scenario: What `parse_scenario` returned.
        record: The record; it is not changed.
        specs: Modalities in canonical order, as for `parse_scenario`.
        seed: Any integer.
    """
    match scenario.kind:
        case "as-is":
            return record
        case "drop":
            return record.without(scenario.names)
        case "keep":
            return record.without([n for n in record.modalities if n not in scenario.names])
        case "batch-rate":
            there = [n for n in scenario.kept[record.record_id] if n in record.modalities]
            if not there:  # what was drawn to stay is missing anyway
                seeded = _generator(seed, scenario.text, record.record_id)
                there = [str(seeded.choice(sorted(record.modalities)))]
            return record.without([n for n in record.modalities if n not in there])
        case "replay":
            taken = scenario.taken.get(record.record_id)
            if taken is None:
                return record
            return _without_cells(
                record.without([name for name, column in taken if column < 0]),
                [cell for cell in taken if cell[1] >= 0],
            )
        case "rate" | "mean-rate":
            observed = [spec.name for spec in specs if spec.name in record.modalities]
            generator = _generator(seed, scenario.text, record.record_id)
            count = round(scenario.share * len(observed))
            if scenario.kind == "mean-rate":
                count = math.floor(scenario.share * len(observed) + generator.random())
            count = min(count, len(observed) - 1)
            if count <= 0:
                return record
            drawn = generator.choice(observed, count, replace=False)
            return record.without([str(name) for name in drawn])
        case "cells":
            cells = _filled_cells(record, specs)
            generator = _generator(seed, scenario.text, record.record_id)
            count = min(round(scenario.share * len(cells)), _most(cells, record, specs))
            drawn = generator.choice(len(cells), count, replace=False)
            return _without_cells(record, [cells[i] for i in drawn.tolist()])
        case "columns" | "columns-most" | "columns-least":
            ranked = _ranked_columns(scenario, specs, seed)
            filled = set(_filled_cells(record, specs))
            count = round(scenario.share * len(ranked))
            cells = [cell for cell in ranked[:count] if cell in filled]
            # If one must stay it is the last in the ranking.
            return _without_cells(record, cells[: _most(filled, record, specs)])
        case "mcar" | "mar" | "mnar":
            return _without_cells(record, _drawn_cells(scenario, record, specs, seed))


def hidden(
    before: PatientRecord,
    after: PatientRecord,
    specs: Sequence[ModalitySpec],
    scenario: Scenario | str,
) -> list[dict[str, str]]:
    """Return what was taken from one record, as rows that `replay` can read from a CSV file.

    Args:
        before: The record.
        after: What `apply` left of it.
        specs: Modalities in canonical order.
        scenario: The scenario, or its canonical text.

    Returns:
        Rows with the keys `HIDDEN_COLUMNS`, in canonical order; `column` is blank where the whole
        modality was taken.
    """
    gone: list[tuple[str, str]] = []
    for spec in specs:
        value, left = before.modalities.get(spec.name), after.modalities.get(spec.name)
        if value is None:
            continue
        if left is None:
            gone.append((spec.name, ""))
        elif spec.columns and left is not value:
            lost = (_filled(value) & ~_filled(left)).tolist()
            gone += [
                (spec.name, column.name)
                for column, is_lost in zip(spec.columns, lost, strict=True)
                if is_lost
            ]
    text = str(scenario)
    return [
        dict(zip(HIDDEN_COLUMNS, (text, before.record_id, *pair), strict=True)) for pair in gone
    ]


# --- Which cells ----------------------------------------------------------------------------------


def _generator(*about: object) -> np.random.Generator:
    """Return a generator seeded by these things alone."""
    digest = sha256("\0".join(str(part) for part in about).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _columns(specs: Sequence[ModalitySpec]) -> dict[Cell, Column]:
    """Return the columns of all tables in canonical order."""
    return {(s.name, i): column for s in specs for i, column in enumerate(s.columns)}


def _filled_cells(record: PatientRecord, specs: Sequence[ModalitySpec]) -> list[Cell]:
    """Return the record's filled cells in canonical order."""
    return [
        (spec.name, i)
        for spec in specs
        if spec.columns and spec.name in record.modalities
        for i in _filled(record.modalities[spec.name]).nonzero().flatten().tolist()
    ]


def _most(filled: Collection[Cell], record: PatientRecord, specs: Sequence[ModalitySpec]) -> int:
    """Return how many of the filled cells may go: not all where there is nothing but tables."""
    tables = {spec.name for spec in specs if spec.columns}
    return max(0, len(filled) - (record.modalities.keys() <= tables))


def _ranked_columns(scenario: Scenario, specs: Sequence[ModalitySpec], seed: int) -> list[Cell]:
    """Return all columns, those first that a `columns` scenario hides first."""
    columns = _columns(specs)
    cells = list(columns)
    if scenario.kind == "columns":
        return [cells[i] for i in _generator(seed, scenario.text).permutation(len(cells))]
    sign = -1.0 if scenario.kind == "columns-most" else 1.0
    return sorted(cells, key=lambda cell: sign * (columns[cell].importance or 0.0))


def _drawn_cells(
    scenario: Scenario, record: PatientRecord, specs: Sequence[ModalitySpec], seed: int
) -> list[Cell]:
    """Return the cells that `mcar`, `mar` or `mnar` blanks."""
    columns = _columns(specs)
    filled = _filled_cells(record, specs)
    # Every column has its draw, so that a cell's fate does not hang on which others are filled.
    drawn = _generator(seed, scenario.text, record.record_id).random(len(columns))
    draws = dict(zip(columns, drawn.tolist(), strict=True))
    decisive = dict(zip(filled, filled, strict=True))  # whose rank decides
    if scenario.kind == "mar":
        drivers = _drivers(columns, seed, scenario.text)
        decisive = {cell: drivers[cell] for cell in filled if cell in drivers}
    there = frozenset(filled)
    probability = {}
    for cell, other in decisive.items():
        ranks = None
        if scenario.kind != "mcar" and other in there:
            value = float(record.modalities[other[0]].values[other[1]])
            ranks = _ranks(value, columns[other])
        probability[cell] = _probability(scenario.share, ranks)
    gone = sorted(
        (cell for cell in probability if draws[cell] < probability[cell]),
        key=lambda cell: draws[cell] - probability[cell],
    )
    # If one must stay it is the one that came nearest to staying.
    return gone[: _most(filled, record, specs)]


def _drivers(columns: Mapping[Cell, Column], seed: int, text: str) -> dict[Cell, Cell]:
    """Return the driver of every column that has one; drivers themselves have none."""
    generator = _generator(seed, text)
    usable = [cell for cell, column in columns.items() if column.percentiles or column.frequencies]
    order = [usable[i] for i in generator.permutation(len(usable))]
    chosen = order[: max(1, int(_DRIVERS * len(columns)))]
    picks = generator.integers(len(chosen), size=len(columns)).tolist()
    return {
        cell: chosen[pick] for cell, pick in zip(columns, picks, strict=True) if cell not in chosen
    }


def _ranks(value: float, column: Column) -> tuple[float, float] | None:
    """Return the lowest and highest rank, 0 to 1, of training patients with this value.

    None where the column's constants were not fitted.
    """
    if column.type == "categorical":
        if not column.frequencies:
            return None
        below = [0.0, *np.cumsum(column.frequencies).tolist()]
        return below[round(value)], below[round(value) + 1]
    grid = column.percentiles
    if not grid:
        return None
    steps = len(grid) - 1
    value = min(max(value, grid[0]), grid[-1])
    left, right = bisect_left(grid, value), bisect_right(grid, value)
    if right > left:
        return left / steps, (right - 1) / steps
    rank = (left - 1 + (value - grid[left - 1]) / (grid[left] - grid[left - 1])) / steps
    return rank, rank


def _probability(rate: float, ranks: tuple[float, float] | None) -> float:
    """Return the probability of being blanked, averaged over a range of ranks.

    It is `logistic(a + slope * rank)`. Over ranks uniform on [0, 1] its mean is
    `(softplus(a + slope) - softplus(a)) / slope`, which is `rate` for
    `exp(a) = (exp(slope * rate) - 1) / (exp(slope) - exp(slope * rate))`. Averaging over the
    ranks that a category or a run of equal values stands for keeps that mean for them too.

    Args:
        rate: The mean over all ranks.
        ranks: Lowest and highest rank; None = not known.
    """
    if ranks is None or rate in (0.0, 1.0):
        return rate
    a = math.log(math.expm1(_SLOPE * rate) / -math.expm1(_SLOPE * (rate - 1))) - _SLOPE
    low, high = (a + _SLOPE * rank for rank in ranks)
    if high - low < 1e-6:
        return math.exp(low - _softplus(low))
    return (_softplus(high) - _softplus(low)) / (high - low)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _require_constants(kind: str, where: str, specs: Sequence[ModalitySpec]) -> None:
    """Check that there are the columns, and their fitted constants, that a scenario goes by.

    Raises:
        ConfigError: If there are not.
    """
    columns = _columns(specs).values()
    if not columns:
        raise ConfigError(
            Problem(
                where,
                "there is no table whose cells could be removed",
                expected="a bundle with a table",
                remedy="Use rate or drop, which remove whole modalities",
            )
        )
    if kind in ("columns-most", "columns-least") and any(c.importance is None for c in columns):
        raise ConfigError(
            Problem(
                where,
                "the bundle holds no importances of table columns",
                expected="a bundle of this version",
                remedy="Train it again with this version, or use columns",
            )
        )
    if kind in ("mar", "mnar") and not any(c.percentiles or c.frequencies for c in columns):
        raise ConfigError(
            Problem(
                where,
                "the bundle holds neither percentiles nor frequencies of table columns",
                expected="what training patients' cells were like",
                remedy="Train with at least 20 filled cells in a column, or use mcar",
            )
        )
    if kind == "mar" and len(columns) < 2:
        raise ConfigError(
            Problem(
                where,
                "there is no other column to depend on",
                expected="two columns or more",
                remedy="Use mcar or mnar",
            )
        )


# --- Replay ---------------------------------------------------------------------------------------


def _read_replay(argument: str, where: str, specs: Sequence[ModalitySpec]) -> Scenario:
    """Return the scenario that hides what a file lists.

    Raises:
        ConfigError: If the file is absent or wrong, or holds several scenarios and none is chosen.
    """
    # The text of a scenario may stand after the path; a path may contain the sign itself.
    path, mark, choice = argument.rpartition("#")
    if not mark or Path(argument).is_file():
        path, choice = argument, ""
    if not path.strip():
        raise ConfigError(
            Problem(
                where,
                "no file is named",
                expected="replay:file.csv",
                remedy="Name the hidden.csv of an evaluation",
            )
        )
    file = Path(path.strip())
    rows = _hidden_rows(file, where)
    texts = list(dict.fromkeys(row["scenario"] for row in rows))
    choice = choice.strip() or (texts[0] if len(texts) == 1 else "")
    if choice not in texts:
        raise ConfigError(
            Problem(
                where,
                f"the file has no scenario '{choice}'" if choice else "no scenario is chosen",
                expected="one of " + ", ".join(texts) if texts else "at least one row",
                remedy=f"Write replay:{file}#SCENARIO" if texts else "Replay another file",
            )
        )
    places = {
        spec.name: {"": -1} | {column.name: i for i, column in enumerate(spec.columns)}
        for spec in specs
    }
    taken: dict[str, set[Cell]] = {}
    problems: dict[Problem, None] = {}
    for row in rows:
        if row["scenario"] != choice:
            continue
        name, column = row["modality"], row["column"]
        known = places.get(name)
        if known is None:
            remedy = nearest(name, list(places))
            what, expected = f"there is no modality '{name}'", "modalities of the bundle"
            problems[Problem(where, what, expected=expected, remedy=remedy)] = None
        elif column not in known:
            what, expected = f"modality '{name}' has no column '{column}'", "its columns, or blank"
            columns = list(known)[1:]
            remedy = nearest(column, columns) if columns else "Leave the column blank"
            problems[Problem(where, what, expected=expected, remedy=remedy)] = None
        else:
            taken.setdefault(row["record_id"], set()).add((name, known[column]))
    if problems:
        raise ConfigError(*problems)
    listed = sorted((record, *cell) for record, cells in taken.items() for cell in cells)
    return Scenario(
        "replay",
        # What was replayed and saved again is the same scenario.
        f"replay:{choice.removeprefix('replay:')}",
        digest=sha256(repr(listed).encode()).hexdigest(),
        taken={record: frozenset(cells) for record, cells in taken.items()},
    )


def _hidden_rows(file: Path, where: str) -> list[dict[str, str]]:
    """Return the rows of a file of hidden values.

    Raises:
        ConfigError: If it is not one.
    """
    try:
        reader = csv.reader(io.StringIO(file.read_bytes().decode("utf-8-sig")), strict=True)
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            Problem(
                where,
                f"{file.name} cannot be read",
                expected="a CSV file in UTF-8",
                got=type(error).__name__,
                remedy="Give the file of hidden values that an evaluation wrote",
            )
        ) from error
    header = lines[0][1] if lines else []
    if sorted(header) != sorted(HIDDEN_COLUMNS):
        raise ConfigError(
            Problem(
                where,
                f"the header of {file.name} is wrong",
                expected=",".join(HIDDEN_COLUMNS),
                got=",".join(header[:8]) or "nothing",
                remedy="Give the file of hidden values that an evaluation wrote",
            )
        )
    rows = []
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise ConfigError(
                Problem(
                    where,
                    f"{file.name}, line {number}, has another number of cells",
                    expected=str(len(header)),
                    got=str(len(cells)),
                    remedy="Write every row as scenario,record_id,modality,column",
                )
            )
        rows.append({key: as_was(cell).strip() for key, cell in zip(header, cells, strict=True)})
    return rows


# --- Cells ----------------------------------------------------------------------------------------


def _without_cells(record: PatientRecord, cells: Iterable[Cell]) -> PatientRecord:
    """Return the record with cells blank; the record itself if none of them was filled."""
    blank: dict[str, list[int]] = {}
    for name, column in cells:
        if name in record.modalities:
            blank.setdefault(name, []).append(column)
    modalities = dict(record.modalities)
    for name, columns in blank.items():
        before = _filled(modalities[name])
        after = before.clone()
        after[columns] = False
        if not after.any():
            del modalities[name]
        elif not torch.equal(before, after):
            modalities[name] = _with_cells(modalities[name], after)
    if all(modalities.get(name) is value for name, value in record.modalities.items()):
        return record
    return replace(record, modalities=modalities)


def _filled(value: ModalityValue) -> torch.Tensor:
    """Return bool `(F,)`: the filled cells of a table."""
    if value.observed_fields is None:
        return torch.ones_like(value.values, dtype=torch.bool)
    return value.observed_fields


def _with_cells(value: ModalityValue, filled: torch.Tensor) -> ModalityValue:
    """Return a table with only some of its cells."""
    facts = {**value.source.facts, "cells": f"{int(filled.sum())} of {len(filled)} filled"}
    return replace(
        value,
        values=value.values.where(filled, value.values.new_zeros(())),
        observed_fields=filled,
        source=replace(value.source, facts=facts),
    )
