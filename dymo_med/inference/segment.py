"""One patient in a straight line: read, recover, segment, select, write, for segmentations.

Cohort evaluation takes the same step (`segment_record`).
"""

from __future__ import annotations

import hashlib
import logging
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dymo_med.bundle_segmentation import SegmentationBundle
from dymo_med.data.gate import CHECKS
from dymo_med.data.masks import (
    Grid,
    compose,
    decided,
    to_grid,
    volumes_ml,
    write_volume,
)
from dymo_med.errors import ConfigError, Problem
from dymo_med.files import (
    check_replaceable,
    complete_folder,
    write_csv,
    write_json,
    write_text,
)
from dymo_med.inference.assemble import (
    STEP_COLUMNS,
    gate_results,
    selection_steps,
    unused_sentences,
)
from dymo_med.inference.overlays import cut_place, outlined
from dymo_med.inference.prediction_file import (
    QualityPart,
    ReasonPart,
    SourcePart,
    Status,
    StepPart,
    quality_parts,
)
from dymo_med.inference.promises import overlap_part, region_parts, wide_outline
from dymo_med.inference.recovered import EXPORTED, RECOVERED, read_for
from dymo_med.inference.segmentation_file import (
    OUTSIDE,
    SCHEMA_VERSION,
    SEGMENTATION,
    WIDE,
    BundlePart,
    GridPart,
    OutlinedPart,
    OutputPart,
    OverlapPart,
    RegionPart,
    SegmentationFile,
    outline_status,
)
from dymo_med.inference.segmentation_page import write_segmentation_report
from dymo_med.inference.software import versions
from dymo_med.modalities import modality
from dymo_med.outline import DISCARD, Segmented, finish, segment_record
from dymo_med.types import PatientRecord, SelectionStep

_LOG = logging.getLogger(__name__)
_RECOVERED_VERSION = 1


@dataclass(frozen=True)
class Segmentation:
    """The answer for one record.

    Attributes:
        record_id: Id of the record.
        labels: Uint8 `(X, Y, Z)` on the own grid.
        probabilities: Float32 `(R, X, Y, Z)` on the own grid, before the threshold.
        grid: The own grid.
        volumes_ml: Volume of each region.
        wide: Uint8 `(X, Y, Z)`: labels of the wide outline, which leaves out little of the lesion
            over patients; None where the bundle cannot promise it.
        regions: Each region's volume, where the true one is, and its wide outline's.
        status: `answered`, or `caution`.
        reasons: Why; `dymo_med.inference.report.reason_sentence` words them.
        quality: What the quality gate says, by scan.
        performance: How good such outlines are; None where the bundle does not say.
        observed_only_ml: Volumes from measured scans alone.
        outside: Share of the own grid that the model does not look at.
        observed: Scans measured.
        recovered: Scans for which a proposal was made.
        trusted: Of these, the ones that were used.
        rejected: Of these, the ones that were not.
        absent: Scans for which nothing could be proposed.
        refused: Scans that are there but that the quality gate refuses: missing.
        method: Selector behind it.
        steps: The selection, in order.
        warnings: Sentences.
    """

    record_id: str
    labels: NDArray[np.uint8]
    probabilities: NDArray[np.float32]
    grid: Grid
    volumes_ml: Mapping[str, float]
    wide: NDArray[np.uint8] | None
    regions: tuple[RegionPart, ...]
    status: Status
    reasons: tuple[ReasonPart, ...]
    quality: Mapping[str, QualityPart]
    performance: OverlapPart | None
    observed_only_ml: Mapping[str, float]
    outside: float
    observed: tuple[str, ...]
    recovered: tuple[str, ...]
    trusted: tuple[str, ...]
    rejected: tuple[str, ...]
    absent: tuple[str, ...]
    refused: tuple[str, ...]
    method: str
    steps: tuple[SelectionStep, ...]
    warnings: tuple[str, ...]


def segment_patient(
    patient_dir: Path,
    bundle: SegmentationBundle,
    out: Path | None = None,
    *,
    probabilities: bool = False,
    flips: bool = False,
    selector: str | None = None,
    seed: int = 0,
    treat_refused_as_missing: bool = False,
    patient_id: str | None = None,
    pdf: bool = False,
) -> Segmentation:
    """Segment one patient from a folder.

    Args:
        patient_dir: The patient directory; its name is the record's id.
        bundle: The model.
        out: Folder for `segmentation.nii.gz`, `prediction.json`, `selection.csv`, `report.html`
            and `recovered/`; it appears complete or not at all. None = write nothing.
        probabilities: Write a map of each region's probability too.
        flips: Average over all mirrorings of the scans: steadier, and eight times the work.
        selector: Another selector than the bundle's default.
        seed: Of whatever is random in the imputer.
        treat_refused_as_missing: Go on without what the quality gate refuses; the page says so.
        patient_id: Id of the patient, if it is not the record's.
        pdf: Write the page as `report.pdf` too.

    Returns:
        The segmentation on the grid of the patient's reference scan.

    Raises:
        PatientDataError: If the patient's files cannot be used.
        RefusedError: If they can be read but the quality gate refuses one.
        ConfigError: If there is no such selector, or `out` holds something else.
    """
    written = ("prediction.json", "selection.csv", "report.html", RECOVERED, SEGMENTATION)
    maps = tuple(f"probability_{name}.nii.gz" for name in bundle.task.classes)
    known = (*written, "report.pdf", WIDE, *maps, *EXPORTED)
    if out is not None:
        check_replaceable(out, SEGMENTATION, known)
    method = selector or bundle.selector
    bundle.require_selector(method)
    record = read_for(bundle, patient_dir, treat_refused_as_missing, patient_id)
    segmented = segment_record(bundle, record, methods=[method], flips=flips, seed=seed)
    answer = _answer(bundle, segmented, method)
    if out is not None:
        with complete_folder(out, SEGMENTATION, known) as folder:
            label = f"dymo-med segmentation, bundle {bundle.bundle_id[:12]}"
            write_volume(folder / SEGMENTATION, answer.labels, answer.grid, label)
            files = {"segmentation": SEGMENTATION}
            if answer.wide is not None:
                write_volume(folder / WIDE, answer.wide, answer.grid, f"wide {label}")
                files["wide"] = WIDE
            if probabilities:
                for name, path, one in zip(
                    bundle.task.classes, maps, answer.probabilities, strict=True
                ):
                    write_volume(folder / path, one, answer.grid, f"probability of {name}")
                    files[f"probability {name}"] = path
            made = _write_recovered(bundle, segmented, folder / RECOVERED)
            options = {
                "--flips": flips,
                "--probabilities": probabilities,
                "--treat-refused-as-missing": treat_refused_as_missing,
            }
            file = segmentation_file(bundle, segmented, answer, folder, files, made, options, seed)
            write_text(folder / "prediction.json", file.to_text())
            write_segmentation_report(file, folder / "report.html")
            if pdf:
                from dymo_med.inference.segmentation_pdf import write_segmentation_pdf

                write_segmentation_pdf(file, folder / "report.pdf")
            write_csv(
                folder / "selection.csv", STEP_COLUMNS, [step.model_dump() for step in file.steps]
            )
    return answer


def _answer(bundle: SegmentationBundle, segmented: Segmented, method: str) -> Segmentation:
    """Return one method's answer."""
    there, regions = finish(bundle, segmented, method)
    trace, record = segmented.traces[method], segmented.record
    names = trace.names

    def pick(available: Tensor) -> tuple[str, ...]:
        return tuple(n for n, a in zip(names, available[0].tolist(), strict=True) if a)

    warnings = unused_sentences(_beside_mask(record, bundle), bundle.specs)
    warnings += [w for v in record.modalities.values() for w in v.warnings]
    warnings += [
        f"{name} has the same voxels as {v.same_as}: one may be under the wrong name."
        for name, v in record.modalities.items()
        if v.same_as
    ]
    results = gate_results(bundle, record)
    for name, result in results.items():
        for finding in result.findings:
            said = "refuses" if finding.level == "refuse" else "warns of"
            facts = "; ".join(
                f"{word} {text}"
                for word, text in (("got", finding.got), ("expected", finding.expected))
                if text
            )
            warnings.append(
                f"{name}: the quality gate {said} it: {CHECKS[finding.check]}"
                + (f" ({facts})." if facts else ".")
                + " It counts as missing." * (name in record.refused)
            )
    share = _outside(segmented)
    if share > OUTSIDE:
        warnings.append(
            f"{share:.0%} of the voxels of the reference scan lie outside what the model looks at;"
            " nothing is found there."
        )
    observed, trusted = pick(trace.observed), pick(trace.admitted)
    volumes = volumes_ml(regions, segmented.own, bundle.mask)
    alone_ml = volumes_ml(finish(bundle, segmented, DISCARD)[1], segmented.own, bundle.mask)
    wide, wide_ml = wide_outline(bundle, method, observed, there, segmented.own)
    parts = region_parts(bundle, method, observed, volumes, wide_ml)
    quality, performance = quality_parts(results), overlap_part(bundle, method, observed)
    status, reasons = outline_status(
        parts, alone_ml, trusted, quality, performance, share, promises=bundle.bounds is not None
    )
    return Segmentation(
        record_id=record.record_id,
        labels=compose(regions, bundle.mask).cpu().numpy(),
        probabilities=there.float().cpu().numpy(),
        grid=segmented.own,
        volumes_ml=volumes,
        wide=wide,
        regions=parts,
        status=status,
        reasons=reasons,
        quality=quality,
        performance=performance,
        observed_only_ml=alone_ml,
        outside=share,
        observed=observed,
        recovered=pick(trace.candidates),
        trusted=trusted,
        rejected=pick(trace.rejected),
        absent=pick(~trace.observed & ~trace.candidates),
        refused=tuple(record.refused),
        method=method,
        steps=selection_steps(trace, 0),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _beside_mask(record: PatientRecord, bundle: SegmentationBundle) -> PatientRecord:
    """Return the record without its own mask among what nobody looks at."""
    stem = bundle.mask.file.split(".")[0]
    return replace(record, unused=tuple(f for f in record.unused if f.split(".")[0] != stem))


def _outside(segmented: Segmented) -> float:
    """Return the share of the own grid that the network's grid does not reach."""
    ones = torch.ones(1, *segmented.seen.shape)
    return float((to_grid(ones, segmented.seen, segmented.own) == 0).float().mean())


def segmentation_file(
    bundle: SegmentationBundle,
    segmented: Segmented,
    answer: Segmentation,
    folder: Path,
    files: Mapping[str, str],
    made: Mapping[str, str],
    options: Mapping[str, bool],
    seed: int,
) -> SegmentationFile:
    """Gather what `prediction.json` holds.

    Args:
        bundle: The model.
        segmented: The record.
        answer: Of the method that is reported.
        folder: Where the files are.
        files: What was written, by what it is.
        made: Recovered scans, by modality.
        options: Switches of the command line, and whether they were given.
        seed: Of the run.
    """
    record, spec = segmented.record, bundle.specs[0]
    regions = decided(segmented.probabilities(answer.method), bundle.mask).cpu().numpy()
    shown: dict[str, Tensor] = {n: v.values for n, v in record.modalities.items()}
    if segmented.recovery is not None:
        shown |= {n: segmented.recovery.values[n][0].cpu() for n in answer.trusted}
    body = np.any([shown[n][0].numpy() != 0 for n in answer.observed], axis=0)
    at = cut_place(regions, body)
    scans = tuple(
        OutlinedPart(
            modality=s.name,
            state="observed" if s.name in answer.observed else "trusted",
            cuts=outlined(
                shown[s.name][0].numpy(),
                spec.spacing_mm,
                regions,
                at,
                synthetic=s.name not in answer.observed,
            ),
        )
        for s in bundle.specs
        if s.name in shown
    )
    why = "The bundle recovers nothing." if bundle.trust is None else bundle.trust.choice.why
    if answer.method != bundle.selector:
        why = f"It was asked for; this model's default is {bundle.selector}."

    def hashed(path: str) -> OutputPart:
        return OutputPart(
            file=path, sha256=hashlib.sha256((folder / path).read_bytes()).hexdigest()
        )

    command = ["dymo-med", "predict", "--patient-dir", record.record_id, "--bundle", bundle.name]
    command += ["--out", "OUT", "--selector", answer.method, "--device", str(bundle.device)]
    command += ["--seed", str(seed)] + [name for name, given in options.items() if given]
    affine = tuple(tuple(float(x) for x in row) for row in answer.grid.affine)
    return SegmentationFile(
        schema_version=SCHEMA_VERSION,
        task="segmentation",
        record_id=record.record_id,
        patient_id=record.patient_id,
        bundle=BundlePart(name=bundle.name, version=bundle.version, id=bundle.bundle_id),
        status=answer.status,
        status_reasons=answer.reasons,
        regions=answer.regions,
        observed_only_ml=dict(answer.observed_only_ml),
        grid=GridPart(shape=answer.grid.shape, affine=affine, voxel_ml=answer.grid.voxel_ml),
        observed=answer.observed,
        recovered=answer.recovered,
        trusted=answer.trusted,
        rejected=answer.rejected,
        absent=answer.absent,
        refused=answer.refused,
        quality=dict(answer.quality),
        performance=answer.performance,
        outside=answer.outside,
        method=answer.method,
        method_why=why,
        steps=tuple(StepPart(**asdict(step)) for step in answer.steps),
        warnings=answer.warnings,
        sources={
            n: SourcePart(**{**asdict(v.source), "facts": dict(v.source.facts)})
            for n, v in record.modalities.items()
        },
        files={name: hashed(path) for name, path in files.items()},
        recovered_files={name: hashed(path) for name, path in made.items()},
        scans=scans,
        flips=options["--flips"],
        seed=seed,
        command=shlex.join(command),
        versions={k: v for k, v in versions().items() if k != "captum"},
    )


def _write_recovered(
    bundle: SegmentationBundle, segmented: Segmented, folder: Path
) -> dict[str, str]:
    """Write the recovered scans; return the file of each, relative to the folder above."""
    folder.mkdir()
    files: dict[str, str] = {}
    if segmented.recovery is None:
        return files
    affine = segmented.seen.affine.tolist()
    for m, spec in enumerate(bundle.specs):
        if bool(segmented.recovery.candidates[0, m]):
            values = segmented.recovery.values[spec.name][0].cpu()
            path = modality(spec).write(folder, values, None, affine)
            files[spec.name] = f"{folder.name}/{path.name}"
    return files


def impute_segmented(
    patient_dir: Path,
    bundle: SegmentationBundle,
    out: Path,
    *,
    seed: int = 0,
    treat_refused_as_missing: bool = False,
) -> list[Path]:
    """Write what the imputer of a segmentation bundle proposes for one patient, and nothing else.

    Args:
        patient_dir: The patient directory.
        bundle: The model.
        out: Folder for `recovered/`.
        seed: Of whatever is random.
        treat_refused_as_missing: Recover what the quality gate refuses too.

    Returns:
        The files.

    Raises:
        PatientDataError: If the patient's files cannot be used.
        RefusedError: If they can be read but the quality gate refuses one.
        ConfigError: If the bundle recovers nothing, or `out` holds something else.
    """
    if bundle.trust is None:
        raise ConfigError(
            Problem(
                f"bundle {bundle.name}",
                "the bundle recovers nothing: it was trained without an imputer",
                expected="a bundle with an imputer",
                remedy="Name an imputer in the recipe and train again",
            )
        )
    marker = f"{RECOVERED}/recovered.json"
    check_replaceable(out, marker, (RECOVERED,))
    record = read_for(bundle, patient_dir, treat_refused_as_missing)
    for sentence in unused_sentences(_beside_mask(record, bundle), bundle.specs):
        _LOG.warning("%s", sentence)
    segmented = segment_record(bundle, record, seed=seed)
    with complete_folder(out, marker, (RECOVERED,)) as folder:
        files = _write_recovered(bundle, segmented, folder / RECOVERED)
        write_json(
            folder / marker,
            {
                "schema_version": _RECOVERED_VERSION,
                "record_id": record.record_id,
                "synthetic": True,
                "files": files,
                "bundle": {"name": bundle.name, "id": bundle.bundle_id},
                "seed": seed,
                "refused": list(record.refused),
            },
        )
    return [out / file for file in files.values()]
