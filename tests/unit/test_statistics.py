"""Statistics of many modalities: what is kept, what it costs, and what an unseen subset gets."""

from collections import Counter
from itertools import combinations
from math import comb

import pytest
import torch

from dymo_med.backbones import BACKBONES
from dymo_med.config import BackboneTraining
from dymo_med.selection import SELECTORS, fit_statistics
from dymo_med.selection.statistics import lookup, occurring_subsets
from dymo_med.training.loop import MicroBatch
from dymo_med.training.objectives import FusionObjective
from dymo_med.types import Batch, Column, FusionOutput, ModalityMask, ModalitySpec, subset_id

K = 2


class Sum:
    """A backbone whose embedding is the sum of the used modalities' vectors; counts its work."""

    def __init__(self, n, m, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, m, 3, generator=g, dtype=torch.float64)
        self.fusions, self.largest, self.rows = 0, 0, []

    def __call__(self, rows, used, admitted):
        self.fusions += len(rows)
        self.largest = max(self.largest, len(rows))
        self.rows.append((rows, used))
        z = (self.x[rows] * used[..., None]).sum(1)
        return FusionOutput(z[:, :K], z)


def fit(fuse, available, **options):
    n = len(available)
    labels, weights = torch.arange(n) % K, torch.ones(n, dtype=torch.float64)
    return fit_statistics(fuse, available, labels, weights, K, "euclidean", **options)


def random_sets(m, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    size = torch.randint(1, m + 1, (count, 1), generator=g)
    return torch.rand(count, m, generator=g).argsort(1).argsort(1) < size


def test_up_to_ten_modalities_every_part_of_a_record_is_kept():
    g = torch.Generator().manual_seed(1)
    available = torch.rand(9, 6, generator=g) < 0.6
    available[0] |= ~available.any(0)
    parts = {
        ids
        for record in available.tolist()
        for size in range(1, 7)
        for ids in combinations([m for m in range(6) if record[m]], size)
    }
    kept = occurring_subsets(available)
    assert {tuple(s.nonzero().squeeze(1).tolist()) for s in kept} == parts
    assert len(kept) == len(parts) < 63
    assert bool((subset_id(kept).diff() > 0).all())


@pytest.mark.parametrize(("m", "left_out"), [(16, 4), (24, 4), (40, 3)])
def test_many_modalities_keep_what_is_likely_within_the_bound(m, left_out):
    kept = occurring_subsets(torch.ones(5, m, dtype=torch.bool))
    sizes = Counter(kept.sum(1).tolist())
    for size in (1, 2, *range(m - left_out, m + 1)):
        assert sizes[size] == comb(m, size)
    others = range(3, m - left_out)
    assert 900 < sum(sizes[size] for size in others) <= 1024
    assert all(sizes[size] for size in others)
    assert len(kept) <= 16_384


def test_the_bound_leaves_out_whole_levels():
    kept = occurring_subsets(torch.ones(3, 16, dtype=torch.bool), most=1_000)
    sizes = Counter(kept.sum(1).tolist())
    assert len(kept) <= 1_000
    assert sizes[13] == comb(16, 3) and sizes[12] < comb(16, 4)


def test_patients_with_gaps_have_only_parts_of_them_kept():
    g = torch.Generator().manual_seed(2)
    available = torch.rand(30, 14, generator=g) < 0.7
    available[0] |= ~available.any(0)
    kept = occurring_subsets(available)
    inside = ((kept[:, None] & ~available) == 0).all(-1).any(1)
    assert bool(inside.all())
    stored = set(subset_id(kept).tolist())
    assert set(subset_id(available).tolist()) <= stored
    assert set((1 << torch.arange(14)).tolist()) <= stored


@pytest.mark.parametrize("m", [16, 24])
def test_an_unseen_subset_has_a_large_part_of_its_own(m):
    available = torch.ones(4, m, dtype=torch.bool)
    statistics = fit(Sum(4, m), available)
    asked = random_sets(m, 300)
    row, unseen = lookup(statistics, asked)
    found = statistics.subsets[row]
    assert not bool((found & ~asked).any())
    assert torch.equal(unseen, (found != asked).any(1))
    assert bool(unseen.any()) and not bool(unseen.all())
    # The random parts keep it from falling back to a pair.
    gap = (asked.sum(1) - found.sum(1))[unseen].double()
    assert float(gap.mean()) < m / 4
    few_missing = asked.sum(1) >= m - 4
    assert bool(few_missing.any()) and not bool(unseen[few_missing].any())


def test_lookup_against_a_plain_search():
    statistics = fit(Sum(4, 11), torch.ones(4, 11, dtype=torch.bool))
    asked = torch.cat([random_sets(11, 30), random_sets(11, 30)])  # each twice
    rows, unseen = lookup(statistics, asked)
    for subset, row, is_unseen in zip(asked, rows.tolist(), unseen.tolist(), strict=True):
        parts = [s for s, kept in enumerate(statistics.subsets) if not bool((kept & ~subset).any())]
        best = max(parts, key=lambda s: (int(statistics.subsets[s].sum()), -s))
        assert row == best
        assert is_unseen == (not torch.equal(statistics.subsets[best], subset))


def test_the_same_records_give_the_same_subsets():
    g = torch.Generator().manual_seed(3)
    available = torch.rand(50, 20, generator=g) < 0.8
    state = torch.random.get_rng_state()
    once = occurring_subsets(available)
    torch.rand(7)
    assert torch.equal(once, occurring_subsets(available))
    torch.random.set_rng_state(state)
    occurring_subsets(available)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("n", "fusions"), [(40, 2**20), (400, 200_000), (400, 40_000)])
def test_work_and_memory_are_bounded(n, fusions):
    fuse = Sum(n, 16)
    statistics = fit(fuse, torch.ones(n, 16, dtype=torch.bool), fusions=fusions)
    assert fuse.fusions <= fusions
    assert fuse.largest <= 1_024
    assert bool((statistics.counts == n // K).all())
    assert torch.equal(
        statistics.borrowed_from, torch.arange(len(statistics.subsets))[:, None].expand(-1, K)
    )


def test_the_records_fused_are_spread_evenly_and_alike_per_class():
    n = 500
    fuse = Sum(n, 12)
    statistics = fit(fuse, torch.ones(n, 12, dtype=torch.bool))
    rows = torch.cat([r for r, _ in fuse.rows])
    used = torch.cat([u for _, u in fuse.rows])
    mine = rows[(used == statistics.subsets[7]).all(1)]
    for k in range(K):
        of_class = mine[mine % K == k]
        assert len(of_class) == 64
        assert int(of_class.max() - of_class.min()) > 0.95 * n
        gaps = of_class.sort().values.diff()
        assert int(gaps.max() - gaps.min()) <= 2 * K
        z = (fuse.x[of_class] * statistics.subsets[7][:, None]).sum(1)
        torch.testing.assert_close(statistics.prototypes[7, k], z.mean(0))


def test_up_to_ten_modalities_every_record_is_fused():
    n = 300
    fuse = Sum(n, 3)
    fit(fuse, torch.ones(n, 3, dtype=torch.bool), fusions=10)
    assert fuse.fusions == 7 * n


@pytest.mark.parametrize("m", [4, 12])
def test_a_modality_that_no_record_has_falls_back_on_the_pooled_numbers(m):
    n = 20
    available = torch.ones(n, m, dtype=torch.bool)
    available[:, 1] = False
    fuse = Sum(n, m)
    statistics = fit(fuse, available)
    assert not bool(torch.cat([u for _, u in fuse.rows])[:, 1].any())
    alone = torch.zeros(1, m, dtype=torch.bool)
    alone[0, 1] = True
    row, unseen = lookup(statistics, alone)
    assert unseen.tolist() == [True] and not bool(statistics.subsets[row].any())
    torch.testing.assert_close(statistics.prototypes[row[0]], statistics.overall)
    own = statistics.borrowed_from >= 0
    pooled = torch.where(own, statistics.spread.square(), 0).sum(0) / own.sum(0)
    torch.testing.assert_close(statistics.spread[row[0]], pooled.sqrt())
    # With anything else beside it, the part without it counts.
    beside = alone.clone()
    beside[0, 2] = True
    row, unseen = lookup(statistics, beside)
    assert unseen.tolist() == [True]
    assert statistics.subsets[row[0]].nonzero().squeeze(1).tolist() == [2]


def test_the_trace_says_which_rewards_rest_on_another_subset():
    m, n = 14, 30
    statistics = fit(Sum(n, m), torch.ones(n, m, dtype=torch.bool))
    observed = random_sets(m, 40, seed=4)
    observed = observed[observed.sum(1) < m]
    trace = SELECTORS["dymo"]().select(
        Sum(len(observed), m, seed=5),
        ModalityMask(tuple(map(str, range(m))), observed),
        ~observed,
        statistics,
    )
    rows, columns = (~observed).nonzero(as_tuple=True)
    after = observed[rows].clone()
    after[torch.arange(len(rows)), columns] = True
    _, unseen = lookup(statistics, after)
    assert bool(unseen.any()) and not bool(unseen.all())
    assert bool(trace.borrowed[0, rows, columns][unseen].all())


def test_training_encodes_each_modality_once_per_batch():
    """Not once per subset, and only for the records that have it."""
    specs = (
        ModalitySpec("film", "image", "f.png", (1, 8, 8), (), "none"),
        ModalitySpec(
            "age", "table", "e.csv", (1,), columns=(Column("age", "continuous", mean=0.0, std=1.0),)
        ),
        ModalitySpec(
            "crp", "table", "e.csv", (1,), columns=(Column("crp", "continuous", mean=0.0, std=1.0),)
        ),
    )
    b = 6
    g = torch.Generator().manual_seed(0)
    available = torch.ones(b, 3, dtype=torch.bool)
    available[:2, 0] = False
    batch = Batch(
        record_ids=tuple(map(str, range(b))),
        patient_ids=tuple(map(str, range(b))),
        values={s.name: torch.randn(b, *s.shape, generator=g) for s in specs},
        observed=ModalityMask(tuple(s.name for s in specs), available),
        observed_fields={s.name: available[:, i : i + 1] for i, s in enumerate(specs) if i},
        labels=torch.arange(b) % K,
    )
    entry = BACKBONES["transformer"]
    backbone = entry(specs, K, entry.Options(dim=8, heads=2, layers=1, projection=4, width=4))
    settings = BackboneTraining(subsets=5)
    objective = FusionObjective(
        backbone, K, settings, batch, torch.ones(b), torch.device("cpu"), seed=0
    )
    encoded, fused = [], []
    for name, encoder in backbone.encoders.items():
        encoder.register_forward_hook(
            lambda module, given, output, name=name: encoded.append((name, len(given[0])))
        )
    backbone.blocks[0].register_forward_hook(
        lambda module, given, output: fused.append(len(output))
    )
    loss = objective(MicroBatch(batch, torch.ones(b), torch.Generator().manual_seed(0)))
    loss.backward()
    assert sum(fused) == settings.subsets * b
    assert encoded == [("film", b - 2), ("age", b), ("crp", b)]
