"""DICOM: which series is taken, what is read, and each error."""

import gzip
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    HTJ2K,
    ComputedRadiographyImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalXRayImageStorageForPresentation,
    EnhancedCTImageStorage,
    RTDoseStorage,
    SecondaryCaptureImageStorage,
    XRayAngiographicImageStorage,
    XRayRadiofluoroscopicImageStorage,
)

from dymo_med.errors import PatientDataError
from dymo_med.modalities import dicom, modality
from dymo_med.modalities.scan import ScanAbsent, ScanError, apart_mm, to_ras
from dymo_med.types import ModalitySpec, SeriesRule
from tests.conftest import shared_data
from tests.dicom_files import SECRETS, enhanced, header, item, series

AFFINE = np.array([[-0.8, 0, 0, 10], [0, -1.1, 0, 20], [0, 0, 3.0, -30], [0, 0, 0, 1]])
SHAPE = (8, 7, 6)
VOLUME = ModalitySpec("t1", "image", "t1.nii.gz", (1, 16, 16, 16), (1.0, 1.0, 1.0), "none")
FILM = ModalitySpec("film", "image", "film.dcm", (1, 16, 16), (), "none")


@pytest.fixture(scope="module")
def stored():
    return np.random.default_rng(0).integers(0, 4000, SHAPE).astype(np.uint16)


def error_of(path, rule=None):
    with pytest.raises(ScanError) as caught:
        dicom.read(path, rule)
    error = caught.value
    text = f"{error.what}. {error.expected}. {error.got}. {error.remedy}"
    assert error.remedy
    assert not any(secret in text for secret in SECRETS)
    return text


# -- finding the files -----------------------------------------------------------------------------


def test_subfolders_are_searched_and_other_files_passed_over(tmp_path, stored):
    series(tmp_path / "study" / "deep", stored, AFFINE)
    (tmp_path / "study" / "README").write_text("not DICOM")
    (tmp_path / "study" / "notes.txt").write_text("not DICOM")
    (tmp_path / "study" / ".DS_Store").write_bytes(b"\0" * 200)
    report = header("1.2.840.10008.5.1.4.1.1.88.11", stored[:, :, 0], "1.2.3.4.8", 1, "SR")
    for keyword in ("Rows", "Columns", "PixelData", "BitsAllocated"):
        delattr(report, keyword)
    report.save_as(tmp_path / "study" / "report.dcm", enforce_file_format=True)
    scan = dicom.read(tmp_path / "study")
    assert np.array_equal(scan.values, stored)
    assert apart_mm(scan.affine, AFFINE, SHAPE) < 1e-4
    assert len(scan.files) == 6
    assert scan.identifiers == ("MRN-0042",)
    assert "MRN" not in repr(scan)


def test_files_without_the_mark_are_read(tmp_path, stored):
    series(tmp_path / "a", stored, AFFINE)
    for number, file in enumerate(sorted((tmp_path / "a").iterdir())):
        plain = pydicom.dcmread(file)
        plain.preamble = None
        file.unlink()
        plain.save_as(file.with_name(f"IM{number}"), enforce_file_format=False)
    assert np.array_equal(dicom.read(tmp_path / "a").values, stored)


def test_a_folder_without_images(tmp_path):
    folder = tmp_path / "t1" / "sub"
    folder.mkdir(parents=True)
    assert "no DICOM image in the folder. " in (text := error_of(tmp_path / "t1"))
    assert "an empty folder" in text
    (folder / "t1.nii.gz").write_bytes(b"x" * 200)
    assert "1 other file" in error_of(tmp_path / "t1")


@pytest.mark.parametrize("name", ["last.dcm", "last"])
def test_a_damaged_file_is_never_a_missing_slice(tmp_path, stored, name):
    folder = series(tmp_path / "a", stored, AFFINE)
    last = max(folder.iterdir()).rename(folder / name)
    content = last.read_bytes()
    for length in (*range(0, len(content), 29), len(content) - 2):
        last.write_bytes(content[:length])
        with pytest.raises(ScanError) as caught:
            dicom.read(folder)
        assert "damaged" in caught.value.what and name in caught.value.got, length
    (folder / "last.dcm").write_bytes(b"x" * 400)
    assert "last.dcm" in error_of(folder)


def test_a_broken_type_in_the_header(tmp_path, stored):
    folder = series(tmp_path / "a", stored, AFFINE)
    last = max(folder.iterdir())
    content = last.read_bytes()
    place = content.index(b"\x20\x00\x0e\x00UI") + 4  # of the SeriesInstanceUID
    last.write_bytes(content[:place] + b"U1" + content[place + 2 :])
    assert "damaged" in error_of(folder)


def test_links_are_followed_once_and_one_to_nothing_is_an_error(tmp_path, stored):
    series(tmp_path / "store", stored, AFFINE)
    folder = tmp_path / "t1"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "store")
    (folder / "round").symlink_to(folder)
    os.mkfifo(folder / "pipe.dcm")
    assert np.array_equal(dicom.read(folder).values, stored)
    (folder / "last.dcm").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match="last"):
        dicom.read(folder)
    with pytest.raises(PatientDataError, match="t1: the file is damaged"):
        modality(VOLUME).read(tmp_path, "Patient p")


# -- which series ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory, stored):
    """Return a study folder: a localizer in two directions, T1, FLAIR, a CT."""
    folder = tmp_path_factory.mktemp("study")
    turned = AFFINE[:, [2, 0, 1, 3]]
    say = "SeriesDescription"
    for part, affine in (("a", AFFINE), ("b", turned)):
        series(folder / part, stored[:, :, :3], affine, "1.2.3.4.1", **{say: "localizer Doe^Jane"})
    series(folder, stored, AFFINE, "1.2.3.4.2", **{say: "AX T1 Doe^Jane"})
    series(folder, stored + 1, AFFINE, "1.2.3.4.3", **{say: "ax T2 FLAIR Doe^Jane"})
    series(folder, stored[:, :, :4], AFFINE, "1.2.3.4.5", ct=True)
    return folder


@pytest.mark.parametrize(
    ("rule", "slices", "plus"),
    [
        (SeriesRule(description="flair"), 6, 1),
        (SeriesRule(description=r"\bt1\b", modality="mr"), 6, 0),
        (SeriesRule(modality="CT"), 4, 0),
        (SeriesRule(slices=(4, 5)), 4, 0),
    ],
)
def test_rules_choose(study, stored, rule, slices, plus):
    scan = dicom.read(study, rule)
    assert np.array_equal(scan.values, stored[:, :, :slices] + plus)


def test_what_was_found_is_listed_without_descriptions(study):
    text = error_of(study)
    assert "several DICOM series could be this scan" in text
    assert "5 stacks of slices in 4 series, by size and direction" in text
    assert "MR, 6 slices of 8 x 7, 0.8 x 1.1 x 3 mm" in text
    assert "CT, 4 slices of 8 x 7" in text
    text = error_of(study, SeriesRule("MR", "flair|t1"))
    assert "2 stacks of slices: " in text and text.count("description fits") == 2
    text = error_of(study, SeriesRule("PT", "t1", (2, 9)))
    assert "no DICOM series fits" in text and "does not fit" in text
    assert "modality PT, a description like 't1', 2 to 9 slices" in text
    assert "absent: missing" in text
    with pytest.raises(ScanAbsent):
        dicom.read(study, SeriesRule("PT", absent="missing"))


def test_modalities_share_a_study_folder(tmp_path, study, stored):
    shutil.copytree(study, tmp_path / "dicom")
    t1 = ModalitySpec(**{**VOLUME.__dict__, "file": "dicom", "dicom": SeriesRule(description="t1")})
    pet = ModalitySpec(
        **{**t1.__dict__, "name": "pet", "dicom": SeriesRule("PT", absent="missing")}
    )
    assert modality(pet).read(tmp_path, "Patient p") is None
    value = modality(t1).read(tmp_path, "Patient p")
    assert value.source.file == "dicom" and value.identifiers == ("MRN-0042",)
    (tmp_path / "dicom" / "more.txt").write_text("x")
    assert modality(t1).read(tmp_path, "Patient p").source.sha256 == value.source.sha256
    with pytest.raises(PatientDataError, match="several DICOM series"):
        modality(ModalitySpec(**{**t1.__dict__, "dicom": None})).read(tmp_path, "Patient p")


def test_files_of_two_patients(tmp_path, stored):
    series(tmp_path / "a", stored, AFFINE)
    series(tmp_path / "a" / "b", stored, AFFINE, "1.2.3.4.7", PatientID="MRN-0043")
    text = error_of(tmp_path / "a")
    assert "several patients" in text and "2 different ones" in text and "MRN" not in text


# -- geometry --------------------------------------------------------------------------------------


def move(k, mm, axis=2):
    def change(dataset, number):
        if number == k:
            position = [float(x) for x in dataset.ImagePositionPatient]
            position[axis] += mm
            dataset.ImagePositionPatient = position

    return change


def without(*keywords):
    def change(dataset, _):
        for keyword in keywords:
            delattr(dataset, keyword)

    return change


def turn_last(dataset, k):
    if k == 5:
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 0.99995, 0.01]
        # 0.01 rad over 6 rows of 1.1 mm is 0.066 mm, over 7 columns nothing; make it matter
        dataset.PixelSpacing = [1.15, 0.8]


def huge(dataset, _):
    dataset.Rows = dataset.Columns = dataset.NumberOfFrames = 60000


CHANGES = [
    (lambda d, k: k not in (2, 3), "are missing", "4 slices, 2 missing in 1 gaps"),
    (move(5, 1.2), "unevenly spaced", "from 3 to 4.2 mm"),
    (move(2, 0.2), "unevenly spaced", "from 2.8 to 3.2 mm"),
    (move(2, 0.4, axis=0), "straight line", "one 0.4 mm aside"),
    (turn_last, "not parallel or of one pixel size", "between corners"),
    (without("ImagePositionPatient"), "geometry", "6 of 6 slices without"),
    (without("PixelSpacing"), "does not state its pixel size", "PixelSpacing"),
    (
        lambda d, k: setattr(d, "ImageOrientationPatient", [1, 0, 0, 0.2, 1, 0]),
        "direction of a DICOM slice is broken",
        "right angles",
    ),
    (
        lambda d, k: setattr(d, "ImagePositionPatient", [0, 0, 3 * (k // 2)]),
        "several volumes at the same positions",
        "2 slices at each of 3 positions",
    ),
    (
        lambda d, k: setattr(d, "ImagePositionPatient", [0, 0, 3 * max(k, 1)]),
        "doubled",
        "6 slices at 5 positions",
    ),
    (lambda d, k: setattr(d, "RescaleSlope", 0), "slope of 0", "other than 0"),
    (lambda d, k: setattr(d, "SamplesPerPixel", 3), "colours", "grey values"),
    (lambda d, k: setattr(d, "PhotometricInterpretation", "PALETTE COLOR"), "colours", "grey"),
    (
        lambda d, k: setattr(d, "ModalityLUTSequence", item(LUTExplanation="x")),
        "lookup table",
        "NIfTI",
    ),
    (huge, "size that cannot be right", "60000"),
]


@pytest.mark.parametrize(("change", "what", "got"), CHANGES)
def test_each_error_of_a_series(tmp_path, stored, change, what, got):
    text = error_of(series(tmp_path / "a", stored, AFFINE, change=change))
    assert what in text and got in text


def test_the_tolerance_is_a_tenth_of_a_millimetre(tmp_path, stored):
    folder = series(tmp_path / "a", stored, AFFINE, change=move(2, 0.05))
    assert apart_mm(dicom.read(folder).affine, AFFINE, SHAPE) < 0.01


def test_copies_of_the_same_image(tmp_path, stored):
    folder = series(tmp_path / "a", stored, AFFINE)
    shutil.copytree(folder, folder / "again")
    assert "6 copies among 12 slices" in error_of(folder)


def test_a_compression_that_is_not_read_is_named(tmp_path, stored):
    def compressed(dataset, _):
        dataset.file_meta.TransferSyntaxUID = HTJ2K
        dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + b"\0" * 60])
        dataset["PixelData"].is_undefined_length = True

    text = error_of(series(tmp_path / "a", stored, AFFINE, change=compressed))
    assert "compression of the DICOM file is not read" in text and HTJ2K.name in text


# -- values ----------------------------------------------------------------------------------------


def test_slopes_differ_from_slice_to_slice(tmp_path, stored):
    rescale = np.array([(1, 0), (0.5, 3), (2.25, -7), (1e-3, 0), (3, 1), (1, 9)])
    truth = stored * rescale[:, 0] + rescale[:, 1]
    for path in (
        series(tmp_path / "a", stored, AFFINE, rescale=rescale),
        enhanced(tmp_path / "b.dcm", stored, AFFINE, rescale=rescale),
        enhanced(tmp_path / "c.dcm", stored, AFFINE, rescale=rescale, sop=EnhancedCTImageStorage),
    ):
        assert np.allclose(dicom.read(path).values, truth, rtol=1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_monochrome1_is_turned_round_once(tmp_path, stored, signed):
    values = (stored.astype(np.int32) - 2000).astype(np.int16) if signed else stored
    truth = (-1 if signed else 65535) - values.astype(float)

    def negative(dataset, _=0):
        dataset.PhotometricInterpretation = "MONOCHROME1"

    for path in (
        series(tmp_path / "a", values, AFFINE, change=negative),
        enhanced(tmp_path / "b.dcm", values, AFFINE, change=negative),
    ):
        assert np.array_equal(dicom.read(path).values, truth)
    rescale = np.array([(1.0 + k, -k) for k in range(6)])
    path = enhanced(tmp_path / "c.dcm", values, AFFINE, rescale=rescale, change=negative)
    assert np.allclose(dicom.read(path).values, truth * rescale[:, 0] + rescale[:, 1])


def test_overlay_bits_above_the_stored_ones_are_no_values(tmp_path, stored):
    def overlay(dataset, _):
        dataset.BitsStored, dataset.HighBit = 12, 11

    folder = series(tmp_path / "a", stored + (1 << 12), AFFINE, change=overlay)
    assert np.array_equal(dicom.read(folder).values, stored)


def test_a_dose_grid_is_scaled_and_its_frames_placed(tmp_path, stored):
    dose = header(
        RTDoseStorage,
        stored.transpose(2, 1, 0),
        "1.2.3.4.5",
        1,
        "RTDOSE",
        ImagePositionPatient=[-10, -20, -30],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        PixelSpacing=[1.1, 0.8],
        GridFrameOffsetVector=[3.0 * k for k in range(6)],
        DoseGridScaling="0.002",
    )
    dose.save_as(tmp_path / "dose.dcm", enforce_file_format=True)
    scan = dicom.read(tmp_path / "dose.dcm")
    assert np.allclose(scan.values, stored * 0.002)
    assert apart_mm(scan.affine, AFFINE, SHAPE) < 1e-4


# -- multi-frame -----------------------------------------------------------------------------------


def lose_positions(dataset):
    for group in dataset.PerFrameFunctionalGroupsSequence:
        del group.PlanePositionSequence


def lose_a_group(dataset):
    dataset.PerFrameFunctionalGroupsSequence = dataset.PerFrameFunctionalGroupsSequence[:-1]


def two_echoes(dataset):
    groups = dataset.PerFrameFunctionalGroupsSequence
    for place, group in enumerate(groups):
        group.PlanePositionSequence = groups[place % 3].PlanePositionSequence


def no_groups(dataset):
    del dataset.PerFrameFunctionalGroupsSequence
    del dataset.SharedFunctionalGroupsSequence


@pytest.mark.parametrize(
    ("change", "what", "got"),
    [
        (lose_positions, "multi-frame file cannot be derived", "6 of 6 slices"),
        (no_groups, "multi-frame file cannot be derived", "6 of 6 slices"),
        (lose_a_group, "does not describe each of its frames", "6 functional groups"),
        (two_echoes, "several volumes", "2 slices at each of 3 positions"),
    ],
)
def test_each_error_of_a_multi_frame_file(tmp_path, stored, change, what, got):
    text = error_of(enhanced(tmp_path / "a.dcm", stored, AFFINE, change=change))
    assert what in text and got in text


def test_directions_per_frame_are_split(tmp_path, stored):
    def turn_half(dataset):
        orientation = dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
        for place, group in enumerate(dataset.PerFrameFunctionalGroupsSequence):
            group.PlaneOrientationSequence = (
                item(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]) if place > 3 else orientation
            )

    path = enhanced(tmp_path / "a.dcm", stored, AFFINE, change=turn_half)
    text = error_of(path)
    assert "2 stacks of slices in 1 series" in text
    scan = dicom.read(path, SeriesRule(slices=(4, 4)))
    assert np.array_equal(scan.values, stored[:, :, :4])


# -- writing ---------------------------------------------------------------------------------------


def test_what_is_recovered_lies_where_the_scan_does_and_names_nobody(tmp_path, stored):
    series(
        tmp_path / "t1", stored, AFFINE, SeriesDescription="Doe^Jane", PatientComments="Doe^Jane"
    )
    kind = modality(VOLUME)
    value = kind.read(tmp_path, "Patient p")
    path = kind.write(tmp_path, value.values, None, value.source.affine)
    image = nib.load(path)
    for affine in (image.get_sform(), image.get_qform()):
        assert apart_mm(affine, value.source.affine, VOLUME.shape[1:]) < 1e-4
    middle = image.affine @ [7.5, 7.5, 7.5, 1]
    assert np.allclose(middle, AFFINE @ [*((np.array(SHAPE) - 1) / 2), 1], atol=1e-4)
    content = gzip.decompress(path.read_bytes())
    assert not any(secret.encode() in content for secret in (*SECRETS, "Doe"))
    assert str(tmp_path).encode() not in content


# -- pictures --------------------------------------------------------------------------------------


def film(tmp_path, array, **fields):
    sop = fields.pop("sop", DigitalXRayImageStorageForPresentation)
    header(sop, array, "1.2.3.4.5", 1, "DX", **fields).save_as(
        tmp_path / "film.dcm", enforce_file_format=True
    )
    return tmp_path


def test_a_radiograph_is_read_as_it_is_shown(tmp_path):
    array = np.arange(16 * 16, dtype=np.uint16).reshape(16, 16)
    value = modality(FILM).read(film(tmp_path, array), "Patient p")
    assert np.array_equal(value.values[0].numpy(), array)
    assert "spacing" not in value.source.facts


@pytest.mark.parametrize(
    "sizes",
    [
        {"PixelSpacing": [0.5, 1.0]},
        {"PixelSpacing": [0.5, 1.0], "ImagerPixelSpacing": [0.7, 1.4]},
        {"ImagerPixelSpacing": [0.5, 1.0]},
    ],
)
@pytest.mark.parametrize(
    ("modality_code", "sop"),
    [
        ("CR", ComputedRadiographyImageStorage),
        ("DX", DigitalXRayImageStorageForPresentation),
        ("MG", DigitalMammographyXRayImageStorageForPresentation),
        ("RF", XRayRadiofluoroscopicImageStorage),
        ("XA", XRayAngiographicImageStorage),
    ],
)
def test_a_projection_whose_place_in_the_body_is_stated_is_read(
    tmp_path, modality_code, sop, sizes
):
    array = np.arange(16 * 16, dtype=np.uint16).reshape(16, 16)
    film(
        tmp_path,
        array,
        sop=sop,
        Modality=modality_code,
        ImagePositionPatient=[10, -20, 30],
        ImageOrientationPatient=[0.6, 0.8, 0, 0, 0, -1],
        **sizes,
    )
    scan = dicom.read(tmp_path / "film.dcm")
    assert scan.facts.spacing_mm[:2] == pytest.approx((1.0, 0.5))
    assert np.allclose(scan.affine[:3, 3], [-10, 20, 30])
    assert np.array_equal(scan.values[:, :, 0].T, array)


@pytest.mark.parametrize("keyword", ["PixelSpacing", "ImagerPixelSpacing"])
def test_the_pixel_size_of_a_radiograph_is_heeded(tmp_path, keyword):
    array = np.tile(np.repeat([100, 900], 8).astype(np.uint16), (16, 1))
    film(tmp_path, array, **{keyword: [0.5, 1.0]})  # 16 rows of 0.5, 16 columns of 1 mm
    spec = ModalitySpec(**{**FILM.__dict__, "spacing_mm": (1.0, 1.0)})
    values = modality(spec).read(tmp_path, "Patient p").values[0].numpy()
    assert (values[:4] == 0).all() and (values[12:] == 0).all()
    assert (values[4:12, :8] == 100).all() and (values[4:12, 8:] == 900).all()
    film(tmp_path, array, sop=SecondaryCaptureImageStorage)
    with pytest.raises(PatientDataError, match="states no pixel size"):
        modality(spec).read(tmp_path, "Patient p")


def test_dimensions_must_fit(tmp_path, stored):
    film(tmp_path, stored[:, :, 0].T)
    with pytest.raises(PatientDataError, match="single slice"):
        modality(ModalitySpec(**{**VOLUME.__dict__, "file": "film.dcm"})).read(tmp_path, "P")
    series(tmp_path / "film", stored, AFFINE)
    (tmp_path / "film.dcm").unlink()
    with pytest.raises(PatientDataError, match="is a volume"):
        modality(FILM).read(tmp_path, "Patient p")


# -- real files ------------------------------------------------------------------------------------

WHEEL = Path(pydicom.__file__).parent / "data" / "test_files"
READ = 45  # at least so many of the files in pydicom's wheel are scans that are read


def test_every_file_of_another_readers_tests_is_read_right_or_refused():
    read, refused = 0, 0
    for path in sorted(p for p in WHEEL.rglob("*") if p.is_file()):
        try:
            scan = dicom.read(path)
        except ScanError as error:
            assert error.what and error.remedy, path
            refused += 1
            continue
        read += 1
        truth = pydicom.dcmread(path, force=True)
        frames = int(truth.get("NumberOfFrames") or 1)
        assert scan.values.shape == (truth.Columns, truth.Rows, frames), path
        if "ImagePositionPatient" in truth:
            matrix = np.zeros((4, 4))
            directions = np.reshape([float(x) for x in truth.ImageOrientationPatient], (2, 3))
            rows, columns = (float(x) for x in truth.PixelSpacing)
            matrix[:3, 0], matrix[:3, 1] = directions[0] * columns, directions[1] * rows
            matrix[:3, 3], matrix[3, 3] = [float(x) for x in truth.ImagePositionPatient], 1
            size = (truth.Columns, truth.Rows, 1)
            assert apart_mm(scan.affine, to_ras(matrix), size) < 0.01, path
        try:
            pixels = truth.pixel_array.astype(float)
        except (RuntimeError, NotImplementedError, AttributeError, ValueError):
            continue  # a compression that pydicom does not read here
        if truth.PhotometricInterpretation == "MONOCHROME1":
            pixels = 2.0**truth.BitsStored - 1 - pixels
        scale = truth.get("DoseGridScaling") or truth.get("RescaleSlope") or 1
        pixels = pixels * float(scale) + float(truth.get("RescaleIntercept") or 0)
        pixels = pixels.reshape(frames, truth.Rows, truth.Columns)
        real = np.ones(scan.values.shape, bool) if scan.padding is None else ~scan.padding
        assert np.allclose(scan.values[real], pixels.T[real], rtol=1e-6, atol=1e-3), path
    assert read >= READ and refused >= READ


@pytest.mark.shared
def test_real_series():
    root = shared_data("dicom")
    for name in ("emri_small", "emri_small_RLE", "emri_small_big_endian"):
        path = root / "pydicom_data_mit" / f"{name}.dcm"
        assert "geometry of the DICOM multi-frame file" in error_of(path)
    assert "several DICOM series" in error_of(root / "sim_0001_axial")
    scan = dicom.read(root / "sim_0002_oblique_6.5mm" / "06_flair")
    assert scan.values.shape[2] == 27 and scan.facts.spacing_mm[2] == pytest.approx(6.5, abs=1e-3)
    assert dicom.read(root / "torchio_test_apache2").values.shape == (88, 128, 17)
