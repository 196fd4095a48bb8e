"""Memory and time to read one large scan: python benchmarks/reading.py [--against WORKTREE].

A CT of 512 x 512 x 600 voxels in 16 bits (noise included, which packs badly) is written in each
format and read onto a grid in a process of its own, with one thread. `--against` names a checkout
of another version (`git worktree add`), which reads the same files, so that the ratio is of one
machine and one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CASES = [  # name of the file, intensity, spacing of a grid of 96 x 96 x 96, degrees of tilt
    ("ct.nii.gz", "zscore", 3.0, 0),
    ("ct.nii.gz", "percentile", 3.0, 0),
    ("ct.nii.gz", "none", 3.0, 0),
    ("ct.nii.gz", "zscore", 1.0, 0),
    ("tilted.nii.gz", "zscore", 3.0, 12),
    ("ct.nii", "zscore", 3.0, 0),
    ("ct.mha", "zscore", 3.0, 0),
]
READ = """
import json, resource, sys, time
from pathlib import Path
from dymo_med.modalities import modality
from dymo_med.modalities import transforms
from dymo_med.types import ModalitySpec
folder, name, intensity, spacing = sys.argv[1:]
spec = ModalitySpec("ct", "image", name, (1, 96, 96, 96), (float(spacing),) * 3, intensity)
before = time.process_time()
values = modality(spec).read(Path(folder), "Patient p").values
print(json.dumps({
    "seconds": time.process_time() - before,
    "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    "mean": float(values.mean()), "deviation": float(values.std()),
}))
"""


def write(folder: Path, slices: int) -> None:
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(-1, 1, 512), np.linspace(-1, 1, 512), indexing="ij")
    body = np.where(x**2 + y**2 < 0.8, 1000 * np.exp(-2 * (x**2 + y**2)), -1000)
    values = np.empty((512, 512, slices), np.int16, order="F")
    for k in range(slices):
        values[:, :, k] = body + rng.normal(0, 20, body.shape).round()
    for name, tilt in {name: tilt for name, _, _, tilt in CASES}.items():
        angle = np.radians(tilt)
        affine = np.eye(4)
        affine[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        affine = affine @ np.diag([0.7, 0.7, 1.0, 1.0])
        if name.endswith(".mha"):
            import SimpleITK

            image = SimpleITK.GetImageFromArray(values.T)
            image.SetSpacing((0.7, 0.7, 1.0))
            SimpleITK.WriteImage(image, folder / name, True)
        else:
            image = nib.Nifti1Image(values, affine)
            image.header.set_xyzt_units("mm")
            nib.save(image, folder / name)


def measure(root: Path, folder: Path, name: str, intensity: str, spacing: float) -> dict:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder), name, intensity, str(spacing)],
        cwd=root,
        env={**os.environ, **threads, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    parser.add_argument("--slices", type=int, default=600)
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"512 x 512 x {options.slices} int16; CPU seconds and peak memory of the process (GB)")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder, options.slices)
        for name, intensity, spacing, _ in CASES:
            new = measure(ROOT, folder, name, intensity, spacing)
            line = (
                f"{name:14} {intensity:10} {spacing} mm: {new['seconds']:5.1f} s {new['gb']:4.1f}"
            )
            if options.against:
                old = measure(options.against.resolve(), folder, name, intensity, spacing)
                times = old["seconds"] / new["seconds"]
                line += f"; before {old['seconds']:5.1f} s {old['gb']:4.1f}, {times:.1f} times"
                apart = abs(new["mean"] - old["mean"]) + abs(new["deviation"] - old["deviation"])
                line += f"; mean and deviation differ by {apart:.1g}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
