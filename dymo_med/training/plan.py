"""A recipe from the cohort itself: what it is like, what that asks for, and what validates best.

Plans follow nnU-Net's idea (Isensee et al., Nature Methods 18, 2021): a fingerprint of the data
fixes what follows from it by rule; what does not is tried. Rules rest on
`docs/explanation/learning.md`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning_fabric import Fabric
from torch import Tensor

from dymo_med.backbones import BACKBONES
from dymo_med.config import Recipe
from dymo_med.imputers import IMPUTERS
from dymo_med.tasks import TASKS, answered
from dymo_med.training.loop import Log, MicroBatch, new_weights, stream, train_stage
from dymo_med.training.objectives import (
    FusionObjective,
    ImputerObjective,
    encode_all,
    record_weights,
    sampled_subsets,
    subset_logits,
)
from dymo_med.types import Batch, Cohort, ModalitySpec, Split

# Labelled training patients from which an encoder that must learn what to look for is tried.
_ENOUGH_FOR_CONVOLUTIONS = 400
# Fewer labelled validation patients than this choose by chance: every patient is validated once.
_ENOUGH_FOR_VALIDATION = 60
_FOLDS = 3
# Share of the budget that trying candidates may take.
_TRIAL_SHARE = 0.4
# A volume of so many voxels is large for two cores.
_LARGE = 64**3


@dataclass(frozen=True)
class Fingerprint:
    """What is known of a cohort before any network is trained.

    Attributes:
        name: Of the cohort.
        task: Type of its task.
        labelled: Labelled patients per split.
        patients: Patients per split.
        classes: Labelled training patients per class, in canonical order; of a regression, per
            bin; empty for a segmentation.
        modalities: What each modality is: kind, shape, share of training records that have it,
            share of blank cells.
        patterns: How many sets of modalities occur among training records, and the share of the
            most common one.
        cores: Of this computer.
        memory_bytes: Likewise; 0 = not known.
    """

    name: str
    task: str
    labelled: Mapping[str, int]
    patients: Mapping[str, int]
    classes: tuple[int, ...]
    modalities: Mapping[str, Mapping[str, Any]]
    patterns: tuple[int, float]
    cores: int
    memory_bytes: int

    @property
    def voxels(self) -> int:
        """Voxels of the largest image; 0 without any."""
        return max(
            (prod(m["shape"]) for m in self.modalities.values() if m["kind"] == "image"), default=0
        )

    def kinds(self) -> set[str]:
        """Return the kinds of modality there are."""
        return {str(m["kind"]) for m in self.modalities.values()}

    def lines(self) -> list[str]:
        """Return it for people."""
        splits = ", ".join(f"{s} {self.labelled[s]} of {self.patients[s]}" for s in self.patients)
        found = [f"cohort {self.name}: {self.task}; labelled patients: {splits}"]
        if self.classes:
            found.append(f"training patients per class: {', '.join(map(str, self.classes))}")
        for name, m in self.modalities.items():
            size = " x ".join(map(str, m["shape"][1:] if m["kind"] == "image" else m["shape"]))
            text = f"{name}: {m['kind']}, {size}"
            if m.get("spacing_mm"):
                text += f" at {' x '.join(f'{s:g}' for s in m['spacing_mm'])} mm"
            text += f"; {m['observed']:.0%} of training records have it"
            if m.get("blank"):
                text += f", {m['blank']:.0%} of its cells are blank"
            found.append(text)
        found.append(
            f"{self.patterns[0]} patterns of what is missing, the most common"
            f" {self.patterns[1]:.0%}"
        )
        memory = f"{self.memory_bytes / 2**30:.0f} GB" if self.memory_bytes else "unknown memory"
        found.append(f"{self.cores} cores, {memory}")
        return found


def _patients(batch: Batch, rows: Tensor) -> int:
    return len({batch.patient_ids[i] for i in rows.nonzero().squeeze(1).tolist()})


def fingerprint(cohort: Cohort, data: Mapping[Split, Batch]) -> Fingerprint:
    """Return what is known of a cohort.

    Args:
        cohort: As described.
        data: Its records, per split.
    """
    known = {s: cohort.task.known_rows(b) for s, b in data.items()}
    train = data["train"]
    have = train.observed.available
    modalities: dict[str, dict[str, Any]] = {}
    for m, spec in enumerate(cohort.specs):
        about: dict[str, Any] = {
            "kind": spec.kind,
            "shape": tuple(spec.shape),
            "observed": float(have[:, m].double().mean()),
        }
        if spec.spacing_mm:
            about["spacing_mm"] = tuple(spec.spacing_mm)
        if spec.name in train.observed_fields and bool(have[:, m].any()):
            filled = train.observed_fields[spec.name][have[:, m]]
            about["blank"] = float((~filled).double().mean())
        modalities[spec.name] = about
    patterns, counts = torch.unique(have, dim=0, return_counts=True)
    classes: tuple[int, ...] = ()
    if cohort.task.pipeline == "fusion":
        classes = tuple(
            _patients(train, train.labels == k) for k in range(len(cohort.task.classes))
        )
    return Fingerprint(
        name=cohort.name,
        task=cohort.task.type,
        labelled={s: _patients(b, known[s]) for s, b in data.items()},
        patients={s: len(set(b.patient_ids)) for s, b in data.items()},
        classes=classes,
        modalities=modalities,
        patterns=(len(patterns), float(counts.max()) / len(have)),
        cores=os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
    )


def _memory_bytes() -> int:
    try:
        return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return 0


# -- what follows by rule --------------------------------------------------------------------------

Entry = dict[str, Any]


@dataclass
class Plan:
    """A recipe in the making, each of its lines with a reason.

    Attributes:
        recipe: As YAML would hold it.
        why: Reason by key path ("backbone.image_encoders").
        tried: Lines about the candidates that were tried.
    """

    recipe: Entry
    why: dict[str, str] = field(default_factory=dict)
    tried: list[str] = field(default_factory=list)

    def text(self, found: Fingerprint) -> str:
        """Return the recipe as YAML, what is known of the cohort in front."""
        lines = ["# Chosen by `dymo-med train` from the cohort itself; edit it as you like.", "#"]
        lines += [f"# {line}" for line in found.lines()]
        if self.tried:
            lines += ["#", *(f"# {line}" for line in self.tried)]
        lines += list(self._lines(self.recipe, "", ""))
        return "\n".join(lines) + "\n"

    def _lines(self, part: Mapping[str, Any], path: str, indent: str) -> Iterator[str]:
        for key, value in part.items():
            here = f"{path}.{key}" if path else key
            why = f"  # {self.why[here]}" if here in self.why else ""
            if isinstance(value, Mapping):
                yield f"{indent}{key}:{why}"
                yield from self._lines(value, here, indent + "  ")
            else:
                told = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
                yield f"{indent}{key}: {told.removesuffix('...').strip()}{why}"


def rules(found: Fingerprint) -> Plan:
    """Return what follows from a fingerprint without any trial.

    Args:
        found: Of the cohort.
    """
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in found.name).strip("-") or "plan"
    plan = Plan({"name": name, "seed": 0})
    if TASKS[found.task].pipeline == "outline":
        return _outline(plan, found)
    few = found.labelled["train"]
    r, why = plan.recipe, plan.why
    if found.kinds() == {"table"}:
        r["imputer"] = {"name": "iterative"}
        why["imputer"] = "there are only tables"
    else:
        r["imputer"] = {
            "name": "mopoe",
            "latent": 32,
            "map_channels": 6 if _volumes(found) else 0,
            "width": 8,
            "grid": 2,
            "dim": 24,
            "beta": 0.02,
            "column_layers": 1,
            "hide_cells": 0.3,
        }
        why["imputer"] = "recovers every kind of modality from any others"
        why["imputer.map_channels"] = (
            "volumes share a grid, so a lesion is at one place in all of them"
            if _volumes(found)
            else "no two images share a grid"
        )
        why["imputer.hide_cells"] = "teaches to fill blank cells"
    large = few >= 2000
    r["backbone"] = {
        "name": "transformer",
        "dim": 128 if large else 64,
        "heads": 4,
        "layers": 2,
        "projection": 64 if large else 32,
        "width": 16 if large else 8,
        "dropout": 0.2,
    }
    why["backbone.dim"] = f"{few} labelled training patients"
    why["backbone.dropout"] = "without it few patients are learned by heart"
    r["imputer_training"] = {
        "epochs": 30,
        "batch_size": 8 if few < 1000 else 32,
        "learning_rate": 0.003,
        "patience": 8,
        "decay": "cosine",
    }
    r["backbone_training"] = {
        "epochs": 40,
        "batch_size": 16 if few < 1000 else 64,
        "learning_rate": 0.001,
        "weight_decay": 0.01,
        "patience": 12,
        "subsets": 6,
        "decay": "cosine",
        "members": 3,
    }
    why["backbone_training.members"] = "the mean of three forgives a badly chosen epoch"
    if "image" in found.kinds():
        r["backbone_training"]["augmentation"] = {"shift_voxels": 1, "intensity": 0.05}
    return plan


def _volumes(found: Fingerprint) -> bool:
    """Return whether two volumes or more share a grid."""
    grids = [m["shape"] for m in found.modalities.values() if len(m["shape"]) == 4]
    return len(grids) > 1 and len(set(grids)) < len(grids)


def _outline(plan: Plan, found: Fingerprint) -> Plan:
    """Return the plan of a segmentation."""
    r, why = plan.recipe, plan.why
    sides = next(m["shape"] for m in found.modalities.values())[1:]
    small = found.voxels < _LARGE
    r["backbone"] = {
        "name": "shared_unet",
        "widths": [16, 32, 64] if small else [32, 64, 128, 256],
        "width_ratio": 0.5,
    }
    why["backbone.widths"] = f"grid of {' x '.join(map(str, sides))} voxels"
    r["backbone_training"] = {
        "epochs": 40,
        "batch_size": 2,
        "learning_rate": 0.003,
        "weight_decay": 0.00001,
        "patience": 15,
        "subsets": 15,
        "decay": "poly",
    }
    if not small:
        r["backbone_training"]["crop"] = [min(96, 8 * (n // 8)) for n in sides]
        why["backbone_training.crop"] = "the whole grid does not fit a training step"
    why["backbone_training.subsets"] = "the network must answer from any scans"
    return plan


@dataclass(frozen=True)
class Candidate:
    """One way to encode the cohort's modalities.

    Attributes:
        name: For people.
        backbone: What it changes in the recipe's backbone.
    """

    name: str
    backbone: Entry

    @property
    def reads_numbers(self) -> bool:
        """Whether its network reads descriptors of scans, and no voxels."""
        return list(self.backbone.get("image_encoders", ["descriptors"])) == ["descriptors"]


def mostly_unlabelled(found: Fingerprint) -> bool:
    """Return whether there are as many training patients without a label as with one, or more.

    Then a joint distribution of everybody knows what the network cannot, and averaging over draws
    of it can pay (`docs/explanation/recovering.md`).

    Args:
        found: Of the cohort.
    """
    return found.patients["train"] >= 2 * found.labelled["train"]


def candidates(found: Fingerprint) -> list[Candidate]:
    """Return what is worth trying, the simplest first.

    Args:
        found: Of the cohort.
    """
    images, tables = "image" in found.kinds(), "table" in found.kinds()
    pictures = images and all(
        len(m["shape"]) == 3 for m in found.modalities.values() if m["kind"] == "image"
    )
    enough = found.labelled["train"] >= _ENOUGH_FOR_CONVOLUTIONS
    ways: list[tuple[tuple[str, ...], str]] = (
        [(("descriptors",), "row")] if images else [((), "row")]
    )
    if tables:
        ways.append((ways[0][0], "columns"))
    if images and (enough or pictures):
        ways += [(("descriptors", "fine"), "row"), (("descriptors", "strided"), "row")]
    elif images:
        ways.append((("descriptors", "voxels"), "row"))
    result = []
    for encoders, table in ways:
        entry: Entry = {}
        if encoders:
            entry["image_encoders"] = list(encoders)
        if tables:
            entry["table_encoder"] = table
        names = " + ".join([*encoders, *([table] if tables else [])]) or "as it is"
        result.append(Candidate(names, entry))
    return result


# -- what is tried ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What a candidate was worth.

    Attributes:
        candidate: Which.
        losses: Loss per validated patient, over subsets of what each has.
        seconds: That its trainings took, one per fold.
        folds: How many there were.
    """

    candidate: Candidate
    losses: Mapping[str, float]
    seconds: float
    folds: int = 1

    @property
    def mean(self) -> float:
        """Mean loss over patients."""
        return sum(self.losses.values()) / len(self.losses)


Say = Callable[[str], None]


def propose(
    cohort: Cohort,
    specs: tuple[ModalitySpec, ...],
    data: Mapping[Split, Batch],
    *,
    seed: int = 0,
    budget_s: float = 1200.0,
    device: torch.device | None = None,
    say: Say = lambda _: None,
) -> tuple[Recipe, str]:
    """Choose a recipe from the cohort itself.

    What follows from the fingerprint is set by rule; ways to encode modalities are tried on
    validation patients within part of the budget. With fewer than sixty labelled validation
    patients they are tried by cross-validation over training and validation patients instead, so
    that everybody is validated once. A later candidate is taken only where it is better than the
    best so far by more than one standard error of the paired difference. What is measured in
    seconds makes the plan depend on the computer; the recipe that comes out does not any more.

    Args:
        cohort: As described.
        specs: Its modalities, fitted on training records.
        data: Its records by split; the test split is not looked at.
        seed: Of the recipe.
        budget_s: Seconds that planning and training may take, about.
        device: Where to compute; None = the CPU.
        say: Told what is going on.

    Returns:
        The recipe, and its text with a reason per line.
    """
    began = time.monotonic()
    device = device or torch.device("cpu")
    found = fingerprint(cohort, data)
    for line in found.lines():
        say(line)
    plan = rules(found)
    plan.recipe["seed"] = seed
    if TASKS[found.task].pipeline == "outline":
        return _finished(plan, found)
    ways = candidates(found)
    best: Trial | None = None
    spent = 0.0
    for candidate in ways:
        if best is not None and spent + best.seconds > _TRIAL_SHARE * budget_s:
            plan.tried.append(f"{candidate.name}: not tried, the budget is used up")
            continue
        trial = _tried(candidate, plan, specs, data, cohort, seed, device)
        spent += trial.seconds
        apart = 0.0
        better = best is None
        if best is not None:
            apart, error = _paired(trial.losses, best.losses)
            better = apart < -error
        line = f"{candidate.name}: validation loss {trial.mean:.4f} in {trial.seconds:.0f} s"
        if best is not None:
            line += f" ({apart:+.4f} against {best.candidate.name})"
        plan.tried.append(line)
        say(line)
        if better:
            best = trial
    assert best is not None
    plan.recipe["backbone"] |= best.candidate.backbone
    for key in best.candidate.backbone:
        others = len(ways) > 1
        plan.why[f"backbone.{key}"] = (
            f"chosen on {len(best.losses)} validated patients" if others else "nothing else applies"
        )
    if mostly_unlabelled(found) and best.candidate.reads_numbers:
        plan.recipe["imputer"] = {"name": "conditional"}
        for key in [k for k in plan.why if k.startswith("imputer")]:
            del plan.why[key]
        plan.why["imputer"] = (
            f"{found.patients['train'] - found.labelled['train']} training patients have no label:"
            " their draws tell what few labelled ones cannot"
        )
    left = budget_s - (time.monotonic() - began)
    _fit_into(plan, left, best, specs, data, seed, device)
    return _finished(plan, found)


def _finished(plan: Plan, found: Fingerprint) -> tuple[Recipe, str]:
    text = plan.text(found)
    return Recipe.model_validate(yaml.safe_load(text)), text


def _paired(one: Mapping[str, float], other: Mapping[str, float]) -> tuple[float, float]:
    """Return the mean difference over patients of both, and its standard error."""
    apart = torch.tensor([one[p] - other[p] for p in one if p in other], dtype=torch.float64)
    error = float(apart.std() / len(apart) ** 0.5) if len(apart) > 1 else float("inf")
    return float(apart.mean()), error


def _folds(data: Mapping[Split, Batch], seed: int) -> Iterator[tuple[Batch, Batch]]:
    """Return records to fit and to validate on, once or in folds of patients."""
    labelled = {s: b.rows(b.known.nonzero().squeeze(1)) for s, b in data.items()}
    train, held = labelled["train"], labelled["validation"]
    if len(set(held.patient_ids)) >= _ENOUGH_FOR_VALIDATION:
        yield train, held
        return
    both = joined(train, held)
    # Folds are balanced by label: patients of a class are dealt in turn.
    first = {p: int(label) for p, label in zip(both.patient_ids, both.labels.tolist(), strict=True)}
    names = sorted(first)
    shuffled = torch.randperm(len(names), generator=stream(seed, "folds")).tolist()
    dealt = sorted((names[i] for i in shuffled), key=lambda p: first[p])
    fold_of = {p: i % _FOLDS for i, p in enumerate(dealt)}
    which = torch.tensor([fold_of[p] for p in both.patient_ids])
    for fold in range(_FOLDS):
        fit, check = (which != fold).nonzero().squeeze(1), (which == fold).nonzero().squeeze(1)
        if len(fit) and len(check):
            yield both.rows(fit), both.rows(check)


def joined(one: Batch, other: Batch) -> Batch:
    """Return the records of two batches of one cohort."""

    def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b])

    return Batch(
        record_ids=one.record_ids + other.record_ids,
        patient_ids=one.patient_ids + other.patient_ids,
        values={k: torch.cat([v, other.values[k]]) for k, v in one.values.items()},
        observed=replace(
            one.observed, available=torch.cat([one.observed.available, other.observed.available])
        ),
        observed_fields={
            k: torch.cat([v, other.observed_fields[k]]) for k, v in one.observed_fields.items()
        },
        labels=torch.cat([one.labels, other.labels]),
        shares=both(one.shares, other.shares),
        followed=both(one.followed, other.followed),
        masks=both(one.masks, other.masks),
        masked=both(one.masked, other.masked),
        descriptors={
            k: torch.cat([v, other.descriptors[k]])
            for k, v in one.descriptors.items()
            if k in other.descriptors
        },
    )


def _tried(
    candidate: Candidate,
    plan: Plan,
    specs: tuple[ModalitySpec, ...],
    data: Mapping[Split, Batch],
    cohort: Cohort,
    seed: int,
    device: torch.device,
) -> Trial:
    """Train a candidate once, or once per fold, and return what it is worth."""
    entry = {**plan.recipe["backbone"], **candidate.backbone}
    recipe = Recipe.model_validate({**plan.recipe, "backbone": entry})
    settings = recipe.backbone_training.model_copy(update={"members": 1})
    kind = BACKBONES[recipe.backbone.name]
    options = kind.Options(**recipe.backbone.options)
    fabric = Fabric(accelerator="cuda" if device.type == "cuda" else "cpu", devices=1)
    began = time.monotonic()
    losses: dict[str, float] = {}
    folds = list(_folds(data, seed))
    for fit, check in folds:
        with new_weights(seed, "backbone"):
            network = kind(specs, len(cohort.task.classes), options)
        objective = FusionObjective(
            network,
            len(cohort.task.classes),
            settings,
            check,
            record_weights(check),
            device,
            seed,
            answered(cohort.task),
        )
        with tempfile.TemporaryDirectory() as folder:
            train_stage(
                "backbone",
                objective,
                fit,
                record_weights(fit),
                settings,
                seed,
                fabric=fabric,
                checkpoint=Path(folder) / "trial.safetensors",
                fingerprint="trial",
                log=Log(Path(folder) / "log.csv"),
            )
        with torch.no_grad():
            fuse = encode_all(network, check, device)
            available = check.observed.available.to(device)
            logits, rows = subset_logits(fuse, available, sampled_subsets(len(specs), seed))
            rows = rows.cpu()
            each = answered(cohort.task).loss(logits.cpu(), check.truth[rows])
        total: dict[str, list[float]] = {}
        for row, loss in zip(rows.tolist(), each.tolist(), strict=True):
            total.setdefault(check.patient_ids[row], []).append(loss)
        losses |= {p: sum(v) / len(v) for p, v in total.items()}
    return Trial(candidate, losses, time.monotonic() - began, len(folds))


def _fit_into(
    plan: Plan,
    left_s: float,
    best: Trial,
    specs: tuple[ModalitySpec, ...],
    data: Mapping[Split, Batch],
    seed: int,
    device: torch.device,
) -> None:
    """Cut members and epochs down to what fits into the time that is left."""
    training = plan.recipe["backbone_training"]
    once = best.seconds / best.folds
    members = max(1, min(3, int(left_s / 2 / max(once, 1e-3))))
    if members < training["members"]:
        training["members"] = members
        plan.why["backbone_training.members"] = f"what the budget allows, {once:.0f} s each"
    entry = plan.recipe["imputer"]
    per_epoch = _imputer_epoch_s(entry, plan.recipe["imputer_training"], specs, data, seed, device)
    if per_epoch is None:
        del plan.recipe["imputer_training"]
        return
    schedule = plan.recipe["imputer_training"]
    epochs = max(3, min(schedule["epochs"], int((left_s - members * once) / per_epoch)))
    if epochs < schedule["epochs"]:
        schedule["epochs"] = epochs
        plan.why["imputer_training.epochs"] = f"what the budget allows, {per_epoch:.1f} s each"


def _imputer_epoch_s(
    entry: Entry,
    schedule: Entry,
    specs: tuple[ModalitySpec, ...],
    data: Mapping[Split, Batch],
    seed: int,
    device: torch.device,
) -> float | None:
    """Return how long an epoch of the imputer takes, from two of its steps; None without any."""
    kind = IMPUTERS[entry["name"]]
    with new_weights(seed, "imputer"):
        imputer = kind(specs, kind.Options(**{k: v for k, v in entry.items() if k != "name"}))
    if not any(True for _ in imputer.parameters()):
        return None
    train, size = data["train"], schedule["batch_size"]
    imputer.start_from(train)
    imputer.to(device)
    objective = ImputerObjective(
        imputer, data["validation"], record_weights(data["validation"]), device, seed
    )
    batch = train.rows(torch.arange(min(size, len(train)))).to(device)
    step = MicroBatch(batch, torch.ones(len(batch), device=device), stream(seed, "timing"))
    objective(step).backward()  # the first step also pays for what is made once
    began = time.monotonic()
    objective(step).backward()
    per_step = time.monotonic() - began
    steps: int = ceil(len(train) / size)
    return 1.2 * per_step * steps  # and validation
