"""Segmentation is trained by the same command; wrong pairs of recipe and cohort are refused."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from dymo_med.backbones import SharedUNet, Windows
from dymo_med.backbones.dense import dense_versions, slide
from dymo_med.backbones.shared_unet import ModalityOutput
from dymo_med.bundle import load_bundle
from dymo_med.bundle_segmentation import load_segmentation_bundle
from dymo_med.config import BackboneTraining
from dymo_med.data.batch import collate
from dymo_med.data.masks import read_known
from dymo_med.data.simulate import SEGMENTATION
from dymo_med.errors import BundleError, ConfigError
from dymo_med.training.gmd import ObjectiveGradients
from dymo_med.training.loop import Log, MicroBatch, train_stage
from dymo_med.training.losses import soft_dice_loss
from dymo_med.training.segmentation import (
    SegmentationObjective,
    own_dice_loss,
    random_crop,
)
from dymo_med.training.train import train
from dymo_med.types import Batch, MaskSpec, ModalityMask, ModalitySpec
from tests.segmentation import (  # noqa: F401
    masked_cohort,
    masked_dir,
    segmentation_bundle,
    segmentation_dir,
    write_recipe,
)


@pytest.fixture(scope="module")
def batch(masked_cohort):  # noqa: F811
    records = [read_known(entry, masked_cohort) for entry in masked_cohort.records[:3]]
    return collate(records, masked_cohort.specs)


def test_soft_dice_is_that_of_the_whole_batch():
    p = torch.tensor([[[0.5, 1.0]], [[0.0, 0.25]]])[..., None, None]
    g = torch.tensor([[[True, True]], [[False, False]]])[..., None, None]
    expected = 1 - (2 * 1.5 + 1) / (1.75 + 2 + 1)
    assert float(soft_dice_loss(p, g, torch.ones(2))) == pytest.approx(expected)
    alone = 1 - (2 * 1.5 + 1) / (1.5 + 2 + 1)
    assert float(soft_dice_loss(p, g, torch.tensor([1.0, 0.0]))) == pytest.approx(alone)


def test_a_crop_takes_the_same_place_of_scans_and_mask(batch):
    marked = batch.rows(torch.arange(3))
    volume = torch.arange(16**3, dtype=torch.float32).reshape(1, 16, 16, 16)
    values = {n: volume.expand(3, 1, 16, 16, 16) for n in marked.values}
    masks = (volume[0] % 251).to(torch.uint8).expand(3, 16, 16, 16)
    part = random_crop(
        replace(marked, values=values, masks=masks), [8, 10, 12], torch.Generator().manual_seed(1)
    )
    assert part.masks.shape == (3, 8, 10, 12)
    for name in values:
        assert torch.equal(part.values[name][:, 0] % 251, part.masks.float())


def test_crops_lie_in_the_body_and_hold_the_lesion(batch):
    volume = torch.zeros(1, 1, 16, 16, 16)
    volume[..., 4:14, 2:12] = 1
    masks = torch.zeros(1, 16, 16, 16, dtype=torch.uint8)
    masks[0, 2, 5, 3] = 1
    whole = replace(batch.rows(torch.arange(1)), values={"a": volume}, masks=masks)
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(20):
        part = random_crop(whole, [8, 8, 12], generator)
        assert part.values["a"].sum() == 8 * 8 * 10  # all there is along the short axis
        held += int(part.masks.sum())
        assert random_crop(whole, [8, 8, 12], generator, lesion=1.0).masks.sum() == 1
    assert held < 20
    outside = replace(whole, masks=masks.flip(3))  # a lesion where no scan shows anything
    assert random_crop(outside, [8, 8, 8], generator, lesion=1.0).masks.sum() == 1
    none = replace(whole, values={"a": volume * 0}, masks=masks * 0)
    assert random_crop(none, [8, 8, 8], generator, lesion=1.0).masks.shape == (1, 8, 8, 8)


def test_what_a_scan_does_not_fill_is_not_looked_at(segmentation_bundle):  # noqa: F811
    network, name = segmentation_bundle.network, segmentation_bundle.specs[0].name
    scan = torch.zeros(1, 1, 16, 16, 40)
    scan[..., 10:30] = torch.randn(20, generator=torch.Generator().manual_seed(0))
    windows = Windows((16, 16, 8), body=True)
    seen = []
    run = network.run
    network.run = lambda name, part: seen.append(part) or run(name, part)
    try:
        found = slide(network, name, scan, windows)
        looks = len(seen)
        everywhere = slide(network, name, scan, replace(windows, body=False))
    finally:
        del network.run
    assert looks < len(seen) - looks
    inside = slide(network, name, scan[..., 10:30], replace(windows, body=False))
    assert torch.equal(found.logits[..., 10:30], inside.logits)
    assert torch.equal(found.embedding, inside.embedding)
    outside = torch.cat([found.logits[..., :10], found.logits[..., 30:]], -1).flatten(2)
    assert bool((outside == outside[..., :1]).all())  # what the network says of zeros
    assert found.logits.shape == everywhere.logits.shape
    full = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        slide(network, name, full, windows).logits,
        slide(network, name, full, replace(windows, body=False)).logits,
    )
    empty = slide(network, name, torch.zeros(1, 1, 16, 16, 16), windows)
    assert bool(empty.logits.isfinite().all())


def test_each_subset_has_its_loss_and_absent_scans_no_say(segmentation_bundle, batch):  # noqa: F811
    network, mask = segmentation_bundle.network, segmentation_bundle.mask
    objective = SegmentationObjective(
        *(network, mask, BackboneTraining(subsets=15), batch, torch.ones(3)),
        *(Windows((16, 16, 16)), torch.device("cpu"), 0),
    )
    step = MicroBatch(batch, torch.ones(3), torch.Generator().manual_seed(0))
    objective.begin_batch(step.generator)
    losses = objective.losses(step)
    assert len(losses) == 15 and all(0 < float(x) < 1 for x in losses)
    again = MicroBatch(batch, torch.ones(3), torch.Generator().manual_seed(0))
    objective.begin_batch(again.generator)
    assert float(objective(again)) == pytest.approx(float(torch.stack(losses).mean()))
    assert {"score", "all", "worst"} == set(objective.validate())


def trained(bundle, batch, folder, **settings):
    """Return the weights of the small network after an epoch."""
    network = copy.deepcopy(bundle.network).requires_grad_(True)
    schedule = BackboneTraining(epochs=1, batch_size=3, learning_rate=0.02, **settings)
    objective = SegmentationObjective(
        *(network, bundle.mask, schedule, batch.rows(torch.arange(1)), torch.ones(1)),
        *(Windows((16, 16, 16)), torch.device("cpu"), 0),
    )
    train_stage(
        *("backbone", objective, batch, torch.ones(3), schedule, 0),
        fabric=Fabric(accelerator="cpu", devices=1),
        checkpoint=folder / "backbone.safetensors",
        fingerprint="",
        log=Log(folder / "log.csv"),
    )
    return {name: p.detach() for name, p in network.named_parameters()}


def test_decoupled_gradients_train_and_give_the_same_bits(
    segmentation_bundle,  # noqa: F811
    batch,
    tmp_path,
):
    batch = batch.rows(torch.arange(3))
    batch.observed.available[1, 2] = False  # fewer subsets of one patient
    before = dict(segmentation_bundle.network.named_parameters())
    first, again, plain = (
        trained(segmentation_bundle, batch, tmp_path / name, gradient=gradient, subsets=15)
        for name, gradient in (("a", "gmd"), ("b", "gmd"), ("plain", "sum"))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], plain[name]) for name in first)
    for name, values in first.items():  # every scan's own parameters learn too
        assert bool(values.isfinite().all()) and not torch.equal(values, before[name]), name


class Gains(torch.nn.Module):
    """Logits are a common gain times the scan's own gain times the scan."""

    def __init__(self, names):
        super().__init__()
        self.specs = tuple(ModalitySpec(n, "image", n, (1, 1, 1, 1), (1.0,) * 3) for n in names)
        self.common = torch.nn.Parameter(torch.tensor(1.0))
        self.own = torch.nn.ParameterList(torch.nn.Parameter(torch.tensor(1.0)) for _ in names)

    def outputs(self, values, available):
        return [
            ModalityOutput(self.common * self.own[m] * values[spec.name], None)
            for m, spec in enumerate(self.specs)
        ]

    def specific_modules(self):
        return [self.own]


def gains_step(available, weights):
    """Two scans of one voxel: of patients who have them 0.5 and -1; else 100, not to be seen."""
    measured = torch.tensor([0.5, -1.0]).expand(len(available), 2)
    scans = torch.where(available, measured, 100.0)
    ids = tuple(f"p{i}" for i in range(len(available)))
    values = {n: scans[:, m].view(-1, 1, 1, 1, 1) for m, n in enumerate("ab")}
    batch = Batch(
        *(ids, ids, values, ModalityMask(("a", "b"), available), {}),
        torch.full((len(available),), -1),
        masks=torch.ones(len(available), 1, 1, 1, dtype=torch.uint8),
        masked=torch.ones(len(available), dtype=torch.bool),
    )
    return MicroBatch(batch, torch.tensor(weights), torch.Generator().manual_seed(0))


def slope(x, weight):
    """Derivative by the gain g, at g = 1, of the soft Dice loss of voxels that are all lesion.

    With p = sigmoid(g x) and total weight w it is 1 - (2 w p + 1) / (w p + w + 1).
    """
    p = 1 / (1 + math.exp(-x))
    return -(2 * weight**2 + weight) / (weight * p + weight + 1) ** 2 * x * p * (1 - p)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, 1.5]])
def test_a_patient_who_has_nothing_of_a_subset_adds_nothing_to_its_gradient(weights):
    available = torch.tensor([[True, True], [False, True]])  # the second lacks scan a
    mask = MaskSpec("mask", (1,), {"whole": (1,)})
    step = gains_step(available, weights)
    network = Gains("ab")
    objective = SegmentationObjective(
        *(network, mask, BackboneTraining(gradient="gmd"), step.batch, torch.ones(2)),
        *(None, torch.device("cpu"), 0),
    )
    objective._drawn = torch.tensor([[True, False], [False, True], [True, True]])
    gradients = ObjectiveGradients(network.parameters(), objective.decoupling)
    gradients.backward(objective(step))
    share = weights[0] / sum(weights)
    # Of scan a: the first patient alone, by his share of the batch. The second has another scan,
    # which is not trained in its name: nothing reaches the gain of b.
    of_a = share * slope(0.5, weights[0])
    assert gradients.flat[0].tolist() == pytest.approx([of_a, of_a, 0.0], rel=1e-5)
    assert gradients.reached[0].tolist() == [True, True, False]
    # Of scan b: both patients, whose voxels are the same.
    of_b = slope(-1.0, sum(weights))
    assert gradients.flat[1].tolist() == pytest.approx([of_b, 0.0, of_b], rel=1e-5)
    # Of both scans: the second patient with what he has of them.
    assert gradients.reached[2].all()


def test_a_subset_that_nobody_in_the_batch_has_anything_of_has_no_gradient():
    available = torch.tensor([[False, True], [False, True]])
    logits = [torch.zeros(2, 1, 1, requires_grad=True)] * 2
    used = available & torch.tensor([True, False])
    loss = own_dice_loss(logits, used, torch.ones(2, 1, 1, dtype=torch.bool), torch.ones(2))
    assert float(loss) == 0 and not loss.requires_grad


def test_without_gaps_the_loss_of_a_subset_is_the_batch_s_soft_dice():
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(3, 2, 5, generator=g) for _ in range(2)]
    target = torch.rand(3, 2, 5, generator=g) < 0.5
    weights = torch.tensor([1.0, 0.5, 1.5])
    used = torch.tensor([True, False]).expand(3, 2)
    plain = soft_dice_loss(torch.sigmoid(logits[0]), target, weights)
    assert torch.equal(own_dice_loss(logits, used, target, weights), plain)


def test_windows_agree_with_one_look_and_flips_change_it(segmentation_bundle, batch):  # noqa: F811
    network = segmentation_bundle.network
    whole = slide(network, "t1", batch.values["t1"][:1], Windows((16, 16, 16)))
    direct = network.run("t1", batch.values["t1"][:1])
    assert torch.equal(whole.logits, direct.logits)
    parts = slide(network, "t1", batch.values["t1"][:1], Windows((12, 12, 12)))
    assert parts.logits.shape == whole.logits.shape and bool(parts.logits.isfinite().all())
    flipped = slide(network, "t1", batch.values["t1"][:1], Windows((16, 16, 16), flips=True))
    mirrored = slide(
        network, "t1", batch.values["t1"][:1].flip(2), Windows((16, 16, 16), flips=True)
    )
    assert torch.allclose(flipped.logits, mirrored.logits.flip(2), atol=1e-5)
    assert not torch.allclose(flipped.logits, whole.logits, atol=1e-3)


def test_versions_average_what_is_used(segmentation_bundle, batch):  # noqa: F811
    bundle = segmentation_bundle
    hidden = batch.rows(torch.tensor([0]))
    hidden.observed.available[0, 1:3] = False
    recovery = bundle.trust.imputer.recover(hidden)
    versions = dense_versions(
        bundle.network, hidden, bundle.windows, recovery, bundle.trust.readout
    )
    row = torch.zeros(1, dtype=torch.int64)
    used = torch.tensor([[True, True, False, True]])
    admitted = torch.tensor([[False, True, False, False]])
    each = [
        bundle.network.run("t1", hidden.values["t1"]),
        bundle.network.run("t1ce", recovery.values["t1ce"]),
        bundle.network.run("flair", hidden.values["flair"]),
    ]
    expected = torch.stack([x.logits for x in each]).mean(0)
    assert torch.allclose(versions.logits(row, used, admitted), expected, atol=1e-5)
    read = versions(row, used, admitted)
    assert read.logits.shape == (1, 3) and float(read.embedding.norm()) == pytest.approx(1)


def test_a_bundle_comes_back_from_disk(segmentation_bundle, segmentation_dir, batch):  # noqa: F811
    again = load_segmentation_bundle(segmentation_dir, "cpu")
    assert again.task == segmentation_bundle.task and again.mask.regions["TC"] == (1, 4)
    assert isinstance(again.network, SharedUNet) and again.windows.size == (16, 16, 16)
    assert set(again.trust.selectors) == {"observed_only", "trust_all", "dymo"}
    assert set(again.trust.choice.results) == set(again.trust.selectors)
    metadata = json.loads((segmentation_dir / "configs" / "metadata.json").read_text())
    assert metadata["provenance"]["labelled_records"]["train"] == 8
    assert not list(segmentation_dir.rglob("*.pt"))
    card = (segmentation_dir / "docs" / "README.md").read_text()
    assert "| ET | 4 |" in card and np.isfinite(again.trust.choice.results["dymo"]["dice"])


def test_each_sort_of_bundle_refuses_the_other_s_loader(segmentation_dir, bundle_dir):  # noqa: F811
    with pytest.raises(BundleError, match="another task"):
        load_bundle(segmentation_dir, "cpu")
    with pytest.raises(BundleError, match="another task"):
        load_segmentation_bundle(bundle_dir, "cpu")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"backbone": {"name": "transformer"}}, "not for a segmentation"),
        ({"selector": {"name": "dymo"}}, "not for a segmentation"),
        ({"backbone_training": {"crop": [32, 16, 16]}}, "larger than the grid"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(masked_dir, tmp_path, changes, text):  # noqa: F811
    recipe = write_recipe(tmp_path / "recipe.yaml", **changes)
    with pytest.raises(ConfigError, match=text):
        train(recipe, masked_dir / SEGMENTATION, tmp_path / "run", device="cpu")


def test_a_segmentation_recipe_is_refused_for_a_classification(masked_dir, tmp_path):  # noqa: F811
    recipe = write_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError, match="is for a segmentation"):
        train(recipe, masked_dir, tmp_path / "run", device="cpu")
