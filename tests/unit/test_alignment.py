"""Volumes of one patient share a grid: one voxel is one place of the body in all of them."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import yaml
from scipy.spatial.transform import Rotation

from dymo_med.data.cohort import read_cohort
from dymo_med.data.patient import read_patient
from dymo_med.errors import ConfigError, PatientDataError
from dymo_med.modalities.alignment import overlap
from dymo_med.modalities.image import Image, ImageEntry
from dymo_med.types import FieldOfView, ModalitySpec, SeriesRule
from tests.dicom_files import enhanced, series

LESION = np.array([14.0, -9.0, 6.0])


def spec(name, **more):
    defaults = {"shape": (1, 30, 30, 30), "spacing_mm": (2.0, 2.0, 2.0), "intensity": "none"}
    return ModalitySpec(
        **{"name": name, "kind": "image", "file": f"{name}.nii.gz"} | defaults | more
    )


def geometry(centre, shape, spacing, degrees=(0, 0, 0)):
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    affine[:3, :3] = turn @ np.diag(spacing)
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def lesion(affine, shape):
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    world = grid @ affine[:3, :3].T + affine[:3, 3]
    return (1000 * np.exp(-((world - LESION) ** 2).sum(-1) / 2 / 6.0**2)).astype(np.float32)


def place(value):
    """Return where the lesion is in voxels of the grid."""
    weight = value.values[0].numpy().clip(0) ** 2
    grid = np.stack(np.meshgrid(*map(np.arange, weight.shape), indexing="ij"), -1)
    return (grid * weight[..., None]).reshape(-1, 3).sum(0) / weight.sum()


SCANS = {
    "t1": (geometry((0, 0, 0), (60, 64, 50), (1.1, 1, 1.4)), (60, 64, 50)),
    "t2": (geometry((8, -6, 3), (48, 48, 24), (1, 1, 2), (5, -8, 12)), (48, 48, 24)),
    "pet": (geometry((3, 5, -9), (30, 30, 32), (2.5, 2.5, 2.5), (0, 0, 90)), (30, 30, 32)),
}


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """Return a folder of a NIfTI file, a tilted DICOM series and an Enhanced multi-frame file."""
    folder = tmp_path_factory.mktemp("p")
    affine, shape = SCANS["t1"]
    nib.save(nib.Nifti1Image(lesion(affine, shape), affine), folder / "t1.nii.gz")
    affine, shape = SCANS["t2"]
    affine = affine.copy()
    affine[:3, 2] += 0.3 * affine[:3, 1]  # a tilted gantry
    affine[:3, 3] -= 0.3 * affine[:3, 1] * (shape[2] - 1) / 2
    series(folder / "t2", lesion(affine, shape).astype(np.uint16), affine)
    affine, shape = SCANS["pet"]
    enhanced(folder / "pet.dcm", lesion(affine, shape).astype(np.uint16), affine)
    return folder


def test_a_lesion_coincides_whatever_field_of_view_and_tilt(patient):
    record = read_patient(patient, [spec("t1"), spec("t2"), spec("pet")])
    values = record.modalities
    assert list(values) == ["t1", "t2", "pet"]
    assert len({value.source.affine for value in values.values()}) == 1
    truth = np.linalg.solve(np.asarray(values["t1"].source.affine), [*LESION, 1])[:3]
    for value in values.values():
        assert np.abs(place(value) - truth).max() < 0.05, value.source.file  # 0.1 mm
    grid = np.asarray(values["t1"].source.affine)
    assert np.allclose(grid[:3, 3] + 2.0 * 14.5, 0, atol=1e-4)  # centred on t1


def test_the_reference_is_the_first_observed_or_the_declared_one(patient):
    def centre(*specs, folder=patient):
        modalities = read_patient(folder, specs).modalities
        grids = {name: np.asarray(value.source.affine) for name, value in modalities.items()}
        return {name: (g[:3, 3] + 29.0).round(3).tolist() for name, g in grids.items()}

    t2 = [8.0, -6.0, 3.0]
    assert centre(spec("dwi"), spec("t2"), spec("t1")) == {"t2": t2, "t1": t2}
    declared = centre(spec("t1"), spec("t2", grid="reference"))
    assert declared == {"t1": t2, "t2": t2} and list(declared) == ["t1", "t2"]
    own = centre(spec("t1"), spec("t2", grid="own"))
    assert own == {"t1": [0, 0, 0], "t2": t2}
    other = centre(spec("t1"), spec("t2", shape=(1, 30, 30, 31)))
    assert other["t1"] == [0, 0, 0] and other["t2"][:2] == t2[:2]


def far(tmp_path, mm):
    affine, shape = SCANS["t1"]
    for name, shift in (("t1", 0.0), ("t2", mm)):
        moved = affine.copy()
        moved[2, 3] += shift
        nib.save(nib.Nifti1Image(lesion(affine, shape), moved), tmp_path / f"{name}.nii.gz")
    return tmp_path


def test_limits(tmp_path):
    specs = [spec("t1"), spec("t2")]
    near = read_patient(far(tmp_path, 19), specs)  # of 70 mm
    assert near.modalities["t2"].warnings == ()
    [warning] = read_patient(far(tmp_path, 30), specs).modalities["t2"].warnings
    assert warning == (
        "t2.nii.gz: Its field of view is centred 30 mm from that of t1; the two may show"
        " different anatomy."
    )
    with pytest.raises(PatientDataError, match=r"same place as t1.*Got 4\d%, and 40 mm.*grid: own"):
        read_patient(far(tmp_path, 40), specs)
    alone = read_patient(far(tmp_path, 40), [spec("t1"), spec("t2", grid="own")])
    assert "40 mm" in alone.modalities["t2"].warnings[0]


def test_a_small_scan_far_inside_a_large_one_is_too_far(tmp_path):
    large = np.zeros((10, 10, 100), np.float32)
    large[2:8] = 1
    nib.save(nib.Nifti1Image(large, np.diag([6.0, 6, 6, 1])), tmp_path / "t1.nii.gz")
    small = np.diag([1.0, 1, 1, 1])
    small[:3, 3] = [20, 20, 100]
    nib.save(nib.Nifti1Image(large[..., :30], small), tmp_path / "t2.nii.gz")
    with pytest.raises(PatientDataError, match=r"Got 100%, and 18\d mm"):
        read_patient(tmp_path, [spec("t1"), spec("t2")])


def field(affine, shape):
    return FieldOfView(shape, tuple(tuple(row) for row in affine))


def test_overlap():
    cube = field(geometry((0, 0, 0), (20, 20, 20), (1, 1, 1)), (20, 20, 20))
    slab = field(geometry((0, 0, 5), (40, 40, 10), (1, 1, 1)), (40, 40, 10))
    assert overlap(cube, cube) == 1
    assert overlap(cube, field(geometry((10, 0, 0), (10, 10, 10), (2, 2, 2)), (10, 10, 10))) == 0.5
    assert overlap(cube, slab) == overlap(slab, cube) == 0.5
    assert overlap(cube, field(geometry((25, 0, 0), (20, 20, 20), (1, 1, 1)), (20, 20, 20))) == 0
    turned = field(geometry((0, 0, 0), (20, 20, 20), (1, 1, 1), (0, 0, 45)), (20, 20, 20))
    assert overlap(cube, turned) == pytest.approx(0.828, abs=0.02)  # 2 (sqrt 2 - 1)


def test_the_same_series_twice_is_an_error(patient):
    specs = [spec(name, file="t2", dicom=SeriesRule(modality="MR")) for name in ("flair", "t2")]
    with pytest.raises(PatientDataError, match="same DICOM series was taken for flair and for t2"):
        read_patient(patient, specs)


# -- declaring it ----------------------------------------------------------------------------------

ENTRY = {"kind": "image", "dims": 3, "file": "dicom", "size": [8, 8, 8], "spacing_mm": [1, 1, 1]}


def test_rules_reach_the_bundle_and_back():
    rules = {"modality": "MR", "description": "flair", "slices": [20, 400], "absent": "missing"}
    entry = ImageEntry.model_validate({**ENTRY, "dicom": rules, "grid": "reference"})
    made = Image.spec_from_entry("flair", entry)
    assert made.dicom == SeriesRule("MR", "flair", (20, 400), "missing")
    assert ModalitySpec.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    plain = Image.spec_from_entry("flair", ImageEntry.model_validate(ENTRY))
    assert not {"dicom", "grid"} & set(plain.to_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"dicom": {}},
        {"dicom": {"absent": "missing"}},
        {"dicom": {"modality": "M R"}},
        {"dicom": {"description": "("}},
        {"dicom": {"description": ""}},
        {"dicom": {"slices": [5, 4]}},
        {"dicom": {"slices": [0, 4]}},
        {"dicom": {"slices": 4}},
        {"dicom": {"protocol": "x"}},
        {"grid": "mine"},
        {"dims": 2, "size": [8, 8], "spacing_mm": None, "grid": "own"},
    ],
)
def test_wrong_declarations_are_refused(change):
    with pytest.raises(ValueError):
        ImageEntry.model_validate({**ENTRY, **change})


def test_two_references_of_one_grid_are_refused(cohort_dir, tmp_path):
    shutil.copytree(cohort_dir, tmp_path / "c")
    path = tmp_path / "c" / "cohort.yaml"
    data = yaml.safe_load(path.read_text())
    for name in ("t1", "t2"):
        data["modalities"][name]["grid"] = "reference"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    with pytest.raises(ConfigError, match="several modalities are the reference"):
        read_cohort(tmp_path / "c")
