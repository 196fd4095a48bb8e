"""A bundle whose answers are averaged over draws, through every command that answers."""

import dataclasses
import json

import pytest
import torch
import yaml

from dymo_med.bundle import load_bundle
from dymo_med.data.patient import read_patient
from dymo_med.drawn import DRAWS
from dymo_med.errors import ConfigError
from dymo_med.imputers import conditional
from dymo_med.inference.answer import answer
from dymo_med.inference.audit import audit
from dymo_med.inference.predict import predict_patient
from dymo_med.training import train as training
from tests.contracts.conftest import LACKS, recipe_of

LACKING = [p for p, lacks in LACKS.items() if lacks]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A bundle of two networks that read descriptors and rows, with draws by default."""
    recipe = recipe_of("classification", "transformer", "conditional", members=2)
    del recipe["imputer_training"]["members"]
    recipe["backbone"] |= {"image_encoders": ["descriptors"], "table_encoder": "row"}
    recipe["selector"] = {"name": "average"}
    work = tmp_path_factory.mktemp("averages")
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "draw_curves", lambda *_: None)
        patch.setattr(conditional, "_MOST_PRIVATE", 3)  # there are eight training patients
        return training.train(path, tiny.cohort("classification"), work / "run", device="cpu")


@pytest.fixture(scope="module")
def bundle(folder):
    return load_bundle(folder, device="cpu")


def records_of(tiny, bundle):
    return [read_patient(tiny.patients / name, bundle.specs) for name in LACKS]


def test_a_record_s_answer_does_not_depend_on_its_neighbours(tiny, bundle):
    records = records_of(tiny, bundle)
    together = answer(bundle, records, seed=3).probabilities["average"]
    for i, record in enumerate(records):
        alone = answer(bundle, [record], seed=3).probabilities["average"][0]
        torch.testing.assert_close(alone, together[i], atol=1e-6, rtol=0)


def test_draws_enter_the_answer(tiny, bundle):
    answers = answer(bundle, records_of(tiny, bundle))
    apart = answers.probabilities["average"] - answers.probabilities["trust_all"]
    lacking = answers.recovery.candidates.any(1)
    assert bool(lacking.any())
    assert bool((apart[lacking].abs().amax(1) > 1e-6).all())
    assert float(apart[~lacking].abs().max()) == 0 if bool((~lacking).any()) else True


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["network", "network and reference"])
@pytest.mark.parametrize("method", ["average", "guarded"])
@pytest.mark.parametrize("name", LACKING[:2])
def test_the_file_says_what_was_averaged_and_stands_an_audit(
    tiny, bundle, folder, tmp_path, name, method, share
):
    references = dataclasses.replace(bundle.references, weight=share, partner="logistic")
    chosen = dataclasses.replace(bundle, references=references).with_selector(method)
    out = tmp_path / "out"
    predict_patient(tiny.patients / name, chosen, out)
    file = json.loads((out / "prediction.json").read_text())
    assert not audit(out).problems
    drawn = torch.tensor(file["draws"]["own"]["probabilities"], dtype=torch.float64)
    assert len(drawn) == DRAWS
    # The answer is the mean of the draws that the file states.
    assert drawn.mean(0).tolist() == pytest.approx(file["probabilities"], abs=1e-5)
    parts = file["draws"]["variance"]
    assert parts["total"] == pytest.approx(
        parts["model"] + parts["recovery"] + parts["absence"], abs=1e-12
    )
    assert all(g["bits"] >= 0 for g in file["acquire"]["gains"])
    made = [c for c in file["exhibits"]["cells"] if not c["measured"] and c["low"] is not None]
    assert all(c["low"] <= c["value"] <= c["high"] and " to " in c["text"] for c in made)
    if method == "guarded":  # four calibration patients prove nothing
        assert not file["trusted"] and "too few" in file["method_why"]


def test_the_bundle_and_its_card_say_how_draws_did(bundle, folder):
    card = (folder / "docs" / "README.md").read_text()
    assert ("Draws of recoveries" in card) == (bundle.draw_check is not None)
    assert bundle.choice.name == "average" and bundle.choice.why == "The recipe asked for it."


def test_a_bound_on_harm_makes_the_guard_the_default(tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    made = recipe_of("classification", "transformer", "conditional")
    made["backbone"] |= {"image_encoders": ["descriptors"], "table_encoder": "row"}
    recipe.write_text(yaml.safe_dump(made))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "draw_curves", lambda *_: None)
        cohort = tiny.cohort("classification")
        found = training.train(recipe, cohort, tmp_path / "run", device="cpu", harm=0.2)
    bundle = load_bundle(found, device="cpu")
    assert bundle.choice.name == "guarded" and bundle.selector.options.harm == 0.2


def test_no_bound_is_proven_of_outlines(tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of("segmentation", "shared_unet", "synthesis")))
    with pytest.raises(ConfigError, match="no bound on harm"):
        training.train(
            recipe, tiny.cohort("segmentation"), tmp_path / "run", device="cpu", harm=0.2
        )
