"""Training of a network that fuses modalities, and of everything that answers by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dymo_med import novelty
from dymo_med.backbones import BACKBONES, FusionBackbone, as_one
from dymo_med.bundle import ModelBundle, save_bundle
from dymo_med.data.gate import fit_norms
from dymo_med.errors import ConfigError, Problem
from dymo_med.novelty import Novelty
from dymo_med.references import References, features_of, layout_of
from dymo_med.selection import fit_statistics
from dymo_med.training import draw_checks
from dymo_med.training.answers import fit_answers, part
from dymo_med.training.comparators import train_comparators
from dymo_med.training.loop import new_weights
from dymo_med.training.objectives import FusionObjective, encode_all, of_known_class, record_weights
from dymo_med.training.records import provenance_of
from dymo_med.training.references import train_references, warning_of
from dymo_med.training.run import Run, new_imputer, train_imputer
from dymo_med.training.use import warnings_of
from dymo_med.types import Batch, Split, SubsetStatistics


@dataclass(frozen=True)
class _Networks:
    """The backbone, trained or not.

    Attributes:
        stages: Name of the stage that trains each network.
        networks: Whose mean the backbone is.
        backbone: The one.
        entry: Its table name and options.
    """

    stages: Sequence[str]
    networks: Sequence[FusionBackbone]
    backbone: FusionBackbone
    entry: Mapping[str, Any]


def fit_fusion(run: Run, named: str, warn: Callable[[str], None] | None) -> Path:
    """Train and fit everything, and write the bundle; see `train`.

    Args:
        run: What all stages share.
        named: File of the recipe, for messages.
        warn: Told what the user should know.

    Returns:
        The bundle's folder.

    Raises:
        ConfigError: If the recipe is for another task.
    """
    plan, device = run.plan, run.device
    imputer = imputer_entry = None
    if plan.imputer is not None:
        imputer, imputer_entry = new_imputer(run, plan.imputer)
    if imputer is None or imputer_entry is None or plan.backbone.name not in BACKBONES:
        raise ConfigError(
            Problem(
                named,
                "the recipe is for a segmentation",
                expected=f"an imputer, and a backbone out of {', '.join(BACKBONES)}",
                remedy=f"Choose another recipe: cohort {run.cohort.name} is a classification",
            )
        )
    made = _new_networks(run)
    # An imputer that shares the backbone's weights needs them trained; others come first.
    tied = imputer.tie(made.backbone)
    if not tied:
        train_imputer(run, imputer)
    labelled = {s: b.rows(run.task.known_rows(b).nonzero().squeeze(1)) for s, b in run.data.items()}
    adjusting, held_back = part(labelled["validation"], labelled["calibration"], plan.seed)
    balance = _train_networks(run, made, labelled)
    if tied:
        train_imputer(run, imputer)
    fitted_on = {**labelled, "calibration": adjusting}
    comparators = train_comparators(
        plan,
        run.specs,
        run.classes,
        fitted_on,
        {s: record_weights(b) for s, b in labelled.items()},
        run.stage,
        run.log,
        run.checkpoints,
        device,
        run.task,
        balance,
    )
    statistics, references = _fit_plain(run, made.backbone, fitted_on)
    answering = fit_answers(
        plan,
        imputer,
        made.backbone,
        statistics,
        references,
        labelled["validation"],
        adjusting,
        held_back,
        device,
        run.task,
    )
    bundle = ModelBundle(
        name=plan.name,
        description=plan.description,
        task=run.task,
        specs=run.specs,
        missing_values=run.cohort.missing_values,
        imputer=imputer,
        imputer_entry=imputer_entry,
        backbone=made.backbone,
        backbone_entry=made.entry,
        selectors=answering.selectors,
        choice=answering.choice,
        statistics=statistics,
        calibration=answering.calibration,
        base_rates=_shares(labelled["train"], run.classes),
        comparators=comparators,
        references=answering.references,
        novelty=_fit_novelty(run),
        use=answering.use,
        draw_check=answering.draw_check,
        conformal=answering.conformal,
        performance=answering.performance,
        provenance=provenance_of(plan, run.cohort, run.data, labelled, run.log),
        norms=fit_norms(run.specs, run.records["train"], run.cohort.quality),
    )
    save_bundle(bundle, run.out / "bundle")
    if warn is not None:
        texts = [
            warning_of(answering.references),
            *warnings_of(answering.use),
            *draw_checks.warnings_of(
                answering.draw_check, plan.imputer.name if plan.imputer else ""
            ),
        ]
        for text in filter(None, texts):
            warn(text)
    return run.out / "bundle"


def _fit_novelty(run: Run) -> Novelty:
    """Return what is usual among training patients, and how unusual held-back ones are.

    Labels have no part in it, so patients without one count too; of each patient the first record.
    """
    layout = layout_of(run.specs)

    def features(*splits: Split) -> Tensor:
        found, seen = [], set[str]()
        for split in splits:
            batch = run.data[split]
            each = features_of(batch, run.specs)
            for row, patient in enumerate(batch.patient_ids):
                if patient not in seen:
                    seen.add(patient)
                    found.append(each[row])
        return torch.stack(found)

    return novelty.fit(
        features("train"),
        features("validation", "calibration"),
        layout.owner,
        layout.categories,
        [spec.name for spec in run.specs],
        run.plan.seed,
    )


def _new_networks(run: Run) -> _Networks:
    """Return the backbone before its training.

    Raises:
        ConfigError: If networks are to be averaged that cannot be.
    """
    plan = run.plan
    kind = BACKBONES[plan.backbone.name]
    options = kind.Options(**plan.backbone.options)
    stages = ["backbone", *(f"backbone {k}" for k in range(2, plan.backbone_training.members + 1))]
    networks = []
    for stage in stages:
        with new_weights(plan.seed, stage):
            networks.append(kind(run.specs, run.classes, options))
    if len(networks) > 1 and networks[0].recovers:
        raise ConfigError(
            Problem(
                "backbone_training.members",
                "a network that recovers modalities itself cannot be averaged",
                expected="1",
                got=str(len(networks)),
                remedy="Leave members out",
            )
        )
    entry = {"name": plan.backbone.name, **options.model_dump()}
    return _Networks(stages, networks, as_one(networks), entry)


def _train_networks(run: Run, made: _Networks, labelled: Mapping[Split, Batch]) -> Tensor | None:
    """Train the networks, and return the weights of classes that they were trained with."""
    training, fitting = run.plan.backbone_training, labelled["train"]
    balance = None
    if training.class_weights == "balanced":
        if not run.task.balances:
            raise ConfigError(
                Problem(
                    "backbone_training.class_weights",
                    f"the bins of a {run.task.type} cannot be balanced: risks would not be right",
                    expected="none",
                    got="balanced",
                    remedy="Leave class_weights out",
                )
            )
        balance = class_weights(of_known_class(fitting)[0].labels, run.classes)
    for stage, network in zip(made.stages, made.networks, strict=True):
        objective = FusionObjective(
            network,
            run.classes,
            training,
            labelled["validation"],
            record_weights(labelled["validation"]),
            run.device,
            run.plan.seed,
            run.task,
            balance,
        )
        run.stage(
            stage,
            objective,
            fitting,
            record_weights(fitting),
            training,
            checkpoint=run.checkpoints / f"{stage.replace(' ', '_')}.safetensors",
        )
    made.backbone.to(run.device).eval()
    return objective.class_weights


@torch.no_grad()
def _fit_plain(
    run: Run, backbone: FusionBackbone, labelled: Mapping[Split, Batch]
) -> tuple[SubsetStatistics, References]:
    """Return statistics of the embedding, and the plain references."""
    device = run.device
    fitting, weights = of_known_class(labelled["train"])
    statistics = fit_statistics(
        encode_all(backbone, fitting, device),
        fitting.observed.available.to(device),
        fitting.labels.to(device),
        weights.to(device),
        run.classes,
        backbone.distance,
    )
    references = train_references(
        run.specs,
        run.classes,
        run.task,
        run.data["train"],
        {**labelled, "train": fitting},
        weights,
        run.plan.seed,
    )
    return statistics, references


def _shares(fitting: Batch, classes: int) -> tuple[float, ...]:
    """Return the share of each class among training patients."""
    classed, weights = of_known_class(fitting)
    shares = torch.bincount(classed.labels, weights=weights, minlength=classes) / weights.sum()
    return tuple(float(s) for s in shares)


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Return weights `(K,)` by which every class counts the same over these records.

    Args:
        labels: Int64 `(n,)`.
        classes: K.

    Example:
        >>> class_weights(torch.tensor([0, 0, 0, 1]), 2).tolist()
        [0.6666666865348816, 2.0]
    """
    counts = torch.bincount(labels, minlength=classes).clamp_min(1)
    return len(labels) / (classes * counts.float())
