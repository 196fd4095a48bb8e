"""The picture transforms that replace MONAI's give MONAI's numbers, bit for bit."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import ResizeWithPadOrCrop, ScaleIntensityRangePercentiles
from PIL import Image

from dymo_med.modalities.scan import ScanFacts
from dymo_med.modalities.transforms import (
    FACTS,
    KEY,
    FitFramed,
    PercentileRanged,
    percentiles,
    pipeline,
    read_scan,
)
from dymo_med.types import ModalitySpec


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 31, 17), (1, 1100, 1000), (1, 20, 22, 24)])
def test_percentiles(shape):
    values = torch.from_numpy(np.random.default_rng(0).normal(100, 40, shape).astype(np.float32))
    theirs = ScaleIntensityRangePercentiles(1, 99, b_min=0.0, b_max=1.0, clip=True)(values)
    assert torch.equal(PercentileRanged()({KEY: values})[KEY], theirs.as_tensor())
    tracked = MetaTensor(values, affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])))
    ours = PercentileRanged()({KEY: tracked})[KEY]
    assert torch.equal(ours.as_tensor(), theirs.as_tensor())
    assert torch.equal(ours.affine, tracked.affine)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16])
@pytest.mark.parametrize("shape", [(1, 5, 4, 3), (1, 20, 22, 24), (101,)])
def test_percentiles_of_whole_numbers_are_counted(dtype, shape):
    info, rng = np.iinfo(dtype), np.random.default_rng(0)
    for values in (rng.integers(info.min, info.max, shape, dtype, True), np.ones(shape, dtype)):
        counted = percentiles({KEY: torch.from_numpy(values), FACTS: ScanFacts((), "")})[:2]
        expected = np.percentile(values.astype(float), (1, 99))
        assert np.allclose(counted, expected, rtol=1e-6)


def test_of_a_small_mask_minimum_and_maximum_are_taken_and_a_warning_says_so():
    mask = torch.zeros(1, 30, 30)
    mask[0, 0, 0] = 255
    scaled = PercentileRanged()({KEY: mask, FACTS: ScanFacts((30, 30), "uint8")})
    assert torch.equal(scaled[KEY], mask / 255)
    assert "same value" in scaled[FACTS].warnings[0]


@pytest.mark.parametrize("rows", [8, 9, 12, 13])
@pytest.mark.parametrize("columns", [8, 9, 12, 13])
def test_pad_and_crop(rows, columns):
    picture = torch.rand(1, rows, columns)
    for size in ((10, 11), (11, 10)):
        fitted = FitFramed(size, (1.0, 1.0))({KEY: picture, "pixel_mm": (1.0, 1.0)})[KEY]
        assert torch.equal(fitted, ResizeWithPadOrCrop(size)(picture).as_tensor())


def test_a_picture_comes_out_as_monai_gives_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "m.png")
    spec = ModalitySpec("m", "image", "m.png", (3, 28, 28), (), "none")
    scan = read_scan(pipeline(spec), tmp_path / "m.png")
    assert isinstance(scan.image, MetaTensor)
    assert np.array_equal(scan.image.as_tensor().numpy(), np.moveaxis(pixels, -1, 0))
    assert scan.facts.shown() == {"size": "28 x 28", "dtype": "RGB"}
