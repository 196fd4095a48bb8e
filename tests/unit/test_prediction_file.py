import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dymo_med.bundle import checksums_of, load_bundle, save_bundle
from dymo_med.cli import main
from dymo_med.errors import PatientDataError
from dymo_med.inference.answer import answer
from dymo_med.inference.assemble import assemble
from dymo_med.inference.compose import prediction_file
from dymo_med.inference.draws import draw_answers
from dymo_med.inference.predict import predict_patient
from dymo_med.inference.prediction_file import (
    PredictionFile,
    entropy_bits,
    frequency,
    read_prediction,
    schema,
    status_of,
    summarise,
)
from dymo_med.inference.report import render
from dymo_med.types import Interval, Performance, PerformanceRow

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "reference" / "prediction.schema.json"


@pytest.fixture(scope="module")
def out(bundle, cohort_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prediction") / "out"
    predict_patient(cohort_dir / "patients" / "p003", bundle, folder, draws=5)
    return folder


@pytest.fixture(scope="module")
def file(out):
    return read_prediction(out / "prediction.json")


def file_for(bundle, record, draws=0, explanation=None):
    answers = answer(bundle, [record])
    prediction = assemble(bundle, record, answers, 0, explanation, seed=0)
    return answers, prediction_file(
        bundle, record, answers, 0, explanation, prediction, draws=draws
    )


def test_the_committed_schema_is_the_models():
    """To renew it: write what `prediction_file.schema()` returns to the file."""
    assert SCHEMA.read_text(encoding="utf-8") == schema()


def test_every_field_is_in_the_reference():
    text = (SCHEMA.parent / "outputs.md").read_text(encoding="utf-8")
    assert not [name for name in PredictionFile.model_fields if f"`{name}`" not in text]


def test_reading_and_writing_give_the_same_bytes(out, file):
    assert file.to_text() == (out / "prediction.json").read_text(encoding="utf-8")


def test_the_page_is_made_from_the_file_alone(out, file, tmp_path):
    assert render(file) == (out / "report.html").read_text(encoding="utf-8")
    alone = tmp_path / "prediction.json"
    shutil.copy(out / "prediction.json", alone)
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(alone), "-q"])
    assert stopped.value.code == 0
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(alone), "--out", str(tmp_path / "again.html"), "-q"])
    assert stopped.value.code == 0
    page = (out / "report.html").read_bytes()
    assert (tmp_path / "report.html").read_bytes() == page
    assert (tmp_path / "again.html").read_bytes() == page


def test_a_page_is_not_written_over_other_files(out, tmp_path):
    target = tmp_path / "notes.txt"
    target.write_text("irreplaceable")
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(out / "prediction.json"), "-o", str(target), "-q"])
    assert stopped.value.code == 2 and target.read_text() == "irreplaceable"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda d: d.pop("rule"), "rule"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.update(seed="0"), "seed"),
        (lambda d: d["probabilities"].__setitem__(0, 1.5), "probabilities.0"),
        (lambda d: d["exhibits"]["scans"][0]["pictures"][0].update(png="http://x/y.png"), "png"),
        (lambda d: d.update(schema_version=2), "format is not known"),
    ],
)
def test_what_is_no_prediction_is_refused(out, tmp_path, change, where):
    data = json.loads((out / "prediction.json").read_text(encoding="utf-8"))
    change(data)
    (tmp_path / "p.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(PatientDataError, match=where):
        read_prediction(tmp_path / "p.json")


@pytest.mark.parametrize("content", ["", "[]", "{", "\udcff", "[" * 100_000])
def test_garbage_is_refused(tmp_path, content):
    (tmp_path / "p.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(PatientDataError, match="not a readable prediction"):
        read_prediction(tmp_path / "p.json")


def test_draws_are_what_the_drawn_values_would_answer(bundle, records):
    """Asked again from scratch: each draw as a record in which the modality was measured."""
    record = next(r for r in records if {"t1", "t2"} <= set(r.modalities)).without(["t2"])
    trust_all = bundle.with_selector("trust_all")
    answers, file = file_for(trust_all, record, draws=4)
    assert file.draws.n == 4 and len(file.draws.own.probabilities) == 4
    assert file.draws.own == file.draws.trust_all
    values = bundle.imputer.recover(answers.batch, draws=4, seed=0).draws
    candidates = answers.recovery.candidates[0]
    gains = {g.modality: g for g in file.acquire.gains}
    assert set(gains) == {n for n, c in zip(answers.own.names, candidates, strict=True) if c}
    observed_only = bundle.with_selector("observed_only")
    for i in range(4):
        source = record.modalities["t1"].source
        value = dataclasses.replace(
            record.modalities["t1"], values=values["t2"][i, 0], source=source
        )
        measured = dataclasses.replace(record, modalities={**record.modalities, "t2": value})
        asked = answer(observed_only, [measured]).probabilities["observed_only"][0]
        assert gains["t2"].probabilities[i] == pytest.approx(asked.tolist(), abs=1e-5)
    gain = gains["t2"]
    p = np.array(gain.probabilities)
    gained = entropy_bits(p.mean(0).tolist()) - np.mean([entropy_bits(q) for q in p.tolist()])
    assert gain.bits == pytest.approx(gained, abs=1e-12)
    assert gain.probability == pytest.approx(p[:, file.chosen].mean())
    assert [g.bits for g in file.acquire.gains] == sorted([g.bits for g in file.acquire.gains])[
        ::-1
    ]


@pytest.mark.parametrize("name", ["observed_only", "dymo", "gate", "subset_average"])
def test_the_selection_stays_fixed_in_the_draws(bundle, records, name):
    record = next(r for r in records if {"t1", "t2"} <= set(r.modalities)).without(["t2"])
    _, file = file_for(bundle.with_selector(name), record, draws=3)
    own = np.array(file.draws.own.probabilities)
    assert own.sum(1) == pytest.approx(1)
    if not file.trusted and not file.subsets:
        assert own == pytest.approx(np.tile(file.probabilities, (3, 1)), abs=1e-6)
        assert file.draws.own.changes == 0
    if file.subsets:
        mean = sum(s.weight * np.array(s.probabilities) for s in file.subsets)
        assert mean == pytest.approx(np.array(file.probabilities), abs=1e-5)


def test_draws_do_not_depend_on_neighbours(bundle, records):
    incomplete = [r for r in records if len(r.modalities) < len(bundle.specs)][:4]
    together = answer(bundle, incomplete)
    for row, record in enumerate(incomplete):
        own, acquire = draw_answers(bundle, together, row, draws=3, seed=0)
        _, alone = file_for(bundle, record, draws=3)
        for a, b in zip(own.own.probabilities, alone.draws.own.probabilities, strict=True):
            assert a == pytest.approx(b, abs=1e-5)
        assert [g.modality for g in acquire.gains] == [g.modality for g in alone.acquire.gains]


def test_nothing_is_drawn_where_nothing_can_be(bundle, records):
    record = next(r for r in records if len(r.modalities) < len(bundle.specs))
    _, file = file_for(bundle, record, draws=0)
    assert file.draws is None and file.acquire is None
    for complete in records:
        _, file = file_for(bundle, complete, draws=2)
        assert (file.draws is None) == (not file.recovered) == (file.acquire is None)


def test_the_summary_of_draws():
    found = summarise([[0.1 * i, 1 - 0.1 * i] for i in range(1, 10)], 1)
    assert found.median == pytest.approx((0.5, 0.5))
    assert found.low == pytest.approx((0.1, 0.1)) and found.high == pytest.approx((0.9, 0.9))
    assert found.changes == pytest.approx(5 / 9)  # a tie goes to the first class


def test_frequencies_are_never_certain():
    assert frequency("a", 0.001, 10, 1).model_dump() == {
        "label": "a",
        "of": 100,
        "count": 0,
        "bound": "under",
        "patients": 10,
        "right": 1,
    }
    assert frequency("a", 0.999, 50, 49).bound == "over"
    assert frequency("a", 0.5, 50, 20).bound is None


def test_a_frequency_needs_patients_to_count():
    for n in range(10):
        found = frequency("a", 0.999, n, n)
        assert (found.count, found.bound, found.patients) == (None, None, n)
    assert frequency("a", 0.999, 10, 10).count == 100


def test_every_reason_for_caution_and_the_one_for_none(file):
    def status(**changes):
        given = {
            "classes": ("low", "high"),
            "probabilities": (0.3, 0.7),
            "alone": (0.4, 0.6),
            "prediction_set": None,
            "draws": None,
            "performance": None,
            "steps": (),
            "found": (),
            **changes,
        }
        found, reasons = status_of(**given)
        return found, [r.code for r in reasons]

    assert status() == ("answered", [])
    assert status(alone=(0.6, 0.4)) == ("caution", ["measurements_differ"])
    enough = {"calibrated_on": 9, "least": 9}
    both = file.prediction_set.model_copy(update={"classes": ("low", "high"), **enough})
    one = both.model_copy(update={"classes": ("high",)})
    few = both.model_copy(update={"calibrated_on": 8})
    assert status(prediction_set=both) == ("abstained", ["no_class_ruled_out"])
    assert status(prediction_set=few) == ("abstained", ["too_few_calibrated"])
    assert status(prediction_set=one) == ("answered", [])
    for changes, expected in ((0.09, "answered"), (0.1, "caution")):
        own = file.draws.own.model_copy(update={"changes": changes})
        draws = file.draws.model_copy(update={"own": own})
        assert status(draws=draws)[0] == expected
    few = file.performance
    assert few.tested_fewer_than_30 and status(performance=few)[1] == ["few_held_back"]
    many = few.model_copy(update={"tested_fewer_than_30": False})
    assert status(performance=many) == ("answered", [])
    step = file.steps[0].model_copy(update={"borrowed": True, "decision": "admitted"})
    assert status(steps=[step]) == ("caution", ["borrowed"])
    refused = step.model_copy(update={"decision": "rejected"})
    assert status(steps=[refused]) == ("answered", [])


def test_values_outside_training_are_named_not_told(bundle, records):
    labs = records[0].modalities["labs"]
    far = dataclasses.replace(labs, values=labs.values.clone().index_fill_(0, torch.tensor(0), 1e4))
    strange = dataclasses.replace(records[0], modalities={**records[0].modalities, "labs": far})
    _, file = file_for(bundle, strange)
    (reason,) = [r for r in file.status_reasons if r.code == "outside_training"]
    assert reason.values == {"modality": "labs", "columns": "ldh"}


def test_performance_is_that_of_the_closest_group(bundle, records):
    half = Interval(0.5, 0.4, 0.6)
    pattern = "+".join(s.name for s in bundle.specs if s.name in records[0].modalities)
    rows = tuple(
        PerformanceRow(method, level, group, 40, 50, half, half, half)
        for method in (bundle.choice.name, "observed_only")
        for level, group in (("all", ""), ("pattern", pattern))
    )
    tested = dataclasses.replace(bundle, performance=Performance(rows, {pattern: 40}, 30))
    _, file = file_for(tested, records[0])
    found = file.performance
    assert (found.level, found.group, found.patients) == ("pattern", pattern, 40)
    assert found.own.auroc.value == 0.5 and found.observed_only.method == "observed_only"
    assert not found.tested_fewer_than_30
    other = records[0].without([next(iter(records[0].modalities))])
    _, file = file_for(tested, other)
    assert file.performance.level == "all" and file.performance.tested_fewer_than_30
    _, file = file_for(dataclasses.replace(bundle, performance=None, conformal=None), records[0])
    assert file.performance is None and file.prediction_set is None
    assert file.status != "abstained"
    _, file = file_for(bundle.with_selector("simultaneous"), records[0])
    assert file.performance is None  # it was kept for the default selector


def test_the_prediction_set_is_the_bundles(bundle, records):
    for record in records[:6]:
        answers, file = file_for(bundle, record)
        pattern = "+".join(file.observed)
        p = answers.probabilities[file.method].numpy()
        found = bundle.conformal.sets(file.method, p, [pattern])
        inside = [c for c, m in zip(file.classes, found.members[0], strict=True) if m]
        assert list(file.prediction_set.classes) == inside and file.predicted in inside
        assert file.prediction_set.calibrated_on == found.calibrated_on[0]


def test_sliders_show_the_body_and_marks_of_what_is_made_up(file):
    for scan in file.exhibits.scans:
        if scan.flat:
            assert scan.slider is None and len(scan.pictures) == 1
            continue
        assert [p.plane for p in scan.pictures] == ["axial", "coronal", "sagittal"]
        assert 1 < len(scan.slider.slices) <= 64
        assert list(scan.slider.slices) == sorted(set(scan.slider.slices))
        assert 0 <= scan.slider.start < len(scan.slider.slices)
        assert (scan.slider.heat is not None) == bool(scan.overlays)
    assert {s.modality for s in file.exhibits.scans if s.overlays} <= {
        *file.observed,
        *file.trusted,
    }


def test_a_bundle_with_three_calibration_patients_rules_nothing_out(bundle, records):
    """Sets hold every class and say why; nothing is stated that three patients cannot support."""
    assert bundle.calibration.patients == 3
    for record in records[:4]:
        answers, file = file_for(bundle, record)
        assert file.prediction_set.classes == file.classes
        assert file.prediction_set.calibrated_on <= 3 < file.prediction_set.least == 9
        assert file.status == "abstained" and file.status_reasons[0].code == "too_few_calibrated"
        assert file.frequency.count is None and file.frequency.patients <= 3
        for p in answers.probabilities.values():
            assert float(p.max()) <= 4 / 5 + 1e-12
    assert file.limits.held_back == 3 and file.limits.fitted_on == 3


def test_a_bundle_from_before_patients_were_counted_promises_no_sets(bundle, records, tmp_path):
    folder = tmp_path / "old"
    save_bundle(bundle, folder)
    (folder / "configs" / "calibration.json").unlink()
    cases = {"patterns": ["t1"] * 30, "scores": {"dymo": [0.1] * 30}}
    (folder / "configs" / "conformal.json").write_text(json.dumps(cases))
    (folder / "checksums.json").write_text(json.dumps(checksums_of(folder)))
    old = load_bundle(folder, "cpu")
    assert old.conformal is None
    # All it fitted was fitted on the patients whom it chose the selector by.
    assert old.calibration.patients == old.calibration.fitted_on == bundle.choice.patients
    _, file = file_for(old, records[0])
    assert file.prediction_set is None and file.frequency.count is None


def test_a_saved_bundle_keeps_what_its_answers_rest_on(bundle, tmp_path):
    save_bundle(bundle, tmp_path / "again")
    again = load_bundle(tmp_path / "again", "cpu")
    assert again.calibration == bundle.calibration and again.conformal == bundle.conformal
    card = (tmp_path / "again" / "docs" / "README.md").read_text(encoding="utf-8")
    assert "rest on 3 other patients, fewer than the 9" in card
    assert "no probability is stated above 0.800" in card
