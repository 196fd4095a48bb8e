"""Everything needed to answer for a patient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dymo_med.backbones import EncodedVersions, Ensemble, FusionBackbone
from dymo_med.calibration import Calibration
from dymo_med.comparators import FittedComparator
from dymo_med.conformal import Conformal
from dymo_med.errors import ConfigError, Problem
from dymo_med.imputers import Imputer
from dymo_med.modalities import modality
from dymo_med.modalities.base import Modality
from dymo_med.novelty import Novelty
from dymo_med.references import References, answering
from dymo_med.registry import nearest
from dymo_med.selection import Selector
from dymo_med.tasks import OverClasses
from dymo_med.types import (
    Batch,
    Choice,
    DrawCheck,
    Fuse,
    ModalitySpec,
    Norms,
    Performance,
    Recovery,
    SubsetStatistics,
    Use,
)


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
        novelty: What is usual among the patients it was made with; None in bundles made before that
            was kept.
        use: Which modalities its answers rest on; None in bundles made before it was tested.
        draw_check: Whether draws of its imputer are what they claim; None of an imputer that cannot
            draw, and in bundles made before it was tested.
        provenance: Cohort, recipe, counts, versions, hashed patient ids per split.
        bundle_id: SHA-256 over the checksums; empty before saving.
        device: Where the networks are.
    """

    name: str
    description: str
    task: OverClasses
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
    novelty: Novelty | None = None
    use: Use | None = None
    draw_check: DrawCheck | None = None
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
