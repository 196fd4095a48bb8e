"""Class prototypes and spreads of the embedding, per subset of modalities."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dymo_med.types import Fuse, SubsetStatistics, subset_id

# With up to this many modalities, statistics are kept for every part of what a training record
# has, and fitted on every record.
_ENUMERATE_UP_TO = 10
# With more: this many modalities may be left out of what a record has, as far as the subsets stay
# within a bound, and so many other subsets are kept besides.
_LEFT_OUT = 4
_MOST_SUBSETS = 16_384
_OTHERS = 1_024
# A subset's numbers then rest on this many records of each class (least and most), where there
# are as many. With 16, ln p is off by about as much as in a subset of one or two modalities fewer.
_PER_CLASS = (16, 64)
# Requests fused at once, and subset pairs compared at once: bounds memory, changes no result.
_ROWS = 1_024
_PAIRS = 4_000_000


def occurring_subsets(available: Tensor, most: int = _MOST_SUBSETS) -> Tensor:
    """Return the subsets worth keeping statistics for.

    With few modalities (M <= 10): every part of something a training record has; an observed set
    can grow by recoveries into any of them. With more there are too many, so, in this order:

    1. each modality and each pair that some record has, so that every subset has a stored part;
    2. what records have, then that with one modality left out, and so on up to four, each level
       as a whole and only if it fits;
    3. up to 1024 other parts of records, drawn with a fixed seed evenly over the sizes in
       between, so that the largest stored part of any subset is not much smaller than it.

    For 16 modalities and complete records that is about 3,700 subsets, for 24 about 14,300.

    Args:
        available: Bool `(n, M)`, what each training record has; M at most 62.
        most: Bound on the subsets kept, for M > 10.

    Returns:
        Bool `(S, M)`, ascending by `subset_id`. The empty subset is among them only if some
        modality is in no record at all: it then stands for subsets of such modalities.
    """
    m = available.shape[1]
    device = available.device
    bits = subset_id(torch.eye(m, dtype=torch.bool, device=device))  # (M,)
    records = subset_id(available)
    records = records[records > 0]
    patterns = records.unique()
    if m <= _ENUMERATE_UP_TO:
        everything = torch.arange(1, 2**m, device=device)
        found = everything[((everything[:, None] & ~patterns) == 0).any(1)]
    else:
        has = available.to(torch.float32)
        first, second = (has.T @ has).triu().nonzero(as_tuple=True)
        found = (bits[first] | bits[second]).unique()
        level, levels = patterns, 0
        while levels <= _LEFT_OUT:
            larger = torch.cat([found, level]).unique()
            if len(larger) > most:
                break
            found, levels = larger, levels + 1
            level = (level[:, None] & ~bits).flatten().unique()
            level = level[level > 0]
        others = _random_parts(records, bits, min(_OTHERS, most - len(found)), levels)
        found = torch.cat([found, others]).unique()
    if not bool(available.any(0).all()):
        found = torch.cat([found.new_zeros(1), found])
    return (found[:, None] & bits) != 0


def _random_parts(records: Tensor, bits: Tensor, count: int, levels: int) -> Tensor:
    """Return ids of random parts of records, of sizes 3 up to where whole levels begin.

    Args:
        records: Int64 `(n,)` subset ids.
        bits: Int64 `(M,)` ids of the single modalities.
        count: How many to draw; repeats are possible.
        levels: How many of the largest sizes are kept as a whole.

    Returns:
        Int64 `(count,)`.
    """
    count = max(count, 0)
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(count, len(bits), generator=generator).to(bits.device)
    share = torch.rand(count, 1, generator=generator).to(bits.device)
    owner = records[torch.arange(count, device=bits.device) * len(records) // max(count, 1)]
    has = (owner[:, None] & bits) != 0  # (count, M)
    sizes = (has.sum(1, keepdim=True) - levels - 2).clamp_min(1)  # how many sizes from 3 on
    size = 3 + (share * sizes).long()
    # A random order in which modalities that the record lacks come last.
    rank = (order + (~has).to(order.dtype)).argsort(1).argsort(1)
    return subset_id((rank < size) & has)


def lookup(statistics: SubsetStatistics, used: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row of `statistics` for each subset.

    A subset without a row of its own gets the row of its largest stored part (the lowest id
    among equals). `fit_statistics` stores every modality that a training record has on its own,
    and otherwise the empty subset with the pooled numbers, so there is always one; in other
    statistics there may be none, and the row with fewest modalities outside the subset is taken.

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
        ids, which = wanted[missing].unique(return_inverse=True)
        bits = subset_id(torch.eye(used.shape[1], dtype=torch.bool, device=used.device))
        asked = ((ids[:, None] & bits) != 0).to(torch.float32)  # (R', M)
        kept = statistics.subsets.to(torch.float32)
        found = []
        for part in asked.split(max(1, _PAIRS // len(kept))):
            shared = part @ kept.T  # (R', S)
            outside = kept.sum(1)[None] - shared
            # A part has nothing outside; rank by that, then by size shared.
            score = shared - outside * (used.shape[1] + 1)
            found.append(score.argmax(1))  # the first, hence the lowest id, among equals
        rows = rows.clone()
        rows[missing] = torch.cat(found)[which]
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
    fusions: int = 2**20,
) -> SubsetStatistics:
    """Fit prototypes and spreads on training patients' real data.

    Every patient has been encoded once (that is what `fuse` is over); each subset is then fused
    for the patients who have all of it. Recovered values never enter.

    With more than ten modalities the work is bounded: each subset rests on 64 records of each
    class, taken evenly from those who have it; on fewer where all subsets together would need
    more than `fusions`; and on no fewer than 16, for which fewer subsets are kept if need be.

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
        fusions: About how many pairs of record and subset to fuse at most, for M > 10.

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
    n, m = available.shape
    member_of = F.one_hot(labels, classes).bool()  # (n, K)
    present = member_of.any(0)
    if not bool(present.all()):
        absent = (~present).nonzero().squeeze(1).tolist()
        raise ValueError(f"No training patient has class index {absent}; every class needs some.")
    most = n  # records per class
    if m <= _ENUMERATE_UP_TO:
        subsets = occurring_subsets(available)
    else:
        fewest, enough_records = _PER_CLASS
        bound = fusions // min(n, fewest * classes)
        subsets = occurring_subsets(available, min(bound, _MOST_SUBSETS))
        most = min(max(fusions // (len(subsets) * classes), fewest), enough_records)
    means, spreads, counts = [], [], []
    # Several subsets go through one fusion, so that small cohorts do not pay for many calls.
    for part in subsets.split(max(1, _ROWS // min(n, most * classes))):
        has = (available | ~part[:, None]).all(-1) & part.any(1, keepdim=True)  # (P, n)
        mine = has[..., None] & member_of  # (P, n, K)
        counts.append(mine.sum(1))
        which, rows = _evenly(mine, most).any(-1).nonzero(as_tuple=True)  # (R,)
        nothing = torch.zeros(len(rows), m, dtype=torch.bool, device=rows.device)
        z = fuse(rows, part[which], nothing).embedding
        group = which * classes + labels[rows]
        hot = torch.zeros(len(rows), len(part) * classes, dtype=z.dtype, device=z.device)
        hot[torch.arange(len(rows), device=z.device), group] = weights[rows].to(z.dtype)
        total = hot.sum(0).clamp_min(torch.finfo(z.dtype).tiny)  # (P K,)
        mean = hot.T @ z / total[:, None]  # (P K, D)
        if distance == "cosine":
            delta = 1 - (z * mean[group]).sum(-1)
        else:
            delta = (z - mean[group]).square().sum(-1).sqrt()
        means.append(mean.view(len(part), classes, -1))
        spreads.append((hot.T @ delta.square() / total).sqrt().view(len(part), classes))
    prototypes, spread, count = torch.cat(means), torch.cat(spreads), torch.cat(counts)
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


def _evenly(mine: Tensor, most: int) -> Tensor:
    """Return up to `most` records per subset and class, evenly spaced among those there are.

    Args:
        mine: Bool `(P, n, K)`: the records of each class that have all of each subset.
        most: How many to keep.

    Returns:
        Bool `(P, n, K)`.
    """
    count = mine.sum(1, keepdim=True).clamp_min(1)  # (P, 1, K)
    rank = mine.cumsum(1) - 1
    # Of `count` ranks exactly `most` have a remainder below it; all do where count <= most.
    return mine & (rank * most % count < most)


def _borrow(subsets: Tensor, enough: Tensor) -> Tensor:
    """Return per (subset, class) the subset to take numbers from: itself, a part of it, or -1.

    Args:
        subsets: Bool `(S, M)`.
        enough: Bool `(S, K)`.
    """
    kept = subsets.to(torch.float32)
    size = kept.sum(1)
    own = torch.arange(len(subsets), device=subsets.device)[:, None]
    result = torch.where(enough, own, -1)
    short = (~enough).any(1).nonzero().squeeze(1)
    for rows in short.split(max(1, _PAIRS // len(subsets))):
        part = (kept[rows] @ kept.T) == size  # (rows, S): whether t is part of s
        for k in range(enough.shape[1]):
            score = torch.where(part & enough[:, k], size, -1.0)
            best, _ = score.max(1)
            # `max` may return any of several equals; the first one is the lowest id.
            source = (score == best[:, None]).to(torch.uint8).argmax(1)
            result[rows, k] = torch.where(best >= 0, source, -1)
    return result
