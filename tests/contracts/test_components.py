"""Laws that every registered imputer, backbone, selector and modality kind obeys."""

import dataclasses
import json

import pytest
import torch

from dymo_med.backbones import BACKBONES
from dymo_med.imputers import IMPUTERS
from dymo_med.modalities import MODALITIES, modality
from dymo_med.selection import SELECTORS
from dymo_med.tasks import Classification, Regression
from dymo_med.testing import (
    BACKBONE_LAWS,
    IMPUTER_LAWS,
    NAMES,
    SELECTOR_LAWS,
    SPECS,
    TASK_LAWS,
    K,
    check_imputer,
    check_selector,
    check_task,
    fitted_selector,
    make_batch,
    selector_setting,
)
from dymo_med.types import ModalitySpec, Scale

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


@pytest.mark.parametrize("law", IMPUTER_LAWS)
@pytest.mark.parametrize("name", IMPUTERS)
def test_imputers(name, law):
    IMPUTER_LAWS[law](IMPUTERS[name], SMALL[name])


@pytest.mark.parametrize("law", BACKBONE_LAWS)
@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name, law):
    BACKBONE_LAWS[law](BACKBONES[name], SMALL[name])


@pytest.fixture(scope="module")
def setting():
    """A toy backbone's view of a batch: fuse, mask, candidates, statistics."""
    return selector_setting()


@pytest.mark.parametrize("law", SELECTOR_LAWS)
@pytest.mark.parametrize("name", SELECTORS)
def test_selectors(name, law, setting):
    SELECTOR_LAWS[law](fitted_selector(SELECTORS[name], setting), setting)


TASKS = {
    "classification": (Classification("grade", ("low", "high")), "high", "middling"),
    "regression": (Regression.of("y", Scale(0.0, 2.0, (0.0, 1.0, 2.0))), "1.5", "much"),
}


@pytest.mark.parametrize("law", TASK_LAWS)
@pytest.mark.parametrize("name", TASKS)
def test_tasks(name, law):
    TASK_LAWS[law](*TASKS[name])


class Careless(IMPUTERS["template"]):
    """Changes what was observed."""

    def recover(self, batch, **given):
        found = super().recover(batch, **given)
        return dataclasses.replace(found, values={k: v + 1 for k, v in found.values.items()})


def test_a_component_that_breaks_a_law_is_told_which():
    check_imputer(IMPUTERS["template"])
    with pytest.raises(AssertionError, match="observed values pass bit for bit"):
        check_imputer(Careless)
    check_selector(SELECTORS["trust_all"])
    check_task(*TASKS["classification"])


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
