"""Survival in discrete time: closed forms, brute force, the metrics library, and Monte Carlo."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import CensoredData, ecdf

from dymo_med.survival import (
    Recalibration,
    Step,
    TimeBins,
    TimeBound,
    bound_of,
    censoring,
    fit_bins,
    fit_recalibration,
    kaplan_meier,
    known_weights,
    latest_bound,
    log_likelihood,
)
from dymo_med.survival.metrics import (
    auroc,
    brier,
    concordance,
    escape_of,
    integrated_brier,
    metrics_of,
    risk_gap,
)

BINS = TimeBins((1.0, 2.5, 6.0), "years")
NEVER = Step(np.array([]), np.array([]))


def cohort(n, seed, ties=False):
    """Exponential times with a covariate, uniform censoring."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    t, c = rng.exponential(4 * np.exp(-0.8 * x)), rng.uniform(0, 12, n)
    times, events = np.minimum(t, c), t <= c
    if ties:
        times = np.ceil(times * 2) / 2
    return times, events, x, t


def distributions(n, seed, k=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, k, generator=generator, dtype=torch.float64).log_softmax(1).exp()


# --- Bins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edges", "told"),
    [
        ((), "rise"),
        ((0.0, 1.0), "rise"),
        ((1.0, 1.0), "rise"),
        ((2.0, 1.0), "rise"),
        ((-1.0,), "rise"),
        ((1.0, float("inf")), "finite"),
        ((float("nan"),), "finite"),
        ((1.0, 1.0000001), "names"),
    ],
)
def test_edges_that_cannot_be(edges, told):
    with pytest.raises(ValueError, match=told):
        TimeBins(edges)


def test_hazards_and_probabilities_are_one_distribution():
    p = distributions(50, 0)
    h = BINS.hazards(p)
    assert torch.allclose(BINS.from_hazards(h), p, atol=1e-12)
    by_hand = p[:, 1] / (p[:, 1] + p[:, 2] + p[:, 3])
    assert torch.allclose(h[:, 1], by_hand)
    # The product of what survives each hazard is the curve at the edges.
    assert torch.allclose(torch.cumprod(1 - h, 1), BINS.survival(p, BINS.edges), atol=1e-12)


@pytest.mark.parametrize("time", [0.0, 0.4, 1.0, 1.7, 2.5, 5.9, 6.0, 50.0])
def test_censored_patients_weigh_what_lies_after_them(time):
    p = distributions(7, 1)
    fits = BINS.fits(torch.full((7,), time), torch.zeros(7, dtype=torch.bool))
    own = log_likelihood(p.log(), fits).exp()
    until, total = 0.0, torch.zeros(7, dtype=torch.float64)
    for k, edge in enumerate(BINS.edges):  # the area of straight pieces, by hand
        part = min(max((time - until) / (edge - until), 0.0), 1.0)
        total += part * p[:, k]
        until = edge
    assert torch.allclose(own, 1 - total, atol=1e-6)


def test_an_event_is_a_class():
    times = torch.tensor([0.0, 1.0, 1.01, 2.5, 6.0, 6.01])
    p = distributions(6, 2)
    fits = BINS.fits(times, torch.ones(6, dtype=torch.bool))
    assert fits.argmax(1).tolist() == [0, 0, 1, 1, 2, 3]
    assert [BINS.bin(t, True) for t in times.tolist()] == [0, 0, 1, 1, 2, 3]
    cross = torch.nn.functional.nll_loss(p.log(), fits.argmax(1), reduction="none")
    assert torch.allclose(-log_likelihood(p.log(), fits), cross, atol=1e-6)


def test_nothing_known_and_hidden_bins():
    fits = BINS.fits(torch.tensor([float("nan")]), torch.tensor([False]))
    assert not fits.any()
    assert [BINS.bin(t, False) for t in (0.0, 5.9, 6.0, 7.0)] == [None, None, 3, 3]


def test_gradients_are_finite_where_bins_are_ruled_out():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    fits = BINS.fits(torch.tensor([0.5, 7.0, 2.0]), torch.tensor([True, False, False]))
    log_likelihood(logits.log_softmax(1), fits).sum().backward()
    assert bool(logits.grad.isfinite().all())


def test_quantile_inverts_the_curve_and_ends_at_the_last_edge():
    p = distributions(40, 3)
    for level in (0.01, 0.1, 0.3, 0.6):
        at = BINS.quantile(p, level)
        reached = 1 - torch.stack(
            [BINS.survival(p[i : i + 1], [float(t)])[0, 0] for i, t in enumerate(at)]
        )
        inside = at < BINS.last
        assert torch.allclose(reached[inside], torch.tensor(level, dtype=torch.float64), atol=1e-6)
        assert bool((1 - p[~inside, 3] < level + 1e-9).all())
    flat = torch.tensor([[0.5, 0.0, 0.0, 0.5]], dtype=torch.float64)
    assert BINS.quantile(flat, 0.5).item() == 1.0  # the first time, not the end of the level piece
    assert BINS.quantile(flat, 0.0).item() == 0.0
    assert BINS.quantile(flat, 1.0).item() == 6.0


def test_restricted_mean_is_the_area_under_the_curve():
    p = distributions(5, 4)
    grid = np.linspace(0, BINS.last, 6001)
    area = np.trapezoid(BINS.survival(p, grid.tolist()).numpy(), grid, axis=1)
    assert np.allclose(BINS.restricted_mean(p).numpy(), area, atol=1e-6)


def test_own_cumulative_probability():
    p = distributions(4, 5)
    times = torch.tensor([0.0, 1.7, 6.0, 9.0], dtype=torch.float64)
    found = BINS.cumulative(p, times)
    assert found[0].item() == 0 and found[2:].tolist() == [1.0, 1.0]
    assert found[1].item() == pytest.approx(1 - BINS.survival(p[1:2], [1.7]).item(), abs=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_bins_hold_about_as_many_events_each(ties):
    times, events, *_ = cohort(600, 6, ties)
    bins = fit_bins(times, events, np.ones(600), "years", 6)
    curve = kaplan_meier(times, events, np.ones(600))
    at = curve(np.array(bins.edges))
    steps = -np.diff(np.concatenate([[1.0], at]))
    assert len(bins) == 7
    assert np.ptp(steps) < (0.2 if ties else 0.01)
    assert (times >= bins.last).sum() >= 60  # a tenth is followed so long


def test_bins_need_events_that_are_followed():
    with pytest.raises(ValueError, match="no event"):
        fit_bins(np.arange(1.0, 50), np.zeros(49, dtype=bool), np.ones(49))
    few = fit_bins(*cohort(40, 7)[:2], np.ones(40))
    assert 3 <= len(few) - 1 <= 8


# --- Censoring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_kaplan_meier_is_scipys(ties):
    times, events, *_ = cohort(200, 8, ties)
    ours = kaplan_meier(times, events, np.ones(200))
    theirs = ecdf(CensoredData.right_censored(times, ~events)).sf
    at = np.unique(times)
    assert np.allclose(ours(at), theirs.evaluate(at), atol=1e-12)


def test_a_weight_of_two_is_a_patient_twice():
    times, events, *_ = cohort(60, 9, True)
    twice = np.arange(60) % 3 == 0
    weights = 1.0 + twice
    again = np.concatenate([times, times[twice]]), np.concatenate([events, events[twice]])
    at = np.linspace(0, 12, 40)
    for curve in (kaplan_meier, censoring):
        assert np.allclose(
            curve(times, events, weights)(at), curve(*again, np.ones(len(again[0])))(at)
        )


def test_events_come_before_censorings_at_a_tied_time():
    # One event and one censoring at 1, two go on: G falls by a third, S by a quarter.
    times, events = np.array([1.0, 1.0, 2.0, 2.0]), np.array([True, False, True, True])
    assert kaplan_meier(times, events, np.ones(4))(1.0) == pytest.approx(3 / 4)
    g = censoring(times, events, np.ones(4))
    assert (g.before(1.0), g(1.0)) == (1.0, pytest.approx(2 / 3))
    rows = escape_of(times, events, np.ones((1, 4)), np.array([1.0, 1.5]))
    assert rows.tolist() == [[1.0, pytest.approx(2 / 3)]]


def test_weights_stand_for_everybody():
    """Weighted means over known bins are means over all, where dropping the others is not."""
    share, naive = [], []
    for seed in range(40):
        times, events, _, true = cohort(400, seed)
        weights = known_weights(times, events, censoring(times, events, np.ones(400)), 6.0)
        late = times >= 3
        share.append((weights * late).sum() / weights.sum() - (true >= 3).mean())
        known = weights > 0
        naive.append(late[known].mean() - (true >= 3).mean())
    error = np.std(share) / 40**0.5
    assert abs(np.mean(share)) < 3 * error
    assert abs(np.mean(naive)) > 5 * error


# --- Metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_concordance_is_that_of_all_pairs(ties):
    times, events, x, _ = cohort(60, 10, ties)
    risk = np.round(x, 1)  # ties of risks too
    g = censoring(times, events, np.ones(60))
    above = below = 0.0
    for i, j in product(range(60), repeat=2):
        later = times[j] > times[i] or (times[j] == times[i] and not events[j])
        if i == j or not events[i] or not times[i] < 8 or not later:
            continue
        weight = 1 / g.before(times[i]) ** 2
        below += weight
        above += weight * ((risk[i] > risk[j]) + 0.5 * (risk[i] == risk[j]))
    assert concordance(times, events, risk, np.ones((1, 60)), 8.0)[0] == pytest.approx(
        above / below
    )


def test_metrics_are_the_librarys():
    pytest.importorskip("torchsurv")
    from torchsurv.metrics.auc import Auc
    from torchsurv.metrics.brier_score import BrierScore
    from torchsurv.metrics.cindex import ConcordanceIndex
    from torchsurv.stats.ipcw import get_ipcw

    times, events, x, _ = cohort(150, 11)
    one = np.ones((1, 150))
    t, e = torch.tensor(times), torch.tensor(events)
    at = np.linspace(0.5, 8, 12)
    survival = np.exp(-at * np.exp(0.8 * x)[:, None] / 4)
    new = torch.tensor(at)
    own, later = get_ipcw(e, t), get_ipcw(e, t, new)
    score = BrierScore()
    theirs = score(torch.tensor(survival), e, t, new, own, later)
    assert np.allclose(brier(times, events, survival, one, at)[0], theirs.numpy(), atol=1e-6)
    ours = integrated_brier(times, events, survival, one, at)[0] * at[-1]
    first = theirs[0].item() * at[0] / 2  # the library begins at the first time, we at 0
    assert ours == pytest.approx(score.integral().item() * (at[-1] - at[0]) + first, abs=1e-5)
    area = Auc()(torch.tensor(x), e, t, weight=own, new_time=new, weight_new_time=later)
    assert np.allclose([auroc(times, events, x, one, h)[0] for h in at], area.numpy(), atol=1e-6)
    uno = ConcordanceIndex()(torch.tensor(x), e, t, weight=own.double(), tmax=torch.tensor(8.0))
    assert concordance(times, events, x, one, 8.0)[0] == pytest.approx(uno.item(), abs=1e-5)


def test_rows_of_weights_are_copies_of_patients():
    times, events, *_ = cohort(50, 12, True)
    p = distributions(50, 13).numpy()
    y = np.stack([times, events], 1)
    rng = np.random.default_rng(0)
    draws = rng.multinomial(50, np.full(50, 1 / 50), size=3).astype(float)
    for name, metric in metrics_of(BINS, [1.0, 4.0]).items():
        rows = metric(y, p, draws)
        for r, draw in enumerate(draws):
            who = np.repeat(np.arange(50), draw.astype(int))
            alone = metric(y[who], p[who], np.ones((1, 50)))
            assert rows[r] == pytest.approx(alone[0]), name


def test_metrics_of_the_truth_and_of_nothing():
    times, events, x, true = cohort(4000, 14)
    one = np.ones((1, 4000))
    risk = 1 - np.exp(-3 * np.exp(0.8 * x) / 4)
    # Uncensored truth gives the same figures, so the weights did their work.
    every = np.ones(4000, dtype=bool)
    assert auroc(times, events, x, one, 3.0)[0] == pytest.approx(
        auroc(true, every, x, one, 3.0)[0], abs=0.02
    )
    assert concordance(times, events, x, one, 8.0)[0] == pytest.approx(
        concordance(true, every, x, one, 8.0)[0], abs=0.02
    )
    assert abs(risk_gap(times, events, risk, one, 3.0)[0]) < 0.02
    assert np.isnan(concordance(times, ~every, x, one, 8.0)).all()
    assert np.isnan(auroc(times, events, x, one, 1e9)).all()
    assert np.isnan(risk_gap(times, events, risk, one, 1e9)).all()


# --- Recalibration --------------------------------------------------------------------------------


def drawn_from(p, bins, rng):
    """Draw times from distributions, straight within bins; the tail is after the last edge."""
    until = torch.cat([torch.zeros(len(p), 1), p[:, :-1].cumsum(1)], 1)
    place = torch.searchsorted(until, torch.tensor(rng.uniform(size=(len(p), 1)))).squeeze(1) - 1
    edges = np.array([0.0, *bins.edges, bins.last + 2])
    return edges[place] + rng.uniform(size=len(p)) * (edges[place + 1] - edges[place])


def predicted(n, rng):
    z = torch.tensor(
        rng.normal(size=(n, 4)) * 0.7 + rng.normal(size=(n, 1)) * np.linspace(1, -1, 4)
    )
    return z.softmax(1)


def test_recalibration_finds_what_is_wrong():
    rng = np.random.default_rng(0)
    true = predicted(2000, rng)
    t = drawn_from(true, BINS, rng)
    c = rng.uniform(0, 12, 2000)
    times, events = torch.tensor(np.minimum(t, c)), torch.tensor(t <= c)
    wrong = Recalibration(0.7, 1.8).apply(true, BINS)  # too high, and too sure
    found = fit_recalibration(wrong, BINS.fits(times, events), events, range(2000), BINS)
    assert found.slope == pytest.approx(1 / 1.8, abs=0.06)
    assert found.intercept == pytest.approx(-0.7 / 1.8, abs=0.08)
    at = [1.0, 4.0]
    right = BINS.survival(true, at)
    assert (BINS.survival(found.apply(wrong, BINS), at) - right).abs().max() < 0.05
    assert (BINS.survival(wrong, at) - right).abs().max() > 0.15


def test_few_patients_change_nothing_and_are_told():
    p = distributions(12, 0)
    events = torch.tensor([True] * 9 + [False] * 3)
    fits = BINS.fits(torch.full((12,), 0.5), events)
    found = fit_recalibration(p, fits, events, range(12), BINS)
    assert found == Recalibration(patients=12, events=9)
    assert torch.allclose(found.apply(p, BINS), p, atol=1e-6)
    assert found.band(p, BINS, [1.0]) is None


def test_copies_of_a_patient_make_nothing_surer():
    rng = np.random.default_rng(1)
    p = predicted(60, rng)
    t = torch.tensor(drawn_from(p, BINS, rng))
    events = torch.ones(60, dtype=torch.bool)
    once = fit_recalibration(p, BINS.fits(t, events), events, range(60), BINS)
    again = fit_recalibration(
        p.repeat(5, 1), BINS.fits(t, events).repeat(5, 1), events.repeat(5), [*range(60)] * 5, BINS
    )
    assert again.covariance == pytest.approx(once.covariance, rel=1e-4)
    assert again.slope == pytest.approx(once.slope, rel=1e-4)


def test_band_covers_the_true_curve_as_often_as_it_says():
    """80 cohorts of 150 patients: the band of a new patient's curve holds the true one."""
    rng = np.random.default_rng(2)
    at, held = [1.0, 2.5, 5.0], []
    truth = predicted(80, rng)
    for k in range(80):
        true = predicted(150, rng)
        t = drawn_from(true, BINS, rng)
        c = rng.uniform(1, 12, 150)
        times, events = torch.tensor(np.minimum(t, c)), torch.tensor(t <= c)
        wrong = Recalibration(0.3, 1.3).apply(true, BINS)
        found = fit_recalibration(wrong, BINS.fits(times, events), events, range(150), BINS)
        one = truth[k : k + 1]
        said = found.apply(Recalibration(0.3, 1.3).apply(one, BINS), BINS)
        low, high = found.band(said, BINS, at)
        right = BINS.survival(one, at)
        held.append(((low <= right) & (right <= high)).double().mean().item())
    error = np.std(held) / len(held) ** 0.5
    assert abs(np.mean(held) - 0.9) < 3 * error + 0.02  # the prior shrinks a little


def test_band_holds_its_curve_and_begins_at_one():
    p = distributions(5, 0)
    r = Recalibration(0.1, 0.9, (0.04, 0.01, 0.02), 50, 30)
    at = [0.0, 1.0, 3.0, 6.0]
    low, high = r.band(r.apply(p, BINS), BINS, at)
    middle = BINS.survival(r.apply(p, BINS), at)
    assert bool(((low <= middle + 1e-12) & (middle <= high + 1e-12)).all())
    assert low[:, 0].tolist() == high[:, 0].tolist() == [1.0] * 5


@pytest.mark.parametrize(
    "fields",
    [
        {"slope": 0.0},
        {"intercept": 1e9},
        {"covariance": (-1.0, 0.0, 1.0)},
        {"covariance": (1.0, 5.0, 1.0)},
        {"slope": float("nan")},
    ],
)
def test_recalibrations_that_cannot_be(fields):
    with pytest.raises(ValueError):
        Recalibration(**fields)


# --- Bound ----------------------------------------------------------------------------------------


def test_without_censoring_it_is_split_conformal():
    """Then the level is the floor((n + 1) / 10)-th smallest probability reached."""
    rng = np.random.default_rng(3)
    for n in (9, 10, 19, 20, 57, 100):
        u = rng.uniform(size=n)
        found = bound_of(u, u, np.ones(n, dtype=bool), NEVER, 2.0)
        assert found.level == np.sort(u)[int((n + 1) * 0.1 + 1e-9) - 1]
    assert bound_of(u[:8], u[:8], np.ones(8, dtype=bool), NEVER, 2.0) == TimeBound(8, None)


def test_too_much_censoring_for_so_few():
    g = Step(np.array([0.5]), np.array([0.5]))
    u = np.linspace(0.01, 0.99, 18)
    every = np.ones(18, dtype=bool)
    assert bound_of(u, u, every, g, 1.0).level is None  # B = 2: 0.1 (n + 1) is below it
    assert bound_of(u, u, every, g, 0.5).level is not None  # nothing is promised after 0.5: B = 1


def test_bound_ends_where_half_escape():
    assert latest_bound(NEVER, 6.0) == 6.0
    assert latest_bound(Step(np.array([1.0, 3.0, 5.0]), np.array([0.9, 0.45, 0.2])), 6.0) == 3.0
    assert latest_bound(Step(np.array([1.0, 3.0]), np.array([0.9, 0.5])), 6.0) == 6.0


@pytest.mark.parametrize(
    ("n", "censored", "skill"),
    [(40, 0.0, 0.8), (40, 0.45, 0.8), (40, 0.45, -1.5), (150, 0.45, 0.8), (150, 0.7, 0.0)],
)
def test_bound_covers_under_censoring(n, censored, skill):
    """Coverage over 700 cohorts and new patients, G estimated from 200 others.

    A model that is right, one that has it backwards and one that knows nothing: the bound holds
    for each. Taking censored times for deaths would be late for the third case and waste the
    others.
    """
    rng = np.random.default_rng([n, int(100 * censored), 7])
    bins = TimeBins((0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0))
    edges = np.array([0.0, *bins.edges])
    limit = {0.0: 1e9, 0.45: 9.0, 0.7: 4.0}[censored]

    def draw(size):
        x = rng.normal(size=size)
        t = rng.exponential(4 * np.exp(-0.8 * x))
        c = rng.uniform(0, limit, size)
        reached = 1 - np.exp(-edges * np.exp(skill * x)[:, None] / 4)
        p = np.diff(np.hstack([reached, np.ones((size, 1))]), axis=1)
        return np.minimum(t, c), t <= c, torch.tensor(p), t

    covered = []
    for _ in range(700):
        times, events, *_ = draw(200)
        g = censoring(times, events, np.ones(200))
        latest = latest_bound(g, bins.last)
        times, events, p, _ = draw(n)
        u = bins.cumulative(p, torch.tensor(times)).numpy()
        found = bound_of(u, times, events, g, latest)
        _, _, p, t = draw(20)
        low = np.minimum(bins.quantile(p, found.level or 0.0).numpy(), latest)
        covered.append((t >= low).mean())
    mean, error = np.mean(covered), np.std(covered) / len(covered) ** 0.5
    assert mean > 0.9 - 3 * error
    assert mean < 0.96  # and it is not merely cautious
