"""Is this patient like those a bundle was made with?

A network answers whoever it is given. Here each measured modality is held against training
patients: by a scan's descriptors, the cells of a table, the mean of a sequence. How far it lies
from them is a Mahalanobis distance under a shrunken covariance, over what is known of it; and how
far is too far is read off patients who were held back: the share of them who lie as far is a
conformal p-value, so one of the bundle's own patients is alarmed about no more often than declared.

The selection rule's own similarity is no such check: it asks which modalities agree, and strangers'
modalities agree among each other as well as anybody's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor

from dymo_med import gaussian
from dymo_med.types import ModalitySpec

Novel = Literal["familiar", "unusual", "strange", "unknown"]
"""What is made of a patient: p above the alarm, below it, below the bound of abstention; and
`unknown` where too few patients were held back to say so."""

ALARM = 0.05
STRANGE = 0.01
_FOLDS = 5
# Training patients who have a modality; of fewer no covariance is worth anything.
_FEWEST = 20
# A cell that no training patient had has no frequency; it counts as one patient in so many.
_NEVER = 0.5


@dataclass(frozen=True)
class Usual:
    """What one modality of training patients is like.

    Attributes:
        mean: Of each number `(p,)`.
        deviation: Standard deviation of each `(p,)`, above 0.
        covariance: Of the standardised numbers `(p, p)`, positive definite.
        rarities: Of each categorical cell, by its position among the features: minus twice the log
            of each category's share, relative to the most frequent one.
        centre: Mean of the distances of training patients, each measured by the others.
        spread: Their standard deviation, above 0.
    """

    mean: Tensor
    deviation: Tensor
    covariance: Tensor
    rarities: Mapping[int, Tensor]
    centre: float
    spread: float


@dataclass(frozen=True)
class Novelty:
    """What is usual, and how unusual patients are who were held back.

    Attributes:
        usual: By name of modality; without those that too few training patients had.
        names: M modalities in canonical order.
        held_back: Float64 `(n, M)`: scores of one record of each held-back patient, NaN where a
            modality was not measured.
        together: Bool `(M, M)`: whether a training patient had both of two modalities.
        alarm: Share of its own patients who may be called unusual.
        strange: P-value at or below which there is no answer; never finer than the held-back
            patients can tell.
    """

    usual: Mapping[str, Usual]
    names: tuple[str, ...]
    held_back: Tensor
    together: Tensor
    alarm: float = ALARM
    strange: float = STRANGE


@dataclass(frozen=True)
class Unusual:
    """How unusual one patient is.

    Attributes:
        state: What is made of it.
        p: Share of held-back patients who are at least as unusual, this one counted; 1.0 where
            nothing can be said.
        patients: Held-back patients that stand behind `p`: those who have all that was compared.
        least: How many it takes for an alarm.
        modalities: Likewise of each modality that was measured and can be compared.
        apart: Pairs of modalities here that no training patient had both of.
    """

    state: Novel
    p: float
    patients: int
    least: int
    modalities: Mapping[str, float]
    apart: tuple[tuple[str, str], ...]


def fit(
    train: Tensor,
    held_back: Tensor,
    owner: Sequence[int],
    categories: Sequence[int],
    names: Sequence[str],
    seed: int,
    alarm: float = ALARM,
    strange: float = STRANGE,
) -> Novelty:
    """Learn what is usual.

    Args:
        train: Float64 `(n, P)`: features of one record of each training patient, NaN where there is
            nothing (`references.features_of`).
        held_back: Likewise `(h, P)`: of patients who took no part in fitting anything here.
        owner: Of each feature, the position of its modality (`references.Layout`).
        categories: Of each, how many categories a cell has; 0 = a number.
        names: M modalities in canonical order.
        seed: Of the folds.
        alarm: See `Novelty`.
        strange: See `Novelty`.
    """
    usual = {}
    at = torch.tensor(owner, dtype=torch.int64)
    for m, name in enumerate(names):
        rows = train[:, at == m]
        rows = rows[~rows.isnan().all(1)]
        if len(rows) >= _FEWEST and rows.shape[1]:
            sizes = [n for n, o in zip(categories, owner, strict=True) if o == m]
            usual[name] = _fit(rows, sizes, seed)
    has = torch.stack(
        [(~train[:, at == m].isnan()).any(1) for m in range(len(names))], dim=1
    ).double()
    found = Novelty(usual, tuple(names), torch.empty(0, 0), has.T @ has > 0, alarm, strange)
    scores = score(found, held_back, owner)
    return Novelty(usual, tuple(names), scores, found.together, alarm, strange)


def score(novelty: Novelty, features: Tensor, owner: Sequence[int]) -> Tensor:
    """Return how far each modality of each record lies from what is usual.

    Args:
        novelty: Fitted; what it knows of held-back patients is not looked at.
        features: Float64 `(B, P)`, NaN where there is nothing.
        owner: Of each feature, the position of its modality.

    Returns:
        Float64 `(B, M)` in standard deviations of training patients, NaN where there is nothing to
        compare.
    """
    at = torch.tensor(owner, dtype=torch.int64)
    found = features.new_full((len(features), len(novelty.names)), torch.nan)
    for m, name in enumerate(novelty.names):
        if name in novelty.usual:
            usual = novelty.usual[name]
            found[:, m] = (_distance(usual, features[:, at == m]) - usual.centre) / usual.spread
    return found


def assess(novelty: Novelty, features: Tensor, owner: Sequence[int]) -> list[Unusual]:
    """Return how unusual records are.

    Held-back patients who have all that was measured are compared with, by these modalities: by the
    most unusual one (one scan far out), and by the product of the ranks of all (a scanner that
    changes each a little). The smaller of both ranks counts, ties go by the first, and is ranked
    again. Everything is ranked among held-back patients and this one together, so whoever is
    exchangeable with them has P(p <= a) <= a.

    Args:
        novelty: Fitted.
        features: Float64 `(B, P)`, NaN where there is nothing.
        owner: Of each feature, the position of its modality.

    References:
        Laxhammar and Falkman, Conformal prediction for distribution-independent anomaly detection,
        2010; Bates et al., Testing for outliers with conformal p-values, 2023.
    """
    at = torch.tensor(owner, dtype=torch.int64)
    scores = score(novelty, features, owner)
    found = []
    for row, values in zip(scores, features, strict=True):
        here = [m for m in range(len(novelty.names)) if bool((~values[at == m].isnan()).any())]
        p, patients = p_value(novelty.held_back, row, _comparable(novelty, row))
        least = ceil(round(1 / novelty.alarm, 9)) - 1
        state: Novel = "familiar"
        if patients < least:
            state, p = "unknown", 1.0
        elif p <= max(novelty.strange, 1 / (patients + 1)):
            state = "strange"
        elif p <= novelty.alarm:
            state = "unusual"
        each = {}
        for m in (~row.isnan()).nonzero().flatten().tolist():
            own, number = p_value(novelty.held_back, row, [m])
            if number >= least:
                each[novelty.names[m]] = own
        apart = tuple(
            (novelty.names[a], novelty.names[b])
            for i, a in enumerate(here)
            for b in here[i + 1 :]
            if not bool(novelty.together[a, b])
        )
        found.append(Unusual(state, p, patients, least, each, apart))
    return found


def _comparable(novelty: Novelty, row: Tensor) -> list[int]:
    """Return the modalities of a record that enough held-back patients have all of.

    Where a combination is rare, what the fewest have is left out of the joint comparison first; it
    keeps a p-value of its own.
    """
    left = (~row.isnan()).nonzero().flatten().tolist()
    known = ~novelty.held_back.isnan()
    least = ceil(round(1 / min(novelty.alarm, 2 * novelty.strange), 9)) - 1
    while len(left) > 1 and int(known[:, left].all(1).sum()) < min(least, len(known) // 4):
        left.remove(min(left, key=lambda m: int(known[:, m].sum())))
    return left


def p_value(held_back: Tensor, row: Tensor, modalities: Sequence[int]) -> tuple[float, int]:
    """Return the share of held-back patients at least as unusual, and how many there are.

    Args:
        held_back: `(n, M)` scores, NaN where there is nothing.
        row: `(M,)` scores of the one who is asked about.
        modalities: Those to compare by; patients who lack one are left out.
    """
    if not modalities:
        return 1.0, 0
    others = held_back[:, list(modalities)]
    others = others[~others.isnan().any(1)]
    everyone = torch.cat([others, row[None, list(modalities)]])
    # One modality may be far out, or several a little: both are looked at, as ranks.
    singly = _share_as_high(everyone.amax(1, keepdim=True))[:, 0]
    jointly = _share_as_high(-_share_as_high(everyone).log().sum(1, keepdim=True))[:, 0]
    # Of two who are each the first in one way, the one with something far out comes first.
    order = torch.minimum(singly, jointly) + singly / (2 * len(everyone))
    return float((order <= order[-1]).double().mean()), len(others)


def _share_as_high(values: Tensor) -> Tensor:
    """Return of each of `(n, k)` the share of its column that is at least as high."""
    ascending = values.T.sort(1).values.contiguous()
    below = torch.searchsorted(ascending, values.T.contiguous(), right=False)
    return (1 - below.double() / len(values)).T


def _fit(rows: Tensor, sizes: Sequence[int], seed: int) -> Usual:
    """Learn what one modality is like, and how far its own patients lie from the others."""
    generator = torch.Generator().manual_seed(seed)
    fold = torch.randperm(len(rows), generator=generator) % _FOLDS
    distances = torch.zeros(len(rows), dtype=torch.float64)
    for k in range(_FOLDS):
        distances[fold == k] = _distance(_density(rows[fold != k], sizes), rows[fold == k])
    spread = float(distances.std()) if len(rows) > 1 else 0.0
    found = _density(rows, sizes)
    return Usual(
        found.mean,
        found.deviation,
        found.covariance,
        found.rarities,
        float(distances.mean()),
        max(spread, 1e-6),
    )


def _density(rows: Tensor, sizes: Sequence[int]) -> Usual:
    numbers = torch.tensor([not size for size in sizes])
    known = ~rows.isnan()
    count = known.sum(0).clamp_min(1)
    mean = rows.nan_to_num(0.0).sum(0) / count
    gap = torch.where(known, rows - mean, torch.zeros_like(rows))
    deviation = (gap.square().sum(0) / count).sqrt()
    # What never varied may vary a little; what then differs by more stands out.
    deviation = deviation.clamp_min(1e-3)
    _, covariance = gaussian.fit(((rows - mean) / deviation)[:, numbers])
    rarities = {}
    for f, size in enumerate(sizes):
        if size:
            seen = rows[known[:, f], f].round().long().clamp(0, size - 1)
            share = torch.bincount(seen, minlength=size).double().clamp_min(_NEVER)
            rarities[f] = -2 * (share / share.max()).log()
    return Usual(mean, deviation, covariance, rarities, 0.0, 1.0)


def _distance(usual: Usual, rows: Tensor) -> Tensor:
    """Return distances `(n,)`, about standard normal for normal rows, NaN for empty ones.

    Squared Mahalanobis distances over what is known, and rarities of categories, by Wilson's and
    Hilferty's cube root, which makes distances over one cell and over thirty comparable.
    """
    known = ~rows.isnan()
    places = torch.tensor([f not in usual.rarities for f in range(rows.shape[1])])
    seen = known[:, places]
    gap = ((rows - usual.mean) / usual.deviation)[:, places].nan_to_num(0.0)
    total = torch.zeros(len(rows), dtype=torch.float64)
    patterns, at = seen.unique(dim=0, return_inverse=True)
    for g, pattern in enumerate(patterns):
        if bool(pattern.any()):
            inside = usual.covariance[pattern][:, pattern]
            part = gap[at == g][:, pattern]
            solved = torch.cholesky_solve(part.T, torch.linalg.cholesky(inside)).T
            total[at == g] = (part * solved).sum(1)
    for f, rarity in usual.rarities.items():
        codes = rows[:, f].nan_to_num(0.0).round().long().clamp(0, len(rarity) - 1)
        total += torch.where(known[:, f], rarity[codes], torch.zeros_like(total))
    cells = known.sum(1).double()
    ninth = 2 / (9 * cells.clamp_min(1))
    z = ((total / cells.clamp_min(1)).pow(1 / 3) - (1 - ninth)) / ninth.sqrt()
    return z.masked_fill(cells == 0, torch.nan)


def to_tensors(novelty: Novelty) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what a bundle stores: tensors by name, and the rest as JSON takes it."""
    tensors = {"held_back": novelty.held_back, "together": novelty.together}
    told: dict[str, Any] = {"alarm": novelty.alarm, "strange": novelty.strange, "usual": {}}
    for name, usual in novelty.usual.items():
        tensors[f"{name}.mean"] = usual.mean
        tensors[f"{name}.deviation"] = usual.deviation
        tensors[f"{name}.covariance"] = usual.covariance
        for f, rarity in usual.rarities.items():
            tensors[f"{name}.rarity.{f}"] = rarity
        told["usual"][name] = {
            "centre": usual.centre,
            "spread": usual.spread,
            "categorical": sorted(usual.rarities),
        }
    return {k: v.contiguous() for k, v in tensors.items()}, told


def from_tensors(
    tensors: Mapping[str, Tensor],
    told: Mapping[str, Any],
    specs: Sequence[ModalitySpec],
    owner: Sequence[int],
    categories: Sequence[int],
) -> Novelty:
    """Return what a bundle stored.

    Args:
        tensors: As `to_tensors` returned them.
        told: Likewise.
        specs: Modalities in canonical order.
        owner: Of each feature, the position of its modality.
        categories: Of each, how many categories a cell has.

    Raises:
        ValueError: If it does not fit these modalities, or a number is not finite or out of range.
        KeyError: If a part is absent.
    """
    names = tuple(spec.name for spec in specs)
    usual = {}
    for name, part in told["usual"].items():
        m = names.index(name)
        sizes = [n for n, o in zip(categories, owner, strict=True) if o == m]
        p, numbers = len(sizes), sum(not size for size in sizes)
        shapes = {"mean": (p,), "deviation": (p,), "covariance": (numbers, numbers)}
        found = {key: tensors[f"{name}.{key}"] for key in shapes}
        rarities = {int(f): tensors[f"{name}.rarity.{int(f)}"] for f in part["categorical"]}
        if any(tuple(found[key].shape) != shape for key, shape in shapes.items()) or {
            f: len(rarity) for f, rarity in rarities.items()
        } != {f: size for f, size in enumerate(sizes) if size}:
            raise ValueError(f"{name}: numbers of another shape")
        if not all(bool(t.isfinite().all()) for t in (*found.values(), *rarities.values())):
            raise ValueError(f"{name}: numbers that are not finite")
        if not bool((found["deviation"] > 0).all()) or not float(part["spread"]) > 0:
            raise ValueError(f"{name}: a standard deviation that is not above 0")
        torch.linalg.cholesky(found["covariance"])
        usual[name] = Usual(
            **found, rarities=rarities, centre=float(part["centre"]), spread=float(part["spread"])
        )
    held_back, together = tensors["held_back"], tensors["together"]
    if held_back.ndim != 2 or held_back.shape[1] != len(names):
        raise ValueError("held-back patients of other modalities")
    if tuple(together.shape) != (len(names), len(names)):
        raise ValueError("pairs of other modalities")
    alarm, strange = float(told["alarm"]), float(told["strange"])
    if not 0 < strange <= alarm < 1:
        raise ValueError("an alarm that is no share")
    return Novelty(usual, names, held_back, together, alarm, strange)
