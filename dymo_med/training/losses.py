"""Losses of the fusion backbone, and how subsets are drawn."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# Up to this many modalities all subsets are numbered; beyond it they are drawn by coin flips.
_NUMBER_UP_TO = 16


def distinct_subsets(modalities: int, count: int, generator: torch.Generator) -> Tensor:
    """Return distinct non-empty subsets, uniformly and without replacement.

    Args:
        modalities: M.
        count: How many (fewer if there are fewer).
        generator: CPU generator.

    Returns:
        Bool `(count, M)`.
    """
    if modalities <= _NUMBER_UP_TO:
        total = 2**modalities - 1
        ids = torch.randperm(total, generator=generator)[:count] + 1
        return (ids[:, None] >> torch.arange(modalities)) & 1 == 1
    found = torch.zeros(0, modalities, dtype=torch.bool)
    while len(found) < count:
        coin = torch.rand(1, modalities, generator=generator) < 0.5
        seen = (found == coin).all(1).any()
        if bool(coin.any()) and not bool(seen):
            found = torch.cat([found, coin])
    return found


def within(available: Tensor, subsets: Tensor) -> Tensor:
    """Return each subset cut down to what each patient has.

    Args:
        available: Bool `(B, M)`.
        subsets: Bool `(S, M)`.

    Returns:
        Bool `(S, B, M)`. Where nothing is left, all that the patient has.
    """
    cut = subsets[:, None] & available[None]
    return torch.where(cut.any(-1, keepdim=True), cut, available[None].expand_as(cut))


def soft_dice_loss(probability: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Return the soft Dice loss of a batch, a scalar.

    The mean over regions of 1 - (2 sum(p g) + 1) / (sum(p) + sum(g) + 1), the sums running over
    all voxels of the whole batch.

    Args:
        probability: `(B, R, *spatial)`.
        target: Bool, the same shape.
        weights: `(B,)`: how much a record counts in the sums; 1 for each in the published code.

    References:
        GMD, AAAI 2024 (published code: `utils/loss.py`, `DiceCoef`).
    """
    g = target.to(probability.dtype)
    both, p, t = (weights @ x.flatten(2).sum(-1) for x in (probability * g, probability, g))  # (R,)
    return (1 - (2 * both + 1) / (p + t + 1)).mean()


def prototype_loss(
    embedding: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    known: Tensor,
    distance: Literal["cosine", "euclidean"],
    temperature: float,
) -> Tensor:
    """Return the prototype loss per row: cross entropy of a softmax over prototypes.

    Args:
        embedding: `(R, D)`, unit length for the cosine distance.
        labels: Int64 `(R,)`.
        prototypes: `(K, D)` of the last epoch; no gradient flows into them.
        known: Bool `(K,)`: classes that have a prototype.
        distance: Dot product with the prototype (not re-normalised), or minus the squared
            Euclidean distance.
        temperature: Softmax temperature.

    Returns:
        `(R,)`.

    References:
        DyMo, ICLR 2026, auxiliary loss (published code: `models/utils/prototype_loss.py`).
    """
    if distance == "cosine":
        scores = embedding @ prototypes.T
    else:
        scores = -(embedding[:, None] - prototypes[None]).square().sum(-1)
    scores = (scores / temperature).masked_fill(~known, -torch.inf)
    return F.cross_entropy(scores, labels, reduction="none")
