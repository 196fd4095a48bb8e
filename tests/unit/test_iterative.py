"""The chained regressions equal scikit-learn's, and recover what they say they do."""

import numpy as np
import pytest
import torch
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer

from dymo_med.errors import ConfigError
from dymo_med.imputers import require_recovery
from dymo_med.imputers.iterative import Iterative
from dymo_med.types import Batch, Column, ModalityMask, ModalitySpec

SPECS = (
    ModalitySpec("scan", "image", "s.png", (1, 4, 4), (), "zscore"),
    ModalitySpec(
        "labs",
        "table",
        "t.csv",
        (3,),
        columns=(
            Column("crp", "continuous", "mg/L", (0.0, 60.0), mean=30.0, std=20.0),
            Column("stage", "categorical", values=("i", "ii", "iii", "iv")),
            Column("ldh", "continuous", "U/L", mean=200.0, std=40.0),
        ),
    ),
    ModalitySpec(
        "person",
        "table",
        "p.csv",
        (2,),
        columns=(
            Column("sex", "categorical", values=("F", "M")),
            Column("age", "continuous", "years", mean=60.0, std=9.0),
        ),
    ),
)
NAMES = tuple(s.name for s in SPECS)


def cohort(n, seed=0, missing=0.2):
    """One hidden severity behind everything; cells and whole tables are missing at random."""
    g = torch.Generator().manual_seed(seed)
    severity = torch.randn(n, generator=g).double()
    noise = 0.3 * torch.randn(4, n, generator=g).double()
    stage = ((severity + noise[0]) * 1.2 + 2).floor().clamp(0, 3)
    labs = torch.stack(
        [(30 + 20 * (severity + noise[1])).clamp(0, 60), stage, 200 + 40 * (severity + noise[2])],
        1,
    )
    sex = (torch.rand(n, generator=g) < 0.5).double()
    person = torch.stack([sex, 60 + 9 * (0.6 * severity + sex + noise[3])], 1)
    fields = {
        "labs": torch.rand(n, 3, generator=g) >= missing,
        "person": torch.rand(n, 2, generator=g) >= missing,
    }
    available = torch.ones(n, 3, dtype=torch.bool)
    for m, name in ((1, "labs"), (2, "person")):
        fields[name] &= torch.rand(n, 1, generator=g) >= missing / 2
        available[:, m] = fields[name].any(1)
    values = {"scan": torch.randn(n, 1, 4, 4, generator=g), "labs": labs, "person": person}
    ids = tuple(map(str, range(n)))
    return Batch(ids, ids, values, ModalityMask(NAMES, available), fields, torch.zeros(n).long())


def by_hand(batch):
    """The documented features, in numpy: standardised, or indicators of all but the first."""
    labs, person = batch.values["labs"].numpy(), batch.values["person"].numpy()
    columns = [
        (labs[:, 0] - 30) / 20,
        *(np.where(labs[:, 1] == k, 1.0, 0.0) for k in (1, 2, 3)),
        (labs[:, 2] - 200) / 40,
        person[:, 0],
        (person[:, 1] - 60) / 9,
    ]
    known = np.concatenate([batch.observed_fields[n].numpy() for n in NAMES[1:]], 1)
    known = known[:, [0, 1, 1, 1, 2, 3, 4]]
    return np.where(known, np.stack(columns, 1), np.nan)


def build(**options):
    return Iterative(SPECS, Iterative.Options(**options))


@pytest.mark.filterwarnings("ignore:.*Early stopping criterion not reached")
@pytest.mark.parametrize(("rounds", "tolerance"), [(10, 1e-3), (4, 0.0), (40, 0.05)])
def test_it_proposes_what_scikit_learn_transforms_to(rounds, tolerance):
    train, test = cohort(150), cohort(60, 1, missing=0.4)
    imputer = build(rounds=rounds, tolerance=tolerance)
    imputer.start_from(train)
    features = by_hand(train)
    low = [-1.5, 0, 0, 0, -np.inf, 0, -np.inf]
    high = [1.5, 1, 1, 1, np.inf, 1, np.inf]
    chain = IterativeImputer(max_iter=rounds, tol=tolerance, min_value=low, max_value=high)
    chain.fit(features[~np.isnan(features).all(1)])
    if tolerance > 0.01:
        assert int(imputer.rounds) == chain.n_iter_ < rounds  # it stopped early
    expected = chain.transform(by_hand(test))

    got, known = imputer.features(test)
    np.testing.assert_allclose(got.numpy()[known.numpy()], expected[known.numpy()], atol=1e-12)
    proposed = imputer.propose(test, ("labs", "person"), None)
    labs, person = proposed["labs"].numpy(), proposed["person"].numpy()
    first = 1 - expected[:, 1:4].sum(1, keepdims=True)
    stage = np.concatenate([first, expected[:, 1:4]], 1).argmax(1)
    np.testing.assert_allclose(labs[:, 0], expected[:, 0] * 20 + 30, rtol=1e-9)
    np.testing.assert_allclose(labs[:, 2], expected[:, 4] * 40 + 200, rtol=1e-9)
    np.testing.assert_allclose(person[:, 1], expected[:, 6] * 9 + 60, rtol=1e-9)
    np.testing.assert_array_equal(labs[:, 1], stage)
    np.testing.assert_array_equal(person[:, 0], expected[:, 5] > 0.5)


def test_blank_cells_follow_the_other_cells():
    """A category of four leaves the most frequent one, which it would not with four indicators."""
    imputer = build()
    imputer.start_from(cohort(300))
    truth = cohort(200, 1, missing=0.0)
    blank = cohort(200, 1, missing=0.0)
    blank.observed_fields["labs"][:, 1] = False
    recovery = imputer.recover(blank)
    right = (recovery.values["labs"] == truth.values["labs"]).double().mean(0)
    most_frequent = truth.values["labs"][:, 1].long().bincount().max() / 200
    assert recovery.completed[:, 1].all()
    assert right[[0, 2]].tolist() == [1, 1]
    assert float(right[1]) > float(most_frequent) + 0.15

    absent = cohort(200, 1, missing=0.0)
    absent.observed.available[:, 1] = False
    absent.observed_fields["labs"].fill_(False)
    guess = imputer.recover(absent).values["labs"][:, 2]
    error = (guess - truth.values["labs"][:, 2]).abs().mean()
    spread = (truth.values["labs"][:, 2] - 200).abs().mean()
    assert float(error) < 0.85 * float(spread)


def test_proposals_stay_within_the_declared_range():
    imputer = build()
    imputer.start_from(cohort(150))
    extreme = cohort(2, missing=0.0)
    extreme.values["labs"][:, 2] = torch.tensor([200 + 40 * 8.0, 200 - 40 * 8.0])
    extreme.observed_fields["labs"][:, 0] = False
    assert imputer.recover(extreme).values["labs"][:, 0].tolist() == [60, 0]


def test_without_any_table_it_declares_nothing():
    imputer = build()
    imputer.start_from(cohort(100))
    scan, labs = [True, False, False], [True, True, False]
    declared = imputer.recoverable(torch.tensor([scan, labs]))
    assert declared.tolist() == [[False] * 3, [False, True, True]]
    batch = cohort(3, missing=0.0)
    batch.observed.available[0, 1:] = False
    batch.observed_fields["labs"][0] = False
    batch.observed_fields["person"][0] = False
    batch.observed.available[1, 0] = False
    assert not bool(imputer.recover(batch).recovered.any())  # no table, no scan: both stay absent


def test_imputers_that_can_recover_nothing_are_refused():
    def spec(name, *columns):
        return ModalitySpec(name, "table", "t.csv", (len(columns),), columns=columns)

    x, y = Column("x", "continuous"), Column("y", "continuous")
    options = Iterative.Options()
    require_recovery(Iterative(SPECS, options), "iterative")
    require_recovery(Iterative((spec("a", x), spec("b", y)), options), "iterative")
    require_recovery(Iterative((SPECS[0], spec("a", x, y)), options), "iterative")
    for specs in ((SPECS[0], SPECS[0]), (SPECS[0], spec("a", x))):
        with pytest.raises(ConfigError, match=r"Imputer iterative: it can recover none of scan"):
            require_recovery(Iterative(specs, options), "iterative")
    require_recovery(Iterative(SPECS[:1], options), "iterative")  # there is nothing to ask for


def test_columns_and_categories_that_training_never_saw():
    train = cohort(80, missing=0.0)
    train.observed_fields["labs"][:, 2] = False
    train.values["labs"][:, 1].clamp_(max=2)  # nobody at stage iv
    imputer = build()
    imputer.start_from(train)
    blank = cohort(20, 1, missing=0.0)
    blank.observed_fields["labs"][:, 1:] = False
    proposed = imputer.recover(blank).values["labs"]
    assert torch.equal(proposed[:, 2], torch.full((20,), 200.0).double())  # the spec's own mean
    assert bool((proposed[:, 1] < 3).all()) and len(proposed[:, 1].unique()) > 1


def test_before_it_is_fitted_it_says_so():
    with pytest.raises(RuntimeError, match="Iterative knows no training records yet"):
        build().recover(cohort(5, missing=0.5))
