"""What this program made up is not taken for measured; files that nobody looks at are named."""

import json
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK
from PIL import Image

from dymo_med.cli import main
from dymo_med.data.patient import read_patient, unused_files
from dymo_med.errors import RefusedError
from dymo_med.inference.check import check
from dymo_med.inference.predict import predict_patient
from dymo_med.inference.recovered import impute_patient
from dymo_med.modalities.made_up import SYNTHETIC
from tests.dicom_files import enhanced, series


@pytest.fixture(scope="module")
def made(bundle, cohort_dir, tmp_path_factory):
    """A whole patient and what is recovered of one who has a photograph and blank cells only."""
    folder = tmp_path_factory.mktemp("made")
    whole = cohort_dir / "patients" / "p000"
    little = folder / "little"
    little.mkdir()
    shutil.copy(whole / "photo.png", little)
    impute_patient(little, bundle, folder / "out")
    (folder / "photo").mkdir()
    shutil.copy(whole / "t1.nii.gz", folder / "photo")
    impute_patient(folder / "photo", bundle, folder / "other")
    return whole, folder / "out" / "recovered", folder / "other" / "recovered"


def as_nrrd(source, folder):
    SimpleITK.WriteImage(SimpleITK.ReadImage(source / "t1_synthetic.nii.gz"), folder / "t1.nrrd")


def as_metaimage(source, folder):
    SimpleITK.WriteImage(SimpleITK.ReadImage(source / "t1_synthetic.nii.gz"), folder / "t1.mha")
    with (folder / "t1.mha").open("rb") as stream:
        content = stream.read()
    # ITK drops the note; one who keeps it writes it here.
    (folder / "t1.mha").write_bytes(b"Comment = " + SYNTHETIC.encode() + b"\n" + content)


def as_nifti(source, folder):
    nib.save(nib.load(source / "t1_synthetic.nii.gz"), folder / "t1.nii")


def stretched(source, folder):
    """Changed voxels, the header as it was."""
    image = nib.load(source / "t1_synthetic.nii.gz")
    changed = nib.Nifti1Image(image.get_fdata() * 100 + 300, image.affine, image.header)
    nib.save(changed, folder / "t1.nii.gz")


def in_an_extension(source, folder):
    image = nib.load(source / "t1_synthetic.nii.gz")
    image.header["descrip"] = b"FSL"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", SYNTHETIC.encode()))
    nib.save(image, folder / "t1.nii.gz")


def renamed(source, folder):
    shutil.copy(source / "t1_synthetic.nii.gz", folder / "t1.nii.gz")


def as_dicom(write, keyword):
    """A header carries the note on, as converters do with a NIfTI's description."""

    def bring(source, folder):
        image = nib.load(source / "t1_synthetic.nii.gz")
        stored = np.rint(image.get_fdata()).astype(np.int16)

        def change(dataset, _number=0):
            setattr(dataset, keyword, SYNTHETIC)

        where = folder / "t1" / ("one.dcm" if write is enhanced else "")
        write(where, stored, image.affine, change=change)

    return bring


DICOM = {
    f"{write.__name__}, {keyword}": as_dicom(write, keyword)
    for write in (series, enhanced)
    for keyword in ("ImageComments", "DerivationDescription", "SeriesDescription")
}


@pytest.mark.parametrize(
    "bring",
    [renamed, as_nifti, stretched, in_an_extension, as_nrrd, as_metaimage, *DICOM.values()],
    ids=["renamed", "nifti", "stretched", "extension", "nrrd", "metaimage", *DICOM],
)
def test_a_recovered_scan_is_refused(made, bundle, tmp_path, bring):
    patient = shutil.copytree(made[0], tmp_path / "p")
    (patient / "t1.nii.gz").unlink()
    bring(made[1], patient)
    with pytest.raises(RefusedError, match="not measured") as error:
        read_patient(patient, bundle.specs)
    assert error.value.checks == ("made_up",)


def png(folder, source):
    shutil.copy(source / "photo_synthetic.png", folder / "photo.png")


def tiff(folder, source):
    with Image.open(source / "photo_synthetic.png") as picture:
        picture.save(folder / "photo.tif", description=picture.text["Description"])


def jpeg(folder, source):
    with Image.open(source / "photo_synthetic.png") as picture:
        picture.save(folder / "photo.jpg", comment=picture.text["Description"].encode())


@pytest.mark.parametrize("bring", [png, tiff, jpeg])
def test_a_recovered_picture_is_refused(made, bundle, tmp_path, bring):
    patient = shutil.copytree(made[0], tmp_path / "p")
    (patient / "photo.png").unlink()
    bring(patient, made[2])
    with pytest.raises(RefusedError, match="photo: it was not measured"):
        read_patient(patient, bundle.specs)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".parquet", ";"])
def test_a_recovered_table_is_refused(made, bundle, tmp_path, ending):
    patient = shutil.copytree(made[0], tmp_path / "p")
    (patient / "ehr.csv").unlink()
    table = pd.read_csv(made[1] / "labs_synthetic.csv")
    if ending == ".json":
        (patient / "ehr.json").write_text(table.to_json(orient="records"))
    elif ending == ".parquet":
        table.to_parquet(patient / "ehr.parquet")
    else:
        name = "ehr.csv" if ending == ";" else f"ehr{ending}"
        separator = {".tsv": "\t", ";": ";"}.get(ending, ",")
        table.to_csv(patient / name, sep=separator, index=False)
    with pytest.raises(RefusedError, match="not measured"):
        read_patient(patient, bundle.specs)


def test_a_measured_scan_is_not_taken_for_a_made_up_one(made, bundle, tmp_path):
    assert set(read_patient(made[0], bundle.specs).modalities) == {s.name for s in bundle.specs}


def test_commands_refuse_what_was_made_up_and_can_go_on_without(made, bundle_dir, tmp_path, capsys):
    patient = shutil.copytree(made[0], tmp_path / "p")
    renamed(made[1], patient)
    assert check(patient, bundle_dir).rows[0].states["t1"] == "refuse"
    command = ["-i", str(patient), "-b", str(bundle_dir), "-o", str(tmp_path / "out"), "-d", "cpu"]
    for name in ("predict", "impute"):
        with pytest.raises(SystemExit) as stopped:
            main([name, *command])
        assert stopped.value.code == 3 and "not measured" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["predict", *command, "--treat-refused-as-missing", "--no-explain", "--draws", "0"])
    said = json.loads((tmp_path / "out" / "prediction.json").read_text(encoding="utf-8"))
    assert stopped.value.code == 0 and said["refused"] == ["t1"] and "t1" not in said["observed"]


# --- Files that nobody looks at -------------------------------------------------------------------


def test_scans_under_other_names_are_named(made, bundle, tmp_path, caplog):
    patient = shutil.copytree(made[0], tmp_path / "p")
    (patient / "t1.nii.gz").rename(patient / "sub-03_T1w.nii.gz")
    (patient / "sub-03_T1w.json").write_text("{}")
    (patient / ".DS_Store").write_text("")
    found = predict_patient(patient, bundle, tmp_path / "out", explain=False, draws=0)
    sentence = found.warnings[0]
    assert "not looked at: sub-03_T1w.nii.gz. Counted as missing: t1. Check" in sentence
    assert (
        sentence
        in json.loads((tmp_path / "out" / "prediction.json").read_text(encoding="utf-8"))[
            "warnings"
        ]
    )
    assert "sub-03_T1w.nii.gz" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    impute_patient(patient, bundle, tmp_path / "made")
    assert sentence in caplog.text
    kept = json.loads(
        (tmp_path / "made" / "recovered" / "recovered.json").read_text(encoding="utf-8")
    )
    assert kept["unused"] == ["sub-03_T1w.nii.gz"]


def test_what_is_no_surprise_is_not_named(tmp_path):
    for name in ("t1.nii.gz", "t1.json", "photo.txt", "photo.png", ".hidden", "dwi.nii.gz"):
        (tmp_path / name).write_text("")
    for name in ("dwi.bval", "dwi.bvec", "notes.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "out" / "recovered").mkdir(parents=True)
    (tmp_path / "out" / "recovered" / "recovered.json").write_text("{}")
    (tmp_path / "scans").mkdir()
    files = ["t1.nii.gz", "photo.png"]
    assert list(unused_files(tmp_path, files)) == ["dwi.nii.gz", "notes.txt", "scans/"]
