"""Load a bundle after checking every file of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn

from dymo_med.backbones import as_one
from dymo_med.bundle.checks import (
    check_files,
    check_options,
    check_temperature,
    read_specs,
    within_weights,
)
from dymo_med.bundle.device import placed, resolve_device
from dymo_med.bundle.folder import UNREADABLE, identity, misfit, read_part, require_task, verified
from dymo_med.bundle.model import ModelBundle
from dymo_med.bundle.tables import restored, table_entry
from dymo_med.bundle.tensors import load_statistics, load_weights
from dymo_med.calibration import Calibration
from dymo_med.comparators import Comparator, FittedComparator
from dymo_med.config import MOST_MEMBERS
from dymo_med.conformal import COVERAGE, Bound, Conformal
from dymo_med.data.gate import Limits
from dymo_med.errors import BundleError, Problem
from dymo_med.modalities import MODALITIES
from dymo_med.novelty import Novelty, from_tensors
from dymo_med.references import REFERENCES, FittedReference, Reference, References, layout_of
from dymo_med.survival import Recalibration, TimeBins, TimeBound
from dymo_med.tasks import OverClasses, answered, task_from
from dymo_med.types import (
    Choice,
    DrawCheck,
    DrawRow,
    Interval,
    ModalitySpec,
    Norms,
    Performance,
    PerformanceRow,
    Use,
    UseRow,
)


def load_bundle(path: Path | str, device: str = "auto") -> ModelBundle:
    """Load a bundle after checking every file's hash.

    Args:
        path: Bundle folder.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Returns:
        The bundle, its networks in evaluation mode on `device`.

    Raises:
        BundleError: If it is absent, damaged, changed, or from an unknown format.
        ConfigError: If the device is unknown or absent.
    """
    path, where = Path(path), resolve_device(device)
    if not (path / "configs" / "metadata.json").is_file():
        raise BundleError(
            Problem(
                str(path),
                "this is not a bundle",
                expected="a folder with configs/metadata.json",
                remedy="Give the bundle folder that `dymo-med train` wrote (RUN/bundle)",
            )
        )
    require_task(path, segmentation=False)
    check_files(path)
    sums = verified(path)
    try:
        metadata = read_part(path, "configs/metadata.json")
        inference = read_part(path, "configs/inference.json")
        task = answered(task_from(metadata["target"]))
        specs = read_specs(path, metadata["modalities"])
        for spec in specs:
            _ = MODALITIES[spec.kind]
        imputer_class, imputer_options = table_entry("imputer", inference["imputer"])
        backbone_class, backbone_options = table_entry("backbone", inference["backbone"])
        stored = read_part(path, "configs/selectors.json")
        selectors = restored(stored["entries"])
        choice = Choice(
            inference["selector"],
            stored["why"],
            stored["calibration"]["results"],
            stored["calibration"]["patients"],
        )
        if choice.name not in selectors:
            raise KeyError(choice.name)
        conformal = _load_conformal(path)
        # Random initial weights are overwritten at once; the caller's random state stays.
        weights = ("models/imputer.safetensors", "models/backbone.safetensors")
        with torch.random.fork_rng(devices=[]), within_weights(path, *weights):
            imputer = imputer_class(specs, imputer_options)
            members = int(inference.get("members", 1))
            if not 1 <= members <= MOST_MEMBERS:
                raise ValueError("the number of networks cannot be right")
            backbone = as_one(
                [backbone_class(specs, len(task.classes), backbone_options) for _ in range(members)]
            )
        imputer.tie(backbone)
        load_weights(imputer, path, "models/imputer.safetensors")
        load_weights(backbone, path, "models/backbone.safetensors")
        comparators = _load_comparators(path, specs, len(task.classes))
        statistics, _ = load_statistics(path, inference["distance"], len(specs), len(task.classes))
        temperature = float(inference["temperature"])
        check_temperature(f"{path}: configs/inference.json", temperature)
        calibration = _load_calibration(path, temperature, task, choice)
        base_rates = tuple(inference["base_rates"])
        if not _shares(base_rates, len(task.classes)):
            raise ValueError("the class shares cannot be right")
        bundle = ModelBundle(
            name=metadata["name"],
            description=metadata["description"],
            task=task,
            specs=specs,
            missing_values=tuple(metadata["missing_values"]),
            imputer=imputer,
            imputer_entry=inference["imputer"],
            backbone=backbone,
            backbone_entry=inference["backbone"],
            selectors=selectors,
            choice=choice,
            statistics=statistics,
            calibration=calibration,
            base_rates=base_rates,
            provenance=metadata["provenance"],
            conformal=conformal,
            performance=_load_performance(path),
            norms=load_norms(path),
            comparators=comparators,
            references=_load_references(path, specs, task),
            novelty=_load_novelty(path, specs),
            use=_load_use(path),
            draw_check=_load_draws(path),
            bundle_id=identity(sums),
        )
    except UNREADABLE as error:
        raise misfit(path, error) from error
    # What happens to a device is no fault of the bundle's.
    networks = (c.network for c in comparators.values())
    placed(path, where, bundle.imputer, bundle.backbone, *networks)
    return replace(bundle, statistics=statistics.to(where), device=where)


def _shares(numbers: Sequence[Any], classes: int) -> bool:
    """Return whether these are the shares of so many classes."""
    return (
        len(numbers) == classes
        and all(isinstance(n, float | int) and 0 <= n <= 1 for n in numbers)
        and math.isclose(sum(numbers), 1, abs_tol=1e-3)
    )


def _load_calibration(
    path: Path, temperature: float, task: OverClasses, choice: Choice
) -> Calibration:
    """Return how a bundle turns logits into probabilities.

    One made before patients were counted fitted everything on its calibration patients: their
    number limits its probabilities, and none are left to count.
    """
    if not (path / "configs" / "calibration.json").is_file():
        n = choice.patients
        return Calibration(temperature, n, n if task.calibrated else None)
    stored = read_part(path, "configs/calibration.json")
    return Calibration(
        temperature,
        stored["fitted_on"],
        stored["patients"],
        {k: tuple(v) for k, v in stored["confidence"].items()},
        {k: tuple(v) for k, v in stored["right"].items()},
        **_recalibration(stored.get("recalibration")),
    )


def _recalibration(stored: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what curves are set right by, as arguments of a calibration; none of other tasks."""
    if stored is None:
        return {}
    spread, bins = stored["covariance"], stored["bins"]
    numbers = {k: stored[k] for k in ("intercept", "slope", "patients", "events")}
    found = Recalibration(**numbers, covariance=None if spread is None else tuple(spread))
    return {"recalibration": found, "bins": TimeBins(tuple(bins["edges"]), bins["unit"])}


def _load_conformal(path: Path) -> Conformal | None:
    """Return what a bundle's prediction sets go by; None where it does not say.

    A bundle made before patients were counted lists cases, several of each patient: nothing is
    known of whose they are, so no coverage can be promised from them.

    Raises:
        ValueError: If the bounds are for another coverage than this version's, or are none.
    """
    if not (path / "configs" / "conformal.json").is_file():
        return None
    kept = read_part(path, "configs/conformal.json")
    if "patterns" in kept:
        return None
    if kept["coverage"] != COVERAGE:
        raise ValueError("the bounds are for another coverage")
    scores, errors = (
        {
            method: {group: Bound(**bound) for group, bound in groups.items()}
            for method, groups in kept.get(part, {}).items()
        }
        for part in ("scores", "errors")
    )
    times = {
        method: {group: TimeBound(**bound) for group, bound in groups.items()}
        for method, groups in kept.get("times", {}).items()
    }
    return Conformal(scores, errors, times)


def _load_performance(path: Path) -> Performance | None:
    """Return how good a bundle is; None where it does not say."""
    if not (path / "configs" / "performance.json").is_file():
        return None
    stored = read_part(path, "configs/performance.json")
    rows = tuple(
        PerformanceRow(**{**row, **{k: Interval(**row[k]) for k in ("auroc", "brier", "ece")}})
        for row in stored["rows"]
    )
    return Performance(rows, stored["patients"], stored["fewest"])


def load_norms(path: Path) -> Norms | None:
    """Return what training records were like; None where a bundle does not say.

    Raises:
        ConfigError: If a limit is unknown or not a number that it can be.
    """
    if not (path / "configs" / "quality.json").is_file():
        return None
    stored = read_part(path, "configs/quality.json")
    Limits.model_validate(stored["limits"])
    return Norms(
        stored["limits"],
        {
            modality_: {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
            for modality_, ranges in stored["ranges"].items()
        },
        stored["records"],
    )


def _load_comparators(
    path: Path, specs: Sequence[ModalitySpec], classes: int
) -> dict[str, FittedComparator]:
    """Return the comparators of a bundle; none where it holds none.

    Raises:
        ValueError: If their configuration is there without their weights, or the reverse.
    """
    config = path / "configs" / "comparators.json"
    weights = path / "models" / "comparators.safetensors"
    if config.is_file() != weights.is_file():
        raise ValueError("comparators.json and comparators.safetensors belong together")
    if not config.is_file():
        return {}
    stored = read_part(path, "configs/comparators.json")
    networks = nn.ModuleDict()
    check_options(path, [entry["options"] for entry in stored.values()])
    with (
        torch.random.fork_rng(devices=[]),
        within_weights(path, "models/comparators.safetensors"),
    ):
        for name, entry in stored.items():
            kind, options = table_entry("comparators", {"name": name, **entry["options"]})
            networks[name] = kind(specs, classes, options)
    load_weights(networks, path, "models/comparators.safetensors")
    return {
        name: FittedComparator(
            cast(Comparator, networks[name]),
            entry["options"],
            check_temperature(f"{path}: configs/comparators.json", float(entry["temperature"])),
            entry["best_epoch"],
            entry["validation"],
        )
        for name, entry in stored.items()
    }


def _load_use(path: Path) -> Use | None:
    """Return which modalities a bundle uses; None where it does not say."""
    if not (path / "configs" / "use.json").is_file():
        return None
    stored = read_part(path, "configs/use.json")
    intervals = ("auroc_loss", "loss", "alone", "reference")
    rows = tuple(
        UseRow(**{**row, **{k: Interval(**row[k]) for k in intervals}}) for row in stored["rows"]
    )
    return Use(rows, int(stored["patients"]), int(stored["permutations"]))


def _load_novelty(path: Path, specs: Sequence[ModalitySpec]) -> Novelty | None:
    """Return what is usual among a bundle's patients; None where it does not say.

    Raises:
        KeyError: If a part is absent.
        ValueError: If numbers do not fit, or half of the two files is absent.
    """
    config = path / "configs" / "novelty.json"
    arrays = path / "models" / "novelty.safetensors"
    if config.is_file() != arrays.is_file():
        raise ValueError("novelty.json and novelty.safetensors belong together")
    if not config.is_file():
        return None
    layout = layout_of(specs)
    try:
        return from_tensors(
            load_file(arrays),
            read_part(path, "configs/novelty.json"),
            specs,
            layout.owner,
            layout.categories,
        )
    except RuntimeError as error:  # of torch: no covariance
        raise ValueError("a covariance that is not positive definite") from error


def _load_draws(path: Path) -> DrawCheck | None:
    """Return whether a bundle's draws are what they claim; None where it does not say."""
    if not (path / "configs" / "draws.json").is_file():
        return None
    stored = read_part(path, "configs/draws.json")
    rows = tuple(DrawRow(**{**row, "value": Interval(**row["value"])}) for row in stored["rows"])
    return DrawCheck(rows, int(stored["draws"]))


def _load_references(
    path: Path, specs: Sequence[ModalitySpec], task: OverClasses
) -> References | None:
    """Return the references of a bundle; None where it holds none.

    Raises:
        KeyError: If one is unknown, or an array absent.
        ValueError: If arrays are not those of such a model, or half of the two files is absent.
    """
    config = path / "configs" / "references.json"
    arrays = path / "models" / "references.safetensors"
    if config.is_file() != arrays.is_file():
        raise ValueError("references.json and references.safetensors belong together")
    if not config.is_file():
        return None
    stored, tensors = read_part(path, "configs/references.json"), load_file(arrays)
    layout = layout_of(specs)
    models: dict[str, Reference] = {}
    fitted = {}
    for name, entry in stored["entries"].items():
        model = REFERENCES[name](layout, len(task.classes), task.scale)
        own = {
            k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")
        }
        model.load_state(own, models)
        models = {**models, name: model}
        fitted[name] = FittedReference(model, float(entry["temperature"]), entry["settings"])
    return References(
        layout,
        fitted,
        float(stored["weight"]),
        str(stored["partner"]),
        str(stored["why"]),
        tuple(map(str, stored["better"])),
        {str(name): float(loss) for name, loss in stored["losses"].items()},
        int(stored["patients"]),
    )
