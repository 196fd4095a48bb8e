"""A trained segmentation model on disk: a bundle as `dymo_med.bundle` describes them.

BUNDLE/configs/metadata.json      who, what, versions, modalities, labels and regions, provenance
BUNDLE/configs/inference.json     imputer (if any), backbone, default selector, windows
BUNDLE/configs/selectors.json     how the selectors compared; why which one is the default
BUNDLE/configs/quality.json       what modalities of training records were like
BUNDLE/configs/outline.json       what calibration patients say: volumes, wide outlines, overlap
BUNDLE/models/backbone.safetensors
BUNDLE/models/imputer.safetensors, statistics.safetensors   if there is an imputer
BUNDLE/docs/README.md             model card
BUNDLE/checksums.json             SHA-256 of every file above
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from dymo_med.backbones import SEGMENTERS, Readout, SharedUNet, Windows
from dymo_med.bundle import (
    STATISTICS,
    UNREADABLE,
    checksums_of,
    identity,
    load_norms,
    load_statistics,
    load_weights,
    metadata_of,
    misfit,
    on_cpu,
    placed,
    read_part,
    require_task,
    resolve_device,
    restored,
    selector_entries,
    table_entry,
    verified,
)
from dymo_med.bundle.checks import (
    check_files,
    check_place,
    check_windows,
    read_specs,
    within_weights,
)
from dymo_med.conformal import COVERAGE
from dymo_med.errors import ConfigError, Problem
from dymo_med.files import complete_folder, write_bytes, write_json, write_text
from dymo_med.imputers import Imputer
from dymo_med.outline_bounds import MISSED, OutlineBounds
from dymo_med.registry import nearest
from dymo_med.selection import Selector
from dymo_med.tasks import Segmentation
from dymo_med.types import Choice, MaskSpec, ModalitySpec, Norms, SubsetStatistics

_READOUT = tuple(f.name for f in fields(Readout))


@dataclass(frozen=True)
class Trust:
    """What it takes to recover absent scans and to decide which of them to use.

    Attributes:
        imputer: In evaluation mode.
        imputer_entry: Its table name and options.
        readout: How the selection reads a segmentation.
        statistics: Of what it reads.
        selectors: By name.
        choice: Which of them is the default, and why.
    """

    imputer: Imputer
    imputer_entry: Mapping[str, Any]
    readout: Readout
    statistics: SubsetStatistics
    selectors: Mapping[str, Selector]
    choice: Choice

    def to(self, device: torch.device) -> Trust:
        """Return the same with its numbers, but not its network, on a device."""
        there = self.readout.to(device), self.statistics.to(device)
        return replace(self, readout=there[0], statistics=there[1])


@dataclass(frozen=True)
class SegmentationBundle:
    """Everything needed to segment a patient.

    Attributes:
        name: Name of the bundle.
        description: One sentence.
        task: Labels and regions.
        specs: Modalities in canonical order: volumes on one grid.
        missing_values: Kept for the cohort's tables, of which there are none.
        network: In evaluation mode.
        backbone_entry: Its table name and options.
        windows: How scans are looked at.
        trust: None = absent scans are not recovered.
        provenance: Cohort, recipe, counts, versions, hashed patient ids per split.
        norms: What training records were like, for the quality gate; None in bundles made before
            it was kept.
        bounds: What can be promised of its outlines, from calibration patients; None in bundles
            made before it was kept.
        bundle_id: SHA-256 over the checksums; empty before saving.
        device: Where the networks are.
    """

    name: str
    description: str
    task: Segmentation
    specs: tuple[ModalitySpec, ...]
    missing_values: tuple[str, ...]
    network: SharedUNet
    backbone_entry: Mapping[str, Any]
    windows: Windows
    trust: Trust | None
    provenance: Mapping[str, Any]
    norms: Norms | None = None
    bounds: OutlineBounds | None = None
    bundle_id: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def mask(self) -> MaskSpec:
        """Labels and regions."""
        return self.task.mask

    @property
    def version(self) -> str:
        """Version of the package that trained it."""
        return str(self.provenance["versions"]["dymo_med"])

    @property
    def selector(self) -> str:
        """Name of the default selector."""
        return "observed_only" if self.trust is None else self.trust.choice.name

    def require_selector(self, name: str) -> None:
        """Check that there is a selector of that name.

        Raises:
            ConfigError: If there is none.
        """
        known = ["observed_only"] if self.trust is None else list(self.trust.selectors)
        if name not in known:
            raise ConfigError(
                Problem(
                    "--selector",
                    f"this bundle has no selector called '{name}'",
                    expected="one of the bundle's selectors",
                    remedy=nearest(name, known),
                )
            )

    def save(self, folder: Path) -> str:
        """Write the bundle; it appears complete or not at all, replacing an earlier one.

        Args:
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
            write_json(work / "configs" / "metadata.json", metadata_of(self))
            write_json(work / "configs" / "inference.json", self._inference())
            if self.norms is not None:
                write_json(work / "configs" / "quality.json", asdict(self.norms))
            if self.bounds is not None:
                write_json(
                    work / "configs" / "outline.json",
                    {"coverage": COVERAGE, "missed": MISSED, **self.bounds.to_dict()},
                )
            tensors = {"backbone": self.network.state_dict()}
            if self.trust is not None:
                choice = self.trust.choice
                write_json(
                    work / "configs" / "selectors.json",
                    {
                        "why": choice.why,
                        "calibration": {
                            "patients": choice.patients,
                            "results": {k: dict(v) for k, v in choice.results.items()},
                        },
                        "entries": selector_entries(self.trust.selectors),
                    },
                )
                tensors["imputer"] = self.trust.imputer.state_dict()
                statistics, readout = self.trust.statistics, self.trust.readout
                tensors["statistics"] = {
                    **{k: getattr(statistics, k) for k in STATISTICS},
                    **{f"readout.{k}": getattr(readout, k) for k in _READOUT},
                }
            for name, part in tensors.items():
                write_bytes(work / "models" / f"{name}.safetensors", save(on_cpu(part)))
            write_text(work / "docs" / "README.md", self._model_card())
            sums = checksums_of(work)
            write_json(work / "checksums.json", sums)
        return identity(sums)

    def _inference(self) -> dict[str, Any]:
        return {
            "imputer": None if self.trust is None else dict(self.trust.imputer_entry),
            "backbone": dict(self.backbone_entry),
            "selector": self.selector,
            "window": list(self.windows.size),
            "overlap": self.windows.overlap,
            "body": self.windows.body,
        }

    def _model_card(self) -> str:
        """Return the model card as Markdown."""
        p = self.provenance
        counts = "\n".join(
            f"| {split} | {p['records'][split]} | {p['labelled_records'][split]} |"
            f" {len(p['patients'][split])} |"
            for split in p["records"]
        )
        modalities = "\n".join(
            f"| {s.name} | {' x '.join(map(str, s.shape[1:]))} |"
            f" {' x '.join(f'{mm:g}' for mm in s.spacing_mm)} mm |"
            f" {p['observed_share'][s.name]:.0%} |"
            for s in self.specs
        )
        regions = "\n".join(
            f"| {name} | {', '.join(map(str, labels))} |"
            for name, labels in self.mask.regions.items()
        )
        trust = "Absent scans are left out of the mean; nothing is recovered.\n"
        if self.trust is not None:
            rows = "\n".join(
                f"| {name} | {r['dice']:.3f} | {r['gain']:+.3f}"
                f" ({r['gain_low']:+.3f} to {r['gain_high']:+.3f}) |"
                for name, r in self.trust.choice.results.items()
            )
            trust = f"""Imputer `{self.trust.imputer_entry["name"]}`; default selector
`{self.trust.choice.name}`. {self.trust.choice.why}

On {self.trust.choice.patients} calibration patients with scans hidden:

| selector | mean Dice | against observed scans alone (95 % interval) |
|---|---|---|
{rows}
"""
        return f"""# {self.name}

{self.description}

Decision support for research. Not a medical device, not for diagnosis.

Segments volumes; trained on cohort `{p["cohort"]}`. Backbone `{self.backbone_entry["name"]}`.

| region | labels |
|---|---|
{regions}

| split | records | with a mask | patients |
|---|---|---|---|
{counts}

| scan | grid | voxel | observed in training |
|---|---|---|---|
{modalities}

{trust}
The test split was not read while this bundle was made. Run `dymo-med evaluate` for its
performance, and on your own patients before you rely on it.

Limits: answers assume patients, scanners and protocols like those of the training cohort.
"""


def load_segmentation_bundle(path: Path | str, device: str = "auto") -> SegmentationBundle:
    """Load a segmentation bundle after checking every file's hash.

    Args:
        path: Bundle folder.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Returns:
        The bundle, its networks in evaluation mode on `device`.

    Raises:
        BundleError: If it is absent, damaged, changed, for another task, or of an unknown format.
        ConfigError: If the device is unknown or absent.
    """
    path, where = Path(path), resolve_device(device)
    require_task(path, segmentation=True)
    check_files(path)
    sums = verified(path)
    try:
        metadata = read_part(path, "configs/metadata.json")
        inference = read_part(path, "configs/inference.json")
        target = metadata["target"]
        task = Segmentation.from_dict(target)
        check_place(f"{path}: configs/metadata.json: mask", target["mask"]["file"])
        check_windows(path, inference["window"], float(inference["overlap"]))
        specs = read_specs(path, metadata["modalities"])
        options = dict(inference["backbone"])
        kind = SEGMENTERS[options.pop("name")]
        # Random initial weights are overwritten at once; the caller's random state stays.
        weights = "models/backbone.safetensors"
        with torch.random.fork_rng(devices=[]), within_weights(path, weights):
            network = kind(specs, len(task.classes), kind.Options.model_validate(options))
        load_weights(network, path, "models/backbone.safetensors")
        bundle = SegmentationBundle(
            name=metadata["name"],
            description=metadata["description"],
            task=task,
            specs=specs,
            missing_values=tuple(metadata["missing_values"]),
            network=network,
            backbone_entry=inference["backbone"],
            windows=Windows(
                tuple(inference["window"]),
                float(inference["overlap"]),
                body=inference.get("body") is True,  # older bundles look everywhere
            ),
            trust=_load_trust(path, inference, network),
            provenance=metadata["provenance"],
            norms=load_norms(path),
            bounds=_load_bounds(path),
            bundle_id=identity(sums),
        )
    except UNREADABLE as error:
        raise misfit(path, error) from error
    # What happens to a device is no fault of the bundle's.
    trust = bundle.trust
    placed(path, where, network, *(() if trust is None else (trust.imputer,)))
    return replace(bundle, trust=None if trust is None else trust.to(where), device=where)


def _load_bounds(path: Path) -> OutlineBounds | None:
    """Return what can be promised of outlines; None where a bundle does not say."""
    if not (path / "configs" / "outline.json").is_file():
        return None
    stored = read_part(path, "configs/outline.json")
    if (stored["coverage"], stored["missed"]) != (COVERAGE, MISSED):
        raise ValueError("other promises than this version makes")
    return OutlineBounds.from_dict(stored)


def _load_trust(path: Path, inference: Mapping[str, Any], network: SharedUNet) -> Trust | None:
    """Return imputer and selectors; None where there are none."""
    if inference["imputer"] is None:
        return None
    kind, options = table_entry("imputer", inference["imputer"])
    weights = "models/imputer.safetensors"
    with torch.random.fork_rng(devices=[]), within_weights(path, weights):
        imputer = kind(network.specs, options)
    load_weights(imputer, path, "models/imputer.safetensors")
    size = (network.embedding_size,)
    shapes = {"centres": (None,), "spread": (), "mean": size, "std": size, "voxel_ml": ()}
    statistics, rest = load_statistics(
        path, "cosine", len(network.specs), others={f"readout.{k}": shapes[k] for k in _READOUT}
    )
    readout = Readout(**{k: rest[f"readout.{k}"] for k in _READOUT})
    if len(readout.centres) < 2 or not (readout.spread > 0 and readout.voxel_ml > 0):
        raise ValueError("the readout cannot be right")
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
    return Trust(
        imputer,
        inference["imputer"],
        readout,
        statistics,
        selectors,
        choice,
    )
