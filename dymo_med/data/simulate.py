"""A cohort of simulated glioma patients: four MRI sequences and three tables, truth known.

Each patient has a grade and, drawn from it, latent evidence: how much the tumour enhances, how
old the patient is, and so on. Scans and table cells depict that evidence and nothing else depends
on the grade, so the exact posterior of the grade is known for every set of modalities.
`docs/explanation/simulated-cohort.md` says what is real here and what is not.

References:
    Fonov et al., Unbiased nonlinear average age-appropriate brain templates from birth to
    adulthood, NeuroImage 47 (2009) S102: the anatomy.
    Wansapura et al., NMR relaxation times in the human brain at 3.0 Tesla, J Magn Reson Imaging 9
    (1999): grey and white matter. Lin et al., Magn Reson Med 45 (2001): T1 of CSF.
    Gudbjartsson and Patz, The Rician distribution of noisy MRI data, Magn Reson Med 34 (1995).
    Ashburner and Friston, Nonlinear spatial normalization using basis functions, Hum Brain Mapp 7
    (1999): cosine bases for deformations.
    Lancaster et al., Bias between MNI and Talairach coordinates analyzed using the ICBM-152 brain
    template, Hum Brain Mapp 28 (2007): the template is larger than most heads.
"""

from __future__ import annotations

import gzip
import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import expit, ndtr

from dymo_med.data.dials import SETTINGS, Dials
from dymo_med.data.simulated_survival import (
    SURVIVAL,
    SURVIVAL_LABELS,
    SURVIVAL_TRUTH,
    draw_times,
    survival_description,
)
from dymo_med.data.truth import TRUTH, every_subset, posterior_column
from dymo_med.errors import ConfigError, Problem
from dymo_med.files import csv_text

Floats = NDArray[np.float32]

CLASSES = ("low", "high")
SPLIT_SHARES = {"train": 0.50, "validation": 0.10, "calibration": 0.15, "test": 0.25}

DEFAULT = SETTINGS["default"]

FIELD_OF_VIEW_MM = 192.0
CENTRE_MM = (0.0, -18.0, 8.0)
SMALLEST_SIZE = 16


# --- Magnetic resonance -------------------------------------------------------------------------


@dataclass(frozen=True)
class Tissue:
    """What a sequence sees of a tissue at 3 T.

    Attributes:
        proton_density: Relative to water.
        t1_ms: Longitudinal relaxation time.
        t2_ms: Transverse relaxation time.
    """

    proton_density: float
    t1_ms: float
    t2_ms: float

    def with_contrast(self, concentration_millimolar: float) -> Tissue:
        """Return this tissue with a gadolinium contrast agent in it.

        1/T1' = 1/T1 + r1 C and 1/T2' = 1/T2 + r2 C, with r1 = 4.5 and r2 = 5.5 per s per mM.

        Args:
            concentration_millimolar: C.
        """
        return Tissue(
            self.proton_density,
            1.0 / (1.0 / self.t1_ms + 4.5e-3 * concentration_millimolar),
            1.0 / (1.0 / self.t2_ms + 5.5e-3 * concentration_millimolar),
        )


@dataclass(frozen=True)
class Sequence3T:
    """A spin echo sequence, or with an inversion time an inversion recovery sequence.

    Attributes:
        tr_ms: Repetition time.
        te_ms: Echo time.
        ti_ms: Inversion time; None for plain spin echo.
    """

    tr_ms: float
    te_ms: float
    ti_ms: float | None = None

    def timed(self, repetition: float, echo: float) -> Sequence3T:
        """Return this sequence with its times changed.

        Args:
            repetition: Factor on TR. An inversion recovery keeps its own: with another TR its TI
                would no longer null CSF.
            echo: Factor on TE.
        """
        tr_ms = self.tr_ms * (repetition if self.ti_ms is None else 1.0)
        return replace(self, tr_ms=tr_ms, te_ms=self.te_ms * echo)

    def signal(self, tissue: Tissue) -> float:
        """Return the noise-free signal of a voxel that is all one tissue.

        Spin echo: PD (1 - 2 exp(-(TR - TE/2)/T1) + exp(-TR/T1)) exp(-TE/T2).
        Inversion recovery: PD |1 - 2 exp(-TI/T1) + 2 exp(-(TR - TE/2)/T1) - exp(-TR/T1)|
        exp(-TE/T2).
        """
        to_echo = math.exp(-(self.tr_ms - self.te_ms / 2) / tissue.t1_ms)
        to_repeat = math.exp(-self.tr_ms / tissue.t1_ms)
        if self.ti_ms is None:
            recovered = 1 - 2 * to_echo + to_repeat
        else:
            recovered = abs(1 - 2 * math.exp(-self.ti_ms / tissue.t1_ms) + 2 * to_echo - to_repeat)
        return tissue.proton_density * recovered * math.exp(-self.te_ms / tissue.t2_ms)


TISSUES = {
    "csf": Tissue(1.00, 4163, 2000),
    "grey": Tissue(0.83, 1331, 110),
    "white": Tissue(0.70, 832, 79.6),
    # The proton density makes oedema as bright as white matter on T1, to four digits (in patients
    # it is a little darker): only then do T1 and T1ce carry no evidence about oedema.
    "oedema": Tissue(0.8807, 1250, 150),
    "rim": Tissue(0.87, 1600, 140),
    "core": Tissue(0.95, 2800, 400),
}

# What the lesion is made of.
LESION = ("oedema", "rim", "core")

SEQUENCES = {
    "t1": Sequence3T(600, 12),
    "t1ce": Sequence3T(600, 12),
    "t2": Sequence3T(4500, 95),
    "flair": Sequence3T(9000, 120, 2420),
}


# --- Evidence -----------------------------------------------------------------------------------

# Separation d of each latent that images show: z | grade ~ N(d (grade - 1/2), 1).
# A dial multiplies all of them, as another multiplies those of the columns.
IMAGE_SEPARATION = {"enhancement": 1.6, "oedema": 1.2, "necrosis": 0.8, "size": 0.5}

DEPICTS = {
    "t1": ("necrosis", "size"),
    "t1ce": ("enhancement", "necrosis", "size"),
    "t2": ("oedema", "necrosis", "size"),
    "flair": ("oedema", "necrosis", "size"),
}


# Share of the contrast agent that is left in the rim when FLAIR is acquired after it. With all of
# it FLAIR would be no brighter: what a short T1 adds, a short T2 takes away at TE 120 ms.
LEFT_FOR_FLAIR = 0.15


def enhancing(dials: Dials) -> dict[str, float]:
    """Return the share of the contrast agent by sequence, of those acquired after it."""
    return {"t1ce": 1.0} | ({"flair": LEFT_FOR_FLAIR} if dials.flair_after_contrast else {})


@dataclass(frozen=True)
class Measurement:
    """A continuous column: a latent, mapped to a unit, rounded and kept in range.

    Attributes:
        unit: Unit, for people.
        range: Closed range of what is recorded.
        step: Values are recorded in multiples of it.
        centre: Value at latent 0.
        scale: Value per unit of latent; of the logarithm if `logarithmic`. Positive.
        separation: d of the latent; negative where high grade means a low value.
        logarithmic: Whether the value is log-normal given the grade.
    """

    unit: str
    range: tuple[float, float]
    step: float
    centre: float
    scale: float
    separation: float
    logarithmic: bool = False

    def record(self, latent: float) -> tuple[str, float, float]:
        """Return the recorded text and the interval of latents that are recorded as it."""
        if self.logarithmic:
            value = self.centre * math.exp(self.scale * latent)
        else:
            value = self.centre + self.scale * latent
        first, last = (round(end / self.step) for end in self.range)
        multiple = min(max(round(value / self.step), first), last)
        digits = max(0, -math.floor(math.log10(self.step)))
        text = f"{multiple * self.step:.{digits}f}"
        lower = -math.inf if multiple == first else self._latent((multiple - 0.5) * self.step)
        upper = math.inf if multiple == last else self._latent((multiple + 0.5) * self.step)
        return text, lower, upper

    def _latent(self, value: float) -> float:
        if self.logarithmic:
            return math.log(value / self.centre) / self.scale
        return (value - self.centre) / self.scale

    def described(self) -> dict[str, object]:
        """Return this column's entry in `cohort.yaml`."""
        return {"type": "continuous", "unit": self.unit, "range": list(self.range)}


@dataclass(frozen=True)
class Finding:
    """A categorical column of two values: the second where the latent exceeds a threshold.

    Attributes:
        values: Both categories.
        threshold: Latents above it are recorded as the second.
        separation: d of the latent.
    """

    values: tuple[str, str]
    threshold: float
    separation: float

    def record(self, latent: float) -> tuple[str, float, float]:
        """Return the recorded text and the interval of latents that are recorded as it."""
        if latent > self.threshold:
            return self.values[1], self.threshold, math.inf
        return self.values[0], -math.inf, self.threshold

    def described(self) -> dict[str, object]:
        """Return this column's entry in `cohort.yaml`."""
        return {"type": "categorical", "values": list(self.values)}


_NO_YES = ("no", "yes")

TABLES: dict[str, dict[str, Measurement | Finding]] = {
    "demographics": {
        "age_years": Measurement("years", (18, 95), 1, 55, 13, 1.0),
        "sex": Finding(("F", "M"), 0.0, 0.0),
        "karnofsky": Measurement("points", (40, 100), 10, 80, 12, -0.4),
    },
    "symptoms": {
        "seizures": Finding(_NO_YES, 0.2, -0.5),
        "headache": Finding(_NO_YES, 0.0, 0.4),
        "motor_deficit": Finding(_NO_YES, 0.4, 0.5),
        "cognitive_change": Finding(_NO_YES, 0.3, 0.4),
        "duration_weeks": Measurement("weeks", (1, 200), 1, 12, 0.9, -0.6, logarithmic=True),
    },
    "labs": {
        "ldh": Measurement("U/L", (80, 900), 1, 210, 0.25, 0.5, logarithmic=True),
        "crp": Measurement("mg/L", (0.2, 200), 0.1, 4.0, 0.9, 0.4, logarithmic=True),
        "neutrophil_lymphocyte_ratio": Measurement(
            "1", (0.5, 30), 0.1, 3.2, 0.45, 0.6, logarithmic=True
        ),
        "albumin": Measurement("g/L", (20, 55), 1, 41, 4, -0.5),
        "fibrinogen": Measurement("g/L", (1, 9), 0.1, 3.4, 0.7, 0.3),
    },
}

MODALITIES = (*DEPICTS, *TABLES)

# What may contradict the rest, as a whole: every piece of evidence belongs to exactly one group.
GROUPS: dict[str, tuple[str, ...]] = {
    "scans": tuple(IMAGE_SEPARATION),
    **{name: tuple(columns) for name, columns in TABLES.items()},
}


@dataclass(frozen=True)
class Evidence:
    """All that is drawn of a patient before any image is made.

    Attributes:
        grade: 0 low, 1 high.
        latents: Latent per piece of evidence (image latent or column).
        log_likelihood_ratios: log p(observed | high) - log p(observed | low) per piece of evidence,
            contradiction left out of account: d z for image latents, and for a cell that of the
            text recorded in it.
        cells: Recorded text per column.
        blank: Columns whose cell is blank though the table is there.
        missing: Modalities that the patient lacks.
        contradictory: Group that was drawn from the other grade; empty if none.
        degraded: Scan with four times the noise; empty if none.
        label: The grade as labelled, 0 low, 1 high.
        site: 1, or 2 for the second site.
        death_months: When the patient dies.
        follow_up_months: How long the patient is followed.
    """

    grade: int
    latents: Mapping[str, float]
    log_likelihood_ratios: Mapping[str, float]
    cells: Mapping[str, str]
    blank: tuple[str, ...]
    missing: tuple[str, ...]
    contradictory: str
    degraded: str
    label: int
    site: int
    death_months: float = math.nan
    follow_up_months: float = math.nan

    def observed(self, dials: Dials = DEFAULT) -> tuple[str, ...]:
        """Return the pieces of evidence that the patient's files show."""
        present = [name for name in MODALITIES if name not in self.missing]
        return tuple(name for name in pieces(present, dials) if name not in self.blank)


def pieces(modalities: Collection[str], dials: Dials = DEFAULT) -> tuple[str, ...]:
    """Return the pieces of evidence that complete modalities show, each once.

    Example:
        >>> pieces(["t2", "flair"])
        ('oedema', 'necrosis', 'size')
    """
    names = [n for m in modalities for n in (DEPICTS[m] if m in DEPICTS else TABLES[m])]
    if set(modalities) & set(enhancing(dials)):
        names.append("enhancement")
    return tuple(dict.fromkeys(names))


def interval_log_likelihood_ratio(lower: float, upper: float, separation: float) -> float:
    """Return log P(lower < z < upper | high) - log P(lower < z < upper | low).

    Example:
        >>> interval_log_likelihood_ratio(float("-inf"), float("inf"), 1.0)
        0.0
    """

    def log_probability(mean: float) -> float:
        a, b = lower - mean, upper - mean
        # Differences of the normal distribution function are only accurate in its lower tail.
        return math.log(ndtr(b) - ndtr(a) if a < 0 else ndtr(-a) - ndtr(-b))

    return log_probability(separation / 2) - log_probability(-separation / 2)


def _high(by_group: NDArray[np.float64], dials: Dials) -> NDArray[np.float64]:
    """Return the exact probability of the label "high" given each of some sets of evidence `(S,)`.

    With L_g the summed log-likelihood ratio of what is observed of group g, G groups, and c the
    share of patients one of whose groups (any, equally likely) was drawn from the other grade:
    p(observed | high) is proportional to exp(sum L) ((1 - c) + c/G sum_g exp(-L_g)), and
    p(observed | low), on the same scale, to (1 - c) + c/G sum_g exp(L_g). Both grades are equally
    frequent. What is not observed is integrated out by leaving it out: given the grade and the
    contradiction, pieces of evidence are independent. A label that is wrong with probability e has
    the probability e + (1 - 2 e) p.

    Args:
        by_group: L_g `(S, G)`.
        dials: Those that the patient was drawn with.
    """
    c = dials.contradictory
    share = c / len(GROUPS)
    # In logarithms from the start: exp of much evidence overflows.
    with np.errstate(divide="ignore"):
        kept, turned = np.log([1 - c, share])
    high = by_group.sum(1) + np.logaddexp(kept, np.logaddexp.reduce(turned - by_group, axis=1))
    low = np.logaddexp(kept, np.logaddexp.reduce(turned + by_group, axis=1))
    probability: NDArray[np.float64] = expit(high - low)
    return dials.label_noise + (1 - 2 * dials.label_noise) * probability


def posterior_high(
    ratios: Mapping[str, float], observed: Collection[str], dials: Dials = DEFAULT
) -> float:
    """Return the exact probability of the label "high" given some pieces of evidence.

    Args:
        ratios: Log-likelihood ratio per piece of evidence.
        observed: Pieces of evidence to use.
        dials: Those that the patient was drawn with.

    Example:
        >>> posterior_high({}, [])
        0.5
    """
    by_group = [sum(ratios[n] for n in names if n in observed) for names in GROUPS.values()]
    return float(_high(np.array([by_group]), dials)[0])


def separation_of(name: str, dials: Dials = DEFAULT) -> float:
    """Return d of a piece of evidence."""
    if name in IMAGE_SEPARATION:
        return IMAGE_SEPARATION[name] * dials.scan_evidence
    (column,) = (columns[name] for columns in TABLES.values() if name in columns)
    return column.separation * dials.table_evidence


def draw_evidence(generator: np.random.Generator, dials: Dials = DEFAULT) -> Evidence:
    """Draw a patient's grade and evidence.

    Args:
        generator: Source of randomness.
        dials: How much evidence there is, and how often it is missing or contradicts.
    """
    # A stream of its own: dials that draw from it change nothing that is drawn without them.
    (apart,) = generator.spawn(1)
    grade = int(generator.random() < 0.5)
    groups = tuple(GROUPS)
    group = groups[generator.integers(len(groups))]
    contradictory = group if generator.random() < dials.contradictory else ""

    latents, ratios, cells = {}, {}, {}
    for group, names in GROUPS.items():
        drawn_from = 1 - grade if group == contradictory else grade
        for name in names:
            separation = separation_of(name, dials)
            latent = separation * (drawn_from - 0.5) + generator.standard_normal()
            latents[name] = latent
            if group == "scans":
                ratios[name] = separation * latent
            else:
                cells[name], lower, upper = TABLES[group][name].record(latent)
                ratios[name] = interval_log_likelihood_ratio(lower, upper, separation)

    # Drawn for everyone, used or not: `missing` then changes nothing else about a patient.
    blank = generator.random(len(cells)) < dials.blank
    lacks = generator.permutation(MODALITIES)[: generator.integers(1, 3)]
    lacking = generator.random() < dials.missing
    scan = tuple(SEQUENCES)[generator.integers(len(SEQUENCES))]
    degraded = scan if generator.random() < dials.degraded else ""
    wrong, second = apart.random(2) < (dials.label_noise, dials.second_site)
    return Evidence(
        grade=grade,
        latents=latents,
        log_likelihood_ratios=ratios,
        cells=cells,
        blank=tuple(name for name, is_blank in zip(cells, blank, strict=True) if is_blank),
        missing=tuple(name for name in MODALITIES if lacking and name in lacks),
        contradictory=contradictory,
        degraded=degraded,
        label=1 - grade if wrong else grade,
        site=2 if second else 1,
    )


# --- Anatomy and lesion -------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesion:
    """Size and look of a lesion; every number grows strictly with one latent.

    Attributes:
        radius_mm: Radius of the tumour, core and rim.
        core_mm: Radius of the necrotic core.
        oedema_mm: Thickness of the oedema around the tumour.
        oedema_fraction: Share of white matter there that is oedematous.
        contrast_millimolar: Concentration of contrast agent in the rim on T1ce.
    """

    radius_mm: float
    core_mm: float
    oedema_mm: float
    oedema_fraction: float
    contrast_millimolar: float

    @classmethod
    def from_latents(cls, latents: Mapping[str, float], dials: Dials = DEFAULT) -> Lesion:
        """Return the lesion that depicts `enhancement`, `oedema`, `necrosis` and `size`."""
        smallest_mm, largest_mm = dials.lesion_mm
        radius_mm = smallest_mm + (largest_mm - smallest_mm) * float(ndtr(latents["size"]))
        oedema = float(ndtr(latents["oedema"]))
        return cls(
            radius_mm=radius_mm,
            core_mm=radius_mm * (0.2 + 0.5 * float(ndtr(latents["necrosis"]))),
            oedema_mm=3 + 13 * oedema,
            oedema_fraction=0.25 + 0.75 * oedema,
            contrast_millimolar=0.12 * math.exp(0.9 * latents["enhancement"]),
        )


@dataclass(frozen=True)
class Scans:
    """Images of one patient on one grid.

    Attributes:
        images: Int16 `(V, V, V)` per sequence, arbitrary scanner units, 0 outside the brain.
        lesion: Uint8 `(V, V, V)`: 0 elsewhere, 1 oedema, 2 enhancing rim, 3 necrotic core.
        affine: Voxel to world `(4, 4)`, mm, RAS+, close to MNI coordinates.
        centre_mm: Centre of the lesion, or of its largest focus, world coordinates.
    """

    images: Mapping[str, NDArray[np.int16]]
    lesion: NDArray[np.uint8]
    affine: NDArray[np.float64]
    centre_mm: tuple[float, float, float]


@cache
def _anatomy() -> tuple[tuple[Floats, Floats, Floats], NDArray[np.float64]]:
    """Return the grey, white and brain maps `(X, Y, Z)` in 0..1 and their affine `(4, 4)`."""
    with np.load(Path(__file__).parent / "anatomy" / "mni152.npz", allow_pickle=False) as stored:
        grey, white, brain = (
            stored[name].astype(np.float32) / 255 for name in ("grey", "white", "brain")
        )
        return (grey, white, brain), stored["affine"]


def grid_affine(size: int) -> NDArray[np.float64]:
    """Return the affine `(4, 4)` of a cube of `size` voxels around the brain, mm, RAS+."""
    spacing_mm = FIELD_OF_VIEW_MM / size
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = np.array(CENTRE_MM) - spacing_mm * (size - 1) / 2
    return affine


def _smooth_field(generator: np.random.Generator, size: int, order: int) -> Floats:
    """Return a random field `(V, V, V)` of unit variance, cosines up to `order` half waves."""
    positions = (np.arange(size) + 0.5) / size
    basis = np.cos(np.pi * positions[:, None] * np.arange(order + 1)).astype(np.float32)
    field = generator.standard_normal((order + 1,) * 3, dtype=np.float32)
    field[0, 0, 0] = 0
    for _ in range(3):  # each turn contracts the first axis and appends it as (V,) at the end
        field = np.tensordot(field, basis, axes=(0, 1))
    scaled: Floats = field / field.std()
    return scaled


def _template_coordinates(
    generator: np.random.Generator, size: int, variation: float = 1.0
) -> Floats:
    """Return where each voxel of a patient lies in the template, mm `(3, V, V, V)`.

    A rotation of a few degrees, a shift and a change of size by a few per cent (head shape), and
    a smooth displacement of 2.5 mm (brain shape).

    Args:
        generator: Source of randomness.
        size: V.
        variation: Factor on all of that.
    """
    tilt, nod, turn = np.deg2rad(generator.normal(0, 3 * variation, 3))
    cos, sin = math.cos, math.sin
    about_x = np.array([[1, 0, 0], [0, cos(tilt), -sin(tilt)], [0, sin(tilt), cos(tilt)]])
    about_y = np.array([[cos(nod), 0, sin(nod)], [0, 1, 0], [-sin(nod), 0, cos(nod)]])
    about_z = np.array([[cos(turn), -sin(turn), 0], [sin(turn), cos(turn), 0], [0, 0, 1]])
    # The template is larger than most heads (Lancaster et al. 2007); 9 % along each axis brings
    # the volume within the skull to 1.45 L on average.
    scale = np.diag(1.09 * np.exp(generator.normal(0, 0.025 * variation, 3)))
    shift_mm = np.array(CENTRE_MM) + generator.normal(0, 2 * variation, 3)

    offsets = ((np.arange(size) - (size - 1) / 2) * FIELD_OF_VIEW_MM / size).astype(np.float32)
    offsets_mm = np.stack(np.meshgrid(offsets, offsets, offsets, indexing="ij"))
    linear = (about_z @ about_y @ about_x @ scale).astype(np.float32)
    moved = np.tensordot(linear, offsets_mm, axes=1)
    moved += shift_mm.astype(np.float32)[:, None, None, None]
    for axis in moved:
        axis += 2.5 * variation * _smooth_field(generator, size, order=5)
    return moved


def _ramp(inside_mm: Floats, width_mm: float) -> Floats:
    """Return the share of a voxel within a surface, by the distance of its centre inward.

    Args:
        inside_mm: That distance, negative outside.
        width_mm: From none to all; a voxel's width for a sharp surface.
    """
    share: Floats = np.clip(inside_mm / width_mm + 0.5, 0, 1)
    return share


def _foci(generator: np.random.Generator, dials: Dials) -> NDArray[np.float64]:
    """Return the size of each focus, the largest first; their cubes add up to 1."""
    number = int(generator.integers(dials.foci[0], dials.foci[1] + 1))
    sizes: NDArray[np.float64] = np.sort(np.cbrt(generator.dirichlet([5.0] * number)))[::-1]
    return sizes


def _tissues(
    generator: np.random.Generator, dials: Dials, sequences: Mapping[str, Sequence3T]
) -> dict[str, Tissue]:
    """Return a patient's tissues."""
    spread = dials.tissue_spread
    tissues = {
        name: Tissue(*(value * np.exp(spread * generator.standard_normal(3))).tolist())
        for name, value in (
            (n, np.array([t.proton_density, t.t1_ms, t.t2_ms])) for n, t in TISSUES.items()
        )
    }
    if tissues != TISSUES or sequences["t1"] != SEQUENCES["t1"]:
        # Oedema stays as bright as white matter on this patient's T1 (see `TISSUES`).
        t1, oedema = sequences["t1"], tissues["oedema"]
        density = t1.signal(tissues["white"]) / t1.signal(replace(oedema, proton_density=1.0))
        tissues["oedema"] = replace(oedema, proton_density=density)
    return tissues


def _sequences(generator: np.random.Generator, dials: Dials, site: int) -> dict[str, Sequence3T]:
    """Return the sequences as one patient was scanned with them."""
    t1, t2, flair = np.exp(dials.protocol_spread * generator.standard_normal((3, 2))).tolist()
    echo = dials.site_echo if site == 2 else 1.0
    # T1 and T1ce are one sequence, before and after the agent.
    return {
        "t1": SEQUENCES["t1"].timed(*t1),
        "t1ce": SEQUENCES["t1ce"].timed(*t1),
        "t2": SEQUENCES["t2"].timed(t2[0], t2[1] * echo),
        "flair": SEQUENCES["flair"].timed(flair[0], flair[1] * echo),
    }


def render(
    lesion: Lesion,
    generator: np.random.Generator,
    size: int = 48,
    degraded: str = "",
    dials: Dials = DEFAULT,
    site: int = 1,
) -> Scans:
    """Return the scans of a patient with a lesion.

    Voxels are mixtures: each tissue's share times its signal. The tumour replaces what was there,
    oedema replaces white matter. Then a bias field, Rician noise of 2-5 % of the white-matter
    signal, an arbitrary gain, and zero outside the brain, as after skull stripping.

    Args:
        lesion: What to depict.
        generator: Source of everything that does not depend on the grade: anatomy, place, noise.
        size: V, voxels along each axis of the 192 mm field of view.
        degraded: Sequence with four times the noise.
        dials: Anatomy, lesion and scanner.
        site: 1, or 2 for the second site.
        death_months: When the patient dies.
        follow_up_months: How long the patient is followed.
    """
    (apart,) = generator.spawn(1)
    sequences = _sequences(apart, dials, site)
    tissue_of = _tissues(apart, dials, sequences)
    foci = _foci(apart, dials)
    atrophy = math.exp(dials.atrophy_spread * apart.standard_normal())
    bias_spread = dials.bias_spread * (dials.site_bias if site == 2 else 1.0)
    noise = dials.site_noise if site == 2 else 1.0
    site_gain = dials.site_gain if site == 2 else 1.0
    spacing_mm = FIELD_OF_VIEW_MM / size
    affine = grid_affine(size)
    maps, template_affine = _anatomy()
    template_mm = _template_coordinates(generator, size, dials.anatomy)
    origin, step = template_affine[:3, 3], template_affine[0, 0]
    voxels = (template_mm - origin.astype(np.float32)[:, None, None, None]) / np.float32(step)
    grey, white, brain_share = (
        ndimage.map_coordinates(values, voxels, order=1, output=np.float32) for values in maps
    )
    brain = brain_share > 0.5
    excess = np.maximum(grey + white, 1)
    grey, white = grey / excess, white / excess
    if atrophy != 1:
        # Of a voxel that was all tissue nothing is lost, of one at a surface the more.
        tissue = grey + white
        left = np.maximum(tissue, np.finfo(np.float32).tiny) ** np.float32(atrophy - 1)
        grey, white = grey * left, white * left

    # In white matter of either hemisphere, above the cerebellum, deep enough to be whole.
    depth_mm = ndimage.distance_transform_edt(brain, sampling=spacing_mm)
    allowed = (depth_mm > 0.8 * lesion.radius_mm * foci[0]) & (template_mm[2] > 0)
    allowed &= np.abs(template_mm[0]) > 12
    weights = np.where(allowed, white, 0).ravel().astype(np.float64) ** 4
    weights /= weights.sum()
    indices, distances_mm = [], []
    for _ in foci:
        chosen = generator.choice(weights.size, p=weights)
        index = np.unravel_index(chosen, brain.shape) + generator.uniform(-0.5, 0.5, 3)
        squared = [((np.arange(size) - i) * spacing_mm) ** 2 for i in index]
        distance_mm = np.sqrt(squared[0][:, None, None] + squared[1][:, None] + squared[2])
        indices.append(index)
        distances_mm.append(distance_mm.astype(np.float32))
    uneven = 1 + 0.13 * _smooth_field(generator, size, order=12)

    def within(radius_mm: float) -> Floats:
        """Return the share of each voxel within that radius of a focus, for a focus of size 1."""
        inside = [
            np.float32(radius_mm * focus) - distance * uneven
            for focus, distance in zip(foci, distances_mm, strict=True)
        ]
        return _ramp(np.max(inside, axis=0), max(spacing_mm, dials.lesion_edge_mm))

    tumour, core = within(lesion.radius_mm), within(lesion.core_mm)
    around = within(lesion.radius_mm + lesion.oedema_mm)
    white_left = white * (1 - tumour)
    oedema = lesion.oedema_fraction * around * white_left
    shares = {
        "csf": (1 - grey - white) * (1 - tumour),
        "grey": grey * (1 - tumour),
        "white": white_left - oedema,
        "oedema": oedema,
        "rim": tumour - core,
        "core": core,
    }
    labels = np.zeros(brain.shape, dtype=np.uint8)
    labels[brain & (around >= 0.5) & (white_left >= 0.3)] = 1
    labels[brain & (tumour >= 0.5)] = 2
    labels[brain & (core >= 0.5)] = 3

    images = {}
    for name, sequence in sequences.items():
        tissues = dict(tissue_of)
        if name in enhancing(dials):
            millimolar = enhancing(dials)[name] * lesion.contrast_millimolar
            tissues["rim"] = tissues["rim"].with_contrast(millimolar)
        white_signal = sequence.signal(tissues["white"])
        clean = np.zeros(brain.shape, dtype=np.float32)
        for tissue, share in shares.items():
            signal = sequence.signal(tissues[tissue])
            if tissue in LESION:
                signal = dials.lesion_contrast * signal + (1 - dials.lesion_contrast) * white_signal
            clean += np.float32(signal) * share
        bias = np.exp(bias_spread * _smooth_field(generator, size, order=2))
        sigma = generator.uniform(*dials.noise) * noise * white_signal
        sigma *= 4 if name == degraded else 1
        real, imaginary = sigma * generator.standard_normal((2, *brain.shape), dtype=np.float32)
        magnitude = np.hypot(bias * clean + real, imaginary)
        gain = 400 / white_signal * site_gain * math.exp(generator.normal(0, dials.gain_spread))
        # At least 1 in the brain, so that 0 always means outside it; at most what 16 bits hold, as
        # a scanner saturates.
        counts = np.clip(np.rint(gain * magnitude), 1, np.iinfo(np.int16).max)
        images[name] = np.where(brain, counts, 0).astype(np.int16)

    x, y, z = (affine[:3, :3] @ indices[0] + affine[:3, 3]).tolist()
    return Scans(images=images, lesion=labels, affine=affine, centre_mm=(x, y, z))


# --- Files --------------------------------------------------------------------------------------

# The lesion as the BraTS challenges label it, by the numbers of `Scans.lesion`: oedema 2, enhancing
# tumour 4, necrotic core 1. The grade of a patient is not asked of it, so `cohort.yaml` ignores it.
MASK = "seg.nii.gz"
MASK_LABELS = np.array([0, 2, 4, 1], dtype=np.uint8)
SEGMENTATION = "cohort-segmentation.yaml"
DIALS = "dials.yaml"


# Of `labels.csv`, where there is a second site.
SITE = "site"


def cohort_description(size: int, dials: Dials = DEFAULT) -> dict[str, Any]:
    """Return the content of `cohort.yaml`.

    Args:
        size: V of the grid, which is not that of the files if they have more `detail`.
        dials: Whether there is a second site.
    """
    modalities: dict[str, object] = {
        name: {
            "kind": "image",
            "dims": 3,
            "file": f"{name}.nii.gz",
            "size": [size] * 3,
            "spacing_mm": [FIELD_OF_VIEW_MM / size] * 3,
            "intensity": "zscore",
        }
        for name in SEQUENCES
    }
    for name, columns in TABLES.items():
        described = {column: kind.described() for column, kind in columns.items()}
        modalities[name] = {"kind": "table", "file": "ehr.csv", "columns": described}
    subgroups: dict[str, object] = {
        "age": {"column": "age_years", "edges": [45, 60]},
        "sex": {"column": "sex"},
    }
    if dials.second_site:
        subgroups[SITE] = {"label_column": SITE}
    return {
        "name": "simulated-glioma",
        "task": {"type": "classification", "target": "grade", "classes": list(CLASSES)},
        "modalities": modalities,
        "subgroups": subgroups,
    }


def segmentation_description(size: int) -> dict[str, object]:
    """Return the content of `cohort-segmentation.yaml`: the scans and the mask, no tables."""
    whole = cohort_description(size)
    modalities = {n: m for n, m in whole["modalities"].items() if n in SEQUENCES}
    return {
        "name": "simulated-glioma-segmentation",
        "task": {
            "type": "segmentation",
            "file": MASK,
            "labels": [1, 2, 4],
            "regions": {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]},
        },
        "modalities": modalities,
    }


def assign_splits(grades: Sequence[int], seed: int) -> list[str]:
    """Return the split of each patient, the same shares within each grade.

    Args:
        grades: 0 or 1 per patient.
        seed: Seed of the shuffle.
    """
    generator = np.random.default_rng(np.random.SeedSequence([seed]))
    ends = np.cumsum(list(SPLIT_SHARES.values()))
    names = tuple(SPLIT_SHARES)
    splits = [""] * len(grades)
    for grade in range(len(CLASSES)):
        members = generator.permutation(np.flatnonzero(np.asarray(grades) == grade))
        bounds = np.floor(ends * len(members) + 0.5).astype(int)
        for name, part in zip(names, np.split(members, bounds[:-1]), strict=True):
            for patient in part:
                splits[patient] = name
    return splits


def _without_label(splits: Sequence[str], share: float, seed: int) -> set[int]:
    """Return which patients have no label: that share of the training split, at random."""
    # The splits' own seed has one number, a patient's two.
    generator = np.random.default_rng(np.random.SeedSequence([seed, 0, 0]))
    training = np.flatnonzero(np.asarray(splits) == "train")
    return set(generator.permutation(training)[: round(share * len(training))].tolist())


def _write_image(path: Path, values: NDArray[np.generic], affine: NDArray[np.float64]) -> None:
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    # nibabel's own gzip writing is slower and leaves the choice of level to a global.
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    # All digits: who knows the truth compares it exactly.
    text = csv_text(list(rows[0]), [{k: str(v) for k, v in row.items()} for row in rows])
    path.write_bytes(text.encode())


def _truth(
    record_id: str, evidence: Evidence, lesion: Lesion, scans: Scans, dials: Dials
) -> dict[str, object]:
    """Return a patient's row of `truth.csv`."""
    ratios = evidence.log_likelihood_ratios
    row: dict[str, object] = {
        "record_id": record_id,
        "grade": CLASSES[evidence.grade],
        "contradictory": evidence.contradictory,
        "degraded": evidence.degraded,
        "missing": " ".join(evidence.missing),
        "blank": " ".join(evidence.blank),
    }

    def high(observed: Collection[str]) -> float:
        return posterior_high(ratios, observed, dials)

    subsets = every_subset(MODALITIES)
    given = subset_posteriors(evidence, dials)
    numbers = {
        "posterior_all": high(pieces(MODALITIES, dials)),
        "posterior_observed": high(evidence.observed(dials)),
        **{f"posterior_{name}": high(pieces([name], dials)) for name in MODALITIES},
        **{f"z_{name}": value for name, value in evidence.latents.items()},
        **{f"llr_{name}": value for name, value in ratios.items()},
        "radius_mm": lesion.radius_mm,
        "core_mm": lesion.core_mm,
        "oedema_mm": lesion.oedema_mm,
        "oedema_fraction": lesion.oedema_fraction,
        "contrast_millimolar": lesion.contrast_millimolar,
        **{f"centre_{axis}_mm": v for axis, v in zip("xyz", scans.centre_mm, strict=True)},
    }
    row |= {name: f"{value:.6g}" for name, value in numbers.items()}
    row |= {"label": CLASSES[evidence.label], "site": evidence.site}
    return row | {
        posterior_column(subset): f"{value:.9g}"
        for subset, value in zip(subsets[1:], given[1:], strict=True)
    }


def subset_posteriors(evidence: Evidence, dials: Dials = DEFAULT) -> NDArray[np.float64]:
    """Return the exact probability of the label "high" given each set of modalities.

    A modality shows what it would show if the patient had it: its blank cells stay blank.

    Args:
        evidence: The patient.
        dials: Those that it was drawn with.

    Returns:
        `(2^M,)`, in the order of `every_subset(MODALITIES)`.
    """
    ratios = evidence.log_likelihood_ratios
    seen = [0.0 if n in evidence.blank else ratios[n] for names in GROUPS.values() for n in names]
    by_group: NDArray[np.float64] = _shown(dials.flair_after_contrast) @ np.array(seen)
    return _high(by_group, dials)


@cache
def _shown(flair_after_contrast: bool) -> NDArray[np.float64]:
    """Return 1 where a set of modalities shows a piece of a group, else 0 `(S, G, P)`."""
    dials = Dials(flair_after_contrast=flair_after_contrast)
    everything = [piece for names in GROUPS.values() for piece in names]
    shown = np.array(
        [
            [piece in pieces(subset, dials) for piece in everything]
            for subset in every_subset(MODALITIES)
        ]
    )
    within = np.array([[piece in names for piece in everything] for names in GROUPS.values()])
    found: NDArray[np.float64] = (shown[:, None] & within).astype(np.float64)
    return found


def _write_patient(
    root: Path, index: int, seed: int, size: int, dials: Dials
) -> tuple[Evidence, dict[str, object]]:
    """Write one patient, who depends on `seed` and `index` alone; return the evidence and truth."""
    # Streams of their own: the evidence of a patient is then the same at every image size.
    streams = np.random.SeedSequence([seed, index]).spawn(3)
    for_evidence, for_images, for_times = (np.random.default_rng(stream) for stream in streams)
    evidence = draw_evidence(for_evidence, dials)
    death, followed = draw_times(for_times, evidence.grade, dials)
    evidence = replace(evidence, death_months=death, follow_up_months=followed)
    lesion = Lesion.from_latents(evidence.latents, dials)
    finer = round(size * dials.detail)
    scans = render(lesion, for_images, finer, evidence.degraded, dials, evidence.site)

    # The seed is part of the id: two cohorts hold different patients.
    record_id = f"s{seed}-p{index:04d}"
    folder = root / "patients" / record_id
    hidden = root / "truth" / record_id
    folder.mkdir(parents=True)
    hidden.mkdir(parents=True)
    for name, values in scans.images.items():
        if name not in evidence.missing:
            _write_image(folder / f"{name}.nii.gz", values, scans.affine)
    observed = evidence.observed(dials)
    row = {name: text if name in observed else "" for name, text in evidence.cells.items()}
    _write_rows(folder / "ehr.csv", [row])
    _write_image(hidden / "lesion.nii.gz", scans.lesion, scans.affine)
    _write_image(folder / MASK, MASK_LABELS[scans.lesion], scans.affine)
    return evidence, _truth(record_id, evidence, lesion, scans, dials)


def _write_survival(
    root: Path,
    ids: Sequence[object],
    drawn: Sequence[Evidence],
    unlabelled: Collection[int],
    dials: Dials,
) -> None:
    """Write when patients died or were last seen alive, and when they would have died."""
    rows, truth = [], []
    for index, (name, evidence) in enumerate(zip(ids, drawn, strict=True)):
        died = evidence.death_months <= evidence.follow_up_months
        seen = min(evidence.death_months, evidence.follow_up_months)
        known = index not in unlabelled
        rows.append(
            {
                "record_id": name,
                "patient_id": name,
                "months": f"{seen:.3f}" if known else "",
                "died": _NO_YES[died] if known else "",
                **({SITE: evidence.site} if dials.second_site else {}),
            }
        )
        truth.append(
            {
                "record_id": name,
                "death_months": f"{evidence.death_months:.6g}",
                "follow_up_months": f"{evidence.follow_up_months:.6g}",
            }
        )
    _write_rows(root / SURVIVAL_LABELS, rows)
    _write_rows(root / SURVIVAL_TRUTH, truth)


def _check(out: Path, patients: int, seed: int, size: int, missing: float) -> None:
    problems = []
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(
            Problem(
                where=str(out),
                what="the output folder is there already and is not empty",
                expected="a folder that does not exist or is empty",
                remedy="Name another folder, or delete this one",
            )
        )
    limits: list[tuple[str, float, bool, str]] = [
        ("patients", patients, patients >= 1, "at least 1"),
        ("seed", seed, seed >= 0, "0 or more"),
        ("size", size, size >= SMALLEST_SIZE, f"at least {SMALLEST_SIZE} voxels"),
        ("missing", missing, 0 <= missing <= 1, "a share between 0 and 1"),
    ]
    for name, value, is_valid, expected in limits:
        if not is_valid:
            problems.append(
                Problem(
                    where="simulate",
                    what=f"{name!r} is out of range",
                    expected=expected,
                    got=str(value),
                    remedy=f"Change {name!r}",
                )
            )
    if problems:
        raise ConfigError(*problems)


def simulate(
    out: Path,
    patients: int = 400,
    seed: int = 0,
    size: int = 48,
    progress: Callable[[int, int], None] | None = None,
    missing: float | None = None,
    dials: Dials = DEFAULT,
) -> Path:
    """Write a simulated cohort.

    `cohort.yaml`, `patients/<id>/` (what a hospital would hold, and the lesion's mask as a reader
    would have drawn it), `labels.csv`, `splits.csv`, and what only a simulator knows: `truth.csv`
    and `truth/<id>/lesion.nii.gz`. `cohort-segmentation.yaml` describes the same patients with
    the lesion as what is predicted, `cohort-survival.yaml` with their survival (`survival.csv`; the
    times that nobody gets to see are in `survival-truth.csv`). The folder appears under its name
    when it is complete, not before.

    Args:
        out: Folder to make; it may exist if it is empty.
        patients: Number of patients. Asking for more changes none of the first ones' files,
            though it may move them to another split.
        seed: Seed; the same seed gives the same bytes.
        size: V, voxels along each axis of the 192 mm field of view.
        progress: Called with (patients done, patients) after each.
        missing: Share of patients who lack one or two modalities, picked at random,
            whatever the grade: their files are absent, or all cells of their table blank. None =
            as `dials` say.
        dials: How easy or hard the patients are; `dymo_med.data.dials.setting("hard")` is a named
            setting. Those that differ from the default stand in `dials.yaml`.

    Returns:
        `out`.

    Raises:
        ConfigError: If `out` is not empty or a number is out of range.
    """
    out = Path(out)
    missing = dials.missing if missing is None else missing
    _check(out, patients, seed, size, missing)
    dials = dials.model_copy(update={"missing": missing})
    folder = out.resolve().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = Problem(
            where=str(folder),
            what="the folder for the cohort cannot be made",
            got=str(error.strerror),
            remedy="Name a folder where you may write",
        )
        raise ConfigError(problem) from error
    with tempfile.TemporaryDirectory(dir=folder, prefix=".simulate-") as scratch:
        root = Path(scratch) / "cohort"
        root.mkdir()
        contents = {
            SEGMENTATION: segmentation_description(size),
            SURVIVAL: survival_description(cohort_description(size, dials)),
            "cohort.yaml": cohort_description(size, dials),
        }
        changed = dials.changed()
        if changed:
            contents = {DIALS: changed, **contents}
        for name, content in contents.items():
            text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100)
            (root / name).write_text(text, encoding="utf-8")
        drawn, truth = [], []
        for index in range(patients):
            evidence, row = _write_patient(root, index, seed, size, dials)
            drawn.append(evidence)
            truth.append(row)
            if progress is not None:
                progress(index + 1, patients)
        ids = [row["record_id"] for row in truth]
        splits = assign_splits([evidence.label for evidence in drawn], seed)
        unlabelled = _without_label(splits, dials.unlabelled, seed)
        _write_rows(
            root / "labels.csv",
            [
                {
                    "record_id": i,
                    "patient_id": i,
                    "grade": "" if index in unlabelled else CLASSES[evidence.label],
                    **({SITE: evidence.site} if dials.second_site else {}),
                }
                for index, (i, evidence) in enumerate(zip(ids, drawn, strict=True))
            ],
        )
        _write_rows(
            root / "splits.csv",
            [{"patient_id": i, "split": s} for i, s in zip(ids, splits, strict=True)],
        )
        _write_rows(root / TRUTH, truth)
        _write_survival(root, ids, drawn, unlabelled, dials)
        if out.exists():
            # The description comes last: without it a folder is not taken for a cohort.
            for name in (
                "patients",
                "truth",
                "labels.csv",
                "splits.csv",
                TRUTH,
                SURVIVAL_LABELS,
                SURVIVAL_TRUTH,
                *contents,
            ):
                (root / name).rename(out / name)
        else:
            root.rename(out)
    return out
