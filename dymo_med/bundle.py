"""A trained model on disk: JSON and safetensors, checksums, a model card; nothing is unpickled.

BUNDLE/configs/metadata.json      who, what, versions, modalities, provenance
BUNDLE/configs/inference.json     imputer, backbone, default selector, temperature, base rates
BUNDLE/configs/selectors.json     every selector as fitted; why which one is the default
BUNDLE/configs/calibration.json   how many patients probabilities rest on; how often they were right
BUNDLE/configs/conformal.json     bounds that prediction sets go by
BUNDLE/configs/performance.json   how good it is, by what patients have
BUNDLE/configs/quality.json       what modalities of training records were like
BUNDLE/configs/comparators.json   options, temperature, figures of comparators, if there are any
BUNDLE/models/imputer.safetensors, backbone.safetensors, statistics.safetensors
BUNDLE/models/comparators.safetensors  if there are any
BUNDLE/configs/references.json, models/references.safetensors  plain references, as arrays
BUNDLE/docs/README.md             model card
BUNDLE/checksums.json             SHA-256 of every file above
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dymo_med import __version__
from dymo_med.backbones import (
    BACKBONES,
    SEGMENTERS,
    EncodedVersions,
    Ensemble,
    FusionBackbone,
    as_one,
)
from dymo_med.bundle_checks import (
    LARGEST_CONFIG_BYTES,
    absurd,
    check_files,
    check_keys,
    check_options,
    check_temperature,
    read_specs,
    within_weights,
)
from dymo_med.calibration import Calibration
from dymo_med.comparators import COMPARATORS, Comparator, FittedComparator
from dymo_med.config import MOST_MEMBERS, Recipe
from dymo_med.config import read_recipe as _read_recipe
from dymo_med.conformal import AS_THEY_CAME, COVERAGE, FEWEST, Bound, Conformal
from dymo_med.data.gate import Limits
from dymo_med.errors import BundleError, ConfigError, Problem, out_of_memory
from dymo_med.files import complete_folder, read_json, write_bytes, write_json, write_text
from dymo_med.imputers import IMPUTERS, Imputer
from dymo_med.modalities import MODALITIES, modality
from dymo_med.modalities.base import Modality
from dymo_med.references import (
    REFERENCES,
    FittedReference,
    Reference,
    References,
    answering,
    layout_of,
)
from dymo_med.registry import Registry, nearest
from dymo_med.selection import SELECTORS, Selector
from dymo_med.types import (
    Batch,
    Choice,
    Fuse,
    Interval,
    ModalitySpec,
    Norms,
    Performance,
    PerformanceRow,
    Recovery,
    Scale,
    SubsetStatistics,
    Task,
    Use,
    UseRow,
)

if TYPE_CHECKING:
    from dymo_med.bundle_segmentation import SegmentationBundle

TABLES: dict[str, Registry[Any]] = {
    "imputer": IMPUTERS,
    "backbone": BACKBONES,
    "selector": SELECTORS,
    "comparators": COMPARATORS,
}
SCHEMA_VERSION = 2
_AGAIN = "Copy the bundle again from where it was made"
# What reading files that do not belong together can end in.
UNREADABLE = (
    *(KeyError, TypeError, ValueError, AttributeError, IndexError),
    *(OverflowError, RuntimeError, OSError, MemoryError, SafetensorError, ConfigError),
)
STATISTICS = ("subsets", "prototypes", "overall", "spread", "counts", "borrowed_from")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe and check it against the tables of this version.

    Raises:
        ConfigError: With every problem at once.
    """
    any_backbone: Registry[Any] = Registry("backbone", {**BACKBONES, **SEGMENTERS})
    recipe = _read_recipe(path, {**TABLES, "backbone": any_backbone})
    if recipe.imputer is None and recipe.backbone.name in BACKBONES:
        raise ConfigError(
            Problem(
                f"{path} imputer",
                "a required key is absent",
                expected="the key imputer",
                remedy="Add it; only a segmentation can do without",
            )
        )
    return recipe


def resolve_device(name: str) -> torch.device:
    """Return the device called `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ConfigError: If it is none of these, or CUDA is asked for and absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", name)
    if name != "cpu" and cuda is None:
        raise ConfigError(
            Problem(
                "--device",
                "unknown device",
                expected="auto, cpu or cuda, with a number behind a colon if there are several",
                remedy="Name one of these",
            )
        )
    if name != "cpu" and not torch.cuda.is_available():
        raise ConfigError(
            Problem(
                "--device",
                "this machine offers no CUDA device",
                expected="a device that is there",
                remedy="Use --device cpu",
            )
        )
    count = torch.cuda.device_count() if cuda else 0
    if cuda and int(cuda[1] or 0) >= count:
        raise ConfigError(
            Problem(
                "--device",
                "this machine has no CUDA device of that number",
                expected=f"a number below {count}",
                got=name,
                remedy="Count devices from 0, or use --device cuda or cpu",
            )
        )
    return torch.device(name)


def placed(path: Path, device: torch.device, *networks: nn.Module) -> None:
    """Move networks to a device, ready to answer.

    Args:
        path: The bundle that they are from.
        device: Where to.
        *networks: Networks.

    Raises:
        ConfigError: If its memory does not hold them: no fault of the bundle's.
    """
    try:
        for network in networks:
            network.to(device).eval().requires_grad_(False)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise _too_large(path) from error


def _too_large(path: Path) -> ConfigError:
    return ConfigError(
        Problem(
            str(path),
            "memory does not hold the bundle's networks",
            expected="a device that has room for them",
            remedy="Stop what else uses the device, or use --device cpu",
        )
    )


def misfit(path: Path, error: Exception) -> BundleError | ConfigError:
    """Return what to raise where a bundle's files were read and something went wrong.

    Args:
        path: The bundle.
        error: What went wrong.
    """
    if out_of_memory(error):
        return _too_large(path)
    return BundleError(
        Problem(
            str(path),
            "the bundle does not fit this version",
            expected=f"what dymo-med {__version__} writes",
            got=f"{type(error).__name__} while reading it",
            remedy="Train it again, or install the version that made it",
        )
    )


def hashed_id(bundle_name: str, patient_id: str) -> str:
    """Return the form in which a bundle remembers whom it was fitted on.

    Short ids can be found again by trying all of them, so this guards against mixing splits, not
    against an attacker.
    """
    return hashlib.sha256(f"{bundle_name}\n{patient_id}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class ModelBundle:
    """Everything needed to answer for a patient.

    Attributes:
        name: Name of the bundle.
        description: One sentence.
        task: What is predicted.
        specs: Modalities in canonical order, with fitted constants.
        missing_values: Strings that mean "blank" in tables.
        imputer: In evaluation mode.
        imputer_entry: Its table name and options.
        backbone: In evaluation mode.
        backbone_entry: Its table name and options.
        selectors: Every selector of the table, fitted, by name.
        choice: Which of them is the default, and why.
        statistics: Of the backbone's embedding.
        calibration: How logits become probabilities.
        base_rates: K class shares among training patients.
        conformal: What prediction sets go by; None in bundles that cannot say how many patients
            theirs rest on.
        performance: How good it is on held-back patients; None in bundles made before it was kept.
        norms: What training records were like, for the quality gate; None in bundles made before
            there was one.
        comparators: Trained to be compared with, by name; no part of the bundle's own answers.
        references: Plain models of the same patients, and what part of the answers they are; None
            in bundles made before there were any.
        use: Which modalities its answers rest on; None in bundles made before it was tested.
        provenance: Cohort, recipe, counts, versions, hashed patient ids per split.
        bundle_id: SHA-256 over the checksums; empty before saving.
        device: Where the networks are.
    """

    name: str
    description: str
    task: Task
    specs: tuple[ModalitySpec, ...]
    missing_values: tuple[str, ...]
    imputer: Imputer
    imputer_entry: Mapping[str, Any]
    backbone: FusionBackbone
    backbone_entry: Mapping[str, Any]
    selectors: Mapping[str, Selector]
    choice: Choice
    statistics: SubsetStatistics
    calibration: Calibration
    base_rates: tuple[float, ...]
    provenance: Mapping[str, Any]
    conformal: Conformal | None = None
    performance: Performance | None = None
    norms: Norms | None = None
    comparators: Mapping[str, FittedComparator] = field(default_factory=dict)
    references: References | None = None
    use: Use | None = None
    bundle_id: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def selector(self) -> Selector:
        """The default selector: the one behind the bundle's answers."""
        return self.selectors[self.choice.name]

    def with_selector(self, name: str) -> ModelBundle:
        """Return the same bundle, answering with another of its selectors.

        Raises:
            ConfigError: If it has none of that name.
        """
        if name not in self.selectors:
            raise ConfigError(
                Problem(
                    "--selector",
                    f"there is no selector called '{name}'",
                    expected="one of the bundle's selectors",
                    remedy=nearest(name, list(self.selectors)),
                )
            )
        if name == self.choice.name:
            return self
        why = f"It was asked for; this model's default is {self.choice.name}."
        return replace(self, choice=replace(self.choice, name=name, why=why))

    def answering(
        self, network: EncodedVersions, batch: Batch, recovery: Recovery | None = None
    ) -> Fuse:
        """Return what answers: the network alone, or with the reference that has a part in it.

        Args:
            network: Over B records.
            batch: These.
            recovery: Of these; None = observed versions only.
        """
        return answering(
            network, self.references, batch, recovery, self.specs, self.calibration.temperature
        )

    @property
    def members(self) -> int:
        """How many networks the backbone is the mean of."""
        return len(self.backbone.members) if isinstance(self.backbone, Ensemble) else 1

    @property
    def version(self) -> str:
        """Version of the package that trained it."""
        return str(self.provenance["versions"]["dymo_med"])

    @property
    def modalities(self) -> dict[str, Modality]:
        """Handlers of the modalities by name."""
        return {spec.name: modality(spec) for spec in self.specs}

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
            about = f"{self.task.type}: {self.task.target}"
            write_json(work / "configs" / "metadata.json", metadata_of(self, about))
            write_json(work / "configs" / "inference.json", self._inference())
            write_json(work / "configs" / "selectors.json", self._selectors())
            write_json(work / "configs" / "calibration.json", self._calibration())
            if self.conformal is not None:
                write_json(work / "configs" / "conformal.json", _stored(self.conformal))
            if self.performance is not None:
                write_json(work / "configs" / "performance.json", asdict(self.performance))
            if self.use is not None:
                write_json(work / "configs" / "use.json", asdict(self.use))
            if self.norms is not None:
                write_json(work / "configs" / "quality.json", asdict(self.norms))
            statistics = {k: getattr(self.statistics, k) for k in STATISTICS}
            tensors = {
                "imputer": self.imputer.state_dict(),
                "backbone": self.backbone.state_dict(),
                "statistics": statistics,
            }
            if self.comparators:
                write_json(work / "configs" / "comparators.json", self._comparators())
                networks = nn.ModuleDict({n: c.network for n, c in self.comparators.items()})
                tensors["comparators"] = networks.state_dict()
            if self.references is not None:
                write_json(work / "configs" / "references.json", _told(self.references))
                tensors["references"] = {
                    f"{name}.{key}": array
                    for name, fitted in self.references.fitted.items()
                    for key, array in fitted.model.state().items()
                }
            for name, part in tensors.items():
                write_bytes(work / "models" / f"{name}.safetensors", save(on_cpu(part)))
            write_text(work / "docs" / "README.md", self._model_card())
            sums = checksums_of(work)
            write_json(work / "checksums.json", sums)
        return identity(sums)

    def _inference(self) -> dict[str, Any]:
        return {
            "imputer": dict(self.imputer_entry),
            "backbone": dict(self.backbone_entry),
            "selector": self.choice.name,
            "distance": self.statistics.distance,
            "temperature": self.calibration.temperature,
            "base_rates": list(self.base_rates),
            **({"members": self.members} if self.members > 1 else {}),
        }

    def _calibration(self) -> dict[str, Any]:
        return {
            "fitted_on": self.calibration.fitted_on,
            "patients": self.calibration.patients,
            "confidence": {k: list(v) for k, v in self.calibration.confidence.items()},
            "right": {k: list(v) for k, v in self.calibration.right.items()},
        }

    def _selectors(self) -> dict[str, Any]:
        return {
            "why": self.choice.why,
            "calibration": {
                "patients": self.choice.patients,
                "results": {k: dict(v) for k, v in self.choice.results.items()},
            },
            "entries": selector_entries(self.selectors),
        }

    def _rests_on(self) -> str:
        """Return on how many patients sets and limits rest, as a sentence."""
        bounds = {} if self.conformal is None else self.conformal.scores.get(self.choice.name, {})
        n = bounds[AS_THEY_CAME].patients if AS_THEY_CAME in bounds else 0
        sets = f"Prediction sets ({COVERAGE:.0%}) rest on {n} other patients"
        if n < FEWEST:
            sets += f", fewer than the {FEWEST} that could rule a class out"
        if self.calibration.patients is None:
            return f"{sets}."
        classes = len(self.task.classes)
        most = (self.calibration.patients + 1) / (self.calibration.patients + classes)
        return f"{sets}; no probability is stated above {most:.3f}, which is what so many support."

    def _comparators(self) -> dict[str, Any]:
        return {
            name: {
                "options": dict(fitted.options),
                "temperature": fitted.temperature,
                "best_epoch": dict(fitted.best_epoch),
                "validation": dict(fitted.validation),
            }
            for name, fitted in self.comparators.items()
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
            f"| {s.name} | {s.kind} | {' x '.join(map(str, s.shape))} |"
            f" {p['observed_share'][s.name]:.0%} |"
            for s in self.specs
        )
        rates = ", ".join(
            f"{c} {r:.1%}" for c, r in zip(self.task.classes, self.base_rates, strict=True)
        )
        scale = self.task.scale
        judged = ("MAE", "mae") if scale is not None else ("log-loss", "log_loss")
        selectors = "\n".join(
            f"| {name} | {r[judged[1]]:.3f} | {r['accuracy']:.1%} | {r['spoilt']:.1%} |"
            f" {r['rescued']:.1%} |"
            for name, r in self.choice.results.items()
        )
        predicts = ", ".join(self.task.classes)
        if scale is not None:
            unit = f" {scale.unit}" if scale.unit else ""
            predicts = (
                f"a number from {scale.low:g} to {scale.high:g}{unit}, as the mean over these"
                f" bands, which below count as classes: {predicts}"
            )
        references = "" if self.references is None else _references_card(self.references, scale)
        references += "" if self.use is None else _use_card(self.use, scale)
        comparators = "".join(
            f"| {name} | {c.validation[judged[1]]:.3f} | {c.temperature:.3f} |\n"
            for name, c in self.comparators.items()
        )
        if comparators:
            comparators = f"""
Comparators, trained like the backbone and no part of this bundle's answers; {judged[0]} on the
validation split over subsets of modalities, before calibration:

| comparator | {judged[0]} | temperature |
|---|---|---|
{comparators}"""
        return f"""# {self.name}

{self.description}

Decision support for research. Not a medical device, not for diagnosis.

- Predicts `{self.task.target}`: {predicts}.
- Trained on cohort `{p["cohort"]}`; class shares among training patients: {rates}.
- Imputer `{self.imputer_entry["name"]}`, backbone `{self.backbone_entry["name"]}`, temperature
  {self.calibration.temperature:.3f}, fitted on {self.calibration.fitted_on} patients.
- {self._rests_on()}
- Default selector: `{self.choice.name}`. {self.choice.why}

| split | records | labelled | patients |
|---|---|---|---|
{counts}

| modality | kind | shape | observed in training |
|---|---|---|---|
{modalities}

Selectors on {self.choice.patients} patients who were not trained on (modalities hidden at random,
each selector fitted on other patients than it is scored on; spoilt and put right: against
measurements alone):

| selector | {judged[0]} | accuracy | spoilt | put right |
|---|---|---|---|---|
{selectors}
{references}{comparators}
The test split was not read while this bundle was made. Run `dymo-med evaluate` for its
performance, and on your own patients before you rely on it.

Limits: answers assume patients, scanners and protocols like those of the training cohort.
Recovered scans and values are guesses by a model; the report marks every one of them.
"""


def task_of(path: Path) -> str:
    """Return the type of task of a bundle, or `classification` of what is not one.

    What is wrong with it is left to those who load it.

    Args:
        path: Bundle folder.
    """
    try:
        return str(read_json(path / "configs" / "metadata.json")["target"]["type"])
    except (OSError, ValueError, KeyError, TypeError):
        return "classification"


def require_task(path: Path, *, segmentation: bool) -> None:
    """Check that a bundle is for a segmentation, or that it is not.

    Raises:
        BundleError: If it is the other way round.
    """
    got = task_of(path)
    if (got == "segmentation") != segmentation:
        loader = "load_bundle" if segmentation else "load_segmentation_bundle"
        raise BundleError(
            Problem(
                str(path),
                "the bundle is for another task",
                expected="a segmentation" if segmentation else "a classification or regression",
                got=f"a {got}",
                remedy=f"Choose another bundle; in Python, load this one by {loader}",
            )
        )


def load_bundle(path: Path, device: str = "auto") -> ModelBundle:
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
    where = resolve_device(device)
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
        task = Task(
            metadata["target"]["type"],
            metadata["target"]["target"],
            tuple(metadata["target"]["classes"]),
            _scale(metadata["target"].get("scale")),
        )
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
            use=_load_use(path),
            bundle_id=identity(sums),
        )
    except UNREADABLE as error:
        raise misfit(path, error) from error
    # What happens to a device is no fault of the bundle's.
    networks = (c.network for c in comparators.values())
    placed(path, where, bundle.imputer, bundle.backbone, *networks)
    return replace(bundle, statistics=statistics.to(where), device=where)


def _scale(stored: Mapping[str, Any] | None) -> Scale | None:
    """Return the scale of a regression."""
    if stored is None:
        return None
    centers = tuple(float(c) for c in stored["centers"])
    return Scale(float(stored["low"]), float(stored["high"]), centers, str(stored["unit"]))


def table_entry(part: str, entry: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a table entry's class and its validated options."""
    options = dict(entry)
    found = TABLES[part][options.pop("name")]
    if "image_encoders" in found.Options.model_fields and "image_encoders" not in options:
        # Bundles from before encoders had names.
        before = {"image_encoders": ["strided"], "table_encoder": "columns", "tails": False}
        options = {k: v for k, v in before.items() if k in found.Options.model_fields} | options
    return found, found.Options.model_validate(options)


def selector_entries(selectors: Mapping[str, Selector]) -> dict[str, Any]:
    """Return selectors, by name, ready for JSON: options and what was fitted."""
    return {
        name: {"options": selector.options.model_dump(), "state": selector.state()}
        for name, selector in selectors.items()
    }


def restored(entries: Mapping[str, Any] | Sequence[str]) -> dict[str, Selector]:
    """Return the selectors that `selector_entries` described.

    Args:
        entries: By name; the names alone in segmentation bundles made before options were stored.

    Raises:
        KeyError: If there is no such selector, or something is absent.
        ValueError: If options or state cannot be right.
    """
    if not isinstance(entries, Mapping):
        entries = {name: {"options": {}, "state": {}} for name in entries}
    selectors: dict[str, Selector] = {}
    for name, entry in entries.items():
        found = SELECTORS[name]
        selectors[name] = found(found.Options.model_validate(entry["options"]))
        selectors[name].load_state(entry["state"])
    return selectors


def read_part(path: Path, name: str) -> Any:
    """Return what a JSON file of a bundle holds.

    Raises:
        BundleError: If it cannot be read or could mean two things.
    """
    try:
        data = read_json(path / name, LARGEST_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise BundleError(
            Problem(
                f"{path}: {name}",
                "the file cannot be used",
                expected="JSON that this package wrote",
                got=type(error).__name__ if isinstance(error, OSError) else str(error),
                remedy=_AGAIN,
            )
        ) from None
    if name == "configs/metadata.json":
        check_version(path, data)
    check_keys(path, name, data)
    if name == "configs/inference.json":
        check_options(path, [data.get("imputer"), data.get("backbone")])
    return data


def check_version(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse a bundle of another format, or of a version that this one cannot know.

    Raises:
        BundleError: Saying which.
    """
    made_by = str(metadata.get("version", "unknown"))[:40]
    if metadata["schema_version"] != SCHEMA_VERSION:
        raise BundleError(
            Problem(
                str(path),
                "the bundle's format is not known to this version",
                expected=f"schema_version {SCHEMA_VERSION}",
                got=str(metadata["schema_version"])[:40],
                remedy=f"Install the dymo-med version that made it ({made_by})",
            )
        )
    # Numbers alone: 0.2.0rc1 counts as 0.2.0.
    made, here = (tuple(map(int, re.findall(r"\d+", v)[:3])) for v in (made_by, __version__))
    if not made or made > here:
        raise BundleError(
            Problem(
                str(path),
                "the bundle was made by a newer version of this package",
                expected=f"dymo-med {__version__} or earlier",
                got=made_by,
                remedy=f"Install dymo-med {made_by}",
            )
        )


def load_weights(network: nn.Module, path: Path, name: str) -> None:
    """Put a file's weights into a network.

    Raises:
        BundleError: If names, shapes or types differ, or a weight is not a number.
    """
    stored, wanted = load_file(path / name), network.state_dict()
    weights = {key for key, _ in network.named_parameters()}
    wrong = []
    for key in sorted({*stored, *wanted}):
        theirs, ours = stored.get(key), wanted.get(key)
        if theirs is None or ours is None or _form(theirs) != _form(ours):
            wrong.append(f"{key} is {_form(theirs)} and not {_form(ours)}")
        # A buffer may hold infinity: a limit that was never reached.
        elif theirs.isnan().any() or (key in weights and not theirs.isfinite().all()):
            wrong.append(f"{key} holds NaN or infinity")
        elif absurd(theirs, weight=key in weights):
            wrong.append(f"{key} holds numbers that no training leads to")
    if wrong:
        raise _wrong_tensors(path, name, wrong)
    network.load_state_dict(stored)


def _form(tensor: Tensor | None) -> str:
    """Return a tensor's type and shape for people."""
    if tensor is None:
        return "absent"
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _wrong_tensors(path: Path, name: str, wrong: Sequence[str]) -> BundleError:
    """Return the error of a file whose tensors are not the right ones."""
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return BundleError(
        Problem(
            f"{path}: {name}",
            "the tensors are not those of this model",
            expected="the names, shapes and types that configs/inference.json asks for, all finite",
            got="; ".join(wrong[:3]) + more,
            remedy=_AGAIN,
        )
    )


def load_statistics(
    path: Path,
    distance: Any,
    modalities: int,
    classes: int | None = None,
    others: Mapping[str, tuple[int | None, ...]] | None = None,
) -> tuple[SubsetStatistics, dict[str, Tensor]]:
    """Return the subset statistics of a bundle, and what else is in their file.

    Args:
        path: The bundle.
        distance: Of its embedding.
        modalities: M.
        classes: K; None = as many as the file has.
        others: Shape of each other float32 tensor that has to be there; None in the place of a
            size is K.

    Raises:
        BundleError: If their shapes or types do not belong together, or a number is not finite.
        ValueError: If the distance is unknown.
    """
    if distance not in ("cosine", "euclidean"):
        raise ValueError("the distance is not known")
    name = "models/statistics.safetensors"
    stored = load_file(path / name)
    overall = stored.get("overall", torch.empty(0, 0))
    classes = len(overall) if classes is None else classes
    count, dim = len(stored.get("subsets", ())), overall.shape[-1]
    forms = {
        "subsets": f"bool {(count, modalities)}",
        "prototypes": f"float32 {(count, classes, dim)}",
        "overall": f"float32 {(classes, dim)}",
        "spread": f"float32 {(count, classes)}",
        "counts": f"int64 {(count, classes)}",
        "borrowed_from": f"int64 {(count, classes)}",
    }
    for key, shape in (others or {}).items():
        forms[key] = f"float32 {tuple(classes if n is None else n for n in shape)}"
    wrong = [
        f"{key} is {_form(stored.get(key))} and not {forms.get(key, 'absent')}"
        for key in sorted({*stored, *forms})
        if _form(stored.get(key)) != forms.get(key, "absent")
    ]
    if not wrong:
        wrong += [f"{k} holds NaN or infinity" for k, v in stored.items() if not v.isfinite().all()]
        large = [k for k, v in stored.items() if absurd(v, weight=False)]
        wrong += [f"{k} holds numbers that no training leads to" for k in large]
        source = stored["borrowed_from"]
        # -1: of no subset at all, but of all together.
        if not count or bool(((source < -1) | (source >= count)).any()):
            wrong.append("borrowed_from leads nowhere")
    if wrong:
        raise _wrong_tensors(path, name, wrong)
    rest = {key: stored.pop(key) for key in others or {}}
    return SubsetStatistics(distance=distance, **stored), rest


def _shares(numbers: Sequence[Any], classes: int) -> bool:
    """Return whether these are the shares of so many classes."""
    return (
        len(numbers) == classes
        and all(isinstance(n, float | int) and 0 <= n <= 1 for n in numbers)
        and math.isclose(sum(numbers), 1, abs_tol=1e-3)
    )


def _load_calibration(path: Path, temperature: float, task: Task, choice: Choice) -> Calibration:
    """Return how a bundle turns logits into probabilities.

    One made before patients were counted fitted everything on its calibration patients: their
    number limits its probabilities, and none are left to count.
    """
    if not (path / "configs" / "calibration.json").is_file():
        n = choice.patients
        return Calibration(temperature, n, n if task.scale is None else None)
    stored = read_part(path, "configs/calibration.json")
    return Calibration(
        temperature,
        stored["fitted_on"],
        stored["patients"],
        {k: tuple(v) for k, v in stored["confidence"].items()},
        {k: tuple(v) for k, v in stored["right"].items()},
    )


def _stored(conformal: Conformal) -> dict[str, Any]:
    """Return bounds ready for JSON; those of errors of a regression alone."""
    kept = asdict(conformal)
    return {"coverage": COVERAGE, **{k: v for k, v in kept.items() if v}}


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
    return Conformal(scores, errors)


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


def _told(references: References) -> dict[str, Any]:
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


def _references_card(references: References, scale: Scale | None) -> str:
    """Return what a model card says of references."""
    rows = "".join(f"| {name} | {loss:.3f} |\n" for name, loss in references.losses.items())
    key = "log-loss" if scale is None else "mean absolute error"
    text = f"""
Plain references (no network; a few lines of scikit-learn on cells and measurements of scans),
trained on the same patients. {references.why}
"""
    if references.better:
        text += f"""
**Warning:** on held-back patients {", ".join(references.better)} answered better than the network,
beyond chance.
"""
    if not rows:
        return text
    return f"""{text}
| held-back patients ({references.patients}), as they are and with modalities hidden | {key} |
|---|---|
{rows}"""


def _use_card(use: Use, scale: Scale | None) -> str:
    """Return what a model card says of which modalities are used."""

    def number(one: float | None) -> str:
        return "-" if one is None else f"{one:.3f}"

    def shown(one: Interval) -> str:
        if one.value is None or one.low is None or one.high is None:
            return "-"
        return f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})"

    rows = "".join(
        f"| {r.part} | {r.patients} | {r.verdict} | {number(r.change)} | {shown(r.auroc_loss)} |"
        f" {shown(r.loss)} | {number(r.p)} | {shown(r.alone)} | {shown(r.reference)} |\n"
        for r in use.rows
    )
    key = "log-loss" if scale is None else "mean absolute error"
    return f"""
Use audit: contents are exchanged between held-back patients who have the same modalities
({use.patients} patients, {use.permutations} permutations; 95 % intervals). Unused: answers change
by less than 0.02, and from it alone they are no better than chance. Reference: plain, on it alone.

| part | patients | verdict | change | AUROC lost | {key} added | p | AUROC alone | reference |
|---|---|---|---|---|---|---|---|---|
{rows}"""


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


def _load_references(path: Path, specs: Sequence[ModalitySpec], task: Task) -> References | None:
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


def verified(path: Path) -> dict[str, str]:
    """Return the checksums after comparing them with the files.

    Raises:
        BundleError: Naming every file that differs.
    """
    try:
        sums = read_json(path / "checksums.json")
        if not isinstance(sums, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise BundleError(
            Problem(
                str(path / "checksums.json"),
                "the list of checksums is absent or unreadable",
                expected="a SHA-256 by file name, in JSON",
                got=type(error).__name__ if isinstance(error, OSError) else str(error),
                remedy=_AGAIN,
            )
        ) from None
    now = checksums_of(path)
    differing = sorted(n for n in {*sums, *now} if sums.get(n) != now.get(n))
    if differing:
        raise BundleError(
            *(
                Problem(
                    f"{path}: {name}",
                    "the file is absent"
                    if name not in now
                    else "the file is not part of the bundle"
                    if name not in sums
                    else "the file has changed since the bundle was made",
                    expected="the files of checksums.json, unchanged and no others",
                    remedy=_AGAIN,
                )
                for name in differing
            )
        )
    return {str(k): str(v) for k, v in sums.items()}


def checksums_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of the bundle but the list itself.

    Raises:
        BundleError: If a file is a link that leads out of the bundle, or cannot be read.
    """
    sums = {}
    inside = folder.resolve()
    for part in ("configs", "docs", "models"):
        for file in sorted((folder / part).rglob("*")):
            name = file.relative_to(folder).as_posix()
            if file.name.startswith("."):  # a file browser's own notes
                continue
            try:
                if not file.resolve().is_relative_to(inside):
                    raise BundleError(
                        Problem(
                            f"{folder}: {name}",
                            "the file is a link that leads out of the bundle",
                            expected="files inside the bundle's own folder",
                            remedy="Copy the bundle with what its links lead to (cp -rL)",
                        )
                    )
                if file.is_file():
                    with file.open("rb") as stream:
                        sums[name] = hashlib.file_digest(stream, "sha256").hexdigest()
            except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
                raise BundleError(
                    Problem(
                        f"{folder}: {name}",
                        "the file cannot be read",
                        expected="a file that you may read",
                        got=type(error).__name__,
                        remedy="Check its permissions, or copy the bundle again",
                    )
                ) from None
    return sums


def identity(sums: Mapping[str, str]) -> str:
    """Return the id of a bundle: a hash over its checksums."""
    return hashlib.sha256(json.dumps(dict(sums), sort_keys=True).encode()).hexdigest()


def metadata_of(bundle: ModelBundle | SegmentationBundle, about: str) -> dict[str, Any]:
    """Return `metadata.json`, with the keys that MONAI bundles must have.

    Args:
        bundle: Of either task.
        about: The task in words.
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
        "task": about,
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


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors ready to be written."""
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
