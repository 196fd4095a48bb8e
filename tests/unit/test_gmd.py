"""Gradient decoupling: the projection on inner products, merging, and training with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from pydantic import ValidationError
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dymo_med.backbones import BACKBONES
from dymo_med.backbones.shared_unet import SharedUNet
from dymo_med.config import BackboneTraining, Schedule
from dymo_med.errors import ConfigError
from dymo_med.training.gmd import (
    Decoupling,
    ObjectiveGradients,
    gram_matrix,
    merge_weights,
    project,
    random_orders,
    shared_by_all,
)
from dymo_med.training.loop import Log, MicroBatch, Objective, _clip, train_stage
from dymo_med.training.losses import distinct_subsets
from dymo_med.training.objectives import FusionObjective
from dymo_med.types import Batch, Column, ModalityMask, ModalitySpec


def project_plain(flat, orders):
    """The published procedure, on full vectors."""
    projected = flat.clone()
    for i, order in enumerate(orders):
        for j in order:
            dot = projected[i] @ flat[j]
            if dot < 0:
                projected[i] -= dot / (flat[j] @ flat[j]) * flat[j]
    return projected


def random_gradients(n, p, seed):
    g = torch.Generator().manual_seed(seed)
    # Two camps pull a common direction either way, and everyone has something of their own.
    common = torch.randn(1, p, generator=g, dtype=torch.float64)
    camp = 1 - 2.0 * (torch.arange(n) % 2).double()[:, None]
    return torch.randn(n, p, generator=g, dtype=torch.float64) + camp * common


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 15), p=st.integers(1, 400), seed=st.integers(0, 2**31))
def test_projection_by_inner_products_equals_projection_of_full_vectors(n, p, seed):
    flat = random_gradients(n, p, seed)
    orders = random_orders(n, torch.Generator().manual_seed(seed))
    plain = project_plain(flat, orders)
    lean = project(gram_matrix(flat), orders) @ flat
    torch.testing.assert_close(lean, plain, atol=1e-6, rtol=1e-6)


def test_orders_matter_so_the_comparison_above_is_order_by_order():
    flat = random_gradients(4, 40, 5)
    one, other = (random_orders(4, torch.Generator().manual_seed(s)) for s in (0, 1))
    gram = gram_matrix(flat)
    assert (project(gram, one) - project(gram, other)).abs().max() > 0.01
    again = random_orders(4, torch.Generator().manual_seed(0))
    assert torch.equal(one, again)
    assert torch.equal(one.sort(1).values, torch.arange(4).expand(4, 4))


def test_without_conflict_the_result_is_the_plain_mean():
    flat = random_gradients(6, 50, 1).abs()
    combination = project(gram_matrix(flat), random_orders(6, torch.Generator()))
    assert torch.equal(combination, torch.eye(6, dtype=torch.float64))
    mean, total = merge_weights(combination)
    assert torch.equal(mean, torch.full((6,), 1 / 6, dtype=torch.float64))
    assert torch.equal(total, torch.ones(6, dtype=torch.float64))
    both = merge_weights(combination, "sum")
    assert torch.equal(both[0], total)
    assert torch.equal(both[1], total)


@settings(max_examples=60, deadline=None)
@given(p=st.integers(1, 60), seed=st.integers(0, 2**31))
def test_of_two_objectives_neither_projected_gradient_opposes_an_original(p, seed):
    flat = random_gradients(2, p, seed)
    flat[1] -= (flat[0] @ flat[1] / flat[0].square().sum() + 1) * flat[0]  # certain conflict
    assert flat[0] @ flat[1] < 0
    gram = gram_matrix(flat)
    combination = project(gram, random_orders(2, torch.Generator().manual_seed(seed)))
    assert (combination @ gram >= -1e-12 * gram.diagonal().max()).all()
    # Three by hand: a right angle is left of an obtuse one.
    by_hand = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    c = project(gram_matrix(by_hand), torch.tensor([[0, 1], [1, 0]]))
    expected = torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(c @ by_hand, expected)


def test_a_zero_gradient_changes_nothing_and_stays_zero():
    flat = random_gradients(4, 20, 3)
    flat[2] = 0
    orders = random_orders(4, torch.Generator().manual_seed(3))
    projected = project(gram_matrix(flat), orders) @ flat
    assert torch.isfinite(projected).all()
    assert not projected[2].any()
    torch.testing.assert_close(projected, project_plain(flat, orders))


def test_inner_products_in_float64_of_float32_gradients():
    flat = random_gradients(5, 200_000, 4).float()
    exact = flat.double() @ flat.double().T
    torch.testing.assert_close(gram_matrix(flat, torch.float64), exact, rtol=1e-13, atol=1e-9)
    torch.testing.assert_close(gram_matrix(flat), exact, rtol=1e-4, atol=1.0)


class Toy(nn.Module):
    """A common weight and one weight per modality; an objective is linear in all it reaches."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.own = nn.ParameterList(
            nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)
        )
        self.unused = nn.Parameter(torch.zeros(3, dtype=torch.float64))


def toy_losses(toy):
    # Gradients (shared | own 0 | own 1): (3, 0 | 2 | .), (-1, 1 | . | 1), (2, 2 | 5 | 7).
    return (
        3 * toy.shared[0] + 2 * toy.own[0].sum(),
        -toy.shared[0] + toy.shared[1] + toy.own[1].sum(),
        2 * toy.shared.sum() + 5 * toy.own[0].sum() + 7 * toy.own[1].sum(),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("named", [True, False])
def test_shared_and_specific_parameters_of_a_toy(reduction, named):
    toy = Toy()
    rule = Decoupling(3, list(toy.own) if named else None, reduction)
    gradients = ObjectiveGradients(toy.parameters(), rule)
    gradients.backward(toy_losses(toy))
    names = [name for name, _ in toy.named_parameters()]
    assert names == ["shared", "unused", "own.0", "own.1"]
    expected_reach = [[1, 0, 1, 0], [1, 0, 0, 1], [1, 0, 1, 1]]
    assert gradients.reached.int().tolist() == expected_reach
    assert shared_by_all(gradients.reached).tolist() == [True, False, False, False]
    gradients.merge(torch.Generator().manual_seed(0))
    # g1 . g2 = -3, |g1|^2 = 13, |g2|^2 = 3; neither opposes g3. So, in any order,
    # g1~ = g1 + g2 and g2~ = g2 + 3/13 g1: the weights of g1, g2, g3 are 16/13, 2, 1.
    w1, w2 = 16 / 13, 2.0
    factor = 1 / 3 if reduction == "mean" else 1.0
    shared = torch.tensor([3 * w1 - w2 + 2, w2 + 2], dtype=torch.float64) * factor
    torch.testing.assert_close(toy.shared.grad, shared)
    assert toy.own[0].grad.item() == pytest.approx(2 * w1 + 5)
    assert toy.own[1].grad.item() == pytest.approx(w2 + 7)
    assert toy.unused.grad is None


def test_a_recipe_that_decouples_takes_all_subsets_of_four_modalities_by_default():
    assert BackboneTraining().subsets == 5
    assert BackboneTraining(gradient="gmd").subsets == 15
    assert BackboneTraining(gradient="gmd", subsets=7).subsets == 7


def test_an_objective_nobody_belongs_to_adds_nothing_but_counts_in_the_mean():
    toy = Toy()
    rule = Decoupling(3, list(toy.own))
    gradients = ObjectiveGradients(toy.parameters(), rule)
    first, _, third = toy_losses(toy)
    gradients.backward((first, torch.zeros(()), third))
    gradients.merge(torch.Generator())
    torch.testing.assert_close(toy.shared.grad, torch.tensor([5 / 3, 2 / 3]).double())
    assert toy.own[0].grad.item() == 7
    with pytest.raises(ValueError, match="must be 3 losses"):
        gradients.backward((first,))


@pytest.mark.parametrize("factor", [2.0**16, 2.0**-12])
def test_a_loss_scale_can_be_taken_out_afterwards(factor):
    merged = []
    for scale in (1.0, factor):
        toy = Toy()
        gradients = ObjectiveGradients(toy.parameters(), Decoupling(3, list(toy.own)))
        gradients.backward([loss * scale for loss in toy_losses(toy)])
        gradients.merge(torch.Generator().manual_seed(0))
        merged.append(torch.cat([toy.shared.grad, *(p.grad for p in toy.own)]) / scale)
    assert torch.equal(*merged)


NAMES = "abcd"


def unet(dtype=torch.float32):
    torch.manual_seed(0)
    specs = [ModalitySpec(n, "image", f"{n}.nii.gz", (1, 8, 8), (4.0, 4.0)) for n in NAMES]
    return SharedUNet(specs, 2, SharedUNet.Options(widths=(8, 16), width_ratio=0.5)).to(dtype)


class Segmentation(Objective):
    """The squared error of a small U-Net, one loss per subset; records have all modalities."""

    def __init__(self, net, decouple=True):
        super().__init__()
        self.net = net
        own = [p for m in net.specific_modules() for p in m.parameters()]
        self.subsets = distinct_subsets(4, 15, torch.Generator().manual_seed(9))
        if decouple:
            self.decoupling = Decoupling(15, own)

    def forward(self, step):
        parts = [o.logits for o in self.net.outputs(step.batch.values)]
        losses = []
        for subset in self.subsets:
            fused = self.net.combine(parts, subset.expand(len(step.batch), 4))
            wanted = torch.cat([step.batch.values["a"], step.batch.values["b"]], 1) > 0
            losses.append((fused - wanted.to(fused)).square().mean())
        return tuple(losses) if self.decoupling else torch.stack(losses).mean()

    def validate(self):
        return {"score": 0.0}


def batch(n=4, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    values = {k: torch.randn(n, 1, 8, 8, generator=g, dtype=dtype) for k in NAMES}
    mask = ModalityMask(tuple(NAMES), torch.ones(n, 4, dtype=torch.bool))
    ids = tuple(f"p{i}" for i in range(n))
    return Batch(ids, ids, values, mask, {}, torch.zeros(n, dtype=torch.long))


class StepOf:
    def __init__(self, data):
        self.batch = data


def test_a_network_s_gradients_equal_the_plain_formulation():
    net = unet(torch.float64)
    objective = Segmentation(net)
    gradients = ObjectiveGradients(net.parameters(), objective.decoupling)
    losses = objective(StepOf(batch(dtype=torch.float64)))
    parameters = list(net.parameters())
    found = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for loss in losses
    ]
    flat = torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(row, parameters, strict=True)
                ]
            )
            for row in found
        ]
    )
    gradients.backward(losses)
    assert torch.equal(gradients.flat, flat)
    # No modality outside a subset is gone through.
    index = {n: i for i, (n, _) in enumerate(net.named_parameters())}
    for subset, reached in zip(objective.subsets, gradients.reached, strict=True):
        for m, modality in enumerate(NAMES):
            norm = index[f"down.0.norms.{modality}.0.weight"]
            assert bool(reached[norm]) == bool(subset[m])
    plain = project_plain(flat, random_orders(15, torch.Generator().manual_seed(2)))
    gradients.merge(torch.Generator().manual_seed(2))
    shared = shared_by_all(gradients.reached)
    for p, is_shared, block in zip(
        parameters, shared, plain.split([p.numel() for p in parameters], 1), strict=True
    ):
        merged = block.mean(0) if is_shared else block.sum(0)
        torch.testing.assert_close(p.grad.flatten(), merged, atol=1e-9, rtol=1e-6)
    # The named rule is the same one where every record has every modality.
    own = {id(p) for p in objective.decoupling.specific}
    assert shared.tolist() == [id(p) not in own for p in parameters]


def test_parts_of_a_batch_add_up_to_the_whole():
    merged = []
    for sizes in ([4], [3, 1], [1, 1, 1, 1]):
        net = unet(torch.float64)
        objective = Segmentation(net)
        gradients = ObjectiveGradients(net.parameters(), objective.decoupling)
        for rows in torch.arange(4).split(sizes):
            part = batch(dtype=torch.float64).rows(rows)
            gradients.backward(objective(StepOf(part)), len(rows) / 4)
        gradients.merge(torch.Generator().manual_seed(0))
        merged.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(merged[0], merged[1])
    torch.testing.assert_close(merged[0], merged[2])


def trained(tmp_path, name, precision="32-true", decouple=True, **schedule):
    net = unet()
    objective = Segmentation(net, decouple)
    train_stage(
        "net",
        objective,
        batch(6),
        torch.ones(6),
        Schedule(**{"epochs": 2, "batch_size": 4, "learning_rate": 0.01, **schedule}),
        seed=5,
        fabric=Fabric(accelerator="cpu", devices=1, precision=precision),
        checkpoint=tmp_path / f"{name}.safetensors",
        fingerprint="x",
        log=Log(tmp_path / f"{name}.csv"),
    )
    rows = (tmp_path / f"{name}.csv").read_text(encoding="utf-8").splitlines()[1:]
    losses = [float(row.split(",")[2]) for row in rows]
    return torch.cat([p.detach().flatten() for p in net.parameters()]), losses


def test_training_is_reproducible_and_learns(tmp_path):
    one, losses = trained(tmp_path, "one", epochs=5)
    two, _ = trained(tmp_path, "two", epochs=5)
    assert torch.equal(one, two)
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("decouple", [True, False])
def test_training_in_parts_of_a_batch_follows_training_by_whole_batches(tmp_path, decouple):
    _, whole = trained(tmp_path, "whole", decouple=decouple)
    _, parts = trained(tmp_path, "parts", decouple=decouple, parts=3)
    assert parts == pytest.approx(whole, rel=1e-4)


def test_training_in_mixed_precision_follows_full_precision(tmp_path):
    full, losses = trained(tmp_path, "full", epochs=3)
    mixed, mixed_losses = trained(tmp_path, "mixed", "bf16-mixed", epochs=3)
    assert mixed.dtype == torch.float32
    assert not torch.equal(full, mixed)
    assert mixed_losses == pytest.approx(losses, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "norm", "values"),
    [
        ({}, 5.0, None),
        ({"gradient": "sum"}, 5.0, None),
        ({"clip_gradients": 0.5}, 0.5, None),
        ({"clip_gradients": None}, None, None),
        ({"clip_values": 2}, None, 2.0),
        ({"gradient": "gmd"}, None, None),
        ({"gradient": "gmd", "clip_gradients": 3.0}, 3.0, None),
    ],
)
def test_what_a_recipe_clips(settings, norm, values):
    read = BackboneTraining(**settings)
    assert (read.clip_gradients, read.clip_values) == (norm, values)
    # A stored recipe is read back as what it was.
    assert BackboneTraining(**read.model_dump()) == read
    if "gradient" not in settings:
        assert Schedule(**settings).clip_gradients == norm


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_gradients": 5.0, "clip_values": 1.0}, "not both"),
        ({"gradient": "gmd", "clip_values": 1.0}, "would turn the gradient"),
        ({"clip_gradients": 0}, "greater than 0"),
        ({"clip_gradients": -1.0}, "greater than 0"),
        ({"clip_values": 0}, "greater than 0"),
        ({"clip_gradients": float("inf")}, "finite"),
        ({"clip_values": float("nan")}, "greater than 0|finite"),
    ],
)
def test_what_a_recipe_cannot_clip(settings, message):
    with pytest.raises(ValidationError, match=message):
        BackboneTraining(**settings)


@pytest.mark.parametrize(
    ("settings", "gradient", "expected"),
    [
        ({}, [3.0, -3.9], [3.0, -3.9]),  # shorter than 5
        ({}, [6.0, -8.0], [3.0, -4.0]),
        ({"clip_gradients": 0.5}, [3.0, -4.0], [0.3, -0.4]),
        ({"clip_gradients": None}, [3e8, -4e8], [3e8, -4e8]),
        ({"clip_values": 3.5}, [3.0, -4.0], [3.0, -3.5]),
        ({"clip_values": 10.0}, [3e8, -4.0], [10.0, -4.0]),
    ],
)
def test_the_law_of_clipping(settings, gradient, expected):
    weights = nn.Linear(2, 1, bias=False)
    fabric = Fabric(accelerator="cpu", devices=1)
    module, optimizer = fabric.setup(weights, torch.optim.SGD(weights.parameters(), 1.0))
    weights.weight.grad = torch.tensor([gradient])
    _clip(fabric, module, optimizer, Schedule(**settings), "backbone")
    torch.testing.assert_close(weights.weight.grad, torch.tensor([expected]), rtol=1e-6, atol=0)
    if expected == gradient:  # not only nearly: recipes that do not clip keep their bits
        assert torch.equal(weights.weight.grad, torch.tensor([gradient]))


@pytest.mark.parametrize("settings", [{}, {"clip_gradients": None}, {"clip_values": 1.0}])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_is_never_clipped_away(settings, bad):
    weights = nn.Linear(2, 1, bias=False)
    fabric = Fabric(accelerator="cpu", devices=1)
    module, optimizer = fabric.setup(weights, torch.optim.SGD(weights.parameters(), 1.0))
    weights.weight.grad = torch.tensor([[1.0, bad]])
    with pytest.raises(ConfigError, match="a gradient that is not finite"):
        _clip(fabric, module, optimizer, Schedule(**settings), "backbone")


def steps_of(tmp_path, name, decouple, **schedule):
    """Every gradient that reached the optimiser in one epoch, `(steps, P)`."""
    seen = []

    def look(optimizer, *_):
        found = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.append(torch.cat([g.flatten() for g in found]).clone())

    handle = register_optimizer_step_pre_hook(look)
    try:
        trained(tmp_path, name, decouple=decouple, epochs=1, **schedule)
    finally:
        handle.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("decouple", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_clipping_acts_once_on_the_whole_and_merged_gradient(tmp_path, decouple, parts):
    """The first step of two runs starts from the same weights: there only the length differs."""
    free = steps_of(tmp_path, "free", decouple, parts=parts, clip_gradients=None)
    bound = float(free[0].norm()) / 8
    clipped = steps_of(tmp_path, "clipped", decouple, parts=parts, clip_gradients=bound)
    torch.testing.assert_close(clipped[0], free[0] / 8, rtol=1e-4, atol=1e-9)
    assert all(float(step.norm()) <= bound * (1 + 1e-5) for step in clipped)
    # A bound that nothing reaches changes no bit.
    wide = steps_of(tmp_path, "wide", decouple, parts=parts, clip_gradients=1e6)
    assert torch.equal(wide, free)


def test_a_classifier_too_trains_no_other_modality_in_the_name_of_a_subset():
    """Of modality a alone: the gradient is that of the records that have it, by their share."""
    column = Column("x", "continuous", mean=0.0, std=1.0)
    specs = [ModalitySpec(n, "table", "ehr.csv", (1,), columns=(column,)) for n in "ab"]
    generator = torch.Generator().manual_seed(0)
    available = torch.tensor([[True, True], [False, True], [True, False], [False, True]])
    data = Batch(
        *(tuple("pqrs"), tuple("pqrs")),
        {n: torch.randn(4, 1, generator=generator) for n in "ab"},
        ModalityMask(("a", "b"), available),
        {n: available[:, m, None] for m, n in enumerate("ab")},
        torch.tensor([0, 1, 1, 0]),
    )
    kind = BACKBONES["transformer"]
    torch.manual_seed(0)
    network = kind(specs, 2, kind.Options(dim=8, heads=2, layers=1, projection=4, width=4))
    flats = []
    for rows in (torch.arange(4), torch.tensor([0, 2])):
        part = data.rows(rows)
        objective = FusionObjective(
            *(network, 2, BackboneTraining(gradient="gmd"), part, torch.ones(len(rows))),
            *(torch.device("cpu"), 0),
        )
        objective.begin_batch(generator)
        objective._drawn = torch.tensor([[True, False], [False, True], [True, True]])
        gradients = ObjectiveGradients(network.parameters(), objective.decoupling)
        gradients.backward(objective(MicroBatch(part, torch.ones(len(rows)), generator)))
        flats.append(gradients.flat[0] * len(rows))
    torch.testing.assert_close(*flats)
    assert bool(flats[0].any())


def test_gradients_are_added_in_a_fixed_order_whatever_the_threads(tmp_path, monkeypatch):
    """Two threads that add the gradients of gathered tokens race only now and then.

    So what is looked at is that torch was told to keep the order, in every backward pass.
    """
    told = []
    original = Fabric.backward

    def backward(*given, **named):
        told.append(torch.are_deterministic_algorithms_enabled())
        original(*given, **named)

    monkeypatch.setattr(Fabric, "backward", backward)
    trained(tmp_path, "plain", decouple=False)
    assert told and all(told)
    assert not torch.are_deterministic_algorithms_enabled()
