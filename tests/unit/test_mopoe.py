"""Closed forms of the VAE's parts, and the latent map."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dymo_med.imputers.mmvae_plus import MMVAEPlus
from dymo_med.imputers.mopoe import (
    MoPoE,
    kl_to_standard_normal,
    product_of_experts,
    random_subsets,
)
from dymo_med.types import Batch, Column, ModalityMask, ModalitySpec


def test_product_of_gaussian_experts_and_the_prior():
    torch.manual_seed(0)
    mean, log_variance = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 5).double()
    available = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    got_mean, got_log = product_of_experts(mean, log_variance, available)
    for b in range(4):
        precision = sum(
            ((-log_variance[m, b]).exp() for m in range(3) if available[b, m]),
            torch.ones(5).double(),
        )
        weighted = sum(
            (mean[m, b] * (-log_variance[m, b]).exp() for m in range(3) if available[b, m]),
            torch.zeros(5).double(),
        )
        torch.testing.assert_close(got_log[b].exp(), 1 / precision)
        torch.testing.assert_close(got_mean[b], weighted / precision)
    assert torch.equal(got_mean[3], torch.zeros(5).double())
    assert torch.equal(got_log[3], torch.zeros(5).double())


def test_an_unavailable_expert_may_hold_anything():
    mean, log_variance = torch.zeros(2, 1, 3), torch.zeros(2, 1, 3)
    mean[1] = torch.nan
    available = torch.tensor([[True, False]])
    assert product_of_experts(mean, log_variance, available)[0].isfinite().all()


def test_kl_against_the_library():
    torch.manual_seed(1)
    mean, log_variance = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    q = Normal(mean, (0.5 * log_variance).exp())
    expected = kl_divergence(q, Normal(torch.zeros(3).double(), torch.ones(3).double())).sum(-1)
    torch.testing.assert_close(kl_to_standard_normal(mean, log_variance), expected)


def test_random_subsets_are_uniform_and_inside():
    available = torch.tensor([[True, True, False, True]]).expand(7000, 4)
    drawn = random_subsets(available, torch.Generator().manual_seed(0))
    assert not bool((drawn & ~available).any())
    ids, counts = (drawn.long() * torch.tensor([1, 2, 0, 4])).sum(1).unique(return_counts=True)
    assert ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    # 1000 expected of each; 5 standard deviations are 150.
    assert bool(((counts - 1000).abs() < 150).all())


SPECS = (
    ModalitySpec("a", "image", "a.nii.gz", (1, 16, 16, 16), (1.0,) * 3, "zscore"),
    ModalitySpec("b", "image", "b.nii.gz", (1, 16, 16, 16), (1.0,) * 3, "zscore"),
    ModalitySpec(
        "t", "table", "t.csv", (1,), columns=(Column("x", "continuous", mean=0.0, std=1.0),)
    ),
)


def blobs(n, seed):
    """Two sequences that show one bright blob at a random place, and its size in a table."""
    g = torch.Generator().manual_seed(seed)
    axis = torch.arange(16.0)
    centre = torch.randint(4, 12, (n, 3), generator=g).float()
    squared = sum(
        (axis.view([-1 if a == k else 1 for k in range(3)]) - centre[:, a].view(-1, 1, 1, 1)) ** 2
        for a in range(3)
    )
    shape = (-squared / 8).exp().unsqueeze(1)
    noise = 0.1 * torch.randn(2, n, 1, 16, 16, 16, generator=g)
    values = {"a": shape + noise[0], "b": -shape + noise[1], "t": torch.zeros(n, 1)}
    ids = tuple(map(str, range(n)))
    mask = ModalityMask(("a", "b", "t"), torch.ones(n, 3, dtype=torch.bool))
    fields = {"t": torch.ones(n, 1, dtype=torch.bool)}
    return Batch(ids, ids, values, mask, fields, torch.zeros(n, dtype=torch.long))


@pytest.mark.parametrize("kind", [MoPoE, MMVAEPlus])
def test_a_recovered_scan_has_its_lesion_where_the_other_scan_shows_it(kind):
    torch.manual_seed(0)
    options = kind.Options(latent=4, dim=16, width=8, map_channels=4, grid=2, beta=0.01)
    imputer = kind(SPECS, options)
    assert imputer.grid == (4, 4, 4)
    data = blobs(128, 0)
    imputer.start_from(data)
    optimizer = torch.optim.Adam(imputer.parameters(), 0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(15):
        for start in range(0, 128, 16):
            loss = imputer.loss(data.rows(torch.arange(start, start + 16)), generator).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    test = blobs(20, 1)
    truth = test.values["b"].clone()
    test.observed.available[:, 1] = False
    test.values["b"].zero_()
    recovered = imputer.recover(test).values["b"]
    place = torch.stack(torch.unravel_index(recovered.flatten(1).argmin(1), (16, 16, 16)), 1)
    real = torch.stack(torch.unravel_index(truth.flatten(1).argmin(1), (16, 16, 16)), 1)
    distance = (place - real).float().norm(dim=1)
    mean_image = imputer.decoders["b"].mean_image
    blind = torch.stack(torch.unravel_index(mean_image.argmin(), (16, 16, 16))).float()
    assert float(distance.median()) < 2.5
    assert float(distance.median()) < 0.6 * float((real - blind).norm(dim=1).median())
