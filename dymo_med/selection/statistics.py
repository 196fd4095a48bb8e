"""Class prototypes and spreads of the embedding, per subset of modalities."""

from __future__ import annotations

from itertools import product
from typing import Literal

import torch
from torch import Tensor

from dymo_med.types import Fuse, SubsetStatistics, subset_id

# With more modalities than this, only subsets met in training are kept.
_ENUMERATE_UP_TO = 10


def occurring_subsets(available: Tensor) -> Tensor:
    """Return the subsets worth keeping statistics for.

    Args:
        available: Bool `(n, M)`, what each training patient has.

    Returns:
        Bool `(S, M)`, ascending by `subset_id`, without the empty subset. With few modalities
        (M <= 10) every subset of something a training patient has: an observed set can grow by
        recoveries into any of them. With more, what training patients have and each of those
        with up to two modalities left out; others are looked up as unseen.
    """
    patterns = torch.unique(available, dim=0)
    patterns = patterns[patterns.any(1)]
    m = patterns.shape[1]
    if m <= _ENUMERATE_UP_TO:
        everything = torch.tensor(list(product([False, True], repeat=m)), device=patterns.device)
        inside = ~(everything[:, None] & ~patterns[None]).any(-1)  # (2^M, patterns)
        found = everything[inside.any(1)]
    else:
        left_out = [patterns]
        eye = torch.eye(m, dtype=torch.bool, device=patterns.device)
        for _ in range(2):
            left_out.append((left_out[-1][:, None] & ~eye[None]).flatten(0, 1).unique(dim=0))
        found = torch.cat(left_out).unique(dim=0)
    found = found[found.any(1)]
    return found[subset_id(found).argsort()]


def lookup(statistics: SubsetStatistics, used: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row of `statistics` for each subset.

    A subset without a row of its own gets the row of its largest stored sub-subset (the lowest
    id among equals); if it has none, the stored subset that shares most modalities with it.

    Args:
        statistics: What is stored.
        used: Bool `(R, M)`.

    Returns:
        Int64 `(R,)` rows, and bool `(R,)`: True where the subset had no row of its own.
    """
    stored = subset_id(statistics.subsets)
    wanted = subset_id(used)
    rows = torch.searchsorted(stored, wanted).clamp_max(len(stored) - 1)
    missing = stored[rows] != wanted
    if bool(missing.any()):
        asked = used[missing].to(torch.float32)
        kept = statistics.subsets.to(torch.float32)
        shared = asked @ kept.T  # (R', S)
        outside = kept.sum(1)[None] - shared
        # A sub-subset has nothing outside; rank by that, then by size shared.
        score = shared - outside * (used.shape[1] + 1)
        rows = rows.clone()
        rows[missing] = score.argmax(1)  # the first, hence the lowest id, among equals
    return rows, missing


def fit_statistics(
    fuse: Fuse,
    available: Tensor,
    labels: Tensor,
    weights: Tensor,
    classes: int,
    distance: Literal["cosine", "euclidean"],
    *,
    least: int = 2,
) -> SubsetStatistics:
    """Fit prototypes and spreads on training patients' real data.

    Every patient has been encoded once (that is what `fuse` is over); each subset is then fused
    for the patients who have all of it. Recovered values never enter.

    Args:
        fuse: Over n training patients, observed versions.
        available: Bool `(n, M)`.
        labels: Int64 `(n,)`, all known.
        weights: Float `(n,)`, positive: a patient's records share one patient's weight.
        classes: K.
        distance: Distance of the backbone.
        least: A (subset, class) with fewer records borrows: its numbers come from the largest
            sub-subset that has enough records of the class (lowest id among equals); where there
            is none, the class's overall prototype and pooled spread (`borrowed_from` = -1).

    Returns:
        The statistics.

    Raises:
        ValueError: If a class has no patient at all.

    References:
        DyMo, published notebooks `gaussian_COS`, `gaussian_EU`: means are not re-normalised; the
        spread is the root mean square of the distances, mirrored at zero; the overall prototype is
        the unweighted mean over subsets. There, all training patients are complete; here subsets
        that few or no patients have are borrowed, and the overall mean runs over subsets with
        enough records.
    """
    present = torch.zeros(classes, dtype=torch.int64, device=labels.device)
    present.index_add_(0, labels, torch.ones_like(labels))
    if bool((present == 0).any()):
        absent = [k for k in range(classes) if int(present[k]) == 0]
        raise ValueError(f"No training patient has class index {absent}; every class needs some.")
    subsets = occurring_subsets(available)
    means, spreads, counts = [], [], []
    for subset in subsets:
        rows = (available | ~subset).all(1).nonzero().squeeze(1)
        z = fuse(
            rows,
            subset.expand(len(rows), -1),
            torch.zeros(len(rows), len(subset), dtype=torch.bool, device=rows.device),
        ).embedding
        y, w = labels[rows], weights[rows].to(z.dtype)
        hot = torch.zeros(len(rows), classes, dtype=z.dtype, device=z.device)
        hot[torch.arange(len(rows), device=z.device), y] = w
        total = hot.sum(0).clamp_min(torch.finfo(z.dtype).tiny)  # (K,)
        mean = hot.T @ z / total[:, None]  # (K, D)
        if distance == "cosine":
            delta = 1 - (z * mean[y]).sum(-1)
        else:
            delta = (z - mean[y]).square().sum(-1).sqrt()
        means.append(mean)
        spreads.append((hot.T @ delta.square() / total).sqrt())
        counts.append(torch.bincount(y, minlength=classes))
    prototypes, spread, count = torch.stack(means), torch.stack(spreads), torch.stack(counts)
    enough = (count >= least).to(prototypes.dtype)  # (S, K)
    if bool((enough.sum(0) == 0).any()):
        # A class so rare that no subset has `least` of it: what little there is must do.
        enough = torch.where(enough.sum(0) == 0, (count > 0).to(enough.dtype), enough)
    share = enough / enough.sum(0)
    overall = (share[..., None] * prototypes).sum(0)
    pooled = (share * spread.square()).sum(0).sqrt()
    source = _borrow(subsets, enough.bool())
    index = source.clamp_min(0)
    k = torch.arange(classes, device=source.device)
    own = source >= 0
    return SubsetStatistics(
        distance=distance,
        subsets=subsets,
        prototypes=torch.where(own[..., None], prototypes[index, k], overall),
        overall=overall,
        spread=torch.where(own, spread[index, k], pooled),
        counts=count,
        borrowed_from=source,
    )


def _borrow(subsets: Tensor, enough: Tensor) -> Tensor:
    """Return per (subset, class) the subset to take numbers from: itself, a part of it, or -1.

    Args:
        subsets: Bool `(S, M)`.
        enough: Bool `(S, K)`.
    """
    kept = subsets.to(torch.float32)
    size = kept.sum(1)
    part = (kept @ kept.T) == size[None]  # [s, t]: t is part of s
    result = torch.empty(enough.shape, dtype=torch.int64, device=subsets.device)
    for k in range(enough.shape[1]):
        score = torch.where(part & enough[:, k][None], size[None], -1.0)
        best, source = score.max(1)
        # `max` may return any of several equals; the first one is the lowest id.
        source = (score == best[:, None]).to(torch.uint8).argmax(1)
        result[:, k] = torch.where(best >= 0, source, -1)
    return result
