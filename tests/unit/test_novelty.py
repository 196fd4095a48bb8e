"""Whether a patient is like those of training: rates of alarms, strangers, what is stored."""

import csv
import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from pypdf import PdfReader
from safetensors.torch import load, save

from dymo_med import novelty
from dymo_med.data.batch import collate
from dymo_med.inference.answer import answer
from dymo_med.inference.check import check
from dymo_med.inference.evaluate import evaluate
from dymo_med.inference.predict import predict_patient
from dymo_med.inference.prediction_file import read_prediction
from dymo_med.references import features_of, layout_of
from dymo_med.types import Column, ModalitySpec

# A scan of six numbers, a table of a number and a category.
OWNER = (0,) * 6 + (1, 1)
SIZES = (0,) * 7 + (3,)
NAMES = ("scan", "table")
OWN = "p000"
SPECS = (
    ModalitySpec("scan", "tokens", "t.npz", (4, 6)),
    ModalitySpec(
        "table",
        "table",
        "e.csv",
        (2,),
        columns=(
            Column("age", "continuous", mean=0.0, std=1.0),
            Column("kind", "categorical", values=("a", "b", "c")),
        ),
    ),
)


def people(n, seed, shift=0.0, missing=0.2):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(7, 7))
    numbers = rng.normal(size=(n, 7)) @ mixing + shift
    kind = rng.choice(3, size=(n, 1), p=[0.6, 0.38, 0.02])
    rows = np.concatenate([numbers, kind], 1)
    absent = rng.uniform(size=(n, 2)) < missing
    absent[absent.all(1)] = False
    rows[absent[:, np.array(OWNER)]] = np.nan
    rows[(rng.uniform(size=n) < missing), 6] = np.nan
    rows[np.isnan(rows).all(1), 7] = 0
    return torch.tensor(rows)


@pytest.fixture(scope="module")
def usual():
    return novelty.fit(people(150, 1), people(100, 2), OWNER, SIZES, NAMES, seed=0)


def states(found, rows):
    return [u.state for u in novelty.assess(found, rows, OWNER)]


def test_of_its_own_patients_the_declared_share_is_unusual():
    shares, stranger = [], []
    for seed in range(25):
        found = novelty.fit(
            people(80, 3 * seed), people(60, 3 * seed + 1), OWNER, SIZES, NAMES, seed=0
        )
        unusual = novelty.assess(found, people(60, 3 * seed + 2), OWNER)
        p = np.array([u.p for u in unusual])
        shares.append([np.mean(p <= a) for a in (0.05, 0.1, 0.3)])
        none = [u.state == "strange" for u in unusual]
        bounds = [max(0.01, 1 / (u.patients + 1)) for u in unusual]
        stranger.append(np.mean(none) - np.mean(bounds))
    mean, error = np.mean(shares, 0), np.std(shares, 0) / 5
    assert (mean <= np.array([0.05, 0.1, 0.3]) + 2 * error).all(), mean
    assert (mean >= np.array([0.02, 0.06, 0.23])).all(), mean
    assert np.mean(stranger) <= 2 * np.std(stranger) / 5


def test_strangers_get_no_answer(usual):
    far = people(30, 5, missing=0.0)
    far[:, :6] = far[:, :6] * torch.tensor([1.0, -1, 1, -1, 1, -1]) * 4
    assert states(usual, far).count("strange") >= 27
    assert states(usual, people(100, 6)).count("strange") < 10


def test_one_cell_that_nobody_has_stands_out_among_others(usual):
    (person,) = people(1, 7, missing=0.0)
    assert states(usual, person[None]) == ["familiar"]
    person[6] = 100.0
    (found,) = novelty.assess(usual, person[None], OWNER)
    assert found.state == "strange"
    assert found.modalities["table"] < 0.02 < found.modalities["scan"]


def test_several_that_are_each_a_little_out_stand_out_together():
    owner = tuple(range(6))
    generator = torch.Generator().manual_seed(0)

    def rows(n, shift=0.0):
        return torch.randn(n, 6, generator=generator, dtype=torch.float64) + shift

    names = tuple("abcdef")
    found = novelty.fit(rows(300), rows(200), owner, (0,) * 6, names, seed=0)
    shifted = novelty.assess(found, rows(200, 1.5), owner)
    together = np.mean([u.p <= 0.05 for u in shifted])
    singly = np.mean([u.modalities["a"] <= 0.05 for u in shifted])
    assert singly < 0.5 < 0.7 < together


def test_a_rare_category_is_more_unusual_than_a_common_one(usual):
    rows = torch.full((3, 8), torch.nan, dtype=torch.float64)
    rows[:, 7] = torch.tensor([0.0, 1.0, 2.0])
    common, less, rare = novelty.score(usual, rows, OWNER)[:, 1].tolist()
    assert common < less < rare


@pytest.mark.parametrize("blank", [0, 3, 6])
def test_blank_cells_neither_hide_nor_make_a_stranger(usual, blank):
    rows = people(200, 8, missing=0.0)
    rows[:, blank] = torch.nan
    alarms = np.mean([u.p <= 0.05 for u in novelty.assess(usual, rows, OWNER)])
    assert alarms < 0.12
    rows[:, 1] += 60.0
    assert set(states(usual, rows)) == {"strange"}


def test_too_few_held_back_patients_tell_nothing():
    found = novelty.fit(people(150, 1), people(18, 2), OWNER, SIZES, NAMES, seed=0)
    (unusual,) = novelty.assess(found, people(1, 3, shift=100.0), OWNER)
    assert (unusual.state, unusual.p, unusual.least) == ("unknown", 1.0, 19)
    assert not unusual.modalities


def test_too_few_training_patients_tell_nothing():
    found = novelty.fit(people(19, 1), people(100, 2), OWNER, SIZES, NAMES, seed=0)
    assert not found.usual
    assert states(found, people(2, 3)) == ["unknown"] * 2


def test_modalities_that_nobody_had_together_are_named():
    train = people(60, 1, missing=0.0)
    train[:30, :6] = torch.nan
    train[30:, 6:] = torch.nan
    found = novelty.fit(train, people(60, 2), OWNER, SIZES, NAMES, seed=0)
    both, one = people(2, 3, missing=0.0)
    one[6:] = torch.nan
    apart = [u.apart for u in novelty.assess(found, torch.stack([both, one]), OWNER)]
    assert apart == [(("scan", "table"),), ()]


def test_a_rare_combination_is_compared_by_what_others_have():
    """Held-back patients who have both are few: the scan alone is compared jointly."""
    held_back = people(60, 2, missing=0.0)
    held_back[5:, 6:] = torch.nan
    found = novelty.fit(people(100, 1, missing=0.0), held_back, OWNER, SIZES, NAMES, seed=0)
    (unusual,) = novelty.assess(found, people(1, 3, missing=0.0), OWNER)
    assert unusual.patients == 60 and set(unusual.modalities) == {"scan"}


def test_nothing_depends_on_who_else_is_asked(usual):
    rows = people(5, 9)
    together = novelty.assess(usual, rows, OWNER)
    alone = [u for row in rows for u in novelty.assess(usual, row[None], OWNER)]
    assert together == alone


def test_what_is_stored_comes_back(usual):
    tensors, told = novelty.to_tensors(usual)
    again = novelty.from_tensors(
        load(save(tensors)), json.loads(json.dumps(told)), SPECS, OWNER, SIZES
    )
    rows = people(20, 10)
    assert novelty.assess(again, rows, OWNER) == novelty.assess(usual, rows, OWNER)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, _: tensors.update({"scan.mean": torch.zeros(5)}),
        lambda tensors, _: tensors.update({"scan.covariance": -torch.eye(6)}),
        lambda tensors, _: tensors.update({"table.rarity.1": torch.zeros(2)}),
        lambda tensors, _: tensors["scan.mean"].fill_(torch.nan),
        lambda tensors, _: tensors["scan.deviation"].fill_(0.0),
        lambda tensors, _: tensors.pop("together"),
        lambda tensors, _: tensors.update({"held_back": torch.zeros(3, 1)}),
        lambda _, told: told.update(alarm=2.0),
        lambda _, told: told["usual"].update(other=told["usual"]["scan"]),
    ],
)
def test_what_does_not_fit_is_refused(usual, change):
    tensors, told = novelty.to_tensors(usual)
    tensors = {name: value.clone() for name, value in tensors.items()}
    told = json.loads(json.dumps(told))
    change(tensors, told)
    with pytest.raises((ValueError, KeyError, RuntimeError)):
        novelty.from_tensors(tensors, told, SPECS, OWNER, SIZES)


@pytest.fixture(scope="module")
def jittered(bundle, records):
    """The small bundle, as if it had been made with 120 patients much like `OWN`."""
    layout = layout_of(bundle.specs)
    own = collate([r for r in records if r.record_id == OWN], bundle.specs)
    (row,) = features_of(own, bundle.specs)
    generator = torch.Generator().manual_seed(0)
    noise = 1 + 0.05 * torch.randn(120, len(row), generator=generator, dtype=torch.float64)
    numbers = torch.tensor([not size for size in layout.categories])
    rows = torch.where(numbers, row * noise, row)
    names = [spec.name for spec in bundle.specs]
    found = novelty.fit(rows[:60], rows[60:], layout.owner, layout.categories, names, seed=0)
    return replace(bundle, novelty=found)


def test_a_bundle_keeps_what_is_usual(bundle, records):
    assert bundle.novelty is not None and bundle.novelty.names == tuple(
        spec.name for spec in bundle.specs
    )
    (unusual,) = answer(bundle, records[:1]).unusual
    assert (unusual.state, unusual.least) == ("unknown", 19)  # six patients were held back
    loaded, _ = novelty.to_tensors(bundle.novelty)
    assert loaded["held_back"].shape == (6, len(bundle.specs))


def test_its_own_patient_is_answered_and_a_stranger_is_not(jittered, cohort_dir, tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    predict_patient(cohort_dir / "patients" / OWN, jittered, own, draws=0)
    stranger = shutil.copytree(cohort_dir / "patients" / OWN, tmp_path / "p")
    image = nib.load(stranger / "t1.nii.gz")
    values = np.asarray(image.dataobj)
    wrong = np.where(values > np.median(values), values**2, values).astype(np.float32)
    nib.save(nib.Nifti1Image(wrong, image.affine), stranger / "t1.nii.gz")
    prediction = predict_patient(stranger, jittered, other, draws=0, pdf=True)
    here, there = (read_prediction(f / "prediction.json") for f in (own, other))
    assert here.novelty.state == "familiar"
    assert "stranger" not in {reason.code for reason in here.status_reasons}
    assert there.novelty.state == "strange" and there.status == "abstained"
    assert there.status_reasons[0].code == "stranger"
    assert "t1" in there.status_reasons[0].values["modalities"]
    assert any("not like those" in warning for warning in prediction.warnings)
    page = (other / "report.html").read_text(encoding="utf-8")
    assert "No answer: this patient is not like those" in page
    assert "Among patients like those it was calibrated on" not in page
    assert "Sets made this way hold" not in page
    familiar = (own / "report.html").read_text(encoding="utf-8")
    assert "No answer" not in familiar
    for text in (page, familiar):  # somebody was compared, so the page would show it
        assert "were as unusual as this one" in text
        assert "nothing on this page would show it" not in text
    pages = PdfReader(other / "report.pdf").pages
    text = " ".join(" ".join(page.extract_text() for page in pages).split())
    assert "No answer: this patient is not like those" in text
    assert "Sets made this way hold" not in text
    assert not check(own).problems and not check(other).problems


def test_an_evaluation_counts_alarms(jittered, cohort, tmp_path):
    evaluate(jittered, cohort, tmp_path / "out", scenarios=["as-is", "rate:0.4"], reports=False)
    with (tmp_path / "out" / "predictions.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    own = [r for r in rows if r["novelty"]]
    assert {r["method"] for r in own} == {jittered.choice.name}
    assert {r["scenario"] for r in own} == {"as-is", "rate:0.4"}
    with (tmp_path / "out" / "metrics.csv").open(encoding="utf-8") as stream:
        shares = {
            (r["scenario"], r["metric"]): float(r["value"])
            for r in csv.DictReader(stream)
            if r["metric"] in ("unusual", "strange")
        }
    assert len(shares) == 4
    for scenario in ("as-is", "rate:0.4"):
        some = [r["novelty"] for r in own if r["scenario"] == scenario]
        unusual = np.mean([state in ("unusual", "strange") for state in some])
        assert shares[scenario, "unusual"] == pytest.approx(unusual)
        assert shares[scenario, "strange"] <= shares[scenario, "unusual"]
