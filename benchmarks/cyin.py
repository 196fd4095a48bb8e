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
from torch.nn import functional as F

from dymo_med.backbones import BACKBONES
from dymo_med.backbones.bottleneck import CyclicFusion
from dymo_med.types import Batch, ModalityMask, ModalitySpec, Steps

NAMES = ("l", "a", "v")
LENGTH, WIDTH = 4, 12  # tokens of a modality, and numbers in each
SHARED, PRIVATE, CLASSES = 3, 2, 3
NOISE = {"l": 1.0, "a": 2.0, "v": 2.0}  # of a token's number, whose signal has variance 1
COUNTS = {"train": 640, "validation": 400, "test": 1000}
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
EPOCHS, BATCH, RATE, DECAY = 16, 80, 4e-3, 1e-2
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
    "no bottleneck space": {"bottleneck_space": False},
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


def as_batch(values: dict[str, Tensor], labels: Tensor) -> Batch:
    n = len(labels)
    ids = tuple(str(i) for i in range(n))
    everything = ModalityMask(NAMES, torch.ones(n, len(NAMES), dtype=torch.bool))
    return Batch(ids, ids, values, everything, {}, labels)


def missing(n: int, rate: float, generator: torch.Generator) -> Tensor:
    """Return what is left, bool `(n, 3)`: `rate` of the modalities is missing, none of all."""
    wanted = rate * len(NAMES)
    count = int(wanted) + (torch.rand(n, generator=generator) < wanted % 1).int()
    rank = torch.rand(n, len(NAMES), generator=generator).argsort(1).argsort(1)
    return rank >= count.clamp_max(len(NAMES) - 1)[:, None]


@torch.no_grad()
def answer(network: CyclicFusion, tokens: Tensor, left: Tensor) -> Tensor:
    available = left.repeat_interleave(network.options.length, dim=1)
    return network.fuse(*network.fill(tokens, available)).logits


@torch.no_grad()
def encoded(network: CyclicFusion, values: dict[str, Tensor]) -> Tensor:
    return torch.cat([network.encode(n, values[n]).values for n in NAMES], 1)


def train(
    options: dict[str, object],
    data: Data,
    seed: int,
    epochs: int = EPOCHS,
) -> tuple[CyclicFusion, float]:
    """Return the network at its best epoch, and its validation log-loss there."""
    network = build(options, seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    values, labels = data["train"]
    whole = as_batch(values, labels)
    generator = torch.Generator().manual_seed(seed)
    masks = torch.cat(
        [missing(COUNTS["validation"], r, torch.Generator().manual_seed(7)) for r in LOOKED_AT]
    )
    best, state = float("inf"), {}
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        network.train()
        for index in torch.randperm(len(labels), generator=generator).split(BATCH):
            batch = whole.rows(index)
            loss = network.own_loss(
                batch,
                epoch / epochs,
                lambda z, y=batch.labels: F.cross_entropy(z, y, reduction="none"),
                generator,
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
        schedule.step()
        network.eval()
        held, truth = data["validation"]
        tokens = encoded(network, held).repeat(len(LOOKED_AT), 1, 1)
        found = float(F.cross_entropy(answer(network, tokens, masks), truth.repeat(len(LOOKED_AT))))
        if found < best:
            best, state = found, {k: v.clone() for k, v in network.state_dict().items()}
    network.load_state_dict(state)
    return network, best


def make(seed: int) -> tuple[Mixture, Data]:
    mixture = Mixture(seed)
    generator = torch.Generator().manual_seed(seed)
    return mixture, {split: mixture.sample(n, generator) for split, n in COUNTS.items()}


def interval(x: np.ndarray) -> tuple[float, float]:
    """Return mean and half width of its 95 % t interval."""
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return float(x.mean()), float(half)


def ask(network: CyclicFusion, data: Data, latents: str) -> dict[float, float]:
    """Return the accuracy in percent at every missing rate, from means or draws of latents."""
    values, labels = data["test"]
    network.latents.options = network.options.model_copy(update={"latents": latents})
    tokens = encoded(network, values)
    found = {}
    for rate in (0.0, *RATES):
        left = missing(len(labels), rate, torch.Generator().manual_seed(99))
        right = answer(network, tokens, left).argmax(1) == labels
        found[rate] = 100 * float(right.float().mean())
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
    parser.add_argument("out", type=Path, help="CSV file; networks that are in it are not repeated")
    parser.add_argument("--seeds", type=int, default=5)
    parsed = parser.parse_args()
    done = pd.read_csv(parsed.out) if parsed.out.exists() else pd.DataFrame(columns=COLUMNS)
    for seed in range(parsed.seeds):
        mixture, data = make(seed)
        rest = (mixture.information((n,), tuple(x for x in NAMES if x != n)) for n in NAMES)
        told = ", ".join(f"{n} {i:.2f}" for n, i in zip(NAMES, rest, strict=True))
        pairs = (f"{a}{b} {mixture.information((a,), (b,)):.2f}" for a, b in combinations(NAMES, 2))
        print(
            f"Seed {seed}, nats between pairs: {', '.join(pairs)}; with the rest: {told}",
            flush=True,
        )
        for name, options in VARIANTS.items():
            if ((done.seed == seed) & (done.variant == name)).any():
                continue
            start = time.process_time()
            network, score = train(options, data, seed)
            seconds = time.process_time() - start
            asked = {name: ask(network, data, "mean")}
            if name == "full":
                asked["sampled latents"] = ask(network, data, "sample")
            rows = [
                (seed, label, rate, accuracy, score, seconds)
                for label, found in asked.items()
                for rate, accuracy in found.items()
            ]
            done = pd.concat([done, pd.DataFrame(rows, columns=COLUMNS)], ignore_index=True)
            done.to_csv(parsed.out, index=False)
    tables(done)
    each = done.groupby(["variant", "seed"]).seconds.first()
    print(
        f"\n{parsed.seeds} seeds, {each.mean():.1f} CPU seconds per network;"
        f" {platform.machine()}, {torch.get_num_threads()} thread"
    )


if __name__ == "__main__":
    main()
