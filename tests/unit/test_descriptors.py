"""Descriptors of a scan: what they say, and what they do not depend on."""

import numpy as np
import pytest
import torch

from dymo_med.data.batch import collate
from dymo_med.modalities.descriptors import NAMES, describe


def head(seed: int = 0, lesion: float = 0.0) -> np.ndarray:
    """Return a noisy ball on an empty background, with a bright lesion of some voxels."""
    rng = np.random.default_rng(seed)
    x = np.linspace(-1, 1, 24)
    inside = np.sqrt(sum(a**2 for a in np.meshgrid(x, x, x))) < 0.8
    scan = np.where(inside, 100 + 10 * rng.standard_normal(inside.shape), 0.0)
    scan[10:14, 10:14, 10:14] += lesion
    return scan[None]


def by_name(scan: np.ndarray, **options: bool) -> dict[str, float]:
    return dict(zip(NAMES, describe(scan, **options).tolist(), strict=True))


def test_gain_and_empty_margin_change_nothing_but_the_share():
    plain, louder = by_name(head()), by_name(3.7 * head())
    assert plain == pytest.approx(louder, rel=1e-5, abs=1e-5)
    wider = by_name(np.pad(head(), [(0, 0)] + [(6, 6)] * 3))
    share = "share of the field of view"
    assert wider.pop(share) == pytest.approx(plain.pop(share) * (24 / 36) ** 1.5, rel=1e-6)
    assert plain == pytest.approx(wider, rel=1e-5, abs=1e-5)


def test_numbers_are_what_their_names_say():
    scan = head(lesion=60.0)
    body = scan[scan != 0]
    low, centre, high = np.quantile(body, (0.25, 0.5, 0.75))
    z = (body - centre) / (high - low)
    told = by_name(scan)
    assert told["percentile 99.9"] == pytest.approx(np.quantile(z, 0.999), rel=1e-5)
    assert told["share above 2"] ** 2 == pytest.approx(np.mean(z > 2), rel=1e-5)
    assert told["share of the field of view"] ** 2 == pytest.approx(len(body) / scan.size)
    assert told["third moment"] ** 3 == pytest.approx(np.mean((z - z.mean()) ** 3), rel=1e-4)


def test_a_lesion_of_few_voxels_shows_in_the_tail():
    assert by_name(head(lesion=60.0))["percentile 99.9"] > by_name(head())["percentile 99.9"] + 1


def test_units_are_kept_where_intensities_have_one():
    told = by_name(head(), relative=False)
    assert told["percentile 50"] == pytest.approx(0.1, rel=0.01)
    assert told["standard deviation"] == pytest.approx(0.01, rel=0.05)


def test_a_volume_without_empty_background_is_cut_by_brightness():
    rng = np.random.default_rng(1)
    scan = head() + rng.uniform(1, 5, (1, 24, 24, 24))
    assert by_name(scan)["percentile 50"] == pytest.approx(0, abs=0.02)
    assert by_name(scan)["share of the field of view"] == pytest.approx(
        by_name(head())["share of the field of view"], rel=0.02
    )


@pytest.mark.parametrize(
    "scan",
    [np.r_[np.zeros(999), 1.0].reshape(1, 10, 10, 10), np.r_[np.ones(99), 2.0].reshape(1, 10, 10)],
    ids=["a mask of one voxel", "a picture of one value"],
)
def test_scans_almost_without_contrast_have_finite_descriptors(scan):
    assert torch.isfinite(describe(scan)).all()


def test_records_and_batches_carry_them(records, cohort):
    batch = collate(records, cohort.specs)
    for m, spec in enumerate(cohort.specs):
        assert (spec.name in batch.descriptors) == spec.is_image
        if spec.is_image:
            rows = batch.observed.available[:, m]
            assert batch.descriptors[spec.name].shape == (len(records), len(NAMES))
            assert batch.descriptors[spec.name][rows].abs().sum(1).gt(0).all()
    picked = batch.rows(torch.tensor([3, 1])).descriptors["t1"]
    assert torch.equal(picked, batch.descriptors["t1"][[3, 1]])
