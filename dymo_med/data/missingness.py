"""Scenarios of absence: hide part of what was observed, the same way every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Literal

import numpy as np
import torch

from dymo_med.errors import ConfigError, Problem
from dymo_med.registry import nearest
from dymo_med.types import ModalitySpec, ModalityValue, PatientRecord

KINDS = ("as-is", "rate", "drop", "cells")
_FORMS = "as-is, rate:0.4, drop:name,name or cells:0.3"


@dataclass(frozen=True)
class Scenario:
    """A rule by which observed values are hidden.

    Attributes:
        kind: `as-is` hides nothing; `rate` a share of each patient's modalities, never all;
            `drop` these modalities for everyone; `cells` a share of each patient's table cells.
        text: The rule in its canonical spelling; names outputs and seeds the choice.
        share: The share of `rate` and `cells`, from 0 to 1.
        names: The modalities of `drop` in canonical order.
    """

    kind: Literal["as-is", "rate", "drop", "cells"]
    text: str
    share: float = 0.0
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the canonical spelling."""
        return self.text


def parse_scenario(text: str, specs: Sequence[ModalitySpec]) -> Scenario:
    """Return the scenario that `text` asks for.

    Args:
        text: For example `rate:0.4`.
        specs: Modalities of the cohort in canonical order.

    Raises:
        ConfigError: If the text asks for nothing known.
    """
    kind, _, argument = (part.strip() for part in text.partition(":"))
    where = f"scenario '{text}'"
    match kind:
        case "as-is" if not argument:
            return Scenario("as-is", "as-is")
        case "rate" | "cells":
            try:
                share = float(argument)
            except ValueError:
                share = -1.0
            if not 0 <= share <= 1:
                raise ConfigError(Problem(where, "the share is wrong", "a number from 0 to 1"))
            if kind == "cells" and not any(spec.columns for spec in specs):
                raise ConfigError(Problem(where, "there is no table whose cells could be removed"))
            return Scenario(kind, f"{kind}:{share:g}", share=share)
        case "drop":
            known = [spec.name for spec in specs]
            asked = [name.strip() for name in argument.split(",")]
            problems = [
                Problem(where, f"there is no modality '{name}'", remedy=nearest(name, known))
                for name in asked
                if name not in known
            ]
            if problems:
                raise ConfigError(*problems)
            names = tuple(name for name in known if name in asked)
            return Scenario("drop", f"drop:{','.join(names)}", names=names)
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

    The choice depends on the seed, the scenario and the record's id alone, not on the order or
    number of records. `rate` hides exactly `round(share * observed)` modalities and leaves at
    least one; `cells` exactly `round(share * filled)` cells over all tables, and one cell stays
    where the patient has nothing but tables. A table without a filled cell is missing. `drop`
    can leave a record without any modality; the caller decides what that means.

    Args:
        scenario: What `parse_scenario` returned.
        record: The record; it is not changed.
        specs: Modalities in canonical order.
        seed: Any integer.
    """
    if scenario.kind == "as-is":
        return record
    if scenario.kind == "drop":
        return record.without(scenario.names)
    digest = sha256(f"{seed}\0{scenario.text}\0{record.record_id}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    observed = [spec.name for spec in specs if spec.name in record.modalities]
    if scenario.kind == "rate":
        count = min(round(scenario.share * len(observed)), len(observed) - 1)
        if count <= 0:
            return record
        return record.without([str(n) for n in generator.choice(observed, count, replace=False)])
    return _hide_cells(scenario.share, record, specs, generator)


def _hide_cells(
    share: float,
    record: PatientRecord,
    specs: Sequence[ModalitySpec],
    generator: np.random.Generator,
) -> PatientRecord:
    """Return the record with a share of all filled cells blank."""
    tables = {s.name: s for s in specs if s.columns and s.name in record.modalities}
    cells = [
        (name, column)
        for name in tables
        for column in _filled(record.modalities[name]).nonzero().flatten().tolist()
    ]
    count = round(share * len(cells))
    if len(tables) == len(record.modalities):
        count = min(count, len(cells) - 1)
    if count <= 0:
        return record
    hidden: dict[str, list[int]] = {}
    for position in generator.choice(len(cells), count, replace=False).tolist():
        name, column = cells[position]
        hidden.setdefault(name, []).append(column)
    modalities = {}
    for name, value in record.modalities.items():
        if name in hidden:
            filled = _filled(value).clone()
            filled[hidden[name]] = False
            if not filled.any():
                continue
            value = _with_cells(value, filled)
        modalities[name] = value
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
