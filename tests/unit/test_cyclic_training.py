"""CyIN from a recipe to answers: imputer and backbone of one network in one bundle."""

import csv
import dataclasses

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dymo_med.bundle import load_bundle
from dymo_med.data.batch import collate
from dymo_med.errors import BundleError, ConfigError
from dymo_med.inference.answer import answer
from dymo_med.inference.evaluate import evaluate
from dymo_med.inference.predict import predict_batch
from dymo_med.training.train import train

LATENTS = {"length": 2, "dim": 8, "hidden": 8, "bottleneck": 6, "residual_dims": [4], "width": 4}
RECIPE = {
    "name": "cyclic",
    "imputer": {"name": "cyclic", **LATENTS},
    "backbone": {
        "name": "cyclic",
        **LATENTS,
        "fusion": "joint",
        "fusion_dim": 8,
        "heads": 2,
        "projection": 4,
    },
    "imputer_training": {"epochs": 2, "batch_size": 8},
    "backbone_training": {
        "epochs": 3,
        "batch_size": 8,
        "subsets": 2,
        "class_weights": "balanced",
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, cohort_dir):
    folder = tmp_path_factory.mktemp("cyclic")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    train(folder / "recipe.yaml", cohort_dir, folder / "run", device="cpu")
    return folder / "run"


@pytest.fixture(scope="module")
def cyclic_bundle(run):
    return load_bundle(run / "bundle", "cpu")


def test_weights_are_stored_once_and_shared_after_loading(run, cyclic_bundle):
    stored = load_file(run / "bundle" / "models" / "imputer.safetensors")
    assert all(name.startswith("decoders.") for name in stored)
    assert cyclic_bundle.imputer.latents is cyclic_bundle.backbone.latents
    stages = [line.split(",")[0] for line in (run / "log.csv").read_text().splitlines()[1:]]
    assert stages == ["backbone"] * 3 + ["imputer"] * 2


def test_trusting_everything_is_the_method_alone(cyclic_bundle, records):
    some = [r for r in records if len(r.modalities) < 5][:4]
    answers = answer(cyclic_bundle, some)
    backbone = cyclic_bundle.backbone
    with torch.inference_mode():
        encoded = backbone.latents.encode(collate(some, cyclic_bundle.specs))
        alone = backbone.classifier(
            backbone.fusion(*backbone.latents.fill(encoded.mean, encoded.available))
        )
    torch.testing.assert_close(answers.traces["trust_all"].output.logits, alone)


def test_an_explanation_adds_up_to_the_answer(cyclic_bundle, records):
    """What was recovered as tokens is explained as the tokens that were fused."""
    some = [r for r in records if len(r.modalities) < 5][:2]
    bundle = cyclic_bundle.with_selector("trust_all")
    for prediction in predict_batch(bundle, some):
        assert prediction.trusted
        shapley = [a.value for a in prediction.attributions if a.method == "shapley"]
        chosen = max(range(2), key=lambda k: prediction.probabilities[k])
        assert sum(shapley) + prediction.base_rates[chosen] == pytest.approx(
            prediction.probabilities[chosen], abs=1e-6
        )
        # Cells and voxels that nobody fused move nothing.
        made = {a.modality for a in prediction.attributions if a.name and a.recovered}
        assert not made & set(prediction.trusted)


def test_bundles_are_set_side_by_side(cyclic_bundle, cohort, tmp_path, plain):
    other = dataclasses.replace(cyclic_bundle, name="other").with_selector("dymo")
    evaluate(
        cyclic_bundle,
        cohort,
        tmp_path / "out",
        scenarios=("rate:0.4",),
        reports=False,
        against=(other,),
    )
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    for method in ("observed_only", "trust_all", "dymo"):
        mine = [r for r in rows if r["method"] == method]
        theirs = [r for r in rows if r["method"] == f"other:{method}"]
        assert mine and len(mine) == len(theirs)
        for one, two in zip(mine, theirs, strict=True):  # the same network under another name
            # What only the bundle's own selector says of its answer.
            own = ("method", "prediction_set", "status", "novelty", "novelty_p")
            assert {**one, **dict.fromkeys(own, "")} == {**two, "method": ""}
    with (tmp_path / "out" / "metrics.csv").open() as file:
        methods = {r["method"] for r in csv.DictReader(file)}
    assert f"{cyclic_bundle.choice.name} - other:trust_all" in methods
    with pytest.raises(ConfigError, match="several bundles are called cyclic"):
        evaluate(cyclic_bundle, cohort, tmp_path / "two", against=(cyclic_bundle,))
    assert not (tmp_path / "two").exists()
    fewer = dataclasses.replace(other, specs=other.specs[:-1])
    with pytest.raises(BundleError, match="other modalities than bundle cyclic"):
        evaluate(cyclic_bundle, cohort, tmp_path / "two", against=(fewer,))
