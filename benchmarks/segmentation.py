"""Does decoupling pay? Dice per subset of four sequences on simulated tumours.

    python benchmarks/segmentation.py --work DIR [--seeds 0 1 2] [--steps 120]

Writes `DIR/segmentation.csv` (one row per seed, method, subset, region and test patient), adding
what is not there yet, and prints a table. Per seed there are a cohort (`dymo-med simulate`, tumour
masks included), weights and batches of its own; the methods of a seed share its batches.

- *decoupled*: the dynamic-sharing U-Net, 15 losses, gradients projected and merged.
- *summed*: the same network and losses, the gradient of their mean.
- *one each*: a U-Net of the same widths for each of the 15 subsets, its sequences as channels.
- *zero-filled*: one U-Net of four channels, 0 where a sequence is absent; a random subset for each
  patient and step.

The output layer starts at a bias of -3 for all: regions are 1 % of the voxels. All take the same
number of optimiser steps on the same patients. So *one each* has 15 times the
parameters and steps in all, and *zero-filled* sees one subset where the sharing network sees 15.
"""

import argparse
import csv
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.networks.blocks import Convolution
from torch import Tensor

from dymo_med.backbones import SharedUNet
from dymo_med.data.simulate import simulate
from dymo_med.training.gmd import Decoupling, ObjectiveGradients
from dymo_med.types import ModalitySpec

NAMES = ("t1", "t1ce", "t2", "flair")
REGIONS = ("WT", "TC", "ET")
METHODS = ("decoupled", "summed", "one each", "zero-filled")
GRID, CROP = 20, 16  # voxels along an axis; the centre of the field of view holds the brain
TRAIN, TEST, BATCH = 48, 32, 2
OPTIONS = SharedUNet.Options(widths=(16, 32, 64), width_ratio=0.25)
SUBSETS = (torch.arange(1, 16)[:, None] >> torch.arange(4)) & 1 == 1  # (15, 4)
Predict = Callable[[Tensor, Tensor], Tensor]  # scans (B, 4, *spatial), subset (4,) -> logits


def load(work: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Scans `(n, 4, *spatial)`, z-scored in the brain, and regions `(n, 3, *spatial)`."""
    root = work / f"cohort-{seed}"
    if not root.exists():
        simulate(root, patients=TRAIN + TEST, seed=seed, size=GRID, missing=0.0)
    middle = (slice((GRID - CROP) // 2, (GRID + CROP) // 2),) * 3
    scans, regions = [], []
    for folder in sorted((root / "patients").iterdir()):
        row = []
        for name in NAMES:
            image = np.asarray(nib.load(folder / f"{name}.nii.gz").dataobj, dtype=np.float32)  # type: ignore[attr-defined]
            brain = image > 0
            image = np.where(brain, (image - image[brain].mean()) / image[brain].std(), 0)
            row.append(torch.from_numpy(image[middle].astype(np.float32)))
        lesion = np.asarray(
            nib.load(root / "truth" / folder.name / "lesion.nii.gz").dataobj  # type: ignore[attr-defined]
        )
        whole = np.stack([lesion > 0, lesion > 1, lesion == 2])  # 1 oedema, 2 rim, 3 core
        scans.append(torch.stack(row))
        regions.append(torch.from_numpy(whole[(slice(None), *middle)]))
    return torch.stack(scans), torch.stack(regions)


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """The loss of one subset: per region over the whole batch."""
    axes = (0, *range(2, logits.ndim))
    p, g = logits.sigmoid(), target.to(logits.dtype)
    return 1 - ((2 * (p * g).sum(axes) + 1) / (p.sum(axes) + g.sum(axes) + 1)).mean()


def unet(names: Sequence[str], channels: int = 1) -> SharedUNet:
    """The network; with more channels than one, an ordinary U-Net of the same widths."""
    shape = (1, CROP, CROP, CROP)
    specs = [ModalitySpec(n, "image", f"{n}.nii.gz", shape, (9.6,) * 3) for n in names]
    network = SharedUNet(specs, len(REGIONS), OPTIONS)
    if channels > 1:
        first = network.down[0].convs  # type: ignore[union-attr]
        width = int(OPTIONS.widths[0] * OPTIONS.width_ratio)
        first[0] = Convolution(3, channels, width, kernel_size=3, conv_only=True)  # type: ignore[index, operator]
    with torch.no_grad():
        # Regions are 1 % of the voxels or less: starting from 50 % would cost most of the steps.
        network.head.conv.bias.fill_(-3.0)  # type: ignore[operator, union-attr]
    return network


def fit(
    parameters: list[torch.nn.Parameter],
    steps: int,
    seed: int,
    scans: Tensor,
    regions: Tensor,
    gradient: Callable[[Tensor, Tensor, torch.Generator], None],
) -> None:
    """Adam with a step size that falls to 0; the same batches for the same seed."""
    optimizer = torch.optim.Adam(parameters, lr=0.01, weight_decay=1e-5)
    batches = torch.Generator().manual_seed(seed)
    own = torch.Generator().manual_seed(seed + 1000)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps) ** 0.9
        rows = torch.randperm(TRAIN, generator=batches)[:BATCH]
        flip = bool(torch.rand(1, generator=batches) < 0.5)
        x, y = scans[rows], regions[rows]
        optimizer.zero_grad()
        gradient(*((x.flip(2), y.flip(2)) if flip else (x, y)), own)
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()


def train(method: str, seed: int, steps: int, scans: Tensor, regions: Tensor) -> Predict:
    """The trained method as a function of scans and a subset."""
    torch.manual_seed(seed)
    if method in ("decoupled", "summed"):
        network = unet(NAMES)
        parameters = list(network.parameters())
        specific = [p for m in network.specific_modules() for p in m.parameters()]
        gradients = ObjectiveGradients(parameters, Decoupling(len(SUBSETS), specific))

        def shared(x: Tensor, y: Tensor, generator: torch.Generator) -> None:
            values = {n: x[:, m : m + 1] for m, n in enumerate(NAMES)}
            parts = [o.logits for o in network.outputs(values) if o is not None]
            losses = [soft_dice(network.combine(parts, s.expand(len(x), 4)), y) for s in SUBSETS]
            if method == "summed":
                torch.stack(losses).mean().backward()
            else:
                gradients.backward(losses)
                gradients.merge(generator)

        fit(parameters, steps, seed, scans, regions, shared)

        def answer(x: Tensor, subset: Tensor) -> Tensor:
            values = {n: x[:, m : m + 1] for m, n in enumerate(NAMES) if subset[m]}
            parts = [None if o is None else o.logits for o in network.outputs(values)]
            return network.combine(parts, subset.expand(len(x), 4))

        return answer
    if method == "zero-filled":
        single = unet(["all"], 4)

        def filled(x: Tensor, y: Tensor, generator: torch.Generator) -> None:
            drawn = SUBSETS[torch.randint(15, (len(x),), generator=generator)]
            soft_dice(single.run("all", x * drawn[:, :, None, None, None]).logits, y).backward()

        fit(list(single.parameters()), steps, seed, scans, regions, filled)
        return lambda x, subset: single.run("all", x * subset[:, None, None, None]).logits
    networks = {}
    for subset in SUBSETS:
        one = unet(["all"], int(subset.sum()))

        def alone(
            x: Tensor,
            y: Tensor,
            _: torch.Generator,
            one: SharedUNet = one,
            subset: Tensor = subset,
        ) -> None:
            soft_dice(one.run("all", x[:, subset]).logits, y).backward()

        fit(list(one.parameters()), steps, seed, scans, regions, alone)
        networks[tuple(subset.tolist())] = one
    return lambda x, subset: networks[tuple(subset.tolist())].run("all", x[:, subset]).logits


def overlap(logits: Tensor, target: Tensor) -> Tensor:
    """Dice per case and region at probability 0.5, `(B, 3)`; 1 where both are empty."""
    decided = logits > 0
    both = (decided & target).flatten(2).sum(2)
    size = decided.flatten(2).sum(2) + target.flatten(2).sum(2)
    return torch.where(size > 0, 2 * both / size.clamp_min(1), 1.0)


def interval(values: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over seeds and, within, cases of `(seeds, cases)`."""
    generator = np.random.default_rng(0)
    seeds, cases = values.shape
    a = generator.integers(seeds, size=(draws, seeds))
    b = generator.integers(cases, size=(draws, seeds, cases))
    means = values[a[..., None], b].mean((1, 2))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def show(file: Path, steps: int, methods: Sequence[str]) -> None:
    """Print the tables of the seeds that all of the methods have."""
    with file.open(encoding="utf-8") as rows:
        found = [r for r in csv.DictReader(rows) if int(r["steps"]) == steps]
    whole = {m: s for m in methods if (s := {int(r["seed"]) for r in found if r["method"] == m})}
    seeds = sorted(set.intersection(*whole.values()))
    shape = (len(seeds), len(SUBSETS), len(REGIONS), TEST)
    dice = {m: np.full(shape, np.nan) for m in whole}
    for r in found:
        if int(r["seed"]) in seeds and r["method"] in dice:
            place = (seeds.index(int(r["seed"])), int(r["subset"]) - 1)
            dice[r["method"]][(*place, REGIONS.index(r["region"]), int(r["case"]))] = r["dice"]
    print(f"{platform.machine()}, torch {torch.__version__}; seeds {seeds}, {steps} steps")
    for m in whole:
        cpu = np.mean([float(r["cpu_seconds"]) for r in found if r["method"] == m])
        print(f"{m}: {cpu:.0f} CPU s per seed")
    print("\n| subset | " + " | ".join(whole) + " |\n|---|" + "---|" * len(whole))
    for s, subset in enumerate(SUBSETS.tolist()):
        name = " + ".join(n for n, inside in zip(NAMES, subset, strict=True) if inside)
        cells = " | ".join(f"{100 * d[:, s].mean():.1f}" for d in dice.values())
        print(f"| {name} | {cells} |")
    for region, name in enumerate(REGIONS):
        cells = " | ".join(f"{100 * d[:, :, region].mean():.1f}" for d in dice.values())
        print(f"| *mean over subsets, {name}* | {cells} |")
    print("\n| | mean over subsets | mean of the three weakest |\n|---|---|---|")
    # The weakest of the plain sum, so that every method is asked about the same subsets.
    reference = dice.get("summed", next(iter(dice.values())))
    weakest = reference.mean((0, 2, 3)).argsort()[:3]
    views = [
        {m: d.mean((1, 2)) for m, d in dice.items()},
        {m: d[:, weakest].mean((1, 2)) for m, d in dice.items()},
    ]
    for m in dice:
        cells = [interval(100 * view[m]) for view in views]
        print(f"| {m} | " + " | ".join(f"{c:.1f} ({a:.1f} to {b:.1f})" for c, a, b in cells) + " |")
    for m in dice:
        if m != "decoupled" and "decoupled" in dice:
            cells = [interval(100 * (view["decoupled"] - view[m])) for view in views]
            text = " | ".join(f"{c:+.1f} ({a:+.1f} to {b:+.1f})" for c, a, b in cells)
            print(f"| decoupled less {m} | {text} |")
    print(
        "\nWeakest: "
        + ", ".join(
            " + ".join(n for n, inside in zip(NAMES, SUBSETS[w].tolist(), strict=True) if inside)
            for w in weakest
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    file = arguments.work / "segmentation.csv"
    fields = ("steps", "seed", "method", "subset", "region", "case", "dice", "cpu_seconds")
    done = set()
    if file.exists():
        with file.open(encoding="utf-8") as rows:
            done = {(int(r["steps"]), int(r["seed"]), r["method"]) for r in csv.DictReader(rows)}
    else:
        file.write_text(",".join(fields) + "\n", encoding="utf-8")
    for seed in arguments.seeds:
        scans, regions = load(arguments.work, seed)
        for method in arguments.methods:
            if (arguments.steps, seed, method) in done:
                continue
            began = time.process_time()
            predict = train(method, seed, arguments.steps, scans, regions)
            seconds = time.process_time() - began
            lines = []
            with torch.no_grad():
                for s, subset in enumerate(SUBSETS, start=1):
                    dice = overlap(predict(scans[TRAIN:], subset), regions[TRAIN:])
                    for region, name in enumerate(REGIONS):
                        lines += [
                            (
                                arguments.steps,
                                seed,
                                method,
                                s,
                                name,
                                case,
                                f"{d:.5f}",
                                f"{seconds:.1f}",
                            )
                            for case, d in enumerate(dice[:, region].tolist())
                        ]
            with file.open("a", encoding="utf-8", newline="") as out:
                csv.writer(out, lineterminator="\n").writerows(lines)
            mean = np.mean([float(line[6]) for line in lines])
            print(f"seed {seed}, {method}: mean Dice {mean:.3f}, {seconds:.0f} CPU s", flush=True)
    show(file, arguments.steps, arguments.methods)


if __name__ == "__main__":
    main()
