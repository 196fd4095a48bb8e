"""Make `dymo_med/data/anatomy/mni152.npz` from the MNI152 maps that ship in the nilearn wheel.

Run once, by hand: `python benchmarks/make_anatomy.py <folder of the *_converted.nii.gz files>`
(`nilearn/datasets/data` of an unpacked nilearn wheel). The package itself does not need nilearn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

TARGET = Path(__file__).parent.parent / "dymo_med" / "data" / "anatomy" / "mni152.npz"
SPACING_MM = 2.5
MAPS = {"grey": "gm", "white": "wm", "brain": "t1"}


def down_sample(values: np.ndarray) -> np.ndarray:
    """Return a 1 mm map on the coarser grid.

    Args:
        values: Float `(X, Y, Z)`, 1 mm voxels.

    Returns:
        Float `(X', Y', Z')`, voxels of `SPACING_MM`, the first centred on the first of `values`.
    """
    # A Gaussian of 0.4 output voxels keeps thin sulci and still suppresses aliasing.
    smooth = ndimage.gaussian_filter(values, 0.4 * SPACING_MM)
    axes = [np.arange(0, n, SPACING_MM) for n in values.shape]
    return ndimage.map_coordinates(smooth, np.meshgrid(*axes, indexing="ij"), order=1)


def main() -> None:
    """Read the maps, down-sample them, crop to the brain and write the asset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    source = parser.parse_args().source

    maps = {}
    for name, letters in MAPS.items():
        path = source / f"mni_icbm152_{letters}_tal_nlin_sym_09a_converted.nii.gz"
        image = nib.load(path)
        maps[name] = np.asarray(image.dataobj, dtype=np.float32) / 255
    # The T1 template is brain-extracted: what is not zero is brain.
    maps["brain"] = ndimage.binary_fill_holes(maps["brain"] > 0).astype(np.float32)
    maps = {name: down_sample(values) for name, values in maps.items()}

    box = ndimage.find_objects((maps["brain"] > 0.01).astype(np.uint8))[0]
    stored = {name: np.round(255 * values[box]).astype(np.uint8) for name, values in maps.items()}
    corner = np.array([*(axis.start for axis in box), 1.0])
    affine = image.affine @ np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    affine[:3, 3] = (affine @ corner)[:3]
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(TARGET, affine=affine, **stored)
    print(f"{TARGET}: {stored['brain'].shape}, {TARGET.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
