"""The conditional imputer against closed forms of the normal distribution."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from dymo_med import gaussian
from dymo_med.imputers.conditional import Conditional
from dymo_med.inference.prediction_file import information
from dymo_med.types import Batch, Column, Logarithm, ModalityMask, ModalitySpec
from tests.contracts.test_components import NAMES as MANY
from tests.contracts.test_components import SPECS as MANY_SPECS
from tests.contracts.test_components import make_batch


def table(name, columns):
    return ModalitySpec(name, "table", "t.csv", (len(columns),), columns=columns)


def numbers(*names):
    return tuple(Column(name, "continuous", mean=0.0, std=1.0) for name in names)


SPECS = (table("a", numbers("a1", "a2")), table("b", numbers("b1", "b2", "b3")))
NAMES = ("a", "b")
D = 5
# Any covariance with unit variances will do; this one has strong and weak links of either sign.
_FACTOR = np.array([[0.9, 0.1], [0.5, -0.6], [0.8, 0.3], [-0.4, 0.7], [0.0, 0.6]])
SIGMA = _FACTOR @ _FACTOR.T
SIGMA += np.diag(1 - np.diag(SIGMA))
WEIGHTS = np.array([0.8, -0.5, 1.1, 0.7, -0.9])


def exact():
    """The imputer with the true mean and covariance."""
    imputer = Conditional(SPECS, Conditional.Options(shrinkage=1e-9)).eval()
    imputer.records.fill_(10**9)
    imputer.known.fill_(True)
    imputer.covariance.copy_(torch.from_numpy(SIGMA))
    imputer.root.copy_(torch.linalg.cholesky(imputer.covariance))
    return imputer


def rows_of(x, known, labels=None):
    """Rows of five numbers as records; `known` says which cells are filled."""
    x, known = torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(known)
    fields = {"a": known[:, :2], "b": known[:, 2:]}
    available = torch.stack([f.any(1) for f in fields.values()], 1)
    ids = tuple(f"r{i}" for i in range(len(x)))
    labels = torch.full((len(x),), -1) if labels is None else labels
    values = {"a": x[:, :2], "b": x[:, 2:]}
    return Batch(ids, ids, values, ModalityMask(NAMES, available), fields, labels)


def sample(n, seed=0):
    return np.random.default_rng(seed).multivariate_normal(np.zeros(D), SIGMA, n)


def truth(x, known):
    """Conditional mean and covariance of the unknown part, as every textbook has it."""
    o, u = np.flatnonzero(known), np.flatnonzero(~known)
    gain = SIGMA[np.ix_(u, o)] @ np.linalg.inv(SIGMA[np.ix_(o, o)])
    return gain @ x[o], SIGMA[np.ix_(u, u)] - gain @ SIGMA[np.ix_(o, u)], u


def joined(values):
    return torch.cat([values["a"], values["b"]], dim=-1)


def drawn(imputer, batch, number, seed=0):
    recovery = imputer.recover(batch)
    found = [joined(r.values) for r in imputer.draws(batch, recovery, number, seed=seed)]
    return torch.stack(found).numpy()  # (n, B, 5)


PATTERNS = [p for p in np.ndindex(2, 2, 2, 2, 2) if any(p) and not all(p)]


def test_best_guesses_are_conditional_means_for_every_pattern():
    x, known = sample(len(PATTERNS)), np.array(PATTERNS, dtype=bool)
    found = joined(exact().recover(rows_of(x, known)).values).numpy()
    for i, pattern in enumerate(known):
        mean, _, unknown = truth(x[i], pattern)
        assert found[i, unknown] == pytest.approx(mean, abs=1e-10)
        assert (found[i, pattern] == x[i, pattern]).all()


def test_draws_have_the_conditional_mean_and_covariance():
    pattern = np.array([True, False, False, True, False])
    x = sample(1)
    found = drawn(exact(), rows_of(x, pattern[None]), 1200)[:, 0]
    mean, covariance, unknown = truth(x[0], pattern)
    assert found[:, unknown].mean(0) == pytest.approx(mean, abs=0.1)
    assert np.cov(found[:, unknown].T) == pytest.approx(covariance, abs=0.1)


def test_intervals_and_draws_cover_what_was_hidden():
    n = 4000
    x = sample(n, seed=3)
    known = np.array(PATTERNS, dtype=bool)[np.arange(n) % len(PATTERNS)]
    batch, imputer = rows_of(x, known), exact()
    low, high = (
        np.concatenate([pair[k] for pair in imputer.cell_intervals(batch, NAMES, 0.9).values()], 1)
        for k in (0, 1)
    )
    inside = ((low <= x) & (x <= high))[~known]
    assert inside.mean() == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / inside.size))
    # Draws share their noise between patients, so it takes many for their quantiles to settle.
    some = rows_of(x[:600], known[:600])
    rank = (drawn(imputer, some, 300) < x[:600]).mean(0)[~known[:600]]
    assert ((rank > 0.05) & (rank < 0.95)).mean() == pytest.approx(0.9, abs=0.03)


def answers(x):
    """The exact answer of a probit model to complete rows."""
    return norm.cdf(x @ WEIGHTS)


def test_the_mean_answer_over_draws_is_the_answer_without():
    """The martingale identity: for exact models a recovery adds nothing."""
    x, known = sample(len(PATTERNS), seed=5), np.array(PATTERNS, dtype=bool)
    many = answers(drawn(exact(), rows_of(x, known), 1000))
    for i, pattern in enumerate(known):
        mean, covariance, unknown = truth(x[i], pattern)
        w = WEIGHTS[unknown]
        score = x[i, pattern] @ WEIGHTS[pattern] + w @ mean
        without = norm.cdf(score / math.sqrt(1 + w @ covariance @ w))
        error = many[:, i].std() / math.sqrt(len(many))
        assert many[:, i].mean() == pytest.approx(without, abs=4 * error + 1e-6)


def test_expected_information_is_the_exact_one():
    """Of measuring table b given a: entropy now, less its expectation by quadrature."""
    x = sample(4, seed=8)
    known = np.array([[True, True, False, False, False]] * len(x))
    many = answers(drawn(exact(), rows_of(x, known), 500))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)

    def entropy(p):
        p = np.clip(p, 1e-15, 1 - 1e-15)
        return -p * np.log2(p) - (1 - p) * np.log2(1 - p)

    for i in range(len(x)):
        mean, covariance, unknown = truth(x[i], known[i])
        w = WEIGHTS[unknown]
        score, variance = x[i, :2] @ WEIGHTS[:2] + w @ mean, w @ covariance @ w
        now = entropy(norm.cdf(score / math.sqrt(1 + variance)))
        then = entropy(norm.cdf(score + nodes * math.sqrt(variance)))
        gained = now - (weights * then).sum() / weights.sum()
        found = information([[1 - p, p] for p in many[:, i].tolist()])
        assert found == pytest.approx(gained, abs=0.06) and found > 0


def test_the_fit_finds_the_distribution_from_incomplete_unlabelled_rows():
    n = 3000
    x = sample(n, seed=1)
    known = np.random.default_rng(2).random((n, D)) < 0.7
    known[~known.any(1), 0] = True
    fitted, again = (Conditional(SPECS, Conditional.Options()) for _ in range(2))
    fitted.start_from(rows_of(x, known))
    assert fitted.covariance.numpy() == pytest.approx(SIGMA, abs=0.09)
    assert fitted.mean.numpy() == pytest.approx(np.zeros(D), abs=0.07)
    again.start_from(rows_of(x, known, torch.arange(n) % 2))
    assert torch.equal(fitted.covariance, again.covariance)  # labels are not looked at


def test_shrinkage_draws_the_covariance_to_its_diagonal():
    x = torch.from_numpy(sample(40))
    some, more = (gaussian.fit(x, s)[1] for s in (1.0, 20.0))
    off = ~torch.eye(D, dtype=torch.bool)
    assert float(more[off].abs().sum()) < 0.5 * float(some[off].abs().sum())
    torch.testing.assert_close(some.diagonal(), more.diagonal(), atol=1e-6, rtol=0)


def test_a_drawn_category_is_as_frequent_as_stated_and_goes_along_with_the_rest():
    columns = (
        Column("stage", "categorical", values=("i", "ii", "iii"), frequencies=(0.6, 0.3, 0.1)),
        Column("crp", "continuous", mean=0.0, std=1.0),
    )
    specs = (table("a", columns), table("b", numbers("b1")))
    g = np.random.default_rng(0)
    stage = g.choice(3, 800, p=[0.6, 0.3, 0.1])
    x = np.stack([stage, 0.7 * stage + g.normal(0, 1, 800)], 1)
    ids = tuple(f"r{i}" for i in range(800))
    filled = torch.ones(800, 2, dtype=torch.bool)
    values = {"a": torch.from_numpy(x), "b": torch.from_numpy(g.normal(0, 1, (800, 1)))}
    fields = {"a": filled, "b": filled[:, :1]}
    seen = ModalityMask(NAMES, filled)
    batch = Batch(ids, ids, values, seen, fields, torch.zeros(800, dtype=torch.int64))
    imputer = Conditional(specs, Conditional.Options())
    imputer.start_from(batch)
    part = batch.rows(torch.arange(1))
    part.observed.available[0, 0] = False
    part.observed_fields["a"][0] = False
    share = imputer.table_likelihood(part, ["a"])["a"][0, :3].exp()
    recovery = imputer.recover(part)
    found = torch.stack([r.values["a"][0] for r in imputer.draws(part, recovery, 800)])
    counted = torch.bincount(found[:, 0].long(), minlength=3) / len(found)
    torch.testing.assert_close(counted.double(), share.double(), atol=0.05, rtol=0)
    # Pairs that are drawn together are linked as those of patients are.
    assert np.corrcoef(found.T.numpy())[0, 1] == pytest.approx(np.corrcoef(x.T)[0, 1], abs=0.12)


def test_intervals_of_a_skewed_cell_are_exact_and_positive():
    column = Column(
        "crp", "continuous", "mg/L", (0.0, 500.0), 20.0, 30.0, logarithm=Logarithm(0.0, 2.0, 1.0)
    )
    specs = (table("a", (column,)), SPECS[1])
    imputer = Conditional(specs, Conditional.Options())
    imputer.records.fill_(1000)
    imputer.known.fill_(True)
    batch = rows_of(np.zeros((1, D)), np.ones((1, D), bool))
    values = {**batch.values, "a": torch.full((1, 1), 7.0, dtype=torch.float64)}
    hidden = {**batch.observed_fields, "a": torch.zeros(1, 1, dtype=torch.bool)}
    seen = ModalityMask(NAMES, torch.tensor([[False, True]]))
    batch = Batch(("r",), ("r",), values, seen, hidden, batch.labels)
    low, high = imputer.cell_intervals(batch, ["a"], 0.9)["a"]
    assert float(low) == pytest.approx(math.exp(2 - 1.6449), rel=1e-3)
    assert float(high) == pytest.approx(math.exp(2 + 1.6449), rel=1e-3)


def fitted_to_many(n=40):
    imputer = Conditional(MANY_SPECS, Conditional.Options(components=3)).double().eval()
    imputer.start_from(make_batch(n, seed=1))
    return imputer


def test_a_record_s_draws_do_not_depend_on_its_neighbours():
    imputer, batch = fitted_to_many(), make_batch()
    together = list(imputer.draws(batch, imputer.recover(batch), 2, seed=4))
    for i in range(len(batch)):
        one = batch.rows(torch.tensor([i]))
        alone = list(imputer.draws(one, imputer.recover(one), 2, seed=4))
        for a, b in zip(together, alone, strict=True):
            for name in MANY:
                if bool(a.candidates[i, MANY.index(name)]):
                    torch.testing.assert_close(a.values[name][i], b.values[name][0])
                    if name in a.descriptors:
                        torch.testing.assert_close(a.descriptors[name][i], b.descriptors[name][0])


def test_described_scans_have_the_components_that_were_drawn():
    imputer, batch = fitted_to_many(), make_batch()
    generator = torch.Generator().manual_seed(1)
    told = imputer.describe(batch, MANY, generator)
    code = imputer.code(batch, torch.Generator().manual_seed(1))[0]
    for name in ("volume", "film", "side"):
        center, reduce = imputer.get_buffer(f"center_{name}"), imputer.get_buffer(f"reduce_{name}")
        hidden = ~batch.observed.available[:, MANY.index(name)]
        back = ((told[name] - center) @ reduce.T)[hidden]
        torch.testing.assert_close(back, code[hidden][:, imputer.blocks[name]], atol=1e-6, rtol=0)


def test_scans_of_few_patients_are_not_recovered():
    batch = make_batch(40, seed=1)
    rows = batch.observed.available[:, 1].nonzero().squeeze(1)
    batch.observed.available[rows[9:], 1] = False
    imputer = Conditional(MANY_SPECS, Conditional.Options(components=3)).double()
    imputer.start_from(batch)
    can = imputer.recoverable(torch.ones(1, len(MANY), dtype=torch.bool))[0]
    assert [n for n, c in zip(MANY, can.tolist(), strict=True) if not c] == ["film"]
