"""The bundle that comes with the package, on simulated patients it has never seen."""

import csv
import itertools

import numpy as np
import pytest
import torch

from dymo_med.bundle import hashed_id, load_bundle
from dymo_med.cli import main
from dymo_med.data.cohort import read_cohort
from dymo_med.data.patient import read_patient
from dymo_med.data.simulate import simulate
from dymo_med.demo import PATIENTS, SCENARIOS, shipped_bundle
from dymo_med.inference.evaluate import evaluate
from dymo_med.inference.predict import predict_batch, predict_patient


@pytest.fixture(scope="module")
def shipped():
    return load_bundle(shipped_bundle(), "cpu")


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    return read_cohort(simulate(tmp_path_factory.mktemp("s") / "c", patients=16, seed=77, size=48))


def complete(shipped, cohort):
    for entry in cohort.records:
        record = read_patient(entry.folder, shipped.specs)
        if len(record.modalities) == len(shipped.specs):
            return record
    raise AssertionError("no complete patient")


def test_it_is_small_and_says_where_it_comes_from(shipped):
    size = sum(f.stat().st_size for f in shipped_bundle().rglob("*") if f.is_file())
    assert size < 10_000_000
    assert shipped.provenance["recipe"]["name"] == "simulated-glioma"
    assert shipped.provenance["records"]["train"] == 305


def test_all_127_patterns_are_answered(shipped, patients):
    record = complete(shipped, patients)
    names = [spec.name for spec in shipped.specs]
    patterns = [kept for size in range(1, 8) for kept in itertools.combinations(names, size)]
    assert len(names) == 7 and len(patterns) == 127
    hidden = [record.without([n for n in names if n not in kept]) for kept in patterns]
    for start in range(0, 127, 16):
        answers = predict_batch(shipped, hidden[start : start + 16], explain=False, seed=0)
        for kept, answer in zip(patterns[start : start + 16], answers, strict=True):
            assert answer.observed == kept
            assert set(answer.recovered) >= set(names) - set(kept)
            assert set(answer.trusted) | set(answer.rejected) == set(answer.recovered)
            assert answer.absent == ()
            assert np.isfinite(answer.probabilities).all()
            assert abs(sum(answer.probabilities) - 1) < 1e-6


def test_predict_and_evaluate_agree(shipped, patients, tmp_path):
    """The same patient alone and within a cohort: same probabilities, same selection."""
    evaluate(shipped, patients, tmp_path / "e", split="train", reports=0)
    with (tmp_path / "e" / "predictions.csv").open(newline="", encoding="utf-8") as stream:
        rows = [r for r in csv.DictReader(stream) if r["method"] == shipped.choice.name]
    assert len(rows) >= 7
    for row in rows:
        folder = patients.root / "patients" / row["record_id"]
        alone = predict_patient(folder, shipped, explain=False)
        assert abs(alone.probabilities[1] - float(row["prob_high"])) < 1e-5
        assert "+".join(alone.trusted) == row["trusted"]
        assert "+".join(alone.rejected) == row["rejected"]


def test_none_of_the_demo_patients_made_the_bundle(shipped):
    used = {h for part in shipped.provenance["patients"].values() for h in part}
    assert len(used) == 453
    assert not used & {hashed_id(shipped.name, f"s1000-p{i:04d}") for i in range(PATIENTS)}


def test_a_recovered_scan_keeps_what_the_other_sequences_show(shipped, patients):
    """FLAIR recovered from the other sequences is closer to the truth than the mean FLAIR."""
    from dymo_med.data.batch import collate

    records = [read_patient(e.folder, shipped.specs) for e in patients.records]
    records = [r for r in records if {"t2", "flair"} <= set(r.modalities)]
    truth = collate(records, shipped.specs).values["flair"]
    hidden = collate([r.without(["flair"]) for r in records], shipped.specs)
    recovered = shipped.imputer.recover(hidden).values["flair"]
    mean = shipped.imputer.decoders["flair"].mean_image
    error = float((recovered - truth).square().mean())
    assert error < 0.8 * float((mean - truth).square().mean())
    assert torch.isfinite(recovered).all()


@pytest.mark.slow
def test_the_demo_runs_twice_in_a_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dymo_med.demo.PATIENTS", 8)
    monkeypatch.setattr("dymo_med.demo.REPORTS", 1)
    monkeypatch.setattr("dymo_med.demo.SCENARIOS", SCENARIOS[1:])
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            main(["demo", "--out", str(tmp_path / "demo"), "-d", "cpu"])
        assert stopped.value.code == 0
    out = capsys.readouterr().out
    for name in ("prediction/report.html", "evaluation/index.html", "prediction/recovered"):
        assert (tmp_path / "demo" / name).exists() and name in out
    assert (tmp_path / "demo" / "prediction" / "recovered" / "flair_synthetic.nii.gz").exists()
    # Nobody of the demo took part in making the bundle, so nothing warns of it.
    assert "training" not in (tmp_path / "demo" / "evaluation" / "failures.csv").read_text()
