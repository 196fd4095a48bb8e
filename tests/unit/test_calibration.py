"""Temperature and stated probabilities: closed forms, and what few patients can support."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dymo_med.calibration import ENOUGH, Calibration, supported
from dymo_med.training.calibration import FEWEST, PRIOR, fit_temperature


def logits_of(n, right, margin=4.0, seed=0, classes=2):
    """Answers for n patients, the first `right` of them right, as sure as the margin."""
    labels = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    answered = torch.where(torch.arange(n) < right, labels, (labels + 1) % classes)
    return margin * torch.nn.functional.one_hot(answered, classes).double(), labels


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("margin", [0.5, 4.0, 30.0])
@pytest.mark.parametrize("n", [2, 5, 29, 60, 400])
def test_answers_that_are_all_right_are_not_sharpened(n, margin, classes):
    logits, labels = logits_of(n, n, margin, classes=classes)
    assert fit_temperature(logits, labels, range(n)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("n", "sharpened"), [(FEWEST - 1, False), (FEWEST, True)])
def test_few_patients_may_soften_but_not_sharpen(n, sharpened):
    timid = logits_of(n, n - 1, margin=0.5)
    assert (fit_temperature(*timid, range(n)) < 0.99) == sharpened
    bold = logits_of(n, n // 2, margin=8.0)
    assert fit_temperature(*bold, range(n)) > 2


@pytest.mark.parametrize(("n", "right"), [(40, 30), (1000, 900)])
def test_the_fit_solves_its_equation(n, right):
    """Two classes, one margin d: n (s(d/T) - right/n) d/T = -log T / PRIOR^2, s the logistic."""
    d = 3.0
    t = fit_temperature(*logits_of(n, right, d), range(n))
    s = 1 / (1 + math.exp(-d / t))
    assert n * (s - right / n) * d / t == pytest.approx(math.log(t) / PRIOR**2, abs=1e-3 * n)
    if n == 1000:  # so many patients outweigh the prior
        assert s == pytest.approx(right / n, abs=0.005)


def test_copies_of_patients_change_nothing():
    logits, labels = logits_of(40, 30)
    once = fit_temperature(logits, labels, range(40))
    again = fit_temperature(logits.repeat(6, 1), labels.repeat(6), [*range(40)] * 6)
    assert once == pytest.approx(again, rel=1e-5)
    # Nor do many copies of one of them outweigh the others.
    more = torch.arange(40).tolist() + [39] * 500
    assert fit_temperature(logits[more], labels[more], more) == pytest.approx(once, rel=1e-5)


def test_five_right_of_five_support_six_in_seven():
    p = Calibration(0.05, 5, 5).probabilities(torch.tensor([[40.0, 0.0]]))
    assert p.tolist() == [[pytest.approx(6 / 7), pytest.approx(1 / 7)]]


@given(
    st.lists(st.floats(-50, 50), min_size=2, max_size=6),
    st.integers(0, 500),
    st.floats(0.05, 20),
)
def test_stated_probabilities_are_supported_ordered_and_sum_to_one(row, n, temperature):
    k = len(row)
    raw = torch.softmax(torch.tensor(row, dtype=torch.float64) / temperature, -1)
    p = Calibration(temperature, n, n).probabilities(torch.tensor([row], dtype=torch.float64))[0]
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert float(p.max()) <= (n + 1) / (n + k) + 1e-12
    assert float(p.min()) >= 1 / (n + k) - 1e-12
    assert bool((p[raw.argsort()].diff() >= -1e-15).all())
    # More patients never make an answer less sure.
    assert float(supported(raw, n + 1).max()) >= float(p.max()) - 1e-12


def test_many_patients_leave_probabilities_alone_and_bands_always():
    raw = torch.tensor([0.9, 0.1], dtype=torch.float64)
    assert supported(raw, 10**9).tolist() == pytest.approx(raw.tolist(), abs=1e-8)
    assert supported(raw, None) is raw


def test_like_answers_are_counted():
    found = Calibration(1.0, 9, 9, {"m": (0.6, 0.7, 0.8, 0.95)}, {"m": (True, False, True, True)})
    assert found.count("m", 0.7) == (3, 2)  # the margin of 0.1 is in
    assert found.count("m", 0.99) == (1, 1)
    assert found.count("another", 0.7) == (0, 0)
    assert ENOUGH == 10


@pytest.mark.parametrize(
    "wrong",
    [
        (0.0, 5, 5),
        (math.nan, 5, 5),
        (math.inf, 5, 5),
        (1.0, -1, 5),
        (1.0, 5, -1),
        (1.0, 5, 5.5),
        (1.0, 5, 5, {"m": (0.5,)}, {}),
        (1.0, 5, 5, {"m": (0.5,)}, {"m": (True, True)}),
        (1.0, 5, 5, {"m": (1.5,)}, {"m": (True,)}),
        (1.0, 5, 5, {"m": (math.nan,)}, {"m": (True,)}),
    ],
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=r"temperature|patients|counted"):
        Calibration(*wrong)
