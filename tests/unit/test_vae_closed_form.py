"""The multimodal VAEs against formulas, Monte Carlo and a problem whose answer is known."""

from dataclasses import replace
from math import log, sqrt

import pytest
import torch
from torch import nn
from torch.distributions import (
    Categorical,
    Independent,
    Laplace,
    MixtureSameFamily,
    Normal,
    kl_divergence,
)

from dymo_med.imputers import IMPUTERS
from dymo_med.imputers.mmvae_plus import draw_laplace, log_laplace, random_few
from dymo_med.imputers.mopoe import MoPoE, kl_to_standard_normal
from dymo_med.inference.quality import within_interval
from dymo_med.types import Batch, Column, ModalityMask, ModalitySpec

VAES = ("mopoe", "mmvae_plus", "cmvae")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def tables(columns, names="abc", std=1.0):
    """Specs of tables with so many continuous columns each."""
    spread = torch.as_tensor(std).expand(len(names), columns)
    return tuple(
        ModalitySpec(
            name,
            "table",
            f"{name}.csv",
            (columns,),
            columns=tuple(
                Column(f"{name}{i}", "continuous", mean=0.0, std=float(spread[m, i]))
                for i in range(columns)
            ),
        )
        for m, name in enumerate(names)
    )


def as_batch(x, available, names="abc"):
    """A batch of tables from `(M, B, F)`; what is not available holds NaN-free nonsense."""
    ids = tuple(map(str, range(len(available))))
    values = {n: x[m].where(available[:, m, None], 123.0) for m, n in enumerate(names)}
    fields = {n: available[:, m, None].expand(x.shape[1:]).clone() for m, n in enumerate(names)}
    labels = torch.zeros(len(available), dtype=torch.long)
    return Batch(ids, ids, values, ModalityMask(tuple(names), available), fields, labels)


WITH_MAP = (
    ModalitySpec("front", "image", "front.png", (1, 8, 8), (), "zscore"),
    ModalitySpec("side", "image", "side.png", (1, 8, 8), (), "zscore"),
    *tables(2, "t"),
)


def with_map(n, has=None):
    """A batch of two images on one grid and a table."""
    g = seeded(0)
    values = {
        "front": torch.randn(n, 1, 8, 8, generator=g, dtype=torch.float64),
        "side": torch.randn(n, 1, 8, 8, generator=g, dtype=torch.float64),
        "t": torch.randn(n, 2, generator=g, dtype=torch.float64),
    }
    available = torch.ones(n, 3, dtype=torch.bool) if has is None else torch.tensor(has).bool()
    fields = {"t": available[:, 2:].expand(-1, 2).clone()}
    ids = tuple(map(str, range(n)))
    labels = torch.zeros(n, dtype=torch.long)
    return Batch(ids, ids, values, ModalityMask(tuple(values), available), fields, labels)


def repeated(batch, times):
    return batch.rows(torch.zeros(times, dtype=torch.long))


def regularisation(model, batch, seed=0):
    """Draws `(B,)` of what beta weights: minus the log ratio of prior to posterior."""
    model.beta = 1.0
    whole = model.loss(batch, seeded(seed))
    model.beta = 0.0
    return (whole - model.loss(batch, seeded(seed))).detach() * model.elements


def assert_near(draws, expected):
    """The mean of the draws is the expected number within 5 standard errors."""
    error = float(draws.std() / sqrt(len(draws)))
    assert abs(float(draws.mean()) - float(expected)) < 5 * error
    # Otherwise the test says nothing.
    assert error < 0.02 * abs(float(expected))


def small(kind, specs, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"latent": 2, "dim": 8, "hidden": 8, "width": 4, "grid": 2, "table_weight": 1.0}
    sizes |= {"hide_cells": 0.0}
    model = IMPUTERS[kind](specs, IMPUTERS[kind].Options(**{**sizes, **options})).double()
    # Away from the start, where every posterior has the same spread and hardly depends on x.
    with torch.no_grad():
        for expert in model.experts.values():
            for head in (expert.head, expert.map_head):
                if head is not None:
                    head.weight.mul_(3)
                    head.bias.normal_()
    return model


# -- densities -----------------------------------------------------------------------------------


def test_laplace_density_against_the_library():
    x, mean, log_variance = torch.randn(3, 5, 4, generator=seeded(0), dtype=torch.float64)
    expected = Laplace(mean, (log_variance.exp() / 2).sqrt()).log_prob(x).sum(-1)
    torch.testing.assert_close(log_laplace(x, mean, log_variance), expected)


def test_laplace_draws_follow_the_distribution():
    n = 200_000
    mean = torch.full((n,), 1.5, dtype=torch.float64)
    log_variance = torch.full((n,), log(0.3), dtype=torch.float64)
    drawn = draw_laplace(mean, log_variance, seeded(0))
    share = Laplace(1.5, sqrt(0.3 / 2)).cdf(drawn).sort().values
    # Kolmogorov-Smirnov: a distance above 2 / sqrt(n) has a probability of 0.0007.
    uniform = (torch.arange(n) + 0.5) / n
    assert float((share - uniform).abs().max()) < 2 / sqrt(n)


def test_laplace_draws_are_finite_where_the_generator_yields_zero():
    seed = 12  # found by trying
    assert bool((torch.rand(2**20, generator=seeded(seed)) == 0).any())
    zero = torch.zeros(2**20)
    assert bool(draw_laplace(zero, zero, seeded(seed)).isfinite().all())


def test_prior_of_clusters_against_the_library_and_the_published_form():
    model = small("cmvae", tables(1), latent=3, clusters=5)
    with torch.no_grad():
        model.cluster_logits.normal_()
    u = 2 * torch.randn(50, 3, generator=seeded(1), dtype=torch.float64)
    got = model.log_prior(u)
    scale = torch.full((5, 3), sqrt(0.5), dtype=torch.float64)
    clusters = Independent(Laplace(model.cluster_means, scale), 1)
    weights = Categorical(logits=model.cluster_logits)
    torch.testing.assert_close(got, MixtureSameFamily(weights, clusters).log_prob(u))
    # E_q(c|u) [log pi_c + log p(u|c) - log q(c|u)] with the exact posterior q(c|u).
    joint = model.cluster_logits.log_softmax(0) + clusters.log_prob(u[:, None])
    q = joint.softmax(1)
    torch.testing.assert_close(got, (q * (joint - q.log())).sum(1))
    assert bool(model.log_prior(torch.full((1, 3), 1e4, dtype=torch.float64)).isfinite())


# -- what beta weights ---------------------------------------------------------------------------


def test_one_modality_pays_the_kl_of_laplace_distributions():
    model = small("mmvae_plus", tables(2, "a"), private=3)
    x = torch.tensor([[[0.7, -1.2]]], dtype=torch.float64)
    batch = as_batch(x, torch.ones(1, 1, dtype=torch.bool), "a")
    mean, log_variance = model.encode(batch, batch.observed.available)
    posterior = Laplace(mean[0, 0], (log_variance[0, 0].exp() / 2).sqrt())
    prior = Laplace(torch.zeros(5).double(), torch.full((5,), sqrt(0.5)).double())
    expected = kl_divergence(posterior, prior).sum()
    assert_near(regularisation(model, repeated(batch, 60_000)), expected.detach())


def mixture_kl(model, batch, n=60_000):
    """The same of one record by the library.

    The mean over encoders m of E_m[log 1/M sum_j q_j(u) - log p(u)] + KL(q_m(w) || p(w)). u has a
    map where m is an image; then a table j stands for the map's prior.
    """
    available = batch.observed.available[:1]
    mean, log_variance = (t[:, 0].detach() for t in model.encode(batch, available))
    scale = (log_variance.exp() / 2).sqrt()
    shared, private = slice(model.shared), slice(model.shared, model.vector)
    cells = slice(model.vector, None)

    def posterior(m, part):
        return Independent(Laplace(mean[m, part], scale[m, part]), 1)

    def prior(part):
        zero = torch.zeros_like(mean[0, part])
        return Independent(Laplace(zero, zero + sqrt(0.5)), 1)

    torch.manual_seed(1)
    observed = available[0].nonzero().squeeze(1).tolist()
    total = torch.zeros((), dtype=torch.float64)
    for m in observed:
        u, z_map = (posterior(m, part).sample((n,)) for part in (shared, cells))
        each = []
        for j in observed:
            each.append(posterior(j, shared).log_prob(u))
            if model.has_map[m]:
                q = posterior(j, cells) if model.has_map[j] else prior(cells)
                each[-1] = each[-1] + q.log_prob(z_map)
        log_prior = model.log_prior(u).detach()
        if model.has_map[m]:
            log_prior = log_prior + prior(cells).log_prob(z_map)
        total += (torch.stack(each).logsumexp(0) - log(len(each)) - log_prior).mean()
        total += kl_divergence(posterior(m, private).base_dist, prior(private).base_dist).sum()
    return total / len(observed)


@pytest.mark.parametrize("kind", ["mmvae_plus", "cmvae"])
@pytest.mark.parametrize("has", [(1, 1, 1), (1, 0, 1), (0, 1, 0)])
def test_several_modalities_pay_for_the_mixture_over_those_observed(kind, has):
    model = small(kind, tables(2), private=2)
    x = torch.randn(3, 1, 2, generator=seeded(3), dtype=torch.float64)
    batch = as_batch(x, torch.tensor([has], dtype=torch.bool))
    assert_near(regularisation(model, repeated(batch, 60_000)), mixture_kl(model, batch))


def test_only_images_pay_for_the_latent_map():
    model = small("mmvae_plus", WITH_MAP, private=2, map_channels=1, stride=4)
    assert model.grid == (2, 2)
    with torch.no_grad():
        for expert in model.experts.values():
            expert.head.bias[expert.head.out_features // 2 :] = 0
    batch = with_map(1)
    assert_near(regularisation(model, repeated(batch, 20_000)), mixture_kl(model, batch))


def test_mopoe_pays_the_mean_kl_over_subsets():
    model = small("mopoe", tables(2))
    x = torch.randn(3, 1, 2, generator=seeded(3), dtype=torch.float64)
    batch = as_batch(x, torch.ones(1, 3, dtype=torch.bool))
    posteriors = [model.posterior(batch, subset) for subset in subsets(3)]
    mean_kl = torch.stack([kl_to_standard_normal(*p)[0] for p in posteriors]).mean().detach()
    assert_near(regularisation(model, repeated(batch, 20_000)), mean_kl)
    # The mixture's own KL is smaller, by less than the entropy of the choice of a component.
    mean, log_variance = (torch.cat(t).detach() for t in zip(*posteriors, strict=True))
    parts = Independent(Normal(mean, (0.5 * log_variance).exp()), 1)
    mixture = MixtureSameFamily(Categorical(torch.ones(7, dtype=torch.float64)), parts)
    torch.manual_seed(0)
    z = mixture.sample((200_000,))
    zero = torch.zeros(2, dtype=torch.float64)
    kl = (mixture.log_prob(z) - Independent(Normal(zero, zero + 1), 1).log_prob(z)).mean()
    assert mean_kl - log(7) < kl < mean_kl


def test_many_samples_reach_the_log_likelihood():
    """u, w and x are one number each, so p(x) is an integral over a plane."""
    model = small("mmvae_plus", tables(1, "a"), latent=1, private=1)
    with torch.no_grad():
        # Away from zero, so that x depends on both; and a posterior wider than the prior, so that
        # a thousand draws are many.
        model.decoders["a"].net[0].weight.fill_(1.0)
        model.experts["a"].head.weight.zero_()
        model.experts["a"].head.bias.copy_(torch.tensor([0.3, -0.3, 0.5, 0.5]))
    x = torch.tensor([[[0.4]]], dtype=torch.float64)
    batch = as_batch(x, torch.ones(1, 1, dtype=torch.bool), "a")
    axis = torch.linspace(-14, 14, 1201, dtype=torch.float64)
    plane = torch.cartesian_prod(axis, axis)
    prior = Laplace(torch.tensor(0.0).double(), torch.tensor(sqrt(0.5)).double())
    rows = torch.zeros(len(plane), dtype=torch.long)
    with torch.no_grad():
        density = model.log_likelihood("a", plane, batch, rows) + prior.log_prob(plane).sum(1)
        exact = float(density.logsumexp(0) + 2 * (axis[1] - axis[0]).log())
        bounds = []
        for samples in (1, 8, 1000):
            model.samples = samples
            loss = model.loss(repeated(batch, 40_000 // samples), seeded(0))
            bounds.append(-float(loss.mean()) * model.elements)
    assert bounds[0] < bounds[1] < exact + 0.01
    assert abs(bounds[2] - exact) < 0.01
    assert exact - bounds[0] > 0.05  # so that the bound had something to gain


# -- posteriors and recoveries -------------------------------------------------------------------


def subsets(modalities):
    """All non-empty subsets, each as bool `(1, M)`."""
    ids = torch.arange(1, 2**modalities)
    return ((ids[:, None] >> torch.arange(modalities)) & 1).bool()[:, None]


class LinearGaussian:
    """x_m = A_m z + noise, z and noise standard normal (noise times `sd`)."""

    def __init__(self, modalities=3, columns=4, latent=2, sd=0.5, orthogonal=False):
        self.a = torch.randn(modalities, columns, latent, generator=seeded(5), dtype=torch.float64)
        if orthogonal:  # then the expert of a modality is a product over latents
            self.a = 2 * torch.linalg.qr(self.a).Q
        self.sd = sd
        self.std = (self.a.square().sum(-1) + sd**2).sqrt()

    def sample(self, n, seed):
        g = seeded(seed)
        z = torch.randn(n, self.a.shape[2], generator=g, dtype=torch.float64)
        noise = torch.randn(len(self.a), n, self.a.shape[1], generator=g, dtype=torch.float64)
        return torch.einsum("mfl,nl->mnf", self.a, z) + self.sd * noise

    def posterior(self, x, available):
        """Mean `(n, L)` and covariance `(n, L, L)` of z given what is available."""
        weight = available.double() / self.sd**2
        precision = torch.einsum("nm,mfl,mfk->nlk", weight, self.a, self.a)
        covariance = (precision + torch.eye(self.a.shape[2]).double()).inverse()
        return torch.einsum("nlk,nm,mfk,mnf->nl", covariance, weight, self.a, x), covariance

    def mean_given_cells(self, x, filled):
        """E[x_m | the filled cells `(M, n, F)`] `(M, n, F)`."""
        weight = filled.double() / self.sd**2
        precision = torch.einsum("mnf,mfl,mfk->nlk", weight, self.a, self.a)
        covariance = (precision + torch.eye(self.a.shape[2]).double()).inverse()
        z = torch.einsum("nlk,mnf,mfk,mnf->nl", covariance, weight, self.a, x)
        return torch.einsum("mfl,nl->mnf", self.a, z)

    def conditional_mean(self, x, available):
        """E[x_m | what is available] `(M, n, F)`."""
        return torch.einsum("mfl,nl->mnf", self.a, self.posterior(x, available)[0])


class ExactExpert(nn.Module):
    """What one modality says of z, with the prior divided out: N(z) proportional to p(x_m | z)."""

    def __init__(self, problem, m):
        super().__init__()
        self.a, self.sd = nn.Parameter(problem.a[m]), problem.sd

    def forward(self, values, observed_fields):
        precision = self.a.square().sum(0) / self.sd**2
        mean = values @ self.a / self.sd**2 / precision
        return mean, -precision.log().expand_as(mean), None, None


class ExactDecoder(nn.Module):
    """Mean and log spread of each column in standardised units."""

    def __init__(self, problem, m):
        super().__init__()
        self.a, self.sd, self.std = problem.a[m], problem.sd, problem.std[m]

    def forward(self, z, z_map=None):
        mean = z[:, : self.a.shape[1]] @ self.a.T / self.std
        return torch.stack([mean, (self.sd / self.std).log().expand_as(mean)], 2).flatten(1)


def test_mopoe_with_exact_parts_gives_the_exact_posteriors_and_conditional_means():
    problem = LinearGaussian(orthogonal=True)
    model = MoPoE(tables(4, std=problem.std), MoPoE.Options(latent=2)).double()
    for m, name in enumerate("abc"):
        model.experts[name] = ExactExpert(problem, m)
        model.decoders[name] = ExactDecoder(problem, m)
    available = subsets(3)[:, 0]
    x = problem.sample(7, 0)
    batch = as_batch(x, available)
    mean, covariance = problem.posterior(x, available)
    got_mean, got_log_variance = model.posterior(batch, available)
    torch.testing.assert_close(got_mean, mean)
    torch.testing.assert_close(torch.diag_embed(got_log_variance.exp()), covariance)
    recovered = model.recover(batch).values
    for m, name in enumerate("abc"):
        torch.testing.assert_close(
            recovered[name][~available[:, m]],
            problem.conditional_mean(x, available)[m][~available[:, m]],
            atol=1e-5,  # a table's standard deviations are single precision
            rtol=0,
        )


class Says(nn.Module):
    """An expert that says the same of every patient, and is sure of it."""

    def __init__(self, *mean):
        super().__init__()
        self.mean = torch.tensor(mean, dtype=torch.float64)

    def forward(self, values, observed_fields):
        mean = self.mean.expand(len(values), -1)
        return mean, torch.full_like(mean, -30), None, None


class Repeats(nn.Module):
    """A decoder whose column means are the latents themselves."""

    def forward(self, z, z_map=None):
        return torch.stack([z, torch.zeros_like(z)], 2).flatten(1)


@pytest.fixture
def transparent():
    """An MMVAE+ with two shared and one private latent, each shown as a column."""
    model = small("mmvae_plus", tables(3), private=1)
    for name, u in {"a": 1.0, "b": -1.0, "c": 7.0}.items():
        model.experts[name] = Says(u, 2 * u, 10 + u)
        model.decoders[name] = Repeats()
    with torch.no_grad():
        model.auxiliary.fill_(log(4.0))
    return model


def test_recovery_decodes_the_mean_of_u_and_the_mean_of_w(transparent):
    x = torch.full((3, 3, 3), 50.0, dtype=torch.float64)
    available = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 0]]).bool()
    batch = as_batch(x, available)
    batch.observed_fields["c"][1] = torch.tensor([False, True, False])  # partly filled
    recovered = transparent.recover(batch).values
    # u is the mean over what is observed, w is 0 ...
    torch.testing.assert_close(recovered["c"][0], torch.tensor([0.0, 0.0, 0.0]).double())
    torch.testing.assert_close(recovered["c"][2], torch.tensor([-1.0, -2.0, 0.0]).double())
    torch.testing.assert_close(recovered["b"][1], torch.tensor([4.0, 8.0, 0.0]).double())
    # ... but a partly filled table's blanks have its own w, and what was filled stays.
    torch.testing.assert_close(recovered["c"][1], torch.tensor([4.0, 50.0, 17.0]).double())


def test_draws_take_u_from_one_modality_at_random_and_w_from_its_auxiliary(transparent):
    available = torch.tensor([[True, True, False]]).expand(4000, 3)
    batch = as_batch(torch.zeros(3, 4000, 3, dtype=torch.float64), available)
    # What a cell is drawn around; its own noise comes on top.
    found = transparent.likelihoods(batch, ["c"], seeded(0))["c"].detach()
    drawn = transparent.modalities["c"].mean(found)
    from_a = drawn[:, 0] > 0
    torch.testing.assert_close(drawn[:, 0].abs(), torch.ones(4000).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(drawn[:, 1], 2 * drawn[:, 0], atol=1e-4, rtol=0)
    # 5 standard errors: sqrt(1/4 / n), and sqrt((kurtosis 6 - 1) / n) of the variance.
    assert abs(float(from_a.double().mean()) - 0.5) < 5 * 0.5 / sqrt(4000)
    assert abs(float(drawn[:, 2].var()) / 4 - 1) < 5 * sqrt(5 / 4000)


def test_a_step_may_let_a_few_modalities_encode(transparent):
    transparent.beta = 0.0
    with torch.no_grad():
        transparent.auxiliary.fill_(-30)
    x = torch.zeros(3, 300, 3, dtype=torch.float64)
    batch = as_batch(x, torch.ones(300, 3, dtype=torch.bool))
    transparent.encoders = 3
    every = transparent.loss(batch, seeded(0)).detach()
    transparent.encoders = 1
    one = transparent.loss(batch, seeded(0)).detach()
    torch.testing.assert_close(every, every[:1].expand(300), atol=1e-3, rtol=0)
    values = one.round(decimals=2).unique()
    assert len(values) == 3
    torch.testing.assert_close(values.mean(), every[0], atol=0.01, rtol=0)


def test_a_random_few_are_uniform_and_inside():
    available = torch.tensor([[True, True, False, True]]).expand(6000, 4)
    drawn = random_few(available, 2, seeded(0))
    ids, counts = (drawn.long() * torch.tensor([1, 2, 4, 8])).sum(1).unique(return_counts=True)
    assert ids.tolist() == [3, 9, 10]
    # 2000 expected of each; 5 standard deviations are 183.
    assert bool(((counts - 2000).abs() < 183).all())
    few = torch.tensor([[False, True, False, False], [False, False, False, False]])
    assert torch.equal(random_few(few, 2, seeded(0)), few)


@pytest.mark.parametrize("kind", VAES)
def test_a_table_weighs_what_the_recipe_says(kind):
    batch = with_map(3, [[0, 0, 1]] * 3)
    losses = []
    for weight in (1.0, 20.0):
        model = small(kind, WITH_MAP, beta=0.0, table_weight=weight, map_channels=1)
        assert model.elements == 2 * 64 + 2 * weight
        losses.append(model.loss(batch, seeded(0)).detach() * model.elements)
    torch.testing.assert_close(losses[1], 20 * losses[0])


def test_a_table_says_nothing_about_the_map_of_a_product():
    model = small("mopoe", WITH_MAP, map_channels=2, stride=4)
    batch = with_map(2)
    given = torch.tensor([[True, False, True], [True, False, False]])
    for part in model.posterior(batch.rows(torch.tensor([0, 0])), given):
        torch.testing.assert_close(part[0, model.vector :], part[1, model.vector :])


@pytest.mark.parametrize("kind", VAES)
def test_the_latent_map_comes_from_the_observed_images_alone(kind):
    model = small(kind, WITH_MAP, map_channels=2, stride=4).eval()
    batch = with_map(4, [[1, 0, 1], [0, 0, 1], [0, 1, 0], [1, 0, 0]])
    noise = {n: v.clone() for n, v in batch.values.items()}
    noise["side"][[0, 1, 3]] = 9.0
    noise["front"][1:3] = -9.0
    noise["t"][2:] = 3.0
    one = model.recover(batch, draws=2)
    two = model.recover(replace(batch, values=noise), draws=2)
    missing = ~batch.observed.available
    for m, name in enumerate(batch.observed.names):
        rows = missing[:, m]
        assert torch.equal(one.values[name][rows], two.values[name][rows])
        assert torch.equal(one.draws[name][:, rows], two.draws[name][:, rows])
    for i in range(4):
        alone = model.recover(batch.rows(torch.tensor([i]))).values
        for name in batch.observed.names:
            torch.testing.assert_close(alone[name][0], one.values[name][i], atol=1e-10, rtol=0)
    mean, log_variance = model.encode(batch, batch.observed.available)
    assert not bool(mean[2, :, model.vector :].any() | log_variance[2, :, model.vector :].any())


def test_the_map_comes_from_an_observed_image_if_there_is_one():
    model = small("mmvae_plus", WITH_MAP, map_channels=2, stride=4)
    with torch.no_grad():
        for expert in model.experts.values():
            for head in (expert.head, expert.map_head):
                if head is not None:  # as sure as can be: a standard deviation of 0.007
                    head.weight[head.out_features // 2 :] = 0
                    head.bias[head.out_features // 2 :] = -10
        model.auxiliary.fill_(-10)
        model.auxiliary_map.fill_(-10)
    batch = with_map(2, [[1, 0, 1], [0, 0, 1]])
    draws = model.recover(batch, draws=20).draws["side"].detach()
    mean, _ = model.encode(batch, batch.observed.available)
    mean[:, :, model.shared : model.vector] = 0  # w of a missing modality

    def side(u_from, map_from):
        z = torch.cat([mean[u_from, :, : model.vector], mean[map_from, :, model.vector :]], 1)
        return model.decode("side", z).detach()

    def distance(draw, row, *sources):
        return float((draw[row] - side(*sources)[row]).abs().max())

    recovered = model.recover(batch).values["side"]
    mean_u = torch.cat([mean[[0, 2], 0, : model.vector].mean(0), mean[0, 0, model.vector :]])
    torch.testing.assert_close(recovered[0], model.decode("side", mean_u[None])[0])
    front, table = 0, 2
    assert distance(side(front, table), 0, front, front) > 0.5  # the map matters
    for draw in draws:
        assert min(distance(draw, 0, source, front) for source in (front, table)) < 0.1
        assert distance(draw, 1, table, table) < 0.1  # nobody knows the map: its mean, 0


@pytest.mark.parametrize("kind", VAES)
def test_a_training_step_with_a_map_reaches_every_parameter(kind):
    model = small(kind, WITH_MAP, map_channels=2, stride=4)
    model.loss(
        with_map(4, [[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 1]]), seeded(0)
    ).sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The learned token of a blank cell stands for it but is, on purpose, never evidence.
    assert without == ["experts.t.encoder.blank"]


def train(model, data, g, learning_rate, steps=400):
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = model.loss(data.rows(torch.randint(len(data), (128,), generator=g)), g).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("kind", VAES)
def test_training_on_incomplete_tables_finds_the_conditional_mean(kind):
    """Given one modality, and given two.

    Experts of a mixture do not multiply: the best that averaging them can give is the mean of the
    conditional means given each, which here explains 95 to 97 % of what the exact answer does.
    """
    problem = LinearGaussian()
    torch.manual_seed(0)
    entry = IMPUTERS[kind]
    private = {} if kind == "mopoe" else {"private": 2}
    sizes = {
        "latent": 4,
        "dim": 16,
        "hidden": 32,
        "table_weight": 1.0,
        "hide_cells": 0.0,
        **private,
    }
    model = entry(tables(4, std=problem.std), entry.Options(**sizes))
    g = seeded(1)
    x = problem.sample(2048, 1).float()
    available = torch.rand(2048, 3, generator=g) < 0.7
    available[torch.arange(2048), torch.randint(3, (2048,), generator=g)] = True
    data = as_batch(x, available)
    train(model, data, g, 0.02)

    truth = problem.sample(4000, 2)

    def given(*observed):
        available = torch.zeros(4000, 3, dtype=torch.bool)
        available[:, observed] = True
        return available

    for observed in subsets(3)[:-1, 0]:
        observed = observed.nonzero().squeeze(1).tolist()
        (*hidden,) = {0, 1, 2} - set(observed)
        recovered = model.recover(as_batch(truth.float(), given(*observed))).values
        if kind == "mopoe":
            best = problem.conditional_mean(truth, given(*observed))
        else:
            best = sum(problem.conditional_mean(truth, given(m)) for m in observed) / len(observed)
        # Mean squares in units of a column's spread: of the training mean, which is 0, of the best
        # guess, and of the recovery.
        floor, least, error = (
            float(((truth[hidden] - guess) / problem.std[hidden, None]).square().mean())
            for guess in (0, best[hidden], torch.stack([recovered["abc"[m]] for m in hidden]))
        )
        assert least < 0.5 * floor  # there is something to recover
        assert (floor - error) / (floor - least) > 0.96
        # Draws are as wide as what cannot be known.
        draws = model.recover(as_batch(truth.float(), given(*observed)), draws=39).draws
        drawn = torch.stack([draws["abc"[m]] for m in hidden], 1).double()
        covered = within_interval(drawn.numpy(), truth[hidden].numpy()).mean()
        assert 0.85 < covered < 0.97


@pytest.mark.parametrize("kind", VAES)
def test_training_with_hidden_cells_finds_the_mean_of_blank_ones(kind):
    """Half of a table's cells given the other half; training tables have blanks of their own."""
    problem = LinearGaussian()
    torch.manual_seed(0)
    entry = IMPUTERS[kind]
    private = {} if kind == "mopoe" else {"private": 2}
    sizes = {"latent": 4, "dim": 16, "hidden": 32, "column_layers": 1, "hide_cells": 0.3, **private}
    model = entry(tables(4, std=problem.std), entry.Options(**sizes))
    g = seeded(1)
    data = as_batch(problem.sample(2048, 1).float(), torch.rand(2048, 3, generator=g) < 0.7)
    data = data.rows(data.observed.available.any(1).nonzero().squeeze(1))
    for filled in data.observed_fields.values():
        filled[:, 1:] &= torch.rand(len(data), 3, generator=g) < 0.7
    train(model, data, g, 0.005)

    truth = problem.sample(4000, 2)
    for m, name in enumerate("abc"):
        available = torch.arange(3).expand(4000, 3) == m
        batch = as_batch(truth.float(), available)
        batch.observed_fields[name][:, [1, 3]] = False
        filled = torch.stack([batch.observed_fields[n] for n in "abc"])
        best = problem.mean_given_cells(truth, filled)[m]
        recovered = model.recover(batch).values[name]
        floor, least, error = (
            float(((truth[m] - guess) / problem.std[m])[:, [1, 3]].square().mean())
            for guess in (0, best, recovered)
        )
        assert least < 0.7 * floor  # there is something to recover
        assert (floor - error) / (floor - least) > 0.75
