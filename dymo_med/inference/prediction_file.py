"""`prediction.json`: one patient's answer, and everything that its page shows.

The models below are the format: the file is written from them and read back into them, the page is
made from them alone, and `docs/reference/prediction.schema.json` is generated from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from math import log2
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dymo_med.calibration import ENOUGH
from dymo_med.errors import PatientDataError, Problem
from dymo_med.survival import Statement
from dymo_med.types import GateResult, GateState

SCHEMA_VERSION = 6
# An answer that changes in this share of draws, or more, is given with caution.
UNSTEADY = 0.1
# Central share of the draws that `low` and `high` enclose.
CENTRAL = 0.9
# Fewer held-back patients with the same pattern are called few.
FEW_PATIENTS = 30

Probability = Annotated[float, Field(ge=0, le=1)]
Probabilities = tuple[Probability, ...]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Png = Annotated[str, Field(pattern=r"^data:image/png;base64,[A-Za-z0-9+/]+=*$")]
State = Literal["observed", "trusted", "rejected"]
Plane = Literal["axial", "coronal", "sagittal", "flat"]
Status = Literal["answered", "caution", "abstained"]
Code = Literal[
    "no_class_ruled_out",
    "too_few_calibrated",
    "measurements_differ",
    "draws_differ",
    "refused",
    "quality",
    "outside_training",
    "stranger",
    "unusual",
    "never_together",
    "few_held_back",
    "borrowed",
    "volume_uncertain",
    "volume_unbounded",
    "volumes_differ",
    "outside_view",
]


class Part(BaseModel):
    """Base of every part: strict types, no unknown keys, frozen, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StepPart(Part):
    """One candidate in one step of the selection: a row of `selection.csv`.

    `threshold` is what `trust`, or else `reward`, must exceed; null: nothing is admitted.
    """

    step: Annotated[int, Field(ge=1)]
    modality: str
    version: Literal["recovered", "completed"]
    quality_before: float
    quality_after: float
    similarity_before: float
    similarity_after: float
    factor: float
    reward: float
    decision: Literal["admitted", "rejected", "not yet", "stopped"]
    borrowed: bool
    trust: float | None
    threshold: float | None


class SubsetPart(Part):
    """A subset that an average was taken over, its weight and what it says by itself."""

    admitted: tuple[str, ...]
    weight: Probability
    probabilities: Probabilities


class RulePart(Part):
    """How the selector decides: enough to replay it from `steps`.

    `decides_by`: `rule` (looks at nothing), `draws` (likewise, and averages over draws), `guard`
    (all or none, by what was proven), `reward`, `trust`, or `weights` (an average over subsets).
    `admits`: one candidate per step, or all of them at once. `calibration` is the similarity
    calibration behind `factor`.
    """

    decides_by: Literal["rule", "draws", "guard", "reward", "trust", "weights"]
    admits: Literal["nothing", "everything", "one", "all"]
    calibration: Literal["log_ratio", "ratio", "none"] | None
    threshold: float | None


class AttributionPart(Part):
    """How much one input moved the answer; `recovered`: the input was made up."""

    modality: str
    name: str
    value: float
    method: str
    recovered: bool


class SourcePart(Part):
    """Where a measured modality came from."""

    file: str
    sha256: str
    affine: tuple[tuple[float, ...], ...] | None
    facts: dict[str, str]


class FindingPart(Part):
    """One thing that the quality gate holds against a modality; words are in `strings.json`.

    `got` and `expected` are sizes, shares and names of columns.
    """

    check: str
    level: Literal["warn", "refuse"]
    got: str
    expected: str


class QualityPart(Part):
    """What the quality gate says of one modality: the gravest level of its findings."""

    state: GateState
    findings: tuple[FindingPart, ...]


class RecoveredFilePart(Part):
    """A file of what was made up, relative to the output folder."""

    file: str
    sha256: Sha256


class ReasonPart(Part):
    """Why the status is what it is: a code, whose words are in `strings.json`, and its values."""

    code: Code
    values: dict[str, str | int | float]


class PredictionSetPart(Part):
    """The classes that cannot be ruled out, and by whose scores.

    `compared_with`: calibration patients who have at least these modalities, looked at with
    exactly these (`pattern`), or all of them as they came (`all`); `calibrated_on`: how many
    patients those are. Of fewer than `least` none can be ruled out.
    """

    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    coverage: Probability
    compared_with: Literal["pattern", "all"]
    calibrated_on: Annotated[int, Field(ge=0)]
    least: Annotated[int, Field(ge=1)]


class DrawnPart(Part):
    """One method's answers over the draws.

    `probabilities` has one row per draw; `low`, `median`, `high` summarise its columns;
    `changes` is the share of draws that name another class than the answer does.
    """

    probabilities: tuple[Probabilities, ...]
    low: Probabilities
    median: Probabilities
    high: Probabilities
    changes: Probability


class VariancePart(Part):
    """What the answer's uncertainty comes from: variances of the probability of its class.

    `absence`: between draws, what measuring would resolve; `recovery`: of their mean, as only so
    many were drawn; `model`: of the mean over several networks, null of one; `total`: Rubin's
    total variance, their sum.
    """

    total: float
    model: float | None
    recovery: float
    absence: float


class DrawsPart(Part):
    """What the answer would have been with other recoveries that are as plausible.

    The selection is the one that was made; `own` replaces the admitted recoveries by a draw of
    theirs, `trust_all` takes a draw of every recovery.
    """

    n: Annotated[int, Field(ge=1)]
    seed: int
    central: Probability
    own: DrawnPart
    trust_all: DrawnPart
    variance: VariancePart | None = None


class GainPart(Part):
    """What measuring one modality would be expected to change, if it came out as its draws do.

    `kind`: a modality that is missing, or the blank cells of a table. `bits`: expected information
    gain, the entropy of the mean answer over draws less the mean of their entropies; it is
    never negative. `probability`:
    expected probability of the answer's class. `changes`, `differs`: share of draws with which
    measurements would name another class than measurements alone, than the answer.
    """

    modality: str
    kind: Literal["missing", "blanks"]
    state: Literal["trusted", "rejected"]
    bits: float
    probability: Probability
    changes: Probability
    differs: Probability
    probabilities: tuple[Probabilities, ...]


class AcquirePart(Part):
    """What measuring would be expected to change, the largest drop of entropy first.

    Everything is relative to measurements alone: `bits` is the entropy of their answer,
    `probability` what they give the answer's class. `unknown` are missing modalities of which
    nothing can be drawn.
    """

    draws: Annotated[int, Field(ge=1)]
    bits: float
    probability: Probability
    gains: tuple[GainPart, ...]
    unknown: tuple[str, ...]


class IntervalPart(Part):
    """A figure with its 95 % interval; null where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


class FiguresPart(Part):
    """How good one selector was on held-back patients."""

    method: str
    auroc: IntervalPart
    brier: IntervalPart
    ece: IntervalPart


class PerformancePart(Part):
    """How good the bundle was on held-back patients who had about as much as this one.

    `level`: with the same observed modalities (`pattern`), as many of them (`count`), or `all`;
    `group`: which. `pattern_patients`: how many had the very same.
    """

    level: Literal["pattern", "count", "all"]
    group: str
    patients: int
    cases: int
    own: FiguresPart
    observed_only: FiguresPart | None
    pattern_patients: int
    tested_fewer_than_30: bool


class FrequencyPart(Part):
    """The answer as a natural frequency: of `of` patients with this probability, `count` are.

    `patients` held-back patients got an answer as sure as this one (within 0.1), which was right
    for `right` of them. Of fewer than ten there is no `count`. `bound` says that the count is
    less than 1 (`under`) or more than 99 (`over`).
    """

    label: str
    of: Literal[100]
    count: Annotated[int, Field(ge=0, le=100)] | None
    bound: Literal["under", "over"] | None
    patients: Annotated[int, Field(ge=0)]
    right: Annotated[int, Field(ge=0)]


class LimitsPart(Part):
    """What the bundle was made from: what its model card says, in numbers.

    `fitted_on` patients fitted the temperature; `held_back` others, on whom nothing was fitted,
    are behind prediction sets.
    """

    task: str
    cohort: str
    records: dict[str, int]
    patients: dict[str, int]
    fitted_on: int
    held_back: int
    observed_share: dict[str, float]


class PicturePart(Part):
    """One slice as a picture; `index` is its place along the axis that is cut."""

    plane: Plane
    index: int
    width: int
    height: int
    png: Png


class SliderPart(Part):
    """Axial slices, feet to head, one below the other in one picture.

    Each frame is `width` x `height` pixels; `slices` are their indices, `start` the frame to
    begin with. `heat` is a transparent picture of the same frames: the saliency.
    """

    width: int
    height: int
    slices: tuple[int, ...]
    start: int
    png: Png
    heat: Png | None


class ScanPart(Part):
    """An image, measured or made up; SYNTHETIC is in every pixel picture of the latter.

    `pictures` are the slices through the middle of the body (three planes of a volume);
    `overlays` the slices through the most influential place, saliency on top; empty if it was not
    computed or not used.
    """

    modality: str
    state: State
    flat: bool
    spacing_mm: tuple[float, ...]
    pictures: tuple[PicturePart, ...]
    slider: SliderPart | None
    overlays: tuple[PicturePart, ...]


class CellPart(Part):
    """A table cell.

    `value`: number or category, null = unknown; `text`: the same for people; `percentile`: among
    training patients, 0 to 100, of a number; `share`: of training patients with this category;
    `measured`: false = the value was recovered or is unknown; `low`, `high`: between them a
    recovered number lies with a probability of 0.9, by the imputer's own account, null of others.
    """

    modality: str
    column: str
    value: float | str | None
    text: str
    unit: str
    percentile: float | None
    share: Probability | None
    measured: bool
    low: float | None = None
    high: float | None = None


class ConvergencePart(Part):
    """How exact the saliency is: its sum minus the change of probability it should add up to."""

    error: float
    bound: float
    points: int


class ContrastPart(Part):
    """What the distribution of a scan's intensities contributed, which no place in it did."""

    modality: str
    recovered: bool
    value: float


class ExhibitsPart(Part):
    """What the page shows besides the answer."""

    bundle_description: str
    scans: tuple[ScanPart, ...]
    cells: tuple[CellPart, ...]
    smoothed_voxels: float
    convergence: ConvergencePart | None
    contrast: tuple[ContrastPart, ...] = ()


class ValuePart(Part):
    """The number that a regression answers, of which `classes` are the bands.

    `value` is the mean of `centers` by `probabilities`. `low` to `high` hold the true value of
    `coverage` of patients; null where the bundle cannot tell. `compared_with`, `calibrated_on`
    and `least` as of a prediction set: of fewer patients it is the whole scale. `alternatives`:
    other methods.
    """

    value: float
    low: float | None
    high: float | None
    coverage: Probability
    compared_with: Literal["pattern", "all"]
    calibrated_on: Annotated[int, Field(ge=0)]
    least: Annotated[int, Field(ge=1)]
    unit: str
    centers: tuple[float, ...]
    alternatives: dict[str, float]


class SurvivalPart(Part):
    """What is stated of a survival time, of which `classes` are the bins.

    `risks` are probabilities of an event until each of `horizons`, `risk_low` to `risk_high` their
    band; `curve` is the probability of no event until each of `times`, `low` to `high` its band,
    where the curve of patients like this one is with the probability `band` at each time; empty
    where nothing is known of it. `everybody`: training patients (Kaplan-Meier). `median`: null =
    after the last of `times`. `bound`: of `coverage` of patients the event is not earlier; null
    where the bundle cannot tell. `compared_with`, `calibrated_on` and `least` as of a prediction
    set: of fewer patients it is 0. `alternatives`: risks by other methods.
    """

    unit: str
    horizons: tuple[float, ...]
    risks: tuple[Probability, ...]
    risk_low: tuple[Probability, ...]
    risk_high: tuple[Probability, ...]
    times: tuple[float, ...]
    curve: tuple[Probability, ...]
    low: tuple[Probability, ...]
    high: tuple[Probability, ...]
    band: Probability
    everybody: tuple[Probability, ...]
    median: float | None
    bound: float | None
    coverage: Probability
    compared_with: Literal["pattern", "all"]
    calibrated_on: Annotated[int, Field(ge=0)]
    least: Annotated[int, Field(ge=1)]
    alternatives: dict[str, tuple[Probability, ...]]


class PlainPart(Part):
    """What plain references say, and which modalities the model is known to use.

    `references`: their answers from what was measured. `weight`: the network's share of the
    answer, the rest is that of `partner`. `change`: how much answers change when a modality's
    content is exchanged between patients; null = too few could; `use`: what follows from that.
    """

    references: dict[str, Probabilities]
    weight: Probability
    partner: str
    use: dict[str, Literal["used", "unused", "unproven", "untested"]]
    change: dict[str, float | None]


class NoveltyPart(Part):
    """Whether this patient is like those that the bundle was made with.

    `p`: share of held-back patients, this one counted, who are at least as unusual; 1 where that is
    unknown. `patients`: how many of them there were to compare with, `least`: how many it takes.
    `modalities`: likewise of each. `alarm`, `strange`: p-values at or below which the answer needs
    caution, and is none. `apart`: pairs of modalities that no training patient had both of.
    """

    state: Literal["familiar", "unusual", "strange", "unknown"]
    p: Probability
    patients: Annotated[int, Field(ge=0)]
    least: Annotated[int, Field(ge=1)]
    modalities: dict[str, Probability]
    alarm: Probability
    strange: Probability
    apart: tuple[tuple[str, str], ...]

    @property
    def as_unusual(self) -> int:
        """How many of the held-back patients are at least as unusual."""
        return round(self.p * (self.patients + 1)) - 1


class PredictionFile(Part):
    """`prediction.json`, version 6; `value` is there of a regression, `survival` of survival.

    `plain` is there if the bundle has references, `novelty` if it knows what is usual.
    """

    schema_version: Literal[6]
    record_id: str
    patient_id: str
    target: str
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    predicted: str
    probabilities: Probabilities
    status: Status
    status_reasons: tuple[ReasonPart, ...]
    frequency: FrequencyPart
    prediction_set: PredictionSetPart | None
    alternatives: dict[str, Probabilities]
    base_rates: Probabilities
    method: str
    method_why: str
    rule: RulePart
    observed: tuple[str, ...]
    partly: tuple[str, ...]
    recovered: tuple[str, ...]
    trusted: tuple[str, ...]
    rejected: tuple[str, ...]
    absent: tuple[str, ...]
    refused: tuple[str, ...]
    quality: dict[str, QualityPart]
    steps: tuple[StepPart, ...]
    subsets: tuple[SubsetPart, ...]
    draws: DrawsPart | None
    acquire: AcquirePart | None
    attributions: tuple[AttributionPart, ...]
    warnings: tuple[str, ...]
    performance: PerformancePart | None
    limits: LimitsPart
    sources: dict[str, SourcePart]
    recovered_files: dict[str, RecoveredFilePart]
    bundle_id: str
    bundle_name: str
    bundle_version: str
    seed: int
    device: str
    versions: dict[str, str]
    command: str | None
    exhibits: ExhibitsPart
    value: ValuePart | None = None
    survival: SurvivalPart | None = None
    plain: PlainPart | None = None
    novelty: NoveltyPart | None = None
    content_sha256: Sha256

    @property
    def chosen(self) -> int:
        """Index of the most probable class, the first one on a tie."""
        return int(np.argmax(self.probabilities))

    @property
    def trust(self) -> dict[str, float]:
        """Share of the answer that rests on each recovery, where it is an average."""
        return {
            name: sum(s.weight for s in self.subsets if name in s.admitted)
            for name in self.recovered
            if self.subsets
        }

    @classmethod
    def make(cls, content: Mapping[str, Any]) -> PredictionFile:
        """Return the file with this content: every key but `content_sha256`.

        Args:
            content: Ready for JSON.

        Raises:
            ValidationError: If it is no prediction.
        """
        text = json.dumps({**content, "content_sha256": "0" * 64}, allow_nan=False)
        blank = cls.model_validate_json(text)
        return blank.model_copy(update={"content_sha256": content_sha256(blank)})

    def to_text(self) -> str:
        """Return the file's text; the same prediction gives the same bytes."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the file's content; a part that does not apply (`value`, say) has no key."""
        data = self.model_dump(mode="json")
        for name in ("value", "survival", "plain"):
            if data[name] is None:
                del data[name]
        return data


def content_sha256(file: PredictionFile) -> str:
    """Return the SHA-256 of everything in the file but this number.

    It shows damage and edits. It is no signature: whoever edits can hash again.
    """
    data = file.to_dict()
    del data["content_sha256"]
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_prediction(path: Path) -> PredictionFile:
    """Read a `prediction.json`.

    Args:
        path: The file.

    Raises:
        PatientDataError: If it is not there or no prediction of this version, with every problem.
    """
    try:
        text = path.read_text(encoding="utf-8")
        version = json.loads(text).get("schema_version")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise PatientDataError(
            Problem(
                str(path),
                "this is not a readable prediction",
                expected="the prediction.json that `dymo-med predict` wrote",
                got=type(error).__name__,
                remedy="Check the path, or predict again",
            )
        ) from error
    if version != SCHEMA_VERSION:
        raise PatientDataError(
            Problem(
                str(path),
                "the file's format is not known to this version",
                expected=f"schema_version {SCHEMA_VERSION}",
                got=f"{version!r:.40}",
                remedy="Predict again",
            )
        )
    try:
        return PredictionFile.model_validate_json(text)
    except ValidationError as error:
        # Never the value: it may be health data.
        raise PatientDataError(
            *(
                Problem(
                    f"{path}: {'.'.join(map(str, e['loc']))}"[:300],
                    f"the file is no prediction: {e['msg'][:200]}",
                    expected="what docs/reference/prediction.schema.json describes",
                    remedy="Predict again",
                )
                for e in error.errors(include_url=False, include_input=False)
            )
        ) from error


def schema() -> str:
    """Return the JSON schema (draft 2020-12) of `prediction.json`, as it is committed."""
    data = PredictionFile.model_json_schema()
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


# --- What follows from other parts; the audit computes it again -----------------------------------


def frequency(label: str, probability: float, patients: int, right: int) -> FrequencyPart:
    """Return a probability as a natural frequency out of 100, if there were patients to count.

    Args:
        label: The class.
        probability: Of it.
        patients: Held-back patients whose answer was as sure.
        right: For how many of them it was right.

    Example:
        >>> frequency("high", 0.774, 12, 9).count
        77
        >>> frequency("high", 0.774, 9, 7).count is None
        True
    """
    if patients < ENOUGH:
        return FrequencyPart(
            label=label, of=100, count=None, bound=None, patients=patients, right=right
        )
    count = round(100 * probability)
    bound: Literal["under", "over"] | None = (
        "under" if count < 1 else "over" if count > 99 else None
    )
    return FrequencyPart(
        label=label, of=100, count=count, bound=bound, patients=patients, right=right
    )


def information(probabilities: Sequence[Sequence[float]]) -> float:
    """Return the expected information gain of what the answers differ by, in bits.

    It is the mutual information of the class and the draw: the entropy of the mean answer less
    the mean entropy, 0 or more by Jensen's inequality, and 0 only if all answers are the same.

    Args:
        probabilities: `(n, K)`, one answer for each draw.

    References:
        Lindley, On a measure of the information provided by an experiment, Ann. Math. Stat. 27
        (1956).
    """
    mean = np.asarray(probabilities, dtype=np.float64).mean(axis=0).tolist()
    each = sum(entropy_bits(p) for p in probabilities) / len(probabilities)
    return max(0.0, entropy_bits(mean) - each)


def rubin(probabilities: Sequence[float], apart: Sequence[float] | None) -> VariancePart:
    """Return what the variance of a probability comes from.

    Args:
        probabilities: Of the answer's class, one for each of m draws.
        apart: For each draw the variance of the mean over several networks; None = of one.

    References:
        Rubin, Multiple Imputation for Nonresponse in Surveys, 1987, 3.1: T = W + (1 + 1/m) B.
    """
    m = len(probabilities)
    between = float(np.var(probabilities, ddof=1)) if m > 1 else 0.0
    within = None if apart is None else float(np.mean(apart))
    return VariancePart(
        total=(within or 0.0) + between + between / m,
        model=within,
        recovery=between / m,
        absence=between,
    )


def summarise(probabilities: Sequence[Sequence[float]], chosen: int) -> DrawnPart:
    """Return the answers over draws with their summary.

    Args:
        probabilities: `(n, K)`.
        chosen: Index of the answer's class.
    """
    values = np.asarray(probabilities, dtype=np.float64)
    tail = (1 - CENTRAL) / 2
    low, median, high = np.quantile(values, [tail, 0.5, 1 - tail], axis=0, method="weibull")
    return DrawnPart(
        probabilities=_rows(values),
        low=tuple(low.tolist()),
        median=tuple(median.tolist()),
        high=tuple(high.tolist()),
        changes=float((values.argmax(1) != chosen).mean()),
    )


def gain(
    modality: str,
    kind: Literal["missing", "blanks"],
    state: Literal["trusted", "rejected"],
    probabilities: Sequence[Sequence[float]],
    alone: Sequence[float],
    chosen: int,
) -> GainPart:
    """Return what measuring one modality would be expected to change.

    Args:
        modality: Its name.
        kind: Whether all of it is missing, or cells.
        state: What became of its recovery.
        probabilities: `(n, K)`: answers by measurements and one draw of it.
        alone: `(K,)`: answer by measurements alone.
        chosen: Index of the answer's class.
    """
    values = np.asarray(probabilities, dtype=np.float64)
    says = values.argmax(1)
    return GainPart(
        modality=modality,
        kind=kind,
        state=state,
        bits=information(values.tolist()),
        probability=float(values[:, chosen].mean()),
        changes=float((says != int(np.argmax(alone))).mean()),
        differs=float((says != chosen).mean()),
        probabilities=_rows(values),
    )


def entropy_bits(probabilities: Sequence[float]) -> float:
    """Return the entropy of an answer in bits.

    Example:
        >>> entropy_bits([0.5, 0.5])
        1.0
    """
    return -sum(p * log2(p) for p in probabilities if p > 0) + 0.0


def decision(
    classes: Sequence[str],
    own: Sequence[float],
    alone: Sequence[float],
    survival: SurvivalPart | Statement | None,
) -> tuple[Sequence[str], Sequence[float], Sequence[float]]:
    """Return between what an answer decides, the answer, and that by measurements alone.

    Of survival that is not in which of many bins a time lies, but whether the event comes before
    the first horizon.

    Args:
        classes: K names.
        own: `(K,)`: the answer.
        alone: `(K,)`: that by measurements alone.
        survival: What is stated of a time.
    """
    if survival is None:
        return classes, own, alone
    risk = survival.risks[0]
    other = survival.alternatives.get("observed_only", survival.risks)[0]
    names = (f"before {survival.horizons[0]:g} {survival.unit}", "not until then")
    return names, (risk, 1 - risk), (other, 1 - other)


def status_of(
    classes: Sequence[str],
    probabilities: Sequence[float],
    alone: Sequence[float],
    prediction_set: PredictionSetPart | None,
    draws: DrawsPart | None,
    performance: PerformancePart | None,
    steps: Sequence[StepPart],
    found: Sequence[ReasonPart],
    novelty: NoveltyPart | None = None,
) -> tuple[Status, tuple[ReasonPart, ...]]:
    """Return whether the answer stands, stands with caution, or is none; and why.

    Args:
        classes: K names.
        probabilities: `(K,)`: the answer.
        alone: `(K,)`: that by measurements alone.
        prediction_set: Null: nothing is known of it.
        draws: Null: none were made.
        performance: Null: nothing is known of it.
        steps: The selection.
        found: What was found in the patient's own data (`gate_reasons`).
        novelty: Whether the patient is like those of training; null: nothing is known of it.

    Returns:
        `abstained` if the patient is a stranger or no class can be ruled out, else `caution` if
        there is any other reason.
    """
    reasons: list[ReasonPart] = []

    def because(code: Code, **values: str | int | float) -> None:
        reasons.append(ReasonPart(code=code, values=values))

    reasons += novelty_reasons(novelty)
    if prediction_set is not None and len(prediction_set.classes) == len(classes):
        if prediction_set.calibrated_on < prediction_set.least:
            because(
                "too_few_calibrated",
                patients=prediction_set.calibrated_on,
                least=prediction_set.least,
                coverage=prediction_set.coverage,
            )
        else:
            because("no_class_ruled_out", coverage=prediction_set.coverage, classes=len(classes))
    other = int(np.argmax(alone))
    if other != int(np.argmax(probabilities)):
        because("measurements_differ", label=classes[other], probability=alone[other])
    if draws is not None and draws.own.changes >= UNSTEADY:
        because("draws_differ", share=draws.own.changes, draws=draws.n)
    reasons += found
    if performance is not None and performance.tested_fewer_than_30:
        because("few_held_back", patients=performance.pattern_patients, least=FEW_PATIENTS)
    borrowed = dict.fromkeys(s.modality for s in steps if s.borrowed and s.decision == "admitted")
    if borrowed:
        because("borrowed", modalities=", ".join(borrowed))
    none = ("stranger", "no_class_ruled_out", "too_few_calibrated")
    if any(reason.code in none for reason in reasons):
        return "abstained", tuple(reasons)
    return ("caution" if reasons else "answered"), tuple(reasons)


def novelty_reasons(novelty: NoveltyPart | None) -> list[ReasonPart]:
    """Return why a patient who is unlike those of training needs caution, or gets no answer.

    Args:
        novelty: Null: nothing is known of it.
    """
    if novelty is None:
        return []
    reasons = []
    code = {"strange": "stranger", "unusual": "unusual"}.get(novelty.state)
    if code is not None:
        furthest = sorted((p, name) for name, p in novelty.modalities.items() if p <= novelty.alarm)
        values = {
            "modalities": ", ".join(name for _, name in furthest) or "all of them together",
            "as_unusual": novelty.as_unusual,
            "patients": novelty.patients,
        }
        reasons.append(ReasonPart.model_validate({"code": code, "values": values}))
    reasons += [
        ReasonPart(code="never_together", values={"one": one, "other": other})
        for one, other in novelty.apart
    ]
    return reasons


def quality_parts(results: Mapping[str, GateResult]) -> dict[str, QualityPart]:
    """Return what the quality gate says as it is written.

    Args:
        results: Per modality.
    """
    return {
        name: QualityPart(
            state=result.state,
            findings=tuple(
                FindingPart(check=f.check, level=f.level, got=f.got, expected=f.expected)
                for f in result.findings
            ),
        )
        for name, result in results.items()
    }


def gate_reasons(quality: Mapping[str, QualityPart]) -> list[ReasonPart]:
    """Return what the quality gate found as reasons of the status: what was refused first.

    Args:
        quality: Per modality.
    """
    refused = [
        ReasonPart(code="refused", values={"modality": name, "check": finding.check})
        for name, part in quality.items()
        for finding in part.findings
        if finding.level == "refuse"
    ]
    warned = [
        ReasonPart(code="outside_training", values={"modality": name, "columns": finding.got})
        if finding.check == "outside"
        else ReasonPart(code="quality", values={"modality": name, "check": finding.check})
        for name, part in quality.items()
        if part.state == "warn"
        for finding in part.findings
    ]
    return [*refused, *warned]


def _rows(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[Probabilities, ...]:
    return tuple(tuple(row) for row in values.tolist())
