"""The dynamic-sharing U-Net: what is shared, what is the modality's own, and the mean of logits."""

import pytest
import torch

from dymo_med.backbones.shared_unet import SharedUNet
from dymo_med.types import ModalitySpec


def specs(names="abcd", shape=(1, 16, 16, 16)):
    return [
        ModalitySpec(n, "image", f"{n}.nii.gz", shape, (4.0,) * (len(shape) - 1)) for n in names
    ]


def network(names="abcd", shape=(1, 8, 8, 8), regions=3, seed=0):
    torch.manual_seed(seed)
    options = SharedUNet.Options(widths=[8, 16, 32], width_ratio=0.5)
    return SharedUNet(specs(names, shape), regions, options).double()


def images(names="abcd", batch=3, spatial=(8, 8, 8), seed=1):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(batch, 1, *spatial, generator=g, dtype=torch.float64) for n in names}


@pytest.mark.parametrize(
    ("ratio", "shared", "own"), [(0.5, 3_236_403, 8_832), (1.0, 12_942_435, 17_664)]
)
def test_it_has_as_many_parameters_as_the_published_one(ratio, shared, own):
    with torch.device("meta"):
        net = SharedUNet(specs(), 3, SharedUNet.Options(width_ratio=ratio))
    specific = {id(p) for m in net.specific_modules() for p in m.parameters()}
    counts = {True: 0, False: 0}
    for p in net.parameters():
        counts[id(p) in specific] += p.numel()
    assert counts == {False: shared, True: own}


@pytest.mark.parametrize("names", ["a", "ab", "abcdefg"])
@pytest.mark.parametrize("spatial", [(8, 8, 8), (7, 9, 10), (8, 11)])
def test_any_number_of_modalities_and_any_size(names, spatial):
    net = network(names, (1, *spatial))
    out = net.per_modality(images(names, spatial=spatial))
    assert out.logits.shape == (3, len(names), 3, *spatial)
    assert out.embedding.shape == (3, len(names), net.embedding_size)
    assert torch.isfinite(out.logits).all()


def test_a_modality_reaches_all_convolutions_and_its_own_norms_alone():
    net, x = network(), images()
    net.run("b", x["b"]).logits.square().sum().backward()
    specific = {id(p) for m in net.specific_modules() for p in m.parameters()}
    for name, p in net.named_parameters():
        assert (p.grad is not None) == (id(p) not in specific or ".norms.b." in name), name


def test_norms_are_switched_by_modality():
    net, x = network(), images()
    before = {n: net.run(n, x["a"]).logits for n in "ab"}
    assert torch.equal(before["a"], before["b"])  # freshly made, all norms are alike
    with torch.no_grad():
        for module in net.specific_modules():
            for p in module["b"].parameters():
                p.add_(0.5)
    assert torch.equal(net.run("a", x["a"]).logits, before["a"])
    assert not torch.allclose(net.run("b", x["a"]).logits, before["b"])


def test_only_rows_that_have_a_modality_are_run_and_others_change_nothing():
    net, x = network(), images()
    available = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]]).bool()
    out = net.per_modality(x, available)
    assert torch.equal(out.logits.flatten(2).isnan().all(2), ~available)
    assert torch.equal(out.embedding.isnan().all(2), ~available)
    fused = net.combine(out.logits, available)
    for row in range(3):
        names = [n for n, has in zip("abcd", available[row], strict=True) if has]
        alone = torch.stack([net.run(n, x[n][row : row + 1]).logits[0] for n in names])
        torch.testing.assert_close(fused[row], alone.mean(0))
    # An absent entry is the same as one that no row has, and its values do not matter.
    fewer = {n: x[n] * (1 if n != "b" else torch.nan) for n in "acd"}
    again = net.per_modality(fewer, available)
    torch.testing.assert_close(again.logits, out.logits, equal_nan=True)


def test_gradients_of_a_mean_are_finite_and_reach_its_modalities_alone():
    net, x = network(), images()
    available = torch.tensor([[1, 0, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0]]).bool()
    parts = [None if o is None else o.logits for o in net.outputs(x, available)]
    subset = available & torch.tensor([True, False, True, False])
    net.combine(parts, subset).square().sum().backward()
    for name, p in net.named_parameters():
        foreign = ".norms.b." in name or ".norms.d." in name
        assert (p.grad is None) if foreign else bool(torch.isfinite(p.grad).all()), name


def test_what_cannot_be_combined_is_refused():
    net, x = network(), images()
    logits = net.per_modality({"a": x["a"]}).logits
    nobody = torch.zeros(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one modality"):
        net.combine(logits, nobody)
    with pytest.raises(ValueError, match="at least one modality"):
        net.per_modality({})
    with pytest.raises(ValueError, match="available but has no logits"):
        net.combine([logits[:, 0], None, None, None], ~nobody)
    one_row_has_none = torch.tensor([[True], [False], [True]]) & torch.tensor([1, 0, 0, 0]).bool()
    assert net.combine(logits, one_row_has_none).isnan().flatten(1).all(1).tolist() == [0, 1, 0]


def test_modalities_that_cannot_share_a_trunk_are_refused():
    colour = ModalitySpec("c", "image", "c.png", (3, 8, 8))
    table = ModalitySpec("t", "table", "ehr.csv", (4,))
    for wrong in (colour, table):
        with pytest.raises(ValueError, match="image of one channel"):
            SharedUNet([wrong], 1, SharedUNet.Options())
    flat, deep = specs("a", (1, 8, 8)), specs("b")
    with pytest.raises(ValueError, match="equally many axes"):
        SharedUNet([*flat, *deep], 1, SharedUNet.Options())


def test_thick_slices_are_not_mixed_until_voxels_are_even():
    torch.manual_seed(0)
    thick = [ModalitySpec("a", "image", "a.nii.gz", (1, 16, 16, 6), (1.0, 1.0, 3.0))]
    options = {"widths": [8, 16, 32], "width_ratio": 0.5}
    flat = SharedUNet(thick, 1, SharedUNet.Options(**options, anisotropic=True))
    kernels = [tuple(level.convs[0].conv.kernel_size) for level in flat.down]
    assert kernels == [(3, 3, 1), (3, 3, 3), (3, 3, 3)]
    assert [tuple(pool.kernel_size) for pool in flat.pools] == [(2, 2, 1), (2, 2, 2)]
    assert flat.run("a", torch.randn(2, 1, 16, 16, 6)).logits.shape == (2, 1, 16, 16, 6)
    # On even voxels it is the same network, to the bit.
    even = [ModalitySpec("a", "image", "a.nii.gz", (1, 8, 8, 8), (2.0, 2.0, 2.0))]
    nets = []
    for anisotropic in (False, True):
        torch.manual_seed(1)
        nets.append(SharedUNet(even, 1, SharedUNet.Options(**options, anisotropic=anisotropic)))
    x = torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(nets[0].run("a", x).logits, nets[1].run("a", x).logits)
