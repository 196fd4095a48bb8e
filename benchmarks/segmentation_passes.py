"""How often does an evaluation of a segmentation look at a scan? benchmarks/segmentation_passes.py

A patient's scans are hidden in every way (all non-empty subsets of M). An observed scan's logits do
not depend on which others are there, so it is enough to look at each once and to average per
subset. Both ways run in one process, alternately, on the same random network and scans; printed
are passes through the network, CPU time, their ratios and the machine, and whether the bits agree.

    python benchmarks/segmentation_passes.py [--size 48] [--repeats 3] [--scans 4]
"""

from __future__ import annotations

import argparse
import platform
import time
from itertools import combinations

import torch

from dymo_med.backbones import DenseVersions, SharedUNet, Windows, dense_versions
from dymo_med.types import Batch, ModalityMask, ModalitySpec


def batch_of(specs: list[ModalitySpec], values: dict[str, torch.Tensor], kept: tuple) -> Batch:
    """Return one record with some of its scans."""
    names = tuple(s.name for s in specs)
    there = torch.tensor([[name in kept for name in names]])
    shown = {n: values[n] if n in kept else torch.zeros_like(values[n]) for n in names}
    return Batch(("p",), ("p",), shown, ModalityMask(names, there), {}, torch.tensor([-1]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--scans", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (1, given.size, given.size, given.size)
    specs = [ModalitySpec(f"s{m}", "image", "x", shape, (1.0,) * 3) for m in range(given.scans)]
    network = SharedUNet(specs, 3, SharedUNet.Options(widths=(16, 32, 64))).eval()
    values = {s.name: torch.randn(1, *shape) for s in specs}
    names = tuple(values)
    windows = Windows(shape[1:])
    subsets = [c for n in range(1, len(names) + 1) for c in combinations(names, n)]
    passes, run = [0], network.run

    def counted(name: str, part: torch.Tensor) -> object:
        passes[0] += 1
        return run(name, part)

    network.run = counted  # type: ignore[method-assign,assignment]

    def answers(reuse: bool) -> tuple[int, float, list[torch.Tensor]]:
        passes[0], began = 0, time.process_time()
        whole = dense_versions(network, batch_of(specs, values, names), windows)
        row, found = torch.zeros(1, dtype=torch.int64), []
        for kept in subsets:
            batch = batch_of(specs, values, kept)
            seen: DenseVersions | None = whole if reuse else None
            versions = dense_versions(network, batch, windows, seen=seen)
            used = batch.observed.available
            found.append(versions.logits(row, used, torch.zeros_like(used)))
        return passes[0], time.process_time() - began, found

    answers(True)  # warm
    before, after, same = [], [], True
    for _ in range(given.repeats):
        n_before, seconds, old = answers(False)
        before.append(seconds)
        n_after, seconds, new = answers(True)
        after.append(seconds)
        same &= all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    slow, fast = min(before), min(after)
    print(f"M = {given.scans}, {len(subsets)} subsets, {given.size}^3 voxels, one thread")
    print("| | passes | CPU s |\n|---|---|---|")
    print(f"| every subset for itself (whole record included) | {n_before} | {slow:.2f} |")
    print(f"| each scan once | {n_after} | {fast:.2f} |")
    machine = platform.processor() or platform.machine()
    print(f"| ratio | {n_before / n_after:.1f} | {slow / fast:.1f} |")
    print(f"same bits: {same}; {machine}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
