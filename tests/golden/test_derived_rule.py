"""The rule on small inputs made from seeds, against numbers worked out in 40 digits (`derive.py`).

Nothing here needs data from elsewhere: these run in every clone.
"""

import json
import math
from collections import Counter

import pytest
import torch

from dymo_med.config import BackboneTraining
from dymo_med.selection import SELECTORS, fit_statistics
from dymo_med.selection.greedy import RewardOptions, assess, published_calibration
from dymo_med.selection.reward import log_quality, log_tail, similarity_factor
from dymo_med.types import FusionOutput, ModalityMask, SubsetStatistics, subset_id
from tests.golden import derive

GOLDEN = json.loads(derive.FILE.read_text(encoding="utf-8"))
NAMES = tuple("abcd")
RULES = ("dymo", "dymo_ratio", "dymo_uncalibrated", "simultaneous")
WORLDS = ("cosine", "euclidean", "gaps", "ties")


@pytest.fixture(scope="module")
def worlds():
    """By name: backbone, statistics, observed, candidates, and what they were made of."""
    return {name: built(derive.world(name)) for name in WORLDS}


def bits(numbers, m=4):
    return (torch.tensor(numbers)[:, None] >> torch.arange(m)) & 1 == 1


def built(w):
    """The inputs of one world as the selectors take them, in double precision."""
    patients, stored = len(w["observed"]), list(w["stored"])
    z, logits = (
        torch.tensor(
            [[w[key][b, s] for s in range(1, 16)] for b in range(patients)], dtype=torch.float64
        )
        for key in ("embedding", "logits")
    )

    def fuse(rows, used, admitted):
        s = subset_id(used) - 1
        return FusionOutput(logits[rows, s], z[rows, s])

    shape = (len(stored), logits.shape[2])
    statistics = SubsetStatistics(
        distance=w["distance"],
        subsets=bits(stored),
        prototypes=torch.tensor([w["prototypes"][s] for s in stored], dtype=torch.float64),
        overall=torch.tensor(w["overall"], dtype=torch.float64),
        spread=torch.tensor([w["spread"][s] for s in stored], dtype=torch.float64),
        counts=torch.full(shape, 9),
        borrowed_from=torch.arange(len(stored))[:, None].expand(shape),
    )
    return fuse, statistics, bits(w["observed"]), bits(w["candidates"]), w


def chosen_by(world, name, options=None):
    fuse, statistics, observed, candidates, _ = world
    selector = SELECTORS[name](SELECTORS[name].Options(**(options or {})))
    return selector.select(fuse, ModalityMask(NAMES, observed), candidates, statistics)


def test_the_stored_numbers_are_what_the_formulas_give():
    """They are not taken from the code under test, and belong to the inputs made here."""
    again = json.loads(json.dumps(derive.derive()))
    assert again.keys() == GOLDEN.keys()
    assert again == GOLDEN


@pytest.mark.parametrize("name", WORLDS)
def test_quality_and_tail_of_every_patient_and_subset(worlds, name):
    fuse, statistics, observed, _, _ = worlds[name]
    rows = torch.arange(len(observed)).repeat_interleave(15)
    used = bits(range(1, 16)).repeat(len(observed), 1)
    found = assess(fuse(rows, used, used), used, statistics, 0.1)
    for ours, key in ((found.quality.exp(), "quality"), (found.similarity, "log_tail")):
        expected = torch.tensor(GOLDEN[name][key], dtype=torch.float64).flatten()
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", WORLDS)
def test_every_reward_admission_and_final_subset(worlds, name, rule):
    golden, trace = GOLDEN[name][rule], chosen_by(worlds[name], rule)
    assert subset_id(trace.used).tolist() == golden["used"]
    for b, rewards in enumerate(golden["rewards"]):
        steps = [
            {str(u): v for u, v in enumerate(row[b].tolist()) if not math.isnan(v)}
            for row in trace.reward
        ]
        steps = [step for step in steps if step]
        assert [sorted(step) for step in steps] == [sorted(step) for step in rewards]
        for ours, expected in zip(steps, rewards, strict=True):
            assert ours == pytest.approx(expected, rel=1e-8, abs=1e-11)
            # A reward of exactly 0 is one here too: it must neither be admitted nor rejected.
            assert {u for u in ours if ours[u] == 0} == {u for u in expected if expected[u] == 0}
        if rule != "simultaneous":
            path = [int(c) for c in trace.chosen[:, b] if c >= 0]
            assert path == golden["chosen"][b]


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize(
    ("options", "golden"),
    [
        ({"calibration": "ratio"}, "dymo_ratio"),
        ({"calibration": "none"}, "dymo_uncalibrated"),
        ({"calibration": None}, "dymo"),
    ],
)
def test_a_calibration_by_its_name_is_that_selector(worlds, name, options, golden):
    trace = chosen_by(worlds[name], "dymo", options)
    assert subset_id(trace.used).tolist() == GOLDEN[name][golden]["used"]


def test_what_the_vectors_cover():
    """Stops after 0, 1 and 2 admissions, rejections, calibrations that matter, ties, zeros."""
    for name in WORLDS:
        steps = Counter(len(path) for path in GOLDEN[name]["dymo"]["chosen"])
        assert set(steps) >= {0, 1, 2}, name
        rewards = GOLDEN[name]["dymo"]["rewards"]
        assert any(r < 0 for p in rewards for step in p for r in step.values()), name
        assert GOLDEN[name]["dymo"]["chosen"] != GOLDEN[name]["dymo_uncalibrated"]["chosen"], name
    for name in ("cosine", "ties"):
        assert GOLDEN[name]["dymo"]["chosen"] != GOLDEN[name]["dymo_ratio"]["chosen"], name
    assert GOLDEN["euclidean"]["dymo"] == GOLDEN["euclidean"]["dymo_ratio"]


def test_of_equal_rewards_the_first_modality_is_admitted_and_a_silent_one_never():
    ties = GOLDEN["ties"]["dymo"]
    first = [path[0] for path in ties["chosen"] if path]
    assert len(first) >= 4
    twins = [p[0] for p in ties["rewards"] if {"1", "2"} <= p[0].keys()]
    assert len(twins) == 16 and all(step["1"] == step["2"] for step in twins)
    assert all(u == 1 for u in first)
    silent = [step["3"] for p in ties["rewards"] for step in p if "3" in step]
    # It is asked again in every step, and its reward is exactly 0 each time.
    assert len(silent) > sum("3" in p[0] for p in ties["rewards"]) > 0
    assert set(silent) == {0.0} and all(3 not in path for path in ties["chosen"])


def test_where_a_subset_has_no_statistics_its_largest_part_stands_in(worlds):
    """Lowest number among equals; the decision says that it rests on borrowed numbers."""
    _, statistics, _, _, w = worlds["gaps"]
    stored = set(w["stored"])
    assert stored == set(subset_id(statistics.subsets).tolist()) != set(range(1, 16))
    trace = chosen_by(worlds["gaps"], "dymo")
    used = trace.observed.clone()
    for t, chosen in enumerate(trace.chosen):
        for b, u in (~trace.reward[t].isnan()).nonzero().tolist():
            larger = used[b].clone()
            larger[u] = True
            own = {int(subset_id(s[None])) for s in (used[b], larger)} <= stored
            assert bool(trace.borrowed[t, b, u]) == (not own)
        used[chosen >= 0, chosen[chosen >= 0]] = True


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_prototypes_spreads_and_what_is_borrowed(distance):
    """Of incomplete records with weights; one of class 1 alone has all three modalities."""
    training, golden = derive.training(), GOLDEN["statistics"][distance]
    z = torch.tensor(
        [[training["embedding"][i, s] for s in range(1, 8)] for i in range(14)],
        dtype=torch.float64,
    )

    def fuse(rows, used, admitted):
        found = z[rows, subset_id(used) - 1]
        return FusionOutput(found.new_zeros(len(rows), 2), found)

    found = fit_statistics(
        *(fuse, bits(training["available"], 3), torch.tensor(training["labels"])),
        *(torch.tensor(training["weights"], dtype=torch.float64), 2, distance),
    )
    assert subset_id(found.subsets).tolist() == list(range(1, 8))
    assert found.counts.tolist() == golden["counts"]
    assert (found.borrowed_from + 1).tolist() == golden["borrowed_from"]
    assert golden["borrowed_from"][6] == [7, 3]  # of class 1, a and b stand in for a, b and c
    for key in ("prototypes", "overall", "spread"):
        expected = torch.tensor(golden[key], dtype=torch.float64)
        torch.testing.assert_close(getattr(found, key), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("ratio", "expected"), GOLDEN["tails"])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_the_tail_far_from_its_prototype(distance, ratio, expected):
    """Up to 100 spreads, where the probability itself is 1e-2174."""
    z = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    spread = torch.tensor([0.5 / max(ratio, 1)], dtype=torch.float64)
    delta = ratio * float(spread)
    if distance == "cosine":
        c = torch.tensor([[1 - delta, 0.3]], dtype=torch.float64)
    else:
        c = torch.tensor([[1.0 - delta, 0.0]], dtype=torch.float64)
    assert float(log_tail(z, c, spread, distance)) == pytest.approx(expected, rel=1e-9)


def test_the_exact_tail_where_the_published_arithmetic_is_zero():
    """In float32, 2 (1 - cdf) is a multiple of 2^-23: one of them at 5.4 spreads, then none."""
    tails = dict(map(tuple, GOLDEN["tails"]))
    assert math.exp(tails[5.4]) == pytest.approx(6.7e-8, rel=0.01)
    assert math.exp(tails[6.0]) == pytest.approx(2.0e-9, rel=0.02)
    cdf = torch.special.ndtr(torch.tensor([5.4, 6.0], dtype=torch.float64)).float()
    assert (2 * (1 - cdf)).tolist() == [2**-23, 0.0]


@pytest.mark.parametrize(
    ("before", "after", "log_ratio", "ratio"),
    [
        (0.5, 0.5, 1.0, 1.0),
        (0.25, 0.5, 1.0, 1.0),  # nothing is lost
        (0.5, 0.25, 0.5, 0.5),
        (0.9, 0.45, 0.13194677541, 0.5),
        (1e-4, 5e-5, 0.93000979, 0.5),
        (1.0, 0.5, 0.0, 0.5),  # from the prototype any step away
        (1e-300, 1e-301, 300 / 301, 0.1),
    ],
)
def test_the_factor_by_hand(before, after, log_ratio, ratio):
    p, q = (torch.tensor(math.log(v), dtype=torch.float64) for v in (before, after))
    for calibration, expected in (("log_ratio", log_ratio), ("ratio", ratio), ("none", 1.0)):
        assert float(similarity_factor(p, q, calibration)) == pytest.approx(expected, rel=1e-8)


def test_the_quality_by_hand():
    """Of three classes: e^(s / 0.1) / sum, with a dot product or minus a squared distance."""
    z = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    c = torch.tensor([[0.6, 0.6], [0.3, 0.9], [-1.0, 0.0]], dtype=torch.float64)
    scores = {
        "cosine": [0.36 + 0.48, 0.18 + 0.72, -0.6],
        "euclidean": [-0.04, -0.09 - 0.01, -2.56 - 0.64],
    }
    for distance, s in scores.items():
        expected = max(s) / 0.1 - math.log(sum(math.exp(v / 0.1) for v in s))
        assert float(log_quality(z, c, distance, 0.1)) == pytest.approx(expected, rel=1e-12)


def test_published_settings():
    """What the published code has (snapshot 64e0f78), as constants."""
    training = BackboneTraining()
    assert RewardOptions().temperature == 0.1
    assert published_calibration("cosine") == "log_ratio"
    assert published_calibration("euclidean") == "ratio"
    assert SELECTORS["dymo"]().options.calibration is None
    assert SELECTORS["dymo_ratio"]().options.calibration == "ratio"
    assert SELECTORS["dymo_uncalibrated"]().options.calibration == "none"
    assert training.subsets == 5
    assert (training.prototype_weight, training.prototype_epoch) == (1.0, 3)
    assert training.prototype_temperature == 0.1
    assert (training.patience, training.min_improvement) == (20, 1e-4)
