"""What is minimised and what is validated, for imputers and fusion backbones."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dymo_med.backbones import (
    EncodedVersions,
    FusionBackbone,
    encode_observed,
    encode_versions,
)
from dymo_med.config import Augmentation, BackboneTraining
from dymo_med.errors import ConfigError, Problem
from dymo_med.imputers import Imputer
from dymo_med.tasks import PLAIN, OverClasses
from dymo_med.training.gmd import Decoupling
from dymo_med.training.loop import MicroBatch, Objective, stream
from dymo_med.training.losses import distinct_subsets, prototype_loss, within
from dymo_med.types import Batch, FusionOutput

# Validation looks at every subset up to this many, and at a fixed sample of this size beyond.
_MOST_SUBSETS = 64
# Of those, in which a network is asked for what they leave out; that costs more.
_MOST_FILLED = 8
_CHUNK = 64
_MASKS = ""  # no modality has this name


def encode_all(backbone: FusionBackbone, batch: Batch, device: torch.device) -> EncodedVersions:
    """Encode every record once, in chunks.

    Args:
        backbone: The network, in evaluation mode.
        batch: n records, on any device.
        device: Where to compute and keep tokens.

    Returns:
        A `Fuse` over the n records' observed versions.
    """
    tokens, available = [], []
    for start in range(0, len(batch), _CHUNK):
        index = torch.arange(start, min(start + _CHUNK, len(batch)))
        part = encode_versions(backbone, batch.rows(index).to(device))
        tokens.append(part.observed)
        available.append(part.observed_available)
    return EncodedVersions(backbone, torch.cat(tokens), torch.cat(available), None)


def sampled_subsets(modalities: int, seed: int) -> Tensor:
    """Return the subsets that validation and calibration look at.

    Args:
        modalities: M.
        seed: Seed of the sample, where there are too many to look at all.

    Returns:
        Bool `(S, M)`: all non-empty subsets, or a fixed sample stratified by size.
    """
    if 2**modalities - 1 <= _MOST_SUBSETS:
        return distinct_subsets(modalities, 2**modalities - 1, stream(seed, "subsets"))
    generator = stream(seed, "subsets")
    sizes = torch.arange(_MOST_SUBSETS) % modalities + 1
    rank = torch.rand(_MOST_SUBSETS, modalities, generator=generator).argsort(1).argsort(1)
    subsets: Tensor = torch.unique(rank < sizes[:, None], dim=0)
    return subsets


def record_weights(batch: Batch) -> Tensor:
    """Return `(n,)` weights by which every patient counts the same, with mean 1."""
    visits = Counter(batch.patient_ids)
    weights = torch.tensor([1.0 / visits[p] for p in batch.patient_ids])
    return weights / weights.mean()


def of_known_class(batch: Batch) -> tuple[Batch, Tensor]:
    """Return the records whose class is known, and weights by which they stand for all.

    Whatever is fitted class by class is fitted on these. Where censoring hides classes, those that
    are known count for the others too (`survival.known_weights`).

    Args:
        batch: n records.

    Returns:
        The batch of R records, and weights `(R,)` with mean 1.
    """
    if batch.followed is None:
        known = batch.rows((batch.labels >= 0).nonzero().squeeze(1))
        return known, record_weights(known)
    rows = (batch.labels >= 0).nonzero().squeeze(1)
    weights = record_weights(batch)[rows] * batch.followed[rows, 2].float()
    return batch.rows(rows), weights / weights.mean()


def mask_known(batch: Batch) -> Tensor:
    """Return bool `(n,)`: whose mask is known."""
    if batch.masked is None:
        return torch.zeros(len(batch), dtype=torch.bool)
    return batch.masked


def singles(available: Tensor) -> tuple[Tensor, Tensor]:
    """Return a request for each modality that each record has.

    Args:
        available: Bool `(n, M)`.

    Returns:
        Rows `(R,)` and used modalities, one each, `(R, M)`.
    """
    rows, which = available.nonzero(as_tuple=True)
    return rows, torch.nn.functional.one_hot(which, available.shape[1]).bool()


def subset_logits(
    fuse: EncodedVersions, available: Tensor, subsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return logits of every record under every subset, cut down to what the record has.

    Args:
        fuse: Over n records.
        available: Bool `(n, M)`.
        subsets: Bool `(S, M)`.

    Returns:
        Logits `(R, K)` and the record of each `(R,)`, R = S n.
    """
    used = within(available, subsets.to(available.device)).flatten(0, 1)  # (S n, M)
    rows = torch.arange(len(available), device=available.device).repeat(len(subsets))
    return fuse(rows, used, torch.zeros_like(used)).logits, rows


class ImputerObjective(Objective):
    """The imputer's own loss; validated by the same loss on validation records.

    Args:
        imputer: What is trained.
        validation: Validation records.
        weights: `(n,)` their weights.
        device: Where to compute.
        seed: Seed of the random numbers in validation, the same every epoch.
    """

    def __init__(
        self,
        imputer: Imputer,
        validation: Batch,
        weights: Tensor,
        device: torch.device,
        seed: int,
    ) -> None:
        super().__init__()
        self.imputer = imputer
        self._validation, self._weights = validation, weights
        self._device, self._seed = device, seed

    def forward(self, step: MicroBatch) -> Tensor:
        """Return the weighted mean loss."""
        return (self.imputer.loss(step.batch, step.generator) * step.weights).mean()

    def validate(self) -> dict[str, float]:
        """Return minus the mean validation loss as `score`."""
        generator = stream(self._seed, "validate imputer")
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(self._validation), _CHUNK):
            index = torch.arange(start, min(start + _CHUNK, len(self._validation)))
            loss = self.imputer.loss(self._validation.rows(index).to(self._device), generator)
            total += (loss.double().cpu() * self._weights[index]).sum()
        return {"score": -float(total / self._weights.sum())}


class _Filled(EncodedVersions):
    """A `Fuse` in which a network that recovers fills in whatever a subset leaves out."""

    def _fuse(self, rows: Tensor, used: Tensor, admitted: Tensor) -> FusionOutput:
        available = self.observed_available[rows] & used[:, self.backbone.token_modality]
        return self.backbone.fuse(*self.backbone.fill(self.observed[rows], available))


class FusionObjective(Objective):
    """Classification or regression over random subsets, plus the prototype loss.

    Each batch is encoded once; K distinct random subsets are then fused in one call. Prototypes
    are last epoch's class means of the embedding over all subsets and batches.

    With gradient decoupling every subset's loss is an objective of its own instead (`gmd`).

    A network's own loss (`FusionBackbone.own_loss`) is added. Of one that recovers, validation
    looks at subsets as they are and, some of them, with all else recovered.

    The score is minus the mean log-loss over validation subsets: a proper score, and steadier on
    a few dozen patients than the accuracy or AUROC the published code uses. Of a regression it is
    minus the mean absolute error. The classes of a regression's prototypes are its bands.

    Args:
        backbone: What is trained.
        classes: K.
        settings: Subsets, prototype loss, augmentation.
        validation: Labelled validation records.
        weights: `(n,)` their weights.
        device: Where to compute.
        seed: Seed of the sample of validation subsets.
        task: What is predicted.
        class_weights: `(K,)` weights of the classes in the loss; None = all count the same.

    References:
        DyMo, ICLR 2026 (published code: `train_epoch`).
    """

    sums: Tensor
    counts: Tensor
    prototypes: Tensor
    known: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        backbone: FusionBackbone,
        classes: int,
        settings: BackboneTraining,
        validation: Batch,
        weights: Tensor,
        device: torch.device,
        seed: int,
        task: OverClasses = PLAIN,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self._task = task
        self._settings, self._device = settings, device
        self._validation, self._weights = validation, weights
        self._subsets = sampled_subsets(len(backbone.specs), seed)
        self._epoch = 0
        if settings.gradient == "gmd":
            if backbone.recovers:
                raise ConfigError(
                    Problem(
                        "backbone_training.gradient",
                        "gmd decouples losses of subsets, and this backbone has one of its own",
                        expected="sum, or a backbone that is trained by subsets",
                        got="gmd",
                        remedy="Use gradient: sum with it",
                    )
                )
            objectives = min(settings.subsets, 2 ** len(backbone.specs) - 1)
            specific = [p for m in backbone.specific_modules() for p in m.parameters()]
            self.decoupling = Decoupling(objectives, specific, settings.reduction)
        size = backbone.embedding_size
        self.register_buffer("class_weights", class_weights, persistent=False)
        # Buffers, so that a checkpoint holds last epoch's prototypes too.
        self.register_buffer("sums", torch.zeros(classes, size))
        self.register_buffer("counts", torch.zeros(classes))
        self.register_buffer("prototypes", torch.zeros(classes, size))
        self.register_buffer("known", torch.zeros(classes, dtype=torch.bool))

    def begin_epoch(self, epoch: int) -> None:
        """Forget the sums of the epoch before."""
        self._epoch = epoch
        self.sums.zero_()
        self.counts.zero_()

    def end_epoch(self) -> None:
        """Turn this epoch's sums into the next one's prototypes."""
        self.known.copy_(self.counts > 0)
        self.prototypes.copy_(self.sums / self.counts.clamp_min(1)[:, None])

    def begin_batch(self, generator: torch.Generator) -> None:
        """Draw the subsets of the objectives."""
        if self.decoupling is not None:
            modalities = len(self.backbone.specs)
            self._drawn = distinct_subsets(modalities, self.decoupling.objectives, generator)

    def forward(self, step: MicroBatch) -> Tensor | tuple[Tensor, ...]:
        """Return the loss averaged over subsets and records, or over records for each subset."""
        s = self._settings
        batch = augment(step.batch, s.augmentation, step.generator)
        if self.decoupling is not None:
            return self._per_subset(batch, step.weights)
        available = batch.observed.available
        subsets = distinct_subsets(available.shape[1], s.subsets, step.generator)
        used = within(available, subsets.to(available.device)).flatten(0, 1)  # (K B, M)
        copies = len(subsets)
        rows = torch.arange(len(batch), device=used.device).repeat(copies)
        fuse = encode_versions(self.backbone, batch)
        output = fuse(rows, used, torch.zeros_like(used))
        loss = self._loss(output, batch, rows)
        total = (loss * step.weights.repeat(copies)).mean()
        if s.auxiliary:
            total = total + s.auxiliary * self._alone(fuse, batch, step.weights)
        own = self.backbone.own_loss(
            batch,
            self._epoch / s.epochs,
            lambda logits: self._task.loss(logits, batch.truth, self.class_weights),
            step.generator,
        )
        return total if own is None else total + (own * step.weights).mean()

    def _alone(self, fuse: EncodedVersions, batch: Batch, weights: Tensor) -> Tensor:
        """Return the mean loss of answers from one modality each, over those that records have."""
        rows, used = singles(batch.observed.available)
        logits = fuse(rows, used, torch.zeros_like(used)).logits
        loss = self._task.loss(logits, batch.truth[rows], self.class_weights)
        return (loss * weights[rows]).mean()

    def _per_subset(self, batch: Batch, weights: Tensor) -> tuple[Tensor, ...]:
        """Return the loss of each subset, averaged over records.

        Records that have nothing of a subset count 0 in its loss. Each modality is encoded once;
        only a subset's own modalities take part in its backward pass.
        """
        encoded = encode_observed(self.backbone, batch)
        available = batch.observed.available
        token_available = torch.cat([tokens.available for tokens in encoded], dim=1)
        losses = []
        for subset in self._drawn.to(available.device):
            used = available & subset
            rows = used.any(1).nonzero().squeeze(1)
            if not len(rows):
                losses.append(torch.zeros((), device=available.device))
                continue
            parts = [
                tokens.values if inside else tokens.values.detach()
                for tokens, inside in zip(encoded, subset.tolist(), strict=True)
            ]
            fuse = EncodedVersions(self.backbone, torch.cat(parts, dim=1), token_available, None)
            output = fuse(rows, used[rows], torch.zeros_like(used[rows]))
            loss = self._loss(output, batch, rows) * weights[rows]
            losses.append(loss.sum() / len(batch))
        return tuple(losses)

    def _loss(self, output: FusionOutput, batch: Batch, rows: Tensor) -> Tensor:
        """Return the loss per row `(R,)`, and add the rows to this epoch's sums."""
        s = self._settings
        labels = batch.labels[rows]
        loss = self._task.loss(output.logits, batch.truth[rows], self.class_weights)
        with torch.no_grad():
            sure = labels >= 0  # a censored patient's bin is not known
            z, of = output.embedding.detach().to(self.sums.dtype)[sure], labels[sure]
            self.sums.index_add_(0, of, z)
            self.counts.index_add_(0, of, torch.ones_like(of, dtype=self.counts.dtype))
        if self._epoch >= s.prototype_epoch:
            apart = prototype_loss(
                output.embedding,
                labels.clamp_min(0),
                self.prototypes,
                self.known,
                self.backbone.distance,
                s.prototype_temperature,
            )
            loss = loss + s.prototype_weight * apart.where(sure, apart.new_zeros(()))
        return loss

    def validate(self) -> dict[str, float]:
        """Return `score`, log-loss and, for two classes, AUROC over subsets."""
        fuse = encode_all(self.backbone, self._validation, self._device)
        available = self._validation.observed.available.to(self._device)
        logits, rows = subset_logits(fuse, available, self._subsets)
        if self.backbone.recovers:
            filled = _Filled(self.backbone, fuse.observed, fuse.observed_available, None)
            some = self._subsets[:: -(-len(self._subsets) // _MOST_FILLED)]
            more, again = subset_logits(filled, available, some)
            logits, rows = torch.cat([logits, more]), torch.cat([rows, again])
        return {**self._figures(logits, rows), **self._figures_alone(fuse, available)}

    def _figures(self, logits: Tensor, rows: Tensor) -> dict[str, float]:
        """Return what is thought of answers `(R, K)` about validation records `(R,)`."""
        rows = rows.cpu()
        truth, weights = self._validation.truth[rows], self._weights[rows]
        return self._task.figures(logits.cpu(), truth, weights)

    def _figures_alone(self, fuse: EncodedVersions, available: Tensor) -> dict[str, float]:
        """Return the score of each modality alone, over the records that have it."""
        rows, used = singles(available)
        logits = fuse(rows, used, torch.zeros_like(used)).logits
        which, found = used.to(torch.uint8).argmax(1), {}
        for m, spec in enumerate(self.backbone.specs):
            mine = which == m
            if bool(mine.any()):
                found[f"only_{spec.name}"] = self._figures(logits[mine], rows[mine])["score"]
        return found


def _turned(image: Tensor, chance: Tensor, settings: Augmentation, exact: bool) -> Tensor:
    """Return images turned about their centre and made larger or smaller.

    Args:
        image: `(B, C, *spatial)`.
        chance: `(B, 4)`, from -1 to 1: of the turn about each axis, and of the size.
        settings: How far.
        exact: Whether values are labels, of which none lies between two others.
    """
    b, axes = len(image), image.ndim - 2
    angle = chance[:, :3] * math.radians(settings.rotate_degrees)
    cosine, sine = angle.cos(), angle.sin()
    matrix = torch.eye(axes).expand(b, axes, axes).clone()
    planes = ((0, 1), (1, 2), (0, 2)) if axes == 3 else ((0, 1),)
    for k, (i, j) in enumerate(planes):
        turn = torch.eye(axes).expand(b, axes, axes).clone()
        turn[:, i, i] = turn[:, j, j] = cosine[:, k]
        turn[:, i, j], turn[:, j, i] = -sine[:, k], sine[:, k]
        matrix = matrix @ turn
    # Angles are those of the world, and the grid's own coordinates run from -1 to 1 on each axis.
    sides = torch.tensor(image.shape[2:], dtype=torch.float32).flip(0)
    matrix = matrix * sides / sides[:, None] * (1 + settings.scale * chance[:, 3, None, None])
    theta = torch.cat([matrix, torch.zeros(b, axes, 1)], dim=2).to(image.device)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    mode = "nearest" if exact else "bilinear"
    moved: Tensor = F.grid_sample(image.float(), grid, mode=mode, align_corners=False)
    return moved.to(image.dtype)


def augment(batch: Batch, settings: Augmentation, generator: torch.Generator) -> Batch:
    """Return the batch with its images, and their masks, changed at random; tables stay.

    Args:
        batch: B records.
        settings: What may change.
        generator: CPU generator.
    """
    if settings == Augmentation():
        return batch
    values = dict(batch.values)
    if batch.masks is not None:  # moved like the images, but its labels stay
        values[_MASKS] = batch.masks[:, None]
    b = len(batch)
    mirror = torch.rand(b, 3, generator=generator) < 0.5
    most = settings.shift_voxels
    shift = [int(torch.randint(-most, most + 1, (1,), generator=generator)) for _ in range(3)]
    turned = settings.rotate_degrees or settings.scale
    chance = 2 * torch.rand(b, 4, generator=generator) - 1 if turned else torch.zeros(b, 4)
    for name, image in values.items():
        if image.ndim < 4:  # a table
            continue
        axes = image.ndim - 2
        if turned:
            image = _turned(image, chance, settings, exact=name == _MASKS)
        for axis in settings.mirror_axes:
            if axis < axes:
                flip = mirror[:, axis].to(image.device).view(b, *(1,) * (image.ndim - 1))
                image = torch.where(flip, image.flip(2 + axis), image)
        image = image.roll(shift[:axes], dims=tuple(range(2, image.ndim)))
        if settings.intensity and name != _MASKS:
            noise = torch.randn(2, b, *(1,) * (image.ndim - 1), generator=generator)
            noise = (noise * settings.intensity).to(image.device)
            # Background is exactly 0 and stays so.
            image = torch.where(image == 0, image, image * (1 + noise[0]) + noise[1])
        values[name] = image
    masks = values.pop(_MASKS, None)
    return replace(batch, values=values, masks=None if masks is None else masks[:, 0])
