"""Bundles stored with the tests answer as they did when they were stored.

`tests/figures` holds a tiny bundle of each task, trained by an earlier version, and every figure
that it gave for the tiny cohort. A change of layout must not move any of them. Where a change of
behaviour is meant to, write them anew and say why in the commit:

    python -m tests.contracts.test_figures
"""

import csv
import json
import math
import tempfile
from pathlib import Path

import pytest

from dymo_med.bundle import load_bundle
from dymo_med.bundle_segmentation import load_segmentation_bundle
from dymo_med.data.cohort import read_cohort
from dymo_med.inference import evaluate as cohorts
from dymo_med.inference import quality
from dymo_med.inference.evaluate import evaluate
from dymo_med.inference.predict import predict_patient
from dymo_med.inference.segment import segment_patient
from dymo_med.inference.segment_evaluate import evaluate_segmentation
from tests.contracts.conftest import write_tiny

FIGURES = Path(__file__).resolve().parents[1] / "figures"
TASKS = ("classification", "regression", "segmentation")
SCENARIOS = ("as-is", "drop:t1")
# Of a prediction: pictures, and what is of this machine or this version of the software.
_LEFT_OUT = (
    *("exhibits", "versions", "bundle_version", "device", "sources", "command"),
    "content_sha256",  # of all of these
)
_TOLERANCE = 1e-6


def figures_of(task: str, cohort: Path, out: Path) -> dict[str, object]:
    """Return what the stored bundle of a task says of the tiny cohort."""
    described = read_cohort(cohort / f"{task}.yaml")
    patient = cohort / "patients" / "p18"
    settings = {"scenarios": SCENARIOS, "seed": 3}
    if task == "segmentation":
        outline = load_segmentation_bundle(FIGURES / task, "cpu")
        evaluate_segmentation(outline, described, out / "evaluation", **settings)
        segment_patient(patient, outline, out / "prediction", seed=3)
    else:
        bundle = load_bundle(FIGURES / task, "cpu")
        evaluate(bundle, described, out / "evaluation", reports=False, **settings)
        predict_patient(patient, bundle, out / "prediction", seed=3, draws=5)
    told = json.loads((out / "prediction" / "prediction.json").read_text())
    found = {"prediction.json": {k: v for k, v in told.items() if k not in _LEFT_OUT}}
    for path in sorted((out / "evaluation").glob("*.csv")):
        with path.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        found[path.name] = {k: [_number(row[k]) for row in rows] for k in (rows or [{}])[0]}
    return found


def _number(cell: str) -> float | str:
    try:
        value = float(cell)
    except ValueError:
        return cell
    return value if math.isfinite(value) else cell


def differences(path: str, was: object, now: object) -> list[str]:
    """Return where two figures, or what holds them, differ; what is new is no difference."""
    if isinstance(was, int | float) and isinstance(now, int | float):
        same = math.isclose(was, now, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
        return [] if same else [f"{path}: {was} is now {now}"]
    if isinstance(was, dict) and isinstance(now, dict) and was.keys() <= now.keys():
        # A hash is of everything, of what is new too.
        kept = [k for k in was if k != "content_sha256"]
        return [d for k in kept for d in differences(f"{path}.{k}", was[k], now[k])]
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        pairs = enumerate(zip(was, now, strict=True))
        return [d for i, (a, b) in pairs for d in differences(f"{path}[{i}]", a, b)]
    return [] if was == now else [f"{path}: {was!r:.80} is now {now!r:.80}"]


def _plain(patch: pytest.MonkeyPatch) -> None:
    """Leave out pages and plots, which take most of a small evaluation's time."""
    for name in ("write_pages", "write_number_page"):
        patch.setattr(cohorts, name, lambda *_, **__: None)
    for name in ("_plot", "_plot_pictures"):
        patch.setattr(quality, name, lambda *_: None)


@pytest.mark.parametrize("task", TASKS)
def test_a_stored_bundle_answers_as_it_did(task, tiny, tmp_path, monkeypatch):
    _plain(monkeypatch)
    was = json.loads((FIGURES / f"{task}.json").read_text())
    now = json.loads(json.dumps(figures_of(task, tiny.root / "cohort", tmp_path)))
    assert not differences(task, was, now)


def test_a_figure_that_moves_is_seen():
    was = {"a": [1.0, "low", None], "b": 2}
    assert not differences("", was, {"a": [1.0 + 1e-8, "low", None], "b": 2, "c": 3})
    for now in ({**was, "a": [1.1, "low", None]}, {**was, "a": [1.0, "high", None]}, {"a": was}):
        assert differences("", was, now)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        _plain(patch)
        root = write_tiny(Path(folder) / "cohort")
        for one in TASKS:
            stored = json.dumps(figures_of(one, root, Path(folder) / one), separators=(",", ":"))
            (FIGURES / f"{one}.json").write_text(stored + "\n")
