"""One patient in a straight line: read, recover, encode, select, fuse, explain, write.

Cohort evaluation takes the same steps (`answer`, `explain_record`, `assemble`) on larger batches.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dymo_med.bundle import ModelBundle
from dymo_med.drawn import DRAWS
from dymo_med.files import check_replaceable, complete_folder, write_csv, write_text
from dymo_med.inference.answer import answer, explain_record
from dymo_med.inference.assemble import STEP_COLUMNS, assemble
from dymo_med.inference.compose import prediction_file
from dymo_med.inference.draws import draw_answers
from dymo_med.inference.in_memory import record_of
from dymo_med.inference.prediction_file import PredictionFile
from dymo_med.inference.recovered import EXPORTED, RECOVERED, read_for, write_recovered
from dymo_med.inference.report import write_report
from dymo_med.inference.standing import judged, standing
from dymo_med.types import PatientRecord, Prediction

_WRITTEN = ("prediction.json", "selection.csv", "report.html", "report.pdf", RECOVERED, *EXPORTED)


def predict_batch(
    bundle: ModelBundle, records: Sequence[PatientRecord], *, explain: bool = True, seed: int = 0
) -> list[Prediction]:
    """Predict several records.

    Args:
        bundle: The model.
        records: Any number, each with at least one modality.
        explain: Whether to compute attributions; without, they cost nothing.
        seed: Recorded, and used by whatever is random.

    Returns:
        One prediction per record, in order. Its status does not know what other draws of the
        recoveries would have answered, as that of `predict_patient` does.

    Raises:
        PatientDataError: If a record has nothing observed.
    """
    if not records:
        return []
    answers = answer(bundle, records, seed=seed)
    found = []
    for row, record in enumerate(records):
        explanation = explain_record(bundle, answers, row, seed=seed) if explain else None
        prediction = assemble(bundle, record, answers, row, explanation, seed=seed)
        found.append(judged(prediction, standing(bundle, answers, row, prediction)))
    return found


def predict_patient(
    patient_dir: Path | str | Mapping[str, Any],
    bundle: ModelBundle,
    out: Path | str | None = None,
    *,
    explain: bool = True,
    seed: int = 0,
    draws: int = DRAWS,
    pdf: bool = False,
    identify: bool = False,
    treat_refused_as_missing: bool = False,
    patient_id: str | None = None,
) -> Prediction:
    """Predict one patient from a folder, or from what is in memory.

    Args:
        patient_dir: The patient directory; its name is the record's id. Or arrays, images and
            tables by modality, as `in_memory.record_of` takes them.
        bundle: The model.
        out: Folder for `prediction.json`, `selection.csv`, `report.html` and `recovered/`; it
            appears complete or not at all. None = write nothing.
        explain: Whether to compute attributions.
        seed: Seed of whatever is random.
        draws: How many draws of a probabilistic imputer's recoveries to answer from, besides its
            best guess; 0 = none.
        pdf: Whether to write the page as `report.pdf` too.
        identify: Whether to show the identifier that headers state, instead of a pseudonym.
        treat_refused_as_missing: Go on without what the quality gate refuses; everything that is
            written says so.
        patient_id: Id of the patient, if it is not the record's.

    Returns:
        The prediction.

    Raises:
        PatientDataError: If the patient's files cannot be used.
        RefusedError: If they can be read but the quality gate refuses one.
        ConfigError: If `out` holds something else, or the key of pseudonyms cannot be used.
    """
    if out is not None:
        out = Path(out)
        check_replaceable(out, "prediction.json", _WRITTEN)
    if isinstance(patient_dir, Mapping):
        record = record_of(
            patient_dir,
            bundle,
            patient_id=patient_id,
            treat_refused_as_missing=treat_refused_as_missing,
        )
    else:
        record = read_for(bundle, Path(patient_dir), treat_refused_as_missing, patient_id)
    answers = answer(bundle, [record], seed=seed)
    explanation = explain_record(bundle, answers, 0, seed=seed) if explain else None
    prediction = assemble(bundle, record, answers, 0, explanation, seed=seed, identify=identify)
    if out is not None:
        with complete_folder(out, "prediction.json", _WRITTEN) as folder:
            files = write_recovered(bundle, record, answers, 0, folder / RECOVERED)
            file = prediction_file(
                bundle,
                record,
                answers,
                0,
                explanation,
                prediction,
                draws=draws,
                files={name: (path, _sha256(folder / path)) for name, path in files.items()},
                command=_command(
                    record.record_id,
                    bundle,
                    seed,
                    draws,
                    {
                        "--no-explain": not explain,
                        "--identify": identify,
                        "--treat-refused-as-missing": treat_refused_as_missing,
                    },
                ),
            )
            write_prediction(file, folder)
            write_csv(folder / "selection.csv", STEP_COLUMNS, step_rows(file))
            if pdf:
                from dymo_med.inference.pdf import write_pdf

                write_pdf(file, folder / "report.pdf")
        return judged(prediction, file)
    drawn, _ = draw_answers(bundle, answers, 0, draws=draws, seed=seed)
    return judged(prediction, standing(bundle, answers, 0, prediction, drawn))


def write_prediction(file: PredictionFile, folder: Path) -> None:
    """Write `prediction.json`, and `report.html` from what it says.

    Args:
        file: The prediction.
        folder: Existing folder.
    """
    write_text(folder / "prediction.json", file.to_text())
    write_report(file, folder / "report.html")


def step_rows(file: PredictionFile) -> list[dict[str, object]]:
    """Return the rows of `selection.csv`."""
    return [step.model_dump() for step in file.steps]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _command(
    record_id: str, bundle: ModelBundle, seed: int, draws: int, flags: Mapping[str, bool]
) -> str:
    """Return how to get the same files again, without the paths of this machine."""
    words_ = ["dymo-med", "predict", "--patient-dir", record_id, "--bundle", bundle.name]
    words_ += ["--out", "OUT", "--selector", bundle.choice.name, "--device", str(bundle.device)]
    words_ += ["--seed", str(seed), "--draws", str(draws)]
    return shlex.join([*words_, *(flag for flag, given in flags.items() if given)])
