"""What all stages of a training share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dymo_med.config import Named, Recipe
from dymo_med.imputers import IMPUTERS, Imputer, require_recovery
from dymo_med.tasks import OverClasses, answered
from dymo_med.training.loop import Log, new_weights
from dymo_med.training.objectives import ImputerObjective, record_weights
from dymo_med.types import Batch, Cohort, ModalitySpec, PatientRecord, Split


@dataclass(frozen=True)
class Run:
    """What all stages of a training share.

    Attributes:
        plan: The recipe.
        cohort: The cohort.
        specs: Modalities in canonical order, fitted.
        records: Of each split that is looked at.
        data: The same, as batches.
        device: Where to compute.
        out: Folder of the run.
        log: Of every epoch.
        stage: `train_stage` with what is the same in all of them.
    """

    plan: Recipe
    cohort: Cohort
    specs: tuple[ModalitySpec, ...]
    records: Mapping[Split, Sequence[PatientRecord]]
    data: Mapping[Split, Batch]
    device: torch.device
    out: Path
    log: Log
    stage: Callable[..., None]

    @property
    def classes(self) -> int:
        """K."""
        return len(self.cohort.task.classes)

    @property
    def task(self) -> OverClasses:
        """What is predicted, of a network that answers with K probabilities."""
        return answered(self.cohort.task)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.out / "checkpoints"


def new_imputer(run: Run, entry: Named) -> tuple[Imputer, dict[str, Any]]:
    """Return the imputer before its training, and its table name and options.

    Args:
        run: The training.
        entry: Of the recipe.
    """
    with new_weights(run.plan.seed, "imputer"):
        kind = IMPUTERS[entry.name]
        options = kind.Options(**entry.options)
        imputer = kind(run.specs, options)
    return imputer, {"name": entry.name, **options.model_dump()}


def train_imputer(run: Run, imputer: Imputer) -> None:
    """Train the imputer, unless it is ready with its first look, and leave it ready to recover.

    Args:
        run: The training.
        imputer: Before its training.
    """
    plan, data = run.plan, run.data
    assert plan.imputer is not None
    imputer.start_from(data["train"])
    require_recovery(imputer, plan.imputer.name)
    if any(True for _ in imputer.parameters()):
        run.stage(
            "imputer",
            ImputerObjective(
                imputer,
                data["validation"],
                record_weights(data["validation"]),
                run.device,
                plan.seed,
            ),
            data["train"],
            record_weights(data["train"]),
            plan.imputer_training,
            checkpoint=run.checkpoints / "imputer.safetensors",
        )
    imputer.to(run.device).eval()
