"""Survival as the target: from labels to a bundle, a prediction, an evaluation and a review."""

import csv
import json

import numpy as np
import pytest
import yaml

from dymo_med.bundle import load_bundle
from dymo_med.cli import main
from dymo_med.data.cohort import read_cohort
from dymo_med.errors import BundleError, ConfigError
from dymo_med.inference.matching import adopted
from dymo_med.inference.prediction_file import read_prediction
from dymo_med.review import Pages, add_review, read_reviews

SPLITS = ["train"] * 70 + ["validation"] * 14 + ["calibration"] * 64 + ["test"] * 24
TASK = {
    "type": "survival",
    "time": "days",
    "event": "status",
    "unit": "days",
    "horizons": [200, 400],
    "bins": 3,
}
COHORT = {
    "name": "followed",
    "task": TASK,
    "modalities": {
        "text": {"kind": "tokens", "file": "text.npy", "length": 3, "features": 4},
        "about": {
            "kind": "table",
            "file": "about.csv",
            "columns": {"marker": {"type": "continuous"}},
        },
    },
}
RECIPE = {
    "name": "followed",
    "imputer": {"name": "template"},
    "backbone": {"name": "transformer", "dim": 8, "heads": 2, "layers": 1, "projection": 4},
    "comparators": [{"name": "moddrop", "dim": 8, "heads": 2, "hidden": 8}],
    "backbone_training": {"epochs": 8, "batch_size": 16, "learning_rate": 0.02, "subsets": 3},
}


def write_cohort(folder, task=None, labels=None):
    """Write a cohort in which both modalities say the hazard, each with its own noise."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    described = {**COHORT, "task": task or TASK}
    (folder / "cohort.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    rows, splits = ["patient_id,days,status"], ["patient_id,split"]
    for number, split in enumerate(SPLITS):
        name = f"v{number:03d}"
        splits.append(f"{name},{split}")
        x = rng.normal()
        death, end = rng.exponential(300 * np.exp(-x)), rng.uniform(50, 900)
        seen = f"{min(death, end):.0f},{'dead' if death <= end else 'alive'}"
        rows.append(f"{name},{',' if number == 20 else seen}")
        at = folder / "patients" / name
        at.mkdir(parents=True)
        if number % 4 != 1:
            noisy = x * np.linspace(-1, 1, 4) + rng.normal(0, 0.4, (3, 4))
            np.save(at / "text.npy", noisy.astype(np.float32))
        if number % 5 or number % 4 == 1:
            (at / "about.csv").write_text(f"marker\n{x + rng.normal(0, 0.4):.2f}\n")
    (folder / "labels.csv").write_text("\n".join(labels or rows) + "\n")
    (folder / "splits.csv").write_text("\n".join(splits) + "\n")
    return folder


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("followed") / "cohort")


@pytest.fixture(scope="module")
def trained(followed, tmp_path_factory):
    from dymo_med.training.train import train

    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    return train(recipe, followed, folder / "run", device="cpu")


@pytest.fixture(scope="module")
def bundle(trained):
    return load_bundle(trained, "cpu")


@pytest.fixture(scope="module")
def evaluated(trained, followed, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "out"
    call = ["evaluate", "-b", str(trained), "-c", str(followed), "-o", str(out), "--device", "cpu"]
    assert run(*call, "--missing", "as-is", "--missing", "rate:0.4", "--reports", "1") == 0
    return out


def run(*arguments):
    """Run the command line and return its exit code."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    return left.value.code or 0


def rows(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


# --- Reading --------------------------------------------------------------------------------------


def test_labels_become_bins_and_censored_patients_are_known(followed):
    cohort = read_cohort(followed)
    follow_up = cohort.task.follow_up
    assert cohort.task.columns == ("days", "status")
    assert len(follow_up.bins) == 4
    assert cohort.task.classes == follow_up.bins.names
    by_id = {r.record_id: r for r in cohort.records}
    assert not cohort.task.known(by_id["v020"])
    for record in cohort.records:
        if record.record_id == "v020":
            continue
        assert cohort.task.known(record)
        hidden = not record.event and record.value < follow_up.bins.last
        assert (record.label is None) == hidden
    assert any(r.label is None and cohort.task.known(r) for r in cohort.records)


WRONG = {
    "no time": ("v000,,dead", "no time"),
    "negative": ("v000,-3,dead", "no time"),
    "infinite": ("v000,inf,alive", "no time"),
    "words": ("v000,long,alive", "no time"),
    "no event": ("v000,30,", "whether the event occurred"),
    "another word": ("v000,30,perhaps", "whether the event occurred"),
    "a code": ("v000,30,2", "whether the event occurred"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_cells_that_are_no_survival(tmp_path, followed, kind):
    line, told = WRONG[kind]
    lines = (followed / "labels.csv").read_text(encoding="utf-8").splitlines()
    folder = write_cohort(tmp_path / "c", labels=[lines[0], line, *lines[2:]])
    with pytest.raises(ConfigError) as error:
        read_cohort(folder)
    (problem,) = error.value.problems
    assert told in problem.what
    assert "labels.csv:2" in problem.where
    assert problem.got == ""  # nothing of a patient's data is shown
    assert problem.remedy


@pytest.mark.parametrize(
    ("words", "dead", "alive"),
    [
        ({}, "1", "0"),
        ({}, "Dead", "ALIVE"),
        ({}, "1:DECEASED", "0:LIVING"),
        ({}, "TRUE", "False"),
        ({"occurred": ["relapse", 3], "censored": ["none", 4]}, "Relapse", "4"),
    ],
)
def test_events_as_cohorts_write_them(tmp_path, followed, words, dead, alive):
    text = (followed / "labels.csv").read_text(encoding="utf-8")
    text = text.replace("dead", dead).replace("alive", alive)
    folder = write_cohort(tmp_path / "c", {**TASK, **words}, text.splitlines())
    events = [r.event for r in read_cohort(folder).records]
    assert events == [r.event for r in read_cohort(followed).records]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"unit": "hours"}, "unit must be one of days, weeks, months, years"),
        ({"entry": "first_seen"}, "left truncation"),
        ({"event": "days"}, "two columns"),
        ({"horizons": [400, 200]}, "horizons must rise"),
        ({"horizons": []}, "horizons"),
        ({"horizons": [0]}, "horizons"),
        ({"occurred": ["dead"]}, "both occurred and censored"),
        ({"occurred": ["x"], "censored": ["X"]}, "under both"),
        ({"bins": [100, 50]}, "bins must rise"),
        ({"bins": [100, 300]}, "no horizon after it"),
        ({"bins": 1}, "bins"),
        ({"classes": ["a", "b"]}, "no key classes"),
        ({"occurred": [True], "censored": [False]}, "booleans"),
    ],
)
def test_tasks_that_cannot_be(tmp_path, followed, change, told):
    labels = (followed / "labels.csv").read_text(encoding="utf-8").splitlines()
    folder = write_cohort(tmp_path / "c", {**TASK, **change}, labels)
    with pytest.raises(ConfigError, match=told):
        read_cohort(folder)


def test_a_horizon_that_nobody_is_followed_to(tmp_path, followed):
    labels = (followed / "labels.csv").read_text(encoding="utf-8").splitlines()
    cohort = read_cohort(write_cohort(tmp_path / "c", {**TASK, "horizons": [5000]}, labels))
    problem = cohort.task.shortage("train", cohort.in_split("train"))
    assert "horizon 5000 lies after" in problem.what


def test_another_unit_is_converted_to_the_bundles(tmp_path, followed):
    """A cohort in months is read in the bundle's days and bins, whatever its own bins are."""
    own = read_cohort(followed)
    lines = (followed / "labels.csv").read_text(encoding="utf-8").splitlines()
    months = [lines[0]]
    for line in lines[1:]:
        name, days, status = line.split(",")
        months.append(f"{name},{days and float(days) / 30.436875},{status}")
    task = {**TASK, "unit": "months", "horizons": [3], "bins": [1, 3]}
    asked = adopted(read_cohort(write_cohort(tmp_path / "c", task, months)), own.task)
    for ours, theirs in zip(own.records, asked.records, strict=True):
        assert ours.label == theirs.label
        assert ours.value is None or ours.value == pytest.approx(theirs.value)


def test_a_split_without_events_cannot_be_trained_on(tmp_path, followed, capsys):
    lines = (followed / "labels.csv").read_text(encoding="utf-8").splitlines()
    for i, split in enumerate(SPLITS, start=1):
        if split == "validation":
            lines[i] = lines[i].replace("dead", "alive")
    folder = write_cohort(tmp_path / "c", labels=lines)
    cohort = read_cohort(folder)
    problem = cohort.task.shortage("validation", cohort.in_split("validation"))
    assert problem.what == "split 'validation' has no event"
    assert run("check", folder) == 0
    assert "split 'validation' has no event" in capsys.readouterr().out


# --- Bundle ---------------------------------------------------------------------------------------


def test_a_bundle_keeps_what_it_states(bundle):
    bins = bundle.task.follow_up.bins
    assert bundle.calibration.bins == bins
    assert bundle.calibration.recalibration.events >= 10
    assert set(bundle.conformal.times) == set(bundle.selectors)
    for groups in bundle.conformal.times.values():
        assert set(groups) == {"", "text", "about", "text+about"}
    assert len(bundle.task.learned.everybody) == len(bins.edges)
    assert bundle.task == type(bundle.task).from_dict(json.loads(json.dumps(bundle.task.to_dict())))


def test_a_changed_number_is_refused(trained, tmp_path):
    import shutil

    from dymo_med.bundle.folder import checksums_of
    from dymo_med.files import write_json

    folder = tmp_path / "b"
    shutil.copytree(trained, folder)
    file = folder / "configs" / "metadata.json"
    for change in ({"latest": -1.0}, {"everybody": [2.0, 0.5, 0.1]}, {"everybody": [0.5]}):
        told = json.loads((trained / "configs" / "metadata.json").read_text(encoding="utf-8"))
        told["target"]["follow_up"] |= change
        write_json(file, told)
        (folder / "checksums.json").unlink()
        write_json(folder / "checksums.json", checksums_of(folder))
        with pytest.raises(BundleError):
            load_bundle(folder, "cpu")


def test_balanced_classes_are_refused(followed, tmp_path, capsys):
    settings = {**RECIPE["backbone_training"], "class_weights": "balanced"}
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "backbone_training": settings}))
    call = ["train", str(recipe), "--cohort", str(followed), "--out", str(tmp_path / "o")]
    assert run(*call, "--device", "cpu") == 2
    assert "cannot be balanced" in capsys.readouterr().err


# --- Commands -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predicted(trained, followed, tmp_path_factory):
    out = tmp_path_factory.mktemp("predicted") / "out"
    patient = followed / "patients" / "v150"
    call = ["predict", "-i", str(patient), "-b", str(trained), "-o", str(out), "--device", "cpu"]
    assert run(*call, "--pdf") == 0
    return out


def test_a_prediction_states_curve_risks_and_bound(predicted, bundle):
    file = read_prediction(predicted / "prediction.json")
    said = file.survival
    assert said.horizons == (200.0, 400.0)
    assert said.risks[0] < said.risks[1]
    for risk, low, high in zip(said.risks, said.risk_low, said.risk_high, strict=True):
        assert low <= risk <= high
    assert said.curve[0] == 1.0
    assert list(said.curve) == sorted(said.curve, reverse=True)
    assert said.curve[-1] == pytest.approx(file.probabilities[-1])
    assert all(a <= b <= c for a, b, c in zip(said.low, said.curve, said.high, strict=True))
    assert 0 < said.bound <= bundle.task.learned.latest
    assert said.calibrated_on >= 9
    assert set(said.alternatives) == set(file.alternatives)
    page = (predicted / "report.html").read_text(encoding="utf-8")
    for text in ("<polyline", "Lower bound", "risk by 200 days", "Kaplan-Meier"):
        assert text in page
    assert (predicted / "report.pdf").stat().st_size > 1000


def test_a_page_is_made_again_from_the_file(predicted, tmp_path):
    again = tmp_path / "again.html"
    assert run("report", predicted / "prediction.json", "-o", again) == 0
    assert again.read_text(encoding="utf-8") == (predicted / "report.html").read_text(
        encoding="utf-8"
    )


def test_an_evaluation_knows_censored_patients(evaluated):
    predictions = [r for r in rows(evaluated / "predictions.csv") if r["scenario"] == "as-is"]
    assert {r["record_id"] for r in predictions} == {f"v{n}" for n in range(148, 172)}
    assert {r["event"] for r in predictions} == {"0", "1"}
    assert all(r["label"] for r in predictions if r["event"] == "1")
    assert any(not r["label"] for r in predictions)
    own = json.loads((evaluated / "run.json").read_text(encoding="utf-8"))["selector"]
    metrics = {(r["method"], r["metric"]): r for r in rows(evaluated / "metrics.csv")}
    for name in (
        "concordance",
        "integrated_brier",
        "log_loss",
        "auroc_200",
        "brier_400",
        "risk_gap_200",
        "bound_coverage",
    ):
        assert (own, name) in metrics
    assert float(metrics[own, "concordance"]["value"]) > 0.5
    assert float(metrics["moddrop", "concordance"]["value"]) > 0.5
    page = (evaluated / "index.html").read_text(encoding="utf-8")
    assert "Concordance (Uno)" in page
    assert (evaluated / "plots" / "survival.png").is_file()
    assert rows(evaluated / "metrics_by_pattern.csv")


def test_another_task_is_refused(trained, cohort_dir, tmp_path, capsys):
    call = ["evaluate", "-b", str(trained), "-c", str(cohort_dir), "-o", str(tmp_path / "o")]
    assert run(*call, "--device", "cpu") == 4
    assert "the tasks differ" in capsys.readouterr().err


def test_pages_can_be_reviewed(evaluated, predicted):
    assert len(Pages(evaluated).keys()) == 1
    add_review(predicted, "disagree", "Too early.")
    (review,) = read_reviews(predicted)
    assert review.verdict == "disagree" and review.prediction_sha256
