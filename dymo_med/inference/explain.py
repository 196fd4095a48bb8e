"""What moved the answer: modalities (Shapley values), table cells (ablation), voxels (gradients).

All three explain one number, the calibrated probability of the predicted class, and only what the
prediction used: a modality that was absent, or rejected outright, gets nothing. What was used and
made up is explained too, apart from what was measured and marked as recovered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import factorial

import torch
from torch import Tensor

from dymo_med.backbones import EncodedVersions, FusionBackbone
from dymo_med.calibration import Calibration
from dymo_med.modalities import modality
from dymo_med.references import Mixed
from dymo_med.types import Attribution, Batch, Fuse, Recovery, SelectionTrace, Tokens

# Upper bound on token values gathered at once (about 64 MB in float32).
_MOST_VALUES = 16_000_000
# Above this, 2^u subsets are sampled instead of listed.
_MOST_EXACT = 12
_PERMUTATIONS = 200
# Points on the path of integrated gradients: to begin with, and at most.
_STEPS, _MOST_STEPS = 16, 128
# Integrated gradients should add up to the change of probability within this.
MOST_ERROR = 0.005
# Memory for one pass of gradients, and how often an image's own size its activations take. A
# constant, not what happens to be free: how points are grouped shows in the last bits.
_MEMORY_BYTES = 500_000_000
_ACTIVATIONS = 64

# A modality by name, and whether it is the recovered (or completed) version of it.
Version = tuple[str, bool]


@dataclass(frozen=True)
class Saliency:
    """Which voxels of the images that were used moved the answer.

    Attributes:
        maps: Per observed image `(*spatial)`: integrated gradients summed over channels, in
            units of probability per voxel; none where the network reads descriptors alone.
        recovered: Likewise per recovered image that was trusted: what the network saw in voxels
            that an imputer made up from the others.
        contrast: Per version of an image that the network reads descriptors of: what these
            contributed, which no place in the scan did.
        convergence: Sum over all voxels of both, and of `contrast`, minus the change of
            probability they should add up to.
        points: Points on the path.
    """

    maps: Mapping[str, Tensor]
    recovered: Mapping[str, Tensor]
    contrast: Mapping[Version, float]
    convergence: float
    points: int


@dataclass(frozen=True)
class Explanation:
    """Everything `explain` finds out about one record.

    Attributes:
        attributions: Modalities first, then table cells.
        saliency: Of the images that were used; None without any.
    """

    attributions: tuple[Attribution, ...]
    saliency: Saliency | None


class Subject:
    """One record in the version that was predicted from, and the probability to explain.

    Every version of a modality that is used is encoded once; only what an explanation changes is
    encoded again. An answer that is an average over subsets is explained as that average.

    Args:
        backbone: The network.
        batch: B records.
        recovery: Of these.
        trace: Of these, by the selector whose answer is to be explained.
        row: Which record.
        calibration: How logits become probabilities.
        base_rates: K class shares among training patients: the answer from nothing.
        mixed: Of the same batch, where a reference has a part in the answers.
        draws: Where the answer is a mean over draws of the recoveries: what answers from each,
            over the same batch.

    Attributes:
        backbone: The network.
        mixed: Likewise.
        features: What the reference sees of each version, float64 `(1, p)`; empty without one.
        names: Used modalities in canonical order, u of them.
        versions: Values `(1, *shape)` and filled cells `(1, F)` (None for images) by name and by
            whether it is the recovered version; copies, so that gradients may flow even if the
            originals were made in inference mode.
        descriptors: Of image versions whose descriptors the network reads `(1, P)`: of the scan as
            stored, or of the recovered values.
        given: Recovered versions that the network was given as tokens of its own, or as draws:
            values are not what it saw.
        draws: Of each draw, tokens and features of the recovered versions.
        chosen: Index of the predicted class.
        base_rate: Its share among training patients.
    """

    def __init__(
        self,
        backbone: FusionBackbone,
        batch: Batch,
        recovery: Recovery,
        trace: SelectionTrace,
        row: int,
        *,
        calibration: Calibration,
        base_rates: tuple[float, ...],
        mixed: Mixed | None = None,
        draws: Sequence[Fuse] = (),
    ) -> None:
        self.backbone = backbone
        self.mixed = mixed
        self.calibration = calibration
        self.chosen = int(trace.output.logits[row].argmax())
        self.base_rate = base_rates[self.chosen]
        admitted = trace.admitted[row : row + 1]
        weight = torch.ones(1, dtype=torch.float64, device=admitted.device)
        if trace.mixture is not None:
            own = trace.mixture.rows == row
            admitted, weight = trace.mixture.admitted[own], trace.mixture.weight[own]
        used = trace.observed[row] | admitted  # (A, M): each averaged subset
        kept = used.any(0).nonzero().squeeze(1)
        self.names = tuple(trace.names[m] for m in kept.tolist())
        self._used, self._admitted = used[:, kept], admitted[:, kept]
        self._weight = weight.clone()
        owner = backbone.token_modality
        self._sizes = torch.bincount(owner, minlength=len(backbone.specs)).tolist()
        self.versions: dict[Version, tuple[Tensor, Tensor | None]] = {}
        self.descriptors: dict[Version, Tensor] = {}
        kinds = {spec.name: modality(spec) for spec in backbone.specs}
        for i, name in enumerate(self.names):
            for made in (False, True):
                if not bool((self._used[:, i] & (self._admitted[:, i] == made)).any()):
                    continue
                source = recovery.values if made else batch.values
                filled = None
                if name in batch.observed_fields:
                    filled = batch.observed_fields[name][row : row + 1].clone()
                    filled = torch.ones_like(filled) if made else filled
                values = source[name][row : row + 1].clone()
                self.versions[name, made] = values, filled
                if not backbone.described(name):
                    continue
                told = (recovery if made else batch).descriptors.get(name)
                told = kinds[name].describe(values) if told is None else told[row : row + 1].clone()
                if told is not None:
                    self.descriptors[name, made] = told.to(values.dtype)
        # A recovery that the network was given as tokens is explained as these: its values only
        # show what they stand for.
        recovered = recovery.tokens_for(backbone.space)
        self.given = {(name, made) for name, made in self.versions if made and name in recovered}
        with torch.no_grad():
            self.tokens = {
                version: backbone.encode(version[0], values, filled, self.descriptors.get(version))
                for version, (values, filled) in self.versions.items()
                if version not in self.given
            }
        for version in self.given:
            tokens = recovered[version[0]][row : row + 1].clone()
            available = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            self.tokens[version] = Tokens(tokens, available)

        self.features: dict[Version, Tensor] = {}
        if mixed is not None:
            for name, made in self.versions:
                seen = mixed.recovered if made else mixed.observed
                assert seen is not None
                self.features[name, made] = seen[row : row + 1, self.columns(name)].clone()
        self.draws = [self._draw(part, row) for part in draws]
        if self.draws:
            self.given |= {(name, made) for name, made in self.versions if made}

    def _draw(self, part: Fuse, row: int) -> tuple[dict[Version, Tokens], dict[Version, Tensor]]:
        """Return tokens and features of the recovered versions in one draw."""
        network = part.network if isinstance(part, Mixed) else part
        assert isinstance(network, EncodedVersions) and network.recovered is not None
        tokens, features = {}, {}
        for version in (v for v in self.versions if v[1]):
            m = next(i for i, s in enumerate(self.backbone.specs) if s.name == version[0])
            own = network.recovered[row : row + 1, self.backbone.token_modality == m].clone()
            there = torch.ones(own.shape[:2], dtype=torch.bool, device=own.device)
            tokens[version] = Tokens(own, there)
            if isinstance(part, Mixed):
                assert part.recovered is not None
                features[version] = part.recovered[row : row + 1, self.columns(version[0])].clone()
        return tokens, features

    def columns(self, name: str) -> list[int]:
        """Return which features of the reference are a modality's."""
        assert self.mixed is not None
        m = next(i for i, spec in enumerate(self.backbone.specs) if spec.name == name)
        return [p for p, owner in enumerate(self.mixed.reference.model.layout.owner) if owner == m]

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._used.device

    def probability(
        self,
        present: Tensor,
        changed: Mapping[Version, Tokens] | None = None,
        other: Mapping[Version, Tensor] | None = None,
    ) -> Tensor:
        """Return the calibrated probability of the predicted class.

        Args:
            present: Bool `(R, u)`: which of the used modalities to fuse.
            changed: Tokens `(R, N, D)` that stand in for a version's own.
            other: Features `(R, p)` that stand in for a version's own; the reference sees what
                has changed if it has a part in the answer.

        Returns:
            `(R,)`; the base rate where nothing is present.
        """
        if not self.draws:
            return self._answer(present, changed, other)
        total = torch.zeros((), dtype=torch.float64)
        for tokens, features in self.draws:
            answer = self._answer(
                present,
                {**tokens, **(changed or {})} if changed else None,
                {**features, **(other or {})} if other else None,
                (tokens, features),
            )
            total = total + answer
        return total / len(self.draws)

    def _answer(
        self,
        present: Tensor,
        changed: Mapping[Version, Tokens] | None,
        other: Mapping[Version, Tensor] | None,
        draw: tuple[Mapping[Version, Tokens], Mapping[Version, Tensor]] | None = None,
    ) -> Tensor:
        """Return the probability from the best guesses, or from one draw."""
        made = draw or ({}, {})
        tokens = {**self.tokens, **made[0], **(changed or {})}
        subsets, u = self._used.shape
        # Each request becomes one per averaged subset; equal ones are fused once.
        used = (present[:, None] & self._used[None]).flatten(0, 1)  # (R A, u)
        admitted = used & self._admitted.repeat(len(present), 1)
        owner = torch.arange(len(present), device=present.device).repeat_interleave(subsets)
        # Without changed tokens every request is about the same patient.
        about = owner if changed or other else torch.zeros_like(owner)
        features = {**self.features, **made[1], **(other or {})}
        key = torch.cat([about[:, None], used.long(), admitted.long()], dim=1)
        wanted, which = torch.unique(key, dim=0, return_inverse=True)
        some = next(iter(tokens.values())).values
        size = sum(self._sizes) * some.shape[-1]
        chunk = max(1, _MOST_VALUES // size)
        parts = [
            self._fuse(tokens, features, part[:, 0], part[:, 1 : 1 + u] == 1, part[:, 1 + u :] == 1)
            for part in wanted.split(chunk)
        ]
        each = torch.cat(parts)[which].view(len(present), subsets)
        return (each * self._weight.to(each.dtype)).sum(1)

    def _fuse(
        self,
        tokens: Mapping[Version, Tokens],
        features: Mapping[Version, Tensor],
        rows: Tensor,
        used: Tensor,
        admitted: Tensor,
    ) -> Tensor:
        """Return the probability from subsets `(R, u)` of what stands in `rows` of the tokens."""
        some = next(iter(tokens.values())).values
        values: list[Tensor] = []
        available: list[Tensor] = []
        for spec, size in zip(self.backbone.specs, self._sizes, strict=True):
            # A modality that is not used stands in its place, unavailable (`FusionBackbone.fuse`).
            x = some.new_zeros(len(rows), size, some.shape[-1])
            there = torch.zeros(len(rows), size, dtype=torch.bool, device=rows.device)
            for made in (False, True):
                version = tokens.get((spec.name, made))
                if version is None:
                    continue
                i = self.names.index(spec.name)
                own = rows if len(version.values) > 1 else torch.zeros_like(rows)
                chosen = (used[:, i] & (admitted[:, i] == made))[:, None]
                x = torch.where(chosen[..., None], version.values[own], x)
                there = torch.where(chosen, version.available[own], there)
            values.append(x)
            available.append(there)
        seen = self._features(features, rows.cpu(), used.cpu(), admitted.cpu())
        return self._probability(torch.cat(values, 1), torch.cat(available, 1), seen)

    def _features(
        self, features: Mapping[Version, Tensor], rows: Tensor, used: Tensor, admitted: Tensor
    ) -> Tensor:
        """Return what the reference sees `(R, P)` of subsets `(R, u)`; nothing without one."""
        width = 0 if self.mixed is None else len(self.mixed.reference.model.layout)
        found = torch.full((len(rows), width), torch.nan, dtype=torch.float64)
        for (name, made), own in features.items():
            i = self.names.index(name)
            chosen = (used[:, i] & (admitted[:, i] == made)).nonzero().squeeze(1)
            source = rows[chosen] if len(own) > 1 else torch.zeros_like(chosen)
            found[chosen[:, None], torch.tensor(self.columns(name))] = own[source]
        return found

    def _probability(self, tokens: Tensor, available: Tensor, features: Tensor) -> Tensor:
        """Return the probability from tokens `(R, N, D)` side by side."""
        something = available.any(1).nonzero().squeeze(1)
        worth = tokens.new_full((len(tokens),), self.base_rate, dtype=torch.float64)
        if not len(something):
            return worth
        logits = self.backbone.fuse(tokens[something], available[something]).logits
        if self.mixed is not None:
            logits = self.mixed.mix(logits, features[something.cpu()])
        # As the answer itself is calibrated: what is added up should not differ by rounding.
        probability = self.calibration.probabilities(logits)[:, self.chosen]
        return worth.index_copy(0, something, probability)


def explain(subject: Subject, observed: Mapping[str, Tensor | None], *, seed: int) -> Explanation:
    """Explain one record in every way that applies to it.

    Args:
        subject: What to explain.
        observed: What was measured: modality to its filled cells `(F,)`, None for images.
        seed: Seed of the permutations where there are too many modalities to list all subsets.

    Returns:
        The explanation.
    """
    grids = {spec.name for spec in subject.backbone.specs if spec.is_image}
    images = tuple(
        version
        for version in subject.versions
        if version[0] in grids and version not in subject.given
    )
    missing = [name for name in subject.names if name not in observed]
    tables = {n: f for n, f in observed.items() if f is not None}
    modalities = modality_shapley(subject, seed=seed)
    return Explanation(
        (
            *(replace(a, recovered=a.modality in missing) for a in modalities),
            *cell_ablation(subject, tables),
        ),
        # A reference that answers alone looks at no voxel of the grid.
        image_saliency(subject, images)
        if images and (subject.mixed is None or subject.mixed.weight > 0)
        else None,
    )


@torch.no_grad()
def modality_shapley(subject: Subject, *, seed: int = 0) -> tuple[Attribution, ...]:
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
    u = len(subject.names)
    if u <= _MOST_EXACT:
        ids = torch.arange(2**u, device=subject.device)
        present = (ids[:, None] >> torch.arange(u, device=subject.device)) & 1 == 1
        values = exact_shapley(subject.probability(present), u)
    else:
        values = _sampled_shapley(subject, seed)
    method = "shapley" if u <= _MOST_EXACT else "shapley_sampled"
    return tuple(
        Attribution(name, "", value, method)
        for name, value in zip(subject.names, values.tolist(), strict=True)
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


@torch.no_grad()
def cell_ablation(
    subject: Subject, measured: Mapping[str, Tensor], *, rows_at_once: int = 256
) -> tuple[Attribution, ...]:
    """Return how much the probability falls when a table cell is blanked.

    Not integrated gradients, as for images. A path needs a baseline to start from, and whatever
    stands for "no value" in a cell (the mean, an average of categories) is a value; halfway between
    two categories there is nothing. Blanking is discrete, a state that the network was trained
    with, and what a reader means: what if we did not know this? The price is that effects of
    several cells do not add up.

    Blanking the only cell of a table takes the table away. Cells of a recovery that the network was
    given as tokens are left out: blanking them would change nothing that it saw.

    Args:
        subject: What to explain.
        measured: Per observed table, bool `(F,)`: the cells that were measured. The other cells of
            a table whose recovered version was used are explained too, as recovered.
        rows_at_once: Blanked variants per pass.

    Returns:
        One per filled cell of the used tables, in canonical order (method
        ``feature_ablation``); positive = the cell speaks for the answer.

    References:
        Captum, `captum.attr.FeatureAblation`.
    """
    cells: dict[str, Tensor] = {}
    for (name, made), (_, filled) in subject.versions.items():
        if filled is not None and (name, made) not in subject.given:
            cells[name] = cells[name] | filled[0] if name in cells else filled[0]
    places = [
        (name, f) for name, filled in cells.items() for f in filled.nonzero().squeeze(1).tolist()
    ]
    if not places:
        return ()
    from captum.attr import FeatureAblation

    columns = {spec.name: spec.columns for spec in subject.backbone.specs}

    def forward(kept: Tensor) -> Tensor:
        rows = len(kept)
        present = torch.ones(rows, len(subject.names), dtype=torch.bool, device=kept.device)
        changed, other = {}, {}
        for (name, made), (values, filled) in subject.versions.items():
            if filled is None or (name, made) in subject.given:
                continue
            fields = filled.expand(rows, -1).clone()
            for i, (table, f) in enumerate(places):
                if table == name:
                    fields[:, f] &= kept[:, i] > 0.5
            tokens = subject.backbone.encode(name, values.expand(rows, -1), fields)
            # A table without a cell is absent.
            available = tokens.available & fields.any(1, keepdim=True)
            changed[name, made] = Tokens(tokens.values, available)
            if subject.mixed is not None:
                own = subject.features[name, made].expand(rows, -1)
                other[name, made] = own.masked_fill(~fields.cpu(), torch.nan)
        return subject.probability(present, changed, other)

    everything = torch.ones(1, len(places), device=subject.device)
    values = FeatureAblation(forward).attribute(
        everything, perturbations_per_eval=min(rows_at_once, len(places))
    )
    return tuple(
        Attribution(
            name,
            columns[name][f].name,
            value,
            "feature_ablation",
            name not in measured or not bool(measured[name][f]),
        )
        for (name, f), value in zip(places, values[0].tolist(), strict=True)
    )


def image_saliency(
    subject: Subject, images: tuple[Version, ...], *, steps: int = _STEPS, most: int = _MOST_STEPS
) -> Saliency:
    """Return integrated gradients of the probability over the images that were used.

    The path leads from empty images (zero is the background of a preprocessed image) to the
    measured and the trusted recovered ones, all at once, so that their voxels share one sum; tables
    stay as they are. Descriptors of scans, where the network reads them, are inputs of their own on
    the same path, from the mean of training scans: most of them jump where a voxel crosses a
    threshold, so there is no gradient to follow to the voxels, and what they contributed is told
    apart. A recovered voxel is held for what the network was given: how it depends
    on the measured ones through the imputer is not followed. Where a reference has a part in the
    answer, that part stays as it is.

    Args:
        subject: What to explain.
        images: Versions of images that were used, at least one.
        steps: Points on the path (Gauss-Legendre), doubled while the sum is further off than
            `MOST_ERROR`.
        most: Points at most.

    Returns:
        The maps, on the images' device, observed and recovered apart.

    References:
        Sundararajan, Taly, Yan: Axiomatic Attribution for Deep Networks, ICML 2017, as
        `captum.attr.IntegratedGradients`.
    """
    from captum.attr import IntegratedGradients

    def forward(*values: Tensor) -> Tensor:
        rows = len(values[0])
        present = torch.ones(rows, len(subject.names), dtype=torch.bool, device=subject.device)
        given = dict(zip([*seen, *described], values, strict=True))
        changed = {}
        for version in images:
            image = given.get((*version, "values"))
            if image is None:
                image = subject.versions[version][0].expand(rows, *[-1] * (ndim[version] - 1))
            told = given.get((*version, "descriptors"))
            changed[version] = subject.backbone.encode(version[0], image, None, told)
        return subject.probability(present, changed)

    backbone = subject.backbone
    ndim = {version: subject.versions[version][0].ndim for version in images}
    seen = [(*version, "values") for version in images if backbone.sees_voxels(version[0])]
    described = [(*version, "descriptors") for version in images if backbone.described(version[0])]
    centers = {spec.name: spec.descriptors.center for spec in backbone.specs if spec.descriptors}
    inputs = tuple(
        subject.versions[name, made][0] if what == "values" else subject.descriptors[name, made]
        for name, made, what in (*seen, *described)
    )
    baselines = tuple(
        torch.zeros_like(value) if what == "values" else value.new_tensor(centers[name])[None]
        for (name, _, what), value in zip((*seen, *described), inputs, strict=True)
    )
    size = sum(value.numel() * value.element_size() for value in inputs)
    fitting = max(1, _MEMORY_BYTES // (size * _ACTIVATIONS))
    while True:
        with torch.enable_grad():
            maps, delta = IntegratedGradients(forward).attribute(
                inputs,
                baselines=baselines,
                n_steps=steps,
                internal_batch_size=min(fitting, steps),
                return_convergence_delta=True,
            )
        if abs(float(delta[0])) <= MOST_ERROR or 2 * steps > most:
            break
        steps *= 2
    parts = dict(zip((*seen, *described), (m[0].detach() for m in maps), strict=True))
    found = {(name, made): parts[name, made, what].sum(0) for name, made, what in seen}
    return Saliency(
        {name: m for (name, made), m in found.items() if not made},
        {name: m for (name, made), m in found.items() if made},
        {(name, made): float(parts[name, made, what].sum()) for name, made, what in described},
        float(delta[0]),
        steps,
    )


def _sampled_shapley(subject: Subject, seed: int) -> Tensor:
    """Return Shapley values averaged over random orders in which modalities join."""
    u = len(subject.names)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(u, generator=generator) for _ in range(_PERMUTATIONS)])
    rank = order.argsort(1).to(subject.device)  # (P, u): when each one joins
    present = rank[:, None, :] < torch.arange(u + 1, device=rank.device)[None, :, None]
    worth = subject.probability(present.flatten(0, 1)).view(len(rank), u + 1)
    return torch.gather(worth.diff(dim=1), 1, rank).mean(0)
