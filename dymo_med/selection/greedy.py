"""The published rule and its variants: one admission per step, by reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dymo_med.config import Strict
from dymo_med.selection.base import Admits, Cases, DecidesBy, Fitted, Selector, require_something
from dymo_med.selection.reward import (
    Distance,
    SimilarityCalibration,
    log_quality,
    log_tail,
    reward,
    similarity_factor,
)
from dymo_med.selection.statistics import lookup
from dymo_med.types import (
    Fuse,
    FusionOutput,
    Mixture,
    ModalityMask,
    SelectionTrace,
    SubsetStatistics,
)


class RewardOptions(Strict):
    """Settings of the reward.

    Attributes:
        temperature: Softmax temperature of the quality.
        calibration: Similarity calibration. None = `published_calibration` of the distance.
    """

    temperature: Annotated[float, Field(gt=0)] = 0.1
    calibration: SimilarityCalibration | None = None


def published_calibration(distance: Distance) -> SimilarityCalibration:
    """Return the published similarity calibration for a distance.

    That of most published runs with the cosine distance is the log-ratio; on two medical data sets
    it is the ratio (`DymoRatio`). With the Euclidean distance it is always the ratio.
    """
    return "log_ratio" if distance == "cosine" else "ratio"


class RatioOptions(RewardOptions):
    """The same, with the plain ratio whatever the distance unless another form is asked for."""

    calibration: SimilarityCalibration | None = "ratio"


class UncalibratedOptions(RewardOptions):
    """The same, without similarity calibration unless it is asked for."""

    calibration: SimilarityCalibration | None = "none"


@dataclass(frozen=True)
class Assessed:
    """What the statistics say of a fused subset, in double precision.

    Attributes:
        quality: ln q, `(R,)`.
        similarity: ln p, `(R,)`.
        borrowed: Bool `(R,)`: statistics were borrowed from another subset.
    """

    quality: Tensor
    similarity: Tensor
    borrowed: Tensor


def assess(
    output: FusionOutput, used: Tensor, statistics: SubsetStatistics, temperature: float
) -> Assessed:
    """Return quality and similarity of fused subsets.

    Args:
        output: Of R subsets.
        used: Bool `(R, M)`.
        statistics: Of the backbone.
        temperature: Of the quality.
    """
    row, unseen = lookup(statistics, used)
    predicted = output.logits.argmax(-1)
    # In double precision: `1 - z . c` cancels, and a small spread would magnify the rounding.
    embedding = output.embedding.double()
    return Assessed(
        log_quality(embedding, statistics.overall.double(), statistics.distance, temperature),
        log_tail(
            embedding,
            statistics.prototypes[row, predicted].double(),
            statistics.spread[row, predicted].double(),
            statistics.distance,
        ),
        unseen | (statistics.borrowed_from[row, predicted] != row),
    )


@dataclass(frozen=True)
class Candidates:
    """What is known of the R open (patient, candidate) pairs of a step.

    Attributes:
        rows: Int64 `(R,)` patient of each pair.
        column: Int64 `(R,)` its candidate.
        used: Bool `(R, M)`: with the candidate.
        before: Without it.
        after: With it.
        logits_before: `(R, K)`.
        logits_after: `(R, K)`.
        factor: `(R,)`.
        reward: `(R,)`.
    """

    rows: Tensor
    column: Tensor
    used: Tensor
    before: Assessed
    after: Assessed
    logits_before: Tensor
    logits_after: Tensor
    factor: Tensor
    reward: Tensor


def attempt(
    fuse: Fuse,
    rows: Tensor,
    column: Tensor,
    admitted: Tensor,
    observed: Tensor,
    state: Assessed,
    logits: Tensor,
    statistics: SubsetStatistics,
    options: RewardOptions,
) -> tuple[Candidates, FusionOutput]:
    """Fuse every pair's candidate on top of what its patient has so far.

    Args:
        fuse: Over B patients.
        rows: Int64 `(R,)`.
        column: Int64 `(R,)`.
        admitted: Bool `(B, M)`: candidates admitted so far.
        observed: Bool `(B, M)`.
        state: Of what is used so far, for B patients.
        logits: `(B, K)` likewise.
        statistics: Of the backbone.
        options: `RewardOptions`.

    Returns:
        The pairs judged, and their fusion.
    """
    pair = torch.arange(len(rows), device=rows.device)
    tried = admitted[rows]
    tried[pair, column] = True
    used = observed[rows] | tried
    after = fuse(rows, used, tried)
    assessed = assess(after, used, statistics, options.temperature)
    before = Assessed(state.quality[rows], state.similarity[rows], state.borrowed[rows])
    calibration: SimilarityCalibration | None = options.calibration
    if calibration is None:
        calibration = published_calibration(statistics.distance)
    factor = similarity_factor(before.similarity, assessed.similarity, calibration)
    gain = reward(before.quality, assessed.quality, factor)
    return Candidates(
        rows, column, used, before, assessed, logits[rows], after.logits, factor, gain
    ), after


class GreedySearch(Selector):
    """Greedy selection: one admission per step, candidates that cannot help dropped for good.

    Each step evaluates all open (patient, candidate) pairs in one fusion. A candidate with a
    negative reward is never looked at again; the one with the largest positive reward is admitted
    (lowest index on a tie); a patient without a positive reward is done. The state after an
    admission was computed as that candidate's after-state, so nothing is fused twice. A rule may
    let another number stand in for the reward (`trust`).

    Args:
        options: See `RewardOptions`.
    """

    Options = RewardOptions
    decides_by: ClassVar[DecidesBy] = "reward"
    admits: ClassVar[Admits] = "one"

    def similarity_calibration(self, distance: Distance) -> SimilarityCalibration:
        """See `Selector.similarity_calibration`."""
        asked: SimilarityCalibration | None = self.options.calibration
        return asked or published_calibration(distance)

    def walk(
        self,
        fuse: Fuse,
        observed: ModalityMask,
        candidates: Tensor,
        statistics: SubsetStatistics,
        *,
        threshold: float = 0.0,
        most_steps: int | None = None,
    ) -> tuple[SelectionTrace, Tensor]:
        """Return the trace, and the logits `(T + 1, B, K)` before the first and after each step.

        Args:
            fuse: See `Selector.select`; likewise the next three.
            observed: What was measured.
            candidates: Bool `(B, M)`.
            statistics: Of the backbone.
            threshold: What the reward (or the trust that stands in for it) must exceed.
            most_steps: Stop after so many steps; None = when nobody gains.
        """
        require_something(observed)
        b, device = len(candidates), candidates.device
        used = observed.available.clone()
        admitted = torch.zeros_like(used)
        open_ = candidates.clone()
        output = fuse(torch.arange(b, device=device), used, admitted)
        state = assess(output, used, statistics, self.options.temperature)
        logits, embedding = output.logits.clone(), output.embedding.clone()
        aid = self.prepare(fuse, observed, candidates, logits)
        path = [logits.clone()]
        steps: list[dict[str, Tensor]] = []
        while bool(open_.any()) and len(steps) != most_steps:
            rows, column = open_.nonzero(as_tuple=True)
            step, after = attempt(
                fuse,
                rows,
                column,
                admitted,
                observed.available,
                state,
                logits,
                statistics,
                self.options,
            )
            trust = self.trust(step, aid)
            grid = scatter(step.reward if trust is None else trust, step, b)
            best = grid.nan_to_num(nan=-torch.inf).amax(1)
            first = (grid == best[:, None]).to(torch.uint8).argmax(1)
            chosen = torch.where(best > threshold, first, -1)
            steps.append(record(step, state, chosen, trust))
            won = chosen[rows] == column  # (R,): the pair that was admitted
            winners, where = rows[won], column[won]
            used[winners, where] = True
            admitted[winners, where] = True
            state = Assessed(
                state.quality.index_copy(0, winners, step.after.quality[won]),
                state.similarity.index_copy(0, winners, step.after.similarity[won]),
                state.borrowed.index_copy(0, winners, step.after.borrowed[won]),
            )
            logits = logits.index_copy(0, winners, after.logits[won])
            embedding = embedding.index_copy(0, winners, after.embedding[won])
            path.append(logits)
            open_ = open_ & (grid >= 0) & ~admitted & (chosen >= 0)[:, None]
        trace = make_trace(
            self.name,
            observed,
            candidates,
            admitted,
            steps,
            threshold,
            FusionOutput(logits, embedding),
        )
        return trace, torch.stack(path)

    def prepare(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, logits: Tensor
    ) -> Any:
        """Return whatever `trust` needs besides the step; nothing for rules by reward.

        Args:
            fuse: Over B patients.
            observed: What was measured.
            candidates: Bool `(B, M)`.
            logits: `(B, K)` from what was observed.
        """
        return None

    def trust(self, step: Candidates, aid: Any) -> Tensor | None:
        """Return what decides instead of the reward, `(R,)` in 0..1; None = the reward decides.

        Args:
            step: The open pairs.
            aid: What `prepare` returned.
        """
        return None


@final
class Dymo(GreedySearch):
    """The published rule: greedy selection by reward.

    Args:
        options: See `RewardOptions`.

    References:
        DyMo, ICLR 2026; the published `DyMo.forward` (snapshot 64e0f78). The predicted class
        behind the similarity is the classifier's, separately before and after.
    """

    name = "dymo"

    def select(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, statistics: SubsetStatistics
    ) -> SelectionTrace:
        """See `Selector.select`."""
        return self.walk(fuse, observed, candidates, statistics)[0]


@final
class DymoRatio(GreedySearch):
    """The published rule with the plain ratio p' / p as its similarity calibration.

    The published code has it for every Euclidean run and, with the cosine distance, for its two
    medical data sets (`models/TIPData/Dynamic/DyMo.py`); its other runs with the cosine distance
    have the log-ratio. With the Euclidean distance this selector is `Dymo`.
    """

    name = "dymo_ratio"
    Options = RatioOptions

    def select(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, statistics: SubsetStatistics
    ) -> SelectionTrace:
        """See `Selector.select`."""
        return self.walk(fuse, observed, candidates, statistics)[0]


@final
class DymoUncalibrated(GreedySearch):
    """The published rule without its similarity calibration: reward = q' - q."""

    name = "dymo_uncalibrated"
    Options = UncalibratedOptions

    def select(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, statistics: SubsetStatistics
    ) -> SelectionTrace:
        """See `Selector.select`."""
        return self.walk(fuse, observed, candidates, statistics)[0]


@final
class Simultaneous(GreedySearch):
    """Admit every candidate whose reward on top of the observed modalities is positive, at once.

    The ablation of the published rule; without similarity calibration unless it is asked for.
    """

    name = "simultaneous"
    admits = "all"
    Options = UncalibratedOptions

    def select(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, statistics: SubsetStatistics
    ) -> SelectionTrace:
        """See `Selector.select`."""
        trace, _ = self.walk(fuse, observed, candidates, statistics, most_steps=1)
        if not len(trace.chosen):
            return trace
        admitted = trace.reward[0].nan_to_num(0.0) > 0
        rows = torch.arange(len(candidates), device=candidates.device)
        used = observed.available | admitted
        return replace(trace, used=used, admitted=admitted, output=fuse(rows, used, admitted))


@final
class DymoMargin(Fitted[float], GreedySearch):
    """The published rule with an admission margin: a reward must exceed it, not only 0.

    The margin is the one with which selection, on held-back patients, puts most answers of the
    observed modalities right, less those it spoils (on a tie the one with the smaller log-loss).
    "Admit nothing" is always among them, so it never spoils more than it puts right there.

    A larger margin makes the selection stop earlier on the same path, so one run tells what every
    margin would do.
    """

    name = "dymo_margin"

    def select(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, statistics: SubsetStatistics
    ) -> SelectionTrace:
        """See `Selector.select`."""
        return self.walk(fuse, observed, candidates, statistics, threshold=self.model)[0]

    def fit(self, cases: Cases, statistics: SubsetStatistics) -> None:
        """See `Selector.fit`."""
        trace, path = self.walk(cases.fuse, cases.observed, cases.candidates, statistics)
        self._model = best_margin(trace, path, cases)

    def state(self) -> dict[str, Any]:
        """See `Selector.state`."""
        # JSON has no infinity.
        return {"margin": None if self.model == math.inf else self.model}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Selector.load_state`."""
        self._model = math.inf if state["margin"] is None else float(state["margin"])


def best_margin(trace: SelectionTrace, path: Tensor, cases: Cases) -> float:
    """Return the admission margin for held-back cases, infinite where admitting never pays.

    Args:
        trace: Of the rule without a margin.
        path: Its logits `(T + 1, B, K)`.
        cases: The cases.

    Returns:
        0, a reward halfway between two that occur, or infinity.
    """
    losses = torch.stack(
        [
            F.cross_entropy(z.double() / cases.temperature, cases.labels, reduction="none")
            for z in path
        ]
    )  # (T + 1, B)
    right = (path.argmax(-1) == cases.labels).double()
    taken = torch.where(
        trace.chosen >= 0,
        trace.reward.gather(2, trace.chosen.clamp_min(0)[..., None]).squeeze(2),
        -torch.inf,
    )  # (T, B): the reward of each admission
    met = taken[taken > 0].unique()
    if not len(met):
        return math.inf
    if len(met) > 200:  # quantiles are enough
        met = met[torch.linspace(0, len(met) - 1, 200).long()]
    margins = [0.0, *((met[1:] + met[:-1]) / 2).tolist(), math.inf]
    weights = cases.weights.double()
    columns = torch.arange(len(cases), device=taken.device)
    best, best_key = math.inf, (0.0, -float((weights * losses[0]).sum()))
    # From the largest: on a tie the more careful one stays.
    for margin in reversed(margins[:-1]):
        steps = (taken > margin).long().cumprod(0).sum(0)  # (B,): admissions before the first stop
        net = float((weights * (right[steps, columns] - right[0])).sum())
        key = (round(net, 9), -float((weights * losses[steps, columns]).sum()))
        if key > best_key:
            best, best_key = margin, key
    return best


def scatter(values: Tensor, step: Candidates, b: int) -> Tensor:
    """Return `(B, M)` with the pairs' `values` `(R,)` at their places and NaN elsewhere."""
    grid = values.new_full((b, step.used.shape[1]), torch.nan)
    grid[step.rows, step.column] = values
    return grid


def record(
    step: Candidates, state: Assessed, chosen: Tensor, trust: Tensor | None
) -> dict[str, Tensor]:
    """Return one step's part of a trace, by field.

    Args:
        step: The open pairs.
        state: Of what all B patients used before it.
        chosen: Int64 `(B,)`.
        trust: `(R,)`; None where the reward decides.
    """
    b = len(chosen)
    gain = step.reward
    return {
        "chosen": chosen,
        "reward": scatter(gain, step, b),
        "quality_before": state.quality.exp(),
        "quality_after": scatter(step.after.quality.exp(), step, b),
        "similarity_before": state.similarity,
        "similarity_after": scatter(step.after.similarity, step, b),
        "factor": scatter(step.factor, step, b),
        "borrowed": scatter((step.before.borrowed | step.after.borrowed).double(), step, b) == 1,
        "trust": scatter(torch.full_like(gain, torch.nan) if trust is None else trust, step, b),
    }


def make_trace(
    method: str,
    observed: ModalityMask,
    candidates: Tensor,
    admitted: Tensor,
    steps: Sequence[Mapping[str, Tensor]],
    threshold: float,
    output: FusionOutput,
    mixture: Mixture | None = None,
) -> SelectionTrace:
    """Return the trace of a selection from the records of its steps, of which there may be none."""
    b, m = candidates.shape
    grid = torch.empty(0, b, m, dtype=torch.float64, device=candidates.device)
    row = grid[..., 0] if m else grid.new_empty(0, b)
    empty = {
        "chosen": row.long(),
        "quality_before": row,
        "similarity_before": row,
        "borrowed": grid.bool(),
        **dict.fromkeys(("reward", "quality_after", "similarity_after", "factor", "trust"), grid),
    }
    columns = {k: torch.stack([s[k] for s in steps]) if steps else v for k, v in empty.items()}
    return SelectionTrace(
        names=observed.names,
        method=method,
        observed=observed.available,
        candidates=candidates,
        used=observed.available | admitted,
        admitted=admitted,
        threshold=threshold,
        output=output,
        mixture=mixture,
        **columns,
    )
