"""CyIN against closed forms: bottleneck, translation, schedule, switches, missing modalities."""

import dataclasses
import itertools

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from dymo_med.backbones import BACKBONES, encode_versions
from dymo_med.backbones.bottleneck import CyclicFusion
from dymo_med.config import BackboneTraining
from dymo_med.cyclic import CrossModalFusion, CyclicLatents, LatentOptions, kl_per_token
from dymo_med.errors import ConfigError
from dymo_med.imputers import IMPUTERS
from dymo_med.tasks import Regression
from dymo_med.training.fusion import class_weights
from dymo_med.training.loop import MicroBatch
from dymo_med.training.losses import distinct_subsets
from dymo_med.training.objectives import FusionObjective
from dymo_med.types import Batch, Column, ModalityMask, ModalitySpec, Scale

K = 3
SIZES = {"length": 2, "dim": 8, "hidden": 6, "bottleneck": 4, "residual_dims": (4, 3)}
SPECS = (
    *(
        ModalitySpec(
            name,
            "table",
            "ehr.csv",
            (3,),
            columns=tuple(Column(f"{name}{i}", "continuous", mean=0.0, std=1.0) for i in range(3)),
        )
        for name in ("blood", "urine")
    ),
    ModalitySpec("film", "image", "f.png", (1, 8, 8), (), "zscore"),
)
NAMES = tuple(s.name for s in SPECS)


def make_batch(available=None, n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    available = torch.ones(n, 3, dtype=torch.bool) if available is None else available
    n = len(available)
    values = {s.name: torch.randn(n, *s.shape, generator=g, dtype=torch.float64) for s in SPECS}
    fields = {
        name: torch.ones(n, 3, dtype=torch.bool) & available[:, m, None]
        for m, name in enumerate(NAMES[:2])
    }
    ids = tuple(str(i) for i in range(n))
    return Batch(ids, ids, values, ModalityMask(NAMES, available), fields, torch.arange(n) % K)


def backbone(seed=0, **options):
    torch.manual_seed(seed)
    entry = BACKBONES["cyclic"]
    sizes = {**SIZES, "fusion_dim": 8, "heads": 2, "projection": 4}
    return entry(SPECS, K, entry.Options(**{**sizes, **options})).double()


def losses(network, batch, progress=1.0, seed=0):
    return network.losses(
        batch,
        progress,
        lambda z: F.cross_entropy(z, batch.labels, reduction="none"),
        torch.Generator().manual_seed(seed),
    )


def generator():
    return torch.Generator().manual_seed(0)


class TestBottleneck:
    def test_kl_is_that_of_torch(self):
        g = generator()
        mean, log_variance = torch.randn(2, 5, 7, 4, generator=g, dtype=torch.float64)
        theirs = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, (0.5 * log_variance).exp()),
            torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean)),
        ).mean(-1)
        torch.testing.assert_close(kl_per_token(mean, log_variance), theirs)

    def test_the_bound_is_the_mean_over_ordered_pairs(self):
        network = backbone(beta=5.0).latents
        encoded = network.encode(make_batch())
        z = network.draw(encoded, generator())
        expected = torch.zeros(6, dtype=torch.float64)
        for s, t in itertools.product(range(3), repeat=2):
            kl = kl_per_token(encoded.mean[:, s], encoded.log_variance[:, s]).mean(1)
            guess = network.decoders[NAMES[t]](z[:, s])
            error = (guess - encoded.features[:, t]).square().mean((1, 2))
            expected += (kl + 5.0 * error) / 9
        torch.testing.assert_close(network.bottleneck_loss(encoded, z), expected)

    def test_without_cyclic_interaction_a_latent_keeps_its_own_modality_alone(self):
        batch = make_batch()
        whole, alone = backbone(), backbone(cyclic_interaction=False)
        encoded = alone.latents.encode(batch)
        z = alone.latents.draw(encoded, generator())
        expected = torch.zeros(6, dtype=torch.float64)
        for t in range(3):
            kl = kl_per_token(encoded.mean[:, t], encoded.log_variance[:, t]).mean(1)
            guess = alone.latents.decoders[NAMES[t]](z[:, t])
            error = (guess - encoded.features[:, t]).square().mean((1, 2))
            expected += (kl + 16.0 * error) / 3
        found = alone.latents.bottleneck_loss(encoded, z)
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, whole.latents.bottleneck_loss(encoded, z))

    def test_a_point_latent_neither_forgets_nor_varies(self):
        network = backbone(bottleneck_space=False).latents
        encoded = network.encode(make_batch())
        assert torch.equal(network.draw(encoded, generator()), encoded.mean)
        other = dataclasses.replace(encoded, log_variance=encoded.log_variance + 1)
        z = encoded.mean
        assert torch.equal(network.bottleneck_loss(encoded, z), network.bottleneck_loss(other, z))

    def test_blank_cells_and_what_stands_in_them_do_not_count(self):
        network = backbone().latents
        batch = make_batch()
        fields = dict(batch.observed_fields)
        fields["blood"] = torch.tensor([True, False, False]).expand(6, 3)
        batch = dataclasses.replace(batch, observed_fields=fields)
        values = dict(batch.values)
        values["blood"] = torch.where(fields["blood"], values["blood"], torch.nan)
        one, two = network.encode(batch), network.encode(dataclasses.replace(batch, values=values))
        # Three columns in two places: the first averages columns 1 and 2, the second 2 and 3.
        assert one.available[:, 0].tolist() == [[True, False]] * 6
        assert torch.equal(one.mean, two.mean)
        assert not one.mean[:, 0, 1].any()


class TestTranslation:
    def test_one_translator_serves_both_directions(self):
        network = backbone().latents
        for s, t in itertools.permutations(range(3), 2):
            assert network.translator(s, t) is network.translator(t, s)
        assert (
            len({id(network.translator(s, t)) for s, t in itertools.permutations(range(3), 2)}) == 3
        )
        assert len(network.translators) == 3

    def test_every_translation_has_its_shape_and_place(self):
        network = backbone().latents
        z = torch.randn(5, 3, 2, 4, dtype=torch.float64)
        forward = network.translate(z)
        assert forward.shape == (5, 3, 3, 2, 4)
        back = network.translate(forward)
        for s, t in itertools.permutations(range(3), 2):
            to = network.translator(s, t)
            torch.testing.assert_close(forward[:, s, t], to(z[:, s]))
            torch.testing.assert_close(back[:, s, t], to(to(z[:, s])))

    @pytest.mark.parametrize("combine", ["mean", "sum"])
    def test_the_loss_is_nine_reconstructions_and_nine_cycles(self, combine):
        network = backbone(combine=combine).latents
        z = torch.randn(5, 3, 2, 4, dtype=torch.float64)
        available = torch.ones(5, 3, 2, dtype=torch.bool)
        rec, cyc = [], []
        join = torch.mean if combine == "mean" else torch.sum
        for t in range(3):
            others = [s for s in range(3) if s != t]
            there = [network.translator(s, t)(z[:, s]) for s in others]
            and_back = [network.translator(t, s)(network.translator(t, s)(z[:, t])) for s in others]
            for terms, guesses in ((rec, there), (cyc, and_back)):
                guesses = [*guesses, join(torch.stack(guesses), 0)]
                terms += [(guess - z[:, t]).square().mean((1, 2)) for guess in guesses]
        assert len(rec) == len(cyc) == 9
        expected = torch.stack(rec).mean(0) + torch.stack(cyc).mean(0)
        found = network.translation_loss(z, available, network.translate(z))
        torch.testing.assert_close(found, expected)
        one_way = backbone(combine=combine, cycle=False).latents
        found = one_way.translation_loss(z, available, one_way.translate(z))
        torch.testing.assert_close(found, torch.stack(rec).mean(0))

    @pytest.mark.parametrize(("combine", "size"), [("mean", 0.5), ("sum", 1.0)])
    def test_a_sum_of_right_translations_is_too_large(self, combine, size):
        """Translations that are exact one by one add up to twice the truth."""
        network = backbone(combine=combine).latents
        z = torch.ones(1, 3, 2, 4, dtype=torch.float64)
        other = ~torch.eye(3, dtype=torch.bool)[None]
        translated = torch.ones(1, 3, 3, 2, 4, dtype=torch.float64)
        torch.testing.assert_close(network.combined(translated, other), z * 2 * size)

    def test_a_translator_learns_an_invertible_map_both_ways(self):
        torch.manual_seed(0)
        o = LatentOptions(**{**SIZES, "residual_dims": (16,), "moving_targets": False})
        network = CyclicLatents(SPECS[:2], o)
        turn = torch.linalg.qr(torch.randn(4, 4, generator=generator()))[0]
        turn = turn @ torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0])) @ turn.T  # its own inverse
        g = generator()
        optimizer = torch.optim.Adam(network.translators.parameters(), 0.01)
        available = torch.ones(64, 2, 2, dtype=torch.bool)
        for step in range(300):
            one = torch.randn(64, 2, 4, generator=g)
            z = torch.stack([one, one @ turn], 1)
            loss = network.translation_loss(z, available, network.translate(z)).mean()
            if step == 0:
                first = float(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert float(loss.detach()) < 0.1 * first

    def test_targets_move_only_if_asked(self):
        z = torch.randn(2, 3, 2, 4, dtype=torch.float64)
        available = torch.ones(2, 3, 2, dtype=torch.bool)
        for moving in (False, True):
            network = backbone(moving_targets=moving).latents
            target = z.clone().requires_grad_()
            network.translation_loss(target, available, network.translate(z)).sum().backward()
            assert (
                (target.grad is not None and bool(target.grad.any())) == moving
                if moving
                else (target.grad is None)
            )


class TestLoss:
    def test_weights_are_one_over_beta_and_gamma(self):
        batch = make_batch()
        plain = losses(backbone(beta=1.0, gamma=1.0), batch)
        network = backbone(beta=8.0, gamma=6.0)
        weighed = losses(network, batch)
        torch.testing.assert_close(weighed["translation"], 6 * plain["translation"])
        for same in ("task", "label"):
            torch.testing.assert_close(weighed[same], plain[same])
        encoded = network.latents.encode(batch)
        z = network.latents.draw(encoded, generator())
        torch.testing.assert_close(
            weighed["token"], network.latents.bottleneck_loss(encoded, z) / 8
        )
        # KL counts 1/beta and the error 1, whatever beta.
        kl = kl_per_token(encoded.mean, encoded.log_variance).mean((1, 2))
        torch.testing.assert_close(plain["token"] - kl, weighed["token"] - kl / 8)
        assert torch.equal(
            network.own_loss(
                batch,
                1.0,
                lambda z: F.cross_entropy(z, batch.labels, reduction="none"),
                generator(),
            ),
            sum(weighed.values()),
        )

    def test_labels_are_asked_of_every_modality(self):
        network, batch = backbone(), make_batch()
        encoded = network.latents.encode(batch)
        z = network.latents.draw(encoded, generator())
        expected = sum(
            F.cross_entropy(network.labels[n](z[:, m].mean(1)), batch.labels, reduction="none")
            for m, n in enumerate(NAMES)
        )
        torch.testing.assert_close(losses(network, batch)["label"], expected)

    def test_the_first_stage_knows_no_translation(self):
        network, batch = backbone(stage_divide=0.25), make_batch()
        early, late = losses(network, batch, 0.24), losses(network, batch, 0.25)
        assert set(early) == {"label", "token", "task"}
        assert set(late) == {*early, "translation"}
        z = network.latents.draw(network.latents.encode(batch), generator())
        logits = network.classifier(network.fusion(z, torch.ones(6, 3, 2, dtype=torch.bool)))
        real = F.cross_entropy(logits, batch.labels, reduction="none")
        torch.testing.assert_close(early["task"], real)
        assert not torch.allclose(late["task"], real)

    @pytest.mark.parametrize(
        ("switch", "gone"),
        [
            ("token_bottleneck", "token"),
            ("label_bottleneck", "label"),
            ("translation", "translation"),
        ],
    )
    def test_a_switch_takes_its_term_away_and_nothing_else(self, switch, gone):
        batch = make_batch()
        whole, part = losses(backbone(), batch), losses(backbone(**{switch: False}), batch)
        assert set(part) == set(whole) - {gone}
        if switch != "label_bottleneck":  # without its heads other weights start elsewhere
            for name, term in part.items():
                torch.testing.assert_close(term, whole[name])

    def test_without_translated_latents_what_is_missing_is_zero(self):
        network = backbone(translated_latents=False)
        z = torch.randn(2, 3, 2, 4, dtype=torch.float64)
        available = torch.tensor([[True, False, True], [True, True, True]])[..., None].expand(
            2, 3, 2
        )
        filled, now = network.latents.fill(z, available)
        assert torch.equal(filled, z * available[..., None]) and bool(now.all())
        early, late = losses(network, make_batch(), 0.0), losses(network, make_batch(), 1.0)
        assert torch.equal(early["task"], late["task"])

    def test_a_record_without_a_modality_leaves_its_terms_out(self):
        """Its loss is that of a network which has never heard of the modality."""
        pattern = torch.tensor([[True, True, False]] * 4)
        whole = backbone()
        batch = make_batch(pattern)
        encoded = whole.latents.encode(batch)
        z = whole.latents.draw(encoded, generator())
        pairs = list(itertools.product(range(2), repeat=2))
        expected = torch.zeros(4, dtype=torch.float64)
        for s, t in pairs:
            kl = kl_per_token(encoded.mean[:, s], encoded.log_variance[:, s]).mean(1)
            guess = whole.latents.decoders[NAMES[t]](z[:, s])
            error = (guess - encoded.features[:, t]).square().mean((1, 2))
            expected += (kl + 16.0 * error) / 4
        torch.testing.assert_close(whole.latents.bottleneck_loss(encoded, z), expected)
        to = whole.latents.translator(0, 1)
        there = [(to(z[:, s]) - z[:, t]).square().mean((1, 2)) for s, t in ((0, 1), (1, 0))]
        back = [(to(to(z[:, s])) - z[:, s]).square().mean((1, 2)) for s in range(2)]
        found = whole.latents.translation_loss(z, encoded.available, whole.latents.translate(z))
        torch.testing.assert_close(found, sum(there) / 2 + sum(back) / 2)
        label = losses(whole, batch)["label"]
        expected = sum(
            F.cross_entropy(whole.labels[n](z[:, m].mean(1)), batch.labels, reduction="none")
            for m, n in enumerate(NAMES[:2])
        )
        torch.testing.assert_close(label, expected)

    def test_values_of_missing_modalities_change_no_loss(self):
        pattern = torch.tensor([[True, False, True], [False, True, True], [True, False, False]])
        network, batch = backbone(), make_batch(pattern)
        values = {
            name: torch.where(
                pattern[:, m].view(-1, *(1,) * (v.ndim - 1)), v, torch.full_like(v, torch.nan)
            )
            for m, (name, v) in enumerate(batch.values.items())
        }
        other = losses(network, dataclasses.replace(batch, values=values))
        for name, term in losses(network, batch).items():
            assert torch.equal(term, other[name])

    def test_class_weights_make_classes_count_the_same(self):
        weights = class_weights(torch.tensor([0, 0, 0, 0, 1, 2, 2, 2]), 3)
        totals = weights * torch.tensor([4.0, 1.0, 3.0])
        torch.testing.assert_close(totals, torch.full((3,), 8 / 3))

    def test_every_head_of_a_regression_learns_the_absolute_error(self):
        scale = Scale(-1.0, 1.0, (-1.0, 0.0, 1.0))
        values = torch.linspace(-1, 1, 6, dtype=torch.float64)
        batch = dataclasses.replace(make_batch(), shares=scale.shares(values))
        network = backbone()
        settings = BackboneTraining(subsets=7, epochs=1)
        weights = torch.ones(6, dtype=torch.float64)
        objective = FusionObjective(
            network,
            K,
            settings,
            batch,
            weights,
            torch.device("cpu"),
            seed=0,
            task=Regression.of("y", scale),
        ).double()
        objective.begin_epoch(0)
        found = objective(MicroBatch(batch, weights, generator()))

        def task_loss(logits):
            shares = -(batch.shares * logits.log_softmax(1)).sum(1)
            return shares + (scale.value(logits.softmax(1)) - values).abs()

        g = generator()
        subsets = distinct_subsets(3, 7, g)
        fuse = encode_versions(network, batch)
        each = [
            task_loss(fuse(torch.arange(6), s.expand(6, 3), torch.zeros(6, 3) > 0).logits)
            for s in subsets
        ]
        own = sum(network.losses(batch, 0.0, task_loss, g).values())
        torch.testing.assert_close(found, torch.stack(each).mean() + own.mean())

    def test_gradients_of_its_subsets_cannot_be_decoupled(self):
        batch = make_batch()
        settings = BackboneTraining(gradient="gmd")
        with pytest.raises(ConfigError, match="has one of its own"):
            FusionObjective(
                backbone(), K, settings, batch, torch.ones(6), torch.device("cpu"), seed=0
            )


class TestReplacement:
    def test_a_latent_of_three_is_real_one_time_in_four(self):
        network = backbone().latents
        n = 8000
        z = torch.randn(n, 3, 2, 4, dtype=torch.float64)
        available = torch.ones(n, 3, 2, dtype=torch.bool)
        translated = network.translate(z)
        other = (~torch.eye(3, dtype=torch.bool)).expand(n, 3, 3)
        got, now = network.replaced(z, available, translated, generator())
        assert bool(now.all())
        for t in range(3):
            versions = [translated[:, s, t] for s in range(3) if s != t]
            versions += [network.combined(translated, other)[:, t], z[:, t]]
            same = torch.stack([(got[:, t] == v).all(-1).all(-1) for v in versions])
            assert torch.equal(same.sum(0), torch.ones(n, dtype=torch.int64))
            assert (same.double().mean(1) - 0.25).abs().max() < 0.02

    def test_what_was_not_measured_is_translated_from_what_was(self):
        network = backbone().latents
        available = torch.tensor([[True, False, False], [True, True, False]])
        available = available[..., None].expand(2, 3, 2)
        z = torch.randn(2, 3, 2, 4, dtype=torch.float64) * available[..., None]
        translated = network.translate(z)
        got, now = network.replaced(z, available, translated, generator())
        # The only modality of the first record can be nothing but real.
        assert torch.equal(got[0, 0], z[0, 0])
        assert torch.equal(got[0, 1], translated[0, 0, 1])
        assert bool(now.all())
        filled, now = network.fill(z, available)
        assert bool(now.all())
        torch.testing.assert_close(filled[1, 2], (translated[1, 0, 2] + translated[1, 1, 2]) / 2)
        assert torch.equal(filled[1, :2], z[1, :2])


class TestFusion:
    @pytest.mark.parametrize(("form", "count"), [("pairwise", 6), ("joint", 1)])
    def test_networks_for_three_modalities(self, form, count):
        fusion = CrossModalFusion(3, 2, 4, 8, 2, 2, 1, form)
        assert len(fusion.crosses) == count
        assert all(len(layers) == 2 for layers in fusion.crosses)
        state = fusion(torch.randn(5, 3, 2, 4), torch.ones(5, 3, 2, dtype=torch.bool))
        assert state.shape == (5, 48 if form == "pairwise" else 8)

    @pytest.mark.parametrize("form", ["pairwise", "joint"])
    def test_one_modality_alone_still_says_something(self, form):
        fusion = CrossModalFusion(3, 2, 4, 8, 2, 1, 1, form).double()
        z = torch.randn(4, 3, 2, 4, dtype=torch.float64)
        only = torch.tensor([True, False, False])[:, None].expand(4, 3, 2)
        state = fusion(z, only)
        changed = torch.cat([z[:, :1], torch.full_like(z[:, 1:], torch.nan)], 1)
        assert torch.equal(state, fusion(changed, only))
        assert (state[0] - state[1]).abs().max() > 1e-3

    @pytest.mark.parametrize("form", ["pairwise", "joint"])
    def test_nobody_is_asked_about(self, form):
        fuse = encode_versions(backbone(fusion=form), make_batch())
        nobody = torch.zeros(0, 3, dtype=torch.bool)
        out = fuse(torch.arange(0), nobody, nobody)
        assert out.logits.shape == (0, K) and out.embedding.shape == (0, 4)

    @pytest.mark.parametrize("form", ["pairwise", "joint"])
    def test_every_weight_is_reached(self, form):
        network = backbone(fusion=form)
        total = sum(
            losses(network, make_batch(seed=s), seed=s)[k].sum()
            for s in range(2)
            for k in ("task", "label", "token", "translation")
        )
        out = encode_versions(network, make_batch())(
            torch.arange(6), torch.ones(6, 3, dtype=torch.bool), torch.zeros(6, 3, dtype=torch.bool)
        )
        (total + out.embedding.sum()).backward()
        without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
        assert [n for n in without if not n.endswith(".blank")] == []


class TestTied:
    def pair(self):
        network = backbone()
        entry = IMPUTERS["cyclic"]
        imputer = entry(SPECS, entry.Options(**SIZES)).double()
        assert imputer.tie(network)
        return imputer.eval(), network.eval()

    def test_latents_are_the_backbones_own_and_stored_once(self):
        imputer, network = self.pair()
        assert imputer.latents is network.latents
        assert all(name.startswith("decoders.") for name in imputer.state_dict())
        assert all(name.startswith("decoders.") for name, _ in imputer.named_parameters())
        before = [p.clone() for p in network.parameters()]
        imputer.loss(make_batch(), generator()).sum().backward()
        assert all(p.grad is None for p in network.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))

    def test_a_recovery_is_fused_as_tokens(self):
        imputer, network = self.pair()
        batch = make_batch(torch.tensor([[True, False, True], [True, True, False]]))
        recovery = imputer.recover(batch)
        everything = torch.ones(2, 3, dtype=torch.bool)
        got = encode_versions(network, batch, recovery)(
            torch.arange(2), everything, recovery.candidates
        )
        encoded = network.latents.encode(batch)
        filled = network.latents.fill(encoded.mean, encoded.available)
        alone = network.classifier(network.fusion(*filled))
        torch.testing.assert_close(got.logits, alone)
        # Another network cannot read them, and takes the values.
        stranger = backbone(seed=5).eval()
        values = encode_versions(stranger, batch, dataclasses.replace(recovery, latents=None))
        other = encode_versions(stranger, batch, recovery)
        assert torch.equal(values.recovered, other.recovered)

    def test_a_completed_table_keeps_the_cells_it_has(self):
        imputer, network = self.pair()
        batch = make_batch()
        fields = dict(batch.observed_fields)
        fields["blood"] = torch.tensor([True, False, False]).expand(6, 3)
        batch = dataclasses.replace(batch, observed_fields=fields)
        recovery = imputer.recover(batch)
        assert bool(recovery.completed[:, 0].all())
        tokens = recovery.latents.values["blood"]
        encoded = network.latents.encode(batch)
        assert torch.equal(tokens[:, 0], encoded.mean[:, 0, 0])
        assert bool((tokens[:, 1] != 0).all())

    def test_other_sizes_are_refused(self):
        entry = IMPUTERS["cyclic"]
        imputer = entry(SPECS, entry.Options(**{**SIZES, "gamma": 3.0}))
        with pytest.raises(ConfigError, match="differ in gamma"):
            imputer.tie(backbone())

    def test_a_stranger_is_left_alone(self):
        entry = IMPUTERS["cyclic"]
        imputer = entry(SPECS, entry.Options(**SIZES))
        assert not imputer.tie(nn.Linear(2, 2))
        assert any(name.startswith("latents.") for name in imputer.state_dict())

    def test_inference_repeats_bit_for_bit(self):
        for latents in ("mean", "sample"):
            network = backbone(latents=latents).eval()
            assert isinstance(network, CyclicFusion)
            batch = make_batch()
            one, two = (encode_versions(network, batch).observed for _ in range(2))
            assert torch.equal(one, two)
        means = encode_versions(backbone().eval(), batch).observed
        assert not torch.equal(one, means)


DROPOUTS = ("attention_dropout", "memory_dropout", "embedding_dropout", "output_dropout")


def fused(network, seed, available=None):
    """What a training step's fusion says of the same tokens, from a state of torch's generator."""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(5, 3, 2, 4, generator=g, dtype=torch.float64)
    if available is None:
        available = torch.ones(5, 3, 2, dtype=torch.bool)
    torch.manual_seed(seed)
    return network.fusion(z, available)


class TestDropout:
    @pytest.mark.parametrize("form", ["pairwise", "joint"])
    @pytest.mark.parametrize("option", DROPOUTS)
    def test_each_acts_in_training_alone_and_follows_the_seed(self, option, form):
        plain = backbone(fusion=form)
        network = backbone(fusion=form, **{option: 0.5})
        # Nothing is drawn for the weights, which are those of a network without it.
        for one, other in zip(plain.parameters(), network.parameters(), strict=True):
            assert torch.equal(one, other)
        once, again, other = (fused(network.train(), seed) for seed in (1, 1, 2))
        assert torch.equal(once, again) and not torch.equal(once, other)
        assert torch.equal(fused(network.eval(), 1), fused(plain.eval(), 2))

    @pytest.mark.parametrize("form", ["pairwise", "joint"])
    def test_without_it_training_draws_nothing(self, form):
        network = backbone(fusion=form).train()
        before = fused(network, 1)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(1)))
        assert torch.equal(before, fused(network, 2))

    def test_attention_across_modalities_has_the_rate_of_its_source(self, monkeypatch):
        rates = {"blood": 0.1, "film": 0.3}
        network = backbone(attention_dropout=rates, memory_dropout=0.4)
        seen, attention = [], F.scaled_dot_product_attention
        monkeypatch.setattr(
            F,
            "scaled_dot_product_attention",
            lambda *a, dropout_p=0.0, **kw: (
                seen.append(dropout_p) or attention(*a, dropout_p=dropout_p, **kw)
            ),
        )
        fused(network.train(), 0)
        # Targets blood, urine, film: two sources each, then the target's own tokens.
        assert seen == [0.0, 0.3, 0.4, 0.1, 0.3, 0.4, 0.1, 0.0, 0.4]
        seen.clear()
        fused(network.eval(), 0)
        assert seen == [0.0] * 9

    def test_shares_are_what_the_options_say(self):
        network = backbone(output_dropout=0.25, embedding_dropout=0.5, fusion_dim=64, heads=2)
        shares = {}

        def look(name):
            def note(module, given):
                shares.setdefault(name, float((given[0] == 0).double().mean()))

            return note

        fusion = network.fusion.train()
        fusion.mlp[1] = nn.Softplus()  # no zeros of its own
        fusion.mlp[2].register_forward_pre_hook(look("output"))
        fusion.crosses[0][0].norm_source.register_forward_pre_hook(look("embedding"))
        fused(network, 0)
        assert shares["output"] == pytest.approx(0.25, abs=0.06)
        assert shares["embedding"] == pytest.approx(0.5, abs=0.08)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"attention_dropout": 1.0}, "less than 1"),
            ({"attention_dropout": {"blood": 1.5}}, "less than 1"),
            ({"memory_dropout": -0.1}, "greater than or equal to 0"),
            ({"output_dropout": "much"}, "valid number"),
            ({"fusion": "joint", "attention_dropout": {"blood": 0.1}}, "must be one number"),
        ],
    )
    def test_what_cannot_be_dropped(self, options, message):
        with pytest.raises(ValidationError, match=message):
            backbone(**options)

    def test_a_rate_of_a_modality_that_is_not_there_is_an_error_with_the_nearest_name(self):
        with pytest.raises(ConfigError, match=r"no modality called bloood.*blood"):
            backbone(attention_dropout={"bloood": 0.1})


class TestCausal:
    @staticmethod
    def reach(form, causal, available):
        """Bool `(M, L, M, L)`: whether a token's last state depends on another's values."""
        m, n, d = 3, 4, 8
        torch.manual_seed(0)
        fusion = CrossModalFusion(m, n, d, d, 2, 2, 2, form, causal=causal).double().eval()
        fusion.inputs = nn.ModuleList(nn.Identity() for _ in range(m))  # no neighbours seen here
        states = []
        for blocks in fusion.memories:
            blocks[-1].register_forward_hook(lambda module, given, output: states.append(output))
        z = torch.randn(1, m, n, d, dtype=torch.float64)
        depends = torch.zeros(m, n, m, n, dtype=torch.bool)

        def look(z):
            states.clear()
            fusion(z, available)
            return torch.stack(states, 1) if form == "pairwise" else states[0].view(1, m, n, -1)

        before = look(z)
        for s, j in itertools.product(range(m), range(n)):
            other = z.clone()
            # Not a constant, which normalisation would take out.
            other[0, s, j] += torch.randn(d, dtype=torch.float64)
            depends[..., s, j] = (look(other) != before)[0].any(-1)
        return depends

    @pytest.mark.parametrize("form", ["pairwise", "joint"])
    @pytest.mark.parametrize("causal", [True, False])
    def test_which_tokens_a_token_sees(self, form, causal):
        found = self.reach(form, causal, torch.ones(1, 3, 4, dtype=torch.bool))
        lower = torch.ones(4, 4, dtype=torch.bool).tril()
        table = lower if causal else torch.ones(4, 4, dtype=torch.bool)
        for t, s in itertools.product(range(3), range(3)):
            assert found[t, :, s].tolist() == table.tolist(), (t, s)

    @pytest.mark.parametrize("form", ["pairwise", "joint"])
    def test_what_is_not_available_is_not_seen_though_it_is_earlier(self, form):
        available = torch.ones(1, 3, 4, dtype=torch.bool)
        available[0, 1, :2] = False
        available[0, 2] = False
        found = self.reach(form, True, available)
        seen = torch.ones(4, 4, dtype=torch.bool).tril()
        assert found[0, :, 0].tolist() == seen.tolist()
        seen[:, :2] = False
        assert found[0, :, 1].tolist() == seen.tolist()
        assert not found[0, :, 2].any()

    def test_a_network_may_be_causal_and_lack_all_but_one_modality(self):
        network = backbone(causal=True).eval()
        available = torch.zeros(5, 3, 2, dtype=torch.bool)
        available[torch.arange(5), torch.arange(5) % 3] = True
        assert bool(fused(network, 0, available).isfinite().all())
        assert not torch.equal(fused(network, 0), fused(backbone().eval(), 0))
