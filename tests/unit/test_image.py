import gzip
import itertools
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image as Picture
from scipy.spatial.transform import Rotation

from dymo_med.errors import PatientDataError
from dymo_med.modalities import modality
from dymo_med.modalities.image import Image, ImageEntry
from dymo_med.types import ModalitySpec
from tests.conftest import shared_data

VOLUME = ModalitySpec("t1", "image", "t1.nii.gz", (1, 24, 26, 28), (2.0, 2.0, 2.0), "none")
FILM = ModalitySpec("film", "image", "film.png", (1, 32, 32), (), "none")


def with_(spec, **changes):
    return ModalitySpec(**{**spec.__dict__, **changes})


def affine_of(codes, spacing, centre, shape, tilt=0.0):
    """Return an affine with these axis codes whose field of view is centred at `centre`."""
    axes = np.zeros((3, 3))
    for voxel_axis, (axis, flip) in enumerate(nib.orientations.axcodes2ornt(codes)):
        axes[int(axis), voxel_axis] = flip
    turn = Rotation.from_euler("xyz", [tilt, tilt / 2, -tilt / 3], degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ axes @ np.diag(spacing)
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def world_of(affine, shape):
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    affine = np.asarray(affine)
    return grid @ affine[:3, :3].T + affine[:3, 3]


def bright_spot(affine, shape, world, width_mm=4.0):
    squared = ((world_of(affine, shape) - world) ** 2).sum(-1)
    return np.exp(-squared / 2 / width_mm**2).astype(np.float32)


def spot_position(value):
    """Return the centre of mass in world coordinates of a preprocessed bright spot."""
    weight = value.values[0].numpy().astype(float).clip(0) ** 2
    world = world_of(value.source.affine, weight.shape)
    return (world * weight[..., None]).reshape(-1, 3).sum(0) / weight.sum()


CODES = [
    "".join(signs)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for signs in itertools.product(*order)
]  # all 48


@pytest.mark.parametrize("tilt", [0.0, 25.0])
@pytest.mark.parametrize("codes", CODES)
def test_a_bright_spot_stays_at_its_world_coordinate(tmp_path, codes, tilt):
    shape, centre = (44, 32, 16), np.array([10.0, -20.0, 33.0])
    affine = affine_of(codes, (1.0, 1.5, 3.0), centre, shape, tilt)
    spot = centre + np.array([7.3, -6.1, 5.2])
    nib.save(nib.Nifti1Image(bright_spot(affine, shape, spot), affine), tmp_path / "t1.nii.gz")

    value = modality(VOLUME).read(tmp_path, "Patient x")

    assert value.values.shape == VOLUME.shape
    assert value.values.dtype == torch.float32
    assert np.abs(spot_position(value) - spot).max() < 0.05
    grid = np.asarray(value.source.affine)
    assert np.allclose(grid[:3, :3], np.diag(VOLUME.spacing_mm))
    middle = grid[:3, :3] @ ((np.array(VOLUME.shape[1:]) - 1) / 2) + grid[:3, 3]
    assert np.allclose(middle, centre, atol=1e-4)


@pytest.mark.parametrize("extension", [".nrrd", ".mha", ".nii"])
def test_other_formats_agree_with_nifti(tmp_path, extension):
    shape = (20, 24, 18)
    affine = affine_of("LPS", (2.0, 1.0, 2.5), (3.0, 4.0, 5.0), shape, tilt=10)
    scan = bright_spot(affine, shape, np.array([8.0, 1.0, 9.0]))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    nib.save(nib.Nifti1Image(scan, affine), tmp_path / "a" / "t1.nii.gz")
    if extension == ".nii":
        nib.save(nib.Nifti1Image(scan, affine), tmp_path / "b" / "t1.nii")
    else:
        sitk.WriteImage(
            sitk.ReadImage(tmp_path / "a" / "t1.nii.gz"), tmp_path / "b" / f"t1{extension}"
        )
    kind = modality(VOLUME)
    a, b = (kind.read(tmp_path / folder, "Patient x") for folder in ("a", "b"))
    assert torch.allclose(a.values, b.values, atol=1e-4)
    assert np.allclose(a.source.affine, b.source.affine, atol=1e-3)
    assert b.source.file == f"t1{extension}"
    assert a.source.facts["size"] == "20 x 24 x 18"
    assert a.source.facts["spacing"] == "2 x 1 x 2.5 mm"


def test_micrometres_are_read_as_such(tmp_path):
    affine = affine_of("RAS", (2000.0, 2000.0, 2000.0), (0, 0, 0), (12, 12, 12))
    image = nib.Nifti1Image(bright_spot(affine, (12, 12, 12), 0, 4000.0), affine)
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "t1.nii.gz")
    value = modality(VOLUME).read(tmp_path, "Patient x")
    assert value.source.facts["spacing"] == "2 x 2 x 2 mm"


def test_an_unstated_orientation_is_a_warning(tmp_path):
    image = nib.Nifti1Image(np.random.rand(12, 12, 12).astype(np.float32), None)
    nib.save(image, tmp_path / "t1.nii.gz")
    assert "orientation" in modality(VOLUME).read(tmp_path, "Patient x").warnings[0]


@pytest.mark.parametrize("intensity", ["zscore", "percentile", "none"])
def test_a_scan_that_vanishes_on_the_grid_is_an_error(tmp_path, intensity):
    array = np.zeros((200, 30, 30), np.float32)
    array[:20] = np.arange(30)  # all of it lies beyond the grid
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2, 2, 1])), tmp_path / "t1.nii.gz")
    with pytest.raises(PatientDataError, match="nothing of the scan is left"):
        modality(with_(VOLUME, intensity=intensity)).read(tmp_path, "Patient p")


@pytest.mark.parametrize(("spacing_mm", "warned"), [(2.0, False), (0.7, True), (5.0, True)])
def test_a_field_of_view_unlike_the_grid_is_a_warning(tmp_path, spacing_mm, warned):
    array = np.random.default_rng(0).random((24, 26, 28)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, np.diag([spacing_mm] * 3 + [1.0])), tmp_path / "t1.nii.gz")
    warnings = modality(VOLUME).read(tmp_path, "Patient p").warnings
    assert len(warnings) == warned
    assert all("the model looks at 48 x 52 x 56 mm" in w for w in warnings)


def test_coarsening_averages_instead_of_skipping(tmp_path):
    noise = np.random.default_rng(0).normal(100, 10, (48, 48, 48)).astype(np.float32)
    nib.save(nib.Nifti1Image(noise, np.eye(4)), tmp_path / "t1.nii.gz")
    spec = with_(VOLUME, shape=(1, 10, 10, 10), spacing_mm=(4.0, 4.0, 4.0))
    assert modality(spec).read(tmp_path, "Patient x").values.std() < 3


def test_zscore_keeps_the_background_at_zero(tmp_path):
    scan = np.zeros((24, 24, 24), np.float32)
    scan[6:18, 6:18, 6:18] = np.random.default_rng(0).normal(500, 50, (12, 12, 12))
    nib.save(nib.Nifti1Image(scan, np.eye(4)), tmp_path / "t1.nii.gz")
    spec = with_(VOLUME, shape=(1, 24, 24, 24), spacing_mm=(1.0,) * 3, intensity="zscore")
    values = modality(spec).read(tmp_path, "Patient x").values
    inside = values[values != 0]
    assert values[0, 0, 0, 0] == 0
    assert inside.mean().abs() < 1e-5
    assert inside.std(correction=0) == pytest.approx(1, abs=1e-4)
    assert len(inside) == 12**3


def test_percentile_gives_zero_to_one_whatever_the_padding(tmp_path):
    scan = np.linspace(-500, 900, 20**3, dtype=np.float32).reshape(20, 20, 20)
    nib.save(nib.Nifti1Image(scan, np.eye(4)), tmp_path / "t1.nii.gz")
    wide = with_(VOLUME, shape=(1, 40, 40, 40), spacing_mm=(1.0,) * 3, intensity="percentile")
    tight = with_(wide, shape=(1, 20, 20, 20))
    a = modality(wide).read(tmp_path, "Patient x").values
    b = modality(tight).read(tmp_path, "Patient x").values
    assert a.min() == 0 and a.max() == 1
    assert torch.allclose(a[:, 10:30, 10:30, 10:30], b, atol=1e-5)


def test_without_intensity_rule_the_padding_is_the_minimum(tmp_path):
    scan = np.full((16, 16, 16), -1000, np.int16)
    scan[4:12, 4:12, 4:12] = 40
    nib.save(nib.Nifti1Image(scan, np.eye(4) * [2, 2, 2, 1]), tmp_path / "t1.nii.gz")
    assert modality(VOLUME).read(tmp_path, "Patient x").values[0, 0, 0, 0] == -1000


# -- finding the file ------------------------------------------------------------------------------


def save_volume(path, shape=(12, 12, 12)):
    scan = np.random.default_rng(1).random(shape).astype(np.float32)
    nib.save(nib.Nifti1Image(scan, np.eye(4)), path)


def test_no_file_is_missing(tmp_path):
    assert modality(VOLUME).read(tmp_path, "Patient x") is None


def test_the_declared_name_wins_and_others_are_found(tmp_path):
    save_volume(tmp_path / "t1.nii")
    assert modality(VOLUME).read(tmp_path, "Patient x").source.file == "t1.nii"
    save_volume(tmp_path / "t1.nii.gz")
    assert modality(VOLUME).read(tmp_path, "Patient x").source.file == "t1.nii.gz"


def test_a_longer_name_is_another_file(tmp_path):
    save_volume(tmp_path / "t1_old.nii.gz")
    assert modality(VOLUME).read(tmp_path, "Patient x") is None


def test_several_candidates_are_named(tmp_path):
    save_volume(tmp_path / "t1.nii")
    (tmp_path / "t1.nrrd").write_bytes(b"NRRD0004\n")
    with pytest.raises(PatientDataError, match=r"t1\.nii, t1\.nrrd"):
        modality(VOLUME).read(tmp_path, "Patient x")


def write_dicom_series(folder, uid, slices=8, skip=(), drift_mm=0.0):
    """Write a series of 2 x 1.5 x 3 mm whose voxels rise with the slice number."""
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(slices):
        if k in skip:
            continue
        array = np.full((1, 12, 10), 100 * k, np.int16)
        array[0, :6] += 7
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((2.0, 1.5, 3.0))
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.4",
            "0008|0018": f"{uid}.{k + 1}",
            "0008|0060": "MR",
            "0020|000d": "1.2.3.4",
            "0020|000e": uid,
            "0020|0013": str(k + 1),
            "0020|0032": f"5\\{6 + drift_mm * k}\\{3 * k}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0018|0050": "3",
            "0010|0010": "Doe^Jane",
            "0010|0020": "SECRET-ID",
        }
        for tag, text in tags.items():
            image.SetMetaData(tag, text)
        image.SetOrigin((5.0, 6.0 + drift_mm * k, 3.0 * k))
        writer.SetFileName(str(folder / f"{uid}_{k:02d}.dcm"))
        writer.Execute(image)


def test_a_dicom_series_is_read_with_its_geometry(tmp_path):
    write_dicom_series(tmp_path / "t1", "1.2.3.4.5")
    value = modality(VOLUME).read(tmp_path, "Patient x")
    assert value.source.file == "t1"
    assert value.source.facts["size"] == "10 x 12 x 8"
    assert value.source.facts["spacing"] == "2 x 1.5 x 3 mm"
    # LPS (5, 6, 0) is the first voxel; RAS mirrors x and y.
    centre = np.array([-(5 + 9), -(6 + 1.5 * 5.5), 10.5])
    grid = np.asarray(value.source.affine)
    middle = grid[:3, :3] @ ((np.array(VOLUME.shape[1:]) - 1) / 2) + grid[:3, 3]
    assert np.allclose(middle, centre, atol=1e-4)
    profile = value.values[0, 12, 13]
    assert profile[-9] > profile[10] + 100  # rises along +S
    assert "SECRET" not in repr(value) and "Doe" not in repr(value)


def test_two_series_or_none_in_a_folder_are_an_error(tmp_path):
    write_dicom_series(tmp_path / "t1", "1.2.3.4.5")
    write_dicom_series(tmp_path / "t1", "1.2.3.4.6")
    with pytest.raises(PatientDataError, match="2 stacks of slices"):
        modality(VOLUME).read(tmp_path, "Patient x")
    (tmp_path / "t2").mkdir()
    with pytest.raises(PatientDataError, match=r"no DICOM image in .*empty folder"):
        modality(with_(VOLUME, name="t2", file="t2.nii.gz")).read(tmp_path, "Patient x")


def test_a_missing_slice_is_an_error(tmp_path):
    write_dicom_series(tmp_path / "t1", "1.2.3.4.5", skip=(3,))
    with pytest.raises(PatientDataError, match=r"slices .* are missing.*1 missing"):
        modality(VOLUME).read(tmp_path, "Patient x")


def test_a_tilted_gantry_is_straightened(tmp_path):
    write_dicom_series(tmp_path / "t1", "1.2.3.4.5", drift_mm=0.8)
    field = modality(VOLUME).read(tmp_path, "Patient x").field_of_view
    assert np.allclose(np.asarray(field.affine)[:3, 2], (0, -0.8, 3))


# -- what is wrong with a file ---------------------------------------------------------------------


def truncated_gz(path):
    save_volume(path, (40, 40, 40))
    path.write_bytes(path.read_bytes()[:-30000])


def truncated_plain(path):
    save_volume(path.with_name("full.nii"))
    path.write_bytes(gzip.compress(path.with_name("full.nii").read_bytes()[:2000]))
    path.with_name("full.nii").unlink()


def huge(path):
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4))
    content = bytearray(image.to_bytes())
    content[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(content)))


def broken_affine(path):
    image = nib.Nifti1Image(np.random.rand(12, 12, 12).astype(np.float32), None)
    image.header["pixdim"][1] = 0
    image.header["sform_code"] = 1
    image.header["srow_x"] = [0, 0, 0, 1]
    image.header["srow_y"] = [0, 1, 0, 1]
    image.header["srow_z"] = [0, 0, 1, 1]
    path.write_bytes(gzip.compress(bytes(image.header.binaryblock) + b"\0" * 4 + bytes(12**3 * 4)))


def saved(array):
    return lambda path: nib.save(nib.Nifti1Image(array, np.eye(4)), path)


with_nan = np.random.rand(12, 12, 12).astype(np.float32)
with_nan[3, 4, 5] = np.nan

BROKEN = {
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "cut short, compressed": (truncated_gz, "damaged, cut short"),
    "cut short, plain": (truncated_plain, "damaged, cut short"),
    "text": (lambda path: path.write_text("hello"), "damaged, cut short"),
    "text in gzip": (lambda path: path.write_bytes(gzip.compress(b"hello")), "damaged, cut short"),
    "another format": (
        lambda path: Picture.new("L", (20, 20)).save(path, format="PNG"),
        r"it is a PNG picture.*Rename it, so that its name ends in \.png",
    ),
    "absurd size": (huge, "size that cannot be right"),
    "four axes": (saved(np.random.rand(9, 9, 9, 2).astype(np.float32)), r"4 axes.*\(9, 9, 9, 2\)"),
    "one slice": (saved(np.random.rand(12, 12, 1).astype(np.float32)), "single slice"),
    "not a number": (saved(with_nan), "1 voxels that are NaN"),
    "constant": (saved(np.full((9, 9, 9), 7, np.float32)), "every voxel has the same value"),
    "no volume": (broken_affine, "voxel has no volume|damaged"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_volume_is_an_error_that_names_the_file(tmp_path, name):
    break_it, message = BROKEN[name]
    break_it(tmp_path / "t1.nii.gz")
    with pytest.raises(PatientDataError, match=message) as caught:
        modality(VOLUME).read(tmp_path, "Patient p017")
    [problem] = caught.value.problems
    assert problem.where == "Patient p017: t1.nii.gz"
    assert problem.remedy
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("extension", [".nrrd", ".mha", ".png", ".tif"])
def test_broken_files_of_other_formats(tmp_path, extension):
    start = {".nrrd": b"NRRD0004\n", ".mha": b"ObjectType = Image\n", ".tif": b"II*\0"}
    start = start.get(extension, b"\x89PNG\r\n\x1a\n")
    (tmp_path / f"t1{extension}").write_bytes(start + b"nothing here")
    with pytest.raises(PatientDataError, match="damaged"):
        modality(VOLUME).read(tmp_path, "Patient x")


def test_colour_and_trailing_axes(tmp_path):
    colour = np.zeros((9, 9, 9), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nib.save(nib.Nifti1Image(colour, np.eye(4)), tmp_path / "t1.nii.gz")
    with pytest.raises(PatientDataError, match="colours"):
        modality(VOLUME).read(tmp_path, "Patient x")
    save_volume(tmp_path / "t1.nii.gz", (9, 9, 9, 1))
    assert modality(VOLUME).read(tmp_path, "Patient x").values.shape == VOLUME.shape


def test_zscore_of_a_mask_is_refused(tmp_path):
    mask = np.zeros((20, 20), np.uint8)
    mask[5:9, 5:9] = 255
    Picture.fromarray(mask).save(tmp_path / "film.png")
    with pytest.raises(PatientDataError, match="intensity: percentile"):
        modality(with_(FILM, intensity="zscore")).read(tmp_path, "Patient x")


# -- pictures --------------------------------------------------------------------------------------


def film_array():
    """Rows 0..15 dark with a bright upper left corner; wider than high."""
    array = np.zeros((16, 32), np.uint8)
    array[0:4, 0:8] = 200
    array[12:, 28:] = 90
    return array


def test_a_picture_has_its_rows_downwards(tmp_path):
    Picture.fromarray(film_array()).save(tmp_path / "film.png")
    values = modality(FILM).read(tmp_path, "Patient x").values
    assert values.shape == (1, 32, 32)
    assert torch.equal(values[0, 8:24].to(torch.uint8), torch.from_numpy(film_array()))
    assert (values[0, :8] == 0).all() and (values[0, 24:] == 0).all()  # padded, not stretched


@pytest.mark.parametrize("extension", [".jpg", ".jpeg", ".tif", ".tiff", ".PNG"])
def test_picture_formats(tmp_path, extension):
    Picture.fromarray(film_array()).save(tmp_path / f"film{extension}")
    value = modality(FILM).read(tmp_path, "Patient x")
    assert (value.values[0, 8:24] - torch.from_numpy(film_array())).abs().max() < 25
    assert value.source.affine is None
    assert value.source.facts["size"] == "32 x 16"


def test_colour_becomes_luminance_or_stays(tmp_path):
    colour = np.zeros((32, 32, 3), np.uint8)
    colour[:16] = (255, 0, 0)
    colour[16:] = (0, 255, 0)
    Picture.fromarray(colour).save(tmp_path / "film.png")
    grey = modality(FILM).read(tmp_path, "Patient x").values
    assert grey[0, 0, 0] == pytest.approx(76, abs=1) and grey[0, 31, 0] == pytest.approx(150, abs=1)
    kept = modality(with_(FILM, shape=(3, 32, 32))).read(tmp_path, "Patient x").values
    assert torch.equal(kept.permute(1, 2, 0).to(torch.uint8), torch.from_numpy(colour))


def test_sixteen_bit_pictures_are_not_clipped(tmp_path):
    array = (film_array().astype(np.uint16)) * 300
    Picture.fromarray(array).save(tmp_path / "film.png")
    assert modality(FILM).read(tmp_path, "Patient x").values.max() == 60000


def test_several_pages_are_an_error(tmp_path):
    page = Picture.fromarray(film_array())
    page.save(tmp_path / "film.tif", save_all=True, append_images=[page])
    with pytest.raises(PatientDataError, match="2 pictures"):
        modality(FILM).read(tmp_path, "Patient x")


@pytest.mark.parametrize("codes", ["LIA", "RIA", "LSA", "RSP"])
def test_a_coronal_slice_is_shown_as_a_viewer_would(tmp_path, codes):
    screen = film_array()  # columns to the patient's left, rows downwards
    columns = screen[:, ::-1] if codes[0] == "R" else screen
    rows = columns[::-1] if codes[1] == "S" else columns
    stored = np.ascontiguousarray(rows.T[:, :, None])
    affine = affine_of(codes, (1.5, 1.5, 1.5), (0, 0, 0), stored.shape)
    nib.save(nib.Nifti1Image(stored, affine), tmp_path / "film.nii.gz")
    values = modality(FILM).read(tmp_path, "Patient x").values
    assert torch.equal(values[0, 8:24].to(torch.uint8), torch.from_numpy(screen))


def test_pixel_size_is_honoured_where_declared(tmp_path):
    stored = np.ascontiguousarray(film_array().T[:, :, None])
    affine = affine_of("LIA", (2.0, 2.0, 2.0), (0, 0, 0), stored.shape)
    nib.save(nib.Nifti1Image(stored, affine), tmp_path / "film.nii.gz")
    spec = with_(FILM, shape=(1, 20, 40), spacing_mm=(2.0, 2.0))
    values = modality(spec).read(tmp_path, "Patient x").values
    assert torch.equal(values[0, 2:18, 4:36].to(torch.uint8), torch.from_numpy(film_array()))
    Picture.fromarray(film_array()).save(tmp_path / "film.png")
    with pytest.raises(PatientDataError, match="no pixel size"):
        modality(spec).read(tmp_path, "Patient x")


def test_a_volume_is_not_a_picture(tmp_path):
    save_volume(tmp_path / "film.nii.gz")
    with pytest.raises(PatientDataError, match="the image is a volume"):
        modality(FILM).read(tmp_path, "Patient x")


@pytest.mark.shared
@pytest.mark.parametrize("name", ["cxr_frontal", "cxr_lateral", "ct"])
def test_a_film_as_nifti_equals_its_picture(tmp_path, name):
    images = shared_data("covid-cxr", "images")
    spec = with_(FILM, name=name, file=f"{name}.png", intensity="zscore")
    pairs = sorted(images.glob(f"*/{name}.nii.gz"))[:3]
    assert pairs
    for nifti in pairs:
        a = modality(spec).read(nifti.parent, "Patient x").values
        b = modality(with_(spec, file=f"{name}.nii.gz")).read(nifti.parent, "Patient x").values
        assert torch.allclose(a, b, atol=1e-3)


@pytest.mark.shared
@pytest.mark.parametrize("study", ["hippocrop_study1", "studyforrest_t1_pddl_40of384"])
def test_real_dicom_keeps_its_extent(study):
    folder = shared_data("dicom", study)
    spec = with_(VOLUME, file=folder.name)
    value = modality(spec).read(folder.parent, "Patient x")
    assert value.source.facts["size"] in {"35 x 51 x 32", "274 x 384 x 40"}


# -- writing ---------------------------------------------------------------------------------------


def test_a_recovered_volume_is_marked_and_keeps_its_grid(tmp_path):
    save_volume(tmp_path / "t1.nii.gz")
    kind = modality(VOLUME)
    value = kind.read(tmp_path, "Patient x")
    path = kind.write(tmp_path, value.values, None, value.source.affine)
    assert path.name == "t1_synthetic.nii.gz"
    image = nib.load(path)
    assert b"SYNTHETIC" in image.header["descrip"].tobytes()
    assert np.allclose(image.affine, value.source.affine)
    assert np.array_equal(image.get_fdata(dtype=np.float32), value.values[0].numpy())
    first = path.read_bytes()
    kind.write(tmp_path, value.values, None, value.source.affine)
    assert path.read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t1.nii.gz", "t1_synthetic.nii.gz"]


def test_without_an_affine_the_grid_is_centred_on_the_origin(tmp_path):
    path = modality(VOLUME).write(tmp_path, torch.rand(VOLUME.shape), None, None)
    image = nib.load(path)
    middle = image.affine @ [*((np.array(image.shape) - 1) / 2), 1]
    assert np.allclose(middle[:3], 0)


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 32, 40), (1, 8, 8), (1, 12, 200)])
def test_a_recovered_picture_is_marked_in_its_pixels(tmp_path, shape):
    kind = modality(with_(FILM, shape=shape))
    path = kind.write(tmp_path, torch.rand(shape), None, None)
    assert path.name == "film_synthetic.png"
    marked = np.asarray(Picture.open(path)).copy()
    text = Picture.open(path).text
    assert "SYNTHETIC" in text["Description"]
    assert marked.shape[1] >= 56  # wide enough for the mark
    assert marked.shape[0] / marked.shape[1] == pytest.approx(shape[1] / shape[2])
    flat = torch.zeros(shape)
    flat[..., -1, -1] = 1
    path = kind.write(tmp_path, flat, None, None)
    assert (np.asarray(Picture.open(path))[:12] > 180).sum() > 30


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [VOLUME, FILM])
def test_networks_fit_the_shape(spec):
    kind = modality(spec)
    values = torch.rand(3, *spec.shape)
    tokens = kind.encoder(8, {"width": 4, "grid": 2})(values, None)
    assert tokens.values.shape == (3, 2 ** (len(spec.shape) - 1), 8)
    parameters = kind.decoder(5, {"width": 4})(torch.rand(3, 5))
    assert kind.mean(parameters).shape == values.shape
    assert kind.log_likelihood(parameters, values, None).shape == (3,)
    fitted = kind.fit(values, None)
    assert fitted.descriptors is not None and replace(fitted, descriptors=None) == spec


def test_the_likelihood_is_gaussian():
    kind = modality(with_(FILM, shape=(1, 8, 8)))
    location, value = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    expected = torch.distributions.Normal(location, 0.5).log_prob(value).sum((1, 2, 3))
    assert torch.allclose(kind.log_likelihood(location, value, None), expected)


GOOD = {"kind": "image", "dims": 3, "file": "a.nii", "size": [8, 8, 8], "spacing_mm": [1, 1, 1]}


@pytest.mark.parametrize(
    "change",
    [
        {"size": [8, 8]},
        {"size": [7, 8, 8]},
        {"size": [8, 8, 1000]},
        {"spacing_mm": None},
        {"spacing_mm": [1, 1]},
        {"spacing_mm": [1, 1, 0]},
        {"file": "../a.nii"},
        {"file": "/a.nii"},
        {"file": " "},
        {"dims": 4},
        {"channels": 3},
        {"intensity": "minmax"},
        {"colour": "red"},
    ],
)
def test_wrong_entries_are_refused(change):
    ImageEntry.model_validate(GOOD)
    with pytest.raises(ValueError):
        ImageEntry.model_validate({**GOOD, **change})


def test_the_spec_says_all_that_reading_needs():
    spec = Image.spec_from_entry("x", ImageEntry.model_validate(GOOD))
    assert spec == ModalitySpec("x", "image", "a.nii", (1, 8, 8, 8), (1.0, 1.0, 1.0), "zscore")
    assert ModalitySpec.from_dict(spec.to_dict()) == spec
