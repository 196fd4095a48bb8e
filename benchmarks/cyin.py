"""What each part of CyIN is worth where the truth is known.

    python benchmarks/cyin.py RESULTS.csv [--seeds 5]

Three modalities, each a sequence of tokens: a linear mixture of factors that all three share, of
factors of its own, and of noise, all Gaussian, so that the mutual information between modalities is
known. The class depends on shared and private factors. Per seed and variant one network is
trained on complete samples by CyIN's own loss, its epoch chosen on validation samples, and asked
on test samples of which modalities are missing at given rates: each sample lacks the same number of
modalities up to rounding, and keeps at least one, so that 0.7 of three really is 2/3.

Prints Markdown tables: accuracy, and paired differences to the full method, with 95 % t intervals
over seeds.
"""

import argparse
import platform
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dymo_med.backbones import BACKBONES
from dymo_med.backbones.bottleneck import CyclicFusion
from dymo_med.types import Batch, ModalityMask, ModalitySpec, Steps

NAMES = ("l", "a", "v")
LENGTH, WIDTH = 4, 12  # tokens of a modality, and numbers in each
SHARED, PRIVATE, CLASSES = 3, 2, 3
NOISE = {"l": 1.0, "a": 2.0, "v": 2.0}  # of a token's number, whose signal has variance 1
COUNTS = {"train": 640, "validation": 300, "test": 1000}
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
EPOCHS, BATCH, RATE, DECAY = 16, 128, 5e-3, 1e-2
LOOKED_AT = (0.2, 0.6)  # rates on validation samples
COLUMNS = ("seed", "variant", "rate", "accuracy", "validation", "seconds")
Data = dict[str, tuple[dict[str, Tensor], Tensor]]
OFF = {
    "token_bottleneck": False,
    "label_bottleneck": False,
    "translation": False,
    "translated_latents": False,
    "bottleneck_space": False,
}
VARIANTS: dict[str, dict[str, object]] = {
    "full": {},
    "no token bottleneck": {"token_bottleneck": False},
    "no label bottleneck": {"label_bottleneck": False},
    "no cyclic interaction": {"cyclic_interaction": False},
    "no translation loss": {"translation": False},
    "no translated latents": {"translated_latents": False},
    "zero filling": OFF,
    "sum of translations": {"combine": "sum"},
    "moving targets": {"moving_targets": True},
}
BASE: dict[str, object] = {
    "length": LENGTH,
    "dim": 16,
    "hidden": 32,
    "bottleneck": 16,
    "fusion_dim": 16,
    "heads": 2,
    "fusion": "joint",
    "residual_blocks": 1,
    "projection": 8,
}


class Mixture:
    """How the data come about: loadings of one seed."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(1000 + seed)
        factors = SHARED + PRIVATE
        scale = factors**-0.5
        self.loading = {n: torch.randn(LENGTH * WIDTH, factors, generator=g) * scale for n in NAMES}
        # The class: shared factors count as much as all private ones together.
        shared = torch.randn(SHARED, CLASSES, generator=g)
        private = torch.randn(len(NAMES) * PRIVATE, CLASSES, generator=g)
        self.effect = torch.cat([shared / shared.norm(), private / private.norm()]) * 2

    def sample(self, n: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        shared = torch.randn(n, SHARED, generator=generator)
        private = torch.randn(n, len(NAMES), PRIVATE, generator=generator)
        values = {}
        for m, name in enumerate(NAMES):
            x = torch.cat([shared, private[:, m]], 1) @ self.loading[name].T
            x = x + NOISE[name] * torch.randn(x.shape, generator=generator)
            values[name] = x.view(n, LENGTH, WIDTH)
        logits = torch.cat([shared, private.flatten(1)], 1) @ self.effect * 3
        labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
        return values, labels

    def information(self, one: tuple[str, ...], other: tuple[str, ...]) -> float:
        """Return the mutual information between two sets of modalities, in nats."""
        return self._entropy(one) + self._entropy(other) - self._entropy((*one, *other))

    def _entropy(self, names: tuple[str, ...]) -> float:
        """Return half the log determinant of the covariance."""
        size = LENGTH * WIDTH
        covariance = torch.zeros(len(names) * size, len(names) * size, dtype=torch.float64)
        for i, a in enumerate(names):
            for j, b in enumerate(names):
                common = SHARED + (PRIVATE if a == b else 0)
                block = self.loading[a][:, :common] @ self.loading[b][:, :common].T
                block = block.double()
                if a == b:
                    block = block + NOISE[a] ** 2 * torch.eye(size, dtype=torch.float64)
                covariance[i * size : (i + 1) * size, j * size : (j + 1) * size] = block
        return 0.5 * float(torch.logdet(covariance))


def build(options: dict[str, object], seed: int) -> CyclicFusion:
    specs = [
        ModalitySpec(n, "tokens", f"{n}.npy", (LENGTH, WIDTH), steps=Steps(standardise=False))
        for n in NAMES
    ]
    entry = BACKBONES["cyclic"]
    torch.manual_seed(seed)
    network = entry(specs, CLASSES, entry.Options(**{**BASE, **options}))
    assert isinstance(network, CyclicFusion)
    return network


class Network(nn.Module):
    """The network, and what is asked of it, so that several can be asked at once (`vmap`)."""

    def __init__(self, options: dict[str, object], seed: int) -> None:
        super().__init__()
        self.network = build(options, seed)

    def forward(
        self, values: dict[str, Tensor], labels: Tensor, progress: float, generator: torch.Generator
    ) -> Tensor:
        """Return the loss of complete samples."""
        n = len(labels)
        ids = tuple(str(i) for i in range(n))
        everything = ModalityMask(NAMES, torch.ones(n, len(NAMES), dtype=torch.bool))
        batch = Batch(ids, ids, values, everything, {}, labels)
        return self.network.own_loss(
            batch, progress, lambda z: F.cross_entropy(z, labels, reduction="none"), generator
        ).mean()


class Asked(nn.Module):
    """The answers of such a network where modalities are missing."""

    def __init__(self, network: CyclicFusion) -> None:
        super().__init__()
        self.network = network

    def forward(self, values: dict[str, Tensor], left: Tensor) -> Tensor:
        tokens = torch.cat([self.network.encode(n, values[n]).values for n in NAMES], 1)
        available = left.repeat_interleave(self.network.options.length, dim=1)
        return self.network.fuse(*self.network.fill(tokens, available)).logits


def missing(n: int, rate: float, generator: torch.Generator) -> Tensor:
    """Return what is left, bool `(n, 3)`: `rate` of the modalities is missing, none of all."""
    wanted = rate * len(NAMES)
    count = int(wanted) + (torch.rand(n, generator=generator) < wanted % 1).int()
    rank = torch.rand(n, len(NAMES), generator=generator).argsort(1).argsort(1)
    return rank >= count.clamp_max(len(NAMES) - 1)[:, None]


State = dict[str, Tensor]


def answers(
    options: dict[str, object], state: State, values: dict[str, Tensor], left: Tensor
) -> Tensor:
    """Return the logits `(seeds, n, K)` of all seeds' networks."""
    asked = Asked(build(options, 0)).eval()
    with torch.no_grad():
        found: Tensor = vmap(lambda p, v: functional_call(asked, p, (v, left)), randomness="same")(
            state, values
        )
    return found


def train(options: dict[str, object], data: Data, seeds: int) -> tuple[State, Tensor]:
    """Return the networks of all seeds, trained side by side, at their best epochs.

    Each has data and initial weights of its own; noise and order of samples are common.

    Returns:
        Stacked weights, and each one's validation log-loss.
    """
    networks = [Network(options, seed) for seed in range(seeds)]
    state, _ = stack_module_state(networks)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(state.values(), RATE, weight_decay=DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    base, generator = networks[0], torch.Generator().manual_seed(0)
    values, labels = data["train"]
    held, truth = data["validation"]
    masks = [missing(truth.shape[1], r, torch.Generator().manual_seed(7)) for r in LOOKED_AT]
    best = torch.full((seeds,), torch.inf)
    kept = {k: v.detach().clone() for k, v in state.items()}
    for epoch in range(EPOCHS):

        def loss(
            p: State, v: dict[str, Tensor], y: Tensor, progress: float = epoch / EPOCHS
        ) -> Tensor:
            found: Tensor = functional_call(base, p, (v, y, progress, generator))
            return found

        for index in torch.randperm(labels.shape[1], generator=generator).split(BATCH):
            batch = {n: v[:, index] for n, v in values.items()}
            total = vmap(loss, randomness="same")(state, batch, labels[:, index]).sum()
            optimizer.zero_grad()
            total.backward()
            clip(state, 5.0)
            optimizer.step()
        schedule.step()
        found = torch.zeros(seeds)
        for left in masks:
            logits = answers(options, state, held, left)
            found += F.cross_entropy(logits.transpose(1, 2), truth, reduction="none").mean(1)
        better = found < best
        best = torch.where(better, found, best)
        for key, value in state.items():
            kept[key][better] = value.detach()[better]
    return kept, best / len(masks)


def clip(state: State, most: float) -> None:
    """Bound the norm of each seed's gradient."""
    gradients = [p.grad.flatten(1) for p in state.values() if p.grad is not None]
    norm = torch.stack([g.square().sum(1) for g in gradients]).sum(0).sqrt()
    factor = (most / (norm + 1e-6)).clamp_max(1)
    for g in gradients:
        g *= factor[:, None]


def make(seeds: int) -> Data:
    """Return the samples of all seeds, `(seeds, n, ...)`, and tell what there is to know."""
    made = []
    for seed in range(seeds):
        mixture, generator = Mixture(seed), torch.Generator().manual_seed(seed)
        rest = (mixture.information((n,), tuple(x for x in NAMES if x != n)) for n in NAMES)
        told = ", ".join(f"{n} {i:.2f}" for n, i in zip(NAMES, rest, strict=True))
        pairs = (f"{a}{b} {mixture.information((a,), (b,)):.2f}" for a, b in combinations(NAMES, 2))
        print(f"Seed {seed}, nats between pairs: {', '.join(pairs)}; with the rest: {told}")
        made.append({split: mixture.sample(n, generator) for split, n in COUNTS.items()})
    return {
        split: (
            {n: torch.stack([m[split][0][n] for m in made]) for n in NAMES},
            torch.stack([m[split][1] for m in made]),
        )
        for split in COUNTS
    }


def interval(x: np.ndarray) -> tuple[float, float]:
    """Return mean and half width of its 95 % t interval."""
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return float(x.mean()), float(half)


def ask(options: dict[str, object], state: State, data: Data) -> dict[float, Tensor]:
    """Return the accuracies in percent of all seeds at every missing rate."""
    values, labels = data["test"]
    found = {}
    for rate in (0.0, *RATES):
        left = missing(labels.shape[1], rate, torch.Generator().manual_seed(99))
        right = answers(options, state, values, left).argmax(-1) == labels
        found[rate] = 100 * right.float().mean(1)
    return found


def tables(results: pd.DataFrame) -> None:
    """Print accuracies, and paired differences to the full method."""
    wide = results.pivot_table(index=["variant", "seed"], columns="rate", values="accuracy")
    wide["mean"] = wide[list(RATES)].mean(axis=1)
    columns, names = list(wide.columns), list(dict.fromkeys(results.variant))
    print("| accuracy, % | " + " | ".join(map(str, columns)) + " | validation log-loss |")
    print("|---" * (len(columns) + 2) + "|")
    for name in names:
        cells = [f"{wide.loc[name][c].mean():.1f}" for c in columns]
        score = results[results.variant == name].validation.mean()
        print(f"| {name} | {' | '.join(cells)} | {score:.4f} |")
    print("\n| full minus | " + " | ".join(map(str, columns)) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in names[1:]:
        cells = []
        for c in columns:
            mean, half = interval((wide.loc["full"][c] - wide.loc[name][c]).dropna().to_numpy())
            cells.append(f"{mean:+.1f} ± {half:.1f}")
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="CSV file; variants that are in it are not repeated")
    parser.add_argument("--seeds", type=int, default=5)
    parsed = parser.parse_args()
    done = pd.read_csv(parsed.out) if parsed.out.exists() else pd.DataFrame(columns=COLUMNS)
    data = make(parsed.seeds)
    for name, options in VARIANTS.items():
        if (done.variant == name).any():
            continue
        start = time.process_time()
        state, score = train(options, data, parsed.seeds)
        seconds = time.process_time() - start
        asked = {name: ask(options, state, data)}
        if name == "full":
            asked["sampled latents"] = ask({**options, "latents": "sample"}, state, data)
        rows = [
            (seed, label, rate, float(accuracy[seed]), float(score[seed]), seconds)
            for label, found in asked.items()
            for rate, accuracy in found.items()
            for seed in range(parsed.seeds)
        ]
        done = pd.concat([done, pd.DataFrame(rows, columns=COLUMNS)], ignore_index=True)
        done.to_csv(parsed.out, index=False)
        print(f"{name}: {seconds:.0f} CPU seconds", flush=True)
    tables(done)
    print(f"\n{parsed.seeds} seeds; {platform.machine()}, {torch.get_num_threads()} thread")


if __name__ == "__main__":
    with sdpa_kernel(SDPBackend.MATH):  # the one that several networks at once can share
        main()
