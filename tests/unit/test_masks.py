"""Masks: their file, their checks, their way to the network's grid and back."""

import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from dymo_med.data.cohort import read_cohort
from dymo_med.data.masks import (
    Grid,
    compose,
    decided,
    dice,
    nearest_voxel,
    own_grid,
    read_known,
    regions_of,
    to_grid,
    volumes_ml,
    write_volume,
)
from dymo_med.data.patient import read_patient
from dymo_med.data.simulate import SEGMENTATION
from dymo_med.errors import ConfigError, PatientDataError
from dymo_med.inference.check import check
from dymo_med.tasks import Segmentation
from dymo_med.types import MaskSpec
from tests.segmentation import masked_cohort, masked_dir  # noqa: F401

BRATS = MaskSpec("seg.nii.gz", (1, 2, 4), {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)})

SHIFT = np.array([[1, 0, 0, 5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def grid(shape=(4, 5, 6), spacing=(1.0, 2.0, 3.0), origin=(-1.0, 7.0, 3.0)):
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return Grid(shape, affine)


def test_labels_become_regions_and_labels_again():
    labels = torch.tensor([0, 1, 2, 4], dtype=torch.uint8).reshape(1, 2, 2)
    regions = regions_of(labels, BRATS)
    assert regions.flatten(1).tolist() == [
        [False, True, True, True],
        [False, True, False, True],
        [False, False, False, True],
    ]
    assert torch.equal(compose(regions, BRATS), labels)


def test_inner_regions_stay_within_outer_ones():
    p = torch.tensor([[0.9, 0.2, 0.9], [0.1, 0.9, 0.9], [0.9, 0.9, 0.51]]).reshape(3, 3, 1, 1)
    found = decided(p, BRATS).flatten(1).tolist()
    assert found == [[True, False, True], [False, False, True], [False, False, True]]


def test_dice_counts_overlap_and_agrees_about_nothing():
    a = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).bool().reshape(3, 4, 1, 1)
    b = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool().reshape(3, 4, 1, 1)
    assert dice(a, b).tolist() == [pytest.approx(2 / 3), 1.0, 0.0]


def test_volumes_are_in_millilitres():
    regions = torch.zeros(3, 4, 5, 6, dtype=torch.bool)
    regions[0, :2] = True
    found = volumes_ml(regions, grid(), BRATS)
    assert found == {"WT": pytest.approx(60 * 6 / 1000), "TC": 0.0, "ET": 0.0}


def test_probabilities_go_to_another_grid_by_place_in_the_world():
    here = grid((8, 8, 8), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0))
    ramp = torch.arange(8.0).expand(1, 8, 8, 8) / 8  # along the last axis
    # The same field of view, turned: the last axis comes first and runs backwards, half as fine.
    affine = np.array([[0, 2.0, 0, 0], [0, 0, 2.0, 0], [-1.0, 0, 0, 14.0], [0, 0, 0, 1.0]])
    there = Grid((15, 8, 8), affine)
    moved = to_grid(ramp, here, there)
    expected = (14.0 - torch.arange(15.0)) / 2 / 8
    assert torch.allclose(moved[0, :, 3, 4], expected, atol=1e-6)
    assert to_grid(ramp, here, here) is ramp
    beyond = grid((4, 8, 8), (2.0, 2.0, 2.0), (100.0, 0.0, 0.0))
    assert bool((to_grid(ramp, here, beyond) == 0).all())


def test_masks_go_to_another_grid_by_the_nearest_voxel():
    labels = np.zeros((4, 4, 4), dtype=np.uint8)
    labels[1, 2, 3] = 4
    own = grid((4, 4, 4), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0))
    fine = grid((8, 8, 8), (1.0, 1.0, 1.0), (-0.5, -0.5, -0.5))
    moved = nearest_voxel(labels, own, fine)
    assert sorted(set(np.flatnonzero(moved.any((1, 2))))) == [2, 3]
    assert moved.sum() == 8 * 4 and set(np.unique(moved)) == {0, 4}


def test_a_written_volume_has_the_geometry_of_its_grid(tmp_path):
    tilted = np.array([[0, -1.5, 0.1, 3], [2.0, 0, 0, -4], [0, 0.2, 3.0, 5], [0, 0, 0, 1.0]])
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = write_volume(tmp_path / "x.nii.gz", values, Grid((2, 3, 4), tilted), "test")
    again = nib.load(path)
    assert np.abs(again.affine - tilted).max() < 1e-4
    assert np.array_equal(np.asarray(again.dataobj), values)


@pytest.fixture
def copied(masked_dir, tmp_path):  # noqa: F811
    """The masked cohort with one patient only, to be spoilt."""
    cohort = read_cohort(masked_dir / SEGMENTATION)
    record_id = cohort.records[0].record_id
    folder = tmp_path / "patients" / record_id
    shutil.copytree(masked_dir / "patients" / record_id, folder)
    for name in (SEGMENTATION, "splits.csv"):
        shutil.copy(masked_dir / name, tmp_path)
    (tmp_path / "labels.csv").write_text(f"patient_id\n{record_id}\n")
    return tmp_path, folder


def edited(folder, change):
    path = folder / "seg.nii.gz"
    image = nib.load(path)
    values, affine = change(np.asarray(image.dataobj).copy(), image.affine.copy())
    nib.save(nib.Nifti1Image(values, affine), path)


def test_a_mask_is_read_onto_the_grid_of_the_scans(copied):
    root, folder = copied
    cohort = read_cohort(root / SEGMENTATION)
    assert cohort.task == Segmentation("seg.nii.gz", ("WT", "TC", "ET"), BRATS)
    record = read_known(cohort.records[0], cohort)
    stored = np.asarray(nib.load(folder / "seg.nii.gz").dataobj)
    assert np.array_equal(record.mask.numpy(), stored) and stored.any()
    # Stored the other way round it is the same mask at the same places.
    edited(
        folder,
        lambda v, a: (
            v[::-1].copy(),
            a @ np.array([[-1, 0, 0, v.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
        ),
    )
    with pytest.raises(PatientDataError, match="does not lie on the grid"):
        read_known(cohort.records[0], cohort)
    (folder / "seg.nii.gz").unlink()
    assert read_known(cohort.records[0], cohort).mask is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda v, a: (v.astype(np.float32) * 0.3, a), "not whole"),
        (lambda v, a: (np.where(v > 0, 3, 0).astype(np.uint8), a), "does not describe"),
        (lambda v, a: (v[:-1], a), "does not lie on the grid"),
        (lambda v, a: (v, SHIFT @ a), "does not lie on the grid"),
    ],
)
def test_a_wrong_mask_is_refused(copied, change, text):
    root, folder = copied
    cohort = read_cohort(root / SEGMENTATION)
    edited(folder, change)
    with pytest.raises(PatientDataError, match=text):
        read_known(cohort.records[0], cohort)


def test_the_own_grid_is_that_of_the_first_scan_as_stored(copied):
    _, folder = copied
    image = nib.load(folder / "t1.nii.gz")
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    flip[0, 3] = image.shape[0] - 1
    values = np.asarray(image.dataobj)[::-1].transpose(1, 0, 2)
    turned = nib.Nifti1Image(values, image.affine @ flip @ np.eye(4)[:, [1, 0, 2, 3]])
    nib.save(turned, folder / "t1.nii.gz")
    specs = read_cohort(copied[0] / SEGMENTATION).specs
    record = read_patient(folder, specs)
    found = own_grid(record, specs)
    assert found.shape == turned.shape and np.allclose(found.affine, turned.affine)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"regions": {"TC": [1, 4], "WT": [1, 2, 4]}}, "outer ones first"),
        ({"regions": {"WT": [1, 2, 4], "ET": [4]}}, "no later region has"),
        ({"regions": {"A": [1, 2], "B": [2, 4]}}, "lie within each other"),
        ({"regions": {"A": [3]}}, "must list some of the labels"),
        ({"labels": []}, "needs the key labels"),
        ({"classes": ["a", "b"]}, "has no key classes"),
        ({"file": "../seg.nii.gz"}, "inside the patient directory"),
        ({"file": "seg.png"}, "must be NIfTI"),
    ],
)
def test_a_wrong_task_is_refused(masked_dir, tmp_path, change, text):  # noqa: F811
    described = yaml.safe_load((masked_dir / SEGMENTATION).read_text())
    described["task"] |= change
    (tmp_path / "cohort.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    with pytest.raises(ConfigError, match=text):
        read_cohort(tmp_path)


def test_scans_of_a_segmentation_share_one_grid(masked_dir, tmp_path):  # noqa: F811
    described = yaml.safe_load((masked_dir / SEGMENTATION).read_text())
    described["modalities"]["t2"]["size"] = [16, 16, 17]
    (tmp_path / "cohort.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    with pytest.raises(ConfigError, match="on one grid"):
        read_cohort(tmp_path)


def test_a_file_may_be_named_after_its_folder(copied):
    root, folder = copied
    path = root / SEGMENTATION
    path.write_text(
        path.read_text().replace("file: ", 'file: "{record}_').replace(".gz\n", '.gz"\n')
    )
    for file in folder.glob("*.nii.gz"):
        file.rename(folder / f"{folder.name}_{file.name}")
    cohort = read_cohort(path)
    record = read_known(cohort.records[0], cohort)
    assert len(record.modalities) == 4 and record.mask is not None
    # A name with dots: scans that are absent are missing, whatever the others are called.
    dotted = folder.with_name("case.01.b")
    folder.rename(dotted)
    for file in dotted.glob("*.nii.gz"):
        file.rename(dotted / file.name.replace(folder.name, dotted.name))
    (dotted / f"{dotted.name}_t2.nii.gz").unlink()
    assert set(read_patient(dotted, cohort.specs).modalities) == {"t1", "t1ce", "flair"}
    (dotted / f"{dotted.name}_t1.nii.gz").rename(dotted / f"{dotted.name}_T1.nii.gz")
    with pytest.raises(PatientDataError, match="capital"):
        read_patient(dotted, cohort.specs)
    (dotted / f"{dotted.name}_T1.nii.gz").rename(dotted / f"{dotted.name}_t1.mgz")
    with pytest.raises(PatientDataError, match="format is not read"):
        read_patient(dotted, cohort.specs)


def test_check_counts_masks(masked_dir, tmp_path):  # noqa: F811
    root = shutil.copytree(masked_dir, tmp_path / "cohort")
    whole = check(root / SEGMENTATION)
    assert all(row.labelled for row in whole.rows)
    assert not any("without mask" in note.what for note in whole.notes)
    entry = read_cohort(root / SEGMENTATION).records[0]
    (entry.folder / "seg.nii.gz").unlink()
    report = check(root / SEGMENTATION)
    assert [row.record_id for row in report.rows if not row.labelled] == [entry.record_id]
    [note] = [note for note in report.notes if "without mask" in note.what]
    assert note.got == f"1: {entry.record_id}"
