"""Every component under everything that uses it: tables that a new entry is in by itself.

Laws of one component say nothing about those who call it. Here each backbone, segmentation network,
imputer and task goes through every command that reads a bundle, through explanations, draws and
what measuring would be worth.
"""

import csv
import json

import pytest
import torch

from dymo_med.backbones import BACKBONES, SEGMENTERS, encode_versions
from dymo_med.bundle import load_bundle
from dymo_med.calibration import Calibration
from dymo_med.cli import app, main
from dymo_med.imputers import IMPUTERS
from dymo_med.inference import evaluate, quality
from dymo_med.inference.explain import Subject, explain
from dymo_med.inference.predict import predict_patient
from dymo_med.inference.prediction_file import read_prediction
from dymo_med.selection import SELECTORS, fit_statistics
from dymo_med.tasks import TASKS as KINDS
from tests.contracts.conftest import LACKS, TASKS
from tests.contracts.test_components import NAMES, SPECS, K, build, make_batch

# A bundle for every entry: task, backbone, imputer. A backbone that recovers has a partner.
SUBJECTS = {
    **{
        f"backbone {name}": ("classification", name, name if name in IMPUTERS else "mopoe")
        for name in BACKBONES
    },
    **{f"backbone {name}": ("segmentation", name, "synthesis") for name in SEGMENTERS},
    **{
        f"imputer {name}": ("classification", "transformer", name)
        for name in IMPUTERS
        if name != "mopoe"  # that of the transformer above
    },
    "task regression": ("regression", "transformer", "mopoe"),
}


# --- Every command --------------------------------------------------------------------------------


def predicts(run, tiny, bundle, task, tmp_path):
    """Of a patient who lacks a scan; on so few calibration patients nothing recovered is used."""
    patient = "-i", tiny.patients / "p17", "-b", bundle
    out = tmp_path / "out"
    run("predict", *patient, "-o", out)
    answer = json.loads((out / "prediction.json").read_text())
    assert "t1" in answer["observed"] and "t2" not in (*answer["observed"], *answer["trusted"])
    run("check", out)
    run("report", out / "prediction.json", "-o", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == (out / "report.html").read_bytes()
    run("predict", *patient, "-o", tmp_path / "trusting", "--selector", "trust_all")
    answer = json.loads((tmp_path / "trusting" / "prediction.json").read_text())
    assert "t2" in (*answer["trusted"], *answer["absent"]) and not answer["rejected"]


def evaluates(run, tiny, bundle, task, tmp_path):
    out = tmp_path / "evaluation"
    asked = ["-m", "as-is", "-m", "rate:0.5"]
    if task != "segmentation":
        asked += ["--reports", 2, "--draws", 19]
    run("evaluate", "-b", bundle, "-c", tiny.cohort(task), "-o", out, *asked)
    assert (out / "failures.csv").read_text().count("\n") == 1
    with (out / ("cases.csv" if task == "segmentation" else "predictions.csv")).open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["record_id"] for row in rows} == set(LACKS)
    before = (out / "metrics.csv").read_bytes()
    run("evaluate", "-b", bundle, "-c", tiny.cohort(task), "-o", out, *asked, "--resume")
    assert (out / "metrics.csv").read_bytes() == before


def imputes(run, tiny, bundle, task, tmp_path):
    run("impute", "-i", tiny.patients / "p17", "-b", bundle, "-o", tmp_path / "out")
    made = json.loads((tmp_path / "out" / "recovered" / "recovered.json").read_text())
    assert all((tmp_path / "out" / name).is_file() for name in made["files"].values())


def checks(run, tiny, bundle, task, tmp_path):
    run("check", bundle)
    run("check", tiny.cohort(task), "--against", bundle)
    run("check", tiny.patients / "p17", "--against", bundle)
    run("check", bundle.parent.with_suffix(".yaml"), "--against", tiny.cohort(task))


# What reads a bundle, or what one wrote.
COMMANDS = {
    "predict": predicts,
    "evaluate": evaluates,
    "impute": imputes,
    "check": checks,
}
# Part of one above, or without a bundle.
OTHERS = {"report", "train", "demo", "simulate", "review", "export", "info", "describe"}
# Tasks that go through all commands in a module of their own.
ELSEWHERE = {"survival"}  # tests/unit/test_survival.py
DEVICE = {"predict", "evaluate", "impute"}


def test_every_command_is_in_the_table():
    assert {c.callback.__name__ for c in app.registered_commands} == {*COMMANDS, *OTHERS}


def test_every_task_is_in_the_table():
    assert set(KINDS) == {*TASKS, *ELSEWHERE}
    assert {task for task, _, _ in SUBJECTS.values()} == set(TASKS)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_component_goes_through_every_command(
    tiny, capsys, tmp_path, monkeypatch, subject, name
):
    if subject != "task regression":
        # Plots and pages take most of a small evaluation's time.
        monkeypatch.setattr(evaluate, "write_pages", lambda *_, **__: None)
        for plot in ("_plot", "_plot_pictures"):
            monkeypatch.setattr(quality, plot, lambda *_: None)

    def run(*arguments):
        device = ["-d", "cpu"] if arguments[0] in DEVICE else []
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in (*arguments, *device)])
        printed = capsys.readouterr()
        assert stopped.value.code == 0, printed.out + printed.err

    task, backbone, imputer = SUBJECTS[subject]
    COMMANDS[name](run, tiny, tiny.bundle(task, backbone, imputer), task, tmp_path)


# --- Draws, and what measuring would be worth -----------------------------------------------------


@pytest.mark.parametrize("subject", [n for n, s in SUBJECTS.items() if s[0] != "segmentation"])
def test_draws_and_what_to_measure_next(tiny, tmp_path, subject):
    task, backbone, imputer = SUBJECTS[subject]
    bundle = load_bundle(tiny.bundle(task, backbone, imputer), "cpu")
    for patient in LACKS:
        out = tmp_path / patient
        prediction = predict_patient(tiny.patients / patient, bundle, out, explain=False, draws=5)
        file = read_prediction(out / "prediction.json")
        proposed = {*prediction.trusted, *prediction.rejected}
        if not (bundle.imputer.probabilistic and proposed):
            assert file.draws is None and file.acquire is None
            continue
        assert file.draws.n == 5
        for summary in (file.draws.own, file.draws.trust_all):
            assert [sum(p) for p in summary.probabilities] == pytest.approx([1] * 5)
        # What is proposed is worth so much, and of what is not it is said that nobody knows.
        absent = {s.name for s in bundle.specs} - set(prediction.observed)
        assert proposed == {gain.modality for gain in file.acquire.gains}
        assert absent - proposed == set(file.acquire.unknown)


# --- Explanations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["observed_only", "dymo"])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_is_explained_whatever_goes_unused(name, selector):
    backbone = build(BACKBONES, name)
    batch, train = make_batch(4, seed=4), make_batch(30, seed=3)
    recovery = build(IMPUTERS, "mopoe").recover(batch)
    with torch.no_grad():
        statistics = fit_statistics(
            encode_versions(backbone, train),
            train.observed.available,
            train.labels,
            torch.ones(30, dtype=torch.float64),
            K,
            backbone.distance,
        )
        fuse = encode_versions(backbone, batch, recovery)
        trace = SELECTORS[selector]().select(fuse, batch.observed, recovery.candidates, statistics)
    unused = False
    for row in range(len(batch)):
        subject = Subject(
            *(backbone, batch, recovery, trace, row),
            calibration=Calibration(1.3, 40, None),
            base_rates=(0.5, 0.3, 0.2),
        )
        unused |= len(subject.names) < len(NAMES)
        shown = {n: batch.observed_fields.get(n) for n in batch.observed.of(row)}
        observed = {n: None if f is None else f[row] for n, f in shown.items()}
        found = explain(subject, observed, seed=0)
        whole = [a for a in found.attributions if a.method == "shapley"]
        assert tuple(a.modality for a in whole) == subject.names
        assert {a.modality for a in found.attributions} <= set(subject.names)
        probability = torch.softmax(trace.output.logits[row] / 1.3, -1)
        expected = float(probability[subject.chosen]) - subject.base_rate
        assert sum(a.value for a in whole) == pytest.approx(expected, abs=1e-9)
        seen = {} if found.saliency is None else found.saliency.maps
        shapes = {s.name: s.shape[1:] for s in SPECS}
        assert all(tuple(m.shape) == shapes[n] for n, m in seen.items())
    assert unused
