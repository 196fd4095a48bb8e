"""How much table columns tell, fitted while a bundle is made."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dymo_med.bundle import load_bundle
from dymo_med.data.missingness import parse_scenario
from dymo_med.demo import shipped_bundle
from dymo_med.errors import ConfigError
from dymo_med.training.fit_specs import fit_importances
from dymo_med.types import Batch, Column, ModalityMask, ModalitySpec


def column(name, *values):
    return Column(name, "categorical" if values else "continuous", values=values)


SPECS = (
    ModalitySpec("scan", "image", "s.png", (1, 2, 2), intensity="none"),
    ModalitySpec("a", "table", "t.csv", (3,), columns=(*map(column, ("signal", "noise", "void")),)),
    ModalitySpec("b", "table", "t.csv", (2,), columns=(column("group", "p", "q"), column("more"))),
)


def batch(n=400, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(2, size=n)
    a = np.stack([rng.normal(2.0 * y), rng.normal(size=n), np.full(n, 7.0)], 1)
    b = np.stack([np.where(rng.random(n) < 0.75, y, 1 - y), rng.normal(size=n)], 1)
    filled = torch.from_numpy(rng.random((n, 5)) < 0.8)
    filled[:, 2] = False
    has = torch.ones(n, 3, dtype=torch.bool)
    has[:50, 2] = False
    filled[:50, 3:] = False
    return Batch(
        tuple(f"r{i}" for i in range(n)),
        tuple(f"p{i // 2}" for i in range(n)),
        {
            "scan": torch.zeros(n, 1, 2, 2),
            "a": torch.from_numpy(a).float(),
            "b": torch.from_numpy(b).float(),
        },
        ModalityMask(("scan", "a", "b"), has),
        {"a": filled[:, :3], "b": filled[:, 3:]},
        torch.from_numpy(y),
    )


def shares(specs):
    return {c.name: c.importance for s in specs for c in s.columns}


def test_what_tells_counts_and_what_is_blank_does_not():
    found = shares(fit_importances(SPECS, batch()))
    assert sum(found.values()) == pytest.approx(1)
    assert found["signal"] > found["group"] > max(found["noise"], found["more"])
    assert found["void"] == 0
    assert shares(fit_importances(SPECS, batch())) == found


def test_unlabelled_records_and_what_stands_in_blank_cells_do_not_matter():
    data = batch()
    found = shares(fit_importances(SPECS, data))
    values = {k: v.clone() for k, v in data.values.items()}
    for name, filled in data.observed_fields.items():
        values[name][~filled] = torch.nan
    assert shares(fit_importances(SPECS, replace(data, values=values))) == found
    some = torch.arange(200)
    labels = data.labels.clone()
    labels[200:] = -1
    few = shares(fit_importances(SPECS, data.rows(some)))
    assert shares(fit_importances(SPECS, replace(data, labels=labels))) == few != found


def test_there_may_be_nothing_to_fit():
    assert fit_importances(SPECS[:1], batch()) == SPECS[:1]
    nothing = {k: torch.zeros_like(v) for k, v in batch().observed_fields.items()}
    found = shares(fit_importances(SPECS, replace(batch(), observed_fields=nothing)))
    assert set(found.values()) == {0.0}


def test_specs_without_importance_are_written_as_before():
    for spec in (*SPECS, *fit_importances(SPECS, batch())):
        data = json.loads(json.dumps(spec.to_dict()))
        assert ModalitySpec.from_dict(data) == spec
        keys = [set(c) for c in data["columns"]]
        assert all(("importance" in k) == (spec not in SPECS) for k in keys)


def test_bundles_hold_importances_and_older_ones_still_load(bundle):
    found = shares(bundle.specs)
    assert sum(found.values()) == pytest.approx(1) or set(found.values()) == {0.0}
    assert parse_scenario("columns-most:0.4", bundle.specs).text == "columns-most:0.4"
    older = load_bundle(shipped_bundle(), "cpu")
    if None in shares(older.specs).values():
        with pytest.raises(ConfigError, match="holds no importances"):
            parse_scenario("columns-most:0.4", older.specs)
