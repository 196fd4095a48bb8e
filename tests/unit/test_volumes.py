"""NRRD, MetaImage and NIfTI: detached data, units, orientation, two geometries in one header."""

import gzip
import os

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from dymo_med.errors import PatientDataError
from dymo_med.modalities import modality, volumes
from dymo_med.modalities.complaints import complaints
from dymo_med.modalities.scan import ScanError
from dymo_med.types import ModalitySpec

VALUES = np.random.default_rng(0).integers(0, 900, (9, 8, 7)).astype(np.int16)
SPEC = ModalitySpec("t1", "image", "t1.nii.gz", (1, 12, 12, 12), (1.0, 1.0, 1.0), "none")
RAW = VALUES.tobytes(order="F")
SLICES = [VALUES[:, :, k].tobytes(order="F") for k in range(7)]


def nhdr(data, **more):
    fields = {
        "type": "short",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "9 8 7",
        "space directions": "(1,0,0) (0,1,0) (0,0,2)",
        "space origin": "(0,0,0)",
        "encoding": "raw",
        "endian": "little",
        **more,
        "data file": data,
    }
    lines = [f"{k}: {v}" for k, v in fields.items() if v is not None]
    return "NRRD0004\n" + "\n".join(lines) + "\n\n"


def mhd(data, **more):
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "0 0 0",
        "ElementSpacing": "1 1 2",
        "DimSize": "9 8 7",
        "ElementType": "MET_SHORT",
        **more,
        "ElementDataFile": data,
    }
    return "\n".join(f"{k} = {v}" for k, v in fields.items() if v is not None) + "\n"


SPACE = ("space", "space directions", "space origin")
KINDS = [("t1.nhdr", nhdr), ("t1.mhd", mhd)]


@pytest.mark.parametrize(("name", "header"), KINDS)
def test_detached_data_is_read_and_counts_for_the_hash(tmp_path, name, header):
    (tmp_path / name).write_text(header("t1.raw"))
    (tmp_path / "t1.raw").write_bytes(RAW)
    scan = volumes.read(tmp_path / name)
    assert np.array_equal(scan.values, VALUES)
    assert scan.files == (tmp_path / name, tmp_path / "t1.raw")
    assert np.allclose(scan.affine, np.diag([-1, -1, 2, 1]))
    assert scan.facts.warnings == ()


def test_lists_and_patterns_of_data_files(tmp_path):
    for k, content in enumerate(SLICES):
        (tmp_path / f"s{k}.raw").write_bytes(content)
    names = "\n".join(f"s{k}.raw" for k in range(7))
    (tmp_path / "a.nhdr").write_text(nhdr(f"LIST\n{names}").rstrip() + "\n")
    (tmp_path / "b.nhdr").write_text(nhdr("s%d.raw 0 6 1"))
    (tmp_path / "c.mhd").write_text(mhd("LIST") + names + "\n")
    (tmp_path / "d.mhd").write_text(mhd("s%d.raw 0 6 1"))
    for name in ("a.nhdr", "b.nhdr", "c.mhd", "d.mhd"):
        scan = volumes.read(tmp_path / name)
        assert np.array_equal(scan.values, VALUES) and len(scan.files) == 8
    (tmp_path / "s3.raw").unlink()
    for name in ("a.nhdr", "b.nhdr", "c.mhd", "d.mhd"):
        with pytest.raises(ScanError, match="data file is not there") as caught:
            volumes.read(tmp_path / name)
        assert caught.value.got == "1 of 7 files absent"


@pytest.mark.parametrize("data", ["../t1.raw", "/etc/passwd", "a/../../t1.raw", "C:\\t1.raw"])
@pytest.mark.parametrize(("name", "header"), [*KINDS, ("t1.nrrd", nhdr), ("t1.mha", mhd)])
def test_data_outside_the_folder_is_refused(tmp_path, name, header, data):
    folder = tmp_path / "p"
    (folder / "a").mkdir(parents=True)
    (tmp_path / "t1.raw").write_bytes(RAW)
    for text in (header(data), header(f"LIST\n{data}" if header is nhdr else "LIST") + data):
        (folder / name).write_text(text)
        with pytest.raises(ScanError, match="outside its folder"):
            volumes.read(folder / name)


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("t1.nrrd", "NIFTI", "not what its name says"),
        ("t1.nrrd", "NRRD0004\ntype: short\n", "damaged"),
        ("t1.mha", "ObjectType = Image\n", "damaged"),
        ("t1.nhdr", nhdr("t1.raw", sizes="90000 90000 90000"), "size that cannot be right"),
        ("t1.nhdr", nhdr("t1.raw", **{"space units": '"um" "um" "um"'}), "not in millimetres"),
        ("t1.mhd", mhd("t1.raw", DistanceUnits="um"), "not in millimetres"),
        ("t1.nhdr", nhdr("t1.raw", sizes="9 8 70"), "damaged"),
        ("t1.mhd", mhd("t1.raw", ElementNumberOfChannels="3", DimSize="3 8 7"), "colours"),
    ],
)
def test_each_error(tmp_path, name, text, what):
    (tmp_path / name).write_text(text)
    (tmp_path / "t1.raw").write_bytes(RAW)
    with pytest.raises(ScanError) as caught:
        volumes.read(tmp_path / name)
    assert what in caught.value.what and caught.value.remedy


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t1.nhdr", nhdr("t1.raw", **dict.fromkeys(SPACE), spacings="1 1 2")),
        ("t1.nhdr", nhdr("t1.raw", space="scanner-xyz")),
        ("t1.mhd", mhd("t1.raw", TransformMatrix=None)),
    ],
)
def test_an_unstated_orientation_is_a_warning(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    (tmp_path / "t1.raw").write_bytes(RAW)
    assert "does not state its orientation" in volumes.read(tmp_path / name).facts.warnings[0]


@pytest.mark.parametrize(
    ("name", "text", "stated"),
    [
        ("t1.mhd", mhd("t1.raw", ElementSpacing=None), False),
        ("t1.mhd", mhd("t1.raw", ElementSpacing=None, ElementSize="1 1 2"), True),
        ("t1.nhdr", nhdr("t1.raw"), True),
        ("t1.nhdr", nhdr("t1.raw", **{"space directions": "(1,0,0) (0,1,0) none"}), False),
        ("t1.nhdr", nhdr("t1.raw", **{"space directions": "(1,0,0) (0,1,0) (nan,nan,nan)"}), False),
        ("t1.nhdr", nhdr("t1.raw", **dict.fromkeys(SPACE)), False),
        ("t1.nhdr", nhdr("t1.raw", **dict.fromkeys(SPACE), spacings="1 1 nan"), False),
        ("t1.nhdr", nhdr("t1.raw", **dict.fromkeys(SPACE), spacings="1 1 2"), True),
        (
            "t1.nhdr",
            nhdr("t1.raw", **dict.fromkeys(SPACE), **{"axis mins": "0 0 0", "axis maxs": "9 8 14"}),
            False,
        ),
    ],
)
def test_a_voxel_size_that_is_not_stated_is_a_warning(tmp_path, name, text, stated):
    (tmp_path / name).write_text(text)
    (tmp_path / "t1.raw").write_bytes(RAW)
    facts = volumes.read(tmp_path / name).facts
    said = [w for w in facts.warnings if "does not state its voxel size; 1 mm was assumed" in w]
    assert len(said) == (not stated)
    assert facts.spacing_mm[2] == pytest.approx(2.0 if stated else 1.0)


@pytest.mark.parametrize("spelling", [str, str.upper, lambda s: s.replace("-", " ")])
@pytest.mark.parametrize(
    ("space", "with_time", "turns"),
    [
        ("right-anterior-superior", "right-anterior-superior-time", (1, 1)),
        ("left-anterior-superior", "left-anterior-superior-time", (-1, 1)),
        ("left-posterior-superior", "left-posterior-superior-time", (-1, -1)),
        ("RAS", "RAST", (1, 1)),
        ("LAS", "LAST", (-1, 1)),
        ("LPS", "LPST", (-1, -1)),
    ],
)
def test_a_nrrd_with_one_point_in_time_lies_where_the_volume_lies(
    tmp_path, space, with_time, turns, spelling
):
    (tmp_path / "t1.raw").write_bytes(RAW)
    volume = {"space": spelling(space), "space origin": "(10,20,30)"}
    (tmp_path / "a.nhdr").write_text(nhdr("t1.raw", **volume))
    times = {
        "dimension": "4",
        "sizes": "9 8 7 1",
        "space": spelling(with_time),
        "space directions": "(1,0,0,0) (0,1,0,0) (0,0,2,0) (0,0,0,3)",
        "space origin": "(10,20,30,0)",
    }
    (tmp_path / "b.nhdr").write_text(nhdr("t1.raw", **times))
    for name in ("a.nhdr", "b.nhdr"):
        scan = volumes.read(tmp_path / name)
        x, y = turns
        expected = [[x, 0, 0, 10 * x], [0, y, 0, 20 * y], [0, 0, 2, 30], [0, 0, 0, 1]]
        assert np.allclose(scan.affine, expected), name
        assert scan.facts.warnings == () and np.array_equal(scan.values, VALUES)


def test_a_slice_in_two_axes_stands_for_a_picture(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(VALUES[:, :, 0].T), tmp_path / "film.mha")
    spec = ModalitySpec("film", "image", "film.png", (1, 9, 9), (), "none")
    value = modality(spec).read(tmp_path, "Patient p")
    assert np.array_equal(value.values[0, :8].numpy(), VALUES[:, :, 0].T)
    assert value.warnings == ()


def test_a_unit_that_there_is_not(tmp_path):
    image = nib.Nifti1Image(VALUES, np.eye(4))
    image.header["xyzt_units"] = 7
    (tmp_path / "t1.nii").write_bytes(image.to_bytes())
    with pytest.raises(PatientDataError, match=r"unit that there is not.*code 7"):
        modality(SPEC).read(tmp_path, "Patient p")


def write_both(path, sform, qform, codes=(1, 1)):
    image = nib.Nifti1Image(VALUES, np.eye(4))
    image.set_sform(sform, codes[0])
    image.set_qform(qform, codes[1])
    nib.save(image, path)


def moved(mm):
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[0, 3] = mm
    return affine


def test_two_geometries_in_a_nifti_header(tmp_path):
    read = modality(SPEC).read
    path = tmp_path / "t1.nii.gz"
    write_both(path, moved(0), moved(0.09))  # within the tolerance
    assert read(tmp_path, "Patient p").warnings == ()
    write_both(path, moved(0), moved(0.5))
    with pytest.raises(PatientDataError, match=r"sform and qform.*within 0\.1 mm.*0\.5 mm apart"):
        read(tmp_path, "Patient p")
    # A small angle is millimetres at the corners: (9 - 1) * 0.05 = 0.4 mm
    turned = moved(0)
    turned[:2, :2] = [[np.cos(0.05), -np.sin(0.05)], [np.sin(0.05), np.cos(0.05)]]
    write_both(path, moved(0), turned)
    with pytest.raises(PatientDataError, match="sform and qform"):
        read(tmp_path, "Patient p")
    write_both(path, moved(0), moved(30), codes=(4, 1))  # registered: the sform is another space
    value = read(tmp_path, "Patient p")
    assert "30 mm apart at the corners; the sform was used" in value.warnings[0]
    assert value.field_of_view.affine[0][3] == 0
    image = nib.load(path)
    image.header["quatern_b"] = image.header["quatern_c"] = 0.9
    content = image.header.binaryblock + b"\0" * 4 + RAW
    path.write_bytes(gzip.compress(content))
    assert "qform is no rotation" in read(tmp_path, "Patient p").warnings[0]
    write_both(path, moved(5), moved(9), codes=(0, 1))
    assert read(tmp_path, "Patient p").field_of_view.affine[0][3] == 9


def test_what_a_library_prints_is_heard_and_the_rest_passed_on(capfd):
    with complaints() as heard:
        os.write(2, b"MetaImage: M_Read: data not read completely\n\x1b[2K 3 of 9 records\r")
        os.write(2, b"\nwarning: of our own\n")
    assert heard == ["MetaImage: M_Read: data not read completely"]
    assert capfd.readouterr().err == "\x1b[2K 3 of 9 records\r\nwarning: of our own\n"


def test_a_complaint_is_an_error_and_not_shown(tmp_path, capfd):
    text = mhd("t1.raw", DimSize="2 2 2 2 2 2 2 2 2", NDims="9", ElementSpacing="2 2 2")
    (tmp_path / "t1.mhd").write_text(text)
    (tmp_path / "t1.raw").write_bytes(RAW)
    with pytest.raises(ScanError):
        volumes.read(tmp_path / "t1.mhd")
    assert capfd.readouterr().err == ""
