"""The pages of the documentation, held to the code."""

import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer

from dymo_med.cli import app
from dymo_med.comparators import COMPARATORS
from dymo_med.config import BackboneTraining, CohortFile, Document, Recipe, Schedule
from dymo_med.data.batch import collate
from dymo_med.data.cohort import read_cohort
from dymo_med.data.patient import read_record
from dymo_med.imputers import IMPUTERS
from dymo_med.inference.assemble import STEP_COLUMNS
from dymo_med.metrics import METRICS
from dymo_med.modalities.table import ColumnEntry, TableEntry
from dymo_med.modalities.units import MOLAR_MASS
from dymo_med.testing import check_imputer
from dymo_med.types import Prediction

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    {
        *ROOT.glob("*.md"),
        *DOCS.rglob("*.md"),
        *(ROOT / "cohorts").rglob("*.md"),
        *(ROOT / "findings").glob("*.md"),
    },
)
COMMANDS = typer.main.get_command(app).commands


def code_blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def anchors(page):
    """The ids that headings get, as on GitHub."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    broken = []
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = [p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")]
    assert not [p for p in pages if p != "README.md" and f"({p})" not in index]


def test_every_finding_is_listed_and_says_what_dymo_med_does():
    listed = (ROOT / "findings" / "README.md").read_text(encoding="utf-8")
    answered = (DOCS / "reference" / "outside.md").read_text(encoding="utf-8")
    scripts = sorted((ROOT / "findings").glob("*.sh"))
    assert scripts
    for script in scripts:
        head, *body = script.read_text(encoding="utf-8").split("\nset -eu\n")
        assert [line for line in body if "mktemp -d" in line and "trap" in line], script.name
        assert all(f"# {part}: " in head for part in ("Expected", "Found", "Who meets it"))
        assert f"({script.name})" in listed and f"/findings/{script.name})" in answered


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_reference(command):
    text = (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {command}\n")[1].split("\n## ")[0]
    shared = text.split("\n## ")[0]
    for parameter in COMMANDS[command].params:
        if parameter.param_type_name == "argument":
            assert parameter.name.upper() in section
            continue
        for name in (*parameter.opts, *parameter.secondary_opts):
            assert f"`{name}`" in section or name in ("--help", "-h")
    for name in set(re.findall(r"`(--?[a-z-]+)`", section)):
        known = {o for p in COMMANDS[command].params for o in p.opts}
        assert name in known, f"{command} has no {name}"
    assert "`--help`" in shared


def test_every_field_of_a_prediction_is_in_the_reference():
    text = (DOCS / "reference" / "outputs.md").read_text(encoding="utf-8")
    names = [f.name for f in fields(Prediction)]
    assert not [n for n in (*names, *STEP_COLUMNS, *METRICS) if f"`{n}`" not in text]


def test_every_key_of_recipes_and_cohorts_is_in_the_reference():
    recipe = (DOCS / "reference" / "recipe.md").read_text(encoding="utf-8")
    entries = (*IMPUTERS.values(), *COMPARATORS.values())
    for model in (Recipe, Schedule, BackboneTraining, *(e.Options for e in entries)):
        assert not [n for n in model.model_fields if f"`{n}" not in recipe]
    cohort = (DOCS / "reference" / "cohort.md").read_text(encoding="utf-8")
    for model in (CohortFile, TableEntry, ColumnEntry):
        assert not [n for n in model.model_fields if not re.search(rf"`{n}(:.*)?`", cohort)]
    assert not [name for name in MOLAR_MASS if name not in " ".join(cohort.split())]


@pytest.mark.parametrize(
    ("page", "model"),
    [
        ("reference/recipe.md", Recipe),
        ("how-to/train-a-bundle.md", Recipe),
        ("reference/cohort.md", CohortFile),
        ("how-to/fhir.md", CohortFile),
        ("how-to/bids.md", CohortFile),
    ],
)
def test_yaml_examples_are_valid(page, model, tmp_path):
    (block,) = code_blocks(DOCS / page, "yaml")
    path = tmp_path / "example.yaml"
    path.write_text(block)
    Document(path).parse(model)


def test_python_examples_run(bundle_dir, cohort_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/bundle").symlink_to(bundle_dir)
    Path("cohort").symlink_to(cohort_dir)
    Path("patient").symlink_to(cohort_dir / "patients" / "p001")
    names = {}
    for block in code_blocks(DOCS / "how-to" / "use-from-python.md", "python"):
        exec(compile(block, "use-from-python.md", "exec"), names)
    assert names["prediction"].recovered
    assert all(file.is_file() for file in names["files"])
    assert (names["folder"] / "checksums.json").is_file()


def test_the_fhir_record_of_the_how_to_is_read(tmp_path):
    page = DOCS / "how-to" / "fhir.md"
    (described,), (record,) = code_blocks(page, "yaml"), code_blocks(page, "json")
    (tmp_path / "cohort.yaml").write_text(described)
    (tmp_path / "patients" / "p1").mkdir(parents=True)
    (tmp_path / "patients" / "p1" / "fhir.json").write_text(record)
    (tmp_path / "labels.csv").write_text("patient_id,outcome\np1,yes\n")
    (tmp_path / "splits.csv").write_text("patient_id,split\np1,test\n")
    cohort = read_cohort(tmp_path)
    read = read_record(cohort.records[0], cohort.specs).modalities["clinical"]
    assert read.values.tolist() == pytest.approx([0, 64, 90.078, 120])
    assert "90.078 mg/dL, systolic 120 mmHg" in page.read_text(encoding="utf-8")


def test_the_dataset_of_the_how_to_is_read(cohort_dir, tmp_path):
    page = DOCS / "how-to" / "bids.md"
    (described,) = code_blocks(page, "yaml")
    (participants,), (splits,) = code_blocks(page, "tsv"), code_blocks(page, "csv")
    for name, text in (
        ("cohort.yaml", described),
        ("participants.tsv", participants),
        ("splits.csv", splits),
        ("dataset_description.json", "{}"),
    ):
        (tmp_path / name).write_text(text)
    for folder, name in (
        ("sub-01/anat", "sub-01_T1w"),
        ("sub-02/ses-a/anat", "sub-02_ses-a_acq-fast_T1w"),
        ("sub-02/ses-a/anat", "sub-02_ses-a_acq-fast_FLAIR"),
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        scan = cohort_dir / "patients" / "p000" / ("t2" if "FLAIR" in name else "t1")
        (tmp_path / folder / f"{name}.nii.gz").symlink_to(f"{scan}.nii.gz")
    cohort = read_cohort(tmp_path)
    read = {e.record_id: read_record(e, cohort.specs, ("n/a",)) for e in cohort.records}
    assert {r: list(record.modalities) for r, record in read.items()} == {
        "sub-01": ["t1", "demographics"],
        "sub-02_ses-a": ["t1", "flair", "demographics"],
    }
    filled = read["sub-02_ses-a"].modalities["demographics"].observed_fields
    assert filled.tolist() == [False, True]


def test_the_imputer_in_the_how_to_recovers(bundle, records, tmp_path, monkeypatch):
    (block,) = code_blocks(DOCS / "how-to" / "add-an-imputer.md", "python")
    (tmp_path / "average_of_the_page.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    kind = importlib.import_module("average_of_the_page").Average
    imputer = kind(bundle.specs, kind.Options())
    batch = collate(records, bundle.specs)
    recovery = imputer.recover(batch)
    assert bool(recovery.recovered.any())
    assert all(bool(v.isfinite().all()) for v in recovery.values.values())
    loss = imputer.loss(batch, torch.Generator())
    loss.sum().backward()
    assert loss.shape == (len(records),)
    check_imputer(kind, {"latent": 3})


def test_the_comparator_in_the_how_to_answers(bundle, records, tmp_path, monkeypatch):
    (block,) = code_blocks(DOCS / "how-to" / "add-a-comparator.md", "python")
    (tmp_path / "late_mean_of_the_page.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    kind = importlib.import_module("late_mean_of_the_page").LateMean
    comparator = kind(bundle.specs, 2, kind.Options(dim=16, width=4)).eval()
    batch = collate(records, bundle.specs)
    logits = comparator(batch)
    assert logits.shape == (len(records), 2) and bool(logits.isfinite().all())
    assert torch.allclose(comparator(batch.rows(torch.tensor([2])))[0], logits[2], atol=1e-5)
    comparator.loss(batch, torch.Generator()).sum().backward()


def test_the_listener_of_the_how_to_answers(bundle_dir, tmp_path, monkeypatch):
    pynetdicom = pytest.importorskip("pynetdicom", reason="pynetdicom is a dev extra")
    from pydicom import dcmread

    from tests import dicom_files
    from tests.unit.test_dicom_outputs import AFFINE, head

    monkeypatch.chdir(tmp_path)
    (code,) = code_blocks(DOCS / "how-to" / "listen-for-dicom.md", "python")
    names = {"BUNDLE": str(bundle_dir), "PORT": 0}
    exec(compile(code, "listen-for-dicom.md", "exec"), names)
    try:
        sent = dicom_files.series(tmp_path / "scan", head(), AFFINE, SeriesDescription="T1")
        files = [dcmread(path) for path in sorted(sent.iterdir())]
        sender = pynetdicom.AE()
        for file in files:
            context = (file.SOPClassUID, file.file_meta.TransferSyntaxUID)
        sender.add_requested_context(*context)
        association = sender.associate(*names["server"].server_address)
        assert association.is_established
        assert {association.send_c_store(file).Status for file in files} == {0}
        done = tmp_path / "results" / files[0].StudyInstanceUID / "dicom"
        answered = names["handlers"][1][1]
        association.release()
        for thread in list(names["server"].active_associations):
            thread.join(60)
        assert answered.__name__ == "answer"
        assert dcmread(done / "sr.dcm").PatientID == files[0].PatientID
        assert not any((tmp_path / "inbox").iterdir())
    finally:
        names["server"].shutdown()


def _typed():
    """Yield every command line of ours that a page shows: page, words."""
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            shown = re.fullmatch(r"(?:    |\$ )(?:[A-Z_]+=\S+ )*dymo-med (.+)", line)
            if shown:
                words = shlex.split(shown[1].partition("    #")[0].rstrip("\\ "), comments=True)
                yield pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", _typed())
def test_commands_on_pages_have_these_options(words):
    if words[0].startswith("-") or words[0] == "COMMAND":
        return
    command = COMMANDS[words[0]]
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
    assert {w.partition("=")[0] for w in words[1:] if re.match("--?[a-z]", w)} <= known
