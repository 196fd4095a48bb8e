"""Which recovered modalities to trust, per patient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from dymo_med.config import Strict
from dymo_med.selection.reward import (
    SimilarityCalibration,
    log_quality,
    log_tail,
    reward,
    similarity_factor,
)
from dymo_med.selection.statistics import lookup
from dymo_med.types import Fuse, FusionOutput, ModalityMask, SelectionTrace, SubsetStatistics


class Selector(ABC):
    """Decides from observed and recovered modalities; sees no label and changes no argument.

    Args:
        options: Its part of a recipe.
    """

    Options: ClassVar[type[BaseModel]]
    name: ClassVar[str]

    @abstractmethod
    def __init__(self, options: BaseModel | None = None) -> None: ...

    @abstractmethod
    def select(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, statistics: SubsetStatistics
    ) -> SelectionTrace:
        """Select.

        Args:
            fuse: Over the same B patients.
            observed: What was measured; every patient has something.
            candidates: Bool `(B, M)`: recovered modalities, and observed tables whose blanks were
                filled.
            statistics: Of the backbone behind `fuse`.

        Returns:
            The decision and every number behind it.

        Raises:
            ValueError: If a patient has nothing observed: there is nothing to judge by.
        """


class NoOptions(Strict):
    """A selector without options."""


def _require_something(observed: ModalityMask) -> None:
    if not bool(observed.available.any(1).all()):
        raise ValueError("Every patient needs at least one observed modality to select from.")


def _fixed(
    fuse: Fuse, observed: ModalityMask, candidates: Tensor, admitted: Tensor, name: str
) -> SelectionTrace:
    """Return the trace of a rule that looks at nothing."""
    rows = torch.arange(len(candidates), device=candidates.device)
    used = observed.available | admitted
    no_steps = torch.empty(0, *candidates.shape, device=candidates.device)
    return SelectionTrace(
        names=observed.names,
        method=name,
        observed=observed.available,
        candidates=candidates,
        used=used,
        admitted=admitted,
        chosen=no_steps[..., 0].long() if candidates.shape[1] else no_steps.long(),
        reward=no_steps,
        quality_before=no_steps[..., 0],
        quality_after=no_steps,
        similarity_before=no_steps[..., 0],
        similarity_after=no_steps,
        factor=no_steps,
        borrowed=no_steps.bool(),
        output=fuse(rows, used, admitted),
    )


class ObservedOnly(Selector):
    """Discard every recovery."""

    Options = NoOptions
    name = "observed_only"

    def __init__(self, options: BaseModel | None = None) -> None:
        """Take no options."""

    def select(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, statistics: SubsetStatistics
    ) -> SelectionTrace:
        """See `Selector.select`."""
        _require_something(observed)
        return _fixed(fuse, observed, candidates, torch.zeros_like(candidates), self.name)


class TrustAll(Selector):
    """Admit every recovery."""

    Options = NoOptions
    name = "trust_all"

    def __init__(self, options: BaseModel | None = None) -> None:
        """Take no options."""

    def select(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, statistics: SubsetStatistics
    ) -> SelectionTrace:
        """See `Selector.select`."""
        _require_something(observed)
        return _fixed(fuse, observed, candidates, candidates.clone(), self.name)


class Dymo(Selector):
    """Greedy selection by reward: one admission per step, negative candidates dropped for good.

    Each step evaluates all open (patient, candidate) pairs in one fusion. A candidate with a
    negative reward is never looked at again; the one with the largest positive reward is admitted
    (lowest index on a tie); a patient without a positive reward is done. The state after an
    admission was computed as that candidate's after-state, so nothing is fused twice.

    Args:
        options: See `Options`.

    References:
        DyMo, ICLR 2026; the published `DyMo.forward` (snapshot 64e0f78). The predicted class
        behind the similarity is the classifier's, separately before and after.
    """

    name = "dymo"

    class Options(Strict):
        """Settings of the rule.

        Attributes:
            temperature: Softmax temperature of the quality.
            calibration: Similarity calibration. None = the published choice for the distance:
                `log_ratio` for cosine, `ratio` for Euclidean.
        """

        temperature: Annotated[float, Field(gt=0)] = 0.1
        calibration: SimilarityCalibration | None = None

    def __init__(self, options: BaseModel | None = None) -> None:
        o = Dymo.Options() if options is None else Dymo.Options.model_validate(options.model_dump())
        self.options = o

    def select(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, statistics: SubsetStatistics
    ) -> SelectionTrace:
        """See `Selector.select`."""
        _require_something(observed)
        b, m = candidates.shape
        device = candidates.device
        everyone = torch.arange(b, device=device)
        used = observed.available.clone()
        admitted = torch.zeros_like(used)
        open_ = candidates.clone()
        output = fuse(everyone, used, admitted)
        state_q, state_p, _ = self._judge(output, used, statistics)
        logits, embedding = output.logits.clone(), output.embedding.clone()
        steps: list[dict[str, Tensor]] = []
        while bool(open_.any()):
            rows, column = open_.nonzero(as_tuple=True)
            try_used, try_admitted = used[rows], admitted[rows]
            pair = torch.arange(len(rows), device=device)
            try_used[pair, column] = True
            try_admitted[pair, column] = True
            after = fuse(rows, try_used, try_admitted)
            after_q, after_p, borrowed = self._judge(after, try_used, statistics)
            alpha = similarity_factor(state_p[rows], after_p, self._calibration(statistics))
            gain = reward(state_q[rows], after_q, alpha)

            step_reward = _scatter(gain, rows, column, b, m)
            best, chosen = step_reward.nan_to_num(nan=-torch.inf).max(1)
            chosen = torch.where(
                best > 0, (step_reward == best[:, None]).to(torch.uint8).argmax(1), -1
            )
            steps.append(
                {
                    "chosen": chosen,
                    "reward": step_reward,
                    "quality_before": state_q.exp(),
                    "quality_after": _scatter(after_q.exp(), rows, column, b, m),
                    "similarity_before": state_p,
                    "similarity_after": _scatter(after_p, rows, column, b, m),
                    "factor": _scatter(alpha, rows, column, b, m),
                    "borrowed": _scatter(borrowed.to(gain.dtype), rows, column, b, m) == 1,
                }
            )
            won = chosen[rows] == column  # (R,): the pair that was admitted
            winners, where = rows[won], column[won]
            used[winners, where] = True
            admitted[winners, where] = True
            state_q = state_q.index_copy(0, winners, after_q[won])
            state_p = state_p.index_copy(0, winners, after_p[won])
            logits = logits.index_copy(0, winners, after.logits[won])
            embedding = embedding.index_copy(0, winners, after.embedding[won])
            open_ = open_ & (step_reward >= 0) & ~admitted & (chosen >= 0)[:, None]

        def stack(key: str, empty: Tensor) -> Tensor:
            return torch.stack([s[key] for s in steps]) if steps else empty

        grid, row = state_q.new_empty(0, b, m), state_q.new_empty(0, b)
        return SelectionTrace(
            names=observed.names,
            method=self.name,
            observed=observed.available,
            candidates=candidates,
            used=used,
            admitted=admitted,
            chosen=stack("chosen", row.long()),
            reward=stack("reward", grid),
            quality_before=stack("quality_before", row),
            quality_after=stack("quality_after", grid),
            similarity_before=stack("similarity_before", row),
            similarity_after=stack("similarity_after", grid),
            factor=stack("factor", grid),
            borrowed=stack("borrowed", grid.bool()),
            output=FusionOutput(logits, embedding),
        )

    def _calibration(self, statistics: SubsetStatistics) -> SimilarityCalibration:
        if self.options.calibration is not None:
            return self.options.calibration
        return "log_ratio" if statistics.distance == "cosine" else "ratio"

    def _judge(
        self, output: FusionOutput, used: Tensor, statistics: SubsetStatistics
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log quality, log tail probability, and whether statistics were borrowed."""
        row, unseen = lookup(statistics, used)
        predicted = output.logits.argmax(-1)
        # In double precision: `1 - z . c` cancels, and a small spread would magnify the rounding.
        embedding = output.embedding.double()
        quality = log_quality(
            embedding, statistics.overall.double(), statistics.distance, self.options.temperature
        )
        tail = log_tail(
            embedding,
            statistics.prototypes[row, predicted].double(),
            statistics.spread[row, predicted].double(),
            statistics.distance,
        )
        return quality, tail, unseen | (statistics.borrowed_from[row, predicted] != row)


def _scatter(values: Tensor, rows: Tensor, columns: Tensor, b: int, m: int) -> Tensor:
    """Return `(B, M)` with `values` at their places and NaN elsewhere."""
    grid = values.new_full((b, m), torch.nan)
    grid[rows, columns] = values
    return grid
