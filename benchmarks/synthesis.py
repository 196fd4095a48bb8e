"""What the imputer `synthesis` costs at clinical size, and how good its scans are.

    python benchmarks/synthesis.py cost [--size 128] [--threads 1]
    python benchmarks/synthesis.py quality --cohort COHORT [--minutes 4] [--out FOLDER]

*cost*: four sequences of `size` voxels along each axis, one of them absent; a network of default
size recovers it from the other three on the CPU. Prints seconds, with and without the time that
other programs took, and the peak memory of the whole process, with Python, torch and MONAI.

*quality*: trains on the training split of a cohort with at least two scans on one grid (such as
`dymo-med simulate COHORT --patients 90 --size 32`) for a number of minutes on the CPU. Then, for
each patient of the test split, each scan is hidden on its own and recovered from all the others,
and once from each of the others alone. Prints PSNR, SSIM and NMAE inside the body per target,
beside those of the imputer `template`, which proposes the mean scan; `--out` gets a picture of the
first test patients: truth, recovery from the others, difference, mean scan.
"""

import argparse
import itertools
import os
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from simulate import cpu_name
from torch import Tensor

from dymo_med.data.batch import collate
from dymo_med.data.cohort import read_cohort
from dymo_med.data.patient import read_record
from dymo_med.imputers import IMPUTERS, Imputer
from dymo_med.inference.quality import IMAGE_METRICS, body, image_quality
from dymo_med.types import Batch, Cohort, ModalityMask, ModalitySpec, Split

PICTURES = 2


def machine(threads: int) -> str:
    """Return what ran this."""
    return f"{cpu_name()} ({os.cpu_count()} cores), {threads} threads, torch {torch.__version__}"


def peak_gb() -> float:
    """Return the most memory this process ever had, in GB."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 1e6 if platform.system() == "Linux" else kilobytes / 1e9


def seen(batch: Batch, names: Sequence[str]) -> Batch:
    """Return a batch of which only some modalities are there."""
    keep = torch.tensor([name in names for name in batch.observed.names])
    mask = ModalityMask(batch.observed.names, batch.observed.available & keep)
    fields = {n: f & (n in names) for n, f in batch.observed_fields.items()}
    return Batch(batch.record_ids, batch.patient_ids, batch.values, mask, fields, batch.labels)


def cost(size: int, threads: int) -> None:
    """Recover one of four sequences."""
    specs = [
        ModalitySpec(n, "image", f"{n}.nii.gz", (1, size, size, size), (1.0,) * 3, "zscore")
        for n in ("t1", "t1ce", "t2", "flair")
    ]
    entry = IMPUTERS["synthesis"]
    torch.manual_seed(0)
    imputer = entry(specs, entry.Options())
    generator = torch.Generator().manual_seed(0)
    values = {s.name: torch.randn(1, *s.shape, generator=generator) for s in specs}
    mask = ModalityMask(tuple(values), torch.ones(1, len(specs), dtype=torch.bool))
    batch = Batch(("p",), ("p",), values, mask, {}, torch.zeros(1, dtype=torch.int64))
    before = peak_gb()
    began, busy = time.monotonic(), time.process_time()
    recovery = imputer.recover(seen(batch, ("t1", "t1ce", "flair")))
    seconds, busy = time.monotonic() - began, time.process_time() - busy
    assert recovery.recovered.tolist() == [[False, False, True, False]]
    weights = sum(p.numel() for p in imputer.parameters())
    print(machine(threads))
    print(f"{size}^3 voxels, four sequences, one recovered from three; {weights:,} weights")
    print(f"{seconds:.1f} s, of which {busy:.1f} s on the processor")
    print(f"peak memory {peak_gb():.2f} GB ({before:.2f} GB before)")


def read_split(cohort: Cohort, split: Split) -> Batch:
    """Return the records of a split."""
    records = [read_record(e, cohort.specs, cohort.missing_values) for e in cohort.in_split(split)]
    return collate(records, cohort.specs)


def train(imputer: Imputer, batch: Batch, minutes: float, rate: float, size: int) -> int:
    """Train for so long, the step size falling along half a cosine; return how many steps."""
    optimizer = torch.optim.AdamW(imputer.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    began, losses = time.monotonic(), []
    imputer.train()
    for step in itertools.count():
        done = (time.monotonic() - began) / (60 * minutes)
        if done >= 1:
            imputer.eval()
            return step
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + np.cos(np.pi * done)) / 2
        rows = torch.randint(len(batch), (size,), generator=generator)
        loss = imputer.loss(batch.rows(rows), generator).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(imputer.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1}: loss {np.mean(losses[-100:]):.3f}", flush=True)
    raise AssertionError


def measured(truth: Batch, recovered: Tensor, spec: ModalitySpec) -> dict[str, float]:
    """Return the mean of each measure over the records."""
    found = [
        image_quality(true, made, body(spec, true))
        for true, made in zip(truth.values[spec.name], recovered, strict=True)
    ]
    return {metric: float(np.mean([f[metric] for f in found])) for metric in IMAGE_METRICS}


def quality(arguments: argparse.Namespace) -> None:
    """Train, hide, recover, compare."""
    cohort = read_cohort(arguments.cohort)
    training, test = read_split(cohort, "train"), read_split(cohort, "test")
    torch.manual_seed(arguments.seed)
    entry = IMPUTERS["synthesis"]
    options = {"width": arguments.width, "levels": arguments.levels, "patch": arguments.patch}
    ours = entry(cohort.specs, entry.Options(**options))
    template = IMPUTERS["template"](cohort.specs, IMPUTERS["template"].Options())
    template.start_from(training)
    print(machine(arguments.threads))
    print(f"{len(training)} training records, {len(test)} test records; {options}")
    steps = train(ours, training, arguments.minutes, arguments.rate, arguments.batch)
    print(f"{steps} steps of {arguments.batch} records in {arguments.minutes:g} minutes")
    scans = [spec for spec in cohort.specs if not spec.columns]
    names = [spec.name for spec in scans]
    pictures: list[tuple[str, list[np.ndarray]]] = []
    print("| target | from | " + " | ".join(IMAGE_METRICS) + " |\n|---|---|---|---|---|")
    for spec, given in cases(scans):
        has = dict(zip(test.observed.names, test.observed.available.T, strict=True))
        rows = has[spec.name] & torch.stack([has[n] for n in given]).any(0)
        truth = test.rows(rows.nonzero()[:, 0])
        left = seen(truth, given)
        made = ours.recover(left).values[spec.name]
        line(spec, "+".join(given), measured(truth, made, spec))
        if len(given) < len(names) - 1:
            continue
        mean = template.recover(left).values[spec.name]
        line(spec, "mean scan", measured(truth, mean, spec))
        for true, ours_of, mean_of in list(zip(truth.values[spec.name], made, mean, strict=True))[
            :PICTURES
        ]:
            images = (true, ours_of, (ours_of - true).abs(), mean_of)
            pictures.append((spec.name, [image[0].numpy() for image in images]))
    if arguments.out:
        draw(arguments.out, pictures)


def cases(scans: Sequence[ModalitySpec]) -> Iterator[tuple[ModalitySpec, tuple[str, ...]]]:
    """Return each target with all other scans, then with each of them alone."""
    for spec in scans:
        others = tuple(s.name for s in scans if s.name != spec.name)
        yield spec, others
        yield from ((spec, (other,)) for other in others if len(others) > 1)


def line(spec: ModalitySpec, given: str, figures: dict[str, float]) -> None:
    """Print one row of the table."""
    print(
        f"| {spec.name} | {given} | {figures['psnr']:.1f} dB | {figures['ssim']:.3f}"
        f" | {figures['nmae']:.3f} |"
    )


def draw(folder: Path, pictures: Sequence[tuple[str, list[np.ndarray]]]) -> None:
    """Draw axial slices: truth, recovery, difference, mean scan."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 2 * len(pictures)), layout="constrained")
    panels = figure.subplots(len(pictures), 4, squeeze=False)
    for axes_row, (name, images) in zip(panels, pictures, strict=True):
        low, high = np.percentile(images[0][images[0] != 0], [1, 99])
        middle = images[0].shape[-1] // 2
        titles = (f"{name}: truth", "recovered (SYNTHETIC)", "difference", "mean scan")
        for k, (axes, image, title) in enumerate(zip(axes_row, images, titles, strict=True)):
            shown = image[..., middle] if image.ndim == 3 else image
            lowest, highest = (0, (high - low) / 2) if k == 2 else (low, high)
            axes.imshow(shown.T, cmap="gray", vmin=lowest, vmax=highest, origin="lower")
            axes.set_title(title, fontsize=8)
            axes.set_axis_off()
    figure.savefig(folder / "synthesis.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("cost")
    one.add_argument("--size", type=int, default=128)
    two = commands.add_parser("quality")
    two.add_argument("--cohort", type=Path, required=True)
    two.add_argument("--minutes", type=float, default=4)
    two.add_argument("--out", type=Path)
    two.add_argument("--width", type=int, default=8)
    two.add_argument("--levels", type=int, default=2)
    two.add_argument("--patch", type=int, default=24)
    two.add_argument("--batch", type=int, default=4)
    two.add_argument("--rate", type=float, default=0.005)
    two.add_argument("--seed", type=int, default=0)
    for command in (one, two):
        command.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.command == "cost":
        cost(arguments.size, arguments.threads)
    else:
        quality(arguments)


if __name__ == "__main__":
    main()
