"""A damaged file is never read as whole: every packed format is held to its checksum and length."""

import bz2
import gzip
import io
import struct
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image as Picture

from dymo_med import limits
from dymo_med.errors import PatientDataError
from dymo_med.modalities import modality
from dymo_med.modalities.packed import unpacked
from dymo_med.modalities.scan import ScanError
from dymo_med.modalities.transforms import KEY, LoadScand
from dymo_med.types import ModalitySpec
from tests.unit.test_volumes import mhd, nhdr

VALUES = np.random.default_rng(0).integers(0, 900, (9, 8, 7)).astype(np.int16)
RAW = VALUES.tobytes(order="F")
FILM = np.random.default_rng(1).integers(0, 255, (20, 24), np.uint8)


def read(path):
    return LoadScand(1)({KEY: str(path)})[KEY].numpy()[0]


def nifti(path, packed=True):
    content = nib.Nifti1Image(VALUES, np.diag([1.0, 1, 2, 1])).to_bytes()
    path.write_bytes(gzip.compress(content) if packed else content)


def attached(header, packing, data):
    return lambda path: path.write_bytes(header("LOCAL", **packing).encode() + data)


def nrrd(packing, data):
    text = nhdr("x", encoding=packing).replace("data file: x\n", "")
    return lambda path: path.write_bytes(text.encode() + data)


def detached(header, packing, data):
    def write(path):
        path.write_text(header("a.bin", **packing))
        (path.parent / "a.bin").write_bytes(data)

    return write


def tiff(path):
    Picture.fromarray(FILM).save(path, compression="tiff_adobe_deflate")


ZLIB, GZIP, BZIP2 = zlib.compress(RAW), gzip.compress(RAW), bz2.compress(RAW)
MHA = {"CompressedData": "True", "CompressedDataSize": str(len(ZLIB))}
# Name, how to write it, the file whose bits are flipped, and from which byte on.
FORMATS = {
    "nii.gz": ("a.nii.gz", nifti, None, 0),
    "nrrd gzip": ("a.nrrd", nrrd("gzip", GZIP), None, 0),
    "nrrd bzip2": ("a.nrrd", nrrd("bzip2", BZIP2), None, 0),
    "nhdr gzip": ("a.nhdr", detached(nhdr, {"encoding": "gzip"}, GZIP), "a.bin", 0),
    "nhdr bzip2": ("a.nhdr", detached(nhdr, {"encoding": "bzip2"}, BZIP2), "a.bin", 0),
    "mha": ("a.mha", attached(mhd, MHA, ZLIB), None, 0),
    "mhd": ("a.mhd", detached(mhd, MHA, ZLIB), "a.bin", 0),
    "png": ("a.png", lambda path: Picture.fromarray(FILM).save(path), None, 0),
    "tiff": ("a.tif", tiff, None, 8),
}


def strip_of(path):
    """Return where the strip of a TIFF file begins and ends."""
    with Picture.open(path) as picture:
        return picture.tag_v2[273][0], picture.tag_v2[273][0] + picture.tag_v2[279][0]


@pytest.mark.parametrize("name", FORMATS)
def test_a_flipped_bit_is_an_error_or_changes_no_voxel(tmp_path, name):
    name, write, data, first = FORMATS[name]
    path = tmp_path / name
    write(path)
    whole = read(path)
    assert np.array_equal(whole, FILM if whole.ndim == 2 else VALUES)
    spoilt = tmp_path / (data or name)
    content = spoilt.read_bytes()
    last = len(content)
    if name == "a.tif":
        first, last = strip_of(path)
    refused = 0
    for place in np.unique(np.linspace(first, last - 1, 150).round().astype(int)):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        spoilt.write_bytes(bytes(changed))
        try:
            assert np.array_equal(read(path), whole), place
        except ScanError as error:
            assert error.remedy
            refused += 1
    assert refused > 70


@pytest.mark.parametrize("keep", [0.3, 0.9, -1, -4, -9])
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_cut_short_is_an_error(tmp_path, name, keep):
    name, write, data, _ = FORMATS[name]
    path, spoilt = tmp_path / name, tmp_path / (FORMATS and (data or name))
    write(path)
    content = spoilt.read_bytes()
    if name == "a.tif":
        content = content[: strip_of(path)[1]]
    spoilt.write_bytes(content[: int(keep * len(content)) if keep > 0 else keep])
    with pytest.raises(ScanError):
        read(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.nii.gz", lambda p: (nifti(p), p.write_bytes(p.read_bytes() + b"more"))),
        ("a.nii", lambda p: (nifti(p, False), p.write_bytes(p.read_bytes() + b"more"))),
        ("a.nrrd", nrrd("gzip", GZIP + b"more")),
        ("a.nrrd", nrrd("gzip", gzip.compress(RAW + b"more"))),
        ("a.nrrd", nrrd("bzip2", BZIP2 + b"more")),
        ("a.nrrd", nrrd("raw", RAW + b"more")),
        ("a.mha", attached(mhd, MHA, ZLIB + b"more")),
        ("a.mha", attached(mhd, {"CompressedData": "True"}, ZLIB + b"more")),
        ("a.mha", attached(mhd, {"CompressedData": "True"}, zlib.compress(RAW + b"more"))),
        ("a.mha", attached(mhd, {}, RAW + b"more")),
        ("a.mha", attached(mhd, {}, RAW[:-4])),
        ("a.mhd", detached(mhd, {}, RAW + b"more")),
        ("a.nhdr", detached(nhdr, {}, RAW + b"more")),
    ],
)
def test_a_file_of_another_length_than_it_says_is_an_error(tmp_path, name, write):
    write(tmp_path / name)
    with pytest.raises(ScanError, match="damaged, cut short or not what its header says"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.nii.gz", lambda p: (nifti(p), p.write_bytes(p.read_bytes() + bytes(600)))),
        (
            "a.nii.gz",
            lambda p: (
                nifti(p, False),
                p.write_bytes(
                    gzip.compress(p.read_bytes()[:700]) + gzip.compress(p.read_bytes()[700:])
                ),
            ),
        ),
        ("a.nrrd", nrrd("gzip", gzip.compress(RAW[:300]) + gzip.compress(RAW[300:]))),
        ("a.nrrd", nrrd("gz", GZIP)),
        ("a.nrrd", nrrd("hex", RAW.hex().encode())),
        ("a.nrrd", nrrd("ascii", " ".join(map(str, VALUES.ravel("F"))).encode())),
        ("a.nrrd", nrrd("gzip\nbyte skip: 3", gzip.compress(b"abc" + RAW))),
        ("a.nrrd", nrrd("gzip\nline skip: 2", b"one\ntwo\n" + GZIP)),
        ("a.nhdr", detached(nhdr, {"byte skip": "5"}, b"12345" + RAW)),
        ("a.nhdr", detached(nhdr, {"byte skip": "-1"}, b"12345" + RAW)),
        ("a.mhd", detached(mhd, {"HeaderSize": "5"}, b"12345" + RAW)),
        ("a.mha", attached(mhd, {"CompressedData": "True"}, ZLIB)),
        (
            "a.mha",
            attached(
                mhd,
                {"CompressedData": "True", "BinaryDataByteOrderMSB": "True"},
                zlib.compress(VALUES.astype(">i2").tobytes(order="F")),
            ),
        ),
        (
            "a.nrrd",
            lambda p: p.write_bytes(
                nhdr("x", encoding="gzip", endian="big").replace("data file: x\n", "").encode()
                + gzip.compress(VALUES.astype(">i2").tobytes(order="F"))
            ),
        ),
        ("a.mha", lambda p: sitk.WriteImage(sitk.GetImageFromArray(VALUES.T), p, True)),
        ("a.nrrd", lambda p: sitk.WriteImage(sitk.GetImageFromArray(VALUES.T), p, True)),
    ],
)
def test_whole_files_of_every_kind_are_read(tmp_path, name, write):
    write(tmp_path / name)
    assert np.array_equal(read(tmp_path / name), VALUES)


@pytest.mark.parametrize("packing", ["gzip", "zlib", "bzip2", "raw"])
def test_no_more_is_unpacked_than_is_asked_for(packing):
    pack = {"gzip": gzip.compress, "zlib": zlib.compress, "bzip2": bz2.compress, "raw": bytes}
    stream = io.BytesIO(pack[packing](bytes(5 * 2**20)))
    with pytest.raises(ScanError, match="header says") as caught:
        unpacked(stream, packing, 1000)
    assert caught.value.got == "more than the 1000 bytes that its header states"


def header_of(shape, dtype=np.int16):
    image = nib.Nifti1Image(np.zeros((2, 2, 2), dtype), np.eye(4))
    image.header.set_data_shape(shape)
    return image.header.binaryblock + bytes(4)


def claims(path):
    """Write a small file that claims 60 x 60 x 60 voxels of 16 bits."""
    size = 2 * 60**3
    text = {"sizes": "60 60 60", "encoding": "gzip"}
    zeros = zlib.compress(bytes(size))
    content = {
        "nii": header_of((60, 60, 60)) + bytes(size),
        "nii.gz": gzip.compress(header_of((60, 60, 60)) + bytes(size)),
        "nrrd": nhdr("x", **text).replace("data file: x\n", "").encode()
        + gzip.compress(bytes(size)),
        "mha": mhd("LOCAL", DimSize="60 60 60", CompressedData="True").encode() + zeros,
    }
    name = path.name.split(".", 1)[1]
    if name in content:
        path.write_bytes(content[name])
    else:
        Picture.fromarray(np.zeros((600, 720), np.uint8)).save(path)


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "nrrd", "mha", "png", "tif", "jpg"])
def test_nothing_is_unpacked_beyond_the_limit(tmp_path, monkeypatch, ending):
    path = tmp_path / f"a.{ending}"
    claims(path)
    read(path)
    monkeypatch.setattr(limits, "MAX_UNPACKED_BYTES", 400_000)
    with pytest.raises(ScanError, match="larger than what is read") as caught:
        read(path)
    assert "at most 391 KiB" in caught.value.expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.nrrd", nhdr("x").replace("data file: x\n", f"# {'x' * 3000}\n").encode() + RAW),
        ("a.nrrd", nhdr("x").replace("data file: x\n", "# x\n" * 900).encode() + RAW),
        ("a.mha", b"Comment = " + b"x" * 3000 + b"\n" + mhd("LOCAL").encode() + RAW),
        ("a.mhd", (mhd("LIST") + "s.raw\n" * 900).encode()),
    ],
)
def test_a_header_that_does_not_end_is_refused(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(limits, "MAX_HEADER_BYTES", 2000)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ScanError, match="the header is larger than what is read"):
        read(tmp_path / name)


def test_notes_behind_a_nifti_header_are_bounded(tmp_path, monkeypatch):
    image = nib.Nifti1Image(VALUES, np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 3000))
    nib.save(image, tmp_path / "a.nii.gz")
    assert np.array_equal(read(tmp_path / "a.nii.gz"), VALUES)
    monkeypatch.setattr(limits, "MAX_HEADER_BYTES", 2000)
    with pytest.raises(ScanError, match="the header is larger"):
        read(tmp_path / "a.nii.gz")


# -- what a file is --------------------------------------------------------------------------------


def dicom(path):
    path.write_bytes(bytes(128) + b"DICM" + bytes(40))


MISNAMED = {
    "NIfTI without gzip": ("a.nii.gz", lambda p: nifti(p, False), r"NIfTI\..*ends in \.nii\."),
    "packed NIfTI": ("a.nii", nifti, r"packed by gzip.*ends in \.nii\.gz"),
    "NIfTI called NRRD": ("a.nrrd", lambda p: nifti(p, False), r"NIfTI.*ends in \.nii\."),
    "NRRD called NIfTI": ("a.nii", nrrd("raw", RAW), r"NRRD.*ends in \.nrrd"),
    "MetaImage called NIfTI": ("a.nii", attached(mhd, {}, RAW), r"MetaImage.*ends in \.mha"),
    "DICOM called NIfTI": ("a.nii.gz", dicom, r"DICOM.*ends in \.dcm"),
    "DICOM called PNG": ("a.png", dicom, r"DICOM.*ends in \.dcm"),
    "NIfTI called DICOM": ("a.dcm", lambda p: nifti(p, False), r"NIfTI.*ends in \.nii\."),
    "GIF": ("a.png", lambda p: Picture.fromarray(FILM).save(p, "GIF"), "GIF.*convert it"),
    "BMP": ("a.jpg", lambda p: Picture.fromarray(FILM).save(p, "BMP"), "BMP.*convert it"),
    "ZIP": ("a.nii.gz", lambda p: p.write_bytes(b"PK\3\4" + bytes(99)), "ZIP.*Unpack"),
    "page": ("a.nii.gz", lambda p: p.write_text("<!DOCTYPE html><p>no"), "web page.*Download"),
}


@pytest.mark.parametrize("name", MISNAMED)
def test_a_misnamed_file_is_told_its_name(tmp_path, name):
    name, write, told = MISNAMED[name]
    write(tmp_path / name)
    spec = ModalitySpec("a", "image", name, (1, 12, 12, 12), (1.0, 1.0, 1.0), "none")
    with pytest.raises(PatientDataError, match=told) as caught:
        modality(spec).read(tmp_path, "Patient p")
    assert "again" not in str(caught.value) or "web page" in str(caught.value)


@pytest.mark.parametrize(("name", "kind"), [("a.png", "JPEG"), ("a.jpg", "PNG"), ("a.tif", "PNG")])
def test_a_picture_under_another_pictures_name_is_read(tmp_path, name, kind):
    Picture.fromarray(FILM).save(tmp_path / name, kind)
    assert np.abs(read(tmp_path / name) - FILM).max() < 130


# -- numbers of every kind -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.nii.gz", lambda p: nib.save(nib.Nifti1Image(VALUES * np.complex64(1j), np.eye(4)), p)),
        ("a.nii", lambda p: nib.save(nib.Nifti1Image(VALUES * np.complex128(1j), np.eye(4)), p)),
        (
            "a.nrrd",
            lambda p: p.write_bytes(
                nhdr(
                    "x",
                    type="float",
                    dimension="4",
                    sizes="2 9 8 7",
                    kinds="complex space space space",
                    **{"space directions": "none (1,0,0) (0,1,0) (0,0,2)"},
                )
                .replace("data file: x\n", "")
                .encode()
                + bytes(8 * VALUES.size)
            ),
        ),
        (
            "a.mha",
            lambda p: sitk.WriteImage(
                sitk.GetImageFromArray((VALUES.T * 1j).astype(np.complex64)), p
            ),
        ),
    ],
)
def test_complex_numbers_are_refused_for_what_they_are(tmp_path, name, write):
    write(tmp_path / name)
    # MetaImage has no such type: to it they are two numbers per voxel.
    with pytest.raises(ScanError, match=r"complex numbers|more than one volume") as caught:
        read(tmp_path / name)
    assert "magnitude" in caught.value.remedy or name == "a.mha"


def film(path, pixels, photometric, kind):
    data = pixels.tobytes()
    rows, columns = pixels.shape
    tags = [
        (256, columns),
        (257, rows),
        (258, 8 * pixels.itemsize),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, rows),
        (279, len(data)),
        (339, kind),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags))
    path.write_bytes(start + entries + bytes(4))


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("<u1", 1), ("<i1", 2), ("<u2", 1), ("<i2", 2), ("<u4", 1), ("<i4", 2), ("<f4", 3)],
)
def test_large_numbers_of_a_tiff_are_bright(tmp_path, dtype, kind, photometric):
    """White is zero in any number of bits; a sign is a sign. Or it is refused for what it is."""
    rng = np.random.default_rng(0)
    if kind == 3:
        pixels = rng.normal(0, 90, (9, 7)).astype(dtype)
        ends = float(pixels.min()) + float(pixels.max())
    else:
        info = np.iinfo(dtype)
        pixels = rng.integers(info.min, info.max, (9, 7), np.dtype(dtype).newbyteorder("="))
        ends = int(info.min) + int(info.max)
    film(tmp_path / "a.tif", pixels, photometric, kind)
    meant = ends - pixels.astype(float) if photometric == 0 else pixels.astype(float)
    try:
        got = read(tmp_path / "a.tif")
    except ScanError as error:
        assert photometric == 0 and kind != 3 and dtype not in ("<u1", "<u2")
        assert "of a kind that is not read" in error.what
    else:
        assert np.allclose(got, meant, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((9, 8, 7, 1), None),
        ((9, 8, 7, 1, 1), None),
        ((9, 8, 7, 1, 1, 1, 1), None),
        ((9, 8, 7, 1, 2), r"5 axes.*\(9, 8, 7, 1, 2\)"),
        ((9, 8, 7, 2, 3), "5 axes"),
        ((9, 8, 7, 1, 1, 2), "6 axes"),
        ((9, 8, 7, 2, 1), "4 axes"),
    ],
)
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_trailing_axes_of_one_are_none(tmp_path, kind, shape, told):
    values = np.resize(VALUES, np.prod(shape)).reshape(shape)
    values[..., 0] = VALUES.reshape((9, 8, 7, *(1,) * (len(shape) - 3)))[..., 0]
    image = kind(values, np.eye(4), dtype=np.int16)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(image.to_bytes()))
    spec = ModalitySpec("a", "image", "a.nii.gz", (1, 9, 8, 8), (1.0, 1.0, 1.0), "none")
    if told is None:
        got = modality(spec).read(tmp_path, "Patient p").values
        nib.save(nib.Nifti1Image(VALUES, np.eye(4)), tmp_path / "a.nii.gz")
        assert np.array_equal(got, modality(spec).read(tmp_path, "Patient p").values)
    else:
        with pytest.raises(PatientDataError, match=told):
            modality(spec).read(tmp_path, "Patient p")


def test_a_fourth_axis_in_nrrd_is_named(tmp_path):
    directions = {"space directions": "(1,0,0) (0,1,0) (0,0,2) none"}
    text = nhdr("x", dimension="4", sizes="9 8 7 1", **directions).replace("data file: x\n", "")
    (tmp_path / "a.nrrd").write_bytes(text.encode() + RAW)
    with pytest.raises(ScanError, match="more than one volume") as caught:
        read(tmp_path / "a.nrrd")
    assert "4 axes" in caught.value.got


@pytest.mark.parametrize(
    ("inside", "remedy"), [(False, "fslmaths IN -nan OUT"), (True, "Find out where they come from")]
)
@pytest.mark.parametrize("name", ["a.nii.gz", "a.mha"])
def test_a_background_of_nan_has_a_remedy_of_its_own(tmp_path, name, inside, remedy):
    values = VALUES.astype(np.float32)
    if inside:
        values[4, 4, 4] = np.nan
    else:
        values[VALUES < 300] = np.nan
        values[:: VALUES.shape[0] - 1, :: VALUES.shape[1] - 1, :: VALUES.shape[2] - 1] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(values.T), tmp_path / name)
    spec = ModalitySpec("a", "image", name, (1, 12, 12, 12), (1.0, 1.0, 1.0), "zscore")
    with pytest.raises(PatientDataError, match="voxels that are not numbers") as caught:
        modality(spec).read(tmp_path, "Patient p")
    assert remedy in caught.value.problems[0].remedy
