"""The layers of the package, and what it must not contain."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "dymo_med").rglob("*.py"))


def test_imports_go_down_only():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr


# Questions about which task it is, by file: what is left of them where two kinds of bundle are
# loaded and asked apart. No file may be added, and no number raised.
QUESTIONS = {
    "bundle/folder.py": 3,
    "bundle/reader.py": 1,
    "bundle_segmentation.py": 2,
    "cli.py": 4,
    "data/masks.py": 1,
    "inference/check.py": 1,
    "inference/matching.py": 1,
    "inference/segment_evaluate.py": 2,
    "training/segmentation.py": 1,
}


def test_tasks_answer_for_themselves():
    asks = re.compile(
        r"task_of\(|require_task\(|\btask\.type (==|!=|in)|\.task\.mask\b(?!s)"
        r"|\.task\.scale\b|isinstance\(.*\b(Classification|Regression|Segmentation|OverClasses)\b"
    )
    found = {}
    for path in SOURCES:
        name = path.relative_to(ROOT / "dymo_med").as_posix()
        number = sum(bool(asks.search(x)) for x in path.read_text(encoding="utf-8").splitlines())
        if number and not name.startswith("tasks/"):
            found[name] = number
    assert {n: k for n, k in found.items() if k > QUESTIONS.get(n, 0)} == {}
    assert {n: k for n, k in QUESTIONS.items() if k > found.get(n, 0)} == {}, "lower the ceiling"


def test_nothing_is_unpickled_fetched_or_reported_home():
    # Names of code systems look like addresses; nobody goes there.
    names = r"www\.w3\.org|loinc\.org|unitsofmeasure\.org|hl7\.org/fhir/|terminology\.hl7\.org|"
    names += r"dicom\.nema\.org/resources/ontology/"
    forbidden = re.compile(
        r"import pickle|pickle\.|torch\.load\(|joblib\.load|allow_pickle=True|yaml\.load\(|"
        rf"urllib\.request|\brequests\b|\bsocket\b|https?://(?!{names})"
    )
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in SOURCES
        for line in path.read_text(encoding="utf-8").splitlines()
        if forbidden.search(line)
    ]
    assert not found


def test_nothing_pulls_in_torchvision():
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    assert not re.search(r"^\s*(import|from) (torchvision|timm|multivae|torchcp)", text, re.M)


def test_public_functions_say_what_they_take_and_return():
    """Every public function or method has a docstring of the agreed form."""
    done = subprocess.run(
        [Path(sys.executable).with_name("ruff"), "check", "dymo_med"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_the_public_names_exist():
    import dymo_med

    for name in dymo_med.__all__:
        assert getattr(dymo_med, name) is not None
