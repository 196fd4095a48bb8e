"""The reward of a candidate, in log space.

Let z be the embedding of the current subset and z' that of the subset with the candidate added.

- Quality q(z) = max_k softmax_k(sim(z, c_k) / tau), c_k the overall prototypes; sim is the dot
  product (cosine) or minus the squared distance (Euclidean).
- Similarity p(z): probability that a training patient of the predicted class lies at least as far
  from that class's prototype in this subset, under a half-normal with the stored spread:
  p = 2 (1 - Phi(delta / sigma)); delta = 1 - z . c (cosine) or |z - c| (Euclidean).
- Factor alpha = 1 where p' >= p, else ln p / ln p' (`log_ratio`), p' / p (`ratio`) or 1 (`none`).
- Reward = alpha q(z') - q(z).

References:
    DyMo, ICLR 2026; the published code (snapshot 64e0f78, `calculate_reward`) evaluates
    p in float32 as 2 (1 - cdf), which is 0 beyond 5.4 spreads, and adds 1e-9 where it divides.
    Here ln p comes from `log_ndtr`, so it never underflows and needs no floor: a penalty fades
    neither far from all prototypes nor turns into a bonus. alpha is held in [0, 1].
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Distance = Literal["cosine", "euclidean"]
SimilarityCalibration = Literal["log_ratio", "ratio", "none"]


def log_quality(
    embedding: Tensor, overall: Tensor, distance: Distance, temperature: float
) -> Tensor:
    """Return ln q(z): the log of the largest prototype softmax.

    Args:
        embedding: `(R, D)`.
        overall: `(K, D)` overall prototypes.
        distance: Which similarity.
        temperature: Softmax temperature tau.

    Returns:
        `(R,)`, at most 0. A saturated quality keeps its distance from 1 in this form.

    Example:
        >>> z = torch.tensor([[1.0, 0.0]]); c = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> round(log_quality(z, c, "cosine", 1.0).exp().item(), 4)
        0.7311
    """
    return F.log_softmax(prototype_scores(embedding, overall, distance) / temperature, -1).amax(-1)


def prototype_scores(embedding: Tensor, prototypes: Tensor, distance: Distance) -> Tensor:
    """Return the similarity of embeddings to prototypes, larger = closer.

    Args:
        embedding: `(R, D)`.
        prototypes: `(K, D)`.
        distance: Dot product, or minus the squared Euclidean distance.

    Returns:
        `(R, K)`.
    """
    if distance == "cosine":
        return embedding @ prototypes.T
    # Differences, not the expanded square: exact zeros, no cancellation.
    squared: Tensor = (embedding[:, None, :] - prototypes[None]).square().sum(-1)
    return -squared


def log_tail(embedding: Tensor, prototype: Tensor, spread: Tensor, distance: Distance) -> Tensor:
    """Return ln p(z): the log half-normal tail probability of the distance to a prototype.

    Args:
        embedding: `(R, D)`.
        prototype: `(R, D)`: prototype of each row's predicted class in its subset.
        spread: `(R,)`: its root mean square distance.
        distance: `1 - z . c` or `|z - c|` (not squared).

    Returns:
        `(R,)`, at most 0. A distance below 0 (possible only for prototypes longer than 1) counts
        as 0. A spread of 0 is replaced by the smallest normal number: p is then 1 on the
        prototype and vanishes elsewhere.
    """
    if distance == "cosine":
        delta = 1 - (embedding * prototype).sum(-1)
    else:
        delta = (embedding - prototype).square().sum(-1).sqrt()
    tiny = torch.finfo(spread.dtype).tiny
    ratio = (delta.clamp_min(0) / spread.clamp_min(tiny)).clamp_max(1e6)
    tail: Tensor = torch.special.log_ndtr(-ratio)
    return (tail + math.log(2)).clamp_max(0)


def similarity_factor(before: Tensor, after: Tensor, calibration: SimilarityCalibration) -> Tensor:
    """Return alpha in [0, 1] from the log tail probabilities before and after.

    Args:
        before: ln p, any shape.
        after: ln p', same shape.
        calibration: Which form. The published code has `ratio` for the Euclidean distance and, on
            two medical data sets, for the cosine one; `log_ratio` for the cosine one elsewhere.

    Returns:
        1 where p' >= p.

    Example:
        >>> before, after = torch.tensor(0.5).log(), torch.tensor(0.25).log()
        >>> round(similarity_factor(before, after, "ratio").item(), 3)
        0.5
        >>> round(similarity_factor(before, after, "log_ratio").item(), 3)
        0.5
    """
    if calibration == "none":
        return torch.ones_like(after)
    if calibration == "ratio":
        alpha = (after - before).exp()
    else:
        # after < before <= 0 wherever this is used, so the denominator is not 0 there.
        alpha = before / after.clamp_max(-torch.finfo(after.dtype).tiny)
    return torch.where(after >= before, torch.ones_like(alpha), alpha.clamp(0, 1))


def reward(log_before: Tensor, log_after: Tensor, factor: Tensor) -> Tensor:
    """Return alpha q' - q from log qualities.

    Args:
        log_before: ln q, any shape.
        log_after: ln q', same shape.
        factor: alpha.

    Returns:
        Positive helps. Where alpha is 1 the difference is taken as q (e^(ln q' - ln q) - 1), so
        that two saturated qualities are still told apart.
    """
    plain = log_before.exp() * torch.expm1(log_after - log_before)
    return torch.where(factor == 1, plain, factor * log_after.exp() - log_before.exp())
