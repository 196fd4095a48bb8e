import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from monai.metrics.regression import compute_ssim_and_cs

from dymo_med.data.missingness import apply, parse_scenario
from dymo_med.errors import ConfigError
from dymo_med.inference import quality
from dymo_med.inference.answer import answer
from dymo_med.inference.evaluate import evaluate
from dymo_med.inference.quality import (
    EVERYTHING,
    body,
    cell_quality,
    image_quality,
    measure,
    similarity,
    within_interval,
)
from dymo_med.modalities.tokens import TokenSequence
from dymo_med.types import Column, ModalitySpec, Steps

FILES = ("recovery.csv", "recovery_summary.csv", "plots/recovery.png", "plots/recovered.png")
SCENARIOS = ("as-is", "rate:0.5", "cells:0.4")


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def whole(records):
    """Records that lack nothing."""
    return [r for r in records if len(r.modalities) == 5 and not _blank(r)]


def _blank(record):
    fields = [v.observed_fields for v in record.modalities.values()]
    return any(f is not None and not bool(f.all()) for f in fields)


@pytest.fixture(scope="module")
def done(bundle, cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("quality") / "out"
    evaluate(
        bundle,
        cohort,
        out,
        split="train",
        scenarios=SCENARIOS,
        batch_size=5,
        reports=0,
        draws=19,
        allow_overlap=True,
    )
    return out


def compared(bundle, records, text):
    """What hiding by a scenario and recovering comes to, and the records left."""
    rule = parse_scenario(text, bundle.specs)
    left = [apply(rule, record, bundle.specs, 0) for record in records]
    answers, truth = answer(bundle, left), answer(bundle, records)
    return left, answers, truth


# --- Metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 9, 8), (3, 8, 8), (1, 8, 9, 10)])
def test_a_tenth_off_everywhere_is_twenty_decibels(shape):
    truth = torch.rand(shape, dtype=torch.float64) * 4 - 2
    truth.view(-1)[:2] = torch.tensor([-2.0, 3.0])  # a range of 5
    inside = torch.ones(shape[1:], dtype=torch.bool)
    found = image_quality(truth, truth + 0.5, inside)
    assert found["nmae"] == pytest.approx(0.1)
    assert found["psnr"] == pytest.approx(20.0)
    assert 0 < found["ssim"] < 1


@pytest.mark.parametrize("dims", [2, 3])
def test_ssim_of_one_window_by_hand(dims):
    truth, recovered = torch.randn(2, 1, *(7,) * dims, dtype=torch.float64)
    found = image_quality(truth, recovered, torch.ones((7,) * dims, dtype=torch.bool))
    low, high = float(truth.min()), float(truth.max())
    x, y = ((v[0].numpy() - low) / (high - low) for v in (recovered, truth))
    bell = np.exp(-0.5 * (np.arange(-3, 4) / 1.5) ** 2)
    weight = np.ones(())
    for _ in range(dims):
        weight = np.multiply.outer(weight, bell)
    weight /= weight.sum()
    mx, my = (weight * x).sum(), (weight * y).sum()
    vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
    both = (weight * (x - mx) * (y - my)).sum()
    c1, c2 = 0.01**2, 0.03**2
    expected = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert found["ssim"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shape", [(2, 3, 9, 12), (1, 1, 8, 9, 11)])
def test_similarity_agrees_with_monai(shape):
    a = torch.rand(shape)
    b = (a + 0.2 * torch.randn(shape)).clamp(0, 1)
    dims = len(shape) - 2
    expected, _ = compute_ssim_and_cs(a, b, dims, (7,) * dims, (1.5,) * dims)
    torch.testing.assert_close(similarity(a, b), expected, rtol=1e-4, atol=1e-4)


def test_outside_the_body_nothing_counts():
    truth = torch.zeros(1, 16, 16)
    truth[0, 4:12, 3:13] = torch.randn(8, 10)
    spec = quality.ModalitySpec("t1", "image", "t1.png", (1, 16, 16), intensity="zscore")
    inside = body(spec, truth)
    assert int(inside.sum()) == 80
    recovered = truth + 0.1 * torch.randn(truth.shape)
    other = torch.where(inside, recovered, 1000.0)
    assert image_quality(truth, other, inside) == image_quality(truth, recovered, inside)
    assert bool(body(replace(spec, intensity="percentile"), truth).all())


def test_an_exact_copy_and_an_undefined_range():
    truth = torch.rand(1, 8, 8)
    inside = torch.ones(8, 8, dtype=torch.bool)
    found = image_quality(truth, truth.clone(), inside)
    assert found["psnr"] == math.inf and found["nmae"] == 0
    assert found["ssim"] == pytest.approx(1, abs=1e-5)
    flat = image_quality(torch.ones(1, 8, 8), truth, inside)
    nothing = image_quality(truth, truth, ~inside)
    assert all(map(math.isnan, (*flat.values(), *nothing.values())))


def test_a_better_copy_is_better_in_all_three():
    truth = torch.rand(1, 12, 12, 12)
    noise = torch.randn(truth.shape)
    inside = torch.ones(truth.shape[1:], dtype=torch.bool)
    near, far = (image_quality(truth, truth + s * noise, inside) for s in (0.05, 0.5))
    assert near["psnr"] > far["psnr"] and near["ssim"] > far["ssim"] and near["nmae"] < far["nmae"]


def test_cells_in_units_and_in_training_spread():
    ldh = Column("ldh", "continuous", unit="U/L", mean=200.0, std=50.0)
    assert cell_quality(210.0, 185.0, ldh) == {"mae": 25.0, "mae_sd": 0.5}
    assert cell_quality(210.0, 185.0, replace(ldh, std=None)) == {"mae": 25.0}
    sex = Column("sex", "categorical", values=("F", "M"))
    assert cell_quality(1.0, 1.0, sex) == {"accuracy": 1.0}
    assert cell_quality(1.0, 0.0, sex) == {"accuracy": 0.0}


def test_the_interval_of_draws_covers_what_it_says():
    ranks = np.arange(1.0, 20.0)
    assert within_interval(
        ranks[:, None].repeat(4, 1), np.array([0.99, 1, 19, 19.01])
    ).tolist() == [*(False, True, True, False)]
    rng = np.random.default_rng(0)
    for n in (19, 50):
        share = within_interval(rng.normal(size=(n, 20_000)), rng.normal(size=20_000)).mean()
        assert share == pytest.approx(0.9, abs=0.01)


# --- Batches --------------------------------------------------------------------------------------


def test_a_perfect_recovery_changes_nothing(bundle, records):
    _, answers, truth = compared(bundle, records, "rate:0.5")
    perfect = replace(answers.recovery, values=truth.batch.values)
    rows = measure(bundle, "s", replace(answers, recovery=perfect), truth).rows
    found = {}
    for row in rows:
        found.setdefault(row["metric"], set()).add(row["value"])
    assert found["same_answer"] == {1.0} and max(found["probability_change"]) < 1e-6
    assert found["mae"] == found["mae_sd"] == found["nmae"] == {0.0}
    assert found["accuracy"] == {1.0} and found["psnr"] == {math.inf}


def test_what_is_measured_is_what_was_hidden(bundle, records):
    left, answers, truth = compared(bundle, records, "cells:0.4")
    rows = measure(bundle, "s", answers, truth).rows
    expected = set()
    for record, rest in zip(records, left, strict=True):
        for spec in bundle.specs:
            value = record.modalities.get(spec.name)
            if value is None or not spec.columns:
                continue
            kept = rest.modalities.get(spec.name)
            fields = (
                torch.zeros(spec.shape, dtype=torch.bool) if kept is None else kept.observed_fields
            )
            for f in (value.observed_fields & ~fields).nonzero().flatten().tolist():
                expected.add((record.record_id, spec.name, spec.columns[f].name))
    assert {(r["record_id"], r["modality"], r["column"]) for r in rows if r["column"]} == expected
    images = {spec.name for spec in bundle.specs if not spec.columns}
    assert not images & {r["modality"] for r in rows}
    # One of them by hand.
    row = next(r for r in rows if (r["column"], r["metric"]) == ("ldh", "mae"))
    i = truth.batch.record_ids.index(row["record_id"])
    error = answers.recovery.values["labs"][i, 0] - truth.batch.values["labs"][i, 0]
    assert row["value"] == pytest.approx(abs(float(error))) and row["unit"] == "U/L"


def test_fidelity_is_that_of_the_record_with_the_recovery_in_it(bundle, records):
    _, answers, truth = compared(bundle, records, "drop:t2,labs")
    rows = measure(bundle, "s", answers, truth).rows
    found = {(r["record_id"], r["modality"], r["metric"]): r["value"] for r in rows}
    before = truth.probabilities["observed_only"]
    checked = 0
    for i, record in enumerate(records):
        for names in (("t2",), ("labs",), ("t2", "labs")):
            hidden = [n for n in names if n in record.modalities]
            if hidden != list(names):
                continue
            changed = dict(record.modalities)
            for name in names:
                made = answers.recovery.values[name][i]
                fields = changed[name].observed_fields
                if fields is not None:  # cells that nobody filled stay blank
                    made = made.where(fields, changed[name].values)
                changed[name] = replace(changed[name], values=made)
            after = answer(bundle, [replace(record, modalities=changed)])
            p = after.probabilities["observed_only"][0]
            key = names[0] if len(names) == 1 else EVERYTHING
            change = float((p - before[i]).abs()[0])
            same = float(p.argmax() == before[i].argmax())
            assert found[record.record_id, key, "probability_change"] == pytest.approx(
                change, abs=1e-5
            )
            assert found[record.record_id, key, "same_answer"] == same
            checked += 1
    assert checked > 40


def test_all_at_once_is_trust_all_where_nothing_else_is_missing(bundle, whole):
    _, answers, truth = compared(bundle, whole, "rate:0.5")
    rows = measure(bundle, "s", answers, truth).rows
    trusted, oracle = answers.probabilities["trust_all"], truth.probabilities["observed_only"]
    found = [
        r["value"]
        for r in rows
        if (r["modality"], r["metric"]) == (EVERYTHING, "probability_change")
    ]
    assert found == pytest.approx((trusted - oracle).abs()[:, 0].tolist(), abs=1e-5)
    assert max(found) > 1e-4


def test_log_loss_is_of_the_category_that_was_hidden(bundle, records):
    _, answers, truth = compared(bundle, records, "cells:0.6")
    found = {
        (r["record_id"], r["column"]): r["value"]
        for r in measure(bundle, "s", answers, truth).rows
        if r["metric"] == "log_loss"
    }
    asked = {
        (r["record_id"], r["column"])
        for r in measure(bundle, "s", answers, truth).rows
        if r["metric"] == "accuracy"
    }
    assert set(found) == asked and {column for _, column in asked} >= {"blood_group"}
    names = [spec.name for spec in bundle.specs]
    labs = bundle.specs[names.index("labs")]
    column = [c.name for c in labs.columns].index("blood_group")
    first = sum(2 if c.type == "continuous" else len(c.values) for c in labs.columns[:column])
    parameters = bundle.imputer.table_likelihood(answers.batch, ["labs"])["labs"]
    checked = 0
    for i, record in enumerate(truth.batch.record_ids):
        if (record, "blood_group") in found:
            logits = parameters[i, first : first + len(labs.columns[column].values)]
            true = int(truth.batch.values["labs"][i, column])
            loss = -float(logits.log_softmax(0)[true])
            assert found[record, "blood_group"] == pytest.approx(loss, abs=1e-5)
            checked += 1
    assert checked > 5


def test_nothing_hidden_nothing_measured(bundle, records):
    _, answers, truth = compared(bundle, records, "cells:0")
    assert measure(bundle, "s", answers, truth) == quality.Measured([], [])


def test_patients_with_tables_only(bundle, whole):
    images = [spec.name for spec in bundle.specs if not spec.columns]
    tables = [record.without(images) for record in whole]
    _, answers, truth = compared(bundle, tables, "drop:labs")
    measured = measure(bundle, "drop:labs", answers, truth)
    assert {r["modality"] for r in measured.rows} == {"labs", EVERYTHING}
    assert measured.pictures == []
    assert {r["column"] for r in measured.rows} == {"", "ldh", "crp", "blood_group"}


def test_the_spread_of_a_record_does_not_depend_on_its_neighbours(bundle, whole):
    def spread(records):
        _, answers, truth = compared(bundle, records, "rate:0.5")
        rows = measure(bundle, "s", answers, truth, draws=19, seed=3).rows
        return {
            (r["record_id"], r["modality"], r["column"]): r["value"]
            for r in rows
            if r["metric"] == "within_90"
        }

    together = spread(whole[:3])
    assert {modality for _, modality, _ in together} & {"t1", "t2", "photo"}
    assert all(0 <= value <= 1 for value in together.values())
    for record in whole[:3]:
        alone = spread([record])
        assert alone == pytest.approx({k: together[k] for k in alone}, abs=0.01)


# --- Evaluations ----------------------------------------------------------------------------------


def test_everything_is_written(done):
    assert all((done / name).stat().st_size > 100 for name in FILES)
    rows = rows_of(done / "recovery.csv")
    assert tuple(rows[0]) == quality.COLUMNS
    assert {r["scenario"] for r in rows} == {"rate:0.5", "cells:0.4"}
    assert {r["metric"] for r in rows} == {*quality.METRICS} - {*quality.STEP_METRICS}
    units = {(r["metric"], r["unit"]) for r in rows}
    assert ("psnr", "dB") in units and ("mae", "U/L") in units and ("mae_sd", "SD") in units
    page = (done / "index.html").read_text(encoding="utf-8")
    assert 'src="plots/recovery.png"' in page and 'src="plots/recovered.png"' in page
    assert 'id="recovery"' in page
    assert 'href="recovery_summary.csv"' in page and "all at once" in page


def test_the_summary_counts_every_patient_once(done):
    rows = rows_of(done / "recovery.csv")
    summary = rows_of(done / "recovery_summary.csv")
    keys = ("scenario", "modality", "column", "metric")
    twice = 0
    for line in summary:
        own = [r for r in rows if all(r[k] == line[k] for k in keys) and r["value"]]
        patients = {}
        for row in own:
            patients.setdefault(row["patient_id"], []).append(float(row["value"]))
        twice += any(len(values) > 1 for values in patients.values())
        assert (int(line["records"]), int(line["patients"])) == (len(own), len(patients))
        mean = np.mean([np.mean(values) for values in patients.values()])
        assert float(line["value"]) == pytest.approx(mean, rel=1e-6)
        assert float(line["low"]) <= float(line["value"]) + 1e-9
        assert float(line["high"]) >= float(line["value"]) - 1e-9
    assert twice and len(summary) == len({tuple(r[k] for k in keys) for r in rows})


def test_resuming_gives_the_same_files(done, bundle, cohort, tmp_path):
    given = {"split": "train", "scenarios": SCENARIOS, "batch_size": 5, "reports": 0, "draws": 19}
    given |= {"allow_overlap": True}
    calls = []

    def stop(number, total):
        calls.append(number)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(bundle, cohort, tmp_path / "o", **given, progress=stop)
    assert not (tmp_path / "o" / "recovery.csv").exists()
    with pytest.raises(ConfigError, match="another draws"):
        evaluate(bundle, cohort, tmp_path / "o", **{**given, "draws": 0}, resume=True)
    evaluate(bundle, cohort, tmp_path / "o", **given, resume=True)
    for name in FILES:
        assert (tmp_path / "o" / name).read_bytes() == (done / name).read_bytes(), name


def test_without_anything_hidden_nothing_is_written(bundle, cohort, tmp_path):
    out = tmp_path / "o"
    evaluate(bundle, cohort, out, scenarios=("as-is", "drop:t1"), reports=0)
    assert all((out / name).is_file() for name in FILES)
    # What an earlier run left is of scenarios that this one has not.
    evaluate(bundle, cohort, out, scenarios=("as-is",), reports=0, resume=True)
    assert not any((out / name).exists() for name in FILES)
    assert 'id="recovery"' not in (out / "index.html").read_text(encoding="utf-8")


def test_too_few_draws_are_refused_before_anything_is_written(bundle, cohort, tmp_path):
    with pytest.raises(ConfigError, match=r"--draws.*at least 19"):
        evaluate(bundle, cohort, tmp_path / "o", draws=5)
    assert not (tmp_path / "o").exists()


def test_numbers_on_the_page():
    def cell(metric, value, low, high, unit=""):
        row = {"metric": metric, "value": value, "low": low, "high": high, "unit": unit}
        return quality._cell(row)

    assert cell("same_answer", 0.75, 0.5, 1.0) == ("75 %", "50 to 100")
    assert cell("same_answer", 1.0, 1.0, 1.0) == ("100 %", "")
    assert cell("probability_change", 0.0642, 0.01, 0.1) == ("6.4", "1.0 to 10.0")
    assert cell("psnr", -0.04, -1.26, 1.0, "dB") == ("−0.0", "−1.3 to 1.0")
    assert cell("mae", 12.34, 1.0, 20.0, "U/L") == ("12.3 U/L", "")
    assert cell("mae", 0.886, 0.1, 2.0, "1") == ("0.886", "")
    assert cell("ssim", math.nan, math.nan, math.nan) == quality._cell(None) == ("–", "")


# --- Pictures -------------------------------------------------------------------------------------


def test_every_recovered_picture_is_marked_and_nothing_else(bundle, records, tmp_path, monkeypatch):
    _, answers, truth = compared(bundle, records, "drop:t1,photo")
    pictures = measure(bundle, "s", answers, truth).pictures
    assert [p["modality"] for p in pictures] == ["t1", "t1", "photo", "photo"]
    marked = []
    original = quality.watermark
    monkeypatch.setattr(
        quality, "watermark", lambda picture: (marked.append(picture), original(picture))[1]
    )
    collector = quality.Collector(bundle.specs)
    collector.add(measure(bundle, "s", answers, truth))
    collector.write(tmp_path, ["s"], 0)
    recovered = [quality._enlarged(p["recovered"], p["extent"]) for p in pictures]
    assert all(np.array_equal(a, b) for a, b in zip(marked, recovered, strict=True))


def test_pictures_are_of_different_records_and_few(bundle):
    def picture(scenario, record, modality):
        return {"scenario": scenario, "record_id": record, "modality": modality}

    pictures = [
        *(picture("a", r, m) for r in "pqr" for m in ("t1", "photo")),
        picture("b", "p", "t1"),
        picture("b", "s", "t2"),
    ]
    chosen = [
        (p["modality"], p["record_id"], p["scenario"])
        for p in quality._choose(pictures, bundle.specs)
    ]
    assert chosen == [
        ("t1", "p", "a"),
        ("t1", "q", "a"),
        ("t2", "s", "b"),
        ("photo", "p", "a"),
        ("photo", "q", "a"),
    ]
    many = [replace(bundle.specs[0], name=f"m{i}") for i in range(12)]
    pictures = [picture("a", r, spec.name) for spec in many for r in "pq"]
    chosen = quality._choose(pictures, many)
    assert [p["modality"] for p in chosen] == [f"m{i}" for i in range(8)]
    assert {p["record_id"] for p in chosen} == {"p"}


def test_sequences_are_compared_in_standard_units():
    spec = ModalitySpec(
        "gait", "tokens", "g.npy", (3, 2), steps=Steps(mean=(1.0, 0.0), std=(2.0, 0.5))
    )
    kind = TokenSequence(spec)
    truth = torch.tensor([[3.0, 0.5], [3.0, 0.5], [-1.0, -0.5]])
    exact = quality.sequence_quality(truth, truth, kind)
    assert exact == pytest.approx({"mae_sd": 0.0, "cosine": 1.0})
    average = quality.sequence_quality(truth, kind.center(truth).expand(3, 2), kind)
    assert average == pytest.approx({"mae_sd": 1.0, "cosine": 0.0})
