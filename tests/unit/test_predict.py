import csv
import dataclasses
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dymo_med.errors import ConfigError, PatientDataError
from dymo_med.files import complete_folder, write_csv, write_json
from dymo_med.inference import answer as answer_module
from dymo_med.inference import assemble
from dymo_med.inference import predict as module
from dymo_med.inference.answer import answer
from dymo_med.inference.assemble import selection_steps
from dymo_med.inference.predict import predict_batch, predict_patient
from dymo_med.inference.recovered import impute_patient, write_recovered
from dymo_med.selection import SELECTORS
from dymo_med.types import FusionOutput, SelectionTrace


def hand_made_trace():
    """Two records, three modalities: a is observed; b is admitted; c rejected, or stopped."""
    nan = math.nan
    reward = torch.tensor([[[nan, 0.2, -0.1], [nan, 0.3, 0.1]], [[nan, nan, nan], [nan, nan, 0.0]]])
    grid = torch.where(reward.isnan(), reward, torch.full_like(reward, 0.5))
    return SelectionTrace(
        names=("a", "b", "c"),
        method="dymo",
        observed=torch.tensor([[True, False, False], [True, True, False]]),
        candidates=torch.tensor([[False, True, True], [False, True, True]]),
        used=torch.tensor([[True, True, False], [True, True, False]]),
        admitted=torch.tensor([[False, True, False], [False, True, False]]),
        chosen=torch.tensor([[1, 1], [-1, -1]]),
        reward=reward,
        quality_before=torch.full((2, 2), 0.4),
        quality_after=grid,
        similarity_before=torch.full((2, 2), -1.0),
        similarity_after=grid,
        factor=grid,
        borrowed=reward.isnan().logical_not(),
        trust=torch.full_like(reward, nan),
        threshold=0.0,
        output=FusionOutput(torch.zeros(2, 2), torch.zeros(2, 4)),
    )


def test_steps_say_what_became_of_every_candidate():
    trace = hand_made_trace()
    first = [(s.step, s.modality, s.version, s.decision) for s in selection_steps(trace, 0)]
    assert first == [(1, "b", "recovered", "admitted"), (1, "c", "recovered", "rejected")]
    second = [(s.step, s.modality, s.version, s.decision) for s in selection_steps(trace, 1)]
    assert second == [
        (1, "b", "completed", "admitted"),
        (1, "c", "recovered", "not yet"),
        (2, "c", "recovered", "stopped"),
    ]


def test_alone_and_in_a_batch_the_answers_agree(bundle, records):
    together = predict_batch(bundle, records, explain=False)
    for record, expected in zip(records, together, strict=True):
        (alone,) = predict_batch(bundle, [record], explain=False)
        assert alone.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
        for method, p in alone.alternatives.items():
            assert p == pytest.approx(expected.alternatives[method], abs=1e-5)
        for name in ("observed", "partly", "recovered", "trusted", "rejected", "absent"):
            assert getattr(alone, name) == getattr(expected, name), name
        assert [(s.step, s.modality, s.decision) for s in alone.steps] == [
            (s.step, s.modality, s.decision) for s in expected.steps
        ]


def test_a_prediction_is_consistent(bundle, records):
    for record, p in zip(records, predict_batch(bundle, records, explain=False), strict=True):
        assert sum(p.probabilities) == pytest.approx(1)
        assert p.observed == tuple(s.name for s in bundle.specs if s.name in record.modalities)
        assert set(p.recovered) == set(p.trusted) | set(p.rejected)
        assert not set(p.trusted) & set(p.rejected)
        assert set(p.recovered) & set(p.observed) <= set(p.partly)
        assert {s.modality for s in p.steps} == set(p.recovered)
        admitted = {s.modality for s in p.steps if s.decision == "admitted"}
        assert admitted == set(p.trusted)
        assert set(p.alternatives) == {"observed_only", "trust_all"}
        assert p.attributions == ()
        if not p.recovered:
            assert p.alternatives["observed_only"] == pytest.approx(p.probabilities, abs=1e-6)


def test_complete_records_have_nothing_to_decide(bundle, records):
    complete = [r for r in records if len(r.modalities) == len(bundle.specs)]
    complete = [
        r
        for r in complete
        if all(v.observed_fields is None or v.observed_fields.all() for v in r.modalities.values())
    ]
    for p in predict_batch(bundle, complete, explain=False):
        assert p.steps == () and p.recovered == () and p.absent == ()


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_answers_consistently(bundle, records, name):
    usual = predict_batch(bundle, records[:6], explain=False)
    for p, own in zip(predict_batch(bundle.with_selector(name), records[:6]), usual, strict=True):
        assert p.method == name
        assert set(p.alternatives) == {"observed_only", "trust_all", "dymo"} - {name}
        known = {**own.alternatives, "dymo": own.probabilities}
        if name in known:
            assert p.probabilities == pytest.approx(known[name], abs=1e-9)
        assert sum(p.probabilities) == pytest.approx(1)
        assert set(p.recovered) == set(p.trusted) | set(p.rejected)
        if p.steps:
            admitted = {s.modality for s in p.steps if s.decision == "admitted"}
            assert admitted == set(p.trusted)
            assert {s.modality for s in p.steps} == set(p.recovered)
        if p.subsets:
            assert sum(s.weight for s in p.subsets) == pytest.approx(1)
            assert set(p.trusted) == {n for n, w in p.trust.items() if w > 0.5}
        # What drove the answer adds up to it, an average over subsets included.
        chosen = max(range(2), key=lambda k: p.probabilities[k])
        modalities = [a for a in p.attributions if not a.name]
        total = p.base_rates[chosen] + sum(a.value for a in modalities)
        assert total == pytest.approx(p.probabilities[chosen], abs=1e-6)


def test_a_complete_patient_is_no_average(bundle, records):
    average = bundle.with_selector("subset_average")
    predictions = predict_batch(average, records, explain=False)
    assert any(p.subsets for p in predictions)
    for p in predictions:
        assert bool(p.subsets) == bool(p.recovered)


def test_an_infinite_margin_in_every_file(bundle, records, cohort, tmp_path):
    margin = SELECTORS["dymo_margin"]()
    margin.load_state({"margin": None})
    selectors = {**bundle.selectors, "dymo_margin": margin}
    never = dataclasses.replace(bundle, selectors=selectors).with_selector("dymo_margin")
    (p,) = [q for q in predict_batch(bundle, records, explain=False) if q.steps][:1]
    entry = next(r for r in cohort.records if r.record_id == p.record_id)
    p = predict_patient(entry.folder, never, tmp_path / "out", explain=False)
    assert p.trusted == () and p.probabilities == pytest.approx(p.alternatives["observed_only"])
    told = json.loads((tmp_path / "out" / "prediction.json").read_text(encoding="utf-8"))
    with (tmp_path / "out" / "selection.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(p.steps) > 0
    assert {row["threshold"] for row in rows} == {""}
    assert {step["threshold"] for step in told["steps"]} == {None}
    assert "Nothing is admitted" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_an_unknown_selector_is_refused(bundle):
    with pytest.raises(ConfigError, match=r"no selector called 'gaet'.*Did you mean 'gate'"):
        bundle.with_selector("gaet")


def test_no_records_no_predictions(bundle):
    assert predict_batch(bundle, []) == []


def test_a_class_flip_is_a_warning(bundle, records):
    (p,) = predict_batch(bundle, records[:1], explain=False)
    own, other = (0.9, 0.1), (0.2, 0.8)
    trace = answer(bundle, records[:1]).own
    others = {"observed_only": other, "trust_all": own}
    args = (bundle, records[0], trace, 0, own, others, p.steps, {})
    assert any("Measurements alone would say high" in w for w in assemble._warnings(*args))


def test_out_of_training_range_is_a_warning_without_the_value(bundle, records):
    record = records[0]
    labs = record.modalities["labs"]
    far = dataclasses.replace(labs, values=labs.values.clone().index_fill_(0, torch.tensor(0), 1e4))
    strange = dataclasses.replace(record, modalities={**record.modalities, "labs": far})
    (p,) = predict_batch(bundle, [strange], explain=False)
    assert any("outside the range" in w and "ldh" in w for w in p.warnings)
    assert not any("10000" in w for w in p.warnings)


def test_one_patient_from_folder_to_files(bundle, cohort_dir, tmp_path):
    folder = cohort_dir / "patients" / "p003"
    out = tmp_path / "new" / "out"
    p = predict_patient(folder, bundle, out, seed=5)
    assert sorted(path.name for path in out.iterdir()) == [
        "prediction.json",
        "recovered",
        "report.html",
        "selection.csv",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    data = json.loads((out / "prediction.json").read_text(encoding="utf-8"))
    assert next(iter(data)) == "schema_version"
    assert data["record_id"] == "p003" and data["seed"] == 5
    assert tuple(data["probabilities"]) == p.probabilities  # the same bits
    assert data["bundle_id"] == bundle.bundle_id
    assert data["versions"]["torch"] == torch.__version__
    assert {n: s["sha256"] for n, s in data["sources"].items()} == {
        n: s.sha256 for n, s in p.sources.items()
    }
    assert set(data["recovered_files"]) == set(p.recovered)
    files = {str(path.relative_to(out)) for path in (out / "recovered").iterdir()}
    assert files == {f"recovered/{path.name}" for path in (out / "recovered").iterdir()}
    assert {f["file"] for f in data["recovered_files"].values()} == files
    for made in data["recovered_files"].values():
        content = (out / made["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == made["sha256"]
    with (out / "selection.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [r["modality"] for r in rows] == [s.modality for s in p.steps]
    assert list(rows[0]) == list(type(p.steps[0]).__dataclass_fields__)


def test_same_seed_same_files(bundle, cohort_dir, tmp_path):
    folder = cohort_dir / "patients" / "p003"
    for name in ("a", "b"):
        predict_patient(folder, bundle, tmp_path / name)
    first = sorted(p for p in (tmp_path / "a").rglob("*") if p.is_file())
    for path in first:
        again = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == again.read_bytes(), path.name


def test_without_explanation_nothing_is_attributed(bundle, cohort_dir, tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("explained although not asked to")

    monkeypatch.setattr(answer_module, "explain", forbidden)
    p = predict_patient(cohort_dir / "patients" / "p003", bundle, tmp_path / "o", explain=False)
    assert p.attributions == ()
    assert "not computed" in (tmp_path / "o" / "report.html").read_text(encoding="utf-8")


def test_foreign_folders_are_left_alone(bundle, cohort_dir, tmp_path):
    folder = cohort_dir / "patients" / "p003"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("irreplaceable")
    for run in (predict_patient, impute_patient):
        with pytest.raises(ConfigError, match="not written by this command"):
            run(folder, bundle, foreign)
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"]
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        predict_patient(folder, bundle, file)


def test_an_earlier_output_is_replaced_whole(bundle, cohort_dir, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    predict_patient(cohort_dir / "patients" / "p003", bundle, out)
    (out / "recovered" / "stale").write_text("x")
    predict_patient(cohort_dir / "patients" / "p001", bundle, out, explain=False)
    assert not (out / "recovered" / "stale").exists()
    assert json.loads((out / "prediction.json").read_text(encoding="utf-8"))["record_id"] == "p001"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_the_earlier_output(bundle, cohort_dir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    predict_patient(cohort_dir / "patients" / "p003", bundle, out, explain=False)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}

    def broken(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(module, "write_report", broken)
    with pytest.raises(OSError, match="disk full"):
        predict_patient(cohort_dir / "patients" / "p003", bundle, out, explain=False)
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_bad_patient_writes_nothing(bundle, tmp_path):
    empty = tmp_path / "p"
    empty.mkdir()
    with pytest.raises(PatientDataError):
        predict_patient(empty, bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_impute_writes_only_what_was_missing(bundle, cohort_dir, tmp_path):
    out = tmp_path / "out"
    written = impute_patient(cohort_dir / "patients" / "p003", bundle, out)
    p = predict_patient(cohort_dir / "patients" / "p003", bundle, explain=False)
    assert len(written) == len(p.recovered) > 0
    assert all(path.is_file() and path.parent == out / "recovered" for path in written)
    assert all("synthetic" in path.name for path in written)
    assert (
        json.loads((out / "recovered" / "recovered.json").read_text(encoding="utf-8"))["synthetic"]
        is True
    )
    impute_patient(cohort_dir / "patients" / "p003", bundle, out)


def test_recovered_volumes_lie_on_the_observed_grid(bundle, records, tmp_path):
    import nibabel

    record = next(r for r in records if {"t1", "t2"} <= set(r.modalities)).without(["t2"])
    answers = answer(bundle, [record])
    files = write_recovered(bundle, record, answers, 0, tmp_path / "recovered")
    image = nibabel.load(tmp_path / files["t2"])
    np.testing.assert_allclose(image.affine, record.modalities["t1"].source.affine)
    np.testing.assert_array_equal(
        image.get_fdata(dtype=np.float32), answers.recovery.values["t2"][0, 0].numpy()
    )


def test_replacing_deletes_nothing_that_was_not_written(tmp_path, monkeypatch):
    def fill(out):
        with complete_folder(out, "m", ("m",)) as folder:
            (folder / "m").write_text("x")

    out = tmp_path / "out"
    fill(out)
    (out / ".DS_Store").touch()
    fill(out)
    assert [p.name for p in out.iterdir()] == ["m"]
    (out / "notes.txt").write_text("irreplaceable")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        fill(out)
    assert (out / "notes.txt").is_file()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link")
    fill(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "m").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match="folder you are in"):
        fill(Path())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "link", "out", "real"]
    fill(tmp_path / ("n" * 255))  # as long as a name may be


def test_files_are_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(ValueError), complete_folder(tmp_path / "out", "m", ("m",)) as folder:
        (folder / "half").write_text("x")
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "a.json", {"x": [0.1 + 0.2, math.nan, math.inf], "y": "é"})
    data = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert data == {"x": [0.30000000000000004, None, None], "y": "é"}
    rows = [{"a": 'say "hi", all', "b": math.nan}, {"a": "two\nlines", "b": 1 / 3}]
    write_csv(tmp_path / "a.csv", ["a", "b"], rows)
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as stream:
        read = list(csv.reader(stream))
    assert read == [["a", "b"], ['say "hi", all', ""], ["two\nlines", "0.333333333"]]
