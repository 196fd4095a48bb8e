"""The dials of the simulated cohort: every number that may be changed, and the named settings.

`docs/explanation/simulated-cohort.md` has the table for readers, with what was measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from dymo_med.config import Document, Strict
from dymo_med.errors import ConfigError, Problem
from dymo_med.registry import nearest

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)]
Spread = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Months = Annotated[float, Field(ge=1, le=1200, allow_inf_nan=False)]


class Dials(Strict):
    """How easy or hard simulated patients are; the defaults are the setting `default`.

    Nothing here depends on the grade. A spread is the standard deviation of a logarithm.

    Attributes:
        scan_evidence: Factor on the separations of what scans show.
        table_evidence: Factor on the separations of all columns: how much tables say alone.
        contradictory: Share of patients one of whose groups of evidence (all scans, or one table)
            was drawn from the other grade.
        flair_after_contrast: Whether FLAIR was acquired when 15 % of the contrast agent were left,
            and so shows the enhancement too: redundancy between scans.
        label_noise: Share of patients in whose label the grades are exchanged. The label is what
            `labels.csv` holds and what every posterior is of.
        unlabelled: Share of the training split's patients whose label is blank.
        missing: Share of patients who lack one or two modalities.
        blank: Share of table cells that are blank.
        degraded: Share of patients with four times the noise in one scan.
        anatomy: Factor on rotation, shift, change of size and smooth displacement of the head.
        atrophy_spread: Spread of the power to which maps of grey and white matter are raised:
            more or less CSF.
        tissue_spread: Spread of proton density, T1 and T2 of each tissue between patients.
        foci: Fewest and most foci that the lesion is split into, each of them equally likely, in
            places of their own. Together they have the volume of the one ball.
        lesion_mm: Radius in mm of the smallest and largest lesion, were it one ball.
        lesion_edge_mm: Width of the edge of tumour, core and oedema; at least a voxel.
        lesion_contrast: Share of a lesion's tissue in its voxels; the rest is as white matter.
        gain_spread: Spread of each scan's gain.
        bias_spread: Spread within a scan of the smooth field that it is multiplied by.
        noise: Least and most noise, as shares of the white-matter signal.
        protocol_spread: Spread of the times of each sequence between patients: TR and TE of T1
            and of T1ce alike, TR and TE of T2, TE of FLAIR.
        second_site: Share of patients who were scanned at a second site.
        site_gain: Factor on the gain there.
        site_bias: Factor on `bias_spread` there.
        site_noise: Factor on the noise there.
        site_echo: Factor on TE of T2 and FLAIR there: another contrast.
        detail: Voxels along each axis of the files per voxel of the grid that `cohort.yaml` asks
            for.
        median_months: Median survival in months of low and of high grade.
        follow_up_months: Shortest and longest follow-up in months, all between equally likely.
    """

    scan_evidence: Factor = 1.0
    table_evidence: Factor = 1.0
    contradictory: Share = 0.08
    flair_after_contrast: bool = False
    label_noise: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)] = 0.0
    unlabelled: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    missing: Share = 0.1
    blank: Share = 0.08
    degraded: Share = 0.08
    anatomy: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    atrophy_spread: Spread = 0.0
    tissue_spread: Annotated[float, Field(ge=0, le=0.2, allow_inf_nan=False)] = 0.0
    foci: tuple[Annotated[int, Field(ge=1, le=20)], Annotated[int, Field(ge=1, le=20)]] = (1, 1)
    lesion_mm: tuple[
        Annotated[float, Field(ge=4, le=30, allow_inf_nan=False)],
        Annotated[float, Field(ge=4, le=30, allow_inf_nan=False)],
    ] = (9.0, 20.0)
    lesion_edge_mm: Annotated[float, Field(ge=0, le=30, allow_inf_nan=False)] = 0.0
    lesion_contrast: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    gain_spread: Spread = 0.15
    bias_spread: Spread = 0.08
    noise: tuple[Share, Share] = (0.02, 0.05)
    protocol_spread: Annotated[float, Field(ge=0, le=0.3, allow_inf_nan=False)] = 0.0
    second_site: Share = 0.0
    site_gain: Annotated[float, Field(gt=0, le=5, allow_inf_nan=False)] = 1.5
    site_bias: Factor = 1.5
    site_noise: Factor = 1.5
    site_echo: Annotated[float, Field(ge=0.5, le=2, allow_inf_nan=False)] = 1.2
    detail: Annotated[float, Field(ge=1, le=4, allow_inf_nan=False)] = 1.0
    median_months: tuple[Months, Months] = (60.0, 15.0)
    follow_up_months: tuple[Months, Months] = (6.0, 60.0)

    @model_validator(mode="after")
    def _in_order(self) -> Dials:
        for name in ("foci", "lesion_mm", "noise", "follow_up_months"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the first number must not exceed the second")
        return self

    def changed(self) -> dict[str, object]:
        """Return the dials that differ from `default`, as YAML would hold them."""
        usual = SETTINGS["default"].model_dump(mode="json")
        return {n: v for n, v in self.model_dump(mode="json").items() if v != usual[n]}


SETTINGS: dict[str, Dials] = {
    "default": Dials(),
    "hard": Dials(
        scan_evidence=1.2,
        table_evidence=0.6,
        contradictory=0.04,
        anatomy=1.6,
        atrophy_spread=0.15,
        tissue_spread=0.02,
        foci=(3, 7),
        lesion_mm=(8.0, 18.0),
        lesion_edge_mm=6.0,
        lesion_contrast=0.8,
        gain_spread=0.4,
        bias_spread=0.12,
        noise=(0.03, 0.07),
        protocol_spread=0.05,
        second_site=0.3,
        detail=1.5,
    ),
}


def setting(name: str = "default", file: Path | None = None) -> Dials:
    """Return a named setting, with what a file changes in it.

    Args:
        name: A key of `SETTINGS`.
        file: YAML, `dial: value` lines.

    Raises:
        ConfigError: If there is no such setting, or the file is not what it should be.

    Example:
        >>> setting("hard").second_site
        0.3
    """
    if name not in SETTINGS:
        problem = Problem(
            "simulate",
            "there is no such setting",
            expected=" or ".join(SETTINGS),
            got=name,
            remedy=nearest(name, list(SETTINGS)),
        )
        raise ConfigError(problem)
    base = SETTINGS[name]
    if file is None:
        return base
    document = Document(file)
    try:
        return Dials.model_validate({**base.model_dump(), **(document.data or {})})
    except ValidationError as error:
        raise ConfigError(*document.problems(error, Dials)) from None
