"""The quality gate: may a modality of a patient be used, and is it like what the model has seen?

Every check compares one figure with what training records were like (`Norms`), or, where nothing is
known of them, with what any scan must have. It ends in pass, warn or refuse: warn is shown in the
report, refuse is an error unless the modality is to be treated as missing. Refusing what is usable
costs a patient a measurement, so the limits of refusal are far out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from dymo_med.config import Strict
from dymo_med.modalities.native import extent_mm
from dymo_med.types import (
    GateFinding,
    GateResult,
    ModalitySpec,
    ModalityValue,
    Native,
    Norms,
    PatientRecord,
)

# Fewer training records than this do not say what is usual; as for percentiles of tables.
FEWEST = 20
# What each check holds against a modality, for errors; reports have words of their own.
CHECKS: Mapping[str, str] = {
    "finite": "voxels are not numbers",
    "constant": "all voxels have the same value",
    "off_grid": "nothing of the scan is where the model looks",
    "made_up": "it was not measured: this program made it in an earlier run",
    "empty": "nothing stands out from the background",
    "noise": "neighbouring voxels have nothing in common: noise, not a picture",
    "mask": "there are no grey values: a mask, not a scan",
    "resolution": "the voxels are coarser than any the model has seen",
    "field_small": "the field of view is too small",
    "field_large": "the field of view is too large",
    "shape": "the picture has other proportions than any the model has seen",
    "tilt": "the scan is tilted more than any the model has seen",
    "body": "the bright part has another size than in any scan the model has seen",
    "contrast": "the range of intensities is another than in any scan the model has seen",
    "offset": "the intensities begin elsewhere than in any scan the model has seen",
    "balance": "dark and bright are distributed as in no scan that the model has seen",
    "copy": "it is the same scan as that of another modality",
    "filled": "far fewer cells are filled than in tables the model has seen",
    "outside": "values lie far outside those of training patients",
}
WITHOUT_IT = "predict, impute and evaluate go on without it if --treat-refused-as-missing is added"

Ratio = Annotated[float, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
_Level = Literal["warn", "refuse"]


class Limits(Strict):
    """Every limit of the gate; `quality:` of a cohort overrides them for its bundles.

    "Usual" is the range from the 1st to the 99th percentile over training records. Ratios are to
    the nearer end of it. Where fewer than `FEWEST` training records had the modality, the grid
    stands in for it, `*_refuse` is the ratio from which to warn, and its square that of refusal.

    Attributes:
        coarser_warn: Voxel size over the coarsest usual one (or the grid's, if that is coarser:
            finer detail never reaches the network). Half as much again is still a routine
            protocol.
        coarser_refuse: At four times, a structure of a few voxels is less than one.
        smaller_warn: Usual (or the grid's) field of view over this one, along an axis: a fifth of
            what is looked at is not there.
        smaller_refuse: Three fifths are not there.
        larger_warn: Field of view over the largest usual one, or the grid's: another body part?
        larger_refuse: Five times is no body part; it is a wrong unit or voxel size.
        shape_warn: Proportion of a picture's sides over the usual one.
        tilt_warn: Degrees beyond the most tilted usual scan; interpolation takes care of tilt.
        body_warn: Share of bright voxels over the usual one, either way.
        body_refuse: Ten times more or less is something else.
        contrast_warn: Range of intensities (1st to 99th percentile) over the usual one, either
            way. Never refused where intensities are normalised scan by scan: networks do not see
            it then.
        contrast_refuse: With `intensity: none`.
        offset_warn: How far the darkest (1st percentile) is beyond the usual, in usual ranges of
            intensities. A CT without its offset of -1000 is about 0.4 off.
        offset_refuse: With `intensity: none`.
        balance_warn: Where the median lies between the 1st and 99th percentile, beyond the usual.
            Inverted scans are about 0.5 off or more.
        empty: Smaller share of bright (or of dark) voxels: the scan shows nothing.
        noise_warn: Correlation of neighbours below which a scan hardly shows anything.
        noise_refuse: Below this nothing but noise is left; noise itself is at 0 within 0.01.
        mask_levels: Scans with as few different numbers are masks.
        filled_warn: Usual share of filled cells over this one.
        outside_sd: Standard deviations from the training mean beyond which a value is far outside.
        outside_refuse: Share of a table's filled numbers that is far outside: wrong units or
            columns. Of fewer than four filled numbers nothing is refused.
    """

    coarser_warn: Ratio = 1.5
    coarser_refuse: Ratio = 4.0
    smaller_warn: Ratio = 1.25
    smaller_refuse: Ratio = 2.5
    larger_warn: Ratio = 1.5
    larger_refuse: Ratio = 5.0
    shape_warn: Ratio = 1.5
    tilt_warn: Annotated[float, Field(ge=0)] = 20.0
    body_warn: Ratio = 2.0
    body_refuse: Ratio = 10.0
    contrast_warn: Ratio = 3.0
    contrast_refuse: Ratio = 10.0
    offset_warn: Annotated[float, Field(ge=0)] = 0.3
    offset_refuse: Annotated[float, Field(ge=0)] = 3.0
    balance_warn: Share = 0.25
    empty: Share = 0.002
    noise_warn: Share = 0.2
    noise_refuse: Share = 0.05
    mask_levels: Annotated[int, Field(ge=0)] = 4
    filled_warn: Ratio = 2.0
    outside_sd: Annotated[float, Field(gt=0)] = 4.0
    outside_refuse: Share = 0.5


def judge(spec: ModalitySpec, value: ModalityValue, norms: Norms | None = None) -> GateResult:
    """Return what the gate says of one modality.

    Args:
        spec: The modality, with fitted constants where there are any.
        value: As read.
        norms: Of the training records; None = only checks that need no training data.

    Returns:
        Findings in the order of `CHECKS`, at most one per check.
    """
    limits = Limits.model_validate(dict(norms.limits)) if norms is not None else Limits()
    usual = norms.ranges.get(spec.name, {}) if norms is not None else {}
    found: Iterable[GateFinding | None]
    if value.native is not None:
        found = (*_scan(spec, value.native, usual, limits), _copy(value))
    elif value.observed_fields is not None:
        found = _table(spec, value, usual, limits)
    else:
        found = ()
    return GateResult(tuple(finding for finding in found if finding is not None))


def measure(value: ModalityValue) -> dict[str, float]:
    """Return the figures of one modality that `Norms` keep the usual range of.

    Args:
        value: As read.
    """
    scan = value.native
    if scan is None:
        if value.observed_fields is None:
            return {}
        return {"filled": float(value.observed_fields.double().mean())}
    figures = {
        "tilt": scan.tilt_degrees,
        "body": scan.foreground,
        "low": scan.low,
        "width": scan.high - scan.low,
        "balance": _balance(scan),
        "levels": float(scan.levels),
        "structure": scan.structure,
    }
    if scan.spacing_mm is None:
        figures["pixels"] = float(max(scan.size))
        figures["shape"] = scan.size[0] / scan.size[1]
        return figures
    for axis, (side, voxel) in enumerate(
        zip(extent_mm(scan.size, scan.spacing_mm), scan.spacing_mm, strict=True)
    ):
        figures[f"extent_mm.{axis}"], figures[f"voxel_mm.{axis}"] = side, voxel
    return figures


def fit_norms(
    specs: Sequence[ModalitySpec],
    records: Sequence[PatientRecord],
    limits: Mapping[str, float] | None = None,
) -> Norms:
    """Return what the modalities of training records were like.

    Args:
        specs: Modalities in canonical order.
        records: Training records.
        limits: Limits that differ from the usual ones.
    """
    ranges: dict[str, dict[str, tuple[float, float]]] = {}
    counts: dict[str, int] = {}
    for spec in specs:
        figures = [measure(r.modalities[spec.name]) for r in records if spec.name in r.modalities]
        counts[spec.name] = len(figures)
        if len(figures) < FEWEST:
            continue
        ranges[spec.name] = {}
        for name in dict.fromkeys(key for row in figures for key in row):
            column = [row[name] for row in figures if name in row]
            if len(column) >= FEWEST:
                low, high = np.quantile(column, [0.01, 0.99]).tolist()
                ranges[spec.name][name] = (low, high)
    return Norms(dict(limits or {}), ranges, counts)


def _copy(value: ModalityValue) -> GateFinding | None:
    """Return the finding of a scan that is there under another modality's name too."""
    if not value.same_as:
        return None
    return GateFinding(
        "copy", "warn", f"the same voxels as {value.same_as}", "a scan of its own; check the names"
    )


# --- Scans ----------------------------------------------------------------------------------------


def _scan(
    spec: ModalitySpec,
    scan: Native,
    usual: Mapping[str, tuple[float, float]],
    limits: Limits,
) -> Iterator[GateFinding | None]:
    """Yield what is found in a scan."""
    share = min(scan.foreground, 1 - scan.foreground)
    if share < limits.empty:
        yield GateFinding(
            "empty",
            "refuse",
            f"{_percent(scan.foreground)} of voxels brighter than the rest",
            f"between {_percent(limits.empty)} and {_percent(1 - limits.empty)}",
        )
        return
    smooth = usual.get("structure", (1.0, 1.0))[0]
    if scan.structure < limits.noise_warn and smooth > 2 * limits.noise_warn:
        yield GateFinding(
            "noise",
            "refuse" if scan.structure < limits.noise_refuse else "warn",
            f"a correlation of {scan.structure:.2f}",
            f"at least {limits.noise_warn:g}",
        )
    if scan.levels <= limits.mask_levels and usual.get("levels", (16.0, 0.0))[0] >= 16:
        yield GateFinding(
            "mask",
            "refuse" if usual else "warn",
            f"{scan.levels} different values",
            f"more than {limits.mask_levels}",
        )
    if scan.spacing_mm is not None:
        yield from _geometry(spec, scan, scan.spacing_mm, usual, limits)
    else:
        yield from _picture(spec, scan, usual, limits)
    if usual:
        yield from _brightness(spec, scan, usual, limits)


def _geometry(
    spec: ModalitySpec,
    scan: Native,
    spacing_mm: Sequence[float],
    usual: Mapping[str, tuple[float, float]],
    limits: Limits,
) -> Iterator[GateFinding | None]:
    """Yield what is found in the voxel size and the field of view of a scan that has them."""
    # A slice is compared along its own two axes, on its own terms: its grid is that of a screen.
    axes = [a for a, n in enumerate(scan.size) if n > 1 or len(spec.shape) == 4]
    grid = dict.fromkeys(axes, 0.0)
    cover = dict.fromkeys(axes, math.nan)
    if len(spec.shape) == 4:
        grid = dict(enumerate(spec.spacing_mm))
        cover = dict(enumerate(extent_mm(spec.shape[1:], spec.spacing_mm)))
    sides = extent_mm(scan.size, spacing_mm)
    known = all(f"voxel_mm.{a}" in usual for a in axes)
    if not known and len(spec.shape) != 4:
        return
    voxels = {a: usual[f"voxel_mm.{a}"] if known else (grid[a], grid[a]) for a in axes}
    extents = {a: usual[f"extent_mm.{a}"] if known else (cover[a], cover[a]) for a in axes}

    def most(low_high: Mapping[int, tuple[float, float]], end: int) -> str:
        return " x ".join(f"{low_high[a][end]:.3g}" for a in axes) + " mm"

    coarsest = {a: max(voxels[a][1], grid[a]) for a in axes}
    ratio = max(max(spacing_mm[a], grid[a]) / coarsest[a] for a in axes)
    yield _graded(
        "resolution",
        ratio,
        _steps(limits.coarser_warn, limits.coarser_refuse, known),
        " x ".join(f"{spacing_mm[a]:.3g}" for a in axes) + " mm",
        "at most " + " x ".join(f"{coarsest[a]:.3g}" for a in axes) + " mm",
    )
    shown = " x ".join(f"{sides[a]:.3g}" for a in axes) + " mm"
    needed = {a: float(np.fmin(extents[a][0], cover[a])) for a in axes}
    yield _graded(
        "field_small",
        max(needed[a] / sides[a] for a in axes),
        _steps(limits.smaller_warn, limits.smaller_refuse, known),
        shown,
        "at least " + " x ".join(f"{needed[a]:.3g}" for a in axes) + " mm",
    )
    widest = {a: float(np.fmax(extents[a][1], cover[a])) for a in axes}
    yield _graded(
        "field_large",
        max(sides[a] / widest[a] for a in axes),
        _steps(limits.larger_warn, limits.larger_refuse, known),
        shown,
        "at most " + " x ".join(f"{widest[a]:.3g}" for a in axes) + " mm",
    )
    if "tilt" in usual and scan.tilt_degrees > usual["tilt"][1] + limits.tilt_warn:
        yield GateFinding(
            "tilt",
            "warn",
            f"{scan.tilt_degrees:.0f} degrees",
            f"at most {usual['tilt'][1]:.0f} degrees",
        )


def _picture(
    spec: ModalitySpec,
    scan: Native,
    usual: Mapping[str, tuple[float, float]],
    limits: Limits,
) -> Iterator[GateFinding | None]:
    """Yield what is found in the size of a picture, which is fitted into its frame."""
    frame, longest = max(spec.shape[1:]), max(scan.size)
    known = "pixels" in usual
    fewest = min(usual["pixels"][0], frame) if known else frame
    yield _graded(
        "resolution",
        fewest / longest,
        _steps(limits.coarser_warn, limits.coarser_refuse, known),
        f"{longest} pixels along the longer side",
        f"at least {fewest:.0f}",
    )
    if known:
        low, high = usual["shape"]
        shape = scan.size[0] / scan.size[1]
        yield _graded(
            "shape",
            max(low / shape, shape / high),
            (limits.shape_warn, math.inf),
            f"{shape:.2f} times as high as wide",
            f"{low:.2f} to {high:.2f} times",
        )


def _brightness(
    spec: ModalitySpec,
    scan: Native,
    usual: Mapping[str, tuple[float, float]],
    limits: Limits,
) -> Iterator[GateFinding | None]:
    """Yield what is found in the intensities of a scan, compared with the usual ones."""
    low, high = usual["body"]
    yield _graded(
        "body",
        max(low / scan.foreground, scan.foreground / high),
        (limits.body_warn, limits.body_refuse),
        f"{_percent(scan.foreground)} of voxels",
        f"{_percent(low)} to {_percent(high)}",
    )
    # What is normalised scan by scan reaches the network without its scale and offset.
    seen = spec.intensity == "none"
    width, (low, high) = scan.high - scan.low, usual["width"]
    if low > 0:
        yield _graded(
            "contrast",
            max(low / width, width / high) if width > 0 else math.inf,
            (limits.contrast_warn, limits.contrast_refuse if seen else math.inf),
            f"a range of {width:.3g}",
            f"{low:.3g} to {high:.3g}",
        )
        start, end = usual["low"]
        yield _graded(
            "offset",
            max(start - scan.low, scan.low - end) / high,
            (limits.offset_warn, limits.offset_refuse if seen else math.inf),
            f"a 1st percentile of {scan.low:.3g}",
            f"{start:.3g} to {end:.3g}",
        )
    low, high = usual["balance"]
    balance = _balance(scan)
    yield _graded(
        "balance",
        max(low - balance, balance - high),
        (limits.balance_warn, math.inf),
        f"a median at {_percent(balance)} of the range",
        f"{_percent(low)} to {_percent(high)}",
    )


def _balance(scan: Native) -> float:
    """Return where the median lies between the 1st and 99th percentile, 0 to 1."""
    width = scan.high - scan.low
    return (scan.middle - scan.low) / width if width > 0 else 0.5


# --- Tables ---------------------------------------------------------------------------------------


def _table(
    spec: ModalitySpec,
    value: ModalityValue,
    usual: Mapping[str, tuple[float, float]],
    limits: Limits,
) -> Iterator[GateFinding | None]:
    """Yield what is found in a table."""
    filled = measure(value)["filled"]
    if "filled" in usual:
        low, high = usual["filled"]
        yield _graded(
            "filled",
            low / filled,
            (limits.filled_warn, math.inf),
            f"{_percent(filled)} of cells",
            f"{_percent(low)} to {_percent(high)}",
        )
    far = _far(spec, value, limits)
    if far:
        numbers = sum(
            bool(f) and c.type == "continuous"
            for c, f in zip(spec.columns, _filled(value), strict=True)
        )
        refused = numbers >= 4 and len(far) > limits.outside_refuse * numbers
        yield GateFinding(
            "outside",
            "refuse" if refused else "warn",
            ", ".join(far),
            f"within {limits.outside_sd:g} standard deviations",
        )


def _filled(value: ModalityValue) -> list[bool]:
    if value.observed_fields is None:
        return [True] * len(value.values)
    filled: list[bool] = value.observed_fields.tolist()
    return filled


def _far(spec: ModalitySpec, value: ModalityValue, limits: Limits) -> tuple[str, ...]:
    """Return the columns whose values are too many standard deviations from the mean."""
    return tuple(
        column.name
        for column, x, filled in zip(
            spec.columns, value.values.tolist(), _filled(value), strict=True
        )
        if filled
        and column.mean is not None
        and column.std is not None
        and abs(x - column.mean) > limits.outside_sd * column.std
    )


# --- Both -----------------------------------------------------------------------------------------


def _steps(warn: float, refuse: float, known: bool) -> tuple[float, float]:
    """Return from where to warn and to refuse; further out where the usual is not known."""
    return (warn, refuse) if known else (refuse, refuse**2)


def _graded(
    check: str, figure: float, steps: tuple[float, float], got: str, expected: str
) -> GateFinding | None:
    """Return a finding if a figure exceeds a limit."""
    if not figure > steps[0]:
        return None
    return GateFinding(check, "refuse" if figure > steps[1] else "warn", got, expected)


def _percent(share: float) -> str:
    """Return a share for people.

    Example:
        >>> _percent(0.25), _percent(0.0004)
        ('25 %', '0.04 %')
    """
    return f"{100 * share:.3g} %" if share > 0.1 else f"{100 * share:.2g} %"
