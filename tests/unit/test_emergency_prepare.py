"""The preparation script of the emergency cohort, on made-up tables of the same layout."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dymo_med.bundle import load_bundle
from dymo_med.data.cohort import read_cohort
from dymo_med.data.patient import read_patient
from dymo_med.inference.check import check
from dymo_med.training.train import train
from tests.conftest import shared_data

FOLDER = Path(__file__).resolve().parents[2] / "cohorts" / "emergency"
DESCRIBED = yaml.safe_load((FOLDER / "cohort.yaml").read_text(encoding="utf-8"))
OFTEN = ("demographics", "triage")
LABELS = ("cardiac", "noncardiac", "")
RECIPE = """
name: tiny
imputer: {name: iterative}
backbone: {name: transformer, dim: 16, heads: 2, layers: 1, table_encoder: row}
backbone_training: {epochs: 1, batch_size: 16, learning_rate: 0.001}
"""


def prepare(source, out, *options):
    command = [sys.executable, FOLDER / "prepare.py", source, out, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def cell(column, rng):
    """Return what a cell of a column may hold."""
    if column["type"] == "categorical":
        return f"{rng.choice(column['values'])}{' ' * int(rng.integers(2))}"
    low, high = column["range"]
    if column.get("censored") == "limit" and rng.random() < 0.8:
        return "<0.05"
    return f"{low + (high - low) * (0.2 + 0.2 * rng.random()):.3g}"


@pytest.fixture
def source(tmp_path):
    """Sixty patients, a third not labelled; every patient lacks some groups of tests."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "source"
    folder.mkdir()
    for name, table in DESCRIBED["modalities"].items():
        rows = []
        for number in range(60):
            ordered = name in OFTEN or rng.random() < 0.6
            row = {
                c["header"]: cell(c, rng) if ordered and rng.random() < 0.8 else ""
                for c in table["columns"].values()
            }
            rows.append({"id": 1000 + number, **row, "Outcome": "died"})
        write(folder / table["file"], rows)
    rows = [
        {"id": 1000 + n, "final_diagnosis": "Arrhythmia", "cardiac": LABELS[n % 3]}
        for n in range(60)
    ]
    write(folder / "labels.csv", rows)
    return folder


def write(path, rows):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_cohort_comes_out_and_an_epoch_trains_on_it(source, tmp_path):
    done = prepare(source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert check(tmp_path / "out").problems == ()
    cohort = read_cohort(tmp_path / "out")
    assert len(cohort.records) == 60
    for split in ("train", "validation", "calibration", "test"):
        assert {r.label for r in cohort.in_split(split)} == {None, 0, 1}
    text = "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "out").rglob("*.csv"))
    assert "died" not in text and "Arrhythmia" not in text
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    bundle = load_bundle(train(recipe, tmp_path / "out", tmp_path / "run"), device="cpu")
    assert bundle.provenance["labelled_records"]["train"] < len(cohort.in_split("train"))


def test_results_below_a_limit_are_the_limit_and_what_nobody_ordered_is_missing(source, tmp_path):
    assert prepare(source, tmp_path / "out").returncode == 0
    cohort = read_cohort(tmp_path / "out")
    spec = next(s for s in cohort.specs if s.name == "troponin")
    with (source / "troponin.csv").open(newline="") as stream:
        written = {row["id"]: row["Troponine - I (Q)"] for row in csv.DictReader(stream)}
    assert {"", "<0.05"} < set(written.values())
    for entry in cohort.records:
        got = read_patient(entry.folder, cohort.specs).modalities.get("troponin")
        told = written[entry.record_id]
        assert (got is None) == (told == "")
        if got is not None:
            assert torch.equal(got.observed_fields, torch.ones(1, dtype=torch.bool))
            assert float(got.values[0]) == pytest.approx(float(told.lstrip("<")), abs=1e-6)
    assert spec.columns[0].rules.censored == "limit"


def test_the_seed_decides_the_split(source, tmp_path):
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        prepare(source, out, "--seed", seed)
    a, b, c = ((out / "splits.csv").read_text(encoding="utf-8") for out in outs)
    assert a == b != c


def test_what_prepare_refuses(source, tmp_path):
    assert "no labels.csv" in prepare(tmp_path, tmp_path / "out").stderr
    (tmp_path / "out").mkdir()
    assert "exists already" in prepare(source, tmp_path / "out").stderr
    for rows, why in (
        (["1000,cardiac", "1000,"], "in two rows"),
        (["1000,perhaps"], "cardiac or noncardiac"),
        (["1000,cardiac"], "has not the same ids"),
    ):
        (source / "labels.csv").write_text("\n".join(["id,cardiac", *rows]) + "\n")
        assert why in prepare(source, tmp_path / "other").stderr
    (source / "urine.csv").unlink()
    assert "urine.csv" in prepare(source, tmp_path / "other").stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.shared
def test_the_real_source(tmp_path):
    source = shared_data("cardio")
    assert prepare(source, tmp_path / "out").returncode == 0
    report = check(tmp_path / "out")
    assert report.problems == () and sum(report.patterns.values()) == 501
    cohort = read_cohort(tmp_path / "out")
    assert sum(r.label is not None for r in cohort.records) == 247
