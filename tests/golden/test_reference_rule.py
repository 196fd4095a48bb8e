"""Replay recorded decisions of the published DyMo code through the public selector."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dymo_med.selection import SELECTORS
from dymo_med.types import FusionOutput, ModalityMask, SubsetStatistics, subset_id

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("DYMO_MED_SHARED", ROOT.parent / "shared"))

NAMES = tuple("abcde")

pytestmark = pytest.mark.shared


def load(distance):
    path = SHARED / "golden" / f"golden_{distance}.npz"
    if not path.exists():
        pytest.skip(f"reference numbers are not here ({path.name}); set DYMO_MED_SHARED")
    with np.load(path, allow_pickle=False) as data:
        return {k: torch.from_numpy(np.asarray(data[k])) for k in data.files}


class Recorded:
    """A backbone that returns the features that were recorded for every subset."""

    def __init__(self, z, logits, subsets):
        self.z, self.logits = z, logits
        self.index = {int(i): s for s, i in enumerate(subset_id(subsets))}

    def __call__(self, rows, used, admitted):
        s = torch.tensor([self.index[int(i)] for i in subset_id(used)], dtype=torch.long)
        return FusionOutput(self.logits[rows, s], self.z[rows, s])


def recording(distance):
    """The recorded arrays, and the statistics and backbone made of them, in double precision."""
    g = load(distance)
    visible = ~g["subset_missing"]  # the recording says True = missing
    order = subset_id(visible).argsort()
    s, k = g["dist_std"].shape
    statistics = SubsetStatistics(
        distance=distance,
        subsets=visible[order],
        prototypes=g["prototypes"][order].double(),
        overall=g["overall_prototypes"].double(),
        spread=g["dist_std"][order].double(),
        counts=torch.full((s, k), 100),
        borrowed_from=torch.arange(s)[:, None].expand(s, k),
    )
    return g, statistics, Recorded(g["z"].double(), g["logits"], visible)


def replay(distance):
    g, statistics, fuse = recording(distance)
    missing = g["mask_init"].bool()
    observed = ModalityMask(NAMES, ~missing)
    return g, SELECTORS["dymo"]().select(fuse, observed, missing, statistics)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_every_action_and_final_subset_is_identical(distance):
    g, trace = replay(distance)
    steps = int(g["steps_run"])
    actions = torch.where(g["action_history"] == 100, -1, g["action_history"]).long()
    got = torch.full_like(actions, -1)
    got[: len(trace.chosen)] = trace.chosen
    assert steps >= len(trace.chosen) - 1
    assert torch.equal(got[:steps], actions[:steps])
    assert torch.equal(~trace.used, g["mask_final"].bool())
    assert torch.allclose(trace.output.logits, g["logits_final"], atol=1e-5)


@pytest.mark.parametrize(("distance", "rewards"), [("cosine", 235), ("euclidean", 222)])
def test_every_reward_on_the_recorded_paths_agrees(distance, rewards):
    g, trace = replay(distance)
    evaluated = ~trace.reward.isnan()
    theirs = g["R_history"][: len(trace.reward)].double()
    assert int(evaluated.sum()) == rewards
    assert torch.equal(evaluated, theirs != 0)
    assert float((trace.reward - theirs)[evaluated].abs().max()) < 1e-5


def every_reward(distance):
    """Rewards of every candidate on top of every subset, not only those on the recorded paths.

    Returns:
        Each `(B, S, M)`, NaN where the modality is in the subset already. `ours`: the selector's;
        `theirs`: the published formula on the recorded float32 qualities and tail probabilities;
        `explained`: the same with our qualities; `tail`: the smaller of the two recorded tail
        probabilities behind the reward.
    """
    g, statistics, fuse = recording(distance)
    visible = ~g["subset_missing"]
    b, (s, m) = len(g["z"]), visible.shape
    owner = torch.arange(b).repeat_interleave(s)
    observed = visible.repeat(b, 1)
    trace = SELECTORS["dymo"]().select(
        lambda rows, used, admitted: fuse(owner[rows], used, admitted),
        ModalityMask(NAMES, observed),
        ~observed,
        statistics,
    )
    with_one_more = visible[:, None] | torch.eye(m, dtype=torch.bool)  # (S, M, M)
    larger = torch.tensor([fuse.index[int(i)] for i in subset_id(with_one_more).flatten()])
    larger = larger.view(s, m)
    p, q = g["tail_prob"].double(), g["quality"].double()
    before, after = p[..., None].expand(b, s, m), p[:, larger]  # (B, S, M)
    factor = (
        before.log() / (after + 1e-9).log() if distance == "cosine" else after / (before + 1e-9)
    )
    factor = torch.where(after >= before, 1.0, factor)
    ours_before = trace.quality_before[0].view(b, s, 1)
    ours_after = trace.quality_after[0].view(b, s, m)
    rewards = {
        "ours": trace.reward[0].view(b, s, m),
        "theirs": factor * q[:, larger] - q[..., None],
        "explained": factor * ours_after - ours_before,
        "tail": torch.minimum(before, after),
    }
    return {k: v.masked_fill(visible, torch.nan) for k, v in rewards.items()}


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_the_published_formula_as_written_here_gives_the_recorded_rewards(distance):
    """So what is compared below is the published code, not a reading of it."""
    g, trace = replay(distance)
    theirs = every_reward(distance)["theirs"]
    index = {int(i): s for s, i in enumerate(subset_id(~g["subset_missing"]))}
    used = trace.observed.clone()
    for t, chosen in enumerate(trace.chosen):
        s = torch.tensor([index[int(i)] for i in subset_id(used)])
        evaluated = ~trace.reward[t].isnan()
        again = theirs[torch.arange(len(used)), s][evaluated]
        assert float((again - g["R_history"][t][evaluated]).abs().max()) < 1e-5
        going = chosen >= 0
        used[going, chosen[going]] = True


# (patient, subset) whose published tail probability is at most 1e-6.
UNDERFLOWS = {"cosine": set(), "euclidean": {(17, "ab"), (39, "a"), (57, "ab")}}
# How many of the 64 x 75 rewards rest on one of these, before or after the candidate.
RESTING = {"cosine": 0, "euclidean": 14}
# The largest difference, ours minus published, where neither probability is that small.
LARGEST_ELSEWHERE = {"cosine": 1.6e-6, "euclidean": 5.83e-5}
# Every difference above 1e-5 by (patient, subset, candidate), and whether it rests on one of these.
DIFFERENCES = {
    "cosine": {},
    "euclidean": {
        (17, "b", "a"): (3.238e-4, True),
        (6, "b", "a"): (-5.83e-5, False),  # a published tail of 12 times 2^-23
        (53, "ce", "d"): (-1.10e-5, False),
    },
}


def subset_name(visible):
    return "".join(n for n, v in zip(NAMES, visible.tolist(), strict=True) if v)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_where_the_published_tail_underflows(distance):
    """Its `2 (1 - cdf)` in float32 knows only multiples of 2^-23."""
    g = load(distance)
    p, visible = g["tail_prob"].double(), ~g["subset_missing"]
    low = {(b, subset_name(visible[s])) for b, s in (p <= 1e-6).nonzero().tolist()}
    assert low == UNDERFLOWS[distance]
    assert torch.equal((p * 2**23).round(), p * 2**23)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_which_rewards_differ_from_the_published_ones_and_by_how_much(distance):
    visible = ~load(distance)["subset_missing"]
    r = every_reward(distance)
    difference, resting = r["ours"] - r["theirs"], r["tail"] <= 1e-6
    assert int((~difference.isnan()).sum()) == 64 * 75
    assert int(resting.sum()) == RESTING[distance]
    elsewhere = difference[~resting].abs().nan_to_num(0.0)
    assert float(elsewhere.max()) == pytest.approx(LARGEST_ELSEWHERE[distance], abs=1e-7)
    found = {
        (b, subset_name(visible[s]), NAMES[m]): (difference[b, s, m].item(), bool(resting[b, s, m]))
        for b, s, m in (difference.abs() > 1e-5).nonzero().tolist()
    }
    assert found.keys() == DIFFERENCES[distance].keys()
    for key, (amount, rests) in DIFFERENCES[distance].items():
        assert found[key] == (pytest.approx(amount, abs=1e-7), rests)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_the_tail_alone_explains_every_difference(distance):
    """With the recorded tail probabilities in place of the exact ones, all rewards agree."""
    r = every_reward(distance)
    difference = (r["explained"] - r["theirs"]).abs()
    assert float(difference.nan_to_num(0.0).max()) < 1e-5
