"""What DICOM objects are, what in them is no image, and what they may claim."""

import zlib

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EncapsulatedPDFStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    KeyObjectSelectionDocumentStorage,
    MRSpectroscopyStorage,
    ParametricMapStorage,
    RLELossless,
    RTStructureSetStorage,
    SegmentationStorage,
)

from dymo_med import limits
from dymo_med.errors import PatientDataError
from dymo_med.modalities import dicom, modality
from dymo_med.modalities.scan import ScanError
from dymo_med.types import ModalitySpec
from tests.dicom_files import enhanced, header, series

LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
AFFINE = np.diag([-2.0, -2.0, 2.0, 1.0])


def ball(shape=(24, 22, 12)):
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    return (1000 * np.exp(-3 * (x**2 + y**2 + z**2)) + 24).astype(np.int16), x**2 + y**2 > 0.9


# -- objects that are no scans ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sop", "fields", "told"),
    [
        (SegmentationStorage, {"SegmentationType": "BINARY"}, r"segmentation \(BINARY\)"),
        (SegmentationStorage, {"SegmentationType": "FRACTIONAL"}, r"segmentation \(FRACTIONAL\)"),
        (LABEL_MAP, {"SegmentationType": "LABELMAP"}, "label map"),
        (ParametricMapStorage, {}, "parametric map"),
        (MRSpectroscopyStorage, {}, "spectroscopy"),
        ("1.2.3.4.5", {"Modality": "SEG"}, "a segmentation"),
    ],
)
def test_what_is_no_scan_is_refused_for_what_it_is(tmp_path, sop, fields, told):
    def change(dataset):
        dataset.Modality = "SEG" if "Seg" in pydicom.uid.UID(sop).name else "MR"
        for keyword, value in fields.items():
            setattr(dataset, keyword, value)

    enhanced(tmp_path / "t1" / "1.dcm", ball()[0], AFFINE, sop=sop, change=change)
    with pytest.raises(ScanError, match=rf"{told}.*, not a scan") as caught:
        dicom.read(tmp_path / "t1")
    assert "Put the scan that it was made from" in caught.value.remedy


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_segmentations_of_another_writer(tmp_path, kind):
    highdicom = pytest.importorskip("highdicom")
    from pydicom.sr.codedict import codes

    def more(dataset, k):
        for keyword in ("AccessionNumber", "StudyDate", "StudyTime", "ReferringPhysicianName"):
            setattr(dataset, keyword, "")
        dataset.SliceThickness = "2"
        dataset.StudyID, dataset.PatientSex, dataset.PositionReferenceIndicator = "1", "", ""

    series(tmp_path / "ct", ball()[0], AFFINE, "1.2.3", ct=True, change=more)
    source = [pydicom.dcmread(f) for f in sorted((tmp_path / "ct").iterdir())]
    mask = np.zeros((12, 22, 24), np.uint8 if kind != "FRACTIONAL" else np.float32)
    mask[3:8, 5:12, 6:14] = 1
    part = highdicom.seg.SegmentDescription(
        1, "s", codes.SCT.Tissue, codes.SCT.Liver, highdicom.seg.SegmentAlgorithmTypeValues.MANUAL
    )
    uid = highdicom.UID
    highdicom.seg.Segmentation(
        source, mask, kind, [part], uid(), 5, uid(), 1, "m", "m", "1", "1"
    ).save_as(tmp_path / "t1.dcm")
    with pytest.raises(ScanError, match=r"segmentation .*, not a scan"):
        dicom.read(tmp_path / "t1.dcm")


@pytest.mark.parametrize(
    ("sop", "told"),
    [
        (RTStructureSetStorage, "RT Structure Set Storage"),
        (KeyObjectSelectionDocumentStorage, "Key Object Selection"),
        (EncapsulatedPDFStorage, "Encapsulated PDF"),
        ("1.2.3.4.5", "private kind"),
    ],
)
def test_what_has_no_image_is_named(tmp_path, sop, told):
    dataset = header(sop, np.zeros((4, 4), np.int16), "1.2.3", 1)
    for keyword in ("Rows", "Columns", "PixelData", "BitsAllocated"):
        delattr(dataset, keyword)
    (tmp_path / "t1").mkdir()
    for name in ("a.dcm", "b.dcm"):
        dataset.save_as(tmp_path / "t1" / name, enforce_file_format=True)
    (tmp_path / "t1" / "notes.txt").write_text("nothing")
    for path, count in ((tmp_path / "t1" / "a.dcm", ""), (tmp_path / "t1", "2 x ")):
        with pytest.raises(ScanError, match=r"holds no image|no DICOM image") as caught:
            dicom.read(path)
        assert count in caught.value.got and told in caught.value.got
    assert "1 other file" in caught.value.got


# -- padding ---------------------------------------------------------------------------------------


def padded(folder, number, limit=None, signed=True, intercept=-1024, fill=None, **fields):
    """Write a CT whose corners hold a number that is no part of the image; return the rest."""
    stored, outside = ball()
    stored = stored.astype(np.int16 if signed else np.uint16)
    stored[outside] = number if fill is None else fill
    more = {"PixelPaddingValue": number, "PixelPaddingRangeLimit": limit, **fields}

    def change(dataset, k):
        for keyword, value in more.items():
            if value is not None:
                setattr(dataset, keyword, value)

    series(folder, stored, AFFINE, "1.2.3", (1, intercept), change, ct=True)
    return stored.astype(float) + intercept, outside


@pytest.mark.parametrize(
    "how",
    [
        {"number": -2000},
        {"number": -32768},
        {"number": 4000},  # brighter than anything real
        {"number": 63536, "signed": False},
        {"number": -2000, "limit": -1900, "fill": -1950},
        {"number": -1900, "limit": -2000, "fill": -1950},
        {"number": 0, "signed": False, "intercept": 0},
        {"number": -2000, "fill": -1990},  # as lossy compression leaves it
    ],
)
def test_padding_is_no_tissue(tmp_path, how):
    values, outside = padded(tmp_path / "ct", **how)
    scan = dicom.read(tmp_path / "ct")
    assert np.array_equal(scan.padding, outside)
    assert np.array_equal(scan.values[~outside], values[~outside].astype(np.float32))
    assert (scan.values[outside] == values[~outside].min()).all()


@pytest.mark.parametrize("dims", [2, 3])
def test_padding_counts_for_no_intensity(tmp_path, dims):
    values, outside = padded(tmp_path / "ct", -2000)
    if dims == 2:
        for path in sorted((tmp_path / "ct").iterdir())[1:]:
            path.unlink()
        values, outside = values[:, :, :1], outside[:, :, :1]
    real = values[~outside]
    size = (24, 22, 12)[:3] if dims == 3 else (22, 24)

    def image(intensity):
        spec = ModalitySpec("ct", "image", "ct", (1, *size), (2.0,) * dims, intensity)
        got = modality(spec).read(tmp_path, "Patient p").values[0].numpy()
        return got if dims == 3 else got.T[..., None]

    low, high = np.percentile(real, (1, 99))
    expected = ((values - low) / (high - low)).clip(0, 1)
    assert np.allclose(
        np.sort(image("percentile")[~outside]), np.sort(expected[~outside]), atol=1e-4
    )
    assert (image("percentile")[outside] == 0).all()
    standard = image("zscore")
    assert (standard[outside] == 0).all()
    assert standard[~outside].mean() == pytest.approx(0, abs=1e-4)
    assert standard[~outside].std() == pytest.approx(1, abs=1e-4)
    assert image("none")[outside].max() == pytest.approx(real.min(), abs=1e-2)


def test_padding_in_enhanced_files_in_slopes_and_in_inverted_pictures(tmp_path):
    stored, outside = ball()
    stored = stored.astype(np.uint16)
    stored[outside] = 65535

    def change(dataset):
        dataset.PixelPaddingValue = 65535

    enhanced(tmp_path / "a.dcm", stored, AFFINE, rescale=(0.5, 3), change=change)
    scan = dicom.read(tmp_path / "a.dcm")
    assert np.array_equal(scan.padding, outside)
    each = np.array([(0.5 + 0.1 * k, 3) for k in range(12)])
    enhanced(tmp_path / "b.dcm", stored, AFFINE, rescale=each, change=change)
    scan = dicom.read(tmp_path / "b.dcm")
    assert np.array_equal(scan.padding, outside)

    def inverted(dataset, k):
        dataset.PixelPaddingValue, dataset.PhotometricInterpretation = 65535, "MONOCHROME1"

    series(tmp_path / "c", stored, AFFINE, "1.2.3", change=inverted)
    scan = dicom.read(tmp_path / "c")
    assert np.array_equal(scan.padding, outside)
    assert np.array_equal(scan.values[~outside], 65535.0 - stored[~outside])


@pytest.mark.parametrize("how", [{"number": -2000, "fill": 30}, {"number": None}, {"number": ""}])
def test_without_padded_pixels_nothing_is_done(tmp_path, how):
    values, _ = padded(tmp_path / "ct", **{"fill": 30, **how})
    scan = dicom.read(tmp_path / "ct")
    assert scan.padding is None and np.array_equal(scan.values, values.astype(np.float32))


def test_an_implicit_file_states_its_padding_without_a_sign(tmp_path):
    values, outside = padded(tmp_path / "ct", -2000)
    for path in (tmp_path / "ct").iterdir():
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        dataset.save_as(path, implicit_vr=True, little_endian=True)
    scan = dicom.read(tmp_path / "ct")
    assert np.array_equal(scan.padding, outside) and scan.values.min() == values[~outside].min()


# -- damage and claims -----------------------------------------------------------------------------


def one(path, syntax=ExplicitVRLittleEndian, shape=(64, 48), **fields):
    """Write one picture in a transfer syntax."""
    stored = np.random.default_rng(0).integers(0, 900, shape).astype(np.uint16)
    dataset = header(pydicom.uid.MRImageStorage, stored, "1.2.3", 1)
    if syntax == DeflatedExplicitVRLittleEndian:
        dataset.file_meta.TransferSyntaxUID = syntax
    elif syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax)
    for keyword, value in fields.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path, enforce_file_format=True)
    return stored


SYNTAXES = [
    ExplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLSLossless,
]


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_file_that_claims_more_than_it_holds_is_refused(tmp_path, monkeypatch, syntax):
    path = tmp_path / "a.dcm"
    stored = one(path, syntax)
    assert np.array_equal(dicom.read(path).values[..., 0].T, stored)
    with monkeypatch.context() as patch:
        patch.setattr(limits, "MAX_UNPACKED_BYTES", 2 * 64 * 48 - 1)
        dicom._frames_once.cache_clear()
        with pytest.raises(ScanError, match="larger than what is read"):
            dicom.read(path)
    for claim in ({"Rows": 30_000, "Columns": 9_000}, {"NumberOfFrames": 40}, {"Rows": 65_535}):
        one(path, syntax, **claim)
        with pytest.raises(ScanError):
            dicom.read(path)


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("keep", [0.4, 0.8, 0.97])
def test_a_file_that_is_cut_short_is_refused(tmp_path, syntax, keep):
    path = tmp_path / "a.dcm"
    one(path, syntax)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ScanError):
        dicom.read(path)


def test_a_compressed_frame_of_another_size_is_refused(tmp_path):
    path = tmp_path / "a.dcm"
    one(path, JPEGLSLossless)
    larger = pydicom.dcmread(path)
    one(path, JPEGLSLossless, shape=(32, 48))
    smaller = pydicom.dcmread(path)
    smaller.PixelData = larger.PixelData
    smaller.save_as(path)
    with pytest.raises(ScanError, match="pixels of a DICOM file are damaged"):
        dicom.read(path)


def test_a_compressed_frame_without_an_end_is_refused(tmp_path):
    path = tmp_path / "a.dcm"
    one(path, JPEGLSLossless)
    dataset = pydicom.dcmread(path)
    [stream] = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    dataset.PixelData = encapsulate([stream[:-200] + bytes(200)])
    dataset.save_as(path)
    with pytest.raises(ScanError, match="pixels of a DICOM file are damaged"):
        dicom.read(path)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_a_header_that_does_not_end_is_refused(tmp_path, monkeypatch, syntax):
    path = tmp_path / "a.dcm"
    one(path, syntax, ImageComments="x" * 9000)
    dicom.read(path)  # what is not needed is passed over
    dicom._frames_once.cache_clear()
    monkeypatch.setattr(limits, "MAX_HEADER_BYTES", 300)
    monkeypatch.setattr(limits, "MAX_UNPACKED_BYTES", 2 * 64 * 48)
    with pytest.raises(ScanError, match="larger than what is read"):
        dicom.read(path)


def test_what_a_deflated_file_unpacks_to_is_counted(tmp_path, monkeypatch):
    path = tmp_path / "a.dcm"
    one(path, DeflatedExplicitVRLittleEndian)
    content = path.read_bytes()
    start = 144 + int.from_bytes(content[140:144], "little")
    plain = zlib.decompress(content[start:], -15)
    stream = zlib.compressobj(wbits=-15)
    longer = stream.compress(plain + bytes(50_000)) + stream.flush()
    path.write_bytes(content[:start] + longer)
    monkeypatch.setattr(limits, "MAX_UNPACKED_BYTES", 20_000)
    monkeypatch.setattr(limits, "MAX_HEADER_BYTES", 20_000)
    with pytest.raises(ScanError, match="larger than what is read"):
        dicom.read(path)


def test_the_error_names_the_file_and_nobody(tmp_path):
    one(tmp_path / "t1.dcm", JPEGLSLossless, Rows=60)
    spec = ModalitySpec("t1", "image", "t1.dcm", (1, 16, 16), (), "none")
    with pytest.raises(PatientDataError, match=r"Patient p: t1\.dcm") as caught:
        modality(spec).read(tmp_path, "Patient p")
    assert "Doe" not in str(caught.value)
