"""Laws that every registered imputer, backbone, selector and modality kind obeys."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dymo_med.backbones import BACKBONES, encode_versions
from dymo_med.imputers import IMPUTERS
from dymo_med.modalities import MODALITIES, modality
from dymo_med.selection import SELECTORS, Cases, fit_statistics
from dymo_med.types import Batch, Column, ModalityMask, ModalitySpec, Steps

SMALL = {
    "mopoe": {"latent": 6, "dim": 8, "width": 4, "grid": 2, "hidden": 8},
    "tip": {"dim": 16, "heads": 2, "layers": 2, "projection": 6, "width": 4, "grid": 2},
    "iterative": {"rounds": 3},
    "template": {},
    "conditional": {"components": 3, "pictures": 2},
    "synthesis": {"width": 4, "levels": 2, "patch": 8},
    "mmvae_plus": {"latent": 6, "private": 3, "dim": 8, "width": 4, "grid": 2, "hidden": 8},
    "cmvae": {"latent": 6, "private": 3, "clusters": 3, "dim": 8, "width": 4, "grid": 2},
    "cyclic": {"length": 3, "dim": 8, "hidden": 8, "bottleneck": 6, "width": 4},
    "transformer": {
        "dim": 16,
        "heads": 2,
        "layers": 1,
        "projection": 6,
        "width": 4,
        "grid": 2,
    },
}

SPECS = (
    ModalitySpec("volume", "image", "v.nii.gz", (1, 9, 8, 10), (4.0, 4.0, 4.0), "zscore"),
    ModalitySpec("film", "image", "f.png", (1, 16, 12), (), "zscore"),
    ModalitySpec(
        "labs",
        "table",
        "ehr.csv",
        (3,),
        columns=(
            Column("crp", "continuous", "mg/L", (0.0, 500.0), mean=40.0, std=30.0),
            Column("sex", "categorical", values=("F", "M"), frequencies=(0.5, 0.5)),
            Column("stage", "categorical", values=("i", "ii", "iii"), frequencies=(0.5, 0.3, 0.2)),
        ),
    ),
    ModalitySpec(
        "age", "table", "ehr.csv", (1,), columns=(Column("age", "continuous", mean=60.0, std=9.0),)
    ),
    # On the grid of the film: some imputers recover an image from others of its grid alone.
    ModalitySpec("side", "image", "s.png", (1, 16, 12), (), "zscore"),
    ModalitySpec(
        "gait", "tokens", "g.npy", (5, 3), steps=Steps(mean=(1.0, 0.0, 0.0), std=(2.0, 1.0, 0.5))
    ),
)
NAMES = tuple(s.name for s in SPECS)
K = 3


def make_batch(n=7, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    values = {
        "volume": torch.randn(n, 1, 9, 8, 10, generator=g, dtype=dtype),
        "film": torch.randn(n, 1, 16, 12, generator=g, dtype=dtype),
        "labs": torch.stack(
            [
                torch.rand(n, generator=g, dtype=dtype) * 100,
                torch.randint(2, (n,), generator=g).to(dtype),
                torch.randint(3, (n,), generator=g).to(dtype),
            ],
            1,
        ),
        "age": 50 + 10 * torch.randn(n, 1, generator=g, dtype=dtype),
        "side": torch.randn(n, 1, 16, 12, generator=g, dtype=dtype),
        "gait": 1 + torch.randn(n, 5, 3, generator=g, dtype=dtype),
    }
    available = torch.rand(n, len(SPECS), generator=g) < 0.6
    available[:, 0] |= ~available.any(1)
    fields = {
        "labs": (torch.rand(n, 3, generator=g) < 0.7) & available[:, 2:3],
        "age": available[:, 3:4].clone(),
    }
    fields["labs"][:, 0] |= available[:, 2]
    fields["labs"][::2, 1] = False
    ids = tuple(f"r{i}" for i in range(n))
    labels = torch.arange(n) % K
    return Batch(ids, ids, values, ModalityMask(NAMES, available), fields, labels)


def noisy(batch, seed=1):
    """The same batch with other numbers wherever nothing was observed."""
    g = torch.Generator().manual_seed(seed)
    values = {}
    for m, name in enumerate(NAMES):
        v = batch.values[name]
        keep = batch.observed.available[:, m].view(-1, *(1,) * (v.ndim - 1))
        if name in batch.observed_fields:
            keep = keep & batch.observed_fields[name]
        values[name] = torch.where(keep, v, torch.rand(v.shape, generator=g, dtype=v.dtype) * 2)
    return dataclasses.replace(batch, values=values)


def build(table, name, seed=0, specs=SPECS):
    torch.manual_seed(seed)
    entry = table[name]
    options = entry.Options(**SMALL[name])
    if table is IMPUTERS:
        imputer = entry(specs, options).double().eval()
        imputer.start_from(make_batch(30, seed=100 + seed))
        return imputer
    return entry(specs, K, options).double().eval()


# The same, but that no training record had a stage.
WITHOUT_STAGE = tuple(
    dataclasses.replace(
        spec,
        columns=tuple(dataclasses.replace(c, known=c.name != "stage") for c in spec.columns),
    )
    for spec in SPECS
)


@pytest.mark.parametrize("name", IMPUTERS)
class TestImputer:
    def test_observed_values_pass_bit_for_bit(self, name):
        batch = make_batch()
        recovery = build(IMPUTERS, name).recover(batch)
        for m, modality_name in enumerate(NAMES):
            for i in range(len(batch)):
                got, given = recovery.values[modality_name][i], batch.values[modality_name][i]
                if modality_name in batch.observed_fields:
                    cells = batch.observed_fields[modality_name][i]
                    assert torch.equal(got[cells], given[cells])
                elif batch.observed.available[i, m]:
                    assert torch.equal(got, given)

    def test_noise_where_nothing_was_observed_changes_nothing(self, name):
        batch = make_batch()
        imputer = build(IMPUTERS, name)
        one, two = imputer.recover(batch), imputer.recover(noisy(batch))
        for m, modality_name in enumerate(NAMES):
            shown = one.observed.available[:, m]
            if modality_name in batch.observed_fields:
                # A blank cell of a table that is there says nothing, unless it is completed.
                shown = batch.observed_fields[modality_name]
            proposed = one.candidates[:, m]
            shown = shown | proposed.view(-1, *(1,) * (shown.ndim - 1))
            assert torch.equal(one.values[modality_name][shown], two.values[modality_name][shown])

    def test_everything_recoverable_is_proposed_and_finite(self, name):
        batch = make_batch()
        imputer = build(IMPUTERS, name)
        recovery = imputer.recover(batch)
        can = imputer.recoverable(batch.observed.available)
        assert torch.equal(recovery.recovered, ~batch.observed.available & can)
        assert torch.equal(recovery.completed, batch.partly_filled() & can)
        assert all(bool(v.isfinite().all()) for v in recovery.values.values())
        assert bool(recovery.recovered.any())
        # Some leave tables alone.
        tables = torch.tensor([spec.kind == "table" for spec in SPECS])
        fills = imputer.recoverable(torch.ones(1, len(SPECS), dtype=torch.bool))[0] & tables
        assert bool(recovery.completed.any()) == bool(fills.any())

    def test_a_batch_of_one_equals_its_row(self, name):
        batch = make_batch()
        imputer = build(IMPUTERS, name)
        whole = imputer.recover(batch)
        shown = whole.observed.available | whole.recovered
        for i in range(len(batch)):
            alone = imputer.recover(batch.rows(torch.tensor([i])))
            assert torch.equal(alone.recovered[0], whole.recovered[i])
            for m, modality_name in enumerate(NAMES):
                if not shown[i, m]:
                    continue
                torch.testing.assert_close(
                    alone.values[modality_name][0],
                    whole.values[modality_name][i],
                    atol=1e-10,
                    rtol=0,
                )

    def test_same_seed_same_draws(self, name):
        imputer = build(IMPUTERS, name)
        if not imputer.probabilistic:
            pytest.skip("not probabilistic")
        one = imputer.recover(make_batch(), draws=2, seed=5).draws
        two = imputer.recover(make_batch(), draws=2, seed=5).draws
        other = imputer.recover(make_batch(), draws=2, seed=6).draws
        assert all(torch.equal(one[n], two[n]) for n in one)
        assert any(not torch.equal(one[n], other[n]) for n in one)
        for name, drawn in one.items():
            assert not torch.equal(drawn[0], drawn[1]), name

    def test_save_and_load_give_the_same_recovery(self, name, tmp_path):
        imputer = build(IMPUTERS, name)
        save_file(dict(imputer.state_dict()), tmp_path / "w.safetensors")
        other = build(IMPUTERS, name, seed=9)
        other.load_state_dict(load_file(tmp_path / "w.safetensors"))
        one, two = imputer.recover(make_batch()), other.recover(make_batch())
        assert all(torch.equal(one.values[n], two.values[n]) for n in NAMES)

    def test_nothing_observed_is_refused(self, name):
        from dymo_med.errors import PatientDataError

        batch = make_batch()
        batch.observed.available[2] = False
        with pytest.raises(PatientDataError, match=r"r2.*nothing can be recovered"):
            build(IMPUTERS, name).recover(batch)

    def test_a_training_step_reaches_every_parameter(self, name):
        imputer = build(IMPUTERS, name).train()
        if next(imputer.parameters(), None) is None:
            with pytest.raises(TypeError, match="no trainable parameters"):
                imputer.loss(make_batch(), torch.Generator())
            return
        loss = torch.zeros((), dtype=torch.float64)
        for seed in range(4):
            loss = (
                loss
                + imputer.loss(make_batch(seed=seed), torch.Generator().manual_seed(seed)).sum()
            )
        loss.backward()
        without = [n for n, p in imputer.named_parameters() if p.grad is None]
        assert not without


@pytest.mark.parametrize("name", IMPUTERS)
def test_a_column_that_no_training_record_had_is_never_recovered(name):
    batch = make_batch()
    batch.observed_fields["labs"][:, 2] = False
    recovery = build(IMPUTERS, name, specs=WITHOUT_STAGE).recover(batch, draws=3, seed=1)
    labs = NAMES.index("labs")
    assert bool((recovery.values["labs"][recovery.candidates[:, labs], 2] == 0).all())
    whole = batch.observed_fields["labs"][:, :2].all(1) & batch.observed.available[:, labs]
    assert bool(whole.any()) and not bool(recovery.completed[whole, labs].any())
    if recovery.draws is not None and "labs" in recovery.draws:
        assert bool((recovery.draws["labs"][:, recovery.candidates[:, labs], 2] == 0).all())


@pytest.mark.parametrize("name", BACKBONES)
def test_a_column_that_no_training_record_had_changes_nothing(name):
    batch = make_batch()
    other = dataclasses.replace(
        batch, values={**batch.values, "labs": batch.values["labs"].clone()}
    )
    other.values["labs"][:, 2] = 2 - other.values["labs"][:, 2]
    backbone = build(BACKBONES, name, specs=WITHOUT_STAGE)
    with torch.no_grad():
        first, second = (backbone.encode("labs", b.values["labs"]) for b in (batch, other))
    assert torch.equal(first.values, second.values)


@pytest.mark.parametrize("name", BACKBONES)
class TestBackbone:
    def outputs(self, backbone, batch, used=None):
        used = batch.observed.available if used is None else used
        return encode_versions(backbone, batch)(
            torch.arange(len(batch)), used, torch.zeros_like(used)
        )

    def test_noise_where_nothing_was_observed_changes_nothing(self, name):
        backbone = build(BACKBONES, name)
        one, two = (self.outputs(backbone, b) for b in (make_batch(), noisy(make_batch())))
        assert torch.equal(one.logits, two.logits)
        assert torch.equal(one.embedding, two.embedding)

    def test_unused_modalities_change_nothing(self, name):
        backbone = build(BACKBONES, name)
        batch = make_batch()
        used = batch.observed.available.clone()
        used[:, 1] &= ~used[:, 0]
        values = dict(batch.values)
        change = (batch.observed.available & ~used)[:, 1].view(-1, 1, 1, 1)
        assert change.any()
        values["film"] = torch.where(change, values["film"] + 3, values["film"])
        other = dataclasses.replace(batch, values=values)
        one, two = self.outputs(backbone, batch, used), self.outputs(backbone, other, used)
        torch.testing.assert_close(one.logits, two.logits, atol=1e-12, rtol=0)

    def test_used_modalities_do_change_something(self, name):
        backbone = build(BACKBONES, name)
        batch = make_batch()
        for m, modality_name in enumerate(NAMES):
            values = dict(batch.values)
            values[modality_name] = (
                1 - values[modality_name].clamp(0, 1)
                if modality_name == "labs"
                else values[modality_name] * -1.5
            )
            changed = self.outputs(backbone, dataclasses.replace(batch, values=values)).logits
            has = batch.observed.available[:, m]
            moved = (changed - self.outputs(backbone, batch).logits).abs().amax(1) > 1e-9
            assert torch.equal(moved, has)

    def test_a_batch_of_one_equals_its_row(self, name):
        backbone = build(BACKBONES, name)
        batch = make_batch()
        whole = self.outputs(backbone, batch)
        for i in range(len(batch)):
            alone = self.outputs(backbone, batch.rows(torch.tensor([i])))
            torch.testing.assert_close(alone.logits[0], whole.logits[i], atol=1e-10, rtol=0)
            torch.testing.assert_close(alone.embedding[0], whole.embedding[i], atol=1e-10, rtol=0)

    def test_tokens_of_all_modalities_stand_side_by_side(self, name):
        backbone = build(BACKBONES, name)
        batch, owner = make_batch(), backbone.token_modality
        assert owner.dtype == torch.int64
        assert owner.unique_consecutive().tolist() == list(range(len(SPECS)))
        for m, spec in enumerate(SPECS):
            fields = batch.observed_fields.get(spec.name)
            tokens = backbone.encode(spec.name, batch.values[spec.name], fields)
            assert tokens.values.shape[:2] == tokens.available.shape
            assert tokens.available.shape == (len(batch), int((owner == m).sum()))

    def test_a_part_of_the_tokens_is_refused(self, name):
        backbone = build(BACKBONES, name)
        fuse = encode_versions(backbone, make_batch())
        some = backbone.token_modality != 1
        for tokens, available in (
            (fuse.observed[:, some], fuse.observed_available[:, some]),
            (fuse.observed, fuse.observed_available[:, some]),
            (fuse.observed[0], fuse.observed_available[0]),
        ):
            with pytest.raises(ValueError, match="takes the tokens of all modalities"):
                backbone.fuse(tokens, available)

    def test_any_set_of_tokens_is_fused_and_the_others_change_nothing(self, name):
        backbone = build(BACKBONES, name)
        fuse = encode_versions(backbone, make_batch(40))
        draw = torch.rand(fuse.observed_available.shape, generator=torch.Generator().manual_seed(2))
        available = fuse.observed_available & (draw < 0.4)  # of some modalities a part is left
        available[:, 0] |= ~available.any(1)
        noise = torch.randn(fuse.observed.shape, dtype=torch.float64) * 100
        one = backbone.fuse(fuse.observed, available)
        two = backbone.fuse(torch.where(available[..., None], fuse.observed, noise), available)
        assert bool(one.logits.isfinite().all()) and bool(one.embedding.isfinite().all())
        torch.testing.assert_close(two.logits, one.logits, atol=1e-12, rtol=0)
        torch.testing.assert_close(two.embedding, one.embedding, atol=1e-12, rtol=0)

    def test_every_parameter_gets_a_gradient(self, name):
        backbone = build(BACKBONES, name).train()
        total = torch.zeros((), dtype=torch.float64)
        for seed in range(4):
            batch = make_batch(seed=seed)
            out = self.outputs(backbone, batch)
            total = total + out.logits.square().sum() + (out.embedding * 1.3).sum()
            own = backbone.own_loss(
                batch, 1.0, lambda logits: logits.square().sum(1), torch.Generator().manual_seed(0)
            )
            if own is not None:
                total = total + own.sum()
        total.backward()
        without = [
            n for n, p in backbone.named_parameters() if p.grad is None or not bool(p.grad.any())
        ]
        # The learned token of a blank cell stands for it but is, on purpose, never evidence.
        assert [n for n in without if not n.endswith(".blank")] == []

    def test_specific_modules_serve_one_modality_and_the_rest_serves_all(self, name):
        backbone = build(BACKBONES, name)
        if backbone.recovers:
            pytest.skip("has a loss of its own, and gradients of subsets are not decoupled")
        batch = make_batch()
        reached = []
        for m in range(len(SPECS)):
            alone = torch.zeros_like(batch.observed.available)
            alone[:, m] = True
            mask = dataclasses.replace(batch.observed, available=batch.observed.available & alone)
            rows = mask.available[:, m].nonzero().squeeze(1)
            out = self.outputs(backbone, dataclasses.replace(batch, observed=mask).rows(rows))
            gradients = torch.autograd.grad(
                out.logits.square().sum() + out.embedding.square().sum(),
                list(backbone.parameters()),
                allow_unused=True,
            )
            reached.append([g is not None and bool(g.any()) for g in gradients])
        times = torch.tensor(reached).sum(0).tolist()
        specific = {id(p) for module in backbone.specific_modules() for p in module.parameters()}
        for (key, p), n in zip(backbone.named_parameters(), times, strict=True):
            if not key.endswith(".blank"):
                assert (n == 1) if id(p) in specific else (n > 1), key

    def test_save_and_load_give_the_same_answer(self, name, tmp_path):
        backbone = build(BACKBONES, name)
        save_file(dict(backbone.state_dict()), tmp_path / "w.safetensors")
        other = build(BACKBONES, name, seed=9)
        other.load_state_dict(load_file(tmp_path / "w.safetensors"))
        assert torch.equal(
            self.outputs(backbone, make_batch()).logits, self.outputs(other, make_batch()).logits
        )


@pytest.fixture(scope="module")
def setting():
    """A toy backbone's view of a batch: fuse, mask, candidates, statistics."""
    imputer, backbone = build(IMPUTERS, "mopoe"), build(BACKBONES, "transformer")
    train = make_batch(60, seed=3)
    with torch.no_grad():
        statistics = fit_statistics(
            encode_versions(backbone, train),
            train.observed.available,
            train.labels,
            torch.ones(60, dtype=torch.float64),
            K,
            backbone.distance,
        )
        batch = make_batch(12, seed=4)
        recovery = imputer.recover(batch)
        fuse = encode_versions(backbone, batch, recovery)
    return fuse, batch.observed, recovery.candidates, statistics


@pytest.fixture(params=SELECTORS)
def selector(request, setting):
    """A selector, fitted to random labels where it needs a fit."""
    fuse, observed, candidates, statistics = setting
    found = SELECTORS[request.param]()
    if found.needs_fit:
        labels = torch.arange(len(candidates)) % K
        cases = Cases(fuse, observed, candidates, labels, torch.ones(len(candidates)), 1.3)
        with torch.no_grad():
            found.fit(cases, statistics)
    return found


class TestSelector:
    def select(self, selector, setting, rows=None):
        fuse, observed, candidates, statistics = setting
        if rows is not None:
            inner = fuse

            def fuse(r, used, admitted):
                return inner(rows[r], used, admitted)

            observed = ModalityMask(observed.names, observed.available[rows])
            candidates = candidates[rows]
        with torch.no_grad():
            return selector.select(fuse, observed, candidates, statistics)

    def test_used_contains_observed_and_only_candidates_are_added(self, selector, setting):
        trace = self.select(selector, setting)
        assert bool((trace.used >= trace.observed).all())
        assert torch.equal(trace.used, trace.observed | trace.admitted)
        assert not bool((trace.admitted & ~trace.candidates).any())
        assert torch.equal(trace.rejected, trace.candidates & ~trace.admitted)

    def test_arguments_are_not_changed(self, selector, setting):
        _, observed, candidates, statistics = setting
        before = observed.available.clone(), candidates.clone(), statistics.prototypes.clone()
        self.select(selector, setting)
        after = observed.available, candidates, statistics.prototypes
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def test_no_candidates_gives_the_observed_prediction(self, selector, setting):
        fuse, observed, candidates, statistics = setting
        trace = self.select(selector, (fuse, observed, torch.zeros_like(candidates), statistics))
        rows = torch.arange(len(candidates))
        with torch.no_grad():
            plain = fuse(rows, observed.available, torch.zeros_like(candidates))
        assert torch.equal(trace.output.logits, plain.logits)
        assert torch.equal(trace.used, observed.available)

    def test_output_is_the_fusion_of_what_was_used(self, selector, setting):
        trace = self.select(selector, setting)
        if trace.mixture is not None:
            pytest.skip("an average over subsets; see the next test")
        with torch.no_grad():
            again = setting[0](torch.arange(len(trace.used)), trace.used, trace.admitted)
        torch.testing.assert_close(trace.output.logits, again.logits, atol=1e-10, rtol=0)

    def test_an_average_is_that_of_its_subsets(self, selector, setting):
        trace = self.select(selector, setting)
        if trace.mixture is None:
            pytest.skip("the answer of one subset; see the test before")
        rows, admitted, weight = trace.mixture.rows, trace.mixture.admitted, trace.mixture.weight
        assert bool((weight >= 0).all()) and bool((rows.diff() >= 0).all())
        assert not bool((admitted & ~trace.candidates[rows]).any())
        with torch.no_grad():
            parts = setting[0](rows, trace.observed[rows] | admitted, admitted).logits
        temperature = selector.state()["temperature"]
        share = torch.softmax(parts / temperature, -1) * weight[:, None]
        mean = torch.zeros(len(trace.used), K, dtype=torch.float64).index_add(0, rows, share)
        torch.testing.assert_close(mean.sum(1), torch.ones(len(mean), dtype=torch.float64))
        answer = torch.softmax(trace.output.logits / temperature, -1)
        torch.testing.assert_close(answer, mean, atol=1e-10, rtol=0)
        trust = torch.zeros(trace.used.shape, dtype=torch.float64)
        trust.index_add_(0, rows, admitted * weight[:, None])
        assert torch.equal(trace.admitted, trust > 0.5)
        shown = ~trace.trust[0].isnan()
        assert torch.equal(shown, trace.candidates)
        torch.testing.assert_close(trace.trust[0][shown], trust[shown])

    def test_what_was_fitted_survives_json(self, selector, setting):
        again = type(selector)(selector.options)
        if selector.needs_fit:
            with pytest.raises(ValueError, match="must be fitted"):
                self.select(again, setting)
        again.load_state(json.loads(json.dumps(selector.state(), allow_nan=False)))
        one, two = self.select(selector, setting), self.select(again, setting)
        assert torch.equal(one.used, two.used)
        assert torch.equal(one.output.logits, two.output.logits)

    def test_fitting_again_gives_the_same_bits(self, selector, setting):
        if not selector.needs_fit:
            assert selector.state() == {}
            return
        fuse, observed, candidates, statistics = setting
        labels = torch.arange(len(candidates)) % K
        again = type(selector)(selector.options)
        cases = Cases(fuse, observed, candidates, labels, torch.ones(len(candidates)), 1.3)
        with torch.no_grad():
            again.fit(cases, statistics)
        assert again.state() == selector.state()

    def test_permuting_patients_permutes_the_answer(self, selector, setting):
        rows = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        whole, permuted = self.select(selector, setting), self.select(selector, setting, rows)
        assert torch.equal(permuted.used, whole.used[rows])
        torch.testing.assert_close(
            permuted.output.logits, whole.output.logits[rows], atol=1e-10, rtol=0
        )

    def test_a_batch_of_one_equals_its_row(self, selector, setting):
        whole = self.select(selector, setting)
        for i in range(12):
            alone = self.select(selector, setting, torch.tensor([i]))
            assert torch.equal(alone.used[0], whole.used[i])

    def test_nothing_observed_is_refused(self, selector, setting):
        fuse, observed, candidates, statistics = setting
        available = observed.available.clone()
        available[0] = False
        with pytest.raises(ValueError, match="at least one observed"):
            self.select(
                selector, (fuse, ModalityMask(observed.names, available), candidates, statistics)
            )


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
class TestModality:
    def test_every_kind_is_covered(self, spec):
        assert {s.kind for s in SPECS} == set(MODALITIES)

    def test_encoder_yields_the_tokens_it_announces(self, spec):
        encoder = modality(spec).encoder(16, {"width": 4, "grid": 2, "layers": 1, "heads": 2})
        encoder = encoder.double()
        batch = make_batch()
        tokens = encoder(batch.values[spec.name], batch.observed_fields.get(spec.name))
        assert tokens.values.shape == (len(batch), encoder.tokens, 16)
        assert tokens.available.shape == (len(batch), encoder.tokens)
        assert bool(tokens.values.isfinite().all())

    def test_likelihood_is_highest_at_its_mean(self, spec):
        handler = modality(spec)
        torch.manual_seed(0)
        decoder = handler.decoder(5, {"width": 4, "hidden": 8}).double()
        parameters = decoder(torch.randn(4, 5, dtype=torch.float64))
        mean = handler.mean(parameters)
        assert mean.shape == (4, *spec.shape)
        fields = torch.ones(mean.shape, dtype=torch.bool) if spec.kind == "table" else None
        best = handler.log_likelihood(parameters, mean, fields)
        other = make_batch(4).values[spec.name]
        assert bool((best >= handler.log_likelihood(parameters, other, fields)).all())
        assert best.shape == (4,)

    def test_blank_cells_do_not_count_in_the_likelihood(self, spec):
        if spec.kind != "table":
            pytest.skip("images have no cells")
        handler = modality(spec)
        decoder = handler.decoder(5, {"hidden": 8}).double()
        parameters = decoder(torch.randn(4, 5, dtype=torch.float64))
        values = make_batch(4).values[spec.name]
        nothing = torch.zeros(values.shape, dtype=torch.bool)
        assert torch.equal(
            handler.log_likelihood(parameters, values, nothing), torch.zeros(4).double()
        )

    def test_spec_survives_json(self, spec):
        assert ModalitySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
