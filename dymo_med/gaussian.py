"""The joint normal distribution of incomplete rows, fitted by expectation maximisation."""

from __future__ import annotations

import torch
from torch import Tensor

# Multiplications that one pass over the rows may cost; more rows are thinned out evenly.
_MOST_WORK = 1e9
_STEPS, _ENOUGH = 50, 1e-4
_CHUNK_NUMBERS = 8_000_000


def fit(rows: Tensor, shrinkage: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of incomplete rows.

    The covariance is shrunk towards its diagonal by d / (d + n) in every step, so that it stays
    positive definite however few rows there are.

    Args:
        rows: Float64 `(n, d)`, NaN where there is nothing; scaled to about unit variance.
        shrinkage: Factor s on that share: s d / (s d + n).

    Returns:
        Mean `(d,)` and covariance `(d, d)`.

    References:
        Dempster, Laird, Rubin: Maximum Likelihood from Incomplete Data via the EM Algorithm, 1977;
        Schafer, Analysis of Incomplete Multivariate Data, 1997, chapter 5.
    """
    some = rows[~rows.isnan().all(1)]
    d = rows.shape[1]
    most = max(2, int(_MOST_WORK / max(d, 1) ** 3))
    if len(some) > most:
        some = some[torch.linspace(0, len(some) - 1, most).long()]
    n = len(some)
    mean, covariance = torch.zeros(d, dtype=rows.dtype), torch.eye(d, dtype=rows.dtype)
    if n < 2 or not d:
        return mean, covariance
    known = ~some.isnan()
    share = shrinkage * d / (shrinkage * d + n)
    patterns, owner = known.unique(dim=0, return_inverse=True)
    counts = torch.bincount(owner, minlength=len(patterns)).to(rows.dtype)
    for _ in range(_STEPS):
        filled, spread = some.clone(), torch.zeros_like(covariance)
        for part in torch.arange(len(patterns)).split(max(1, _CHUNK_NUMBERS // d**2)):
            weights, left = conditional(covariance, patterns[part])
            spread += (left * counts[part, None, None]).sum(0)
            for g, pattern in enumerate(part.tolist()):
                at = (owner == pattern).nonzero().squeeze(1)
                gap = (some[at] - mean).nan_to_num(0.0)
                filled[at] = torch.where(known[at], some[at], mean + gap @ weights[g])
        new = filled.mean(0)
        gap = filled - new
        moved = (gap.T @ gap + spread) / n
        moved = (1 - share) * moved + share * moved.diagonal().diag()
        # What never varies, or was never seen, keeps some variance.
        moved += 1e-6 * torch.eye(d, dtype=rows.dtype)
        change = max(float((moved - covariance).abs().max()), float((new - mean).abs().max()))
        mean, covariance = new, moved
        if change < _ENOUGH:
            break
    return mean, covariance


def conditional(covariance: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return how what is known tells about everything.

    Args:
        covariance: `(d, d)`.
        known: Bool `(G, d)` patterns.

    Returns:
        Weights `(G, d, d)`: the conditional mean of a row is the mean + (row - mean, 0 where it is
        not known) @ weights; and the conditional covariance `(G, d, d)`. What is known is given
        back as it is, without variance.
    """
    seen = known.to(covariance.dtype)
    both = seen[:, :, None] * seen[:, None, :]
    inside = covariance * both + torch.diag_embed(1 - seen)
    across = covariance * seen[:, :, None]
    weights = torch.cholesky_solve(across, torch.linalg.cholesky(inside))
    left = covariance - across.transpose(1, 2) @ weights
    unknown = (1 - seen)[:, :, None] * (1 - seen)[:, None, :]
    return weights, left * unknown


def projected(covariance: Tensor, known: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is known tells about weighted sums, as `conditional` would, at less work.

    Patterns are taken by how much is known: of few known numbers a small system is solved, with as
    many right-hand sides as there are sums.

    Args:
        covariance: `(d, d)`.
        known: Bool `(G, d)` patterns.
        coefficients: `(d, S)` of the sums.

    Returns:
        Weights `(G, d, S)`: the conditional mean of the sums is their mean + (row - mean, 0 where
        it is not known) @ weights; and their conditional covariance `(G, S, S)`.
    """
    groups, d = known.shape
    sums = coefficients.shape[1]
    weights = torch.zeros(groups, d, sums, dtype=covariance.dtype)
    left = torch.zeros(groups, sums, sums, dtype=covariance.dtype)
    counts = known.sum(1)
    for count in counts.unique().tolist():
        same = (counts == count).nonzero().squeeze(1)
        for part in same.split(max(1, _CHUNK_NUMBERS // max(1, d * max(count, sums)))):
            at = known[part].nonzero()[:, 1].view(len(part), count)
            rest = coefficients * ~known[part][:, :, None]  # (g, d, S)
            inside = covariance[at[:, :, None], at[:, None, :]]
            whole = covariance @ rest
            across = whole.gather(1, at[:, :, None].expand(-1, -1, sums))
            told = torch.cholesky_solve(across, torch.linalg.cholesky(inside))
            weights[part] = weights[part].scatter(
                1, at[:, :, None].expand(-1, -1, sums), told + coefficients[at]
            )
            left[part] = rest.transpose(1, 2) @ whole - across.transpose(1, 2) @ told
    return weights, left
