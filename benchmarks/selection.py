"""How fast selection is: ours, a plain loop, and the bound that no greedy selection can beat.

    python benchmarks/selection.py [--device cuda] [--patients 512] [--repeats 3]

Five 28 x 28 colour images per patient, four of them missing (eta = 0.8), token width 128; random
weights, statistics fitted on random patients: speed depends on neither.

- *ours*: encode every version once, then `dymo`.
- *plain loop*: what the published code does, written plainly: every step and candidate runs
  the whole network for the before-value and for the after-value on the whole batch, unavailable
  tokens masked; class statistics are looked up patient by patient.
- *bound*: encode every version once, plus exactly the fusions that greedy selection cannot avoid
  (each patient's observed subset, and each open candidate of each step), as one batch.
"""

import argparse
import math
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dymo_med.backbones import BACKBONES, encode_versions
from dymo_med.selection import SELECTORS, fit_statistics
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

    def forward(used: Tensor) -> FusionOutput:
        tokens = torch.cat([backbone.encode(n, v).values for n, v in values.items()], 1)
        return masked_fuse(backbone, tokens, used[:, owner])

    def judge(used: Tensor) -> tuple[Tensor, Tensor]:
        output = forward(used)
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
            open_ = ~used[:, u] & ~dropped[:, u]
            if not bool(open_.any()):
                continue
            q, p = judge(used)
            after = used.clone()
            after[:, u] = True
            q_after, p_after = judge(after)
            alpha = torch.where(p_after >= p, 1.0, p.log() / (p_after + 1e-9).log())
            rewards[:, u] = torch.where(open_, alpha * q_after - q, 0.0)
        dropped |= rewards < 0
        best, chosen = rewards.max(1)
        going = best > 0
        used[going, chosen[going]] = True
        if not bool(going.any()):
            break
    forward(used)
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
    modalities: int, missing: int, patients: int, device: torch.device
) -> tuple[Any, Batch, Recovery, SubsetStatistics]:
    specs = [
        ModalitySpec(f"m{i}", "image", f"m{i}.png", (3, 28, 28), (), "none")
        for i in range(modalities)
    ]
    torch.manual_seed(0)
    entry = BACKBONES["transformer"]
    backbone = entry(specs, CLASSES, entry.Options(dim=128, width=32)).to(device).eval()
    train = make_batch(specs, 200, 1).to(device)
    g = torch.Generator().manual_seed(2)
    batch = make_batch(specs, patients, 3)
    rank = torch.rand(patients, modalities, generator=g).argsort(1).argsort(1)
    observed = (rank >= missing).to(device)
    statistics = fit_statistics(
        encode_versions(backbone, train),
        train.observed.available,
        train.labels,
        torch.ones(200, device=device),
        CLASSES,
        backbone.distance,
    )
    mask = ModalityMask(batch.observed.names, observed)
    hidden = Batch(batch.record_ids, batch.patient_ids, batch.values, mask, {}, batch.labels).to(
        device
    )
    recovery = Recovery(hidden.values, mask, ~observed, torch.zeros_like(observed))
    return backbone, hidden, recovery, statistics


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--patients", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    backbone, hidden, recovery, statistics = set_up(5, 4, arguments.patients, device)
    observed = hidden.observed.available

    def ours() -> SelectionTrace:
        fuse = encode_versions(backbone, hidden, recovery)
        return SELECTORS["dymo"]().select(fuse, hidden.observed, recovery.candidates, statistics)

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


if __name__ == "__main__":
    main()
