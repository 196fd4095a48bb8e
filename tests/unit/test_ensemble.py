"""Several networks as one: the mean of their probabilities, wherever a backbone is asked."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from dymo_med.backbones import CyclicFusion, Ensemble, FusionTransformer, as_one, encode_versions
from dymo_med.bundle import load_bundle, save_bundle
from dymo_med.data.batch import collate
from dymo_med.errors import ConfigError
from dymo_med.inference.answer import answer
from dymo_med.inference.explain import Subject, image_saliency
from dymo_med.inference.predict import predict_patient
from dymo_med.training.fit_specs import fit_specs
from dymo_med.training.train import train

RECIPE = {
    "name": "pair",
    "imputer": {"name": "template"},
    "backbone": {
        "name": "transformer",
        "dim": 16,
        "heads": 2,
        "layers": 1,
        "projection": 8,
        "image_encoders": ["descriptors", "voxels"],
        "table_encoder": "row",
        "width": 4,
    },
    "backbone_training": {"epochs": 2, "batch_size": 16, "members": 2, "auxiliary": 0.5},
}


@pytest.fixture(scope="module")
def batch(records, cohort):
    return collate(records, cohort.specs)


def members(batch, cohort, count):
    specs = fit_specs(cohort.specs, batch)
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        options = {k: v for k, v in RECIPE["backbone"].items() if k != "name"}
        made.append(FusionTransformer(specs, 2, FusionTransformer.Options(**options)).eval())
    return made


@torch.no_grad()
def test_the_answer_is_the_mean_probability(batch, cohort):
    networks = members(batch, cohort, 3)
    whole = encode_versions(as_one(networks), batch)
    rows, used = torch.arange(len(batch)), batch.observed.available
    none = torch.zeros_like(used)
    each = [encode_versions(n, batch)(rows, used, none) for n in networks]
    answer = whole(rows, used, none)
    mean = torch.stack([o.logits.softmax(1) for o in each]).mean(0)
    assert torch.allclose(answer.logits.exp(), mean, atol=1e-6)
    assert torch.allclose(answer.embedding.norm(dim=1), torch.ones(len(batch)), atol=1e-5)


def test_one_network_is_itself(batch, cohort):
    (network,) = members(batch, cohort, 1)
    assert as_one([network]) is network


def test_networks_that_recover_are_not_averaged(batch, cohort):
    options = CyclicFusion.Options(dim=8, length=2, bottleneck=4, hidden=8, fusion_dim=8)
    network = CyclicFusion(fit_specs(cohort.specs, batch), 2, options)
    with pytest.raises(ValueError, match="cannot be averaged"):
        Ensemble([network, network])


@pytest.fixture(scope="module")
def run(cohort_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("pair")
    (out / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    train(out / "recipe.yaml", cohort_dir, out / "run", device="cpu")
    return out / "run"


def test_members_are_trained_apart_stored_together_and_explained(run, cohort_dir, tmp_path):
    bundle = load_bundle(run / "bundle", device="cpu")
    assert bundle.members == 2
    first, second = bundle.backbone.members
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    log = (run / "log.csv").read_text(encoding="utf-8")
    assert "\nbackbone," in log and "\nbackbone 2," in log and "only_t1=" in log
    prediction = predict_patient(cohort_dir / "patients" / "p016", bundle, out=tmp_path / "out")
    assert sum(prediction.probabilities) == pytest.approx(1)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "How bright the scans are" in page
    told = json.loads((tmp_path / "out" / "prediction.json").read_text(encoding="utf-8"))
    assert {c["modality"] for c in told["exhibits"]["contrast"]} <= {"t1", "t2", "photo"}
    error = told["exhibits"]["convergence"]
    assert abs(error["error"]) <= error["bound"]
    assert save_bundle(bundle, tmp_path / "copy") == bundle.bundle_id


def test_a_recipe_that_averages_recovering_networks_is_refused(cohort_dir, tmp_path):
    cyclic = {"name": "cyclic", "dim": 8, "length": 2, "bottleneck": 4, "hidden": 8}
    recipe = {**RECIPE, "imputer": cyclic, "backbone": {**cyclic, "fusion_dim": 8}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match="cannot be averaged"):
        train(tmp_path / "recipe.yaml", cohort_dir, tmp_path / "run", device="cpu")


def test_affine_augmentation_moves_images_and_their_masks_alike(batch):
    from dymo_med.config import Augmentation
    from dymo_med.training.objectives import augment

    ball = torch.zeros(2, 1, 16, 16, 16)
    ball[:, :, 9:13, 6:10, 6:10] = 1
    two = replace(
        batch.rows(torch.tensor([0, 1])),
        values={"t1": ball},
        masks=ball[:, 0].to(torch.uint8),
        masked=torch.ones(2, dtype=torch.bool),
    )
    moved = augment(
        two, Augmentation(rotate_degrees=40, scale=0.2), torch.Generator().manual_seed(3)
    )
    image, mask = moved.values["t1"][:, 0], moved.masks
    assert mask.dtype == torch.uint8 and set(mask.unique().tolist()) == {0, 1}
    assert (image.round() == mask).float().mean() > 0.98
    assert not torch.equal(mask[0], two.masks[0]) and not torch.equal(mask[0], mask[1])
    still = augment(two, Augmentation(scale=0.0), torch.Generator().manual_seed(3))
    assert still is two


@torch.no_grad()
def test_saliency_tells_places_and_intensities_apart(run, records):
    """Both parts together are the change from empty scans of usual intensities."""
    bundle = load_bundle(run / "bundle", device="cpu")
    answers = answer(bundle, [records[0]])
    subject = Subject(
        bundle.backbone,
        answers.batch,
        answers.recovery,
        answers.own,
        0,
        calibration=bundle.calibration,
        base_rates=bundle.base_rates,
    )
    centers = {s.name: s.descriptors.center for s in bundle.specs if s.descriptors}
    images = tuple(v for v in subject.versions if v[0] in centers)
    found = image_saliency(subject, images)
    total = sum(float(m.sum()) for m in found.maps.values()) + sum(found.contrast.values())
    start = {
        v: bundle.backbone.encode(
            v[0], torch.zeros_like(subject.versions[v][0]), None, torch.tensor([centers[v[0]]])
        )
        for v in images
    }
    present = torch.ones(1, len(subject.names), dtype=torch.bool)
    change = subject.probability(present) - subject.probability(present, start)
    assert total == pytest.approx(float(change), abs=0.006)
    assert set(found.contrast) == set(images) and set(found.maps) == {v[0] for v in images}
