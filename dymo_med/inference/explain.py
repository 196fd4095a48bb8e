"""What moved the answer: modalities (Shapley values), table cells (ablation), voxels (gradients).

All three explain one number, the calibrated probability of the predicted class, and only what the
prediction used: a modality that was rejected or absent gets nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import factorial

import torch
from torch import Tensor

from dymo_med.backbones import FusionBackbone, encode_versions
from dymo_med.types import Attribution, Batch, Fuse, Recovery, SelectionTrace

# Requests to the fusion backbone at once.
_ROWS = 4096
# Above this, 2^u subsets are sampled instead of listed.
_MOST_EXACT = 12
_PERMUTATIONS = 200
_STEPS = 16


@dataclass(frozen=True)
class Saliency:
    """Which voxels of the observed images moved the answer.

    Attributes:
        maps: Per observed image `(*spatial)`: integrated gradients summed over channels, in
            units of probability per voxel.
        convergence: Sum over all voxels minus the change of probability they should add up to.
    """

    maps: Mapping[str, Tensor]
    convergence: float


@dataclass(frozen=True)
class Explanation:
    """Everything `explain` finds out about one record.

    Attributes:
        attributions: Modalities first, then table cells.
        saliency: Of the observed images; None without any.
    """

    attributions: tuple[Attribution, ...]
    saliency: Saliency | None


@dataclass(frozen=True)
class Explained:
    """One record in the version that was predicted from, and the probability to explain.

    Attributes:
        backbone: The network.
        batch: One record; `observed` marks what was used, `observed_fields` the cells that were,
            and recovered values stand where they were trusted.
        chosen: Index of the class.
        temperature: Probability calibration.
        base_rate: Share of the class among training patients: the answer from nothing.
    """

    backbone: FusionBackbone
    batch: Batch
    chosen: int
    temperature: float
    base_rate: float

    def probability(self, logits: Tensor) -> Tensor:
        """Return the calibrated probability `(R,)` of the class from logits `(R, K)`."""
        return torch.softmax(logits / self.temperature, dim=-1)[:, self.chosen]


def explained(
    backbone: FusionBackbone,
    batch: Batch,
    recovery: Recovery,
    trace: SelectionTrace,
    row: int,
    *,
    temperature: float,
    base_rates: tuple[float, ...],
) -> Explained:
    """Gather what explanations of one record are about.

    Args:
        backbone: The network.
        batch: B records.
        recovery: Of these.
        trace: Of these.
        row: Which one.
        temperature: Probability calibration.
        base_rates: K class shares among training patients.

    Returns:
        A batch of one in which each used modality holds the version that was used. Tensors are
        copies, so gradients may flow even if the originals were made in inference mode.
    """
    index = torch.tensor([row], device=batch.labels.device)
    one = batch.rows(index)
    values, fields = dict(one.values), dict(one.observed_fields)
    for m, name in enumerate(trace.names):
        if bool(trace.admitted[row, m]):
            values[name] = recovery.values[name][index]
            if name in fields:
                fields[name] = torch.ones_like(fields[name])
    final = Batch(
        record_ids=one.record_ids,
        patient_ids=one.patient_ids,
        values={name: value.clone() for name, value in values.items()},
        observed=replace(one.observed, available=trace.used[index].clone()),
        observed_fields={name: value.clone() for name, value in fields.items()},
        labels=one.labels.clone(),
    )
    chosen = int(trace.output.logits[row].argmax())
    return Explained(backbone, final, chosen, temperature, base_rates[chosen])


def explain(subject: Explained, observed: Mapping[str, Tensor | None], *, seed: int) -> Explanation:
    """Explain one record in every way that applies to it.

    Args:
        subject: From `explained`.
        observed: What was measured: modality to its filled cells `(F,)`, None for images.
        seed: Seed of the permutations where there are too many modalities to list all subsets.

    Returns:
        The explanation.
    """
    used = set(subject.batch.observed.of(0))
    cells = {n: f for n, f in observed.items() if n in used and f is not None}
    images = tuple(n for n, f in observed.items() if n in used and f is None)
    return Explanation(
        (*modality_shapley(subject, seed=seed), *cell_ablation(subject, cells)),
        image_saliency(subject, images) if images else None,
    )


def modality_shapley(subject: Explained, *, seed: int = 0) -> tuple[Attribution, ...]:
    """Return the Shapley value of each used modality.

    The game is the probability from a subset of the used modalities; the empty subset plays the
    base rate. Values add up to the probability minus the base rate.

    Args:
        subject: What to explain.
        seed: Seed of the permutations above twelve modalities.

    Returns:
        One per used modality, in canonical order. Exact (method ``shapley``) up to twelve
        modalities; averaged over random orders (``shapley_sampled``, the same sum) beyond.

    References:
        Shapley, A Value for n-Person Games, 1953.
    """
    names = subject.batch.observed.of(0)
    columns = subject.batch.observed.available[0].nonzero().squeeze(1)
    u = len(columns)
    with torch.no_grad():
        fuse = encode_versions(subject.backbone, subject.batch)
        if u <= _MOST_EXACT:
            ids = torch.arange(2**u, device=columns.device)
            present = (ids[:, None] >> torch.arange(u, device=columns.device)) & 1 == 1
            values = exact_shapley(_worth(subject, fuse, columns, present), u)
        else:
            values = _sampled_shapley(subject, fuse, columns, seed)
    method = "shapley" if u <= _MOST_EXACT else "shapley_sampled"
    return tuple(
        Attribution(name, "", value, method)
        for name, value in zip(names, values.tolist(), strict=True)
    )


def exact_shapley(worth: Tensor, players: int) -> Tensor:
    """Return Shapley values from the worth of every coalition.

    Args:
        worth: `(2^u,)`; the coalition's bitmask is its index.
        players: u.

    Returns:
        `(u,)`, adding up to the worth of all minus that of nobody.

    Example:
        >>> exact_shapley(torch.tensor([0.0, 1.0, 3.0, 6.0]), 2).tolist()
        [2.0, 4.0]
    """
    ids = torch.arange(2**players, device=worth.device)
    bits = (ids[:, None] >> torch.arange(players, device=worth.device)) & 1  # (2^u, u)
    size = bits.sum(1)
    weight = torch.tensor(
        [factorial(s) * factorial(players - s - 1) / factorial(players) for s in range(players)]
        + [0.0],
        dtype=worth.dtype,
        device=worth.device,
    )[size]
    values = []
    for i in range(players):
        without = ids[bits[:, i] == 0]
        values.append((weight[without] * (worth[without | 1 << i] - worth[without])).sum())
    return torch.stack(values) if values else worth.new_empty(0)


def cell_ablation(
    subject: Explained, cells: Mapping[str, Tensor], *, rows_at_once: int = 256
) -> tuple[Attribution, ...]:
    """Return how much the probability falls when a measured table cell is blanked.

    The network was trained with blank cells, so leaving a cell out is a state it knows; a path
    from some baseline value, as gradients need one, means nothing between two categories.
    Blanking the only cell of a table takes the table away.

    Args:
        subject: What to explain.
        cells: Per used table, bool `(F,)`: the cells that were measured.
        rows_at_once: Blanked variants per pass.

    Returns:
        One per measured cell of the used tables, in canonical order (method
        ``feature_ablation``); positive = the cell speaks for the answer.

    References:
        Captum, `captum.attr.FeatureAblation`.
    """
    places = [
        (name, f) for name, filled in cells.items() for f in filled.nonzero().squeeze(1).tolist()
    ]
    if not places:
        return ()
    from captum.attr import FeatureAblation

    batch = subject.batch
    names = batch.observed.names
    columns = batch.observed.available[0].nonzero().squeeze(1)
    spec = {s.name: s for s in subject.backbone.specs}

    def forward(kept: Tensor) -> Tensor:
        rows = len(kept)
        variants = batch.rows(torch.zeros(rows, dtype=torch.int64, device=kept.device))
        fields = {name: value.clone() for name, value in variants.observed_fields.items()}
        for i, (name, f) in enumerate(places):
            fields[name][:, f] &= kept[:, i] > 0.5
        available = variants.observed.available.clone()
        for name in cells:
            available[:, names.index(name)] &= fields[name].any(1)
        variants = replace(
            variants,
            observed=replace(variants.observed, available=available),
            observed_fields=fields,
        )
        return _worth(
            subject,
            encode_versions(subject.backbone, variants),
            columns,
            available[:, columns],
            torch.arange(rows, device=kept.device),
        )

    with torch.no_grad():
        everything = torch.ones(1, len(places), device=batch.labels.device)
        values = FeatureAblation(forward).attribute(
            everything, perturbations_per_eval=min(rows_at_once, len(places))
        )
    return tuple(
        Attribution(name, spec[name].columns[f].name, value, "feature_ablation")
        for (name, f), value in zip(places, values[0].tolist(), strict=True)
    )


def image_saliency(subject: Explained, images: tuple[str, ...], *, steps: int = _STEPS) -> Saliency:
    """Return integrated gradients of the probability over the observed images.

    The path leads from empty images (zero is the background of a preprocessed image) to the
    measured ones; everything else that was used, recovered images included, stays as it is:
    a made-up voxel has nothing to show.

    Args:
        subject: What to explain.
        images: Observed images that were used, at least one.
        steps: Points on the path (Gauss-Legendre).

    Returns:
        The maps, on the images' device.

    References:
        Sundararajan, Taly, Yan: Axiomatic Attribution for Deep Networks, ICML 2017, as
        `captum.attr.IntegratedGradients`.
    """
    from captum.attr import IntegratedGradients

    batch = subject.batch
    columns = batch.observed.available[0].nonzero().squeeze(1)

    def forward(*values: Tensor) -> Tensor:
        rows = torch.zeros(len(values[0]), dtype=torch.int64, device=values[0].device)
        variants = batch.rows(rows)
        variants = replace(
            variants, values={**variants.values, **dict(zip(images, values, strict=True))}
        )
        return _worth(
            subject,
            encode_versions(subject.backbone, variants),
            columns,
            variants.observed.available[:, columns],
            torch.arange(len(rows), device=rows.device),
        )

    inputs = tuple(batch.values[name] for name in images)
    with torch.enable_grad():
        maps, delta = IntegratedGradients(forward).attribute(
            inputs,
            baselines=tuple(torch.zeros_like(value) for value in inputs),
            n_steps=steps,
            internal_batch_size=4,
            return_convergence_delta=True,
        )
    return Saliency(
        {name: m[0].detach().sum(0) for name, m in zip(images, maps, strict=True)},
        float(delta[0]),
    )


def _worth(
    subject: Explained,
    fuse: Fuse,
    columns: Tensor,
    present: Tensor,
    rows: Tensor | None = None,
) -> Tensor:
    """Return the probability from subsets of the used modalities; the base rate from none.

    Args:
        subject: What to explain.
        fuse: Over the patients that `rows` means.
        columns: Int64 `(u,)`, the used modalities.
        present: Bool `(R, u)`, the subsets.
        rows: Int64 `(R,)`; None = patient 0 throughout.

    Returns:
        `(R,)`.
    """
    available = subject.batch.observed.available
    used = available.new_zeros(len(present), available.shape[1])
    used[:, columns] = present
    owner = torch.zeros(len(present), dtype=torch.int64, device=used.device)
    owner = owner if rows is None else rows
    something = present.any(1).nonzero().squeeze(1)
    parts = [
        subject.probability(fuse(owner[chunk], used[chunk], torch.zeros_like(used[chunk])).logits)
        for chunk in something.split(_ROWS)
        if len(chunk)
    ]
    dtype = parts[0].dtype if parts else torch.get_default_dtype()
    worth = torch.full((len(present),), subject.base_rate, dtype=dtype, device=used.device)
    return worth.index_copy(0, something, torch.cat(parts)) if parts else worth


def _sampled_shapley(subject: Explained, fuse: Fuse, columns: Tensor, seed: int) -> Tensor:
    """Return Shapley values averaged over random orders in which modalities join."""
    u = len(columns)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(u, generator=generator) for _ in range(_PERMUTATIONS)])
    rank = order.argsort(1).to(columns.device)  # (P, u): when each one joins
    present = rank[:, None, :] < torch.arange(u + 1, device=rank.device)[None, :, None]
    worth = _worth(subject, fuse, columns, present.flatten(0, 1)).view(len(rank), u + 1)
    return torch.gather(worth.diff(dim=1), 1, rank).mean(0)
