"""What fitted selectors know of a candidate, besides the reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dymo_med.selection.greedy import Candidates
from dymo_med.types import Fuse, ModalityMask

# Names of the columns of `features`.
FEATURES = (
    "reward",
    "quality_before",
    "quality_after",
    "distance_before",
    "distance_after",
    "confidence_before",
    "confidence_after",
    "same_answer",
    "confidence_alone",
    "agreement",
    "agreement_others",
    "observed_share",
    "completed",
)
_MOST_LOG_ODDS = 8.0


@dataclass(frozen=True)
class Alone:
    """What each candidate says by itself.

    Attributes:
        there: Bool `(B, M)`: the candidates.
        probability: Float64 `(B, M, K)`: the answer from the candidate alone; uniform where
            there is no candidate.
        agreement: Float64 `(B, M)`: mean probability that another candidate, alone, says the
            same; 1/K where there is no other.
        observed_share: Float64 `(B,)`: share of the modalities that were measured.
        completed: Float64 `(B, M)`: 1 where the candidate is a table with filled-in blanks.
        temperature: Of the probabilities.
    """

    there: Tensor
    probability: Tensor
    agreement: Tensor
    observed_share: Tensor
    completed: Tensor
    temperature: float


def ask_alone(
    fuse: Fuse, observed: ModalityMask, candidates: Tensor, classes: int, temperature: float
) -> Alone:
    """Fuse every candidate by itself.

    Args:
        fuse: Over B patients.
        observed: What was measured.
        candidates: Bool `(B, M)`.
        classes: K.
        temperature: Of the probabilities.
    """
    b, m = candidates.shape
    rows, column = candidates.nonzero(as_tuple=True)
    probability = torch.full(
        (b, m, classes), 1 / classes, dtype=torch.float64, device=candidates.device
    )
    if len(rows):
        only = F.one_hot(column, m).bool()
        logits = fuse(rows, only, only).logits
        probability[rows, column] = torch.softmax(logits.double() / temperature, -1)
    said = candidates.double()[..., None] * probability
    together = (probability * (said.sum(1, keepdim=True) - said)).sum(-1)
    count = candidates.sum(1, keepdim=True) - candidates.long()
    agreement = torch.where(count > 0, together / count.clamp_min(1), 1 / classes)
    return Alone(
        candidates,
        probability,
        agreement,
        observed.available.double().mean(1),
        (candidates & observed.available).double(),
        temperature,
    )


def features(step: Candidates, alone: Alone) -> Tensor:
    """Return what is known of each open pair.

    Args:
        step: R pairs of (patient, candidate).
        alone: Of the same patients.

    Returns:
        Float64 `(R, len(FEATURES) + M)`: the columns of `FEATURES`, then which modality the
        candidate is. Tail probabilities enter as the distance, in spreads, that they stand for.
    """
    before = torch.softmax(step.logits_before.double() / alone.temperature, -1)
    after = torch.softmax(step.logits_after.double() / alone.temperature, -1)
    own = alone.probability[step.rows, step.column]
    columns = [
        step.reward.double(),
        step.before.quality.exp(),
        step.after.quality.exp(),
        spreads(step.before.similarity),
        spreads(step.after.similarity),
        log_odds(before),
        log_odds(after),
        (before.argmax(-1) == after.argmax(-1)).double(),
        log_odds(own),
        (before * own).sum(-1),
        alone.agreement[step.rows, step.column],
        alone.observed_share[step.rows],
        alone.completed[step.rows, step.column],
    ]
    modality = F.one_hot(step.column, step.used.shape[1]).double()
    return torch.cat([torch.stack(columns, -1), modality], -1)


def log_odds(probability: Tensor) -> Tensor:
    """Return ln(p / (1 - p)) of the most probable class, at most 8.

    Args:
        probability: `(..., K)`.
    """
    top = probability.amax(-1)
    return (top.log() - (1 - top).clamp_min(1e-12).log()).clamp_max(_MOST_LOG_ODDS)


def spreads(log_tail: Tensor) -> Tensor:
    """Return about how many spreads a half-normal tail probability stands for, at most 8.

    Args:
        log_tail: ln p, any shape.
    """
    return (-2 * log_tail).clamp_min(0).sqrt().clamp_max(_MOST_LOG_ODDS)


@dataclass(frozen=True)
class Standardiser:
    """Shift and scale that give features mean 0 and deviation 1 on held-back cases.

    What lies further out than five deviations counts as five: a feature that hardly varied there
    (a saturated quality) must not decide alone when it does vary.

    Attributes:
        mean: Float64 `(P,)`.
        std: Float64 `(P,)`, 1 where a feature never varies.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, values: Tensor, weights: Tensor) -> Standardiser:
        """Fit to `(R, P)` features with `(R,)` weights; without any, nothing is scaled."""
        if not len(values):
            return cls(values.new_zeros(values.shape[1]), values.new_ones(values.shape[1]))
        share = (weights.double() / weights.double().sum())[:, None]
        mean = (share * values).sum(0)
        std = (share * (values - mean).square()).sum(0).sqrt()
        return cls(mean, torch.where(std < 1e-9, torch.ones_like(std), std))

    def __call__(self, values: Tensor) -> Tensor:
        """Return the features scaled."""
        scaled = (values - self.mean.to(values.device)) / self.std.to(values.device)
        return scaled.clamp(-5, 5)
