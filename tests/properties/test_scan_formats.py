"""One scan in every format reads to the same voxels at the same world positions."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from dymo_med.modalities.scan import apart_mm
from dymo_med.modalities.transforms import FIELD, KEY, LoadScand
from tests.dicom_files import enhanced, lps, series

SHAPE = (7, 6, 5)
SLOPE, INTERCEPT = 0.37, -12.5
CODES = [
    "".join(signs)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for signs in itertools.product(*order)
]  # all 48
NRRD = """NRRD0004
type: float
dimension: 3
space: {space}
sizes: {sizes}
space directions: {directions}
kinds: domain domain domain
endian: little
encoding: raw
space origin: {origin}

"""


def affine_of(codes, tilt, shear):
    """Return an affine with these axis codes, turned, and with slices shifted sideways."""
    axes = np.zeros((3, 3))
    for voxel_axis, (axis, flip) in enumerate(nib.orientations.axcodes2ornt(codes)):
        axes[int(axis), voxel_axis] = flip
    turn = Rotation.from_euler("xyz", [tilt, tilt / 2, -tilt / 3], degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ axes @ np.diag((0.9, 1.3, 2.6))
    affine[:3, 2] += shear * affine[:3, 1]
    affine[:3, 3] = (12.3, -45.6, 78.9)
    return affine


def write_nrrd(path, values, affine, space="left-posterior-superior"):
    """Write NRRD by hand: unlike SimpleITK, in any space and with a shear."""
    flip = {"right": 1.0, "left": -1.0, "anterior": 1.0, "posterior": -1.0, "superior": 1.0}
    world = np.diag([*(flip[word] for word in space.split("-")), 1.0]) @ affine

    def vector(column):
        return "(" + ",".join(f"{x:.12g}" for x in world[:3, column]) + ")"

    text = NRRD.format(
        space=space,
        sizes=" ".join(map(str, values.shape)),
        directions=" ".join(vector(a) for a in range(3)),
        origin=vector(3),
    )
    path.write_bytes(text.encode() + values.astype("<f4").tobytes(order="F"))


def write_itk(path, values, affine):
    matrix = lps(affine)
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    image = sitk.GetImageFromArray(values.T.astype(np.float32))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((matrix[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(matrix[:3, 3].tolist())
    sitk.WriteImage(image, path)


def canonical(path):
    """Return values `(X, Y, Z)` and affine as read, axes turned towards RAS+."""
    data = LoadScand(1)({KEY: str(path)})
    field = data[FIELD]
    image = nib.Nifti1Image(data[KEY].as_tensor()[0].numpy(), np.asarray(field.affine))
    image = nib.as_closest_canonical(image)
    return image.get_fdata(), image.affine


@pytest.fixture(scope="module")
def stored():
    return np.random.default_rng(0).integers(0, 4000, SHAPE).astype(np.uint16)


def same(path, values, affine):
    got, where = canonical(path)
    assert apart_mm(where, affine, values.shape) < 0.01
    assert np.abs(got - values).max() <= 1e-3 * np.ptp(values)


@pytest.mark.parametrize("shear", [0.0, 0.4])
@pytest.mark.parametrize("codes", CODES)
def test_every_format_gives_the_same_scan(tmp_path, stored, codes, shear):
    tilt = 17.0 if codes[0] in "RAS" else 0.0
    affine = affine_of(codes, tilt, shear)
    values = (stored * SLOPE + INTERCEPT).astype(np.float32)
    truth = nib.as_closest_canonical(nib.Nifti1Image(values, affine))
    truth = truth.get_fdata(), truth.affine

    nib.save(nib.Nifti1Image(values, affine), tmp_path / "a.nii")
    write_nrrd(tmp_path / "a.nrrd", values, affine)
    series(tmp_path / "classic", stored, affine, rescale=(SLOPE, INTERCEPT), order=[3, 0, 4, 1, 2])
    enhanced(tmp_path / "a.dcm", stored, affine, rescale=(SLOPE, INTERCEPT), order=[4, 0, 3, 1, 2])
    names = ["a.nii", "a.nrrd", "classic", "a.dcm"]
    if not shear:  # MetaImage, and NIfTI's qform, hold right angles only
        write_itk(tmp_path / "a.mha", values, affine)
        names.append("a.mha")
    for name in names:
        same(tmp_path / name, *truth)


@pytest.mark.parametrize(
    "space", ["right-anterior-superior", "left-anterior-superior", "left-posterior-superior"]
)
def test_the_space_of_nrrd_is_heeded(tmp_path, stored, space):
    affine = affine_of("PSR", 10.0, 0.0)
    write_nrrd(tmp_path / "a.nrrd", stored, affine, space)
    truth = nib.as_closest_canonical(nib.Nifti1Image(stored, affine))
    same(tmp_path / "a.nrrd", truth.get_fdata(), truth.affine)


def test_another_reader_of_functional_groups_agrees(tmp_path, stored):
    highdicom = pytest.importorskip("highdicom")
    affine = affine_of("LSA", 17.0, 0.0)
    enhanced(tmp_path / "a.dcm", stored, affine, order=[4, 0, 3, 1, 2])
    volume = highdicom.imread(tmp_path / "a.dcm").get_volume()
    image = nib.Nifti1Image(volume.array.astype(float), lps(volume.affine))
    truth = nib.as_closest_canonical(image)
    same(tmp_path / "a.dcm", truth.get_fdata(), truth.affine)
