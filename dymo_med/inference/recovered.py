"""Recovered and completed modalities of one record, as files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dymo_med.bundle import ModelBundle
from dymo_med.bundle_segmentation import SegmentationBundle
from dymo_med.data.patient import read_patient
from dymo_med.files import check_replaceable, complete_folder, write_json
from dymo_med.inference.answer import Answers, answer
from dymo_med.inference.assemble import sources_of, unused_sentences
from dymo_med.inference.software import versions
from dymo_med.types import ModalitySpec, PatientRecord

_LOG = logging.getLogger(__name__)
RECOVERED_VERSION = 3  # of recovered.json
RECOVERED = "recovered"
# What `dymo-med export` puts beside a prediction; a new prediction replaces it too.
EXPORTED = ("dicom", "fhir", "bids")


def read_for(
    bundle: ModelBundle | SegmentationBundle,
    patient_dir: Path,
    treat_refused_as_missing: bool,
    patient_id: str | None = None,
) -> PatientRecord:
    """Read a patient as the bundle needs it."""
    return read_patient(
        patient_dir,
        bundle.specs,
        patient_id=patient_id,
        missing_values=bundle.missing_values,
        norms=bundle.norms,
        treat_refused_as_missing=treat_refused_as_missing,
    )


def impute_patient(
    patient_dir: Path,
    bundle: ModelBundle,
    out: Path,
    *,
    seed: int = 0,
    identify: bool = False,
    treat_refused_as_missing: bool = False,
) -> list[Path]:
    """Write what the imputer proposes for one patient, and nothing else.

    Args:
        patient_dir: The patient directory.
        bundle: The model.
        out: Folder for `recovered/`; it appears complete or not at all.
        seed: Seed of whatever is random.
        identify: Whether to show the identifier that headers state, instead of a pseudonym.
        treat_refused_as_missing: Recover what the quality gate refuses too.

    Returns:
        The files, all under `out / "recovered"`.

    Raises:
        PatientDataError: If the patient's files cannot be used.
        RefusedError: If they can be read but the quality gate refuses one.
        ConfigError: If `out` holds something else, or the key of pseudonyms cannot be used.
    """
    marker = f"{RECOVERED}/recovered.json"
    check_replaceable(out, marker, (RECOVERED,))
    record = read_for(bundle, patient_dir, treat_refused_as_missing)
    for sentence in unused_sentences(record, bundle.specs):
        _LOG.warning("%s", sentence)
    sources = sources_of(record, identify)
    answers = answer(bundle, [record], seed=seed)
    with complete_folder(out, marker, (RECOVERED,)) as folder:
        files = write_recovered(bundle, record, answers, 0, folder / RECOVERED)
        write_json(
            folder / marker,
            {
                "schema_version": RECOVERED_VERSION,
                "record_id": record.record_id,
                "synthetic": True,
                "files": files,
                "bundle": {"name": bundle.name, "id": bundle.bundle_id},
                "seed": seed,
                "refused": list(record.refused),
                "unused": list(record.unused),
                "sources": {n: asdict(s) for n, s in sources.items()},
                "versions": versions(),
            },
        )
    return [out / file for file in files.values()]


def write_recovered(
    bundle: ModelBundle, record: PatientRecord, answers: Answers, row: int, folder: Path
) -> dict[str, str]:
    """Write the recovered and completed modalities of one record.

    Args:
        bundle: The model.
        record: The record in that row.
        answers: Of a batch.
        row: Which record of it.
        folder: Is made; its files are named as synthetic.

    Returns:
        File of each modality, relative to the folder above.
    """
    folder.mkdir()
    files = {}
    recovery = answers.recovery
    for m, spec in enumerate(bundle.specs):
        if not bool(recovery.candidates[row, m]):
            continue
        fields = answers.batch.observed_fields.get(spec.name)
        completed = fields is not None and bool(recovery.completed[row, m])
        path = bundle.modalities[spec.name].write(
            folder,
            recovery.values[spec.name][row].cpu(),
            fields[row].cpu() if completed and fields is not None else None,
            _affine(spec, bundle.specs, record),
        )
        files[spec.name] = f"{folder.name}/{path.name}"
    return files


def _affine(
    spec: ModalitySpec, specs: Sequence[ModalitySpec], record: PatientRecord
) -> tuple[tuple[float, ...], ...] | None:
    """Return where a recovered volume lies: as the first observed one on the same kind of grid."""
    for other in specs:
        same = other.shape[1:] == spec.shape[1:] and other.spacing_mm == spec.spacing_mm
        if same and other.grid != "own" and other.name in record.modalities:
            affine = record.modalities[other.name].source.affine
            if affine is not None:
                return affine
    return None
