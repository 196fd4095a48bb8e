"""A patient whose data is in memory: arrays, images and tables by the name of the modality.

What is in memory is written to a folder that is gone afterwards and read as any patient's files
are, so every check of a file holds for an array too.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dymo_med.bundle import ModelBundle
from dymo_med.data.patient import read_patient
from dymo_med.errors import PatientDataError, Problem
from dymo_med.registry import nearest
from dymo_med.types import ModalitySpec, PatientRecord

_FORMS = {
    "image": "an array on the model's grid, or a nibabel image",
    "table": "a DataFrame of one row, or a mapping from columns to values",
    "tokens": "an array of steps x features",
}


def record_of(
    data: Mapping[str, Any],
    bundle: ModelBundle,
    *,
    record_id: str = "in-memory",
    patient_id: str | None = None,
    treat_refused_as_missing: bool = False,
) -> PatientRecord:
    """Return a patient's record.

    Args:
        data: By modality; what is not there is missing. A volume is a nibabel image, or an array
            with the shape of the model's grid, which then lies on it; a picture an array of whole
            numbers from 0 to 255 or 65535, rows by columns (and colours); a sequence an array of
            steps by features; a table a DataFrame of one row, a Series or a mapping. Cells are in
            the model's units; None, NaN and the empty text are blank.
        bundle: The model.
        record_id: Id of the record.
        patient_id: Id of the patient; the record's if not given.
        treat_refused_as_missing: Go on without what the quality gate refuses.

    Raises:
        PatientDataError: If a name is unknown, a value has the wrong form, or the data cannot be
            used.
    """
    names = [spec.name for spec in bundle.specs]
    problems = [
        Problem(
            f"Patient {record_id}",
            f"the model has no modality '{name!s:.40}'",
            expected=", ".join(names),
            remedy=nearest(str(name)[:40], names),
        )
        for name in data
        if name not in names
    ]
    if problems:
        raise PatientDataError(*problems)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / record_id
        folder.mkdir()
        specs = []
        for spec in bundle.specs:
            given = data.get(spec.name)
            specs.append(_as_file(spec))
            if given is None:
                continue
            try:
                _WRITERS[spec.kind](folder / specs[-1].file, given, spec)
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise PatientDataError(
                    Problem(
                        f"Patient {record_id}: {spec.name}",
                        f"it is not {_FORMS[spec.kind]}",
                        expected=_wanted(spec),
                        got=f"{type(given).__name__} ({type(error).__name__})",
                        remedy="Give it in that form",
                    )
                ) from None
        return read_patient(
            folder,
            specs,
            record_id=record_id,
            patient_id=patient_id,
            missing_values=bundle.missing_values,
            root=folder,
            norms=bundle.norms,
            treat_refused_as_missing=treat_refused_as_missing,
        )


def _as_file(spec: ModalitySpec) -> ModalitySpec:
    """Return a modality as it is written for the moment: a file of its own, by plain rules."""
    ends = {"image": ".nii.gz" if len(spec.shape) == 4 else ".png", "table": ".csv"}
    columns = tuple(replace(column, rules=None) for column in spec.columns)
    file = spec.name + ends.get(spec.kind, ".npy")
    return replace(spec, file=file, rules=None, dicom=None, columns=columns)


def _wanted(spec: ModalitySpec) -> str:
    if spec.columns:
        return ", ".join(column.name for column in spec.columns)
    return "numbers, " + " x ".join(map(str, spec.shape if spec.steps else spec.shape[1:]))


def _write_image(path: Path, given: Any, spec: ModalitySpec) -> None:
    if len(spec.shape) == 3:
        return _write_picture(path, np.asarray(given))
    import nibabel

    if not isinstance(given, nibabel.spatialimages.SpatialImage):
        values = np.asarray(given, dtype=np.float32)
        if values.shape != spec.shape[1:]:
            raise ValueError("an array lies on the model's grid")
        affine = np.diag([*spec.spacing_mm, 1.0])
        middle = (np.array(values.shape) - 1) / 2
        affine[:3, 3] = -affine[:3, :3] @ middle
        given = nibabel.Nifti1Image(values, affine)
        given.header.set_xyzt_units("mm")
    nibabel.save(given, path)
    return None


def _write_picture(path: Path, values: np.ndarray[Any, Any]) -> None:
    from PIL import Image

    if not np.issubdtype(values.dtype, np.integer) or values.min() < 0 or values.max() > 65535:
        raise ValueError("a picture has whole numbers")
    kind = np.uint8 if values.max() < 256 or values.ndim == 3 else np.uint16
    Image.fromarray(values.astype(kind)).save(path)


def _write_table(path: Path, given: Any, spec: ModalitySpec) -> None:
    if hasattr(given, "to_dict"):
        if getattr(given, "ndim", 1) == 2:
            if len(given) != 1:
                raise ValueError("a table has one row")
            given = given.iloc[0]
        given = given.to_dict()
    known = [column.name for column in spec.columns]
    cells = {str(name): given[name] for name in given}
    if unknown := [name for name in cells if name not in known]:
        raise KeyError(unknown[0])
    row = ["" if _blank(cells.get(name)) else str(cells[name]) for name in known]
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([known, row])


def _blank(cell: Any) -> bool:
    return cell is None or cell == "" or bool(cell != cell)


def _write_tokens(path: Path, given: Any, spec: ModalitySpec) -> None:
    values = np.asarray(given, dtype=np.float32)
    if values.ndim != len(spec.shape):
        raise ValueError("a sequence has steps and features")
    np.save(path, values, allow_pickle=False)


_WRITERS = {"image": _write_image, "table": _write_table, "tokens": _write_tokens}
