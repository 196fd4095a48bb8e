"""The use audit: which modality a bundle's answers rest on."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from dymo_med.bundle import load_bundle
from dymo_med.data.batch import collate
from dymo_med.data.cohort import read_cohort
from dymo_med.data.patient import read_record
from dymo_med.inference.check import check
from dymo_med.inference.evaluate import evaluate
from dymo_med.inference.pdf import write_pdf
from dymo_med.inference.prediction_file import read_prediction
from dymo_med.references import features_of
from dymo_med.tasks import PLAIN
from dymo_med.training.objectives import encode_all
from dymo_med.training.references import Held
from dymo_med.training.train import train
from dymo_med.training.use import audit_use, warnings_of
from dymo_med.types import Interval, UseRow

SPLITS = ["train"] * 40 + ["validation"] * 40 + ["calibration"] * 20
RECIPE = {
    "name": "tiny",
    "description": "For tests only.",
    "imputer": {"name": "mopoe", "latent": 4, "dim": 8, "width": 4, "grid": 2, "hidden": 8},
    "backbone": {
        "name": "transformer",
        "dim": 16,
        "heads": 2,
        "layers": 1,
        "projection": 6,
        "image_encoders": ["descriptors"],
        "table_encoder": "row",
    },
    "imputer_training": {"epochs": 1, "batch_size": 20},
    "backbone_training": {"epochs": 25, "batch_size": 20, "learning_rate": 0.01, "subsets": 2},
}


def write(folder, informative):
    """Write 100 patients of a scan and a table, only one of which tells the classes apart."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    description = {
        "name": "tiny",
        "task": {"type": "classification", "target": "grade", "classes": ["low", "high"]},
        "modalities": {
            "scan": {"kind": "image", "dims": 3, "file": "scan.nii.gz", "size": [8, 8, 8],
                     "spacing_mm": [4, 4, 4]},
            "labs": {"kind": "table", "file": "labs.csv", "columns": {
                "ldh": {"type": "continuous", "unit": "U/L"}}},
        },
    }  # fmt: skip
    (folder / "cohort.yaml").write_text(yaml.safe_dump(description, sort_keys=False))
    labels, splits = ["record_id,patient_id,grade"], ["patient_id,split"]
    for number, split in enumerate(SPLITS):
        name, high = f"p{number:02d}", number % 2
        labels.append(f"{name},{name},{['low', 'high'][high]}")
        splits.append(f"{name},{split}")
        own = folder / "patients" / name
        own.mkdir(parents=True)
        voxels = rng.normal(100, 10, (8, 8, 8))
        voxels[2:5, 2:5, 2:5] += 60 * (high if informative == "scan" else number // 2 % 2)
        voxels[0] = 0
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.diag([4, 4, 4, 1.0])),
                 own / "scan.nii.gz")  # fmt: skip
        ldh = rng.normal(300 if informative == "labs" and high else 200, 30)
        (own / "labs.csv").write_text(f"ldh\n{ldh:.1f}\n")
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    (folder / "splits.csv").write_text("\n".join(splits) + "\n")
    return folder


@pytest.fixture(scope="module", params=["scan", "labs"])
def trained(request, tmp_path_factory):
    """The informative modality, its cohort, the bundle's folder, and what train warned of."""
    folder = tmp_path_factory.mktemp(request.param)
    cohort = write(folder / "cohort", request.param)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    said = []
    bundle = train(folder / "recipe.yaml", cohort, folder / "run", device="cpu", warn=said.append)
    return request.param, cohort, bundle, said


def test_the_audit_names_what_is_used(trained):
    informative, _, folder, _ = trained
    bundle = load_bundle(folder, "cpu")
    other = {"scan": "labs", "labs": "scan"}[informative]
    used, idle = bundle.use.of(informative), bundle.use.of(other)
    assert used.verdict == "used"
    assert used.p <= 0.05 < idle.p
    assert used.auroc_loss.low > 0.1 > idle.auroc_loss.value
    assert used.alone.low > 0.5
    assert idle.verdict != "used" and not idle.neglected
    assert bundle.use.patients == 40
    card = (folder / "docs" / "README.md").read_text()
    assert f"| {informative} | 40 | used |" in card
    about = check(folder).about
    assert f"used: {informative}" in about["use of modalities"]
    assert "boosting" in about["references"]


def test_a_network_that_does_not_see_is_caught(trained):
    informative, root, folder, _ = trained
    if informative != "scan":
        pytest.skip("of the cohort whose scans tell")
    bundle = load_bundle(folder, "cpu")
    cohort = read_cohort(root)
    held = []
    with torch.no_grad():
        for parameter in bundle.backbone.encoders["scan"].parameters():
            parameter.zero_()
        for split in ("validation", "calibration"):
            read = [read_record(e, bundle.specs, ()) for e in cohort.in_split(split)]
            batch = collate(read, bundle.specs)
            found = encode_all(bundle.backbone, batch, torch.device("cpu"))
            held.append(Held(batch, features_of(batch, bundle.specs), found, 1.0))
        use = audit_use(held, replace(bundle.references, weight=1.0, partner=""), PLAIN, 0)
    row = use.of("scan")
    assert row.verdict == "unused" and row.neglected
    assert row.change < 1e-6 and row.p == 1
    assert [w for w in warnings_of(use) if "does not use scan" in w]


def test_pages_say_what_is_not_used_and_what_a_plain_reference_says(trained, tmp_path):
    _, root, folder, _ = trained
    bundle = load_bundle(folder, "cpu")
    rows = tuple(replace(r, change=0.001, p=0.5) for r in bundle.use.rows if r.part == "labs")
    rows = tuple(replace(r, alone=Interval(0.5, 0.4, 0.6)) for r in rows)
    references = replace(bundle.references, weight=0.25, partner="logistic")
    bundle = replace(bundle, use=replace(bundle.use, rows=rows), references=references)
    cohort = read_cohort(root)
    evaluate(bundle, cohort, tmp_path / "o", split="calibration", allow_overlap=True, reports=1)
    page = (tmp_path / "o" / "index.html").read_text(encoding="utf-8")
    assert "Which modalities the model uses" in page and "plain: boosting" in page
    (report,) = (tmp_path / "o" / "reports").iterdir()
    text = (report / "report.html").read_text(encoding="utf-8")
    assert "This model does not use labs" in text
    assert "A plain reference without a network (logistic regression)" in text
    assert "25 % that of the network and 75 % that of this reference" in text
    file = read_prediction(report / "prediction.json")
    assert file.plain.use == {"labs": "unused"} and file.plain.weight == 0.25
    assert render_pdf(file, tmp_path) > 1000


def render_pdf(file, folder):
    """Return the size of a prediction's page as a PDF."""
    write_pdf(file, folder / "r.pdf")
    return (folder / "r.pdf").stat().st_size


@pytest.mark.parametrize(
    ("change", "p", "alone", "verdict"),
    [
        (None, None, None, "untested"),
        (0.003, 0.01, 0.4, "unused"),  # a difference without a distinction
        (0.003, 0.4, 0.6, "unproven"),  # redundant: it tells, beside others nothing new
        (0.1, 0.01, 0.4, "used"),
        (0.1, 0.4, 0.4, "unproven"),
    ],
)
def test_verdicts(change, p, alone, verdict):
    nothing, some = Interval(None, None, None), Interval(0.7, alone, 0.9)
    row = UseRow("x", 20, change, nothing, nothing, p, some, nothing)
    assert row.verdict == verdict and not row.neglected
