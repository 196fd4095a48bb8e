"""A number as the target: from labels to a bundle, a prediction and an evaluation."""

import csv
import json
import re

import numpy as np
import pytest
import torch
import yaml

from dymo_med.bundle import load_bundle
from dymo_med.config import Document
from dymo_med.conformal import AS_THEY_CAME, calibrate
from dymo_med.data.cohort import read_cohort
from dymo_med.errors import ConfigError
from dymo_med.inference.number_page import _use
from dymo_med.tasks import TASKS, Classification, Regression
from dymo_med.types import Scale

SCALE = Scale(-3.0, 3.0, (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0))
REGRESSION = Regression.of("y", SCALE)
SPLITS = ["train"] * 40 + ["validation"] * 10 + ["calibration"] * 24 + ["test"] * 14
COHORT = {
    "name": "speeches",
    "task": {"type": "regression", "target": "sentiment", "range": [-3, 3], "bands": 7},
    "modalities": {
        "text": {"kind": "tokens", "file": "text.npy", "length": 4, "features": 6},
        "audio": {"kind": "tokens", "file": "audio.npy", "length": 4, "features": 5},
        "about": {
            "kind": "table",
            "file": "about.csv",
            "columns": {"age": {"type": "continuous", "range": [0, 120]}},
        },
    },
}
RECIPE = {
    "name": "speeches",
    "imputer": {"name": "mopoe", "latent": 4, "dim": 8, "hidden": 8},
    "backbone": {"name": "transformer", "dim": 16, "heads": 2, "layers": 1, "projection": 6},
    "comparators": [{"name": "moddrop", "dim": 16, "heads": 2, "hidden": 16}],
    "imputer_training": {"epochs": 2, "batch_size": 20, "learning_rate": 0.005},
    "backbone_training": {"epochs": 16, "batch_size": 20, "learning_rate": 0.02, "subsets": 3},
}


def write_cohort(folder):
    """Write a cohort in which every modality says the target, each with its own noise."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    (folder / "cohort.yaml").write_text(yaml.safe_dump(COHORT, sort_keys=False))
    labels, splits = ["patient_id,sentiment"], ["patient_id,split"]
    for number, split in enumerate(SPLITS):
        name = f"v{number:02d}"
        splits.append(f"{name},{split}")
        value = round(float(rng.uniform(-3, 3)), 1)
        labels.append(f"{name},{'' if number == 20 else value}")
        at = folder / "patients" / name
        at.mkdir(parents=True)
        steps = int(rng.integers(3, 9))
        for file, features, noise in (("text", 6, 0.3), ("audio", 5, 1.0)):
            if number % 4 == 1 and file == "audio":
                continue
            signal = value * np.linspace(-1, 1, features)
            noisy = signal + rng.normal(0, noise, (steps, features))
            np.save(at / f"{file}.npy", noisy.astype(np.float32))
        if number % 5:
            (at / "about.csv").write_text(f"age\n{50 + 8 * value + rng.normal(0, 10):.0f}\n")
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    (folder / "splits.csv").write_text("\n".join(splits) + "\n")
    return folder


@pytest.fixture(scope="module")
def speeches(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("speeches") / "cohort")


@pytest.fixture(scope="module")
def trained(speeches, tmp_path_factory):
    from dymo_med.training import train as module

    folder = tmp_path_factory.mktemp("regression")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "draw_curves", lambda *_: None)
        bundle = module.train(recipe, speeches, folder / "run", device="cpu")
    return load_bundle(bundle, "cpu")


# --- Scale ----------------------------------------------------------------------------------------


def test_shares_have_the_value_as_their_mean():
    scale = Scale(0.0, 100.0, (0.0, 1.0, 10.0, 100.0))
    values = torch.tensor([0.0, 0.25, 1.0, 5.5, 99.0, 100.0, torch.nan], dtype=torch.float64)
    shares = scale.shares(values)
    assert torch.allclose(scale.value(shares.double())[:-1], values[:-1], atol=1e-4)
    assert torch.allclose(shares[:-1].sum(1), torch.ones(6)) and not bool(shares[-1].any())
    assert bool(((shares > 0).sum(1) <= 2).all()) and bool((shares >= 0).all())


def test_a_value_belongs_to_the_nearest_band():
    assert [SCALE.band(v) for v in (-3.0, -2.51, -2.49, 0.4, 0.5, 3.0)] == [0, 0, 1, 3, 3, 6]
    assert SCALE.names == tuple(f"near {c}" for c in range(-3, 4))


@pytest.mark.parametrize("centers", [(0.0,), (0.0, 2.0, 1.0), (0.0, 0.5)])
def test_wrong_bands_are_refused(centers):
    with pytest.raises(ValueError, match="must rise"):
        Scale(0.0, 1.0, centers)


def test_a_task_has_a_scale_if_and_only_if_it_is_a_regression():
    assert Classification("y", SCALE.names).scale is None
    assert REGRESSION.scale == SCALE and REGRESSION.classes == SCALE.names
    with pytest.raises(ValueError, match="are its bands"):
        Regression("y", ("a", "b"), SCALE)


def test_the_loss_is_least_at_the_truth_and_counts_the_error():
    truth = SCALE.shares(torch.tensor([0.25]))
    right = truth.clamp_min(1e-6).log()
    far = SCALE.shares(torch.tensor([-2.0])).clamp_min(1e-6).log()
    least = float(REGRESSION.loss(right, truth))
    assert least == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)), abs=1e-3)
    entropy_part = float(torch.nn.functional.cross_entropy(far, truth))
    assert float(REGRESSION.loss(far, truth)) == pytest.approx(entropy_part + 2.25, abs=1e-3)
    assert REGRESSION.figures(far, truth, torch.ones(1))["score"] == pytest.approx(-2.25, abs=1e-3)


# --- Cohort ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "pattern"),
    [
        ({"type": "regression", "target": "y"}, "needs the key range"),
        ({"type": "regression", "target": "y", "range": [3, -3]}, "lowest, highest"),
        ({"type": "regression", "target": "y", "range": [0, 1], "classes": ["a"]}, "has no key"),
        ({"type": "classification", "target": "y", "classes": ["a", "b"], "unit": "m"}, "no key"),
        ({"type": "classification", "target": "y", "classes": ["a"]}, "at least two"),
        ({"type": "regression", "target": "y", "range": [0, 2], "bands": [0, 1]}, "must rise"),
    ],
)
def test_wrong_tasks_are_refused(tmp_path, task, pattern):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(task))
    with pytest.raises(ConfigError, match=pattern):
        Document(path).parse(TASKS[task["type"]].Entry)


def test_labels_are_numbers_within_the_range(speeches, tmp_path):
    cohort = read_cohort(speeches)
    assert cohort.task.scale == SCALE and cohort.task.classes == SCALE.names
    labelled = [r for r in cohort.records if r.label is not None]
    assert len(labelled) == len(SPLITS) - 1
    assert all(SCALE.band(r.value) == r.label for r in labelled)
    other = write_cohort(tmp_path / "bad")
    lines = (other / "labels.csv").read_text().splitlines()
    lines[1:4] = ["v00,12.75", "v01,great", "v02,nan"]
    (other / "labels.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError) as caught:
        read_cohort(other)
    text = str(caught.value)
    # One line for each kind of fault, not for each row.
    assert text.count("Expected a number from -3 to 3.") == 2
    assert "the cell is not a number" in text and "Got the same in 2 rows" in text
    assert "labels.csv:2 sentiment: the number is outside the declared range" in text
    assert "12.75" not in text and "great" not in text


def test_a_band_without_a_training_record_is_refused(speeches, tmp_path):
    from dymo_med.training.train import train

    other = tmp_path / "cohort"
    other.mkdir()
    (other / "patients").symlink_to(speeches / "patients")
    for name in ("labels.csv", "splits.csv"):
        (other / name).write_text((speeches / name).read_text())
    task = {**COHORT["task"], "range": [-30, 30]}
    (other / "cohort.yaml").write_text(yaml.safe_dump({**COHORT, "task": task}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    with pytest.raises(ConfigError, match="no labelled training record is near -30, near -20"):
        train(recipe, other, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


# --- Bundle ---------------------------------------------------------------------------------------


def test_a_bundle_keeps_the_scale(trained):
    assert trained.task.scale == SCALE and trained.calibration.temperature == 1.0
    assert trained.calibration.patients is None  # limits would move the mean over the bands
    assert set(trained.conformal.errors) == set(trained.selectors)
    assert all(r["mae"] < 1.5 for r in trained.choice.results.values())
    assert "mean absolute error" in trained.choice.why or "too few" in trained.choice.why


def test_intervals_cover_and_end_where_the_scale_does():
    rng = np.random.default_rng(0)
    errors = tuple(np.abs(rng.normal(0, 0.5, 400)).tolist())
    wide = tuple((3 * np.array(errors[:100])).tolist())
    groups = ("a",) * 400 + ("b",) * 100 + (AS_THEY_CAME,) * 400
    owners = [*range(400), *range(100), *range(400)]
    conformal = calibrate(groups, owners, {}, {"m": (*errors, *wide, *errors)})
    values = rng.uniform(-1, 1, 3000)
    truth = values + rng.normal(0, 0.5, 3000)
    found = conformal.intervals("m", values, ["a"] * 3000, SCALE)
    assert np.mean((found.low <= truth) & (truth <= found.high)) == pytest.approx(0.9, abs=0.03)
    assert set(found.calibrated_on.tolist()) == {400}
    both = conformal.intervals("m", np.array([0.0, 0.0, 2.9]), ["a", "b", "c"], SCALE)
    width = both.high - both.low
    assert width[1] == pytest.approx(3 * width[0], rel=0.3)
    assert both.calibrated_on.tolist() == [400, 100, 0] and width[2] == 6.0
    with pytest.raises(KeyError):
        conformal.intervals("other", values, ["a"] * 3000, SCALE)


# --- Prediction -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predicted(trained, speeches, tmp_path_factory):
    """One test record that lacks a sequence, predicted with every file."""
    from dymo_med.inference.predict import predict_patient

    out = tmp_path_factory.mktemp("predicted") / "out"
    return predict_patient(speeches / "patients" / "v77", trained, out, draws=3, pdf=True), out


def test_the_answer_is_a_number_with_an_interval(predicted, speeches):
    prediction, _ = predicted
    found = prediction.value
    assert found.value == pytest.approx(float(np.dot(found.centers, prediction.probabilities)))
    assert -3 <= found.low <= found.value <= found.high <= 3
    assert set(found.alternatives) == set(prediction.alternatives)
    truth = {r.record_id: r.value for r in read_cohort(speeches).records}["v77"]
    assert abs(found.value - truth) < 2


def test_the_files_of_a_number(predicted):
    from dymo_med.inference.audit import audit
    from dymo_med.inference.prediction_file import read_prediction

    prediction, out = predicted
    file = read_prediction(out / "prediction.json")
    assert file.value.value == prediction.value.value
    assert not audit(out).problems
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "90 % interval" in page and "Intervals made this way" in page
    assert "of 100 given this probability" not in page
    assert (out / "recovered" / "audio_synthetic.safetensors").is_file()
    assert [s.modality for s in file.exhibits.scans] == ["text", "audio"]
    assert all(s.flat and not s.overlays for s in file.exhibits.scans)


def test_an_edited_number_is_found(predicted, tmp_path):
    from dymo_med.inference.audit import audit
    from dymo_med.inference.prediction_file import PredictionFile

    _, out = predicted
    data = json.loads((out / "prediction.json").read_text(encoding="utf-8"))
    data["value"]["value"] += 0.5
    del data["content_sha256"]
    (tmp_path / "prediction.json").write_text(PredictionFile.make(data).to_text())
    found = " ".join(str(p) for p in audit(tmp_path).problems)
    assert "not the mean of the bands' centres" in found


# --- Evaluation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(trained, speeches, tmp_path_factory):
    """The test split, as it is and with two rates that cannot be had of three modalities."""
    from dymo_med.inference.evaluate import evaluate

    out = tmp_path_factory.mktemp("evaluated") / "out"
    scenarios = ("as-is", "batch-rate:0.7", "rate:0.1")
    return evaluate(trained, read_cohort(speeches), out, scenarios=scenarios, reports=1)


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_numbers_are_in_the_table_of_predictions(evaluated, trained):
    rows = rows_of(evaluated.out / "predictions.csv")
    own = [r for r in rows if r["method"] == trained.choice.name and r["scenario"] == "as-is"]
    assert len(own) == 14
    for row in own:
        assert float(row["value_low"]) <= float(row["value"]) <= float(row["value_high"])
        shares = [float(row[f"prob_{name}"]) for name in SCALE.names]
        assert float(row["value"]) == pytest.approx(np.dot(SCALE.centers, shares), abs=1e-6)
        assert row["label"] == SCALE.names[SCALE.band(float(row["value_true"]))]
    assert all(r["value_low"] == "" for r in rows if r["method"] == "moddrop")


def test_numbers_are_judged_by_their_distance(evaluated, trained):
    rows = rows_of(evaluated.out / "metrics.csv")
    metrics = {r["metric"] for r in rows}
    assert metrics >= {"mae", "pearson", "acc7", "f1_nonzero", "interval_coverage"}
    assert not metrics & {"auroc", "brier", "set_coverage"}
    found = {(r["scenario"], r["method"], r["metric"]): float(r["value"]) for r in rows}
    own = trained.choice.name
    predictions = rows_of(evaluated.out / "predictions.csv")
    errors = [
        abs(float(r["value"]) - float(r["value_true"]))
        for r in predictions
        if (r["scenario"], r["method"]) == ("as-is", own)
    ]
    assert found["as-is", own, "mae"] == pytest.approx(np.mean(errors), abs=1e-6)
    assert found["as-is", own, "mae"] < 0.6 and found["as-is", own, "pearson"] > 0.9
    assert found["batch-rate:0.7", own, "mae"] > found["batch-rate:0.7", "oracle", "mae"]
    patterns = rows_of(evaluated.out / "metrics_by_pattern.csv")
    assert {r["metric"] for r in patterns} >= {"mae", "interval_width"}


def test_what_is_hidden_instead_of_the_share_asked_for_is_said(evaluated):
    notes = json.loads((evaluated.out / "run.json").read_text(encoding="utf-8"))["scenario_notes"]
    assert notes == list(evaluated.notes) and len(notes) == 2
    assert notes[0].startswith("batch-rate:0.7 hides 0.667 of a complete record's 3 modalities")
    assert notes[1].startswith("rate:0.1 hides nothing")


def test_the_page_of_numbers(evaluated):
    page = (evaluated.out / "index.html").read_text(encoding="utf-8")
    assert "Answer against truth" in page and "AUROC" not in page
    assert "batch-rate:0.7 hides 0.667" in page
    assert (evaluated.out / "plots" / "scatter.png").stat().st_size > 5000
    assert 'href="reports/v74/report.html"' in page
    quality = {r["metric"] for r in rows_of(evaluated.out / "recovery.csv")}
    assert {"cosine", "mae_sd"} <= quality


def test_the_page_of_numbers_says_which_modalities_are_used(evaluated):
    page = (evaluated.out / "index.html").read_text(encoding="utf-8")
    use = json.loads((evaluated.out / "run.json").read_text(encoding="utf-8"))["use"]
    table = page.split('id="use"')[1].split("</section>")[0]
    assert "Mean absolute error added" in table
    rows = re.findall(r'<th scope="row">(.+?)</th><td>(.+?)</td><td class="n">(.+?)</td>', table)
    assert rows == [(r["part"], r["verdict"], str(r["patients"])) for r in use]
    assert all(r["change"] is None for r in use) and "–" in table  # too few patients to tell
    interval = {"value": 0.1234, "low": 0.05, "high": 0.2}
    row = {"part": "sound", "verdict": "used", "patients": 40, "change": 0.31, "p": 0.025}
    told = _use({**row, "loss": interval})
    assert told["values"] == [("0.310", ""), ("0.123", "0.050 to 0.200"), ("0.025", "")]
