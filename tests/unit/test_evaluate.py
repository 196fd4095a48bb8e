import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dymo_med.data.cohort import read_cohort
from dymo_med.data.missingness import apply, parse_scenario
from dymo_med.data.patient import read_record
from dymo_med.errors import BundleError, ConfigError, PatientDataError, Problem
from dymo_med.inference import evaluate as module
from dymo_med.inference import read_ahead
from dymo_med.inference.cohort_page import write_pages
from dymo_med.inference.evaluate import evaluate
from dymo_med.inference.predict import predict_batch
from dymo_med.inference.scores import Collector, by_pattern, by_subgroup, metrics
from dymo_med.metrics import bootstrap
from dymo_med.references import REFERENCES

SCENARIOS = ("as-is", "rate:0.5", "drop:t1,labs", "cells:0.4")
TABLES = (
    *("predictions.csv", "selections.csv", "metrics.csv", "failures.csv"),
    *("metrics_by_pattern.csv", "metrics_by_subgroup.csv", "hidden.csv"),
    *("recovery.csv", "recovery_summary.csv", "quality.csv"),
)


def rows_of(path: Path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def done(bundle, cohort, tmp_path_factory):
    """An evaluation of the training split, which is the largest, under every kind of scenario."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    seen = []
    result = evaluate(
        bundle,
        cohort,
        out,
        split="train",
        scenarios=SCENARIOS,
        batch_size=5,
        reports=2,
        allow_overlap=True,
        progress=lambda d, t: seen.append((d, t)),
    )
    assert seen[-1][0] == seen[-1][1] == result.records * len(SCENARIOS)
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    return result


@pytest.fixture
def broken(cohort_dir, tmp_path):
    """A copy of the cohort in which one test record cannot be read."""
    folder = tmp_path / "cohort"
    shutil.copytree(cohort_dir, folder)
    (folder / "patients" / "p017" / "t2.nii.gz").write_bytes(b"not a scan")
    return read_cohort(folder)


def test_everything_is_written(done):
    names = {p.name for p in done.out.iterdir()}
    assert names == {*TABLES, "run.json", "index.html", "plots", "reports", ".progress"}
    plots = {"auroc.png", "rates.png", "calibration.png", "admission.png", "changes.png"}
    plots |= {"recovery.png", "recovered.png"}
    assert {p.name for p in (done.out / "plots").iterdir()} == plots
    assert len(list((done.out / "reports").glob("*/report.html"))) == 2
    assert done.failures == 0 and rows_of(done.out / "failures.csv") == []
    header = (done.out / "failures.csv").read_text(encoding="utf-8")
    assert header == "record_id,scenario,stage,message\n"
    run = json.loads((done.out / "run.json").read_text(encoding="utf-8"))
    assert run["scenarios"] == list(SCENARIOS) and run["records"] == done.records


def test_every_method_answers_for_every_record(done, cohort):
    rows = rows_of(done.out / "predictions.csv")
    expected = [r.record_id for r in cohort.in_split("train") if r.label is not None]
    for scenario in SCENARIOS:
        methods = {}
        for row in rows:
            if row["scenario"] == scenario:
                methods.setdefault(row["method"], []).append(row["record_id"])
        known = {"observed_only", "trust_all", "dymo", *REFERENCES}
        assert set(methods) == (known if scenario == "as-is" else known | {"oracle"})
        assert all(ids == expected for ids in methods.values())


def test_rows_agree_with_predicting_the_same_hidden_record(done, bundle, cohort):
    rows = rows_of(done.out / "predictions.csv")
    scenario = parse_scenario("rate:0.5", cohort.specs)
    for entry in cohort.in_split("train")[:4]:
        record = read_record(entry, bundle.specs, cohort.missing_values)
        hidden = apply(scenario, record, bundle.specs, 0)
        (p,) = predict_batch(bundle, [hidden], explain=False)
        (whole,) = predict_batch(bundle, [record], explain=False)
        expected = {
            "dymo": p.probabilities,
            **p.alternatives,
            "oracle": whole.alternatives["observed_only"],
        }
        for method, probabilities in expected.items():
            (row,) = (
                r
                for r in rows
                if (r["scenario"], r["record_id"], r["method"])
                == ("rate:0.5", entry.record_id, method)
            )
            assert float(row["prob_high"]) == pytest.approx(probabilities[1], abs=1e-5)
            assert row["label"] == cohort.task.classes[entry.label]
            assert row["predicted"] == ("low", "high")[int(np.argmax(probabilities))]
            if method == "dymo":
                assert row["observed"] == "+".join(p.observed)
                assert row["trusted"] == "+".join(p.trusted)
                assert row["rejected"] == "+".join(p.rejected)
                assert row["absent"] == "+".join(p.absent)
                marked = [n + "~" if n in p.partly else n for n in p.observed]
                assert row["pattern"] == "+".join(marked)


def test_hidden_means_hidden(done):
    for row in rows_of(done.out / "predictions.csv"):
        if row["scenario"] == "drop:t1,labs" and row["method"] != "oracle":
            assert not {"t1", "labs"} & set(row["observed"].split("+"))


def test_selections_are_of_the_own_selector(done):
    predictions = {
        (r["scenario"], r["record_id"]): r
        for r in rows_of(done.out / "predictions.csv")
        if r["method"] == "dymo"
    }
    admitted = {key: set() for key in predictions}
    for row in rows_of(done.out / "selections.csv"):
        if row["decision"] == "admitted":
            admitted[row["scenario"], row["record_id"]].add(row["modality"])
    for key, row in predictions.items():
        assert admitted[key] == set(filter(None, row["trusted"].split("+")))


def test_metrics_are_those_of_the_predictions(done):
    rows = [r for r in rows_of(done.out / "predictions.csv") if r["scenario"] == "cells:0.4"]
    methods = {m: [r for r in rows if r["method"] == m] for m in ("observed_only", "dymo")}
    own = methods["dymo"]
    expected = bootstrap(
        [("low", "high").index(r["label"]) for r in own],
        {
            m: np.array([[float(r["prob_low"]), float(r["prob_high"])] for r in part])
            for m, part in methods.items()
        },
        [r["patient_id"] for r in own],
        pairs=[("dymo", "observed_only")],
    )
    found = {
        (r["method"], r["metric"]): r
        for r in rows_of(done.out / "metrics.csv")
        if r["scenario"] == "cells:0.4"
    }
    for method in ("dymo", "observed_only", "dymo - observed_only"):
        for metric in ("auroc", "brier"):
            row = found[method, metric]
            for part in ("value", "low", "high"):
                number = getattr(expected[method][metric], part)
                assert float(row[part]) == pytest.approx(number, abs=1e-6), (method, metric, part)
    assert ("dymo - trust_all", "auroc") in found
    assert int(found["dymo", "auroc"]["records"]) == 12
    assert int(found["dymo", "auroc"]["patients"]) == 10


def test_the_page_links_what_exists_and_needs_no_network(done):
    page = (done.out / "index.html").read_text(encoding="utf-8")
    for record in (p.name for p in (done.out / "reports").iterdir()):
        assert f'href="reports/{record}/report.html"' in page
    assert "http:" not in page and "https:" not in page
    assert "No clear difference" in page or "It h" in page
    # All of them were trained on, and the page says so.
    assert "used to make the model" in page


@pytest.mark.usefixtures("plain")
def test_the_same_again_is_the_same(done, bundle, cohort, tmp_path):
    out = tmp_path / "again"
    given = {"split": "train", "scenarios": SCENARIOS, "batch_size": 5, "allow_overlap": True}
    evaluate(bundle, cohort, out, **given, reports=0)
    for name in TABLES:
        assert (out / name).read_bytes() == (done.out / name).read_bytes(), name


@pytest.mark.usefixtures("plain")
def test_an_interrupted_run_goes_on_to_the_same_files(done, bundle, cohort, tmp_path, monkeypatch):
    out = tmp_path / "interrupted"
    given = {"split": "train", "scenarios": SCENARIOS, "batch_size": 5, "reports": 2}
    given |= {"allow_overlap": True}
    calls = []

    def stop(number, total):
        calls.append(number)
        if len(calls) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(bundle, cohort, out, **given, progress=stop)
    assert not (out / "predictions.csv").exists()
    with pytest.raises(ConfigError, match="--resume"):
        evaluate(bundle, cohort, out, **given)
    with pytest.raises(ConfigError, match="another seed"):
        evaluate(bundle, cohort, out, **given, seed=1, resume=True)
    read = []
    original = read_ahead.examine_record
    monkeypatch.setattr(
        read_ahead,
        "examine_record",
        lambda *a, **k: (read.append(a[0].record_id), original(*a, **k))[1],
    )
    evaluate(bundle, cohort, out, **given, resume=True)
    assert 0 < len(read) < done.records
    for name in TABLES:
        assert (out / name).read_bytes() == (done.out / name).read_bytes(), name
    read.clear()
    evaluate(bundle, cohort, out, **given, resume=True)
    assert read == []


@pytest.mark.usefixtures("plain")
def test_corrected_labels_are_not_mixed_with_old_batches(bundle, cohort, tmp_path):
    evaluate(bundle, cohort, tmp_path / "e", reports=0)
    turned = [replace(r, label=None if r.label is None else 1 - r.label) for r in cohort.records]
    corrected = replace(cohort, records=tuple(turned))
    with pytest.raises(ConfigError, match="another records, label or patient"):
        evaluate(bundle, corrected, tmp_path / "e", reports=0, resume=True)


def test_other_folders_are_left_alone(bundle, cohort, tmp_path):
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    for resume in (False, True):
        with pytest.raises(ConfigError):
            evaluate(bundle, cohort, tmp_path, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match="is a file"):
        evaluate(bundle, cohort, tmp_path / "thesis.txt")


def test_a_bad_patient_costs_a_row(bundle, cohort, broken, tmp_path):
    scenarios = ("as-is", "rate:0.3")
    result = evaluate(bundle, broken, tmp_path / "a", scenarios=scenarios, reports=False)
    assert result.failures == 1
    (row,) = rows_of(tmp_path / "a" / "failures.csv")
    assert (row["record_id"], row["scenario"], row["stage"]) == ("p017", "all", "read")
    assert "t2.nii.gz" in row["message"] and str(tmp_path) not in row["message"]
    evaluate(bundle, cohort, tmp_path / "b", scenarios=scenarios, reports=False)
    whole = rows_of(tmp_path / "b" / "predictions.csv")
    left = rows_of(tmp_path / "a" / "predictions.csv")
    assert left and [r["record_id"] for r in left] == [
        r["record_id"] for r in whole if r["record_id"] != "p017"
    ]
    assert "p017" in (tmp_path / "a" / "index.html").read_text(encoding="utf-8")


def test_a_patient_the_scenario_empties_is_a_failure_too(bundle, cohort, tmp_path):
    names = ",".join(s.name for s in cohort.specs)
    result = evaluate(bundle, cohort, tmp_path / "o", scenarios=(f"drop:{names}",), reports=False)
    assert result.failures == result.records > 0
    assert {r["stage"] for r in rows_of(tmp_path / "o" / "failures.csv")} == {"hide"}
    assert rows_of(tmp_path / "o" / "metrics.csv") == []
    assert (tmp_path / "o" / "index.html").is_file()


def test_one_that_fails_later_does_not_stop_its_batch(bundle, cohort, tmp_path, monkeypatch):
    original = module.answer

    def picky(bundle, records, *, seed, methods):
        if any(r.record_id == "p016" for r in records):
            raise PatientDataError(Problem("Patient p016", "cannot be answered"))
        return original(bundle, records, seed=seed, methods=methods)

    monkeypatch.setattr(module, "answer", picky)
    result = evaluate(bundle, cohort, tmp_path / "o", reports=True)
    assert result.failures == 1
    (row,) = rows_of(tmp_path / "o" / "failures.csv")
    assert (row["record_id"], row["stage"]) == ("p016", "predict")
    answered = {r["record_id"] for r in rows_of(tmp_path / "o" / "predictions.csv")}
    assert len(answered) == result.records - 1


def test_bugs_are_not_swallowed(bundle, cohort, tmp_path, monkeypatch):
    def bug(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(module, "answer", bug)
    result = evaluate(bundle, cohort, tmp_path / "o")
    assert result.unexpected == result.failures == result.records > 0
    messages = {r["message"] for r in rows_of(tmp_path / "o" / "failures.csv")}
    assert all("ZeroDivisionError in dymo_med/inference/evaluate.py:" in m for m in messages)
    assert len(messages) == result.records and rows_of(tmp_path / "o" / "metrics.csv") == []
    assert (tmp_path / "o" / "index.html").is_file()


def test_wrong_questions_are_refused_before_anything_is_written(bundle, cohort, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"no split 'tets'.*test"):
        evaluate(bundle, cohort, out, split="tets")
    with pytest.raises(ConfigError):
        evaluate(bundle, cohort, out, scenarios=("rate:7",))
    unlabelled = replace(cohort, records=tuple(replace(r, label=None) for r in cohort.records))
    with pytest.raises(ConfigError, match="no record whose grade is known"):
        evaluate(bundle, unlabelled, out)
    assert not out.exists()


def test_a_cohort_about_something_else_does_not_fit(bundle, cohort, tmp_path):
    first, *others = cohort.specs
    other = replace(
        cohort,
        task=replace(cohort.task, classes=("no", "yes")),
        specs=(replace(first, shape=(1, 8, 8, 8)), *others[1:]),
    )
    with pytest.raises(BundleError) as error:
        evaluate(bundle, other, tmp_path / "out")
    text = str(error.value)
    assert "classes differ" in text and "'t1'" in text and "'t2'" in text


@pytest.mark.usefixtures("plain")
def test_a_modality_may_lie_in_another_file(bundle, cohort_dir, tmp_path):
    folder = tmp_path / "cohort"
    shutil.copytree(cohort_dir, folder)
    description = (
        (folder / "cohort.yaml").read_text(encoding="utf-8").replace("t2.nii.gz", "second.nii.gz")
    )
    (folder / "cohort.yaml").write_text(description)
    for path in folder.glob("patients/*/t2.nii.gz"):
        path.rename(path.with_name("second.nii.gz"))
    evaluate(bundle, read_cohort(folder), tmp_path / "a", reports=False)
    evaluate(bundle, read_cohort(cohort_dir), tmp_path / "b", reports=False)
    name = "predictions.csv"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.usefixtures("plain")
def test_another_selector_is_compared_with_what_it_is_not(bundle, cohort, tmp_path):
    other = bundle.with_selector("trust_all")
    evaluate(other, cohort, tmp_path / "o", scenarios=("rate:0.5",), reports=False)
    methods = {r["method"] for r in rows_of(tmp_path / "o" / "metrics.csv")}
    others = {"observed_only", "dymo", *REFERENCES}
    assert methods == {"trust_all", "oracle", *others, *(f"trust_all - {m}" for m in others)}


def test_more_selectors_are_compared_when_asked_for(bundle, cohort, tmp_path):
    asked = ("gate", "subset_average")
    evaluate(bundle, cohort, tmp_path / "o", reports=1, methods=asked)
    methods = {r["method"] for r in rows_of(tmp_path / "o" / "predictions.csv")}
    assert methods == {"observed_only", "trust_all", "dymo", *asked, *REFERENCES}
    page = (tmp_path / "o" / "index.html").read_text(encoding="utf-8")
    assert "fitted gate" in page and "averaged by trust" in page
    with pytest.raises(ConfigError, match="no selector called"):
        evaluate(bundle, cohort, tmp_path / "p", methods=("gaet",))
    assert not (tmp_path / "p").exists()


def test_one_class_only_is_not_measurable_but_done(bundle, cohort, tmp_path):
    records = tuple(replace(r, label=1) for r in cohort.records)
    evaluate(bundle, replace(cohort, records=records), tmp_path / "o", reports=False)
    row = next(r for r in rows_of(tmp_path / "o" / "metrics.csv") if r["metric"] == "auroc")
    assert (row["value"], row["low"], row["high"]) == ("", "", "")
    assert "Not measurable" in (tmp_path / "o" / "index.html").read_text(encoding="utf-8")


def test_many_classes_and_hostile_names_on_the_page(tmp_path):
    hostile = '<img src=x onerror="alert(1)">'
    classes = ("a", hostile, "c")
    generator = np.random.default_rng(0)
    predictions = []
    for method in ("observed_only", "trust_all", "dymo"):
        for i in range(12):
            p = generator.dirichlet(np.ones(3))
            predictions.append(
                {
                    "scenario": "as-is",
                    "record_id": f"r{i}",
                    "patient_id": f"r{i}",
                    "label": classes[i % 3],
                    "method": method,
                    **{f"prob_{c}": float(x) for c, x in zip(classes, p, strict=True)},
                    "predicted": classes[int(p.argmax())],
                    "observed": "t1",
                    "trusted": "t2",
                    "rejected": "",
                    "absent": hostile,
                    "pattern": "t1~",
                }
            )
    collector = Collector("as-is", classes, ["t1", "t2", hostile], "dymo")
    known = {"points_to": {"t2": 0}, "set": [0], "calibrated_on": 9, "subgroups": {"site": hostile}}
    collector.add(predictions, {f"r{i}": known for i in range(12)})
    scores = [collector.scores()]
    table = metrics(scores, 0, 0)
    facts = {
        "cohort": hostile,
        "split": "test",
        "target": hostile,
        "classes": classes,
        "modalities": ["t1", "t2", hostile],
        "scenarios": ["as-is"],
        "methods": ["observed_only", "trust_all", "dymo"],
        "selector": "dymo",
        "seed": 0,
        "records": 12,
        "patients": 12,
        "failed_records": 1,
        "patients_seen_in_training": 0,
        "bundle": {"name": hostile, "version": "0", "id": "f" * 64},
        "device": "cpu",
        "versions": {"dymo_med": "0"},
    }
    failures = [{"record_id": hostile, "scenario": "all", "stage": "read", "message": hostile}]
    parts = {"patterns": list(by_pattern(scores, 0)), "subgroups": list(by_subgroup(scores, 0))}
    write_pages(tmp_path, facts, scores, table, predictions, failures, **parts)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page and "&lt;img src=x" in page
    assert "Probability of the answer" in page
    assert "1 of 12 records could not be answered" in page
