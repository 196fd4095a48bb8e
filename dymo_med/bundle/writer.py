"""Write a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save
from torch import nn

from dymo_med.bundle.card import model_card
from dymo_med.bundle.folder import SCHEMA_VERSION, checksums_of, identity
from dymo_med.bundle.model import ModelBundle
from dymo_med.bundle.tables import selector_entries
from dymo_med.bundle.tensors import STATISTICS, on_cpu
from dymo_med.calibration import Calibration
from dymo_med.conformal import COVERAGE, Conformal
from dymo_med.files import complete_folder, write_bytes, write_json, write_text
from dymo_med.novelty import to_tensors
from dymo_med.references import References
from dymo_med.types import ModalitySpec, Task


def stored(conformal: Conformal) -> dict[str, Any]:
    """Return bounds ready for JSON; those of errors of a regression alone."""
    kept = asdict(conformal)
    return {"coverage": COVERAGE, **{k: v for k, v in kept.items() if v}}


def told(references: References) -> dict[str, Any]:
    """Return what a bundle says of its references besides their arrays."""
    return {
        "weight": references.weight,
        "partner": references.partner,
        "why": references.why,
        "better": list(references.better),
        "losses": dict(references.losses),
        "patients": references.patients,
        "entries": {
            name: {"temperature": fitted.temperature, "settings": dict(fitted.settings)}
            for name, fitted in references.fitted.items()
        },
    }


class Described(Protocol):
    """What `metadata.json` says of any bundle."""

    @property
    def name(self) -> str:
        """Name of the bundle."""

    @property
    def description(self) -> str:
        """One sentence."""

    @property
    def version(self) -> str:
        """Version of the package that trained it."""

    @property
    def task(self) -> Task:
        """What is predicted."""

    @property
    def specs(self) -> tuple[ModalitySpec, ...]:
        """Modalities in canonical order."""

    @property
    def missing_values(self) -> tuple[str, ...]:
        """Strings that mean "blank" in tables."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where it comes from."""


def metadata_of(bundle: Described) -> dict[str, Any]:
    """Return `metadata.json`, with the keys that MONAI bundles must have.

    Args:
        bundle: Of any task.
    """
    versions = bundle.provenance["versions"]
    return {
        "schema_version": SCHEMA_VERSION,
        "name": bundle.name,
        "version": bundle.version,
        "monai_version": str(versions["monai"]),
        "pytorch_version": str(versions["torch"]),
        "numpy_version": str(versions["numpy"]),
        "required_packages_version": {"dymo-med": bundle.version},
        "task": bundle.task.about,
        "description": bundle.description,
        "authors": "see provenance",
        "copyright": "see docs/README.md",
        "network_data_format": {
            "inputs": {
                s.name: {"type": s.kind, "spatial_shape": list(s.shape), "optional": True}
                for s in bundle.specs
            },
            "outputs": {
                name: {"type": "probability", "dtype": "float32"} for name in bundle.task.classes
            },
        },
        "target": bundle.task.to_dict(),
        "modalities": [spec.to_dict() for spec in bundle.specs],
        "missing_values": list(bundle.missing_values),
        "provenance": dict(bundle.provenance),
    }


def save_bundle(bundle: ModelBundle, folder: Path) -> str:
    """Write the bundle; it appears complete or not at all, replacing an earlier one.

    Args:
        bundle: The bundle.
        folder: Bundle folder.

    Returns:
        The bundle's id.

    Raises:
        ConfigError: If the folder holds something that is not a bundle.
    """
    parts = ("configs", "models", "docs")
    with complete_folder(folder, "checksums.json", (*parts, "checksums.json")) as work:
        for name in parts:
            (work / name).mkdir()
        write_json(work / "configs" / "metadata.json", metadata_of(bundle))
        write_json(work / "configs" / "inference.json", _inference(bundle))
        write_json(work / "configs" / "selectors.json", _selectors(bundle))
        write_json(work / "configs" / "calibration.json", _calibration(bundle))
        if bundle.conformal is not None:
            write_json(work / "configs" / "conformal.json", stored(bundle.conformal))
        if bundle.performance is not None:
            write_json(work / "configs" / "performance.json", asdict(bundle.performance))
        if bundle.use is not None:
            write_json(work / "configs" / "use.json", asdict(bundle.use))
        if bundle.draw_check is not None:
            write_json(work / "configs" / "draws.json", asdict(bundle.draw_check))
        if bundle.norms is not None:
            write_json(work / "configs" / "quality.json", asdict(bundle.norms))
        statistics = {k: getattr(bundle.statistics, k) for k in STATISTICS}
        tensors = {
            "imputer": bundle.imputer.state_dict(),
            "backbone": bundle.backbone.state_dict(),
            "statistics": statistics,
        }
        if bundle.comparators:
            write_json(work / "configs" / "comparators.json", _comparators(bundle))
            networks = nn.ModuleDict({n: c.network for n, c in bundle.comparators.items()})
            tensors["comparators"] = networks.state_dict()
        if bundle.references is not None:
            write_json(work / "configs" / "references.json", told(bundle.references))
            tensors["references"] = {
                f"{name}.{key}": array
                for name, fitted in bundle.references.fitted.items()
                for key, array in fitted.model.state().items()
            }
        if bundle.novelty is not None:
            tensors["novelty"], about_novelty = to_tensors(bundle.novelty)
            write_json(work / "configs" / "novelty.json", about_novelty)
        for name, part in tensors.items():
            write_bytes(work / "models" / f"{name}.safetensors", save(on_cpu(part)))
        write_text(work / "docs" / "README.md", model_card(bundle))
        sums = checksums_of(work)
        write_json(work / "checksums.json", sums)
    return identity(sums)


def _inference(bundle: ModelBundle) -> dict[str, Any]:
    return {
        "imputer": dict(bundle.imputer_entry),
        "backbone": dict(bundle.backbone_entry),
        "selector": bundle.choice.name,
        "distance": bundle.statistics.distance,
        "temperature": bundle.calibration.temperature,
        "base_rates": list(bundle.base_rates),
        **({"members": bundle.members} if bundle.members > 1 else {}),
    }


def _calibration(bundle: ModelBundle) -> dict[str, Any]:
    return {
        "fitted_on": bundle.calibration.fitted_on,
        "patients": bundle.calibration.patients,
        "confidence": {k: list(v) for k, v in bundle.calibration.confidence.items()},
        "right": {k: list(v) for k, v in bundle.calibration.right.items()},
        **_curves(bundle.calibration),
    }


def _curves(calibration: Calibration) -> dict[str, Any]:
    """Return what curves are set right by; nothing of other tasks."""
    if calibration.recalibration is None or calibration.bins is None:
        return {}
    return {"recalibration": asdict(calibration.recalibration) | {"bins": asdict(calibration.bins)}}


def _selectors(bundle: ModelBundle) -> dict[str, Any]:
    return {
        "why": bundle.choice.why,
        "calibration": {
            "patients": bundle.choice.patients,
            "results": {k: dict(v) for k, v in bundle.choice.results.items()},
        },
        "entries": selector_entries(bundle.selectors),
    }


def _comparators(bundle: ModelBundle) -> dict[str, Any]:
    return {
        name: {
            "options": dict(fitted.options),
            "temperature": fitted.temperature,
            "best_epoch": dict(fitted.best_epoch),
            "validation": dict(fitted.validation),
        }
        for name, fitted in bundle.comparators.items()
    }
