"""How fast selection is: ours, a plain loop, and the bound that no greedy selection can beat.

    python benchmarks/selection.py [--device cuda] [--patients 512] [--repeats 3]

**Five modalities**: 28 x 28 colour images, four of five missing (eta = 0.8), token width 128;
random weights, statistics fitted on random patients: speed depends on neither.

- *ours*: encode every version once, then `dymo`.
- *plain loop*: what the published code does, written plainly: every step and candidate runs
  the whole network, encoders included, for the before-value and for the after-value of the
  patients for whom it is open, unavailable tokens masked, every token through every block; class
  statistics are looked up patient by patient.
- *bound*: encode every version once, plus exactly the fusions that greedy selection cannot avoid
  (each patient's observed subset, and each open candidate of each step), as one batch.

**Many modalities**: the same with 16 and with 24 modalities, four missing; ours alone, each in a
process of its own. The peak memory is that of the process, fitting its statistics included.

**On CUDA** the same selections are made on the CPU as well, and compared: the share of patients
with the same used modalities, without near-ties (patients for whom some decision turns on less
than 1e-5 of reward), and the largest difference of the rewards. Convolutions use TF32 by default
there; the comparison is made with and without.
"""

import argparse
import copy
import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dymo_med.backbones import BACKBONES, encode_versions
from dymo_med.selection import SELECTORS, fit_statistics
from dymo_med.selection.statistics import lookup
from dymo_med.types import (
    Batch,
    FusionOutput,
    ModalityMask,
    ModalitySpec,
    Recovery,
    SelectionTrace,
    SubsetStatistics,
    subset_id,
)

CLASSES = 10
MANY = (16, 24)
NEAR_TIE = 1e-5


def make_batch(specs: list[ModalitySpec], patients: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    names = tuple(s.name for s in specs)
    ids = tuple(map(str, range(patients)))
    values = {s.name: torch.rand(patients, *s.shape, generator=g) for s in specs}
    everything = torch.ones(patients, len(specs), dtype=torch.bool)
    labels = torch.arange(patients) % CLASSES
    return Batch(ids, ids, values, ModalityMask(names, everything), {}, labels)


def masked_fuse(backbone: Any, tokens: Tensor, available: Tensor) -> FusionOutput:
    """The plain formulation: every token takes part, unavailable keys are blocked."""
    r, _, d = tokens.shape
    x = torch.cat([backbone.class_token.expand(r, 1, d), tokens], 1)
    real = torch.nn.functional.pad(available, (1, 0), value=True)[:, None, None, :]
    for block in backbone.blocks:
        x = block(x, real)
    z = torch.nn.functional.normalize(backbone.projection(x[:, 0]), dim=-1)
    return FusionOutput(backbone.classifier(x[:, 0]), z)


def plain_loop(
    backbone: Any, values: dict[str, Tensor], observed: Tensor, statistics: SubsetStatistics
) -> Tensor:
    """Select as the published code does; return the used modalities `(B, M)`."""
    owner = backbone.token_modality
    rows_of = {int(i): s for s, i in enumerate(subset_id(statistics.subsets))}

    def forward(rows: Tensor, used: Tensor) -> FusionOutput:
        tokens = torch.cat([backbone.encode(n, v[rows]).values for n, v in values.items()], 1)
        return masked_fuse(backbone, tokens, used[:, owner])

    def judge(rows: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        output = forward(rows, used)
        quality = (output.embedding @ statistics.overall.T / 0.1).softmax(-1).amax(-1)
        predicted = output.logits.argmax(-1)
        p = torch.empty(len(used), device=used.device)
        for i in range(len(used)):
            s, k = rows_of[int(subset_id(used[i]))], int(predicted[i])
            delta = 1 - output.embedding[i] @ statistics.prototypes[s, k]
            normal = torch.distributions.Normal(0.0, statistics.spread[s, k])
            p[i] = 2 * (1 - normal.cdf(delta))
        return quality, p

    used, dropped = observed.clone(), observed.clone()
    for _ in range(int((~observed).sum(1).max())):
        rewards = torch.zeros(observed.shape, device=used.device)
        for u in range(observed.shape[1]):
            rows = (~used[:, u] & ~dropped[:, u]).nonzero().squeeze(1)
            if not len(rows):
                continue
            q, p = judge(rows, used[rows])
            after = used[rows]
            after[:, u] = True
            q_after, p_after = judge(rows, after)
            alpha = torch.where(p_after >= p, 1.0, p.log() / (p_after + 1e-9).log())
            rewards[rows, u] = alpha * q_after - q
        dropped |= rewards < 0
        best, chosen = rewards.max(1)
        going = best > 0
        used[going, chosen[going]] = True
        dropped[~going] = True
        if not bool(going.any()):
            break
    forward(torch.arange(len(used), device=used.device), used)
    return used


def clock(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the best of several times in seconds."""
    best = math.inf
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def set_up(
    modalities: int,
    missing: int,
    patients: int,
    device: torch.device,
    train_patients: int = 200,
    fusions: int = 2**20,
) -> tuple[Any, Batch, Recovery, SubsetStatistics]:
    specs = [
        ModalitySpec(f"m{i}", "image", f"m{i}.png", (3, 28, 28), (), "none")
        for i in range(modalities)
    ]
    torch.manual_seed(0)
    entry = BACKBONES["transformer"]
    backbone = entry(specs, CLASSES, entry.Options(dim=128, width=32)).to(device).eval()
    train = make_batch(specs, train_patients, 1).to(device)
    g = torch.Generator().manual_seed(2)
    batch = make_batch(specs, patients, 3)
    rank = torch.rand(patients, modalities, generator=g).argsort(1).argsort(1)
    observed = (rank >= missing).to(device)
    statistics = fit_statistics(
        encode_versions(backbone, train),
        train.observed.available,
        train.labels,
        torch.ones(train_patients, device=device),
        CLASSES,
        backbone.distance,
        fusions=fusions,
    )
    mask = ModalityMask(batch.observed.names, observed)
    hidden = Batch(batch.record_ids, batch.patient_ids, batch.values, mask, {}, batch.labels).to(
        device
    )
    recovery = Recovery(hidden.values, mask, ~observed, torch.zeros_like(observed))
    return backbone, hidden, recovery, statistics


def selection(
    backbone: Any, batch: Batch, recovery: Recovery, statistics: SubsetStatistics
) -> SelectionTrace:
    fuse = encode_versions(backbone, batch, recovery)
    return SELECTORS["dymo"]().select(fuse, batch.observed, recovery.candidates, statistics)


def measure_many(modalities: int, patients: int, device: torch.device, repeats: int) -> None:
    """Print one JSON object about one setting; meant for a process of its own."""
    began = time.perf_counter()
    # Few training patients: what is measured is selection, and fitting's memory is bounded anyway.
    backbone, hidden, recovery, statistics = set_up(
        modalities, 4, patients, device, train_patients=20, fusions=2**16
    )
    fitted = time.perf_counter() - began
    trace = selection(backbone, hidden, recovery, statistics)
    seconds = clock(lambda: selection(backbone, hidden, recovery, statistics), device, repeats)
    _, unseen = lookup(statistics, hidden.observed.available)
    unit = 1 if sys.platform == "darwin" else 1024
    found = {
        "M": modalities,
        "B": patients,
        "subsets": len(statistics.subsets),
        "fitted": fitted,
        "stored": float((~unseen).float().mean()),
        "fusions": patients + int((~trace.reward.isnan()).sum()),
        "seconds": seconds,
        "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
        "device_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
    }
    print(json.dumps(found))


def many(arguments: argparse.Namespace) -> None:
    """Print the table for many modalities, one fresh process per setting."""
    print("\nMany modalities, 4 missing")
    print(
        "| M | B | subsets kept | observed among them | fusions | seconds | patients/s | memory |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for modalities in MANY:
        command = [sys.executable, str(Path(__file__).resolve()), "--only", str(modalities)]
        for name in ("device", "patients", "repeats", "threads"):
            command += [f"--{name}", str(getattr(arguments, name))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        memory = f"{row['host_gb']:.2f} GB"
        if row["device_gb"] is not None:
            memory += f" + {row['device_gb']:.2f} GB on the device"
        print(
            f"| {row['M']} | {row['B']} | {row['subsets']} | {row['stored']:.0%} |"
            f" {row['fusions']} | {row['seconds']:.3f} | {row['B'] / row['seconds']:.0f} |"
            f" {memory} |"
        )


def margins(trace: SelectionTrace) -> Tensor:
    """Return how much reward each patient's closest decision turns on, `(B,)`.

    A decision turns on the sign of each reward, and on the lead of the best positive one.
    """
    closest = trace.reward.abs().nan_to_num(nan=math.inf).amin((0, 2))
    best = trace.reward.nan_to_num(nan=-math.inf).sort(-1, descending=True).values[..., :2]
    contested = best[..., 1] > 0
    lead = torch.where(contested, best[..., 0] - best[..., 1], math.inf)
    return torch.minimum(closest, lead.amin(0))


def compare(cpu: SelectionTrace, other: SelectionTrace) -> tuple[float, int, float]:
    """Return how far another device's selection agrees with the CPU's.

    Args:
        cpu: The CPU's trace.
        other: The other device's, moved to the CPU.

    Returns:
        Share of patients with the same used modalities, near-ties left out; how many near-ties
        there are; the largest difference of rewards that were computed from the same state.
    """
    clear = margins(cpu) >= NEAR_TIE
    same = (cpu.used == other.used).all(1)
    largest = 0.0
    alike = torch.ones(len(same), dtype=torch.bool)  # patients whose states are still the same
    for t in range(min(len(cpu.chosen), len(other.chosen))):
        difference = (cpu.reward[t] - other.reward[t]).abs()[alike]
        largest = max(largest, float(difference.nan_to_num(0.0).max()) if len(difference) else 0.0)
        alike &= cpu.chosen[t] == other.chosen[t]
    return float(same[clear].float().mean()), int((~clear).sum()), largest


def to_cpu(trace: SelectionTrace) -> SelectionTrace:
    """Return the trace with what `compare` reads on the CPU."""
    return replace(
        trace, used=trace.used.cpu(), reward=trace.reward.cpu(), chosen=trace.chosen.cpu()
    )


def against_cpu(
    backbone: Any, hidden: Batch, recovery: Recovery, statistics: SubsetStatistics
) -> None:
    """Print whether CUDA selects as the CPU does, from the same weights, inputs and statistics."""
    host = torch.device("cpu")
    mask = ModalityMask(hidden.observed.names, hidden.observed.available.cpu())
    on_cpu = Recovery(
        {name: v.cpu() for name, v in recovery.values.items()},
        mask,
        recovery.recovered.cpu(),
        recovery.completed.cpu(),
    )
    traces = {}
    default = torch.backends.cudnn.allow_tf32
    for tf32 in (True, False):
        torch.backends.cudnn.allow_tf32 = tf32
        traces[tf32] = to_cpu(selection(backbone, hidden, recovery, statistics))
    torch.backends.cudnn.allow_tf32 = default
    cpu = selection(copy.deepcopy(backbone).to(host), hidden.to(host), on_cpu, statistics.to(host))
    print(f"\nThe same selection on CPU, B = {len(hidden)}")
    print("| convolutions | same selection | near-ties left out | largest difference of rewards |")
    print("|---|---|---|---|")
    for tf32, trace in traces.items():
        share, ties, largest = compare(cpu, trace)
        print(f"| {'TF32' if tf32 else 'float32'} | {share:.2%} | {ties} | {largest:.1e} |")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--patients", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", type=int, help="one setting with so many modalities, as JSON")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        measure_many(arguments.only, arguments.patients, device, arguments.repeats)
        return
    backbone, hidden, recovery, statistics = set_up(5, 4, arguments.patients, device)
    observed = hidden.observed.available

    def ours() -> SelectionTrace:
        return selection(backbone, hidden, recovery, statistics)

    trace = ours()
    # The fusions greedy selection needs: all observed subsets, all open pairs of every step.
    rows = [torch.arange(len(hidden), device=device)]
    used = [observed]
    state = observed.clone()
    for t in range(len(trace.chosen)):
        pair_rows, columns = (~trace.reward[t].isnan()).nonzero(as_tuple=True)
        tried = state[pair_rows].clone()
        tried[torch.arange(len(tried), device=device), columns] = True
        rows.append(pair_rows)
        used.append(tried)
        going = trace.chosen[t] >= 0
        state[going, trace.chosen[t][going]] = True
    all_rows, all_used = torch.cat(rows), torch.cat(used)

    def bound() -> FusionOutput:
        fuse = encode_versions(backbone, hidden, recovery)
        return fuse(all_rows, all_used, all_used & ~observed[all_rows])

    seconds = {
        "ours": clock(ours, device, arguments.repeats),
        "bound": clock(bound, device, arguments.repeats),
        "plain loop": clock(
            lambda: plain_loop(backbone, dict(hidden.values), observed, statistics), device, 1
        ),
    }
    same = plain_loop(backbone, dict(hidden.values), observed, statistics) == trace.used
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"{name}, {arguments.threads} threads, torch {torch.__version__}")
    print(
        f"M = 5, 4 missing, B = {len(hidden)}, {len(all_rows)} fusions, {len(trace.chosen)} steps"
    )
    print("| what | seconds | patients/s | against ours |\n|---|---|---|---|")
    for what, s in seconds.items():
        ratio = s / seconds["ours"]
        print(f"| {what} | {s:.3f} | {len(hidden) / s:.0f} | {ratio:.2f} |")
    print(f"same selection as the plain loop: {float(same.all(1).float().mean()):.1%} of patients")
    if device.type == "cuda":
        against_cpu(backbone, hidden, recovery, statistics)
    many(arguments)


if __name__ == "__main__":
    main()
