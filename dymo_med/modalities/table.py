"""Tables: one row of named cells, numbers and categories, any of which may be blank."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dymo_med.blocks import ColumnDecoder, ColumnEncoder, Encoder
from dymo_med.config import Strict
from dymo_med.errors import PatientDataError, Problem
from dymo_med.files import write_bytes
from dymo_med.modalities.base import Modality, the_one
from dymo_med.modalities.image import plain_name
from dymo_med.registry import nearest
from dymo_med.types import Column, ModalitySpec, ModalityValue, Source

# Python's float() also takes "1_000", "nan" and "inf"; a table must not.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NOT_A_NUMBER = frozenset({"nan", "inf", "-inf", "+inf", "infinity", "-infinity"})
_LARGEST = torch.finfo(torch.float32).max

# Percentiles of fewer cells than this would list patients' values in the bundle.
_FEWEST = 20


class ColumnEntry(Strict):
    """A column of a table in `cohort.yaml`.

    Attributes:
        type: `continuous` or `categorical`.
        unit: Unit of a continuous column.
        range: Lowest and highest plausible value in `unit`; outside it is an error.
        values: The categories of a categorical column. Quote words that YAML reads as true or
            false: `values: ["yes", "no"]`.
    """

    type: Literal["continuous", "categorical"]
    unit: str = ""
    range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    values: list[str] | None = None

    @field_validator("values", mode="before")
    @classmethod
    def _quoted(cls, values: Any) -> Any:
        if isinstance(values, list) and any(isinstance(v, bool) for v in values):
            raise ValueError(
                "YAML reads yes, no, on, off, true and false as booleans; quote the categories,"
                ' for example values: ["yes", "no"]'
            )
        if isinstance(values, list) and any(not isinstance(v, str) for v in values):
            raise ValueError('categories are text; quote them, for example values: ["0", "1"]')
        return values

    @model_validator(mode="after")
    def _fits(self) -> ColumnEntry:
        if self.type == "categorical":
            if self.values is None:
                raise ValueError("a categorical column needs values")
            stripped = [v.strip() for v in self.values]
            if len(set(stripped)) < 2 or len(set(stripped)) != len(stripped) or "" in stripped:
                raise ValueError("values must be at least two distinct, non-empty categories")
            if stripped != self.values:
                raise ValueError("values must not begin or end with spaces")
            if self.range is not None or self.unit:
                raise ValueError("a categorical column has no range and no unit")
        elif self.values is not None:
            raise ValueError("a continuous column has no values")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError("range must be [lowest, highest]")
        if self.range is not None and not all(map(math.isfinite, self.range)):
            raise ValueError("range must be two finite numbers")
        return self


class TableEntry(Strict):
    """A table modality in `cohort.yaml`.

    Attributes:
        kind: `table`.
        file: CSV or JSON file inside the patient directory; several tables may share one.
        columns: Columns in canonical order.
    """

    kind: Literal["table"]
    file: str
    columns: Annotated[dict[str, ColumnEntry], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> TableEntry:
        plain_name(self.file)
        if not self.file.lower().endswith((".csv", ".json")):
            raise ValueError("file must end in .csv or .json")
        if any(not name or name != name.strip() for name in self.columns):
            raise ValueError("column names must not be empty, or begin or end with spaces")
        return self


@dataclass(frozen=True)
class _Row:
    """The one row of a table file: stripped text by header, and where the cells are."""

    cells: Mapping[str, str]
    place: str


class Table(Modality):
    """One row of columns, each continuous or categorical.

    The likelihood is a Gaussian per continuous column in standardised units (zero mean and unit
    spread over training patients), its log spread kept within [-3, 2], and a softmax per
    categorical column; only filled cells count.
    """

    Entry = TableEntry
    log_std_range = (-3.0, 2.0)

    def __init__(self, spec: ModalitySpec) -> None:
        super().__init__(spec)
        # Where each column's parameters start.
        starts, size = [], 0
        for column in spec.columns:
            starts.append(size)
            size += 2 if column.type == "continuous" else len(column.values)
        self._starts = tuple(starts)

    @classmethod
    def spec_from_entry(cls, name: str, entry: BaseModel) -> ModalitySpec:
        """Return the spec of a validated `cohort.yaml` entry."""
        entry = cast("TableEntry", entry)
        columns = tuple(
            Column(
                name=column_name,
                type=column.type,
                unit=column.unit,
                range=(column.range[0], column.range[1]) if column.range is not None else None,
                values=tuple(column.values or ()),
            )
            for column_name, column in entry.columns.items()
        )
        return ModalitySpec(
            name=name, kind="table", file=entry.file, shape=(len(columns),), columns=columns
        )

    # -- files ---------------------------------------------------------------------------------

    def _find(self, folder: Path, where: str) -> Path | None:
        """Return the table's file, CSV or JSON."""
        declared = folder / self.spec.file
        found = [
            path
            for path in (declared.with_suffix(".csv"), declared.with_suffix(".json"), declared)
            if path.exists()
        ]
        found = list(dict.fromkeys(found))
        ambiguous = Problem(
            where,
            "two files hold the same table",
            expected=f"one of {declared.stem}.csv and {declared.stem}.json",
        )
        return the_one(found, declared, where, ambiguous)

    def read(
        self, folder: Path, where: str, missing_values: Sequence[str] = ()
    ) -> ModalityValue | None:
        """Read the row. See `Modality.read`.

        A column that the file does not have is blank; columns of the file that are not declared
        are left alone.
        """
        path = self._find(folder, where)
        if path is None:
            return None
        try:
            content = path.read_bytes()
            text = content.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise PatientDataError(
                Problem(
                    f"{where}: {path.name}",
                    "the file cannot be read as text",
                    expected="UTF-8 text",
                    got=type(error).__name__,
                    remedy="Save the table as CSV in UTF-8",
                )
            ) from error
        at = f"{where}: {path.name}"
        row = _json_row(text, at) if path.suffix == ".json" else _csv_row(text, at)
        blank = {"", *(value.strip() for value in missing_values)}
        values = torch.zeros(self.spec.shape, dtype=torch.float32)
        filled = torch.zeros(self.spec.shape, dtype=torch.bool)
        problems: list[Problem] = []
        declared = {column.name for column in self.spec.columns}
        alike = {header.lower(): header for header in row.cells if header not in declared}
        for i, column in enumerate(self.spec.columns):
            other = alike.get(column.name.lower())
            if column.name not in row.cells and other is not None:
                problems.append(
                    Problem(
                        f"{at}, column {other}",
                        "the name differs from a declared column's in capital letters",
                        expected=column.name,
                        remedy="Rename the column",
                    )
                )
                continue
            cell = row.cells.get(column.name, "")
            if cell in blank:
                continue
            value = _parse(cell, column, f"{row.place}, column {column.name}")
            if isinstance(value, Problem):
                problems.append(value)
            else:
                values[i] = value
                filled[i] = True
        if problems:
            raise PatientDataError(*problems)
        if not filled.any():
            return None
        return ModalityValue(
            values=values,
            source=Source(
                file=path.relative_to(folder).as_posix(),
                sha256=sha256(content).hexdigest(),
                facts={"cells": f"{int(filled.sum())} of {len(filled)} filled"},
            ),
            observed_fields=filled,
        )

    def write(
        self,
        folder: Path,
        values: Tensor,
        observed_fields: Tensor | None,
        affine: Sequence[Sequence[float]] | None,
    ) -> Path:
        """Write `<name>_synthetic.csv`: column, value, unit, source. See `Modality.write`."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["column", "value", "unit", "source"])
        for i, column in enumerate(self.spec.columns):
            number = float(values[i])
            text = f"{number:.6g}" if column.type == "continuous" else column.values[round(number)]
            observed = observed_fields is not None and bool(observed_fields[i])
            writer.writerow(
                [column.name, text, column.unit, "observed" if observed else "recovered"]
            )
        return write_bytes(folder / f"{self.spec.name}_synthetic.csv", stream.getvalue().encode())

    # -- networks ------------------------------------------------------------------------------

    def fit(self, values: Tensor, observed_fields: Tensor | None) -> ModalitySpec:
        """Return the spec with each column's mean, std, frequencies and percentiles.

        Frequencies have one added to every count, so no category is impossible. The spread of a
        column with a single distinct value is 1.

        Args:
            values: `(n, F)`, rows of training records that have this table.
            observed_fields: Bool `(n, F)`; None = all filled.
        """
        if observed_fields is None:
            observed_fields = torch.ones_like(values, dtype=torch.bool)
        columns = []
        for i, column in enumerate(self.spec.columns):
            cells = values[observed_fields[:, i], i].double()
            if column.type == "categorical":
                counts = torch.bincount(cells.round().long(), minlength=len(column.values)) + 1
                shares = (counts / counts.sum()).tolist()
                columns.append(replace(column, frequencies=tuple(shares)))
                continue
            if len(cells) == 0:
                middle = sum(column.range) / 2 if column.range is not None else 0.0
                columns.append(replace(column, mean=middle, std=1.0))
                continue
            mean = float(cells.mean())
            std = float(cells.std(correction=0))
            if std <= 1e-6 * max(1.0, abs(mean)):
                std = 1.0
            percentiles: tuple[float, ...] = ()
            if len(cells) >= _FEWEST:
                # The ends are single patients' values; the 1st and 99th stand in for them.
                grid = torch.linspace(0, 1, 101, dtype=torch.float64).clamp(0.01, 0.99)
                percentiles = tuple(torch.quantile(cells, grid).tolist())
            columns.append(replace(column, mean=mean, std=std, percentiles=percentiles))
        return replace(self.spec, columns=tuple(columns))

    def encoder(self, dim: int, options: Mapping[str, int]) -> Encoder:
        """Return an encoder to one token per column.

        Args:
            dim: Token width D.
            options: `layers` (attention among the columns, 1) and `heads` (4).
        """
        return ColumnEncoder(
            self.spec.columns, dim, options.get("layers", 1), options.get("heads", 4)
        )

    def decoder(self, latent: int, options: Mapping[str, int]) -> nn.Module:
        """Return a decoder to likelihood parameters `(B, P)`.

        Args:
            latent: Length of the latent vector.
            options: `hidden` (width of the hidden layer, 64).
        """
        return ColumnDecoder(self.spec.columns, latent, options.get("hidden", 64))

    def log_likelihood(
        self, parameters: Tensor, values: Tensor, observed_fields: Tensor | None
    ) -> Tensor:
        """Return the log likelihood summed over filled cells, `(B,)`.

        Args:
            parameters: `(B, P)`: per column in order, mean and log spread in standardised units,
                or one logit per category.
            values: `(B, F)`, natural units, categories as their index.
            observed_fields: Bool `(B, F)`, True = filled; None = all filled.
        """
        if observed_fields is None:
            return self.cell_log_likelihood(parameters, values).sum(1)
        # A blank cell may hold anything; out with it before it can become NaN in a gradient.
        values = values.where(observed_fields, values.new_zeros(()))
        cells = self.cell_log_likelihood(parameters, values)
        return cells.where(observed_fields, cells.new_zeros(())).sum(1)

    def cell_log_likelihood(self, parameters: Tensor, values: Tensor) -> Tensor:
        """Return the log likelihood of every cell, `(B, F)`.

        Args:
            parameters: `(B, P)`, as in `log_likelihood`.
            values: `(B, F)`, all filled; numbers count in standardised units.
        """
        cells = []
        for i, (column, start) in enumerate(zip(self.spec.columns, self._starts, strict=True)):
            if column.type == "continuous":
                center, spread = column.mean or 0.0, column.std or 1.0
                cell = (values[:, i] - center) / spread
                log_std = parameters[:, start + 1].clamp(*self.log_std_range)
                z = (cell - parameters[:, start]) * (-log_std).exp()
                term = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
            else:
                logits = parameters[:, start : start + len(column.values)]
                index = values[:, i].round().long().clamp(0, len(column.values) - 1)
                term = -F.cross_entropy(logits, index, reduction="none")
            cells.append(term)
        return torch.stack(cells, dim=1)

    def mean(self, parameters: Tensor) -> Tensor:
        """Return the mean in natural units within `range`, or the likeliest category's index.

        Args:
            parameters: `(B, P)`.

        Returns:
            `(B, F)`.
        """
        return self._cells(parameters, None)

    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """Return one draw of every cell from its likelihood, `(B, F)`, numbers within `range`."""
        return self._cells(parameters, generator)

    def _cells(self, parameters: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return every cell's mean or mode, or one draw of it."""

        def noise(sample: Callable[..., Tensor]) -> Tensor:
            return sample(len(parameters), generator=generator).to(parameters)

        cells = []
        for column, start in zip(self.spec.columns, self._starts, strict=True):
            if column.type == "continuous":
                cell = parameters[:, start]
                if generator is not None:
                    log_std = parameters[:, start + 1].clamp(*self.log_std_range)
                    cell = cell + noise(torch.randn) * log_std.exp()
                cell = cell * (column.std or 1.0) + (column.mean or 0.0)
                if column.range is not None:
                    cell = cell.clamp(*column.range)
            else:
                logits = parameters[:, start : start + len(column.values)]
                index = logits.argmax(1)
                if generator is not None:
                    below = logits.softmax(1).cumsum(1)[:, :-1]
                    index = (noise(torch.rand)[:, None] >= below).sum(1)
                cell = index.to(parameters.dtype)
            cells.append(cell)
        return torch.stack(cells, dim=1)


def _parse(cell: str, column: Column, where: str) -> float | Problem:
    """Return a cell's number or category index, or what is wrong with it."""
    if column.type == "categorical":
        if cell in column.values:
            return float(column.values.index(cell))
        return Problem(
            where,
            "the cell holds an unknown category",
            expected=" or ".join(column.values),
            remedy=f"{nearest(cell, list(column.values))}. Leave the cell blank if it was not"
            " recorded",
        )
    unit = f" {column.unit}" if column.unit else ""
    if column.range is None:
        expected = f"a number{' in' if unit else ''}{unit}"
    else:
        expected = f"a number from {column.range[0]:g} to {column.range[1]:g}{unit}"
    if not _NUMBER.fullmatch(cell):
        not_a_number = cell.lower() in _NOT_A_NUMBER
        return Problem(
            where,
            "the cell does not hold a finite number"
            if not_a_number
            else "the cell is not a number",
            expected=expected,
            remedy="Leave the cell blank if it was not measured"
            if not_a_number
            else "Write the number with a decimal point, without unit or sign of comparison, or"
            " list the word under missing_values in cohort.yaml",
        )
    value = float(cell)
    low, high = column.range if column.range is not None else (-_LARGEST, _LARGEST)
    if not low <= value <= high:
        return Problem(
            where,
            "the number is outside the declared range",
            expected=expected,
            remedy="Check the value and its unit, or widen the range in cohort.yaml",
        )
    return value


def _csv_row(text: str, where: str) -> _Row:
    """Return the one data row of a CSV file.

    Raises:
        PatientDataError: If it is not a header and one row of as many cells.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells) or len(cells) > 1:
                rows.append((reader.line_num, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise PatientDataError(
            Problem(
                f"{where}, line {reader.line_num}",
                "the file is not valid CSV",
                remedy="Check the quotes",
            )
        ) from error
    one_row = "a header line and one row of values"
    if len(rows) != 2:
        got = f"{max(0, len(rows) - 1)} rows of values" if rows else "an empty file"
        remedy = (
            "Keep the row of this visit" if len(rows) > 2 else "Write the row, or remove the file"
        )
        raise PatientDataError(
            Problem(where, "the table does not have one row", one_row, got, remedy)
        )
    (_, header), (line, cells) = rows
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise PatientDataError(
            Problem(
                f"{where}, line 1",
                "the columns are not separated by commas",
                remedy="Save the table as comma-separated values",
            )
        )
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise PatientDataError(
            *(Problem(f"{where}, line 1, column {n}", "the header occurs twice") for n in repeated)
        )
    if len(cells) != len(header):
        raise PatientDataError(
            Problem(
                f"{where}, line {line}",
                "the row does not have one cell per header",
                expected=f"{len(header)} cells",
                got=f"{len(cells)} cells",
                remedy="Quote cells that contain a comma",
            )
        )
    return _Row(dict(zip(header, cells, strict=True)), f"{where}, line {line}")


def _json_row(text: str, where: str) -> _Row:
    """Return the one object of a JSON file.

    Raises:
        PatientDataError: If it is not one object, or a list of one, of plain values.
    """
    repeated: list[str] = []

    def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name.strip() for name, _ in pairs]
        repeated.extend(name for name in names if names.count(name) > 1)
        return dict(zip(names, (value for _, value in pairs), strict=True))

    try:
        # Numbers stay text: they are parsed by the column's own rules.
        data = json.loads(
            text, object_pairs_hook=as_object, parse_int=str, parse_float=str, parse_constant=str
        )
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise PatientDataError(
            Problem(
                f"{where}{line}", "the file is not valid JSON", remedy="Check commas and quotes"
            )
        ) from error
    if isinstance(data, list) and len(data) == 1:
        data = data[0]
    if not isinstance(data, dict):
        got = f"a list of {len(data)}" if isinstance(data, list) else "something else"
        raise PatientDataError(
            Problem(
                where,
                "the table does not have one row",
                expected="one object of column: value",
                got=got,
                remedy="Keep the row of this visit",
            )
        )
    problems = [Problem(f"{where}, column {n}", "the name occurs twice") for n in set(repeated)]
    cells = {}
    for name, value in data.items():
        if isinstance(value, dict | list):
            problems.append(
                Problem(f"{where}, column {name}", "the cell holds a list or an object")
            )
        elif isinstance(value, bool):
            cells[name] = str(value).lower()
        else:
            cells[name] = "" if value is None else str(value).strip()
    if problems:
        raise PatientDataError(*problems)
    return _Row(cells, where)
