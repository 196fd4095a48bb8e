"""From a recipe and a cohort to a bundle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric

from dymo_med.bundle import read_recipe, resolve_device
from dymo_med.config import Named, Recipe
from dymo_med.data.batch import collate
from dymo_med.data.cohort import read_cohort
from dymo_med.data.gate import fit_norms
from dymo_med.data.survey import survey
from dymo_med.errors import ConfigError, Problem
from dymo_med.files import write_text
from dymo_med.logs import kept
from dymo_med.outline_bounds import calibrate_outlines
from dymo_med.training.curves import draw_curves
from dymo_med.training.fit_specs import fit_importances, fit_specs
from dymo_med.training.fusion import fit_fusion
from dymo_med.training.loop import Log, Progress, train_stage
from dymo_med.training.objectives import (
    record_weights,
)
from dymo_med.training.outline_bounds import outline_cases
from dymo_med.training.plan import propose
from dymo_med.training.records import (
    FITTED_ON,
    fingerprint_of,
    provenance_of,
    read_fitted_on,
)
from dymo_med.training.run import Run, new_imputer, train_imputer
from dymo_med.training.segmentation import train_segmentation
from dymo_med.types import Batch, Cohort, ModalitySpec, PatientRecord, Split

BUDGET_S = 1200.0
"""Seconds that a run without a recipe may take, about."""


def train(
    recipe: Path | None,
    cohort: Path,
    out: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    seed: int | None = None,
    budget_s: float = BUDGET_S,
    harm: float | None = None,
    progress: Progress | None = None,
    reading: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
    warn: Callable[[str], None] | None = None,
) -> Path:
    """Train imputer and backbone, fit statistics, temperature and selectors, and write a bundle.

    Comparators that the recipe names are trained after the backbone. Plain references always are;
    where one is better than the network, the bundle's answers rest on it too.

    Weights, statistics and table constants are fitted on the train split. Epochs are chosen on
    validation. Temperature and selectors are fitted, and the default selector is picked unless
    the recipe names one, on one half of the calibration patients (of fewer than 60: on validation
    patients); prediction sets, limits of the probabilities and the bundle's own figures rest on
    the others. The test split is not read.

    Args:
        recipe: Recipe file; None = chosen from the cohort (`training.plan`) and written to
            `recipe.yaml` in `out`, or found there by a run that is resumed.
        cohort: Cohort folder or its `cohort.yaml`.
        out: Folder for `bundle/`, `log.csv`, `curves.png` and `checkpoints/`, and `warnings.log`
            if there is something to warn of.
        resume: Go on from the checkpoints in `out`.
        device: `auto`, `cpu` or `cuda`.
        seed: Overrides the recipe's seed.
        budget_s: Seconds that choosing a recipe and training may take, about; without use where
            there is a recipe.
        harm: Use recoveries only where it is proven that they harm less than this share of
            patients (selector `guarded`); None = the recipe's selector, or the best one.
        progress: Called after every epoch.
        reading: Called after every record read, with how many are done and how many there are.
        say: Told what is found out about the cohort, and which recipes are tried.
        warn: Called with whatever must not be missed about the bundle.

    Returns:
        The bundle's folder.

    Raises:
        ConfigError: If the recipe or cohort is wrong, or `out` holds another run.
        PatientDataError: If a record that is needed cannot be read.
    """
    chosen = out / "recipe.yaml"
    if recipe is None and resume and chosen.is_file():
        recipe = chosen
    plan = None if recipe is None else read_recipe(recipe)
    described = read_cohort(cohort)
    if out.exists() and any(out.iterdir()) and not resume:
        raise ConfigError(
            Problem(
                str(out),
                "the folder is not empty",
                expected="a new or empty folder",
                remedy="Add --resume to go on with this run, or choose another folder",
            )
        )
    where = resolve_device(device)
    records = read_fitted_on(described, reading)
    _require_enough(described, records)
    for note in survey(described, [r for split in FITTED_ON for r in records[split]]):
        say(f"note: {note}")
    data = {
        split: described.task.with_targets(collate(found, described.specs), found)
        for split, found in records.items()
    }
    specs = fit_importances(fit_specs(described.specs, data["train"]), data["train"])
    if plan is None:
        plan, text = propose(
            described, specs, data, seed=seed or 0, budget_s=budget_s, device=where, say=say
        )
        out.mkdir(parents=True, exist_ok=True)
        write_text(chosen, text)
        say(f"recipe: {chosen}")
    if seed is not None:
        plan = plan.model_copy(update={"seed": seed})
    if harm is not None:
        if "--harm" in described.task.lacks.get("train", ()):
            raise ConfigError(
                Problem(
                    "harm",
                    "an outline is neither right nor wrong, so no bound on harm is proven",
                    expected="a classification, a regression or survival",
                    remedy="Leave it out",
                )
            )
        plan = plan.model_copy(
            update={"selector": Named.model_validate({"name": "guarded", "harm": harm})}
        )
    with kept(out / "warnings.log"):
        run = _started(plan, described, specs, records, data, where, out, progress)
        bundle = _PIPELINES[described.task.pipeline](run, str(recipe or chosen), warn)
        draw_curves(run.log.stages, out / "curves.png")
    return bundle


def _require_enough(described: Cohort, records: Mapping[Split, Sequence[PatientRecord]]) -> None:
    """Check that there is something to learn each class, region and modality from.

    Raises:
        ConfigError: If there is not.
    """
    for split in FITTED_ON:
        lacking = described.task.shortage(split, records[split])
        if lacking is not None:
            raise ConfigError(replace(lacking, where=f"Cohort {described.name}"))
    names = [spec.name for spec in described.specs]
    seen = Counter(n for r in records["train"] for n in r.modalities)
    never = [n for n in names if not seen[n]]
    if never:
        raise ConfigError(
            Problem(
                f"Cohort {described.name}",
                f"no training record has {', '.join(never)}",
                expected="each modality in some record",
                remedy="Remove it from cohort.yaml, or move a patient who has it into train",
            )
        )


def _started(
    plan: Recipe,
    described: Cohort,
    specs: tuple[ModalitySpec, ...],
    records: Mapping[Split, Sequence[PatientRecord]],
    data: Mapping[Split, Batch],
    where: torch.device,
    out: Path,
    progress: Progress | None,
) -> Run:
    """Return what all stages of a training share."""
    fabric = (
        Fabric(accelerator="cuda", devices=[where.index or 0])
        if where.type == "cuda"
        else Fabric(accelerator="cpu", devices=1)
    )
    log = Log(out / "log.csv")
    stage = partial(
        train_stage,
        seed=plan.seed,
        fabric=fabric,
        fingerprint=fingerprint_of(plan, described, records),
        log=log,
        progress=progress,
    )
    return Run(plan, described, specs, records, data, fabric.device, out, log, stage)


def _fit_outline(run: Run, named: str, warn: Callable[[str], None] | None) -> Path:
    """Train and fit everything of a segmentation, and write the bundle."""
    imputer = entry = None
    if run.plan.imputer is not None:
        imputer, entry = new_imputer(run, run.plan.imputer)
        train_imputer(run, imputer)
    known = {
        s: b.rows(run.cohort.task.known_rows(b).nonzero().squeeze(1)) for s, b in run.data.items()
    }
    segmenter = train_segmentation(
        run.plan,
        run.cohort,
        run.specs,
        known,
        {s: record_weights(b) for s, b in known.items()},
        imputer,
        entry,
        run.stage,
        run.checkpoints,
        run.device,
    )
    cases = outline_cases(segmenter, run.cohort, run.records["calibration"])
    replace(
        segmenter,
        provenance=provenance_of(run.plan, run.cohort, run.data, known, run.log),
        norms=fit_norms(run.specs, run.records["train"], run.cohort.quality),
        bounds=calibrate_outlines(cases, run.cohort.task.classes, run.plan.seed),
    ).save(run.out / "bundle")
    return run.out / "bundle"


_PIPELINES: Mapping[str, Callable[[Run, str, Callable[[str], None] | None], Path]] = {
    "fusion": fit_fusion,
    "outline": _fit_outline,
}
