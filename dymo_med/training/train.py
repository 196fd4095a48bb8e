"""From a recipe and a cohort to a bundle."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

import dymo_med
from dymo_med.backbones import BACKBONES, FusionBackbone, as_one
from dymo_med.bundle import ModelBundle, hashed_id, read_recipe, resolve_device, save_bundle
from dymo_med.calibration import Calibration
from dymo_med.config import Named, Recipe
from dymo_med.conformal import Conformal
from dymo_med.data.batch import collate
from dymo_med.data.cohort import read_cohort
from dymo_med.data.gate import WITHOUT_IT, fit_norms
from dymo_med.data.masks import read_known
from dymo_med.data.survey import survey
from dymo_med.errors import ConfigError, PatientDataError, Problem
from dymo_med.files import write_text
from dymo_med.imputers import IMPUTERS, Imputer, require_recovery
from dymo_med.logs import kept
from dymo_med.modalities import modality
from dymo_med.references import References, features_of
from dymo_med.selection import Selector, fit_statistics
from dymo_med.training.calibration import FEWEST, fit_temperature
from dymo_med.training.comparators import train_comparators
from dymo_med.training.curves import draw_curves
from dymo_med.training.held_back import try_out
from dymo_med.training.loop import Log, Progress, new_weights, stream, train_stage
from dymo_med.training.objectives import (
    FusionObjective,
    ImputerObjective,
    encode_all,
    mask_known,
    of_known_class,
    record_weights,
    sampled_subsets,
    subset_logits,
)
from dymo_med.training.performance import performance
from dymo_med.training.plan import propose
from dymo_med.training.references import Held, train_references, warning_of, weigh
from dymo_med.training.segmentation import LEAST_MASKS, train_segmentation
from dymo_med.training.selectors import (
    calibration_cases,
    choose,
    fit_all,
    held_out,
)
from dymo_med.training.use import audit_use, warnings_of
from dymo_med.types import (
    Batch,
    Choice,
    Cohort,
    ModalitySpec,
    PatientRecord,
    Performance,
    Scale,
    Split,
    SubsetStatistics,
    Use,
)

BUDGET_S = 1200.0
"""Seconds that a run without a recipe may take, about."""

_FITTED_ON: tuple[Split, ...] = ("train", "validation", "calibration")


def train(
    recipe: Path | None,
    cohort: Path,
    out: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    seed: int | None = None,
    budget_s: float = BUDGET_S,
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
    records = _read(described, reading)
    for split in _FITTED_ON:
        if described.task.mask is None:
            _require_labels(described, split, [r.label for r in records[split]])
        else:
            _require_masks(described, split, records[split])
    scale = described.task.scale
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
    for note in survey(described, [r for split in _FITTED_ON for r in records[split]]):
        say(f"note: {note}")
    data = {
        split: _with_shares(collate(records[split], described.specs), records[split], scale)
        for split in _FITTED_ON
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
    with kept(out / "warnings.log"):
        named = str(recipe or chosen)
        return _fit(plan, named, described, records, data, specs, where, out, progress, warn)


def _fit(
    plan: Recipe,
    named: str,
    described: Cohort,
    records: dict[Split, list[PatientRecord]],
    data: Mapping[Split, Batch],
    specs: tuple[ModalitySpec, ...],
    where: torch.device,
    out: Path,
    progress: Progress | None,
    warn: Callable[[str], None] | None,
) -> Path:
    """Train and fit everything, and write the bundle; see `train`.

    Args:
        plan: The recipe.
        named: Its file, for messages.
        described: The cohort.
        records: Of each split that is looked at.
        data: The same, as batches.
        specs: Modalities in canonical order, fitted.
        where: Where to compute.
        out: Folder of the run.
        progress: Called after every epoch.
        warn: Told what the user should know.
    """
    scale = described.task.scale
    fingerprint = _fingerprint(plan, described, records)
    fabric = (
        Fabric(accelerator="cuda", devices=[where.index or 0])
        if where.type == "cuda"
        else Fabric(accelerator="cpu", devices=1)
    )
    log = Log(out / "log.csv")
    checkpoints = out / "checkpoints"
    classes = len(described.task.classes)

    run_stage = partial(
        train_stage,
        seed=plan.seed,
        fabric=fabric,
        fingerprint=fingerprint,
        log=log,
        progress=progress,
    )

    imputer = imputer_entry = None
    if plan.imputer is not None:
        imputer, imputer_entry = _new_imputer(plan.imputer, plan.seed, specs)
    if described.task.mask is not None:
        if imputer is not None:
            _train_imputer(imputer, plan, data, run_stage, checkpoints, fabric.device)
        known = {s: b.rows(mask_known(b).nonzero().squeeze(1)) for s, b in data.items()}
        segmenter = train_segmentation(
            plan,
            described,
            specs,
            known,
            {s: record_weights(b) for s, b in known.items()},
            imputer,
            imputer_entry,
            run_stage,
            checkpoints,
            fabric.device,
        )
        draw_curves(log.stages, out / "curves.png")
        replace(
            segmenter,
            provenance=_provenance(plan, described, data, known, log),
            norms=fit_norms(specs, records["train"], described.quality),
        ).save(out / "bundle")
        return out / "bundle"
    if imputer is None or imputer_entry is None or plan.backbone.name not in BACKBONES:
        raise ConfigError(
            Problem(
                named,
                "the recipe is for a segmentation",
                expected=f"an imputer, and a backbone out of {', '.join(BACKBONES)}",
                remedy=f"Choose another recipe: cohort {described.name} is a classification",
            )
        )
    backbone_class = BACKBONES[plan.backbone.name]
    backbone_options = backbone_class.Options(**plan.backbone.options)
    stages = ["backbone", *(f"backbone {k}" for k in range(2, plan.backbone_training.members + 1))]
    networks = []
    for stage in stages:
        with new_weights(plan.seed, stage):
            networks.append(backbone_class(specs, classes, backbone_options))
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
    backbone = as_one(networks)
    # An imputer that shares the backbone's weights needs them trained; others come first.
    tied = imputer.tie(backbone)
    if not tied:
        _train_imputer(imputer, plan, data, run_stage, checkpoints, fabric.device)
    labelled = {s: b.rows(b.known.nonzero().squeeze(1)) for s, b in data.items()}
    fitting = labelled["train"]
    adjusting, held_back = part(labelled["validation"], labelled["calibration"], plan.seed)
    weights = record_weights(fitting)
    classed, standing = of_known_class(fitting)
    for stage, network in zip(stages, networks, strict=True):
        objective = FusionObjective(
            network,
            classes,
            plan.backbone_training,
            labelled["validation"],
            record_weights(labelled["validation"]),
            fabric.device,
            plan.seed,
            scale,
            class_weights(classed.labels, classes)
            if plan.backbone_training.class_weights == "balanced"
            else None,
        )
        run_stage(
            stage,
            objective,
            fitting,
            weights,
            plan.backbone_training,
            checkpoint=checkpoints / f"{stage.replace(' ', '_')}.safetensors",
        )
    backbone.to(fabric.device).eval()
    if tied:
        _train_imputer(imputer, plan, data, run_stage, checkpoints, fabric.device)
    comparators = train_comparators(
        plan,
        specs,
        classes,
        {**labelled, "calibration": adjusting},
        {s: record_weights(b) for s, b in labelled.items()},
        run_stage,
        log,
        checkpoints,
        fabric.device,
        scale,
        objective.class_weights,
    )
    draw_curves(log.stages, out / "curves.png")

    with torch.no_grad():
        statistics = fit_statistics(
            encode_all(backbone, classed, fabric.device),
            classed.observed.available.to(fabric.device),
            classed.labels.to(fabric.device),
            standing.to(fabric.device),
            classes,
            backbone.distance,
        )
        references = train_references(
            specs,
            classes,
            scale,
            data["train"],
            {"train": classed, "calibration": adjusting},
            standing,
            plan.seed,
        )
    answering = fit_answers(
        plan,
        imputer,
        backbone,
        statistics,
        references,
        labelled["validation"],
        adjusting,
        held_back,
        fabric.device,
        scale,
    )
    shares = torch.bincount(classed.labels, weights=standing, minlength=classes) / standing.sum()
    bundle = ModelBundle(
        name=plan.name,
        description=plan.description,
        task=described.task,
        specs=specs,
        missing_values=described.missing_values,
        imputer=imputer,
        imputer_entry=imputer_entry,
        backbone=backbone,
        backbone_entry={"name": plan.backbone.name, **backbone_options.model_dump()},
        selectors=answering.selectors,
        choice=answering.choice,
        statistics=statistics,
        calibration=answering.calibration,
        base_rates=tuple(float(s) for s in shares),
        comparators=comparators,
        references=answering.references,
        use=answering.use,
        conformal=answering.conformal,
        performance=answering.performance,
        provenance=_provenance(plan, described, data, labelled, log),
        norms=fit_norms(specs, records["train"], described.quality),
    )
    save_bundle(bundle, out / "bundle")
    if warn is not None:
        for text in filter(None, [warning_of(answering.references), *warnings_of(answering.use)]):
            warn(text)
    return out / "bundle"


@dataclass(frozen=True)
class Answering:
    """What turns networks into answers: fitted on some patients, tried out on others.

    Attributes:
        references: With what part of an answer is theirs.
        use: Which modalities answers rest on, by the patients they are fitted on.
        calibration: Of the probabilities: the temperature is fitted, the counts are tried out.
        selectors: Every one of the table, fitted.
        choice: Which is the default, and why; by the patients they are fitted on.
        conformal: From the others.
        performance: On the others.
    """

    references: References
    use: Use
    calibration: Calibration
    selectors: Mapping[str, Selector]
    choice: Choice
    conformal: Conformal
    performance: Performance


def part(validation: Batch, calibration: Batch, seed: int) -> tuple[Batch, Batch]:
    """Return who answers are fitted on and who they are tried out on; nobody is in both.

    Of 60 calibration patients or more half, drawn by the seed, are fitted on, and the other half
    tried out. Fewer are all tried out, and validation patients are fitted on. Those chose the
    networks' epochs, which makes networks look surer of themselves than they should be; so they
    are second choice.

    Args:
        validation: Labelled validation records.
        calibration: Labelled calibration records.
        seed: Of the draw; it looks at ids alone.
    """
    patients = sorted(set(calibration.patient_ids))
    if len(patients) < 2 * FEWEST:
        return validation, calibration
    order = torch.randperm(len(patients), generator=stream(seed, "who answers are fitted on"))
    chosen = {patients[i] for i in order[: len(patients) // 2].tolist()}
    inside = torch.tensor([p in chosen for p in calibration.patient_ids])
    return (
        calibration.rows(inside.nonzero().squeeze(1)),
        calibration.rows((~inside).nonzero().squeeze(1)),
    )


@torch.no_grad()
def fit_answers(
    plan: Recipe,
    imputer: Imputer,
    backbone: FusionBackbone,
    statistics: SubsetStatistics,
    references: References,
    validation: Batch,
    fitting: Batch,
    held_back: Batch,
    device: torch.device,
    scale: Scale | None = None,
) -> Answering:
    """Fit temperature, selectors and the choice among them, then try the result out on others.

    Args:
        plan: The recipe: its selector and its seed.
        imputer: Trained.
        backbone: Trained, in evaluation mode.
        statistics: Of the backbone, on training records.
        references: Fitted; how much of an answer is theirs is decided here.
        validation: Labelled validation records, on the CPU.
        fitting: Labelled records, on the CPU: everything is fitted on these (`part`).
        held_back: Labelled records of other patients, on the CPU: nothing is fitted on these, so
            sets and figures that rest on them hold for new patients.
        device: Where to compute.
        scale: Of a regression.
    """
    temperature = 1.0  # of a regression: another would move the answers themselves
    if scale is None:
        logits, rows = subset_logits(
            encode_all(backbone, fitting, device),
            fitting.observed.available.to(device),
            sampled_subsets(len(backbone.specs), plan.seed),
        )
        rows = rows.cpu()
        temperature = fit_temperature(
            logits.cpu(),
            fitting.truth[rows],
            [fitting.patient_ids[i] for i in rows.tolist()],
        )
    held = [
        Held(
            batch,
            features_of(batch, backbone.specs),
            encode_all(backbone, batch, device),
            temperature,
        )
        for batch in ((fitting,) if fitting is validation else (validation, fitting))
    ]
    references = weigh(references, held, scale, plan.seed)
    cases, patients = calibration_cases(
        imputer,
        backbone,
        fitting,
        record_weights(fitting),
        temperature,
        plan.seed,
        device,
        references,
    )
    asked = plan.selector
    selectors = fit_all(cases, statistics, {asked.name: asked.options} if asked else {})
    choice = choose(held_out(selectors, cases, statistics, patients), cases, patients, scale)
    if asked is not None:
        choice = replace(choice, name=asked.name, why="The recipe asked for it.")
    calibration = Calibration(
        temperature,
        len(set(fitting.patient_ids)),
        len(set(held_back.patient_ids)) if scale is None else None,
    )
    tested = try_out(
        imputer,
        backbone,
        selectors,
        statistics,
        calibration,
        held_back,
        plan.seed,
        device,
        scale,
        references,
    )
    return Answering(
        references,
        audit_use(held, references, scale, plan.seed),
        tested.counted(calibration),
        selectors,
        choice,
        tested.conformal(),
        performance(tested, choice.name),
    )


def _provenance(
    plan: Recipe,
    described: Cohort,
    data: Mapping[Split, Batch],
    labelled: Mapping[Split, Batch],
    log: Log,
) -> dict[str, Any]:
    """Return what a bundle remembers of how it came about."""
    return {
        "cohort": described.name,
        "recipe": plan.model_dump(),
        "records": {s: len(b) for s, b in data.items()},
        "labelled_records": {s: len(b) for s, b in labelled.items()},
        "patients": {
            s: sorted({hashed_id(plan.name, p) for p in b.patient_ids}) for s, b in data.items()
        },
        "observed_share": {
            spec.name: round(float(data["train"].observed.available[:, m].double().mean()), 4)
            for m, spec in enumerate(described.specs)
        },
        "best_epoch": {stage: log.best_epoch(stage) for stage in log.stages},
        "versions": {
            "dymo_med": dymo_med.__version__,
            **{name: version(name) for name in ("torch", "monai", "numpy")},
        },
    }


def _new_imputer(
    entry: Named, seed: int, specs: tuple[ModalitySpec, ...]
) -> tuple[Imputer, dict[str, Any]]:
    """Return the imputer before its training, and its table name and options."""
    with new_weights(seed, "imputer"):
        imputer_class = IMPUTERS[entry.name]
        options = imputer_class.Options(**entry.options)
        imputer = imputer_class(specs, options)
    return imputer, {"name": entry.name, **options.model_dump()}


def _train_imputer(
    imputer: Imputer,
    plan: Recipe,
    data: Mapping[Split, Batch],
    run_stage: Callable[..., None],
    checkpoints: Path,
    device: torch.device,
) -> None:
    """Train the imputer, unless it is ready with its first look, and leave it ready to recover."""
    assert plan.imputer is not None
    imputer.start_from(data["train"])
    require_recovery(imputer, plan.imputer.name)
    if any(True for _ in imputer.parameters()):
        run_stage(
            "imputer",
            ImputerObjective(
                imputer, data["validation"], record_weights(data["validation"]), device, plan.seed
            ),
            data["train"],
            record_weights(data["train"]),
            plan.imputer_training,
            checkpoint=checkpoints / "imputer.safetensors",
        )
    imputer.to(device).eval()


def fit_specs(specs: Sequence[ModalitySpec], batch: Batch) -> tuple[ModalitySpec, ...]:
    """Return the specs with constants fitted on training records that have the modality.

    Args:
        specs: Modalities in canonical order.
        batch: Training records.
    """
    fitted = []
    for m, spec in enumerate(specs):
        rows = batch.observed.available[:, m]
        fields = batch.observed_fields.get(spec.name)
        told = batch.descriptors.get(spec.name)
        fitted.append(
            modality(spec).fit(
                batch.values[spec.name][rows],
                None if fields is None else fields[rows],
                None if told is None else told[rows],
            )
        )
    return tuple(fitted)


def fit_importances(specs: Sequence[ModalitySpec], batch: Batch) -> tuple[ModalitySpec, ...]:
    """Return the specs with how much each table column tells about the target.

    The measure is the mean decrease in impurity of one random forest over all columns of all
    tables. A forest needs no scaling, takes blank cells as they are and finds effects that are
    not linear or depend on other columns. Columns that say the same share what they are worth;
    by permutation each of them would seem worthless. Trees grown to the last record overrate
    columns of many distinct values, hence leaves of at least five records. That a cell is blank
    can tell something too, and counts for its column.

    Args:
        specs: Modalities in canonical order.
        batch: Training records; those without a label are left out.

    Returns:
        Specs whose columns' importances sum to 1 over all tables, or are all 0 where the forest
        finds nothing. A column that is blank in all of these records has 0.

    References:
        Breiman, Random Forests, Machine Learning 45, 2001; Strobl et al., Bias in random forest
        variable importance measures, BMC Bioinformatics 8:25, 2007.
    """
    from sklearn.ensemble import RandomForestClassifier

    tables = [spec for spec in specs if spec.columns]
    if not tables:
        return tuple(specs)
    known, weights = of_known_class(batch)
    blank = torch.tensor(torch.nan, dtype=torch.float64)
    cells = torch.cat(
        [known.values[s.name].double().where(known.observed_fields[s.name], blank) for s in tables],
        dim=1,
    ).numpy()  # (n, columns of all tables)
    some = np.flatnonzero(~np.isnan(cells).all(0))
    shares = np.zeros(cells.shape[1])
    if len(some):
        forest = RandomForestClassifier(
            n_estimators=200,
            min_samples_leaf=5,
            max_samples=min(len(known), 10_000),  # of a large cohort a tree need not see all
            random_state=0,
            n_jobs=1,
        )
        forest.fit(cells[:, some], known.labels.numpy(), sample_weight=weights.numpy())
        shares[some] = forest.feature_importances_
    left = iter(shares.tolist())
    return tuple(
        replace(s, columns=tuple(replace(c, importance=next(left)) for c in s.columns))
        for s in specs
    )


def _read(
    cohort: Cohort, reading: Callable[[int, int], None] | None
) -> dict[Split, list[PatientRecord]]:
    """Read every record that something is fitted on; ones with nothing observed are left out."""
    listed = [(split, entry) for split in _FITTED_ON for entry in cohort.in_split(split)]
    records: dict[Split, list[PatientRecord]] = {split: [] for split in _FITTED_ON}
    problems: list[Problem] = []
    for done, (split, entry) in enumerate(listed, start=1):
        try:
            record = read_known(entry, cohort, require_something=False)
        except PatientDataError as error:
            problems += error.problems
            continue
        if record.modalities:
            records[split].append(record)
        if reading is not None:
            reading(done, len(listed))
    if problems:
        # Other commands go on without what is refused; this one has no such option.
        raise PatientDataError(
            *(replace(p, remedy=p.remedy.replace(f"; {WITHOUT_IT}", "")) for p in problems)
        )
    return records


def _with_shares(batch: Batch, records: Sequence[PatientRecord], scale: Scale | None) -> Batch:
    """Return the batch with what a regression is trained on."""
    if scale is None:
        return batch
    nan = float("nan")
    values = [nan if r.value is None else r.value for r in records]
    return replace(batch, shares=scale.shares(torch.tensor(values, dtype=torch.float64)))


def _require_labels(cohort: Cohort, split: Split, labels: Sequence[int | None]) -> None:
    """Check that every class occurs in a split; of a regression's bands, in training alone.

    Raises:
        ConfigError: If one does not.
    """
    counts = Counter(labels)
    absent = [c for k, c in enumerate(cohort.task.classes) if not counts[k]]
    if cohort.task.scale is not None:
        if absent and split == "train":
            raise ConfigError(
                Problem(
                    f"Cohort {cohort.name}",
                    f"no labelled training record is {', '.join(absent)}",
                    expected="a record that is nearest to each of the bands' centres",
                    remedy="List other centres under bands in cohort.yaml, or fewer",
                )
            )
        absent = [] if len(absent) < len(cohort.task.classes) else absent
    if absent:
        raise ConfigError(
            Problem(
                f"Cohort {cohort.name}",
                f"split '{split}' has no labelled record of class {', '.join(absent)}",
                expected="each class in each split but test",
                remedy="Move patients between splits in splits.csv",
            )
        )


def _require_masks(cohort: Cohort, split: Split, records: Sequence[PatientRecord]) -> None:
    """Check that a split has as many masks as something is fitted on.

    Raises:
        ConfigError: If it has not.
    """
    needed = LEAST_MASKS if split == "train" else 1
    count = sum(r.mask is not None for r in records)
    if count < needed:
        raise ConfigError(
            Problem(
                f"Cohort {cohort.name}",
                f"split '{split}' has too few records with a mask",
                expected=f"at least {needed}",
                got=str(count),
                remedy="Move patients between splits in splits.csv, or add masks",
            )
        )


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


def _fingerprint(recipe: Recipe, cohort: Cohort, records: dict[Split, list[PatientRecord]]) -> str:
    """Return a hash of everything a resumed run must have in common with the first one."""
    about: dict[str, Any] = {
        "recipe": recipe.model_dump(),
        "specs": [spec.to_dict() for spec in cohort.specs],
        "records": [
            [split, r.record_id, r.label, {n: v.source.sha256 for n, v in r.modalities.items()}]
            for split, part in records.items()
            for r in part
        ],
        "versions": [dymo_med.__version__, torch.__version__],
    }
    if cohort.task.mask is not None:
        about["task"] = cohort.task.to_dict()
        about["masks"] = [
            None if r.mask is None else hashlib.sha256(r.mask.numpy().tobytes()).hexdigest()
            for part in records.values()
            for r in part
        ]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
