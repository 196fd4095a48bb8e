"""Plain references: as scikit-learn says, kept as arrays, and mixed with a network."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dymo_med import gaussian
from dymo_med.bundle import load_bundle, save_bundle
from dymo_med.calibration import supported
from dymo_med.inference.answer import answer
from dymo_med.inference.compare import comparator_probabilities
from dymo_med.references import (
    REFERENCES,
    FittedReference,
    Layout,
    Mixed,
    References,
    Training,
    features_of,
)
from dymo_med.tasks import PLAIN
from dymo_med.training.references import SHARES, Held, warning_of, weigh
from dymo_med.types import Batch, FusionOutput, ModalityMask, Scale

CATEGORIES = (0, 0, 5, 0, 300, *[0] * 6)
LAYOUT = Layout((*[0] * 5, *[1] * 6), CATEGORIES, (*[False] * 5, *[True] * 6))


def rows(n, seed=0, gaps=0.2):
    """Return features with gaps, categories among them, and the score behind the truth."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, len(LAYOUT)))
    x[:, 2] = rng.choice([0, 1, 4], n)  # categories 2 and 3 are never met
    x[:, 4] = rng.integers(0, 300, n)
    score = 1.5 * x[:, 0] + x[:, 6] + 2 * (x[:, 2] == 1)
    x[rng.random(x.shape) < gaps] = np.nan
    x[: n // 4, 5:] = np.nan
    return torch.from_numpy(x), torch.from_numpy(score)


def training(classes, n=60, scale=None):
    """Return training data of two visits per patient."""
    x, score = rows(n)
    values = None
    if scale is not None:
        values = score.clamp(scale.low, scale.high)
        labels = scale.shares(values).argmax(1)
    else:
        labels = torch.bucketize(score, score.quantile(torch.arange(1, classes).double() / classes))
    patients = [f"p{i // 2}" for i in range(n)]
    return Training(x, labels, values, torch.ones(n).double(), patients, x, 0)


SCALE = Scale(-4.0, 4.0, (-4.0, -2.0, 0.0, 2.0, 4.0))
KINDS = [("two", 2, None), ("three", 3, None), ("number", 5, SCALE)]


@pytest.fixture(scope="module", params=KINDS, ids=[k[0] for k in KINDS])
def fitted(request):
    """Every reference, fitted."""
    _, classes, scale = request.param
    data = training(classes, scale=scale)
    models, settings = {}, {}
    for name, kind in REFERENCES.items():
        model = kind(LAYOUT, classes, scale)
        settings[name] = model.fit(data, models)
        models = {**models, name: model}
    return data, models, settings


def test_boosting_is_scikit_learns(fitted):
    data, models, settings = fitted
    chosen = {k: v for k, v in settings["boosting"].items() if k != "cross_validation"}
    theirs = models["boosting"]._fitted(data, torch.arange(len(data.labels)), chosen)
    x, _ = rows(300, seed=1, gaps=0.4)
    x[:, 2] = torch.arange(300) % 5  # categories that training never met, too
    ours = models["boosting"].probabilities(x)
    if data.values is None:
        assert np.abs(ours.numpy() - theirs.predict_proba(x.numpy())).max() < 1e-12
    else:
        raw = models["boosting"]._walk(x)[:, 0]
        assert np.abs(raw.numpy() - theirs.predict(x.numpy())).max() < 1e-12
        inside = (raw.abs() < 1) & (models["boosting"].state()["deviation"] < 1)
        assert torch.allclose(SCALE.value(ours)[inside], raw[inside], atol=1e-6)


@pytest.mark.parametrize(("classes", "scale"), [(2, None), (5, SCALE)], ids=["two", "number"])
def test_what_no_labelled_patient_has_changes_no_answer(classes, scale):
    data = training(classes, scale=scale)
    absent = [1, 2, *range(5, 11)]  # a number, a category, a scan
    bare = data.features.clone()
    bare[:, absent] = torch.nan
    data = replace(data, features=bare)  # everybody, labelled or not, still has it
    x, _ = rows(20, seed=3, gaps=0.0)
    x[:, [2, 4]] = x[:, [2, 4]].nan_to_num(0.0)
    without = x.clone()
    without[:, absent] = torch.nan
    models = {}
    for name, kind in REFERENCES.items():
        model = kind(LAYOUT, classes, scale)
        model.fit(data, models)
        models = {**models, name: model}
        assert model.probabilities(x).isfinite().all()
    boosting = models["boosting"]
    assert torch.equal(boosting.probabilities(x), boosting.probabilities(without))


def test_references_keep_their_answers_on_disk_and_know_more_than_shares(fitted):
    data, models, _ = fitted
    x, _ = rows(50, seed=2)
    others = {}
    for name, model in models.items():
        again = REFERENCES[name](LAYOUT, model.classes, model.scale)
        again.load_state(model.state(), others)
        others = {**others, name: again}
        p = model.probabilities(x)
        assert torch.equal(p, again.probabilities(x))
        assert torch.allclose(p.sum(1), torch.ones(50).double())
        # A row depends on itself alone, and nothing at all is answered too.
        assert torch.allclose(model.probabilities(x[:1]), p[:1], atol=1e-12)
        assert bool(model.probabilities(torch.full_like(x[:1], torch.nan)).isfinite().all())
        own = model.logits(data.features)[torch.arange(len(data.labels)), data.labels]
        shares = torch.bincount(data.labels, minlength=model.classes).double() / len(data.labels)
        assert -own.mean() < -(shares * shares.clamp_min(1e-9).log()).sum()


@pytest.mark.parametrize(
    ("name", "key", "change"),
    [
        ("boosting", "left", lambda t: torch.zeros_like(t)),
        ("boosting", "feature", lambda t: t + 99),
        ("boosting", "threshold", lambda t: t * torch.nan),
        ("boosting", "value", lambda t: t.float()),
        ("logistic", "scale", lambda t: -t),
        ("logistic", "source", lambda t: t + 999),
        ("logistic", "coefficients", lambda t: t[:-1]),
    ],
)
def test_arrays_of_no_such_model_are_refused(fitted, name, key, change):
    _, models, _ = fitted
    model = models[name]
    again = REFERENCES[name](LAYOUT, model.classes, model.scale)
    with pytest.raises(ValueError, match="cannot be right"):
        again.load_state({**model.state(), key: change(model.state()[key])}, {})


def test_joint_normal_distribution_finds_what_made_the_rows():
    generator = torch.Generator().manual_seed(0)
    root = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [-0.5, 0.2, 0.8]], dtype=torch.float64)
    x = torch.randn(3000, 3, generator=generator, dtype=torch.float64) @ root.T
    truth = x.T @ x / len(x)
    x[torch.rand(x.shape, generator=generator) < 0.3] = torch.nan
    mean, covariance = gaussian.fit(x)
    assert mean.abs().max() < 0.06
    assert (covariance - truth).abs().max() < 0.08
    weights, left = gaussian.conditional(covariance, torch.tensor([[True, False, True]]))
    assert weights[0, 0, 0] == pytest.approx(1.0)
    assert left[0, 0, 0] == 0 < left[0, 1, 1] < covariance[1, 1]


@pytest.mark.parametrize("sums", [1, 3])
def test_what_is_known_tells_of_sums_what_it_tells_of_their_parts(sums):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(200, 12, generator=g).double() @ torch.randn(12, 12, generator=g).double()
    covariance = gaussian.fit(x / x.std(0))[1]
    coefficients = torch.randn(12, sums, generator=g).double()
    known = torch.rand(40, 12, generator=g) < torch.rand(40, 1, generator=g)
    known[0], known[1] = False, True
    weights, left = gaussian.conditional(covariance, known)
    of_sums, spread = gaussian.projected(covariance, known, coefficients)
    assert torch.allclose(of_sums, weights @ coefficients, atol=1e-10)
    assert torch.allclose(spread, coefficients.T @ left @ coefficients, atol=1e-10)


# --- Mixing ---------------------------------------------------------------------------------------


class Known:
    """A reference that says a column of its features is the positive class's probability."""

    partner = True

    classes, scale = 2, None

    def __init__(self):
        self.layout = Layout((0,), (0,), (False,))

    def logits(self, features):
        p = features[:, 0].nan_to_num(0.5)
        return torch.stack([1 - p, p], dim=1).log()


def held(n, network, reference, seed=0):
    """Return n patients, of whom network and reference know the truth with some log odds."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    sign = labels * 2.0 - 1

    def says(strength):
        odds = strength * sign + torch.randn(n, generator=generator)
        return odds.sigmoid().double()

    own = says(network)
    ids = tuple(f"p{i}" for i in range(n))
    batch = Batch(
        ids,
        ids,
        {"t": torch.zeros(n, 1)},
        ModalityMask(("t",), torch.ones(n, 1).bool()),
        {},
        labels,
    )

    def fuse(rows, used, admitted):
        p = own[rows]
        return FusionOutput(torch.stack([1 - p, p], dim=1).log(), torch.zeros(len(rows), 2))

    return Held(batch, says(reference)[:, None], fuse, 1.0)


@pytest.mark.parametrize(
    ("n", "network", "reference", "weights", "warned"),
    [
        (60, 0.0, 2.0, {0.0, 0.25}, True),  # the network knows nothing
        (60, 2.0, 0.0, {0.75, 1.0}, False),
        (200, 1.0, 1.0, set(SHARES) - {0.0, 1.0}, None),  # two that err apart are better together
        (20, 1.0, 0.8, {0.5}, None),  # nobody can tell: equal shares
        (8, 0.0, 2.0, {1.0}, False),  # too few to tell
    ],
)
def test_a_reference_takes_part_where_it_is_better_beyond_chance(
    n, network, reference, weights, warned
):
    known = FittedReference(Known(), 1.0, {})
    found = weigh(
        References(known.model.layout, {"known": known}), [held(n, network, reference)], PLAIN, 0
    )
    assert found.weight in weights
    assert found.patients == n
    assert warned is None or bool(warning_of(found)) == warned
    if warned:
        assert "known" in warning_of(found)
        assert found.losses["answer"] < found.losses["network"]


# --- In a bundle ----------------------------------------------------------------------------------


def test_a_bundle_keeps_its_references(bundle, bundle_dir, records):
    assert list(bundle.references.fitted) == list(REFERENCES)
    assert bundle.references.why
    assert "Plain references" in (bundle_dir / "docs" / "README.md").read_text()
    answers = answer(bundle, records[:4])
    said = comparator_probabilities(bundle, answers.batch)
    for name, fitted in bundle.references.fitted.items():
        p = fitted.probabilities(features_of(answers.batch, bundle.specs))
        assert torch.equal(said[name], supported(p, bundle.calibration.patients))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_mixed_bundle_answers_by_both(bundle, records, weight, tmp_path):
    from dataclasses import replace

    references = replace(bundle.references, weight=weight, partner="logistic", why="For a test.")
    mixed = replace(bundle, references=references)
    save_bundle(mixed, tmp_path / "bundle")
    mixed = load_bundle(tmp_path / "bundle", "cpu")
    alone = answer(replace(bundle, references=None), records)
    both = answer(mixed, records)
    assert isinstance(both.fuse, Mixed)
    plain = comparator_probabilities(mixed, both.batch)["logistic"]
    wanted = weight * alone.probabilities["observed_only"] + (1 - weight) * plain
    assert torch.allclose(both.probabilities["observed_only"], wanted, atol=1e-5)
    # A recovery enters the reference: what it says of everything differs from what it says of
    # what was observed.
    some = alone.recovery.candidates.any(1)
    every = both.probabilities["trust_all"] - weight * alone.probabilities["trust_all"]
    assert not torch.allclose(every[some], ((1 - weight) * plain)[some], atol=1e-3)


def test_the_network_alone_keeps_its_bits(bundle, records):
    from dataclasses import replace

    whole = replace(bundle, references=replace(bundle.references, weight=1.0, partner=""))
    one, two = answer(whole, records[:5]), answer(replace(bundle, references=None), records[:5])
    for name, p in one.probabilities.items():
        assert torch.equal(p, two.probabilities[name])


def test_a_mixed_answer_is_explained_as_what_it_is(bundle, records):
    from dataclasses import replace

    from dymo_med.inference.predict import predict_batch

    references = replace(bundle.references, weight=0.5, partner="reference_mean")
    mixed = replace(bundle, references=references)
    for found in predict_batch(mixed, records[:3]):
        whole = sum(a.value for a in found.attributions if not a.name)
        chosen = max(range(2), key=lambda k: found.probabilities[k])
        start = bundle.base_rates[chosen]
        assert start + whole == pytest.approx(found.probabilities[chosen], abs=1e-6)
        cells = [a for a in found.attributions if a.name]
        assert any(a.value for a in cells)


@pytest.mark.parametrize(("classes", "scale"), [k[1:] for k in KINDS], ids=[k[0] for k in KINDS])
def test_blanks_only_looks_at_no_value_and_finds_a_gap_that_tells(classes, scale):
    data = training(classes, scale=scale)
    features = data.features.clone()
    last = data.labels == classes - 1
    features[:, 0] = torch.where(last, torch.nan, features[:, 0].nan_to_num(0.0))
    features[~last, 1] = features[~last, 1].nan_to_num(0.0)
    kind = REFERENCES["blanks_only"]
    model = kind(LAYOUT, classes, scale)
    model.fit(replace(data, features=features), {})
    told = model.probabilities(features)[:, -1]
    assert float(told[last].mean()) > float(told[~last].mean()) + 0.2
    noise = torch.where(features.isnan(), features, torch.randn_like(features).abs().round())
    assert torch.equal(model.probabilities(noise), model.probabilities(features))
    assert not kind.partner


def test_a_pattern_of_gaps_that_tells_more_than_the_network_is_said_and_gets_no_part():
    """Whatever it answers, it has no part in a bundle's answers, and a warning names it."""
    references = References(
        LAYOUT,
        {"blanks_only": FittedReference(REFERENCES["blanks_only"](LAYOUT, 2, None), 1.0, {})},
        better=("blanks_only",),
        losses={"network": 0.7, "blanks_only": 0.5, "answer": 0.7},
        patients=40,
    )
    assert "looks at no value" in warning_of(references)

    class Gaps(Known):
        partner = False

    gaps = FittedReference(Gaps(), 1.0, {})
    found = weigh(
        References(gaps.model.layout, {"blanks_only": gaps}), [held(60, 0.0, 2.0)], PLAIN, 0
    )
    assert found.weight == 1.0 and found.better == ("blanks_only",)
    assert "looks at no value" in warning_of(found)
