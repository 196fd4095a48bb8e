"""CyIN from a recipe to answers: imputer and backbone of one network in one bundle."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dymo_med.bundle import load_bundle
from dymo_med.data.batch import collate
from dymo_med.inference.predict import answer, predict_batch
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
