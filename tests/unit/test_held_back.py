"""What sets and figures of a bundle rest on: a record of each patient, nothing fitted on it."""

import importlib.util
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dymo_med.calibration import Calibration
from dymo_med.conformal import AS_THEY_CAME, COVERAGE
from dymo_med.selection import SELECTORS
from dymo_med.training.answers import part
from dymo_med.training.held_back import combinations, draw_cases, only, try_out
from dymo_med.types import ModalityMask

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def simulation():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_coverage", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_combination_is_looked_at_up_to_seven_modalities():
    for m in (1, 3, 7):
        found = combinations(torch.ones(2, m, dtype=torch.bool), 0)
        assert len(torch.unique(found, dim=0)) == len(found) == 2**m - 1 and found.any(1).all()
    own = torch.zeros(1, 12, dtype=torch.bool)
    own[0, [1, 4, 7]] = True
    found = combinations(own, 0)
    assert len(found) < 100 and bool((found == own).all(1).any())


def test_each_patient_stands_once_in_each_group_of_what_a_record_has():
    g = torch.Generator().manual_seed(0)
    available = torch.rand(60, 3, generator=g) < 0.6
    available[:, 0] |= ~available.any(1)
    patients = [f"p{i % 25}" for i in range(60)]
    mask = ModalityMask(("a", "b", "c"), available)
    cases = draw_cases(mask, patients, 3)
    counts = Counter((group, patients[i]) for group, i, _ in cases)
    assert set(counts.values()) == {1}
    for group, i, left in cases:
        names = [n for n, inside in zip("abc", left, strict=True) if inside]
        assert bool((available[i] | ~torch.tensor(left)).all())
        if group == AS_THEY_CAME:
            assert list(left) == available[i].tolist()
        else:
            assert group == "+".join(names)
    # Everybody who has a combination in some record is there.
    for group in ("a", "b+c", "a+b+c"):
        wanted = torch.tensor([n in group.split("+") for n in "abc"])
        having = {patients[i] for i in range(60) if bool((available[i] | ~wanted).all())}
        assert {patients[i] for name, i, _ in cases if name == group} == having


def test_which_record_is_drawn_depends_on_the_seed_and_is_any_of_them():
    available = torch.ones(4, 1, dtype=torch.bool)
    mask = ModalityMask(("a",), available)
    drawn = [draw_cases(mask, ["p"] * 4, seed) for seed in range(40)]
    assert drawn[7] == draw_cases(mask, ["p"] * 4, 7)
    assert {i for cases in drawn for _, i, _ in cases} == {0, 1, 2, 3}


def test_scores_are_those_of_the_selectors_that_answer(simulation):
    """No refit: what a selector would tell a new patient with these modalities, it is scored by."""
    world = simulation.World(3)
    batch = world.draw(12, torch.Generator().manual_seed(1))
    calibration = Calibration(2.0, 20, 12)
    selector = SELECTORS["dymo"]()
    tested = try_out(
        world.imputer,
        world.backbone,
        {"m": selector},
        world.statistics,
        calibration,
        batch,
        0,
        CPU,
    )
    cases = draw_cases(batch.observed, batch.patient_ids, 0)
    rows = torch.tensor([i for _, i, _ in cases])
    alone = only(batch.rows(rows), torch.tensor([left for _, _, left in cases]))
    expected = calibration.probabilities(world.logits(selector, alone))
    assert torch.allclose(tested.answers["m"], expected, atol=1e-6)
    counted = tested.counted(calibration)
    assert len(counted.confidence["m"]) == len(counted.right["m"]) == 12
    bounds = tested.conformal().scores["m"]
    assert bounds[AS_THEY_CAME].patients == 12
    assert all(b.patients <= 12 for b in bounds.values()) and len(bounds) == 8


@pytest.mark.parametrize(
    ("regression", "modalities"), [(False, 1), (False, 3), (True, 1), (True, 3)]
)
def test_sets_and_intervals_hold_what_they_promise(simulation, regression, modalities):
    """`benchmarks/coverage.py`, small: every mean is 90 % or more, but for Monte-Carlo error."""
    world = simulation.World(modalities, regression=regression)
    found = simulation.coverage(world, cohorts=12, sizes=(5, 9, 30))
    for (n, _), (mean, error, _) in found.items():
        assert mean >= COVERAGE - 3.5 * error
        assert mean == 1 or n >= 9
    # They are no use if everything is in them.
    assert min(size for (n, rule), (_, _, size) in found.items() if n == 30) < 1.9


def test_as_they_come_is_kept_where_what_is_missing_tells_something(simulation):
    world = simulation.World(3, telling=True)
    found = simulation.coverage(world, cohorts=12, sizes=(30,))
    mean, error, _ = found[30, "as-is"]
    assert mean >= COVERAGE - 3 * error


@pytest.mark.parametrize(("n", "halves"), [(5, False), (59, False), (60, True), (91, True)])
def test_nobody_is_both_fitted_on_and_tried_out(simulation, n, halves):
    world = simulation.World(2)
    validation = world.draw(20, torch.Generator().manual_seed(0))
    whole = world.draw(n, torch.Generator().manual_seed(1))  # one in four comes twice
    calibration = replace(whole, patient_ids=tuple(f"c{p}" for p in whole.patient_ids))
    fitting, held_back = part(validation, calibration, 5)
    assert not set(fitting.patient_ids) & set(held_back.patient_ids)
    everybody = set(calibration.patient_ids)
    if halves:
        assert {*fitting.patient_ids, *held_back.patient_ids} == everybody
        assert len(set(fitting.patient_ids)) == n // 2
        assert len(fitting) + len(held_back) == len(calibration)
        again = part(validation, calibration.rows(torch.arange(len(whole)).flip(0)), 5)
        assert set(again[0].patient_ids) == set(fitting.patient_ids)
        assert set(part(validation, calibration, 6)[0].patient_ids) != set(fitting.patient_ids)
    else:
        assert fitting is validation and set(held_back.patient_ids) == everybody
