"""Evaluations that are killed, shared, damaged or repeated, and tables held to scikit-learn."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.stats import norm
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score

from dymo_med.bundle import load_bundle
from dymo_med.cli import main
from dymo_med.data.cohort import read_cohort
from dymo_med.errors import ConfigError, PatientDataError, Problem
from dymo_med.inference import evaluate as module
from dymo_med.inference import read_ahead
from dymo_med.inference.evaluate import evaluate
from dymo_med.references import REFERENCES
from dymo_med.training.train import train
from tests.killed import killed

SPLITS = ["train"] * 24 + ["validation"] * 8 + ["calibration"] * 24 + ["test"] * 36
SCENARIOS = ("as-is", "rate:0.5", "drop:photo")
COHORT = {
    "name": "clinic",
    "description": "For tests only.",
    # One of the names holds the sign that joins names in a cell.
    "task": {"type": "classification", "target": "status", "classes": ["HER2-", "HER2+"]},
    "modalities": {
        "photo": {"kind": "image", "dims": 2, "file": "photo.png", "size": [12, 12]},
        "labs": {
            "kind": "table",
            "file": "labs.csv",
            "columns": {
                "ldh": {"type": "continuous", "unit": "U/L", "range": [0, 2000]},
                "crp": {"type": "continuous", "unit": "mg/L", "range": [0, 500]},
            },
        },
        "history": {
            "kind": "table",
            "file": "history.csv",
            "columns": {
                "sex": {"type": "categorical", "values": ["F", "M"]},
                "age": {"type": "continuous", "unit": "years", "range": [0, 120]},
            },
        },
    },
    "subgroups": {
        "site": {"label_column": "site"},
        "sex": {"column": "sex"},
        "age": {"column": "age", "edges": [50]},
    },
}
RECIPE = {
    "name": "clinic",
    "description": "For tests only.",
    "imputer": {"name": "mopoe", "latent": 4, "dim": 8, "width": 4, "grid": 2, "hidden": 8},
    "backbone": {
        "name": "transformer",
        "dim": 16,
        "heads": 2,
        "layers": 1,
        "projection": 4,
        "width": 4,
        "grid": 1,
    },
    "selector": {"name": "gate"},
    "comparators": [{"name": "moddrop", "dim": 16, "width": 4, "grid": 1}],
    "imputer_training": {"epochs": 2, "batch_size": 8},
    "backbone_training": {"epochs": 8, "batch_size": 8, "learning_rate": 0.01, "subsets": 3},
}


def write_record(folder, rng, high, lacks):
    folder.mkdir(parents=True)
    if lacks != "photo":
        rows, columns = np.mgrid[0:12, 0:12]
        disc = (rows - 6) ** 2 + (columns - 5) ** 2 < (16 if high else 9)
        grey = 80 + 80 * disc + rng.normal(0, 25, disc.shape)
        Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(folder / "photo.png")
    if lacks != "labs":
        crp = "" if lacks == "crp" else f"{abs(rng.normal(20 + 10 * high, 12)):.1f}"
        ldh = f"{rng.normal(220 + 60 * high, 50):.1f}"
        (folder / "labs.csv").write_text(f"ldh,crp\n{ldh},{crp}\n")
    if lacks != "history":
        sex = "" if lacks == "sex" else rng.choice(["F", "M"])
        (folder / "history.csv").write_text(f"sex,age\n{sex},{rng.normal(50, 10):.0f}\n")


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    """Folder of a cohort of small records: 92 patients, every sixth of them with two visits."""
    folder = tmp_path_factory.mktemp("clinic") / "cohort"
    folder.mkdir()
    rng = np.random.default_rng(1)
    (folder / "cohort.yaml").write_text(yaml.safe_dump(COHORT, sort_keys=False))
    labels, splits = ["record_id,patient_id,status,site"], ["patient_id,split"]
    lacks = (None, "photo", None, "labs", "crp", None, "history", "sex")
    for number, split in enumerate(SPLITS):
        splits.append(f"c{number:02d},{split}")
        high = int(rng.integers(2))
        for visit in range(2 if number % 6 == 0 else 1):
            record = f"c{number:02d}" + "_v2" * visit
            site = ("north", "south", "")[number % 3]
            labels.append(f"{record},c{number:02d},HER2{'-+'[high]},{site}")
            write_record(folder / "patients" / record, rng, high, lacks[(number + visit) % 8])
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    (folder / "splits.csv").write_text("\n".join(splits) + "\n")
    return folder


@pytest.fixture(scope="module")
def model_dir(clinic, tmp_path_factory):
    """Folder of a bundle with a comparator, trained on that cohort."""
    folder = tmp_path_factory.mktemp("clinic-bundle")
    torch.set_num_threads(1)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return train(folder / "recipe.yaml", clinic, folder / "run", device="cpu")


@pytest.fixture(scope="module")
def model(model_dir):
    return load_bundle(model_dir, "cpu")


@pytest.fixture(scope="module")
def whole(model, clinic, tmp_path_factory):
    """The evaluation that all others are compared with."""
    out = tmp_path_factory.mktemp("whole") / "out"
    evaluate(model, read_cohort(clinic), out, scenarios=SCENARIOS, reports=False)
    return out


@pytest.fixture(scope="module")
def predictions(whole):
    return rows_of(whole / "predictions.csv")


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def same_tables(one, other):
    names = sorted(p.name for p in other.glob("*.csv"))
    assert len(names) == 10 and sorted(p.name for p in one.glob("*.csv")) == names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def command_of(model_dir, clinic, out, *more):
    scenarios = [part for s in SCENARIOS for part in ("--missing", s)]
    return [
        *("evaluate", "--bundle", str(model_dir), "--cohort", str(clinic), "--out", str(out)),
        *("--reports", "0", "--device", "cpu", *scenarios, *more),
    ]


def start(command, **kind):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "dymo_med", *command], env=environment, **kind)


def run(command):
    """Return the exit code of a command in this process."""
    try:
        main(command)
    except SystemExit as stop:
        return stop.code
    return 0


# --- Killed, and shared ---------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_again_and_again_and_resumed_it_ends_the_same(model_dir, clinic, whole, tmp_path):
    out = tmp_path / "out"
    command = command_of(model_dir, clinic, out, "-q")
    # Within the first batches, within later ones, and while tables are written.
    for files, more in ((3, []), (4, ["--resume"]), (8, ["--resume"])):
        assert killed([*command, *more], files) == -signal.SIGKILL
        assert not (out / "run.json").exists()
    assert run([*command, "--resume"]) == 0
    same_tables(out, whole)
    assert (out / "run.json").is_file() and not list(out.rglob(".dymo-med*"))


@pytest.mark.slow
def test_parts_at_the_same_time_in_a_new_folder_end_as_one(model_dir, clinic, whole, tmp_path):
    out = tmp_path / "new" / "out"
    parts = [
        start(
            command_of(model_dir, clinic, out, "--num-parts", "3", "--part-id", str(part)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in range(3)
    ]
    said = [part.communicate(timeout=200)[0] for part in parts]
    assert [part.returncode for part in parts] == [0, 0, 0], said
    same_tables(out, whole)
    assert any("cohort page" in text for text in said)
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]


@pytest.mark.usefixtures("plain")
def test_parts_one_after_another_say_what_is_left(model, clinic, whole, tmp_path):
    out, cohort = tmp_path / "out", read_cohort(clinic)
    out.mkdir()  # as a scheduler might
    given = {"scenarios": SCENARIOS, "reports": False, "num_parts": 3}
    left = []
    for part in (2, 0, 1):
        result = evaluate(model, cohort, out, part_id=part, **given)
        left.append(result.open_batches)
        assert (out / "metrics.csv").exists() == (not left[-1]) == bool(result.metrics)
    assert left == [2, 1, 0]  # 42 records are three batches
    same_tables(out, whole)
    # Whoever comes again finds everything done and leaves the same behind.
    assert evaluate(model, cohort, out, part_id=1, **given).open_batches == 0
    same_tables(out, whole)
    with pytest.raises(ConfigError, match="another seed"):
        evaluate(model, cohort, out, part_id=0, **given, seed=1)
    with pytest.raises(ConfigError, match="no such part"):
        evaluate(model, cohort, out, part_id=3, **given)


def test_the_command_says_what_other_parts_have_to_do(model_dir, clinic, tmp_path, capsys):
    command = command_of(model_dir, clinic, tmp_path / "out", "--num-parts", "3")
    assert run([*command, "--part-id", "1"]) == 0
    said = capsys.readouterr().out
    assert "part 1 of 3 is done; 2 unfinished batches left to other parts" in said


@pytest.mark.usefixtures("plain")
def test_reports_of_parts_are_those_of_the_first_records_and_scenario(model, clinic, tmp_path):
    cohort = read_cohort(clinic)
    given = {"scenarios": ("rate:0.5", "as-is"), "reports": 3, "batch_size": 2}
    few = cohort.in_split("test")[:5]
    small = replace(cohort, records=tuple(few))
    for part in (1, 0):
        evaluate(model, small, tmp_path / "out", num_parts=2, part_id=part, **given)
    made = {p.parent.name for p in (tmp_path / "out" / "reports").glob("*/report.html")}
    assert made == {r.record_id for r in few[:3]}


# --- Damaged --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("plain")
def test_every_bad_patient_costs_one_row_and_nobody_else(
    model_dir, clinic, whole, predictions, tmp_path, capsys
):
    folder = tmp_path / "cohort"
    shutil.copytree(clinic, folder)
    patients = folder / "patients"
    test = [r.record_id for r in read_cohort(clinic).in_split("test")]
    with_photo = [r for r in test if (patients / r / "photo.png").exists()]
    others = [r for r in test if r not in with_photo[:3]]
    with_labs = [r for r in others if (patients / r / "labs.csv").exists()][:2]
    with_history = [
        r for r in others if (patients / r / "history.csv").exists() and r not in with_labs
    ][:1]
    cut, empty, folder_instead = with_photo[:3]
    scan = (patients / cut / "photo.png").read_bytes()
    (patients / cut / "photo.png").write_bytes(scan[: len(scan) // 2])
    (patients / empty / "photo.png").write_bytes(b"")
    (patients / folder_instead / "photo.png").unlink()
    (patients / folder_instead / "photo.png").mkdir()
    table = patients / with_labs[0] / "labs.csv"
    table.write_text(table.read_text() + "1,2\n")
    (patients / with_labs[1] / "labs.csv").unlink()
    (patients / with_labs[1] / "labs.csv").mkdir()
    (patients / with_history[0] / "history.csv").write_text("sex,age\nX,50\n")
    bad = {*with_photo[:3], *with_labs, *with_history}
    assert len(bad) == 6
    assert run(command_of(model_dir, folder, tmp_path / "out", "-q")) == 3
    assert "6 failures" in capsys.readouterr().err
    failures = rows_of(tmp_path / "out" / "failures.csv")
    assert sorted(r["record_id"] for r in failures) == sorted(bad)
    assert {(r["scenario"], r["stage"]) for r in failures} == {("all", "read")}
    assert all(r["message"] for r in failures)
    left = rows_of(tmp_path / "out" / "predictions.csv")
    expected = [r for r in predictions if r["record_id"] not in bad]
    assert [(r["scenario"], r["record_id"], r["method"]) for r in left] == [
        (r["scenario"], r["record_id"], r["method"]) for r in expected
    ]
    for one, other in zip(left, expected, strict=True):
        assert float(one["prob_HER2+"]) == pytest.approx(float(other["prob_HER2+"]), abs=1e-5)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["failed_records"] == 6


@pytest.mark.usefixtures("plain")
def test_one_whose_whole_record_cannot_be_answered_costs_a_row(
    model, clinic, tmp_path, monkeypatch
):
    cohort = read_cohort(clinic)
    victim = next(
        r.record_id for r in cohort.in_split("test") if len(list(r.folder.iterdir())) == 3
    )
    original = module.answer

    def picky(bundle, records, **given):
        if any(r.record_id == victim and len(r.modalities) == 3 for r in records):
            raise PatientDataError(Problem(f"Patient {victim}", "cannot be answered"))
        return original(bundle, records, **given)

    monkeypatch.setattr(module, "answer", picky)
    result = evaluate(model, cohort, tmp_path / "o", scenarios=("drop:photo",), reports=False)
    (row,) = rows_of(tmp_path / "o" / "failures.csv")
    assert (row["record_id"], row["stage"]) == (victim, "predict")
    answered = {r["record_id"] for r in rows_of(tmp_path / "o" / "predictions.csv")}
    assert len(answered) == result.records - 1


def test_an_interruption_does_not_wait_for_what_is_being_read(model, clinic, tmp_path, monkeypatch):
    original, read = read_ahead.examine_record, []
    interrupted = threading.Event()

    def slow(entry, *others, **given):
        read.append(interrupted.is_set())
        if len(read) > 4:
            interrupted.wait(20)
        return original(entry, *others, **given)

    def stop(*_):
        while len(read) < 5:  # the reader is within the second batch
            time.sleep(0.001)
        interrupted.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(read_ahead, "examine_record", slow)
    cohort = read_cohort(clinic)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, cohort, tmp_path / "o", batch_size=4, reports=False, progress=stop)
    assert len(read) <= 8  # of 42


def test_a_scenario_that_empties_everybody_beside_one_that_does_not(model, clinic, tmp_path):
    scenarios = ("drop:photo,labs,history", "as-is")
    cohort = read_cohort(clinic)
    result = evaluate(model, cohort, tmp_path / "o", scenarios=scenarios, reports=False)
    assert result.failures == result.records
    assert {r["scenario"] for r in rows_of(tmp_path / "o" / "metrics.csv")} == {"as-is"}
    assert {r["scenario"] for r in rows_of(tmp_path / "o" / "metrics_by_pattern.csv")} == {"as-is"}
    assert not (tmp_path / "o" / "recovery.csv").exists()


# --- Guarded, and repeated ------------------------------------------------------------------------


@pytest.mark.usefixtures("plain")
def test_patients_the_bundle_knows_are_refused_unless_asked_for(
    model_dir, clinic, tmp_path, capsys
):
    command = ["evaluate", "-b", str(model_dir), "-c", str(clinic), "-o", str(tmp_path / "o")]
    command += ["--split", "validation", "--reports", "0", "--device", "cpu", "-q"]
    assert run(command) == 2
    said = capsys.readouterr().err
    assert "8 of its patients were used to make bundle clinic" in said
    assert "--allow-overlap" in said and not (tmp_path / "o").exists()
    assert run([*command, "--allow-overlap"]) == 0
    rows = rows_of(tmp_path / "o" / "metrics.csv")
    assert rows and {r["seen_in_training"] for r in rows} == {"8"}


def test_nobody_is_known_in_the_test_split(whole):
    assert {r["seen_in_training"] for r in rows_of(whole / "metrics.csv")} == {"0"}


@pytest.mark.usefixtures("plain")
def test_what_was_hidden_replays_to_the_same_answers(model, clinic, whole, predictions, tmp_path):
    text = f"replay:{whole / 'hidden.csv'}#rate:0.5"
    evaluate(model, read_cohort(clinic), tmp_path / "o", scenarios=(text,), reports=False)

    def rest(rows):
        return [{k: v for k, v in row.items() if k != "scenario"} for row in rows]

    again = rows_of(tmp_path / "o" / "predictions.csv")
    assert rest(again) == rest(r for r in predictions if r["scenario"] == "rate:0.5")
    assert {r["scenario"] for r in again} == {"replay:rate:0.5"}
    hidden = rest(r for r in rows_of(whole / "hidden.csv") if r["scenario"] == "rate:0.5")
    assert rest(rows_of(tmp_path / "o" / "hidden.csv")) == hidden


@pytest.mark.usefixtures("plain")
def test_resuming_with_other_scenarios_leaves_only_these(model, clinic, tmp_path):
    cohort, out, file = read_cohort(clinic), tmp_path / "o", tmp_path / "hide.csv"

    def go(*scenarios):
        evaluate(model, cohort, out, scenarios=scenarios, reports=False, resume=True)
        return rows_of(out / "predictions.csv")

    ids = [r.record_id for r in cohort.in_split("test")]
    file.write_text(f"scenario,record_id,modality,column\nmine,{ids[0]},labs,\n")
    before = go("as-is", f"replay:{file}")
    assert {r["scenario"] for r in before} == {"as-is", "replay:mine"}
    hidden = [r["record_id"] for r in rows_of(out / "hidden.csv")]
    assert hidden == [ids[0]]
    file.write_text(f"scenario,record_id,modality,column\nmine,{ids[1]},history,\n")
    assert len(go("as-is", f"replay:{file}")) == len(before)
    assert [r["record_id"] for r in rows_of(out / "hidden.csv")] == [ids[1]]
    assert {r["scenario"] for r in go("as-is")} == {"as-is"}
    assert not (out / "hidden.csv").exists() and not (out / "recovery.csv").exists()
    with pytest.raises(ConfigError, match="another first_scenario"):
        go("rate:0.5", "as-is")


@pytest.mark.usefixtures("plain")
def test_a_changed_subgroup_is_not_mixed_with_old_batches(model, clinic, tmp_path):
    cohort = read_cohort(clinic)
    evaluate(model, cohort, tmp_path / "o", reports=False)
    moved = tuple(replace(r, subgroups={"site": "west"}) for r in cohort.records)
    with pytest.raises(ConfigError, match="another subgroup of a record"):
        evaluate(model, replace(cohort, records=moved), tmp_path / "o", reports=False, resume=True)


@pytest.mark.usefixtures("plain")
def test_an_empty_folder_stays_the_folder_it_was(model, clinic, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    inode = (tmp_path / "real").stat().st_ino
    # What a start leaves that was killed at once.
    (tmp_path / "real" / ".progress.0123").mkdir()
    evaluate(model, read_cohort(clinic), tmp_path / "link", reports=False)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").stat().st_ino == inode
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    evaluate(model, read_cohort(clinic), type(tmp_path)("."), reports=False)
    assert (tmp_path / "here" / "run.json").is_file()


@pytest.mark.usefixtures("plain")
def test_run_json_is_absent_while_tables_are_written(model, clinic, tmp_path, monkeypatch):
    out, cohort = tmp_path / "o", read_cohort(clinic)
    evaluate(model, cohort, out, reports=False)
    monkeypatch.setattr(module, "metrics", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, cohort, out, reports=False, resume=True)
    assert not (out / "run.json").exists()


# --- Held to other computations -------------------------------------------------------------------


def weights_of(rows):
    visits = defaultdict(int)
    for row in rows:
        visits[row["patient_id"]] += 1
    return np.array([1 / visits[row["patient_id"]] for row in rows])


def by_scikit_learn(rows):
    """The metrics of one method's rows; every patient counts once."""
    weights = weights_of(rows)
    y = np.array([row["label"] == "HER2+" for row in rows], dtype=int)
    p = np.array([float(row["prob_HER2+"]) for row in rows])
    said = [row["predicted"] == "HER2+" for row in rows]
    found = {
        "accuracy": accuracy_score(y, said, sample_weight=weights),
        "brier": brier_score_loss(y, p, sample_weight=weights),
        "log_loss": log_loss(y, p, sample_weight=weights, labels=[0, 1]),
    }
    if 0 < y.sum() < len(y):
        found["auroc"] = roc_auc_score(y, p, sample_weight=weights)
    return found


def compare(table, parts, group_of, predictions):
    """Compare every value of a table with what scikit-learn makes of the same records."""
    groups = defaultdict(list)
    for row in predictions:
        for key in group_of(row):
            groups[key].append(row)
    compared, scores = 0, {key: by_scikit_learn(rows) for key, rows in groups.items()}
    for row in table:
        key = tuple(row[k] for k in ("scenario", *parts, "method"))
        own, expected = groups[key], scores[key]
        assert int(row["records"]) == len(own)
        assert int(row["patients"]) == len({r["patient_id"] for r in own})
        if int(row["patients"]) < 10:
            assert row["low"] == row["high"] == ""
        if row["metric"] in expected:
            assert float(row["value"]) == pytest.approx(expected[row["metric"]], abs=1e-6)
            compared += 1
        elif row["metric"] == "auroc":
            assert row["value"] == ""
    return compared


def test_patterns_are_those_of_the_predictions(whole, predictions):
    own = {(r["scenario"], r["record_id"]): r for r in predictions if r["method"] == "gate"}

    def group_of(row):
        pattern = own[row["scenario"], row["record_id"]]["pattern"].replace("~", "")
        return [(row["scenario"], pattern, row["method"])]

    table = rows_of(whole / "metrics_by_pattern.csv")
    assert compare(table, ("pattern",), group_of, predictions) > 100
    sizes = [int(r["records"]) for r in table if r["scenario"] == "rate:0.5"]
    assert sizes == sorted(sizes, reverse=True)


def test_subgroups_are_those_of_the_records(whole, clinic, predictions):
    sites = {r["record_id"]: r["site"] or "unknown" for r in rows_of(clinic / "labels.csv")}
    levels = {}
    for record, site in sites.items():
        file = clinic / "patients" / record / "history.csv"
        (line,) = rows_of(file) if file.exists() else [{"sex": "", "age": ""}]
        age = line["age"] and ("50 and over" if float(line["age"]) >= 50 else "< 50")
        levels[record] = {
            "site": site,
            "sex": line["sex"] or "unknown",
            "age": age or "unknown",
        }

    def group_of(row):
        for name, level in levels[row["record_id"]].items():
            yield row["scenario"], name, level, row["method"]

    table = rows_of(whole / "metrics_by_subgroup.csv")
    assert compare(table, ("subgroup", "level"), group_of, predictions) > 200
    assert {(r["subgroup"], r["level"]) for r in table} == {
        *(("site", s) for s in ("north", "south", "unknown")),
        *(("sex", s) for s in ("F", "M", "unknown")),
        *(("age", s) for s in ("< 50", "50 and over", "unknown")),
    }


def test_comparators_have_their_rows(whole, predictions):
    plain = list(REFERENCES)
    methods = {"observed_only", "trust_all", "dymo", "gate", "moddrop", *plain}
    for scenario in SCENARIOS:
        found = {r["method"] for r in predictions if r["scenario"] == scenario}
        assert found == methods | ({"oracle"} if scenario != "as-is" else set())
    assert all(not r["trusted"] for r in predictions if r["method"] == "moddrop")
    compared = {(r["method"], r["metric"]) for r in rows_of(whole / "metrics.csv")}
    assert ("gate - moddrop", "auroc") in compared
    assert ("gate - oracle", "auroc") not in compared
    assert json.loads((whole / "run.json").read_text())["methods"][-len(plain) - 2 :] == [
        "moddrop",
        *plain,
        "oracle",
    ]


def test_the_test_of_delong_agrees_with_itself_and_the_difference(whole):
    table = {(r["scenario"], r["method"], r["metric"]): r for r in rows_of(whole / "metrics.csv")}
    rows = {k: r for k, r in table.items() if k[2] == "auroc_delong"}
    assert len(rows) == 3 * (4 + len(REFERENCES))  # pairs with three methods, moddrop, references
    for (scenario, method, _), row in rows.items():
        value, low, high, p = (float(row[k]) for k in ("value", "low", "high", "p"))
        assert value == pytest.approx(float(table[scenario, method, "auroc"]["value"]), abs=1e-8)
        error = (high - low) / (2 * norm.ppf(0.975))
        expected = 2 * norm.sf(abs(value) / error) if error else 1.0
        assert p == pytest.approx(expected, abs=1e-6)


def test_p_values_are_adjusted_over_all_comparisons_of_a_metric(whole):
    families = defaultdict(list)
    for row in rows_of(whole / "metrics.csv"):
        assert bool(row["p"]) == bool(row["p_holm"])
        if row["p"]:
            families[row["metric"]].append((float(row["p"]), float(row["p_holm"])))
    assert len(families["auroc"]) == len(families["auroc_delong"]) == 3 * (4 + len(REFERENCES))
    for pairs in families.values():
        largest = 0.0
        for rank, (p, adjusted) in enumerate(sorted(pairs)):
            largest = max(largest, min(1.0, p * (len(pairs) - rank)))
            assert adjusted == pytest.approx(largest, abs=1e-7)


def mean_of_patients(rows, values):
    own = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        if value is not None:
            own[row["patient_id"]].append(value)
    return np.mean([np.mean(v) for v in own.values()]) if own else None


def members(row):
    """The classes of a prediction set."""
    return [re.sub(r"\\(.)", r"\1", name) for name in re.findall(r"(?:\\.|[^+])+", row)]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_sets_and_choices_are_those_of_the_predictions(whole, predictions, scenario):
    found = {
        r["metric"]: r["value"]
        for r in rows_of(whole / "metrics.csv")
        if (r["scenario"], r["method"]) == (scenario, "gate")
    }
    rows, alone = (
        [r for r in predictions if (r["scenario"], r["method"]) == (scenario, method)]
        for method in ("gate", "observed_only")
    )
    sets = [members(r["prediction_set"]) for r in rows]
    assert all(s and set(s) <= {"HER2-", "HER2+"} for s in sets)
    assert all(r["predicted"] in s for r, s in zip(rows, sets, strict=True))
    expected = {
        "set_coverage": mean_of_patients(
            rows, [r["label"] in s for r, s in zip(rows, sets, strict=True)]
        ),
        "set_size": mean_of_patients(rows, [len(s) for s in sets]),
    }
    right = [r["predicted"] == r["label"] for r in alone]
    after = [r["predicted"] == r["label"] for r in rows]
    pairs = list(zip(right, after, strict=True))
    expected["harmed"] = mean_of_patients(rows, [not a if b else None for b, a in pairs])
    expected["rescued"] = mean_of_patients(rows, [None if b else a for b, a in pairs])
    counts = [
        [len(list(filter(None, r[k].split("+")))) for k in ("trusted", "rejected")] for r in rows
    ]
    shares = [t / (t + n) if t + n else None for t, n in counts]
    expected["admitted"] = mean_of_patients(rows, shares)
    for metric, value in expected.items():
        if value is None:
            assert found[metric] == ""
        else:
            assert float(found[metric]) == pytest.approx(value, abs=1e-8), metric
    others = {r["prediction_set"] for r in predictions if r["method"] != "gate"}
    assert others == {""}


def test_the_page_of_a_bundle_without_what_sets_need(model, clinic, tmp_path):
    bare = replace(model, conformal=None, comparators={})
    evaluate(bare, read_cohort(clinic), tmp_path / "o", reports=False)
    rows = rows_of(tmp_path / "o" / "metrics.csv")
    assert not {"set_coverage", "set_size"} & {r["metric"] for r in rows}
    assert "moddrop" not in {r["method"] for r in rows}
    assert {r["prediction_set"] for r in rows_of(tmp_path / "o" / "predictions.csv")} == {""}
