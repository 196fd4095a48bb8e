"""Selectors fitted on held-back patients: what they learn, and which becomes the default."""

import dataclasses
import math
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from dymo_med.selection import SELECTORS, Cases, Selector, fit_statistics
from dymo_med.selection.base import Admits, DecidesBy
from dymo_med.selection.evidence import Standardiser
from dymo_med.selection.greedy import GreedySearch, RewardOptions, best_margin
from dymo_med.training.selectors import (
    choose,
    fit_all,
    held_out,
    held_out_logits,
    hide,
    remember,
)
from dymo_med.types import Batch, FusionOutput, ModalityMask

K, M = 3, 4


def pick(cases, statistics, patients):
    answers = held_out(fit_all(cases, statistics, {}), cases, statistics, patients)
    return choose(answers, cases, patients)


class World:
    """A backbone that adds up evidence: every modality shows a class, more or less clearly.

    The first modality is measured and shows the true class with noise; the others are recovered
    and show the true class with probability `reliability`, else another one.
    """

    def __init__(self, n, reliability, seed, strength=2.5):
        g = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(K, (n,), generator=g)
        right = torch.rand(n, M, generator=g) < reliability
        right[:, 0] = True
        other = (self.labels[:, None] + torch.randint(1, K, (n, M), generator=g)) % K
        shown = torch.where(right, self.labels[:, None], other)
        noise = torch.randn(n, M, K, generator=g, dtype=torch.float64)
        self.evidence = strength * F.one_hot(shown, K).double() + noise
        self.evidence[:, 0] = 1.0 * F.one_hot(self.labels, K).double() + noise[:, 0]

    def __call__(self, rows, used, admitted):
        logits = (self.evidence[rows] * used[..., None]).sum(1)
        return FusionOutput(logits, F.normalize(torch.softmax(logits, -1), dim=-1))

    def statistics(self):
        """What training on real data would give: the same world with nothing made up."""
        real = World(400, 1.0, 99)
        everything = torch.ones(400, M, dtype=torch.bool)
        weights = torch.ones(400, dtype=torch.float64)
        return fit_statistics(real, everything, real.labels, weights, K, "cosine")

    def cases(self):
        n = len(self.labels)
        observed = torch.zeros(n, M, dtype=torch.bool)
        observed[:, 0] = True
        mask = ModalityMask(tuple("abcd"), observed)
        return Cases(self, mask, ~observed, self.labels, torch.ones(n), 1.0)


def accuracy(selector, world, statistics):
    cases = world.cases()
    trace = selector.select(cases.fuse, cases.observed, cases.candidates, statistics)
    return float((trace.output.logits.argmax(-1) == world.labels).float().mean()), trace


def names(n):
    return [f"p{i}" for i in range(n)]


@pytest.mark.parametrize("reliability", [1 / 3, 0.6, 0.9])
def test_the_default_is_no_worse_than_both_extremes(reliability):
    world = World(300, reliability, 1)
    statistics = world.statistics()
    cases = world.cases()
    selectors = fit_all(cases, statistics, {})
    choice = choose(held_out(selectors, cases, statistics, names(300)), cases, names(300))
    test = World(1000, reliability, 2)
    scores = {n: accuracy(s, test, statistics)[0] for n, s in selectors.items()}
    best = max(scores["observed_only"], scores["trust_all"])
    assert scores[choice.name] >= best - 0.015
    if reliability == 1 / 3:  # as good as guessing: nothing to be had
        assert scores["trust_all"] < scores["observed_only"] - 0.05
        assert scores[choice.name] == pytest.approx(scores["observed_only"], abs=0.01)
    if reliability == 0.6:
        assert scores[choice.name] > best + 0.01 and choice.name != "observed_only"


def test_recoveries_that_tell_nothing_are_left_out():
    """By every fitted selector: each class is shown equally often, whatever the truth."""
    world = World(400, 1 / 3, 3)
    statistics = world.statistics()
    fitted = fit_all(world.cases(), statistics, {})
    test = World(400, 1 / 3, 4)
    for name in ("dymo_margin", "gate", "subset_average"):
        _, trace = accuracy(fitted[name], test, statistics)
        assert float(trace.admitted.double().mean()) < 0.1, name
    assert float(accuracy(fitted["dymo"], test, statistics)[1].admitted.double().mean()) > 0.2


def test_a_modality_that_is_always_wrong_is_known_by_its_name():
    world, test = World(400, 0.95, 5), World(400, 0.95, 6)
    statistics = world.statistics()
    for w in (world, test):
        wrong = F.one_hot((w.labels + 1) % K, K).double()
        w.evidence[:, 2] = 2.5 * wrong + 0.3 * torch.randn(
            400, K, generator=torch.Generator().manual_seed(8), dtype=torch.float64
        )
    fitted = fit_all(world.cases(), statistics, {})
    for name in ("gate", "subset_average"):
        _, trace = accuracy(fitted[name], test, statistics)
        admitted = trace.admitted.double().mean(0)
        assert admitted[1] > 0.7 and admitted[3] > 0.7 and admitted[2] < 0.1, name


def test_selectors_live_without_candidates_and_without_variety():
    world = World(12, 0.7, 7)
    statistics = world.statistics()
    full = world.cases()
    nobody = Cases(
        full.fuse,
        full.observed,
        torch.zeros_like(full.candidates),
        full.labels,
        full.weights,
        1.0,
    )
    for name, entry in SELECTORS.items():
        if not entry.needs_fit:
            continue
        selector = entry()
        selector.fit(nobody, statistics)
        trace = selector.select(full.fuse, full.observed, full.candidates, statistics)
        assert bool(trace.output.logits.isfinite().all()), name
    choice = pick(nobody, statistics, names(12))
    assert choice.name == "observed_only" and "no selector was both" in choice.why
    one = full.rows(torch.tensor([3]))
    choice = pick(one, statistics, ["only"])
    assert all(math.isfinite(r["log_loss"]) for r in choice.results.values())


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_few_patients_cannot_pick_a_default(n):
    for seed in range(5):
        world = World(n, 0.9, 100 + seed)
        cases, statistics = world.cases(), world.statistics()
        choice = pick(cases, statistics, names(n))
        assert choice.name == "observed_only" and "too few" in choice.why


def test_features_far_from_the_fit_stay_bounded():
    g = torch.Generator().manual_seed(0)
    values = 1 - 1e-7 * torch.rand(50, 1, generator=g, dtype=torch.float64)
    scale = Standardiser.of(values, torch.ones(50))
    assert float(scale(torch.tensor([[0.6]]).double())) == -5
    assert abs(float(scale(values).mean())) < 1e-6


def test_without_a_candidate_in_the_fit_none_is_admitted():
    world = World(60, 1.0, 12)
    statistics, full = world.statistics(), world.cases()
    nobody = dataclasses.replace(full, candidates=torch.zeros_like(full.candidates))
    for name in ("dymo_margin", "gate", "subset_average"):
        selector = SELECTORS[name]()
        selector.fit(nobody, statistics)
        trace = selector.select(full.fuse, full.observed, full.candidates, statistics)
        assert not bool(trace.admitted.any()), name
        plain = SELECTORS["observed_only"]().select(
            full.fuse, full.observed, full.candidates, statistics
        )
        torch.testing.assert_close(
            torch.softmax(trace.output.logits, -1),
            torch.softmax(plain.output.logits, -1),
            atol=1e-6,
            rtol=0,
        )


def test_more_candidates_than_are_combined():
    world = World(80, 0.7, 13)
    statistics, cases = world.statistics(), world.cases()
    selector = SELECTORS["subset_average"](SELECTORS["subset_average"].Options(most=2))
    selector.fit(cases, statistics)
    trace = selector.select(cases.fuse, cases.observed, cases.candidates, statistics)
    assert torch.bincount(trace.mixture.rows).tolist() == [4] * 80  # 2^2 of 3 candidates
    best = (
        trace.reward[0].nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True)[:, :2]
    )
    for row in range(80):
        held = trace.mixture.admitted[trace.mixture.rows == row].any(0).nonzero().squeeze(1)
        assert set(held.tolist()) == set(best[row].tolist())


def test_state_of_another_version_is_refused():
    world = World(40, 0.7, 14)
    fitted = fit_all(world.cases(), world.statistics(), {})
    for name in ("gate", "subset_average"):
        state = fitted[name].state()
        with pytest.raises(ValueError, match="other features"):
            SELECTORS[name]().load_state({**state, "features": state["features"][1:]})


def test_folds_keep_patients_together():
    world = World(30, 0.7, 8)
    cases, statistics = world.cases(), world.statistics()
    patients = [f"p{i // 3}" for i in range(30)]
    seen = []

    class Spy(Selector):
        name = "spy"
        needs_fit = True

        def fit(self, cases, statistics):
            self.fitted = set(cases.labels_of)

        def select(self, fuse, observed, candidates, statistics):
            seen.append((self.fitted, len(candidates)))
            return SELECTORS["observed_only"]().select(fuse, observed, candidates, statistics)

    class Marked(Cases):
        @property
        def labels_of(self):
            return [patients[int(i)] for i in self.weights]

    marked = Marked(
        cases.fuse,
        cases.observed,
        cases.candidates,
        cases.labels,
        torch.arange(30.0),  # stands for the row, so that the spy can tell who it was given
        1.0,
    )
    held_out_logits(Spy(), marked, statistics, patients)
    assert len(seen) == 5 and sum(size for _, size in seen) == 30
    for fitted, size in seen:
        assert size == 6 and len(fitted) == 8  # whole patients, three cases each


def toy_margin(rewards, right_after, right_before):
    """One step, one candidate: its reward, and whether the answer was right before and after."""
    world = World(len(rewards), 1.0, 9)
    cases = world.cases()
    trace = SELECTORS["dymo"]().select(
        cases.fuse, cases.observed, cases.candidates, world.statistics()
    )
    one = torch.full((1, len(rewards), M), torch.nan, dtype=torch.float64)
    one[0, :, 1] = torch.tensor(rewards, dtype=torch.float64)
    chosen = torch.where(one[0, :, 1] > 0, 1, -1)[None]
    trace = type(trace)(**{**vars(trace), "reward": one, "chosen": chosen})

    def says(right):
        wrong = (cases.labels + 1) % K
        return 2.0 * F.one_hot(torch.where(torch.tensor(right), cases.labels, wrong), K).double()

    after = torch.where(chosen[0, :, None] > 0, says(right_after), says(right_before))
    return best_margin(trace, torch.stack([says(right_before), after]), cases)


def test_the_margin_lets_in_what_rescues_and_keeps_out_what_spoils():
    t, f = True, False
    # Small rewards spoil, large ones rescue.
    assert 0.1 < toy_margin([0.05, 0.1, 0.4, 0.5], [f, f, t, t], [t, t, f, f]) < 0.4
    # Everything rescues.
    assert toy_margin([0.05, 0.1, 0.4, 0.5], [t, t, t, t], [f, f, f, f]) == 0
    # Everything spoils, or nothing is positive.
    assert toy_margin([0.05, 0.1, 0.4, 0.5], [f, f, f, f], [t, t, t, t]) == math.inf
    assert toy_margin([-0.1, -0.2, 0.0, -0.3], [t, t, t, t], [f, f, f, f]) == math.inf


def test_an_infinite_margin_survives_json():
    selector = SELECTORS["dymo_margin"]()
    selector.load_state({"margin": None})
    assert selector.model == math.inf and selector.state() == {"margin": None}


def make_batch(n=200):
    g = torch.Generator().manual_seed(0)
    available = torch.rand(n, 3, generator=g) < 0.7
    available[:, 0] |= ~available.any(1)
    filled = (torch.rand(n, 5, generator=g) < 0.8) & available[:, 2:]
    filled[:, 0] |= available[:, 2] & ~filled.any(1)
    return Batch(
        tuple(map(str, range(n))),
        tuple(map(str, range(n))),
        {
            "a": torch.zeros(n, 1, 2, 2),
            "b": torch.zeros(n, 1, 2, 2),
            "t": torch.zeros(n, 5),
        },
        ModalityMask(("a", "b", "t"), available),
        {"t": filled},
        torch.zeros(n, dtype=torch.int64),
    )


def test_hiding_takes_something_and_never_everything():
    batch = make_batch()
    before = batch.observed.available
    hidden = hide(batch, torch.Generator().manual_seed(1))
    after = hidden.observed.available
    assert not bool((after & ~before).any())
    assert bool(after.any(1).all())
    several = before.sum(1) > 1
    assert bool((after.sum(1) < before.sum(1))[several].all())
    assert torch.equal(after[~several], before[~several])
    # All numbers of hidden modalities occur.
    assert set((before.sum(1) - after.sum(1))[before.sum(1) == 3].tolist()) == {1, 2}
    fields = hidden.observed_fields["t"]
    assert not bool((fields & ~batch.observed_fields["t"]).any())
    assert torch.equal(fields.any(1), after[:, 2])
    assert bool(((fields != batch.observed_fields["t"]).any(1) & after[:, 2]).any())
    assert torch.equal(batch.observed.available, before)
    again = hide(batch, torch.Generator().manual_seed(1))
    assert torch.equal(again.observed.available, after)


def test_remembered_answers_are_the_answers():
    world = World(20, 0.7, 10)
    asked = []

    def fuse(rows, used, admitted):
        asked.append(len(rows))
        return world(rows, used, admitted)

    quick = remember(fuse, M, 20)
    g = torch.Generator().manual_seed(2)
    for _ in range(4):
        rows = torch.randint(20, (50,), generator=g)
        used = torch.rand(50, M, generator=g) < 0.6
        admitted = used & (torch.rand(50, M, generator=g) < 0.5)
        expected = world(rows, used, admitted)
        for _ in range(2):
            got = quick(rows, used, admitted)
            assert torch.equal(got.logits, expected.logits)
            assert torch.equal(got.embedding, expected.embedding)
    assert len(asked) <= 4 and sum(asked) < 200
    assert remember(fuse, 30, 20) is fuse  # too many combinations to keep a table of


def test_selectors_say_how_they_decide():
    for name, kind in SELECTORS.items():
        assert kind.name == name
        assert kind.decides_by in get_args(DecidesBy) and kind.admits in get_args(Admits)
    by_reward = [n for n, kind in SELECTORS.items() if kind().similarity_calibration("cosine")]
    assert set(by_reward) == {
        n for n, k in SELECTORS.items() if issubclass(k.Options, RewardOptions)
    }


def test_a_search_is_no_selector_and_a_selector_no_base():
    with pytest.raises(TypeError, match="abstract"):
        GreedySearch()
    kinds = list(SELECTORS.values())
    assert not [k for k in kinds for other in kinds if k is not other and issubclass(k, other)]
