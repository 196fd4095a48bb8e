"""Training of comparators, to the backbone's schedule and with its probability calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dymo_med.comparators import COMPARATORS, Comparator, FittedComparator
from dymo_med.comparators.base import narrowed
from dymo_med.config import Augmentation, Recipe, Schedule
from dymo_med.tasks import PLAIN, OverClasses
from dymo_med.training.calibration import fit_temperature
from dymo_med.training.loop import Log, MicroBatch, Objective, new_weights
from dymo_med.training.losses import within
from dymo_med.training.objectives import (
    augment,
    sampled_subsets,
)
from dymo_med.types import Batch, ModalitySpec, Split

_CHUNK = 64


class RunStage(Protocol):
    """`train_stage` with all that is the same for every stage of a run."""

    def __call__(
        self,
        name: str,
        objective: Objective,
        data: Batch,
        weights: Tensor,
        schedule: Schedule,
        *,
        checkpoint: Path,
    ) -> None:
        """See `train_stage`."""
        ...


class ComparatorObjective(Objective):
    """A comparator's own loss; its score is that of the fusion backbone.

    The loss of an answer is that of the backbone too. The score is minus the mean log-loss, or of
    a regression the mean absolute error, over validation records and subsets of their modalities.

    Args:
        comparator: What is trained.
        augmentation: Random changes of training images.
        validation: Labelled validation records, each with one of its modalities.
        weights: `(n,)` their weights.
        device: Where to compute.
        seed: Seed of the sample of validation subsets.
        task: What is predicted.
        class_weights: `(K,)` weights of the classes in the loss; None = all count the same.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        comparator: Comparator,
        augmentation: Augmentation,
        validation: Batch,
        weights: Tensor,
        device: torch.device,
        seed: int,
        task: OverClasses = PLAIN,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.comparator = comparator
        self._task = task
        self.register_buffer("class_weights", class_weights, persistent=False)
        self._augmentation = augmentation
        self._validation, self._weights = validation, weights
        self._device, self._seed = device, seed

    def forward(self, step: MicroBatch) -> Tensor:
        """Return the weighted mean loss."""
        batch = augment(step.batch, self._augmentation, step.generator)
        loss = self.comparator.loss(batch, step.generator, self._task_loss)
        return (loss * step.weights).mean()

    def _task_loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        return self._task.loss(logits, truth, self.class_weights)

    def validate(self) -> dict[str, float]:
        """Return `score` and, for two classes, AUROC over subsets."""
        return _figures(
            *(self.comparator, self._validation, self._weights, self._device, self._seed),
            self._task,
        )


def train_comparators(
    plan: Recipe,
    specs: Sequence[ModalitySpec],
    classes: int,
    labelled: Mapping[Split, Batch],
    weights: Mapping[Split, Tensor],
    run_stage: RunStage,
    log: Log,
    checkpoints: Path,
    device: torch.device,
    task: OverClasses = PLAIN,
    class_weights: Tensor | None = None,
) -> dict[str, FittedComparator]:
    """Train every comparator that a recipe names, on what the backbone is trained on.

    Args:
        plan: The recipe.
        specs: Modalities in canonical order, fitted.
        classes: K.
        labelled: Labelled records of `train`, `validation` and `calibration`, on the CPU; of the
            last those that the temperature is fitted on.
        weights: Theirs `(n,)`, by which every patient counts the same.
        run_stage: Trains one stage.
        log: Where stages leave their figures.
        checkpoints: Folder of the checkpoints.
        device: Where to compute.
        task: What is predicted.
        class_weights: `(K,)` weights of the classes in the loss; None = all count the same.

    Returns:
        By name, in the recipe's order; in evaluation mode.
    """
    found = {}
    for entry in plan.comparators:
        kind = COMPARATORS[entry.name]
        options = kind.Options.model_validate(entry.options)
        with new_weights(plan.seed, f"comparator {entry.name}"):
            comparator = kind(specs, classes, options)
        best_epoch = {}
        for part_name, part in comparator.parts().items():
            stage = f"comparator {entry.name} {part_name}".rstrip()
            data, rows = narrowed(labelled["train"], part.specs)
            if not len(rows):  # nothing to learn from; the backbone's encoder is no better off
                continue
            held, held_rows = narrowed(labelled["validation"], part.specs)
            held_weights = weights["validation"][held_rows]
            if not len(held_rows):
                # An epoch has to be chosen on something.
                held, held_weights = data, weights["train"][rows]
            share = weights["train"][rows]
            run_stage(
                stage,
                ComparatorObjective(
                    part,
                    plan.backbone_training.augmentation,
                    held,
                    held_weights,
                    device,
                    plan.seed,
                    task,
                    class_weights,
                ),
                data,
                share / share.mean(),
                plan.backbone_training,
                checkpoint=checkpoints / f"{stage.replace(' ', '-')}.safetensors",
            )
            best_epoch[stage] = log.best_epoch(stage)
        comparator.to(device).eval()
        comparator.finish(labelled["validation"], weights["validation"], task)
        figures = _figures(
            comparator, labelled["validation"], weights["validation"], device, plan.seed, task
        )
        error = {task.error_key: -figures.pop("score")}
        fitting = labelled["calibration"]
        logits, rows = _logits(comparator, fitting, device, plan.seed)
        temperature = 1.0  # of a regression: another would move the answers themselves
        if task.calibrated:
            temperature = fit_temperature(
                logits, fitting.truth[rows], [fitting.patient_ids[i] for i in rows.tolist()]
            )
        found[entry.name] = FittedComparator(
            comparator,
            options.model_dump(),
            temperature,
            best_epoch,
            {**error, **figures},
        )
    return found


@torch.no_grad()
def _logits(
    comparator: Comparator, batch: Batch, device: torch.device, seed: int
) -> tuple[Tensor, Tensor]:
    """Return logits of every record under every sampled subset, cut down to what it has.

    Args:
        comparator: In evaluation mode.
        batch: n records, on the CPU.
        device: Where to compute.
        seed: Seed of the sample of subsets.

    Returns:
        Logits `(R, K)` and the record of each `(R,)`, R = S n, on the CPU.
    """
    subsets = sampled_subsets(len(comparator.specs), seed)
    used = within(batch.observed.available, subsets)  # (S, n, M)
    parts = [
        comparator.under(batch.rows(rows).to(device), used[:, rows].to(device)).cpu()
        for rows in torch.arange(len(batch)).split(_CHUNK)
    ]
    return torch.cat(parts, dim=1).flatten(0, 1), torch.arange(len(batch)).repeat(len(subsets))


def _figures(
    comparator: Comparator,
    batch: Batch,
    weights: Tensor,
    device: torch.device,
    seed: int,
    task: OverClasses,
) -> dict[str, float]:
    """Return `score` and AUROC over the sampled subsets of labelled records."""
    logits, rows = _logits(comparator, batch, device, seed)
    return task.figures(logits, batch.truth[rows], weights[rows])
