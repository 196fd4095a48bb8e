"""A recipe chosen from the cohort itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dymo_med.bundle import load_bundle, read_recipe
from dymo_med.data.batch import collate
from dymo_med.data.cohort import read_cohort
from dymo_med.data.patient import read_record
from dymo_med.inference.answer import answer
from dymo_med.inference.check import check as check_cohort
from dymo_med.training import plan
from dymo_med.training.fit_specs import fit_specs
from dymo_med.training.train import train
from tests.conftest import write_cohort


@pytest.fixture(scope="module")
def data(cohort):
    return {
        split: collate(
            [read_record(e, cohort.specs, cohort.missing_values) for e in cohort.in_split(split)],
            cohort.specs,
        )
        for split in ("train", "validation", "calibration")
    }


@pytest.fixture(scope="module")
def specs(cohort, data):
    return fit_specs(cohort.specs, data["train"])


@pytest.fixture(scope="module")
def found(cohort, data):
    return plan.fingerprint(cohort, data)


def test_patients_are_counted_not_records(found, data):
    assert len(data["train"]) == 12
    assert found.patients == {"train": 10, "validation": 3, "calibration": 3}
    assert sum(found.classes) == found.labelled["train"] == 10
    assert found.kinds() == {"image", "table"} and found.voxels == 16**3
    text = " ".join(found.lines())
    assert "train 10 of 10" in text and "16 x 16 x 16 at 2 x 2 x 2 mm" in text


def test_every_line_of_the_recipe_reads_back_and_reasons_stand_beside(found, tmp_path):
    made = plan.rules(found)
    made.recipe["backbone"] |= plan.candidates(found)[0].backbone
    file = tmp_path / "recipe.yaml"
    file.write_text(made.text(found))
    recipe = read_recipe(file)
    assert recipe.backbone.options["image_encoders"] == ["descriptors"]
    assert recipe.backbone_training.members == 3
    assert "# 10 labelled training patients" in file.read_text()
    assert yaml.safe_load(file.read_text()) == made.recipe


def test_convolutions_are_tried_with_pictures_or_many_patients(found):
    def names(f):
        return [c.name for c in plan.candidates(f)]

    assert names(found)[0] == "descriptors + row"
    assert "descriptors + fine + row" not in names(found)
    many = replace(found, labelled={**found.labelled, "train": 500})
    assert "descriptors + fine + row" in names(many)
    tables = replace(
        found, modalities={k: m for k, m in found.modalities.items() if m["kind"] == "table"}
    )
    assert names(tables) == ["row", "columns"]
    assert plan.rules(tables).recipe["imputer"] == {"name": "iterative"}


@pytest.mark.parametrize(("patients", "name"), [(20, "mopoe"), (300, "conditional")])
def test_many_patients_without_a_label_are_drawn_from(
    cohort, specs, data, found, monkeypatch, patients, name
):
    more = replace(found, patients={**found.patients, "train": patients})
    more = replace(more, labelled={**found.labelled, "train": 15})
    losses = {f"p{i}": 1.0 for i in range(4)}
    monkeypatch.setattr(plan, "fingerprint", lambda *_: more)
    monkeypatch.setattr(plan, "_tried", lambda one, *_: plan.Trial(one, losses, 1.0))
    recipe, text = plan.propose(cohort, specs, data, budget_s=100)
    assert recipe.imputer.name == name
    assert ("have no label" in text) == (name == "conditional")


def test_folds_validate_every_patient_once_and_split_nobody(data):
    seen = []
    for fit, check in plan._folds(data, seed=0):
        assert not set(fit.patient_ids) & set(check.patient_ids)
        assert check.descriptors.keys() == data["train"].descriptors.keys()
        seen += sorted(set(check.patient_ids))
    everybody = {*data["train"].patient_ids, *data["validation"].patient_ids}
    assert sorted(seen) == sorted(everybody)


@pytest.mark.parametrize(
    ("second", "chosen"),
    [(lambda i: 0.9 + 0.01 * (i % 2), "columns"), (lambda i: 0.99 + 0.5 * (i % 2 - 0.5), "row")],
    ids=["better for everybody", "better by chance"],
)
def test_a_later_candidate_must_be_better_beyond_chance(
    cohort, specs, data, monkeypatch, second, chosen
):
    def tried(candidate, *_):
        columns = candidate.backbone["table_encoder"] == "columns"
        voxels = "voxels" in candidate.backbone["image_encoders"]
        losses = {f"p{i}": second(i) if columns else 2.0 if voxels else 1.0 for i in range(40)}
        return plan.Trial(candidate, losses, 1.0)

    monkeypatch.setattr(plan, "_tried", tried)
    monkeypatch.setattr(plan, "_imputer_epoch_s", lambda *_: 1.0)
    recipe, text = plan.propose(cohort, specs, data, budget_s=1000)
    assert recipe.backbone.options["table_encoder"] == chosen
    assert recipe.backbone.options["image_encoders"] == ["descriptors"]
    assert "against descriptors + row" in text


def test_a_small_budget_cuts_members_and_epochs(cohort, specs, data, monkeypatch):
    losses = {f"p{i}": 1.0 for i in range(4)}
    monkeypatch.setattr(
        plan, "_tried", lambda candidate, *_: plan.Trial(candidate, losses, 30.0, 3)
    )
    monkeypatch.setattr(plan, "_imputer_epoch_s", lambda *_: 10.0)
    recipe, text = plan.propose(cohort, specs, data, budget_s=62)
    assert recipe.backbone_training.members == 3 and recipe.imputer_training.epochs == 3
    assert "not tried, the budget is used up" in text and "what the budget allows" in text


def test_train_without_a_recipe_writes_one_and_goes_on(cohort_dir, tmp_path):
    said = []
    bundle = train(
        None, cohort_dir, tmp_path / "run", device="cpu", seed=2, budget_s=2, say=said.append
    )
    recipe = read_recipe(tmp_path / "run" / "recipe.yaml")
    assert recipe.seed == 2 and any("labelled patients" in line for line in said)
    assert load_bundle(bundle, device="cpu").provenance["recipe"] == recipe.model_dump()
    again = train(None, cohort_dir, tmp_path / "run", device="cpu", seed=2, resume=True)
    assert again == bundle


def test_tables_alone_and_a_number_to_predict_are_planned_too(tmp_path):
    folder = write_cohort(tmp_path / "cohort")
    description = yaml.safe_load((folder / "cohort.yaml").read_text())
    names = ("demographics", "labs")
    description["modalities"] = {n: description["modalities"][n] for n in names}
    description["task"] = {"type": "regression", "target": "score", "range": [0, 10], "bands": 3}
    (folder / "cohort.yaml").write_text(yaml.safe_dump(description, sort_keys=False))
    rows = (folder / "labels.csv").read_text().splitlines()
    scored = [f"{r.rsplit(',', 1)[0]},{i % 11}" for i, r in enumerate(rows[1:])]
    (folder / "labels.csv").write_text("\n".join(["record_id,patient_id,score", *scored]) + "\n")
    bundle = train(None, folder, tmp_path / "run", device="cpu", budget_s=1)
    assert load_bundle(bundle, device="cpu").imputer_entry["name"] == "iterative"
    assert read_cohort(folder).task.scale is not None
    assert torch.isfinite(load_bundle(bundle, device="cpu").backbone.class_token).all()


OWN = """
name: Lungenambulanz 2024
task: {type: classification, target: Befund, classes: [gesund, COPD, Fibrose]}
tables: {decimal: ",", separator: ";"}
missing_values: [k.A.]
modalities:
  uebersicht: {kind: image, dims: 2, file: "{record}_pa.png", size: [16, 16]}
  spirometrie:
    kind: table
    file: Lungenfunktion.csv
    columns:
      fev1: {type: continuous, header: "FEV1 (l)", unit: L, range: [0, 10]}
      crp: {type: continuous, header: CRP, unit: mg/L, range: [0, 500], censored: limit}
      raucher: {type: categorical, header: Raucher, values: ["nein", "ja"]}
"""


def write_own(folder):
    """Write a cohort with its own file names, headers, decimal sign and three classes."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    (folder / "cohort.yaml").write_text(OWN, encoding="utf-8")
    labels, splits = ["patient_id,Befund"], ["patient_id,split"]
    for number in range(36):
        kind, name = number % 3, f"Pat. {number:02d}"
        split = ("train", "train", "train", "validation", "calibration", "test")[number // 3 % 6]
        labels.append(f"{name},{('gesund', 'COPD', 'Fibrose', '')[kind if number < 33 else 3]}")
        splits.append(f"{name},{split}")
        at = folder / "patients" / name
        at.mkdir(parents=True)
        if number % 7 != 3:
            film = 90 + 40 * kind + rng.normal(0, 8, (20, 24)).cumsum(0).cumsum(1) / 8
            Image.fromarray(film.clip(0, 255).astype(np.uint8)).save(at / f"{name}_pa.png")
        if number % 7 != 5:
            fev1 = "k.A." if number % 4 == 0 else f"{4 - kind + rng.random():.2f}".replace(".", ",")
            crp = "<5" if number % 2 else f"{5 + 9 * rng.random():.1f}".replace(".", ",")
            row = f"{fev1};{crp};{rng.choice(['nein', 'ja'])}"
            (at / "Lungenfunktion.csv").write_text(f"FEV1 (l);CRP;Raucher\n{row}\n")
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    (folder / "splits.csv").write_text("\n".join(splits) + "\n")
    return folder


def test_train_without_a_recipe_takes_a_cohort_of_your_own(tmp_path, monkeypatch):
    rules = plan.rules

    def short(found):
        made = rules(found)
        for part in ("imputer_training", "backbone_training"):
            made.recipe[part]["epochs"] = 1
        return made

    monkeypatch.setattr(plan, "rules", short)
    folder = write_own(tmp_path / "cohort")
    assert check_cohort(folder).problems == ()
    bundle = load_bundle(train(None, folder, tmp_path / "run", device="cpu", budget_s=1), "cpu")
    assert bundle.task.classes == ("gesund", "COPD", "Fibrose")
    assert [s.name for s in bundle.specs] == ["uebersicht", "spirometrie"]
    recipe = (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8")
    assert "cohort Lungenambulanz 2024" in recipe and "training patients per class" in recipe
    answers = answer(
        bundle,
        [read_record(e, bundle.specs, ("k.A.",)) for e in read_cohort(folder).in_split("test")],
    )
    assert answers.probabilities["observed_only"].shape == (6, 3)
