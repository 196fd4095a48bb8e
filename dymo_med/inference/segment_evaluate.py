"""A cohort of segmentations under missing-data scenarios, every method side by side.

Records are answered one by one; each finished one is kept in `OUT/.progress`, so that an
interrupted evaluation goes on where it stopped, and several processes can share one. One bad
record costs a row in `failures.csv`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dymo_med import __version__
from dymo_med.bundle_segmentation import SegmentationBundle
from dymo_med.data.masks import dice, own_grid, read_known, read_mask, regions_of
from dymo_med.data.missingness import Scenario, apply, parse_scenario
from dymo_med.errors import BundleError, ConfigError, PatientDataError, Problem
from dymo_med.files import csv_stream, write_csv, write_json
from dymo_med.inference.evaluate import joined
from dymo_med.inference.failures import ALL, Failures
from dymo_med.inference.failures import COLUMNS as FAILURE_COLUMNS
from dymo_med.inference.matching import known_split, matched_specs, patients_seen, require_unseen
from dymo_med.inference.promises import wide_regions
from dymo_med.inference.run_folder import (
    PROGRESS,
    EvaluateResult,
    check_part,
    described,
    digest_of,
    prepare_folder,
)
from dymo_med.inference.scores import ORACLE, Row
from dymo_med.inference.segmentation_plots import (
    INVENTED,
    MEAN,
    MISSED,
    NUMBER_COLUMNS,
    SUBSETS,
    dice_by_number,
    heat_maps,
    number_plot,
    write_page,
)
from dymo_med.inference.software import versions
from dymo_med.metrics import Estimate, bootstrap_means
from dymo_med.modalities.image import file_in
from dymo_med.outline import DISCARD, Segmented, finish, segment_record
from dymo_med.types import Cohort, CohortRecord, MaskSpec, PatientRecord

FOUND, NEITHER = "found", "neither"
BATCH = 4  # volumes over which the published soft Dice sums
CASE_COLUMNS = (
    *("scenario", "record_id", "patient_id", "split", "observed", "method", "trusted", "region"),
    *("dice", "hd95_mm", "volume_ml", "true_volume_ml", "volume_error_ml", "soft_dice_batch4"),
    "outcome",
    *("volume_low_ml", "volume_high_ml", "covered", "missed_share", "wide_ml", "wide_missed_share"),
)
# Of a case and region; blank where the bundle promises nothing.
_MEASURED = (
    *("dice", "hd95_mm", "volume_error_ml", "soft_dice_batch4"),
    *("covered", "missed_share", "wide_missed_share"),
)
# Whose means stand in `metrics.csv`, besides `soft_dice_batch4`.
_MEANS = (
    *("dice", "dice_gain", "hd95_mm", "volume_error_ml", "volume_error_abs_ml"),
    *("covered", "missed_share", "wide_missed_share"),
)
METRIC_COLUMNS = (
    *("scenario", "observed", "method", "region", "metric", "value", "low", "high"),
    *("records", "patients", "undefined", MISSED, INVENTED),
)
_KINDS = ("as-is", "rate", "drop", "replay")


@dataclass(frozen=True)
class _Variant:
    """One record with some of its scans, in one scenario."""

    scenario: str
    record: PatientRecord


def evaluate_segmentation(
    bundle: SegmentationBundle,
    cohort: Cohort,
    out: Path,
    *,
    split: str = "test",
    scenarios: Sequence[str] = (SUBSETS,),
    methods: Sequence[str] = (),
    flips: bool = False,
    seed: int = 0,
    resume: bool = False,
    allow_overlap: bool = False,
    treat_refused_as_missing: bool = False,
    num_parts: int = 1,
    part_id: int = 0,
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> EvaluateResult:
    """Evaluate a segmentation bundle on the records of a split whose mask is known.

    Methods: `observed_only`, and of a bundle with an imputer also `trust_all`, `dymo` and
    `oracle` (every scan that the record really has). Everything is measured on the patient's own
    grid, case by case, but the published soft Dice, which is one of four cases on the network's.

    Args:
        bundle: The model.
        cohort: The cohort; its description must fit the bundle.
        out: Folder for the files that `docs/reference/outputs.md` lists.
        split: Which split.
        scenarios: `subsets` (every non-empty subset of what a record has), `as-is`, `rate:0.5`,
            `drop:NAME,NAME` or `replay:FILE`.
        methods: Only these of a bundle's selectors, besides `observed_only`; none = all.
        flips: Average over mirrored scans.
        seed: Of scenarios and bootstrap.
        resume: Go on with an evaluation in `out`.
        allow_overlap: Evaluate although patients were used to make the bundle.
        treat_refused_as_missing: Segment without what the quality gate refuses; else such a
            record is a failure.
        num_parts: How many processes share the evaluation.
        part_id: Which of them this is, from 0.
        command: What was typed, for `run.json`.
        progress: Called with (done, total) records.

    Returns:
        Counts and metrics.

    Raises:
        ConfigError: If the split, a scenario, a part or `out` is wrong, or patients were used to
            make the bundle and that is not allowed.
        BundleError: If the bundle is for another task or other scans.
    """
    start = time.perf_counter()
    mask = cohort.task.mask
    if mask is None or (mask.labels, mask.regions) != (bundle.mask.labels, bundle.mask.regions):
        raise BundleError(
            Problem(
                f"bundle {bundle.name}, cohort {cohort.name}",
                "the tasks differ",
                expected=f"a segmentation of {', '.join(bundle.task.classes)}",
                got=f"a {cohort.task.type} of {', '.join(cohort.task.classes)}",
                remedy="Give the cohort description whose task is the bundle's",
            )
        )
    # Scans, and the mask that lies on one of them, are read as the cohort says.
    bundle = replace(bundle, specs=matched_specs(bundle, cohort))
    cohort = replace(cohort, specs=bundle.specs)
    rules = _rules(scenarios, cohort)
    for name in methods:
        bundle.require_selector(name)
    asked = tuple(methods) or (() if bundle.trust is None else tuple(bundle.trust.selectors))
    records = cohort.in_split(known_split(split))
    if not records:
        raise ConfigError(
            Problem(
                f"cohort {cohort.name}",
                f"split '{split}' has no record",
                expected="at least one",
                remedy="Choose another split",
            )
        )
    check_part(part_id, num_parts)
    seen = patients_seen(bundle, records)
    if not allow_overlap:
        require_unseen({bundle.name: seen}, cohort, split)
    known: Row = {
        "task": "segmentation",
        "bundle": bundle.bundle_id,
        "cohort": cohort.name,
        "split": split,
        "seed": seed,
        "flips": flips,
        "scenarios": [rule if isinstance(rule, str) else rule.text for rule in rules],
        "replayed": [rule.digest for rule in rules if isinstance(rule, Scenario)],
        "methods": list(asked),
        "treatment of refused modalities": treat_refused_as_missing,
        "version of dymo-med": __version__,
        "description of the files": described(bundle.specs, cohort),
        "records": digest_of(records),
        "masks": _digest_of_masks(records, mask),
    }
    prepare_folder(out, known, resume, num_parts)
    run = _Run(bundle, cohort, split, rules, asked, flips, seed, treat_refused_as_missing)
    mine = range(part_id, len(records), num_parts)
    for done, number in enumerate(mine):
        path = _kept(out, number)
        if not path.is_file():
            write_json(path, run.record(records[number]))
        if progress is not None:
            progress(done + 1, len(mine))
    still_open = sum(not _kept(out, n).is_file() for n in range(len(records)))
    if still_open:
        return EvaluateResult(out, len(records), 0, (), still_open)
    facts: Row = {
        "schema_version": 1,
        **known,
        "command": command or "evaluate",
        "regions": list(bundle.task.classes),
        "modalities": [spec.name for spec in bundle.specs],
        "selector": bundle.selector,
        "records": len(records),
        "patients_seen_in_training": seen,
        "bundle": {"name": bundle.name, "version": bundle.version, "id": bundle.bundle_id},
        "device": str(bundle.device),
        "versions": versions(),
    }
    return _write(out, facts, start)


def _rules(scenarios: Sequence[str], cohort: Cohort) -> tuple[str | Scenario, ...]:
    """Return the scenarios, each once.

    Raises:
        ConfigError: If one is unknown, or is about tables.
    """
    rules: dict[str | Scenario, None] = {}
    for text in scenarios:
        if text.strip() == SUBSETS:
            rules[SUBSETS] = None
            continue
        rule = parse_scenario(text, cohort.specs)
        if rule.kind not in _KINDS:
            raise ConfigError(
                Problem(
                    f"scenario '{text}'",
                    "a segmentation has no tables",
                    expected=", ".join((SUBSETS, *_KINDS)),
                    remedy="Choose one of these",
                )
            )
        rules[rule] = None
    return tuple(rules)


@dataclass(frozen=True)
class _Run:
    """What stays the same from record to record."""

    bundle: SegmentationBundle
    cohort: Cohort
    split: str
    rules: tuple[str | Scenario, ...]
    methods: tuple[str, ...]
    flips: bool
    seed: int
    treat_refused_as_missing: bool

    def record(self, entry: CohortRecord) -> Row:
        """Return the rows of one record in all scenarios, and what failed."""
        bundle, failures = self.bundle, Failures()
        kept: Row = {"cases": [], "unlabelled": 0}
        with failures.of(entry.record_id, ALL, "read"):
            record = read_known(
                entry,
                self.cohort,
                norms=bundle.norms,
                treat_refused_as_missing=self.treat_refused_as_missing,
            )
            own = own_grid(record, bundle.specs)
            mask = self.cohort.task.mask or bundle.mask
            labels = read_mask(entry.folder, mask, own, f"Patient {record.record_id}")
            if labels is None or record.mask is None:
                kept["unlabelled"] = 1
            else:
                truth = _Truth(
                    regions_of(torch.from_numpy(labels), bundle.mask),
                    regions_of(record.mask, bundle.mask).to(bundle.device),
                )
                kept["cases"] = self._cases(record, truth, failures)
        return {**kept, "failures": failures.rows, "unexpected": failures.unexpected}

    def _cases(self, record: PatientRecord, truth: _Truth, failures: Failures) -> list[Row]:
        """Return the rows of one record in all scenarios.

        Args:
            record: All that it really has.
            truth: What is right.
            failures: Where a scenario that fails is noted.
        """
        bundle, name = self.bundle, record.record_id
        rows: list[Row] = []
        oracle: list[Row] = []
        with failures.of(name, ALL, "predict"):
            whole = segment_record(bundle, record, flips=self.flips, seed=self.seed)
            oracle = list(self._measured(whole, {ORACLE: DISCARD}, truth))
        if not oracle:  # nothing to compare with; the same scans are among its scenarios
            return []
        for variant in self._variants(record):
            stage = "predict" if variant.record.modalities else "hide"
            with failures.of(name, variant.scenario, stage):
                _require_scan(variant.record)
                about: Row = {
                    "scenario": variant.scenario,
                    "record_id": name,
                    "patient_id": record.patient_id,
                    "split": self.split,
                    "observed": "+".join(
                        s.name for s in bundle.specs if s.name in variant.record.modalities
                    ),
                }
                part = segment_record(
                    bundle,
                    variant.record,
                    methods=self.methods,
                    flips=self.flips,
                    seed=self.seed,
                    seen=whole,
                )
                rows += [
                    about | row for row in self._measured(part, {m: m for m in part.traces}, truth)
                ]
                if bundle.trust is not None and variant.scenario != "as-is":
                    rows += [about | row for row in oracle]
        return rows

    def _variants(self, record: PatientRecord) -> Iterator[_Variant]:
        """Yield the record as each scenario leaves it."""
        names = [spec.name for spec in self.bundle.specs if spec.name in record.modalities]
        for rule in self.rules:
            if isinstance(rule, Scenario):
                left = apply(rule, record, self.bundle.specs, self.seed)
                yield _Variant(rule.text, left)
                continue
            for size in range(1, len(names) + 1):
                for kept in combinations(names, size):
                    left = record.without([n for n in names if n not in kept])
                    yield _Variant(rule, left)

    def _measured(
        self, segmented: Segmented, methods: Mapping[str, str], truth: _Truth
    ) -> Iterator[Row]:
        """Yield a row per method and region.

        Args:
            segmented: A record with some of its scans.
            methods: The trace behind each method's name.
            truth: What is right.
        """
        own = segmented.own
        for name, method in methods.items():
            probabilities = segmented.probabilities(method)
            there, found = finish(self.bundle, segmented, method)
            observed = joined(
                segmented.traces[method].names, segmented.traces[method].observed[0]
            ).split("+")
            promised = wide_regions(self.bundle, method, observed, there)
            wide = None if promised is None else promised[0].cpu()
            found = found.cpu()
            p, g = probabilities.double(), truth.seen.double()
            sums = torch.stack(
                [(p * g).flatten(1).sum(1), p.flatten(1).sum(1), g.flatten(1).sum(1)]
            )
            overlap = dice(found, truth.own).tolist()
            distance = hd95(found, truth.own, own.spacing_mm)
            trace = segmented.traces[method]
            trusted = joined(trace.names, trace.admitted[0])
            for r, region in enumerate(self.bundle.task.classes):
                volume = float(found[r].sum()) * own.voxel_ml
                true = float(truth.own[r].sum()) * own.voxel_ml
                bounds = self.bundle.bounds
                pattern = "+".join(observed)
                interval = bounds and bounds.interval(method, region, pattern, volume)
                yield {
                    "method": name,
                    "trusted": trusted,
                    "region": region,
                    "dice": overlap[r],
                    "hd95_mm": distance[r],
                    "outcome": outcome_of(found[r], truth.own[r]),
                    "volume_ml": volume,
                    "true_volume_ml": true,
                    "volume_error_ml": volume - true,
                    "volume_low_ml": interval.low if interval else None,
                    "volume_high_ml": interval.high if interval else None,
                    "covered": float(interval.low <= true <= interval.high) if interval else None,
                    "missed_share": _left_out(found[r], truth.own[r]),
                    "wide_ml": None if wide is None else float(wide[r].sum()) * own.voxel_ml,
                    "wide_missed_share": None if wide is None else _left_out(wide[r], truth.own[r]),
                    "sums": sums[:, r].tolist(),
                }


def _left_out(found: Tensor, true: Tensor) -> float:
    """Return the share of a region that an outline leaves out; 0 where there is no region."""
    size = int(true.sum())
    return float((true & ~found).sum()) / size if size else 0.0


def _require_scan(record: PatientRecord) -> None:
    """Check that a scenario leaves a scan.

    Raises:
        PatientDataError: If it leaves none.
    """
    if not record.modalities:
        raise PatientDataError(
            Problem(
                f"Patient {record.record_id}",
                "the scenario leaves nothing to segment",
                expected="at least one scan",
                remedy="Choose another scenario",
            )
        )


@dataclass(frozen=True)
class _Truth:
    """The regions of a record: bool `(R, *own.shape)`, and on the network's grid."""

    own: Tensor
    seen: Tensor


def hd95(found: Tensor, true: Tensor, spacing_mm: Sequence[float]) -> list[float]:
    """Return the 95th percentile of the Hausdorff distance of each region, in mm.

    That is the larger of the two directed ones, between the edges of the regions (MONAI). 0 where
    both are empty. Where one is, there is no distance: a region that is missed entirely, or made
    up, counts with the diagonal of the grid, which no distance exceeds, so that missing a lesion
    is never better than outlining it badly.

    Args:
        found: Bool `(R, X, Y, Z)`.
        true: Likewise.
        spacing_mm: Voxel size.

    References:
        Maier-Hein et al., Metrics reloaded, Nature Methods 21, 2024 (worst value where a metric
        is undefined).
    """
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    sides = zip(found.shape[1:], spacing_mm, strict=True)
    furthest = math.hypot(*((n - 1) * mm for n, mm in sides))
    result: list[float] = []
    for a, b in zip(found, true, strict=True):
        outcome = outcome_of(a, b)
        if outcome != FOUND:
            result.append(0.0 if outcome == NEITHER else furthest)
            continue
        value = compute_hausdorff_distance(
            a[None, None].float(),
            b[None, None].float(),
            include_background=True,
            percentile=95,
            spacing=[float(mm) for mm in spacing_mm],
        )
        result.append(float(value))
    return result


def outcome_of(found: Tensor, true: Tensor) -> str:
    """Return `found`, `missed`, `invented` or `neither`, by which of two outlines is empty.

    Args:
        found: Bool, of one region.
        true: Likewise.
    """
    if bool(true.any()):
        return FOUND if bool(found.any()) else MISSED
    return INVENTED if bool(found.any()) else NEITHER


def _digest_of_masks(records: Sequence[CohortRecord], mask: MaskSpec) -> str:
    """Return a hash of the masks that finished records were measured against."""
    found = sha256()
    for entry in records:
        path = entry.folder / file_in(entry.folder, mask.file)
        content = path.read_bytes() if path.is_file() else b""
        found.update(sha256(content).digest())
    return found.hexdigest()


def _kept(out: Path, number: int) -> Path:
    return out / PROGRESS / f"record-{number:05d}.json"


def _write(out: Path, facts: Row, start: float) -> EvaluateResult:
    """Write tables, heat map and the page from the finished records."""
    (out / "run.json").unlink(missing_ok=True)  # while it is there, everything belongs together
    cases: list[Row] = []
    failures: list[Row] = []
    unlabelled = 0
    unexpected: set[str] = set()
    for number in range(facts["records"]):
        part = json.loads(_kept(out, number).read_text(encoding="utf-8"))
        cases += part["cases"]
        failures += part["failures"]
        unlabelled += part["unlabelled"]
        unexpected |= set(part.get("unexpected", ()))
    order = {text: i for i, text in enumerate(facts["scenarios"])}
    cases.sort(key=lambda row: order[row["scenario"]])  # stable: records stay in order
    _soft_dice(cases)
    with ExitStack() as stack:
        append = stack.enter_context(csv_stream(out / "cases.csv", CASE_COLUMNS))
        append({k: row[k] for k in CASE_COLUMNS} for row in cases)
    table = metrics(cases, facts["regions"], facts["seed"])
    write_csv(out / "metrics.csv", METRIC_COLUMNS, table)
    write_csv(out / "failures.csv", FAILURE_COLUMNS, failures)
    failed = len({row["record_id"] for row in failures})
    facts = {
        **facts,
        "unlabelled_records": unlabelled,
        "failed_records": failed,
        "unexpected_failures": len(unexpected),
    }
    pictures = heat_maps(out, facts, table)
    if SUBSETS in facts["scenarios"]:
        frame = [row for row in by_case(cases, facts["regions"]) if row["scenario"] == SUBSETS]
        by_number = dice_by_number(frame, facts["regions"], facts["seed"])
        write_csv(out / "scans.csv", NUMBER_COLUMNS, by_number)
        pictures += number_plot(out, by_number, [*facts["regions"], MEAN])
    write_page(out, facts, table, failures, pictures)
    write_json(out / "run.json", {**facts, "seconds": round(time.perf_counter() - start, 1)})
    return EvaluateResult(out, facts["records"], failed, tuple(table), unexpected=len(unexpected))


def _key(row: Row) -> tuple[str, str, str, str]:
    return row["scenario"], row["observed"], row["method"], row["region"]


def _soft_dice(cases: Sequence[Row]) -> None:
    """Give every case the soft Dice of its batch of four, in the order of the cohort.

    (2 sum(p g) + 1) / (sum(p) + sum(g) + 1), sums over all voxels of the batch, p without a
    threshold: what the published code reports. It is no measure of a case.
    """
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in cases:
        groups.setdefault(_key(row), []).append(row)
    for rows in groups.values():
        for first in range(0, len(rows), BATCH):
            batch = rows[first : first + BATCH]
            both, p, g = np.sum([row["sums"] for row in batch], axis=0)
            for row in batch:
                row["soft_dice_batch4"] = float((2 * both + 1) / (p + g + 1))


def metrics(cases: Sequence[Row], regions: Sequence[str], seed: int) -> list[Row]:
    """Return the means over patients with 95 % intervals (bootstrap of patients).

    `dice_gain` is a method's Dice less that of the observed scans alone on the same case, so its
    interval is a paired one. The `observed` called `all` averages a patient's subsets first.
    The soft Dice of the published code is the mean over batches, without an interval.

    Args:
        cases: Rows of `cases.csv`.
        regions: Names in canonical order.
        seed: Of the bootstrap.
    """
    frame = by_case(cases, regions)
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in frame:
        scenario, method = row["scenario"], row["method"]
        groups.setdefault((scenario, ALL, method), []).append(row)
        if scenario == SUBSETS:
            groups.setdefault((scenario, row["observed"], method), []).append(row)
    table: list[Row] = []
    for (scenario, observed, method), rows in groups.items():
        table += _group(scenario, observed, method, rows, regions, seed)
    return table


def by_case(cases: Sequence[Row], regions: Sequence[str]) -> list[Row]:
    """Return one row per case and method, with an array of values by metric and region."""
    found: dict[tuple[str, str, str, str], Row] = {}
    for row in cases:
        key = row["scenario"], row["record_id"], row["observed"], row["method"]
        kept = found.setdefault(
            key, {k: row[k] for k in ("scenario", "observed", "method", "record_id", "patient_id")}
        )
        for metric in _MEASURED:
            values = kept.setdefault(metric, np.full(len(regions), np.nan))
            if row[metric] is not None:
                values[regions.index(row["region"])] = row[metric]
        kept.setdefault("outcomes", {})[row["region"]] = row["outcome"]
    for (scenario, record_id, observed, _), row in found.items():
        base = found.get((scenario, record_id, observed, DISCARD))
        row["dice_gain"] = (
            np.full(len(regions), np.nan) if base is None else (row["dice"] - base["dice"])
        )
    return list(found.values())


def _group(
    scenario: str,
    observed: str,
    method: str,
    rows: Sequence[Row],
    regions: Sequence[str],
    seed: int,
) -> Iterator[Row]:
    """Yield the metrics of one scenario, subset and method."""
    owners = [row["patient_id"] for row in rows]
    named = (*regions, MEAN)
    about = {"scenario": scenario, "observed": observed, "method": method}
    # How often a region was missed or made up; of the mean, how often any of them was.
    outcomes = {
        region: {
            what: sum(
                what in (row["outcomes"].values() if region == MEAN else (row["outcomes"][region],))
                for row in rows
            )
            for what in (MISSED, INVENTED)
        }
        for region in named
    }
    counts = {
        "records": len({row["record_id"] for row in rows}),
        "patients": len(set(owners)),
    }
    for metric in _MEANS:
        if metric == "dice_gain" and method == DISCARD:
            continue
        source = "volume_error_ml" if metric == "volume_error_abs_ml" else metric
        values: NDArray[np.float64] = np.stack([row[source] for row in rows])
        if metric == "volume_error_abs_ml":
            values = np.abs(values)
        if metric in ("covered", "wide_missed_share") and np.isnan(values).all():
            continue  # nothing was promised
        with_mean = np.concatenate([values, values.mean(1, keepdims=True)], 1)
        estimates: list[Estimate] = bootstrap_means(with_mean, owners, seed=seed)
        for j, (region, e) in enumerate(zip(named, estimates, strict=True)):
            undefined = int(np.isnan(with_mean[:, j]).sum())
            yield about | counts | outcomes[region] | {
                "region": region,
                "metric": metric,
                "value": e.value,
                "low": e.low,
                "high": e.high,
                "undefined": undefined,
            }  # fmt: skip
    soft = np.stack([row["soft_dice_batch4"] for row in rows])
    for j, region in enumerate(regions):
        # Every case of a batch has the batch's value: one of each batch counts.
        by_subset: dict[str, list[float]] = {}
        for row, value in zip(rows, soft[:, j].tolist(), strict=True):
            by_subset.setdefault(row["observed"] if scenario == SUBSETS else "", []).append(value)
        batches = [v for line in by_subset.values() for v in line[::BATCH]]
        yield about | counts | outcomes[region] | {
            "region": region,
            "metric": "soft_dice_batch4",
            "value": float(np.mean(batches)),
            "low": math.nan,
            "high": math.nan,
            "undefined": 0,
        }  # fmt: skip
