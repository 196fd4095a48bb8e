"""Draws that claim too much are found out, right ones are not."""

import dataclasses

import pytest
import torch

from dymo_med.backbones import BACKBONES
from dymo_med.imputers.conditional import Conditional
from dymo_med.training.draw_checks import check_draws, warnings_of, without
from dymo_med.types import DrawCheck, DrawRow, Interval
from tests.unit.test_conditional import SPECS, rows_of, sample

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    options = {"dim": 16, "heads": 2, "layers": 1, "projection": 6, "table_encoder": "row"}
    kind = BACKBONES["transformer"]
    return kind(SPECS, 2, kind.Options(**options)).double().eval()


def fitted(spread=1.0):
    """An imputer whose draws vary as much as they should, or by a share of that."""
    n = 600
    imputer = Conditional(SPECS, Conditional.Options()).eval()
    imputer.start_from(rows_of(sample(n), torch.ones(n, 5, dtype=torch.bool)))
    imputer.root *= spread
    return imputer


def checked(imputer, backbone, n=200):
    batch = rows_of(sample(n, seed=7), torch.ones(n, 5, dtype=torch.bool))
    return check_draws(imputer, backbone, None, batch, 1.0, 0, CPU)


def test_right_draws_cover_and_are_not_named(backbone):
    found = checked(fitted(), backbone)
    rows = {r.part: r for r in found.rows if r.check == "coverage"}
    assert set(rows) == {"a", "b"}
    for row in rows.values():
        assert row.patients == 200 and row.value.value == pytest.approx(0.9, abs=0.05)
    assert not [r for r in found.failing if r.check == "coverage"]


def test_draws_that_are_too_sure_are_named(backbone):
    found = checked(fitted(0.4), backbone)
    assert {r.part for r in found.failing if r.check == "coverage"} == {"a", "b"}
    assert "surer than they should be" in warnings_of(found, "conditional")[0]


def test_answers_that_drift_are_named(backbone):
    """An imputer that is off by three standard deviations moves answers on average."""
    wrong = fitted()
    wrong.mean += 3.0
    with torch.no_grad():
        backbone.classifier.weight *= 20
    try:
        found = checked(wrong, backbone)
    finally:
        with torch.no_grad():
            backbone.classifier.weight /= 20
    assert any(r.check == "martingale" and r.failing for r in found.rows)


def test_few_patients_and_imputers_without_draws_are_not_judged(backbone):
    assert checked(fitted(), backbone, n=9) is None


@pytest.mark.parametrize(
    ("check", "value", "fails"),
    [
        ("coverage", (0.9, 0.85, 0.95), False),
        ("coverage", (0.76, 0.7, 0.82), False),
        ("coverage", (0.7, 0.65, 0.75), True),
        ("martingale", (0.01, 0.005, 0.015), False),
        ("martingale", (0.05, -0.01, 0.11), False),
        ("martingale", (-0.05, -0.08, -0.02), True),
        ("coverage", (None, None, None), False),
    ],
)
def test_what_fails_is_clear(check, value, fails):
    row = DrawRow(check, "labs", 50, Interval(*value))
    assert row.failing is fails
    assert bool(warnings_of(DrawCheck((row,), 20), "mopoe")) is fails


def test_a_hidden_modality_leaves_no_cell():
    batch = rows_of(sample(3), torch.ones(3, 5, dtype=torch.bool))
    left = without(batch, 1)
    assert not left.observed.available[:, 1].any() and not left.observed_fields["b"].any()
    assert batch.observed.available.all()
    assert dataclasses.replace(left, observed=batch.observed).values is left.values
