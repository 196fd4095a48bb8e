"""What decoupling gradients costs: ours against the plain formulation, in time and in memory.

    python benchmarks/gmd.py [--size 24] [--batch 1] [--width-ratio 0.5] [--repeats 1]

One training step of the dynamic-sharing U-Net on four modalities with 15 losses, one per subset,
each a soft Dice; random numbers in place of scans. Times are CPU seconds of one thread, the best of
some repeats; memory is the peak resident size of a process of its own that takes one step.

- *ours*: `ObjectiveGradients`: backward passes through a subset's own modalities, projection on the
  15 x 15 inner products, the result in place of the first gradient.
- *plain*: as published: every backward pass goes through all modalities, flat gradients, a mask of
  the same size for each, a copy of every gradient, projection on full vectors.

Both see the same losses and orders, and their results are compared.
"""

import argparse
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dymo_med.backbones import SharedUNet
from dymo_med.training.gmd import Decoupling, ObjectiveGradients, random_orders
from dymo_med.training.losses import distinct_subsets
from dymo_med.types import ModalitySpec

NAMES = ("t1", "t1ce", "t2", "flair")
REGIONS = 3
Gradients = list[tuple[Tensor, Tensor]]


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """The loss of one subset: per region over the whole batch."""
    axes = (0, *range(2, logits.ndim))
    p = logits.sigmoid()
    overlap = (2 * (p * target).sum(axes) + 1) / (p.sum(axes) + target.sum(axes) + 1)
    return 1 - overlap.mean()


class Setting:
    """A network, a batch and the subsets."""

    def __init__(self, size: int, batch: int, width_ratio: float) -> None:
        torch.manual_seed(0)
        shape = (1, size, size, size)
        specs = [ModalitySpec(n, "image", f"{n}.nii.gz", shape, (4.0,) * 3) for n in NAMES]
        self.network = SharedUNet(specs, REGIONS, SharedUNet.Options(width_ratio=width_ratio))
        self.values = {n: torch.randn(batch, *shape) for n in NAMES}
        self.target = (torch.rand(batch, REGIONS, *shape[1:]) < 0.1).float()
        self.subsets = distinct_subsets(len(NAMES), 15, torch.Generator().manual_seed(0))
        self.specific = [p for m in self.network.specific_modules() for p in m.parameters()]
        self.parameters = list(self.network.parameters())

    def forward(self, *, stacked: bool) -> tuple[Tensor, ...]:
        """The losses; `stacked` puts all modalities into one tensor first."""
        if stacked:
            parts: Tensor | list[Tensor] = self.network.per_modality(self.values).logits
        else:
            parts = [o.logits for o in self.network.outputs(self.values) if o is not None]
        b = len(self.target)
        fuse = self.network.combine
        return tuple(soft_dice(fuse(parts, s.expand(b, -1)), self.target) for s in self.subsets)


def plain_backward(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Gradients:
    """Each loss's flat gradient by a pass through everything, and where it has one."""
    found = []
    for i, loss in enumerate(losses):
        last = i == len(losses) - 1
        row = torch.autograd.grad(loss, parameters, retain_graph=not last, allow_unused=True)
        pairs = list(zip(row, parameters, strict=True))
        found.append(
            (
                torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]),
                torch.cat([torch.full_like(p, float(g is not None)).flatten() for g, p in pairs]),
            )
        )
    return found


def plain_merge(found: Gradients, setting: Setting, orders: Tensor) -> Tensor:
    """Projection on full vectors, each in a copy; the flat merged gradient."""
    flat = [g for g, _ in found]
    projected = [g.clone() for g in flat]
    for i, order in enumerate(orders.tolist()):
        for j in order:
            dot = projected[i] @ flat[j]
            if dot < 0:
                projected[i] -= dot / flat[j].square().sum() * flat[j]
    own = {id(p) for p in setting.specific}
    shared = torch.cat(
        [torch.full_like(p, id(p) not in own).flatten().bool() for p in setting.parameters]
    )
    merged = torch.stack(projected).mean(0)
    merged[~shared] = torch.stack([g[~shared] for g in projected]).sum(0)
    return merged


def clock(function: Callable[[], object], repeats: int) -> float:
    """CPU seconds, the best of some repeats."""
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        function()
        best = min(best, time.process_time() - began)
    return best


def step(setting: Setting, how: str) -> None:
    """One training step's gradients, for the memory they need."""
    losses = setting.forward(stacked=how == "plain")
    if how == "sum":
        torch.stack(losses).mean().backward()
    elif how == "ours":
        gradients = ObjectiveGradients(setting.parameters, Decoupling(15, setting.specific))
        gradients.backward(losses)
        gradients.merge(torch.Generator().manual_seed(0))
    else:
        orders = random_orders(15, torch.Generator().manual_seed(0))
        merged = plain_merge(plain_backward(losses, setting.parameters), setting, orders)
        sizes = [p.numel() for p in setting.parameters]
        for p, part in zip(setting.parameters, merged.split(sizes), strict=True):
            p.grad = part.view_as(p)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=24)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--width-ratio", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only-memory", choices=("sum", "ours", "plain"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only_memory:
        step(Setting(arguments.size, arguments.batch, arguments.width_ratio), arguments.only_memory)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return

    # First: a process starts with the peak of the one that starts it.
    megabytes = {}
    for how in ("sum", "ours", "plain"):
        command = [sys.executable, __file__, "--only-memory", how]
        for key in ("size", "batch", "width_ratio"):
            command += [f"--{key.replace('_', '-')}", str(getattr(arguments, key))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        megabytes[how] = int(done.stdout) / 1024
    setting = Setting(arguments.size, arguments.batch, arguments.width_ratio)
    gradients = ObjectiveGradients(setting.parameters, Decoupling(15, setting.specific))
    seconds: dict[str, float] = {}

    def ours() -> None:
        losses = setting.forward(stacked=False)
        seconds["backward"] = min(
            seconds.get("backward", 1e9), clock(lambda: gradients.backward(losses), 1)
        )
        merge = clock(lambda: gradients.merge(torch.Generator().manual_seed(1)), 1)
        seconds["merge"] = min(seconds.get("merge", 1e9), merge)

    for _ in range(arguments.repeats):
        ours()
    merged = torch.cat([p.grad.flatten() for p in setting.parameters if p.grad is not None])
    orders = random_orders(15, torch.Generator().manual_seed(1))
    plain: dict[str, float] = {}
    for _ in range(arguments.repeats):
        losses = setting.forward(stacked=True)
        began = time.process_time()
        found = plain_backward(losses, setting.parameters)
        middle = time.process_time()
        expected = plain_merge(found, setting, orders)
        end = time.process_time()
        plain["backward"] = min(plain.get("backward", 1e9), middle - began)
        plain["merge"] = min(plain.get("merge", 1e9), end - middle)
    error = float((merged - expected).norm() / expected.norm())
    length = gradients.flat.shape[1]
    one = length * 4 / 2**20

    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}")
    print(
        f"4 modalities, 15 subsets, {arguments.batch} x {arguments.size}^3 voxels, {length}"
        f" parameters; a flat gradient is {one:.1f} MB"
    )
    print(f"merged gradients differ by {error:.1e} of their length\n")
    print("| | ours | plain |\n|---|---|---|")
    print(f"| 15 backward passes, s | {seconds['backward']:.2f} | {plain['backward']:.2f} |")
    print(f"| projection and merging, s | {seconds['merge']:.3f} | {plain['merge']:.3f} |")
    shares = [x["merge"] / x["backward"] for x in (seconds, plain)]
    print("| that in backward passes | " + " | ".join(f"{s:.1%}" for s in shares) + " |")
    print(f"| peak memory, MB | {megabytes['ours']:.0f} | {megabytes['plain']:.0f} |")
    above = [(megabytes[h] - megabytes["sum"]) / one for h in ("ours", "plain")]
    print(
        f"| above one backward pass of the mean loss ({megabytes['sum']:.0f} MB), in flat gradients"
        f" | {above[0]:.1f} | {above[1]:.1f} |"
    )


if __name__ == "__main__":
    main()
