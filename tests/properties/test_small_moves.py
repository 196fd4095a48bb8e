"""An image on its grid moves with the scan: a small move changes it little, whatever the scheme."""

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from dymo_med.modalities import modality, resample
from dymo_med.modalities.resample import Resampler, standardised
from dymo_med.types import ModalitySpec

SHAPE = (26, 24, 20)
MOVES = (1e-4, 1e-3, 0.01, 0.1, 0.5, 1.0)  # in voxels of the grid, at the rim of the head


def head(shape=SHAPE, seed=0):
    """Return a bright ball with structure on a background of exactly 0."""
    axes = np.meshgrid(*(np.linspace(-1.2, 1.2, n) for n in shape), indexing="ij")
    inside = sum(a**2 for a in axes) < 1
    noise = np.random.default_rng(seed).normal(0, 40, shape)
    return np.where(inside, (900 + 300 * axes[0] + noise).clip(50), 0).astype(np.int16)


def spec_of(name, intensity, spacing, grid="shared", dims=3):
    size = (1, 18, 18, 18)[: dims + 1]
    return ModalitySpec(name, "image", f"{name}.nii", size, (spacing,) * dims, intensity, grid=grid)


def turned(affine, radians):
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_rotvec(radians * np.array([0.6, 0.0, 0.8])).as_matrix()
    return turn @ affine


def shifted(affine, mm):
    moved = affine.copy()
    moved[:3, 3] += mm * np.array([0.6, 0.0, 0.8])
    return moved


def save(path, values, affine):
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def affine_of(spacing=2.0, shape=SHAPE):
    affine = np.diag([spacing] * 3 + [1.0])
    affine[:3, 3] = -spacing * (np.array(shape) - 1) / 2
    return affine


@pytest.mark.parametrize("grid", ["shared", "reference", "own"])
@pytest.mark.parametrize("move", ["shift", "rotation"])
@pytest.mark.parametrize("intensity", ["zscore", "percentile", "none"])
@pytest.mark.parametrize("spacing", [2.0, 3.1])  # voxel on voxel, and smoothed
def test_the_image_changes_by_no_more_than_the_move(tmp_path, spacing, intensity, move, grid):
    first = modality(spec_of("t1", "none", spacing, "reference"))
    second = modality(spec_of("t2", intensity, spacing, grid))
    save(tmp_path / "t1.nii", head(seed=1), affine_of())
    beside = {first.spec: first.read(tmp_path, "Patient p")}

    def image(amount):
        affine = affine_of()
        radius = 2.0 * max(SHAPE) / 2
        if move == "shift":
            affine = shifted(affine, amount * spacing)
        else:
            affine = turned(affine, amount * spacing / radius)
        save(tmp_path / "t2.nii", head(), affine)
        return second.read_beside(beside, tmp_path, "Patient p").values

    still = image(0.0)
    contrast = float(still.max() - still.min())
    for amount in MOVES:
        change = float((image(amount) - still).abs().max())
        # Linear interpolation: a move of s voxels changes a voxel by s times what neighbours
        # differ by, along each of the axes; a rotation moves a corner of the grid further.
        assert change <= 4 * amount * contrast + 1e-5 * contrast, amount
        if amount == 0.5 and (grid == "shared" or move == "rotation"):
            assert change > 0.01 * contrast


@pytest.mark.parametrize("intensity", ["zscore", "percentile", "none"])
def test_a_slice_does_not_depend_on_where_it_lies(tmp_path, intensity):
    kind = modality(spec_of("film", intensity, 2.0, dims=2))
    slab = head()[:, :, 9:10]
    save(tmp_path / "film.nii", slab, affine_of())
    still = kind.read(tmp_path, "Patient p").values
    for amount in MOVES[:-1]:
        for affine in (shifted(affine_of(), amount), turned(affine_of(), amount)):
            save(tmp_path / "film.nii", slab, affine)
            assert (kind.read(tmp_path, "Patient p").values - still).abs().max() < 1e-4


@pytest.mark.parametrize("size", [12, 17, 30])
def test_the_rim_of_a_picture_counts_for_what_is_in_it(tmp_path, size):
    """A picture of another size: the rim's blend of tissue and background is no dark tissue."""
    kind = modality(ModalitySpec("film", "image", "film.png", (1, size, size), (), "zscore"))
    pixels = np.zeros((25, 25), np.uint8)
    pixels[4:21, 4:12], pixels[4:21, 12:20] = 100, 200
    Image.fromarray(pixels).save(tmp_path / "film.png")
    values = kind.read(tmp_path, "Patient p").values[0]
    middle, quarter = size // 2, round(0.13 * size)
    assert values[middle, middle - quarter] == pytest.approx(-1, abs=0.12)
    assert values[middle, middle + quarter] == pytest.approx(1, abs=0.12)
    assert values[0].abs().max() < 1e-4 and values.min() > -1.2


def test_standardised_is_the_usual_formula_where_voxels_are_whole():
    values = np.random.default_rng(0).normal(500, 50, (6, 7, 8)).astype(np.float32)
    values[:2] = 0
    share = (values != 0).astype(np.float32)
    inside = values[2:]
    expected = np.where(share, (values - inside.mean()) / inside.std(), 0)
    assert np.allclose(standardised(values, share), expected, atol=1e-4)
    assert not standardised(0 * values, 0 * share).any()


def test_half_a_voxel_of_tissue_counts_half():
    values = np.array([10.0, 20.0, 15.0], np.float32)  # the last: half of a tissue of 30
    share = np.array([1.0, 1.0, 0.5], np.float32)
    mean = (10 + 20 + 0.5 * 30) / 2.5
    deviation = np.sqrt(((10 - mean) ** 2 + (20 - mean) ** 2 + 0.5 * (30 - mean) ** 2) / 2.5)
    expected = [(10 - mean) / deviation, (20 - mean) / deviation, 0.5 * (30 - mean) / deviation]
    assert np.allclose(standardised(values, share), expected, atol=1e-6)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("codes", ["RAS", "SLP", "AIR"])
@pytest.mark.parametrize("spacing", [0.9, 2.0, 5.0])
def test_axis_by_axis_is_the_same_as_all_at_once(monkeypatch, spacing, codes, order):
    rng = np.random.default_rng(0)
    volume = np.array(rng.integers(-500, 900, (25, 21, 18)), np.int16, order=order)
    ras, stored = (nib.orientations.axcodes2ornt(c) for c in ("RAS", codes))
    ornt = nib.orientations.ornt_transform(ras, stored)
    affine = affine_of(2.0, (30, 21, 18)) @ nib.orientations.inv_ornt_aff(ornt, (30, 21, 18))
    grid = np.diag([spacing, 1.1 * spacing, 0.9 * spacing, 1.0])
    grid[:3, 3] = (-8.0, -9.5, -7.3)
    to_grid = Resampler.between(affine, volume.shape, grid, (9, 10, 11))
    images = []
    for aligned in (resample._ALIGNED, 0.0):
        monkeypatch.setattr(resample, "_ALIGNED", aligned)
        images.append(to_grid(volume[to_grid.window], prepare=lambda p: p / 2))
    assert images[0].shape == (9, 10, 11) and images[0].std() > 10
    assert np.allclose(*images, atol=1e-3)
    moved = Resampler.between(turned(affine, 1e-4), volume.shape, grid, (9, 10, 11))
    assert np.abs(moved(volume[moved.window], prepare=lambda p: p / 2) - images[0]).max() < 10


@pytest.mark.parametrize("turn", [0.0, 0.3])
@pytest.mark.parametrize("spacing", [0.9, 2.0, 5.0])
def test_what_the_grid_does_not_see_changes_nothing(spacing, turn):
    """Cut out, smoothed and interpolated equals smoothed and interpolated as a whole."""
    rng = np.random.default_rng(0)
    affine = turned(affine_of(2.0, (40, 36, 30)), turn)
    volume = rng.normal(0, 1, (40, 36, 30)).astype(np.float32)
    grid = np.diag([spacing] * 3 + [1.0])
    grid[:3, 3] = -spacing * 3.5 + np.array([3.0, -2.0, 1.0])
    to_grid = Resampler.between(affine, volume.shape, grid, (8, 8, 8))
    whole = Resampler(
        (slice(0, 40), slice(0, 36), slice(0, 30)),
        to_grid.sigma,
        np.linalg.solve(affine, grid),
        (8, 8, 8),
    )
    assert spacing > 4 or volume[to_grid.window].size < volume.size
    assert np.allclose(to_grid(volume[to_grid.window].copy()), whole(volume.copy()), atol=1e-6)


def test_a_grid_beside_the_scan_sees_nothing():
    grid = np.diag([1.0, 1.0, 1.0, 1.0])
    grid[:3, 3] = 500
    to_grid = Resampler.between(np.eye(4), (9, 9, 9), grid, (4, 5, 6))
    part = np.ones((9, 9, 9), np.float32)[to_grid.window]
    assert part.size == 0 or not to_grid(part).any()
    assert to_grid(part).shape == (4, 5, 6)
