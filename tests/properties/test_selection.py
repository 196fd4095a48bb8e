"""Laws of the selection rule over random features and statistics, and its edges."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dymo_med.selection import SELECTORS, fit_statistics
from dymo_med.selection.reward import log_tail, reward, similarity_factor
from dymo_med.selection.statistics import lookup
from dymo_med.types import FusionOutput, ModalityMask, SubsetStatistics, subset_id

K, D = 3, 4


class Table:
    """A backbone that looks its answer up by patient and subset."""

    def __init__(self, b, m, seed, distance):
        g = torch.Generator().manual_seed(seed)
        self.z = torch.randn(b, 2**m, D, generator=g, dtype=torch.float64)
        if distance == "cosine":
            self.z = torch.nn.functional.normalize(self.z, dim=-1)
        self.logits = torch.randn(b, 2**m, K, generator=g, dtype=torch.float64)

    def __call__(self, rows, used, admitted):
        s = subset_id(used)
        return FusionOutput(self.logits[rows, s], self.z[rows, s])


def statistics(m, seed, distance, spread=1.0):
    g = torch.Generator().manual_seed(seed + 1)
    subsets = (torch.arange(1, 2**m)[:, None] >> torch.arange(m)) & 1 == 1
    prototypes = torch.randn(len(subsets), K, D, generator=g, dtype=torch.float64) * 0.6
    return SubsetStatistics(
        distance=distance,
        subsets=subsets,
        prototypes=prototypes,
        overall=prototypes.mean(0),
        spread=torch.rand(len(subsets), K, generator=g, dtype=torch.float64) * spread + 1e-3,
        counts=torch.full((len(subsets), K), 9),
        borrowed_from=torch.arange(len(subsets))[:, None].expand(-1, K),
    )


def draw_masks(b, m, seed):
    g = torch.Generator().manual_seed(seed + 2)
    observed = torch.rand(b, m, generator=g) < 0.5
    observed[torch.arange(b), torch.randint(m, (b,), generator=g)] = True
    candidates = ~observed & (torch.rand(b, m, generator=g) < 0.8)
    return observed, candidates


cases = st.tuples(
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(0, 10_000),
    st.sampled_from(["cosine", "euclidean"]),
)


def run(b, m, seed, distance, rows=None, columns=None):
    observed, candidates = draw_masks(b, m, seed)
    fuse = Table(b, m, seed, distance)
    return SELECTORS["dymo"]().select(
        fuse,
        ModalityMask(tuple(map(str, range(m))), observed),
        candidates,
        statistics(m, seed, distance),
    )


@given(cases)
@settings(deadline=None, max_examples=60)
def test_the_trace_replays_to_the_same_decision(case):
    """From the numbers in the trace alone: rewards, rejections, admissions, final subset."""
    b, m, _, _ = case
    trace = run(*case)
    used, dropped = trace.observed.clone(), torch.zeros(b, m, dtype=torch.bool)
    for t in range(len(trace.chosen)):
        again = reward(
            trace.quality_before[t][:, None].expand(b, m).log(),
            trace.quality_after[t].log(),
            trace.factor[t],
        )
        real = ~trace.reward[t].isnan()
        torch.testing.assert_close(again[real], trace.reward[t][real], atol=1e-9, rtol=0)
        for i in range(b):
            rewards = {u: float(trace.reward[t, i, u]) for u in range(m) if real[i, u]}
            assert not any(dropped[i, u] or used[i, u] for u in rewards)
            positive = {u: r for u, r in rewards.items() if r > 0}
            best = max(positive, key=lambda u: (positive[u], -u)) if positive else -1
            assert int(trace.chosen[t, i]) == best
            for u, r in rewards.items():
                dropped[i, u] |= r < 0
            if best >= 0:
                used[i, best] = True
    assert torch.equal(used, trace.used)


@given(cases)
@settings(deadline=None, max_examples=60)
def test_used_contains_observed_and_rewards_are_only_of_candidates(case):
    trace = run(*case)
    assert bool((trace.used >= trace.observed).all())
    assert not bool((~trace.reward.isnan() & ~trace.candidates).any())
    assert len(trace.chosen) <= case[1] + 1
    assert bool((trace.factor.nan_to_num(1.0) <= 1).all())
    assert bool((trace.factor.nan_to_num(0.0) >= 0).all())


@given(st.floats(-700, 0), st.floats(-700, 0), st.sampled_from(["log_ratio", "ratio", "none"]))
def test_the_factor_is_between_0_and_1_and_1_where_nothing_is_lost(before, after, calibration):
    alpha = float(
        similarity_factor(
            torch.tensor(before, dtype=torch.float64),
            torch.tensor(after, dtype=torch.float64),
            calibration,
        )
    )
    assert 0 <= alpha <= 1
    if after >= before:
        assert alpha == 1


def test_tail_probability_does_not_underflow():
    z = torch.zeros(1, D, dtype=torch.float64)
    c = torch.zeros(1, D, dtype=torch.float64)
    c[0, 0] = 10.0
    got = float(log_tail(z, c, torch.ones(1, dtype=torch.float64), "euclidean"))
    # 2 (1 - Phi(10)) = erfc(10 / sqrt 2), which double precision still holds.
    assert math.isclose(got, math.log(math.erfc(10 / math.sqrt(2))), rel_tol=1e-9)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_a_spread_of_zero_is_defined(distance):
    z = torch.eye(D, dtype=torch.float64)[:2]
    spread = torch.zeros(2, dtype=torch.float64)
    on, off = z, z.flip(0)
    assert torch.equal(log_tail(z, on, spread, distance), torch.zeros(2).double())
    assert bool((log_tail(z, off, spread, distance) < -1e3).all())
    assert bool(log_tail(z, off, spread, distance).isfinite().all())


def test_p_of_1_before_rejects_whatever_moves_away():
    alpha = similarity_factor(torch.zeros(()), torch.tensor(-3.0), "log_ratio")
    assert float(alpha) == 0
    assert float(reward(torch.tensor(0.9).log(), torch.tensor(0.99).log(), alpha)) < 0


def test_saturated_qualities_are_still_told_apart():
    before, after = torch.tensor(-1e-12).double(), torch.tensor(-1e-15).double()
    assert float(reward(before, after, torch.ones(()).double())) > 0


def test_a_candidate_that_changes_nothing_is_not_admitted():
    m = 2
    fuse = Table(3, m, 0, "cosine")
    fuse.z[:, 3], fuse.logits[:, 3] = fuse.z[:, 1], fuse.logits[:, 1]
    stats = statistics(m, 0, "cosine")
    stats.prototypes[2], stats.spread[2] = stats.prototypes[0], stats.spread[0]
    observed = torch.tensor([[True, False]] * 3)
    trace = SELECTORS["dymo"]().select(fuse, ModalityMask(("a", "b"), observed), ~observed, stats)
    assert torch.equal(trace.used, observed)
    assert torch.equal(trace.reward[0, :, 1], torch.zeros(3).double())


def test_everything_observed_takes_no_step():
    observed = torch.ones(4, 3, dtype=torch.bool)
    trace = SELECTORS["dymo"]().select(
        Table(4, 3, 0, "cosine"),
        ModalityMask(("a", "b", "c"), observed),
        ~observed,
        statistics(3, 0, "cosine"),
    )
    assert trace.reward.shape == (0, 4, 3) and torch.equal(trace.used, observed)


def test_an_unseen_subset_uses_its_largest_known_part():
    stats = statistics(3, 0, "cosine")
    known = torch.tensor([0, 1, 2, 3])  # {a}, {b}, {a, b}, {c}
    fewer = dataclasses.replace(stats, subsets=stats.subsets[known])
    asked = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])
    rows, unseen = lookup(fewer, asked)
    assert rows.tolist() == [2, 0, 1]
    assert unseen.tolist() == [True, True, False]


def test_statistics_against_plain_loops():
    n, m = 40, 3
    g = torch.Generator().manual_seed(0)
    available = torch.rand(n, m, generator=g) < 0.7
    available[:, 0] |= ~available.any(1)
    labels = torch.arange(n) % K
    fuse = Table(n, m, 3, "cosine")
    weights = torch.rand(n, generator=g, dtype=torch.float64) + 0.5
    stats = fit_statistics(fuse, available, labels, weights, K, "cosine")
    for s, subset in enumerate(stats.subsets):
        for k in range(K):
            who = [
                i
                for i in range(n)
                if labels[i] == k and all(available[i, j] or not subset[j] for j in range(m))
            ]
            assert int(stats.counts[s, k]) == len(who)
            if len(who) < 2:
                assert int(stats.borrowed_from[s, k]) != s
                continue
            z = torch.stack([fuse.z[i, int(subset_id(subset))] for i in who])
            w = weights[who][:, None]
            mean = (w * z).sum(0) / w.sum()
            delta = 1 - z @ mean
            torch.testing.assert_close(stats.prototypes[s, k], mean)
            rms = ((w[:, 0] * delta.square()).sum() / w.sum()).sqrt()
            torch.testing.assert_close(stats.spread[s, k], rms)


def test_a_class_with_one_patient_and_a_class_with_none():
    available = torch.ones(5, 2, dtype=torch.bool)
    weights = torch.ones(5, dtype=torch.float64)
    fuse = Table(5, 2, 0, "euclidean")
    one = fit_statistics(fuse, available, torch.tensor([0, 0, 1, 1, 2]), weights, K, "euclidean")
    assert bool(one.prototypes.isfinite().all()) and bool(one.spread.isfinite().all())
    with pytest.raises(ValueError, match="class index"):
        fit_statistics(fuse, available, torch.tensor([0, 0, 1, 1, 1]), weights, K, "euclidean")
