"""Answers averaged over draws, and the guard that bounds the harm they do."""

import math

import numpy as np
import pytest
import torch

from dymo_med.inference.compose import made_up
from dymo_med.inference.prediction_file import information, rubin
from dymo_med.selection import Cases, Guarded, Integrated, WithDraws, joined, over_draws
from dymo_med.selection.draws import (
    GROUPS,
    MOVES,
    Average,
    GuardOptions,
    groups_of,
    mean_p_value,
    needed,
    prove,
    share_bound,
)
from dymo_med.types import FusionOutput, ModalityMask

NAMES = ("scan", "labs")
T = 1.7


class Linear:
    """Answers by a sum of numbers, observed or of one draw; counts how often it is asked."""

    def __init__(self, observed, recovered):
        self.observed, self.recovered, self.asked = observed, recovered, 0

    def __call__(self, rows, used, admitted):
        self.asked += len(rows)
        x = torch.where(admitted, self.recovered[rows], self.observed[rows]) * used
        score = x.sum(1)
        return FusionOutput(torch.stack([0 * score, score], 1), x)


def world(n=6, draws=5, seed=0):
    """Observed numbers, of which every second patient lacks the second one, and draws of it."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=g, dtype=torch.float64)
    available = torch.ones(n, 2, dtype=torch.bool)
    available[::2, 1] = False
    made = torch.randn(draws, n, 2, generator=g, dtype=torch.float64)
    parts = tuple(Linear(x, m) for m in made)
    single = Linear(x, made.mean(0))
    return single, parts, ModalityMask(NAMES, available), x, made


def test_the_answer_is_the_mean_of_calibrated_answers_over_draws():
    single, parts, observed, x, made = world()
    fuse = WithDraws(single, Integrated(parts, T))
    trace = Average().select(fuse, observed, ~observed.available, None)
    found = torch.softmax(trace.output.logits / T, -1)[:, 1]
    for i in range(len(x)):
        if observed.available[i, 1]:
            expected = torch.sigmoid(x[i].sum() / T)
        else:
            expected = torch.sigmoid((x[i, 0] + made[:, i, 1]) / T).mean()
        assert float(found[i]) == pytest.approx(float(expected), abs=1e-12)
    assert torch.equal(trace.admitted, ~observed.available)


def test_what_has_no_recovery_is_asked_once():
    _, parts, observed, x, _ = world()
    rows = torch.arange(len(x))
    Integrated(parts, T)(rows, observed.available, torch.zeros_like(observed.available))
    assert [part.asked for part in parts] == [len(x), 0, 0, 0, 0]


def test_without_draws_best_guesses_take_their_place():
    single, _, observed, _, _ = world()
    assert over_draws(single) is single
    trace = Average().select(single, observed, ~observed.available, None)
    expected = single(torch.arange(6), torch.ones(6, 2, dtype=torch.bool), ~observed.available)
    assert torch.equal(trace.output.logits, expected.logits)


def test_several_batches_as_one_answer_as_one_batch():
    single, parts, observed, x, made = world()
    whole = WithDraws(single, Integrated(parts, T))
    pieces = [
        WithDraws(
            Linear(x[a:b], made.mean(0)[a:b]),
            Integrated(tuple(Linear(x[a:b], m[a:b]) for m in made), T),
        )
        for a, b in ((0, 2), (2, 3), (3, 6))
    ]
    together = joined(pieces, [2, 1, 3])
    rows = torch.tensor([5, 0, 2, 2, 4])
    missing = ~observed.available[rows]
    for one, other in ((whole, together), (over_draws(whole), over_draws(together))):
        a, b = (f(rows, torch.ones_like(missing), missing) for f in (one, other))
        torch.testing.assert_close(a.logits, b.logits, atol=1e-12, rtol=0)
        torch.testing.assert_close(a.embedding, b.embedding, atol=1e-12, rtol=0)


def test_rows_of_cases_keep_their_draws():
    single, parts, observed, x, _ = world()
    fuse = WithDraws(single, Integrated(parts, T))
    n = len(x)
    labels = torch.zeros(n, dtype=torch.int64)
    people = tuple(f"p{i}" for i in range(n))
    cases = Cases(fuse, observed, ~observed.available, labels, torch.ones(n), T, patients=people)
    some = cases.rows(torch.tensor([4, 1]))
    assert some.patients == ("p4", "p1")
    missing = ~some.observed.available
    got = over_draws(some.fuse)(torch.arange(2), torch.ones_like(missing), missing)
    whole = over_draws(fuse)(torch.tensor([4, 1]), torch.ones_like(missing), missing)
    assert torch.equal(got.logits, whole.logits)


# -- the guard ---------------------------------------------------------------------------------

HARM, ERROR = 0.05, 0.1


def population(rate, n=40_000, seed=0):
    """Patients whose answers move by some amount; the further, the likelier they are harmed."""
    rng = np.random.default_rng(seed)
    moved = rng.random(n)
    harmed = rng.random(n) < 2 * rate * moved  # mean: rate
    lost = harmed * moved * 0.6
    return torch.from_numpy(harmed), torch.from_numpy(lost), torch.from_numpy(moved)


@pytest.mark.parametrize("rate", [0.03, 0.055, 0.1, 0.3])
def test_harm_exceeds_its_bound_in_few_of_500_calibration_sets(rate):
    harmed, lost, moved = population(rate)
    true = {m: float((harmed & (moved <= m)).double().mean()) for m in MOVES} | {0.0: 0.0}
    rng = np.random.default_rng(1)
    broken = admitted = 0
    for _ in range(500):
        rows = torch.from_numpy(rng.integers(0, len(harmed), 150))
        found = prove(harmed[rows], lost[rows], moved[rows], HARM, ERROR)
        broken += true[found.most] > HARM
        admitted += found.most > 0
    # Three standard errors of a share of 500 above what is promised.
    assert broken / 500 <= ERROR + 3 * math.sqrt(ERROR * (1 - ERROR) / 500)
    assert admitted > 250  # the promise is not kept by never admitting anything


def test_the_loss_version_binds_where_nobody_s_answer_turns():
    n = 400
    moved = torch.full((n,), 0.25, dtype=torch.float64)
    nobody = torch.zeros(n, dtype=torch.bool)
    assert prove(nobody, 0 * moved, moved, HARM, ERROR).most == 1.0
    # Everybody loses a quarter of the true class's probability: up to .2 nobody is admitted.
    assert prove(nobody, moved, moved, HARM, ERROR).most == 0.2


@pytest.mark.parametrize("n", [0, 1, 44])
def test_too_few_patients_prove_nothing(n):
    nobody = torch.zeros(n, dtype=torch.bool)
    zero = torch.zeros(n, dtype=torch.float64)
    assert prove(nobody, zero, zero, HARM, ERROR).most == 0.0
    assert needed(HARM, ERROR) == 45


def test_bounds_are_those_of_the_literature():
    # Clopper and Pearson: 1 - error^(1/n) if nobody is harmed.
    assert share_bound(0, 45, 0.1) == pytest.approx(1 - 0.1 ** (1 / 45))
    assert share_bound(5, 5, 0.1) == 1.0
    # With a mean of 0 Hoeffding's bound is (1 - bound)^n.
    assert mean_p_value(0.0, 45, 0.05) == pytest.approx(0.95**45)
    assert mean_p_value(0.05, 1000, 0.05) == 1.0


def guard_cases(n=200, copies=3, harmful=False):
    """Patients with one label; recoveries say the same, or turn every answer."""
    x = torch.ones(n * copies, 2, dtype=torch.float64)
    made = torch.full_like(x, -5.0 if harmful else 0.3)
    available = torch.ones(n * copies, 2, dtype=torch.bool)
    available[:, 1] = False
    observed = ModalityMask(NAMES, available)
    labels = torch.ones(n * copies, dtype=torch.int64)
    people = tuple(f"p{i % n}" for i in range(n * copies))
    fuse = WithDraws(Linear(x, made), Integrated((Linear(x, made),), 1.0))
    weights = torch.full((n * copies,), 1 / copies)
    return Cases(fuse, observed, ~available, labels, weights, 1.0, patients=people)


def test_a_guard_counts_patients_and_not_their_cases():
    guard = Guarded(GuardOptions())
    guard.fit(guard_cases(n=30, copies=5), None)
    group = guard.model.groups[2]
    assert group.patients == 30 and group.most == 0.0
    assert "30 patients are too few, 45 are needed" in guard.sentences()[0]
    guard.fit(guard_cases(n=60, copies=1), None)
    assert guard.model.groups[2].most == 1.0


@pytest.mark.parametrize("harmful", [False, True])
def test_a_guard_admits_what_is_proven_and_nothing_else(harmful):
    cases = guard_cases(harmful=harmful)
    guard = Guarded(GuardOptions())
    guard.fit(cases, None)
    again = Guarded(GuardOptions())
    again.load_state(guard.state())
    trace = again.select(cases.fuse, cases.observed, cases.candidates, None)
    assert bool(trace.admitted.any()) is not harmful
    none = torch.zeros_like(cases.candidates)
    alone = cases.fuse(torch.arange(len(cases)), cases.observed.available, none)
    assert torch.equal(trace.output.logits, alone.logits) is harmful
    told = again.sentence(cases.observed.available[0], cases.candidates[0])
    # Recoveries that hardly move the answer would be admitted; there are none.
    assert f"up to {'50%' if harmful else '100%'} are admitted; 0 of 200 patients harmed" in told


def test_a_guard_says_that_harm_was_met():
    n = 100
    harmed = torch.arange(n) < 20
    some = torch.full((n,), 0.01, dtype=torch.float64)
    found = prove(harmed, some, some, HARM, ERROR)
    assert found.most == 0.0
    guard = Guarded(GuardOptions())
    guard.fit(guard_cases(), None)
    guard.load_state(
        {**guard.state(), "patients": [0, 0, n], "most": [0, 0, 0.0], "harmed": [0, 0, 0]}
    )
    assert guard.sentences() == (
        "half missing or more: no recovery is admitted; it is not proven on 100 patients that"
        " less than 5% are harmed.",
    )


def test_groups_go_by_how_much_is_missing():
    observed = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]]).bool()
    candidates = ~observed
    candidates[0, 2] = True  # blank cells of a table that is there
    assert groups_of(observed, candidates).tolist() == [0, 1, 2, 2]
    assert len(GROUPS) == 3


# -- what draws tell ---------------------------------------------------------------------------


def test_information_is_never_negative_and_that_of_a_channel():
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert information(rng.dirichlet(np.ones(3), 20).tolist()) >= 0
    assert information([[0.3, 0.7]] * 9) == pytest.approx(0)
    # A fair answer that measuring settles: one bit.
    assert information([[0.0, 1.0], [1.0, 0.0]]) == pytest.approx(1)


def test_variance_adds_up_as_rubin_has_it():
    p, within = [0.2, 0.5, 0.6, 0.7], [0.01, 0.02, 0.03, 0.02]
    found = rubin(p, within)
    between = np.var(p, ddof=1)
    assert found.absence == pytest.approx(between)
    assert found.recovery == pytest.approx(between / 4)
    assert found.model == pytest.approx(0.02)
    assert found.total == pytest.approx(0.02 + 1.25 * between)
    assert rubin(p, None).model is None


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (81.6789, 64.4321, 98.9, "82 (64 to 99)"),
        (0.12345, 0.1, 0.15, "0.123 (0.100 to 0.150)"),
        (1234.5, 200.0, 3000.0, "1234 (200 to 3000)"),
        (5.0, 5.0, 5.0, "5.000 (5.000 to 5.000)"),
    ],
)
def test_a_recovered_number_is_shown_with_its_interval(value, low, high, text):
    assert made_up(value, low, high) == text
