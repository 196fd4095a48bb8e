"""Training of a segmentation network, and of the choice which recovered scans to trust."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dymo_med.backbones import SEGMENTERS, Readout, SharedUNet, Windows, dense_versions
from dymo_med.backbones.dense import slide
from dymo_med.bundle_segmentation import SegmentationBundle, Trust
from dymo_med.config import BackboneTraining, Recipe
from dymo_med.data.masks import decided, dice, regions_of
from dymo_med.errors import ConfigError, Problem
from dymo_med.imputers import Imputer
from dymo_med.metrics import bootstrap_means
from dymo_med.selection import SELECTORS, Selector, fit_statistics
from dymo_med.tasks import Segmentation
from dymo_med.training.gmd import Decoupling
from dymo_med.training.loop import MicroBatch, Objective, new_weights, stream
from dymo_med.training.losses import distinct_subsets, soft_dice_loss, within
from dymo_med.training.objectives import augment, sampled_subsets
from dymo_med.training.selectors import hide
from dymo_med.types import (
    Batch,
    Choice,
    Cohort,
    FusionOutput,
    MaskSpec,
    ModalitySpec,
    Split,
    SubsetStatistics,
)

CLASSES = ("small", "medium", "large")
SELECTABLE = ("observed_only", "trust_all", "dymo")
_REPEATS = 4  # times that scans are hidden from each calibration record
# On fewer patients a difference between selectors is an accident.
_FEWEST = 10


def train_segmentation(
    plan: Recipe,
    described: Cohort,
    specs: tuple[ModalitySpec, ...],
    data: Mapping[Split, Batch],
    weights: Mapping[Split, Tensor],
    imputer: Imputer | None,
    imputer_entry: Mapping[str, Any] | None,
    run_stage: Callable[..., None],
    checkpoints: Path,
    device: torch.device,
) -> SegmentationBundle:
    """Train the network and, where there is an imputer, fit what selects.

    Args:
        plan: The recipe.
        described: The cohort, of a segmentation.
        specs: Its modalities.
        data: Records whose mask is known, by split.
        weights: Their weights.
        imputer: In evaluation mode, on `device`; None = nothing is recovered.
        imputer_entry: Its table name and options.
        run_stage: `train_stage` with what all stages share.
        checkpoints: Folder of the checkpoints.
        device: Where to compute.

    Returns:
        The bundle, without provenance.

    Raises:
        ConfigError: If the recipe is for another task, or does not fit the cohort's grid.
    """
    task = described.task
    if not isinstance(task, Segmentation):
        raise ValueError("The cohort's task is no segmentation.")
    mask = task.mask
    network, entry = _network(plan, specs, len(mask.regions))
    grid = specs[0].shape[1:]
    crop = plan.backbone_training.crop
    if crop is not None and any(c > n for c, n in zip(crop, grid, strict=True)):
        raise ConfigError(
            Problem(
                f"Recipe {plan.name} backbone_training.crop",
                "the crop is larger than the grid of the scans",
                expected=f"at most {' x '.join(map(str, grid))} voxels",
                got=" x ".join(map(str, crop)),
                remedy="Make it smaller, or leave it out to train on whole grids",
            )
        )
    windows = Windows(tuple(crop or grid), body=crop is not None)
    objective = SegmentationObjective(
        network,
        mask,
        plan.backbone_training,
        data["validation"],
        weights["validation"],
        windows,
        device,
        plan.seed,
    )
    run_stage(
        "backbone",
        objective,
        data["train"],
        weights["train"],
        plan.backbone_training,
        checkpoint=checkpoints / "backbone.safetensors",
    )
    trust = None
    if imputer is not None and imputer_entry is not None:
        readout, statistics = fit_readout(
            network, data["train"], weights["train"], mask, windows, device
        )
        selectors, choice = choose_selector(
            network,
            imputer,
            readout,
            statistics,
            data["calibration"],
            mask,
            windows,
            plan.seed,
            device,
        )
        trust = Trust(imputer, imputer_entry, readout, statistics, selectors, choice)
    return SegmentationBundle(
        name=plan.name,
        description=plan.description,
        task=task,
        specs=specs,
        missing_values=described.missing_values,
        network=network,
        backbone_entry=entry,
        windows=windows,
        trust=trust,
        provenance={},
        device=device,
    )


def _network(
    plan: Recipe, specs: tuple[ModalitySpec, ...], regions: int
) -> tuple[SharedUNet, dict[str, Any]]:
    """Return the network with its first weights, and its table name and options.

    Raises:
        ConfigError: If the recipe names no segmentation network, or asks for what only
            classifiers have.
    """
    if plan.backbone.name not in SEGMENTERS or plan.comparators or plan.selector is not None:
        raise ConfigError(
            Problem(
                f"Recipe {plan.name}",
                "the recipe is not for a segmentation",
                expected=f"a backbone out of {', '.join(SEGMENTERS)}, no selector, no comparators",
                got=f"backbone {plan.backbone.name}",
                remedy="Choose another recipe, or a cohort description with another task",
            )
        )
    kind = SEGMENTERS[plan.backbone.name]
    options = kind.Options(**plan.backbone.options)
    with new_weights(plan.seed, "backbone"):
        network = kind(specs, regions, options)
    return network, {"name": plan.backbone.name, **options.model_dump()}


class SegmentationObjective(Objective):
    """One soft Dice loss per subset of modalities.

    Each batch goes through the trunk once per modality; every subset's loss is that of the mean
    of its logits. The score is the Dice overlap (probability above 0.5, case by case) averaged
    over regions, subsets and validation patients.

    Deviations from the published code: the score is taken on validation patients, not on those
    that are reported; absent scans are left out of a patient's subsets. Where gradients are
    decoupled, a patient who has nothing of a subset counts nothing in its loss (`own_dice_loss`);
    else all his scans stand in for it.

    Args:
        network: What is trained.
        mask: Labels and regions.
        settings: Subsets, augmentation, crop.
        validation: Validation records whose mask is known.
        weights: `(n,)` their weights.
        windows: How whole scans are looked at.
        device: Where to compute.
        seed: Seed of the sample of validation subsets.

    References:
        Wang et al., Gradient-guided Modality Decoupling for Missing-Modality Robustness, AAAI
        2024 (published code: `utils/loss.py`).
    """

    def __init__(
        self,
        network: SharedUNet,
        mask: MaskSpec,
        settings: BackboneTraining,
        validation: Batch,
        weights: Tensor,
        windows: Windows,
        device: torch.device,
        seed: int,
    ) -> None:
        super().__init__()
        self.network = network
        self._mask, self._settings, self._windows = mask, settings, windows
        self._validation, self._weights, self._device = validation, weights, device
        self._subsets = sampled_subsets(len(network.specs), seed)
        self._drawn = self._subsets
        if settings.gradient == "gmd":
            objectives = min(settings.subsets, 2 ** len(network.specs) - 1)
            specific = [p for m in network.specific_modules() for p in m.parameters()]
            self.decoupling = Decoupling(objectives, specific, settings.reduction)

    def begin_batch(self, generator: torch.Generator) -> None:
        """Draw the subsets of a batch."""
        modalities, count = len(self.network.specs), self._settings.subsets
        self._drawn = distinct_subsets(modalities, count, generator)

    def losses(self, step: MicroBatch) -> tuple[Tensor, ...]:
        """Return the loss of each subset of a batch."""
        s = self._settings
        batch = augment(
            random_crop(step.batch, s.crop, step.generator, s.crop_lesion),
            s.augmentation,
            step.generator,
        )
        available = batch.observed.available
        target = regions_of(_known(batch.masks), self._mask)
        with torch.autocast(
            available.device.type, torch.bfloat16, enabled=available.device.type == "cuda"
        ):
            found = self.network.outputs(batch.values, available)
        logits = [None if x is None else x.logits.float() for x in found]
        subsets = self._drawn.to(available.device)
        if self.decoupling is not None:
            return tuple(
                own_dice_loss(logits, used, target, step.weights)
                for used in subsets[:, None] & available
            )
        return tuple(
            soft_dice_loss(torch.sigmoid(SharedUNet.combine(logits, used)), target, step.weights)
            for used in within(available, subsets)
        )

    def forward(self, step: MicroBatch) -> Tensor | tuple[Tensor, ...]:
        """Return the losses of the subsets, or their mean where gradients are not decoupled."""
        losses = self.losses(step)
        return torch.stack(losses).mean() if self.decoupling is None else losses

    def validate(self) -> dict[str, float]:
        """Return `score`, and the Dice of complete records and of the worst subset."""
        overlap = np.stack(
            [
                self._of_record(self._validation.rows(torch.tensor([i])).to(self._device))
                for i in range(len(self._validation))
            ]
        )  # (n, S)
        weights = self._weights.double().numpy()
        by_subset = weights @ overlap / weights.sum()
        everything = int(self._subsets.sum(1).argmax())
        return {
            "score": float(by_subset.mean()),
            "all": float(by_subset[everything]),
            "worst": float(by_subset.min()),
        }

    def _of_record(self, batch: Batch) -> np.ndarray:
        """Return the mean Dice over regions of one record under every subset, `(S,)`."""
        # The epoch is chosen on a quick look: windows side by side.
        versions = dense_versions(self.network, batch, replace(self._windows, overlap=0.0))
        true = regions_of(_known(batch.masks)[0], self._mask)
        row = torch.zeros(1, dtype=torch.int64, device=self._device)
        found = []
        for used in within(batch.observed.available, self._subsets.to(self._device)):
            probabilities = torch.sigmoid(versions.logits(row, used, torch.zeros_like(used))[0])
            overlap = float(dice(decided(probabilities, self._mask), true).mean())
            # What is not a number is in no region: that would be a score like any other.
            found.append(overlap if bool(probabilities.isfinite().all()) else np.nan)
        return np.array(found)


def own_dice_loss(
    logits: Sequence[Tensor | None], used: Tensor, target: Tensor, weights: Tensor
) -> Tensor:
    """Return the soft Dice loss of one subset over the records that have any of it, a scalar.

    The loss is scaled by the share of the batch's weight that these records have, so that a
    record counts the same in the loss of a subset that few have as in that of one that all have.

    Args:
        logits: M tensors `(B, R, *spatial)`, in canonical order; None where nobody has the scan.
        used: Bool `(B, M)`: what each record has of the subset.
        target: Bool `(B, R, *spatial)`.
        weights: `(B,)`.

    Returns:
        0, which depends on no parameter, where no record has any of it.
    """
    rows = used.any(1).nonzero().squeeze(1)
    if not len(rows):
        return weights.new_zeros(())
    share = weights[rows].sum() / weights.sum()
    if len(rows) < len(used):  # scans are large: they are copied only where some are left out
        logits = [None if x is None else x[rows] for x in logits]
        used, target, weights = used[rows], target[rows], weights[rows]
    return share * soft_dice_loss(torch.sigmoid(SharedUNet.combine(logits, used)), target, weights)


def random_crop(
    batch: Batch, size: Sequence[int] | None, generator: torch.Generator, lesion: float = 0.0
) -> Batch:
    """Return a random part of every record, the same for all its scans and its mask.

    A part lies where the record's scans hold something besides zeros, as far as it fits.

    Args:
        batch: B records.
        size: Voxels along each axis; None = all of it.
        generator: CPU generator.
        lesion: Share of the parts that hold a random voxel of the record's lesion, if it has one.
    """
    if size is None:
        return batch
    masks = _known(batch.masks)
    boxes = []
    for i in range(len(batch)):
        body = torch.stack([v[i, 0] != 0 for v in batch.values.values()]).any(0)
        held = None
        if lesion and float(torch.rand((), generator=generator)) < lesion:
            voxels = masks[i].nonzero()
            if len(voxels):
                held = voxels[int(torch.randint(len(voxels), (), generator=generator))].tolist()
        box = []
        for axis, (n, s) in enumerate(zip(masks.shape[1:], size, strict=True)):
            others = tuple(a for a in range(3) if a != axis)
            some = body.any(dim=others).nonzero().flatten().tolist() or [0, n - 1]
            # A part that is longer than the body holds all of it.
            places = sorted((some[0], some[-1] + 1 - s))
            first, last = 0, n - s
            if held is not None:
                first, last = max(first, held[axis] - s + 1), min(last, held[axis])
            low, high = (max(first, min(place, last)) for place in places)
            start = int(torch.randint(low, high + 1, (), generator=generator))
            box.append(slice(start, start + s))
        boxes.append(tuple(box))

    def cut(values: Tensor) -> Tensor:
        return torch.stack([v[(..., *box)] for v, box in zip(values, boxes, strict=True)])

    return replace(batch, values={n: cut(v) for n, v in batch.values.items()}, masks=cut(masks))


def fit_readout(
    network: SharedUNet,
    batch: Batch,
    weights: Tensor,
    mask: MaskSpec,
    windows: Windows,
    device: torch.device,
) -> tuple[Readout, SubsetStatistics]:
    """Fit how the selection reads a segmentation, on training patients' real scans.

    The classes are thirds of the training records by the volume of the first region. A class's
    prototype is the mean of the pooled embedding, standardised feature by feature and brought to
    unit length.

    Args:
        network: In evaluation mode, on `device`.
        batch: n training records whose mask is known.
        weights: `(n,)`.
        mask: Labels and regions.
        windows: How to look at scans.
        device: Where to compute.

    Returns:
        The readout and the statistics of what it reads, on the CPU.
    """
    voxel_ml = float(np.prod(network.specs[0].spacing_mm)) / 1000  # all scans are on one grid
    voxels = torch.stack([regions_of(m, mask)[0].sum() for m in _known(batch.masks)])
    volume = torch.log1p(voxels.double() * voxel_ml)
    # By rank, so that every class has records even where volumes are equal.
    labels = volume.argsort(stable=True).argsort() * len(CLASSES) // len(volume)
    centres = torch.stack([volume[labels == k].mean() for k in range(len(CLASSES))])
    spread = (volume - centres[labels]).square().mean().sqrt().clamp_min(0.1)
    available = batch.observed.available
    pooled = torch.zeros(len(batch), len(network.specs), network.embedding_size)
    with torch.no_grad():
        for m, one in enumerate(network.specs):
            for row in available[:, m].nonzero().squeeze(1).tolist():
                scan = batch.values[one.name][[row]].to(device)
                pooled[row, m] = slide(network, one.name, scan, windows).embedding[0].cpu()
    subsets = sampled_subsets(len(network.specs), 0)
    used = within(available, subsets).flatten(0, 1)
    means = SharedUNet.combine(pooled.repeat(len(subsets), 1, 1), used)
    readout = Readout(
        centres.float(),
        spread.float(),
        means.mean(0),
        means.std(0),
        torch.tensor(voxel_ml),
    )

    def fuse(rows: Tensor, used: Tensor, admitted: Tensor) -> FusionOutput:
        embedding = readout.embedded(SharedUNet.combine(pooled[rows], used))
        return FusionOutput(embedding.new_zeros(len(rows), len(CLASSES)), embedding)

    statistics = fit_statistics(fuse, available, labels, weights, len(CLASSES), "cosine")
    return readout, statistics


def choose_selector(
    network: SharedUNet,
    imputer: Imputer,
    readout: Readout,
    statistics: SubsetStatistics,
    batch: Batch,
    mask: MaskSpec,
    windows: Windows,
    seed: int,
    device: torch.device,
) -> tuple[dict[str, Selector], Choice]:
    """Compare selectors on calibration records with scans hidden, and pick the default.

    Recovered scans are not used unless that pays: another selector than `observed_only` becomes
    the default only if its mean Dice is higher by a margin whose 95 % interval is above 0.

    Args:
        network: In evaluation mode, on `device`.
        imputer: Likewise.
        readout: See `fit_readout`.
        statistics: Likewise.
        batch: Calibration records whose mask is known.
        mask: Labels and regions.
        windows: How to look at scans.
        seed: Decides what is hidden.
        device: Where to compute.

    Returns:
        The selectors by name, and the choice.
    """
    selectors = {name: SELECTORS[name]() for name in SELECTABLE}
    found: list[list[float]] = []
    owners: list[str] = []
    here = statistics.to(device)
    for repeat in range(_REPEATS):
        hidden = hide(batch, stream(seed, "hide", repeat))
        for i in range(len(hidden)):
            part = hidden.rows(torch.tensor([i])).to(device)
            recovery = imputer.recover(part)
            if not bool(recovery.candidates.any()):
                continue
            versions = dense_versions(network, part, windows, recovery, readout.to(device))
            true = regions_of(_known(part.masks)[0], mask)
            row = torch.zeros(1, dtype=torch.int64, device=device)
            line = []
            for selector in selectors.values():
                trace = selector.select(versions, part.observed, recovery.candidates, here)
                logits = versions.logits(row, trace.used, trace.admitted)[0]
                line.append(float(dice(decided(torch.sigmoid(logits), mask), true).mean()))
            found.append(line)
            owners.append(part.patient_ids[0])
    return selectors, _pick(np.array(found).reshape(-1, len(selectors)), owners)


def _pick(overlap: np.ndarray, owners: Sequence[str]) -> Choice:
    """Return the default, from the Dice `(cases, selectors)` of cases of these patients."""
    gains = overlap - overlap[:, :1]
    means = bootstrap_means(np.concatenate([overlap, gains], 1), owners)
    results = {}
    best, margin = SELECTABLE[0], 0.0
    patients = len(set(owners))
    for j, name in enumerate(SELECTABLE):
        gain = means[len(SELECTABLE) + j]
        results[name] = {
            "dice": means[j].value,
            "gain": gain.value,
            "gain_low": gain.low,
            "gain_high": gain.high,
        }
        if patients >= _FEWEST and gain.low > 0 and gain.value > margin:
            best, margin = name, gain.value
    why = (
        f"On calibration patients with scans hidden its mean Dice is higher by {margin:.3f} than"
        " that of the observed scans alone."
        if margin
        else "On calibration patients with scans hidden nothing did surely better than the observed"
        " scans alone."
    )
    return Choice(best, why, results, patients)


def _known(masks: Tensor | None) -> Tensor:
    """Return the masks of a batch whose masks are known."""
    if masks is None:
        raise ValueError("No record of the batch has a mask.")
    return masks
