"""The average patient: exact averages, and nobody's own scan."""

import pytest
import torch

from dymo_med.errors import ConfigError
from dymo_med.imputers import require_recovery
from dymo_med.imputers.template import Template
from dymo_med.types import Batch, Column, ModalityMask, ModalitySpec

SPECS = (
    ModalitySpec("scan", "image", "s.nii.gz", (1, 3, 4, 5), (1.0,) * 3, "zscore"),
    ModalitySpec("film", "image", "f.png", (1, 4, 4), (), "zscore"),
    ModalitySpec(
        "labs",
        "table",
        "t.csv",
        (3,),
        columns=(
            Column("crp", "continuous", range=(0.0, 80.0)),
            Column("stage", "categorical", values=("i", "ii", "iii")),
            Column("never", "continuous", range=(10.0, 30.0)),
        ),
    ),
)
NAMES = tuple(s.name for s in SPECS)


def cohort(n, seed=0, patients=None):
    g = torch.Generator().manual_seed(seed)
    values = {
        "scan": torch.randn(n, 1, 3, 4, 5, generator=g),
        "film": torch.randn(n, 1, 4, 4, generator=g),
        "labs": torch.stack(
            [80 * torch.rand(n, generator=g), torch.arange(n) % 3, torch.full((n,), 77.0)], 1
        ),
    }
    available = torch.ones(n, 3, dtype=torch.bool)
    available[0, 0] = available[1, 2] = False
    fields = torch.ones(n, 3, dtype=torch.bool)
    fields[:, 2] = False
    fields[1] = False
    fields[2, 0] = False
    fields[3, 1] = False
    ids = tuple(map(str, range(n)))
    mask = ModalityMask(NAMES, available)
    return Batch(ids, patients or ids, values, mask, {"labs": fields}, torch.zeros(n).long())


def build(specs=SPECS):
    return Template(specs, Template.Options())


def test_it_proposes_the_average_of_what_was_observed():
    train = cohort(12)
    imputer = build()
    imputer.start_from(train)
    test = cohort(5, 1)
    test.observed.available[3:] = torch.tensor([[True, False, False], [False, True, False]])
    test.observed_fields["labs"][3:] = False
    values = imputer.recover(test).values
    torch.testing.assert_close(values["scan"][4], train.values["scan"][1:].mean(0))
    torch.testing.assert_close(values["film"][3], train.values["film"].mean(0))
    crp = train.values["labs"][[0, *range(3, 12)], 0].mean()
    # Stages 0, 1, 2 in turn; row 1 has no table and row 3 (stage 0) a blank: 2 is left in front.
    for row in (3, 4):
        torch.testing.assert_close(values["labs"][row], torch.tensor([crp, 2.0, 20.0]))
    assert values["labs"][2].tolist() == [pytest.approx(float(crp)), 2, 20]  # blanks completed


def test_it_does_not_look_at_the_patient():
    imputer = build()
    imputer.start_from(cohort(12))
    observed = torch.tensor([[True, False, False], [False, False, True]])
    assert imputer.recoverable(observed).all()
    a, b = cohort(4, 1), cohort(4, 2)
    for batch in (a, b):
        batch.observed.available[:, 1] = False
    assert torch.equal(imputer.recover(a).values["film"], imputer.recover(b).values["film"])


@pytest.mark.parametrize(
    ("patients", "known"),
    [(tuple("abcdefghijk"), [True, True, True]), (tuple("abcdefghijj"), [False, True, True])],
)
def test_few_patients_scans_are_not_shown(patients, known):
    """Eleven records, the first without the scan: ten patients are enough, nine are not."""
    imputer = build()
    imputer.start_from(cohort(11, patients=patients))
    observed = torch.ones(1, 3, dtype=torch.bool)
    assert imputer.recoverable(observed).tolist() == [known]
    assert bool(imputer.get_buffer("average_scan").any()) == known[0]
    missing = cohort(11, 1)
    missing.observed.available[:, 0] = False
    assert imputer.recover(missing).recovered[:, 0].all() == known[0]


def test_a_cohort_of_scans_of_few_patients_is_refused():
    imputer = build(SPECS[:2])
    batch = cohort(5)
    imputer.start_from(batch)
    with pytest.raises(ConfigError, match=r"Imputer template: it can recover none of scan, film"):
        require_recovery(imputer, "template")
    imputer.start_from(cohort(12))
    require_recovery(imputer, "template")


def test_before_it_is_fitted_it_says_so():
    with pytest.raises(RuntimeError, match="Template knows no training records yet"):
        build().recover(cohort(5))
