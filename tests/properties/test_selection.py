"""Laws of the selection rule over random features and statistics, and its edges."""

import dataclasses
import functools
import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dymo_med.backbones import BACKBONES, encode_versions
from dymo_med.files import write_csv
from dymo_med.inference.assemble import STEP_COLUMNS, selection_steps
from dymo_med.selection import SELECTORS, fit_statistics
from dymo_med.selection.reward import log_tail, reward, similarity_factor
from dymo_med.selection.statistics import lookup
from dymo_med.types import (
    Batch,
    Column,
    FusionOutput,
    ModalityMask,
    ModalitySpec,
    Recovery,
    SubsetStatistics,
    subset_id,
)

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


def run(b, m, seed, distance):
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


@given(case=cases)
@settings(deadline=None, max_examples=40)
def test_a_saved_trace_replays_to_the_same_decision(case, tmp_path_factory):
    """From the file that `dymo-med predict` writes, and from nothing else."""
    trace = run(*case)
    path = tmp_path_factory.mktemp("trace") / "selection.csv"
    for i in range(case[0]):
        steps = selection_steps(trace, i)
        write_csv(path, STEP_COLUMNS, [dataclasses.asdict(step) for step in steps])
        table = pd.read_csv(path, dtype={"modality": str})
        admitted, out = [], set()
        for _, step in table.groupby("step"):
            assert not out & set(step.modality)
            again = step.factor * step.quality_after - step.quality_before
            assert bool(((again - step.reward).abs() < 1e-7).all())
            # The largest positive reward, the first in canonical order among equals.
            best = step.modality[step.reward.idxmax()] if (step.reward > 0).any() else None
            for modality, gain, decision in zip(
                step.modality, step.reward, step.decision, strict=True
            ):
                assert decision == (
                    "admitted"
                    if modality == best
                    else "rejected"
                    if gain < 0
                    else "stopped"
                    if best is None
                    else "not yet"
                )
            out |= set(step.modality[step.reward < 0]) | {best}
            admitted += [best] if best is not None else []
        expected = [n for n, a in zip(trace.names, trace.admitted[i].tolist(), strict=True) if a]
        assert sorted(admitted) == expected
        assert trace.used[i].tolist() == [
            seen or name in admitted
            for name, seen in zip(trace.names, trace.observed[i].tolist(), strict=True)
        ]


@given(cases, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_permuting_modalities_permutes_the_answer(case, random):
    """Where two candidates are equally good the first wins, so equals are left out."""
    b, m, seed, distance = case
    whole = run(*case)
    positive = whole.reward.masked_fill(~(whole.reward > 0), torch.nan).sort(-1).values
    assert not bool((positive.diff(dim=-1) == 0).any())
    order = torch.tensor(random.sample(range(m), m))  # new column j is old column order[j]
    inner, stats = Table(b, m, seed, distance), statistics(m, seed, distance)
    observed, candidates = draw_masks(b, m, seed)

    def back(subsets):
        return torch.zeros_like(subsets).index_copy(1, order, subsets)

    moved = stats.subsets[:, order]
    rank = subset_id(moved).argsort()
    permuted = SELECTORS["dymo"]().select(
        lambda rows, used, admitted: inner(rows, back(used), back(admitted)),
        ModalityMask(tuple(map(str, order.tolist())), observed[:, order]),
        candidates[:, order],
        dataclasses.replace(
            stats,
            subsets=moved[rank],
            prototypes=stats.prototypes[rank],
            spread=stats.spread[rank],
        ),
    )
    assert torch.equal(permuted.used, whole.used[:, order])
    assert torch.equal(permuted.output.logits, whole.output.logits)
    assert len(permuted.reward) == len(whole.reward)
    torch.testing.assert_close(
        permuted.reward, whole.reward[:, :, order], atol=1e-12, rtol=0, equal_nan=True
    )


SPECS = (
    ModalitySpec("film", "image", "f.png", (1, 6, 6), (), "none"),
    ModalitySpec("scan", "image", "s.png", (1, 4, 4), (), "none"),
    ModalitySpec(
        "labs",
        "table",
        "ehr.csv",
        (2,),
        columns=(
            Column("crp", "continuous", mean=0.0, std=1.0),
            Column("ldh", "continuous", mean=0.0, std=1.0),
        ),
    ),
    ModalitySpec(
        "age", "table", "ehr.csv", (1,), columns=(Column("age", "continuous", mean=0.0, std=1.0),)
    ),
)


def draw_values(n, g):
    return {s.name: torch.randn(n, *s.shape, generator=g, dtype=torch.float64) for s in SPECS}


def make_batch(values, available, fields):
    n = len(available)
    ids = tuple(map(str, range(n)))
    names = tuple(s.name for s in SPECS)
    return Batch(ids, ids, values, ModalityMask(names, available), fields, torch.arange(n) % K)


@functools.cache
def real_backbone():
    """The fusion transformer with random weights, and its statistics of random patients."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        entry = BACKBONES["transformer"]
        options = entry.Options(dim=8, heads=2, layers=2, projection=4, width=4, grid=2)
        backbone = entry(SPECS, K, options).double().eval()
    n = 24
    everything = torch.ones(n, len(SPECS), dtype=torch.bool)
    fields = {"labs": torch.ones(n, 2).bool(), "age": torch.ones(n, 1).bool()}
    batch = make_batch(draw_values(n, torch.Generator().manual_seed(1)), everything, fields)
    with torch.no_grad():
        return backbone, fit_statistics(
            encode_versions(backbone, batch),
            everything,
            batch.labels,
            torch.ones(n, dtype=torch.float64),
            K,
            backbone.distance,
        )


@given(st.integers(1, 5), st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_noise_where_nothing_is_available_changes_nothing(b, seed):
    """Neither what stands in for unmeasured values, nor for what no imputer proposed."""
    backbone, stats = real_backbone()
    g = torch.Generator().manual_seed(seed)
    m = len(SPECS)
    observed = torch.rand(b, m, generator=g) < 0.5
    observed[torch.arange(b), torch.randint(m, (b,), generator=g)] = True
    cells = torch.rand(b, 2, generator=g) < 0.6
    cells[:, 0] |= ~cells.any(1)
    fields = {"labs": cells & observed[:, 2:3], "age": observed[:, 3:]}
    recovered = ~observed & (torch.rand(b, m, generator=g) < 0.7)
    completed = torch.zeros_like(observed)
    completed[:, 2] = observed[:, 2] & ~cells.all(1) & (torch.rand(b, generator=g) < 0.7)
    measured, proposed = draw_values(b, g), draw_values(b, g)

    def select(noise):
        values, proposals = {}, {}
        for i, spec in enumerate(SPECS):
            shape = (b, *(1,) * len(spec.shape))
            real = fields.get(spec.name, observed[:, i].view(shape))
            offered = (recovered | completed)[:, i].view(shape)
            values[spec.name] = torch.where(real, measured[spec.name], noise[spec.name])
            proposals[spec.name] = torch.where(
                offered & ~(real & observed[:, i].view(shape)),
                proposed[spec.name],
                values[spec.name],
            )
        batch = make_batch(values, observed, fields)
        recovery = Recovery(proposals, batch.observed, recovered, completed)
        with torch.no_grad():
            fuse = encode_versions(backbone, batch, recovery)
            return SELECTORS["dymo"]().select(fuse, batch.observed, recovery.candidates, stats)

    one = select(draw_values(b, g))
    two = select({name: 1e3 * x for name, x in draw_values(b, g).items()})
    assert torch.equal(one.used, two.used)
    assert torch.equal(one.output.logits, two.output.logits)
    assert torch.equal(one.reward.nan_to_num(9.0), two.reward.nan_to_num(9.0))


@given(
    st.integers(2, 5),
    st.floats(0.05, 1.0),
    st.sampled_from(["towards the mean", "away"]),
    st.sampled_from(["cosine", "euclidean"]),
)
@settings(deadline=None, max_examples=60)
def test_a_candidate_that_is_noise_for_every_class_is_not_admitted(k, much, kind, distance):
    """One candidate makes the class clearer; the other tells nothing of any class.

    Prototypes are unit vectors; the embedding lies between its class's one and the mean of all.
    Noise pulls it towards that mean, or in a direction in which every prototype is as far.
    """
    prototypes = torch.eye(k, k + 1, dtype=torch.float64)
    elsewhere = torch.zeros(k + 1, dtype=torch.float64)
    elsewhere[k] = 1.0
    subsets = (torch.arange(1, 8)[:, None] >> torch.arange(3)) & 1 == 1
    stats = SubsetStatistics(
        distance=distance,
        subsets=subsets,
        prototypes=prototypes.expand(7, k, k + 1),
        overall=prototypes,
        spread=torch.full((7, k), 0.5, dtype=torch.float64),
        counts=torch.full((7, k), 9),
        borrowed_from=torch.arange(7)[:, None].expand(7, k),
    )

    def fuse(rows, used, admitted):
        clear = torch.where(used[:, 1], 0.8, 0.5).double()
        noise = torch.where(used[:, 2], much, 0.0).double()
        pulled = clear * (1 - noise) if kind == "towards the mean" else clear
        z = pulled[:, None] * prototypes[rows] + (1 - pulled)[:, None] * prototypes.mean(0)
        if kind == "away":
            z = z + noise[:, None] * elsewhere
        if distance == "cosine":
            z = torch.nn.functional.normalize(z, dim=-1)
        return FusionOutput(prototypes[rows][:, :k], z)  # the class is right, before and after

    observed = torch.tensor([[True, False, False]]).expand(k, 3)
    trace = SELECTORS["dymo"]().select(
        fuse, ModalityMask(("seen", "clear", "noise"), observed), ~observed, stats
    )
    assert trace.used.tolist() == [[True, True, False]] * k
    assert bool((trace.reward[0, :, 2] < 0).all())


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
