"""What each part of CyIN is worth where the truth is known.

    python benchmarks/cyin.py tune TRIALS.csv [--trials 16] [--part 1/2]
    python benchmarks/cyin.py run RESULTS.csv [--seeds 24] [--samples 640] [--private 0.5]

Three modalities, each a sequence of tokens: a linear mixture, the same at every step, of factors
that all three share, of factors of its own, and of noise. A factor is the same for the whole sample
up to fluctuations from step to step. All is Gaussian, so that the mutual information between
modalities is known, and so is the best that anybody could answer (`best possible`). The class
depends on shared and private factors alike, or with `--private 0` on shared ones alone.

Per seed and variant one network is trained on complete samples by CyIN's own loss, its epoch
chosen on validation samples, and asked on test samples of which modalities are missing at given
rates: each sample lacks the same number of modalities up to rounding, and keeps at least one, so
that 0.7 of three really is 2/3.

`tune` tries the same random settings for every variant on seeds of its own and prints each one's
best: `TUNED`. `run` asks other seeds. It prints Markdown tables: accuracy, and paired
differences, with 95 % t intervals over seeds.
"""

import argparse
import platform
import random
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
FACTORS = SHARED + len(NAMES) * PRIVATE
STEADY = 0.5  # share of a factor's variance that does not change from step to step
NOISE = {"l": 1.0, "a": 2.0, "v": 2.0}  # of a token's number, whose signal has variance 1
VALIDATION = 300
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
BATCH = 128
LOOKED_AT = (0.2, 0.6)  # rates on validation samples
TUNING = range(100, 108)  # seeds of `tune`; `run` starts from 0
Data = dict[str, tuple[dict[str, Tensor], Tensor]]
Setting = dict[str, object]
OFF: Setting = {
    "token_bottleneck": False,
    "label_bottleneck": False,
    "translation": False,
    "translated_latents": False,
    "bottleneck_space": False,
}
# Each variant's switches. `gaps` is this benchmark's own: training samples lack modalities too.
VARIANTS: dict[str, Setting] = {
    "full": {},
    "no token bottleneck": {"token_bottleneck": False},
    "no label bottleneck": {"label_bottleneck": False},
    "no cyclic interaction": {"cyclic_interaction": False},
    "no translation loss": {"translation": False},
    "no cycle loss": {"cycle": False},
    "no bottleneck space": {"token_bottleneck": False, "bottleneck_space": False},
    "no translated latents": {"translated_latents": False},
    "zero filling": OFF,
    "zero filling, trained on gaps": {**OFF, "gaps": True},
}
# Forms of the full method, each at the setting of a variant.
FORMS: dict[str, tuple[str, Setting]] = {
    "sum of translations": ("full", {"combine": "sum"}),
    "moving targets": ("full", {"moving_targets": True}),
    "joint fusion": ("full", {"fusion": "joint"}),
    "full, set as without cycle": ("no cycle loss", {}),
}
# Variants that happen to be best at the same setting, so that nothing else differs.
AT_ONE_SETTING = (
    ("full, set as without cycle", "no translation loss"),
    ("full, set as without cycle", "no cycle loss"),
    ("no cycle loss", "no translation loss"),
)
BASE: Setting = {
    "length": LENGTH,
    "dim": 16,
    "hidden": 32,
    "fusion_dim": 16,
    "heads": 2,
    "fusion": "pairwise",
    "projection": 8,
}
# How the network is trained; all else are options of the network.
TRAINING = ("epochs", "learning_rate", "weight_decay", "gaps")
SPACE: dict[str, tuple[object, ...]] = {
    "epochs": (16, 32, 48),
    "learning_rate": (0.002, 0.005, 0.01),
    "weight_decay": (0.01, 0.1, 0.5),
    "beta": (1.0, 4.0, 16.0, 64.0),
    "gamma": (0.1, 0.3, 1.0, 3.0, 10.0),
    "stage_divide": (0.1, 0.2, 0.4),
    "bottleneck": (4, 8, 16),
    "residual_dims": ((8,), (16, 8)),
    "residual_blocks": (1, 2),
}
# What `tune` found best: which of its trials.
TUNED = {
    "full": 13,
    "no token bottleneck": 9,
    "no label bottleneck": 2,
    "no cyclic interaction": 14,
    "no translation loss": 0,
    "no cycle loss": 0,
    "no bottleneck space": 5,
    "no translated latents": 9,
    "zero filling": 12,
    "zero filling, trained on gaps": 2,
}


def drawn(trial: int) -> Setting:
    """Return the setting of a trial."""
    draw = random.Random(trial)
    return {key: draw.choice(values) for key, values in SPACE.items()}


class Mixture:
    """How the data come about: loadings of one seed, `(L W, FACTORS (1 + L))` per modality.

    What they load on is the steady part of every factor, then its fluctuation at every step.
    `private` is the share of all private factors together in what decides the class.
    """

    def __init__(self, seed: int, private: float) -> None:
        g = torch.Generator().manual_seed(1000 + seed)
        self.loading = {}
        for m, name in enumerate(NAMES):
            own = torch.randn(WIDTH, SHARED + PRIVATE, generator=g) * (SHARED + PRIVATE) ** -0.5
            token = torch.zeros(WIDTH, FACTORS)
            start = SHARED + m * PRIVATE
            token[:, :SHARED], token[:, start : start + PRIVATE] = own.split([SHARED, PRIVATE], 1)
            steady = (token * STEADY**0.5).repeat(LENGTH, 1)
            moving = torch.kron(torch.eye(LENGTH), token * (1 - STEADY) ** 0.5)
            self.loading[name] = torch.cat([steady, moving], 1)
        effects = []
        for factors, share in ((SHARED, 1 - private), (FACTORS - SHARED, private)):
            effect = torch.randn(factors, CLASSES, generator=g)
            effects.append(effect / effect.norm() * (72 * share) ** 0.5)
        self.effect = torch.cat(effects)

    def sample(self, n: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        hidden = torch.randn(n, FACTORS * (1 + LENGTH), generator=generator)
        values = {}
        for name, loading in self.loading.items():
            x = hidden @ loading.T
            x = x + NOISE[name] * torch.randn(x.shape, generator=generator)
            values[name] = x.view(n, LENGTH, WIDTH)
        logits = hidden[:, :FACTORS] @ self.effect
        labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
        return values, labels

    def best(self, values: dict[str, Tensor], left: Tensor, draws: int = 1000) -> Tensor:
        """Return the true class probabilities `(n, K)` given what is left.

        The factors' posterior is Gaussian and exact; classes are averaged over draws from it.
        """
        noise = torch.randn(draws, FACTORS, generator=torch.Generator().manual_seed(0))
        found = torch.zeros(len(left), CLASSES)
        for pattern in left.unique(dim=0):
            rows = (left == pattern).all(1)
            precision, evidence = torch.eye(FACTORS * (1 + LENGTH)), torch.zeros(1)
            for name, there in zip(NAMES, pattern, strict=True):
                if there:
                    loading = self.loading[name] / NOISE[name]
                    precision = precision + loading.T @ loading
                    x = values[name][rows].flatten(1) / NOISE[name]
                    evidence = evidence + x @ loading
            covariance = torch.linalg.inv(precision)
            mean = (evidence @ covariance)[:, :FACTORS]
            root = torch.linalg.cholesky(covariance[:FACTORS, :FACTORS])
            factors = mean[:, None] + noise @ root.T
            found[rows] = (factors @ self.effect).softmax(-1).mean(1)
        return found

    def information(self, one: tuple[str, ...], other: tuple[str, ...]) -> float:
        """Return the mutual information between two sets of modalities, in nats."""
        return self._entropy(one) + self._entropy(other) - self._entropy((*one, *other))

    def _entropy(self, names: tuple[str, ...]) -> float:
        """Return half the log determinant of the covariance."""
        loading = torch.cat([self.loading[n] for n in names]).double()
        noise = torch.tensor([NOISE[n] ** 2 for n in names]).repeat_interleave(LENGTH * WIDTH)
        return 0.5 * float(torch.logdet(loading @ loading.T + torch.diag(noise.double())))


def build(setting: Setting, seed: int) -> CyclicFusion:
    specs = [
        ModalitySpec(n, "tokens", f"{n}.npy", (LENGTH, WIDTH), steps=Steps(standardise=False))
        for n in NAMES
    ]
    entry = BACKBONES["cyclic"]
    options = {k: v for k, v in {**BASE, **setting}.items() if k not in TRAINING}
    torch.manual_seed(seed)
    network = entry(specs, CLASSES, entry.Options.model_validate(options))
    assert isinstance(network, CyclicFusion)
    return network


class Network(nn.Module):
    """The network, and what is asked of it, so that several can be asked at once (`vmap`)."""

    def __init__(self, setting: Setting, seed: int) -> None:
        super().__init__()
        self.network, self.gaps = build(setting, seed), bool(setting.get("gaps"))

    def forward(self, asked: str, *arguments: object) -> Tensor:
        """Return what `loss` or `answer` says."""
        found: Tensor = getattr(self, asked)(*arguments)
        return found

    def loss(
        self, values: dict[str, Tensor], labels: Tensor, progress: float, generator: torch.Generator
    ) -> Tensor:
        """Return the loss of complete samples, or with `gaps` of samples that lack modalities."""
        n = len(labels)
        if self.gaps:
            count = torch.randint(len(NAMES), (n,), generator=generator)
            return F.cross_entropy(self.answer(values, absent(count, generator)), labels)
        ids = tuple(str(i) for i in range(n))
        everything = ModalityMask(NAMES, torch.ones(n, len(NAMES), dtype=torch.bool))
        batch = Batch(ids, ids, values, everything, {}, labels)
        return self.network.own_loss(
            batch, progress, lambda z: F.cross_entropy(z, labels, reduction="none"), generator
        ).mean()

    def answer(self, values: dict[str, Tensor], left: Tensor) -> Tensor:
        """Return the logits where only some modalities are left, bool `(n, 3)`."""
        tokens = torch.cat([self.network.encode(n, values[n]).values for n in NAMES], 1)
        available = left.repeat_interleave(LENGTH, dim=1)
        return self.network.fuse(*self.network.fill(tokens, available)).logits


def absent(count: Tensor, generator: torch.Generator) -> Tensor:
    """Return what is left, bool `(n, 3)`, where `count` of three are missing at random."""
    rank = torch.rand(*count.shape, len(NAMES), generator=generator).argsort(-1).argsort(-1)
    return rank >= count[..., None]


def missing(n: int, rate: float, generator: torch.Generator) -> Tensor:
    """Return what is left, bool `(n, 3)`: `rate` of the modalities is missing, none of all."""
    wanted = rate * len(NAMES)
    count = int(wanted) + (torch.rand(n, generator=generator) < wanted % 1).int()
    return absent(count.clamp_max(len(NAMES) - 1), generator)


State = dict[str, Tensor]


def answers(setting: Setting, state: State, values: dict[str, Tensor], left: Tensor) -> Tensor:
    """Return the logits `(seeds, n, K)` of all seeds' networks."""
    network = Network(setting, 0).eval()

    def answer(p: State, v: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(network, p, ("answer", v, left))
        return found

    with torch.no_grad():
        return vmap(answer, randomness="different")(state, values)


def train(setting: Setting, data: Data, seeds: range) -> tuple[State, Tensor]:
    """Return the networks of all seeds, trained side by side, at their best epochs.

    Each has data, initial weights, noise and an order of samples of its own.

    Returns:
        Stacked weights, and each one's validation log-loss.
    """
    networks = [Network(setting, seed) for seed in seeds]
    state, _ = stack_module_state(networks)  # type: ignore[arg-type]
    rate, decay, epochs = (setting[k] for k in ("learning_rate", "weight_decay", "epochs"))
    assert isinstance(rate, float) and isinstance(decay, float) and isinstance(epochs, int)
    optimizer = torch.optim.AdamW(state.values(), rate, weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    base, generator = networks[0], torch.Generator().manual_seed(seeds.start)
    values, labels = data["train"]
    held, truth = data["validation"]
    masks = [missing(truth.shape[1], r, torch.Generator().manual_seed(7)) for r in LOOKED_AT]
    best = torch.full((len(seeds),), torch.inf)
    kept = {k: v.detach().clone() for k, v in state.items()}
    lane = torch.arange(len(seeds))[:, None]
    for epoch in range(epochs):

        def loss(
            p: State, v: dict[str, Tensor], y: Tensor, progress: float = epoch / epochs
        ) -> Tensor:
            found: Tensor = functional_call(base, p, ("loss", v, y, progress, generator))
            return found

        order = torch.rand(labels.shape, generator=generator).argsort(1)
        for index in order.split(BATCH, 1):
            batch = {n: v[lane, index] for n, v in values.items()}
            total = vmap(loss, randomness="different")(state, batch, labels[lane, index]).sum()
            optimizer.zero_grad()
            total.backward()
            clip(state, 5.0)
            optimizer.step()
        schedule.step()
        found = torch.zeros(len(seeds))
        for left in masks:
            logits = answers(setting, state, held, left)
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


def make(seeds: range, private: float, samples: int, test: int) -> Data:
    """Return the samples of all seeds, `(seeds, n, ...)`: `samples` to train on, `test` to ask."""
    # Those looked at and asked about are the same however many there are to train.
    counts = {"validation": VALIDATION, "test": test, "train": samples}
    made = []
    for seed in seeds:
        mixture, generator = Mixture(seed, private), torch.Generator().manual_seed(seed)
        made.append({split: mixture.sample(n, generator) for split, n in counts.items()})
    return {
        split: (
            {n: torch.stack([m[split][0][n] for m in made]) for n in NAMES},
            torch.stack([m[split][1] for m in made]),
        )
        for split in made[0]
    }


def tell_information(seeds: range) -> None:
    """Print how much modalities say of each other: the range over seeds, in nats."""
    mixtures = [Mixture(seed, 0.5) for seed in seeds]  # whatever decides the class
    for a, b in combinations(NAMES, 2):
        nats = [m.information((a,), (b,)) for m in mixtures]
        print(f"{a} and {b}: {min(nats):.2f} to {max(nats):.2f} nats")
    for name in NAMES:
        rest = tuple(n for n in NAMES if n != name)
        nats = [m.information((name,), rest) for m in mixtures]
        print(f"{name} and the rest: {min(nats):.2f} to {max(nats):.2f} nats")


def asked_masks(n: int) -> dict[float, Tensor]:
    """Return what is left of the test samples at every rate, the same for all seeds."""
    generators = {rate: torch.Generator().manual_seed(99) for rate in (0.0, *RATES)}
    return {rate: missing(n, rate, g) for rate, g in generators.items()}


def ask(setting: Setting, state: State, data: Data) -> dict[float, Tensor]:
    """Return the accuracies in percent of all seeds at every missing rate."""
    values, labels = data["test"]
    found = {}
    for rate, left in asked_masks(labels.shape[1]).items():
        right = answers(setting, state, values, left).argmax(-1) == labels
        found[rate] = 100 * right.float().mean(1)
    return found


def ask_truth(data: Data, seeds: range, private: float) -> dict[float, Tensor]:
    """Return the accuracies in percent of the true probabilities."""
    values, labels = data["test"]
    masks = asked_masks(labels.shape[1])
    found: dict[float, list[Tensor]] = {}
    for i, seed in enumerate(seeds):
        mixture, mine = Mixture(seed, private), {n: v[i] for n, v in values.items()}
        for rate, left in masks.items():
            right = mixture.best(mine, left).argmax(1) == labels[i]
            found.setdefault(rate, []).append(100 * right.float().mean())
    return {rate: torch.stack(right) for rate, right in found.items()}


def overall(accuracies: dict[float, Tensor]) -> Tensor:
    """Return the mean over the rates from 0.1 on, per seed."""
    return torch.stack([accuracies[rate] for rate in RATES]).mean(0)


def interval(x: np.ndarray) -> tuple[float, float]:
    """Return mean and half width of its 95 % t interval."""
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return float(x.mean()), float(half)


def tables(results: pd.DataFrame) -> None:
    """Print accuracies, and paired differences."""
    wide = results.pivot_table(index=["variant", "seed"], columns="rate", values="accuracy")
    wide["mean"] = wide[list(RATES)].mean(axis=1)
    columns, names = list(wide.columns), list(dict.fromkeys(results.variant))
    print("| accuracy, % | " + " | ".join(map(str, columns)) + " | validation log-loss |")
    print("|---" * (len(columns) + 2) + "|")
    for name in names:
        cells = [f"{wide.loc[name][c].mean():.1f}" for c in columns]
        score = results[results.variant == name].validation.mean()
        print(f"| {name} | {' | '.join(cells)} | {'' if np.isnan(score) else f'{score:.4f}'} |")
    scores = results.groupby(["variant", "seed"]).validation.first()
    to_full = {f"full − {name}": ("full", name) for name in names if name != "full"}
    alike = {f"{one} − {other}": (one, other) for one, other in AT_ONE_SETTING}
    for title, pairs in (("each at its setting", to_full), ("at one setting", alike)):
        print(f"\n| {title} | {' | '.join(map(str, columns))} | validation log-loss |")
        print("|---" * (len(columns) + 2) + "|")
        for label, (one, other) in pairs.items():
            more = wide.loc[one] - wide.loc[other]
            cells = ["{:+.1f} ± {:.1f}".format(*interval(more[c].to_numpy())) for c in columns]
            mean, half = interval((scores[one] - scores[other]).to_numpy())
            cells.append("" if np.isnan(mean) else f"{mean:+.4f} ± {half:.4f}")
            print(f"| {label} | {' | '.join(cells)} |")


def run(out: Path, seeds: range, private: float, samples: int) -> None:
    """Ask every variant at its tuned setting; what `out` has is not repeated."""
    columns = ("seed", "variant", "rate", "accuracy", "validation", "seconds")
    done = pd.read_csv(out) if out.exists() else pd.DataFrame(columns=columns)
    tell_information(seeds)
    data = make(seeds, private, samples, test=4000)
    nothing = torch.full((len(seeds),), torch.nan)
    plans = {name: {**drawn(TUNED[name]), **off} for name, off in VARIANTS.items()}
    plans |= {name: {**drawn(TUNED[whose]), **form} for name, (whose, form) in FORMS.items()}
    for name, setting in plans.items():
        if set(seeds) <= set(done[done.variant == name].seed):
            continue
        start = time.process_time()
        state, score = train(setting, data, seeds)
        seconds = time.process_time() - start
        asked = {name: (ask(setting, state, data), score)}
        if name == "full":
            asked["best possible"] = ask_truth(data, seeds, private), nothing
            asked["sampled latents"] = ask({**setting, "latents": "sample"}, state, data), nothing
        rows = [
            (seed, label, rate, float(accuracy[i]), float(validation[i]), seconds)
            for label, (found, validation) in asked.items()
            for rate, accuracy in found.items()
            for i, seed in enumerate(seeds)
        ]
        new = pd.DataFrame(rows, columns=columns)
        done = new if done.empty else pd.concat([done, new], ignore_index=True)
        done.to_csv(out, index=False)
        print(f"{name}: {seconds:.0f} CPU seconds", flush=True)
    tables(done)
    print(f"\n{len(seeds)} seeds, {samples} samples to train on, private {private}", end="; ")


def tune(out: Path, trials: int, part: tuple[int, int], private: float, samples: int) -> None:
    """Try the same random settings for every variant; what `out` has is not repeated."""
    columns = ("trial", "variant", "accuracy", "complete", "validation")
    done = pd.read_csv(out) if out.exists() else pd.DataFrame(columns=columns)
    data = make(TUNING, private, samples, test=1000)
    which, of = part
    for trial in range(which - 1, trials, of):
        for name, off in VARIANTS.items():
            if ((done.trial == trial) & (done.variant == name)).any():
                continue
            setting = {**drawn(trial), **off}
            state, score = train(setting, data, TUNING)
            asked = ask(setting, state, data)
            figures = overall(asked).mean(), asked[0.0].mean(), score.mean()
            row = (trial, name, *(round(float(x), 4) for x in figures))
            new = pd.DataFrame([row], columns=columns)
            done = new if done.empty else pd.concat([done, new], ignore_index=True)
            done.to_csv(out, index=False)
            print(*row, flush=True)
    wide = done.pivot(index="trial", columns="variant", values="accuracy")
    print("| variant | best trial | accuracy, % | full minus, mean of trials |\n|---|---|---|---|")
    for name in VARIANTS:
        less = "{:+.1f} ± {:.1f}".format(*interval((wide["full"] - wide[name]).dropna().to_numpy()))
        print(f"| {name} | {wide[name].idxmax()} | {wide[name].max():.1f} | {less} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["tune", "run"])
    parser.add_argument("out", type=Path, help="CSV file; what it has is not repeated")
    parser.add_argument("--seeds", type=int, default=24, help="of `run`: how many")
    parser.add_argument("--first", type=int, default=0, help="of `run`: the first of them")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--part", default="1/1", help="of the trials, for several processes")
    parser.add_argument("--samples", type=int, default=640, help="to train on")
    parser.add_argument("--private", type=float, default=0.5, help="share in deciding the class")
    parsed = parser.parse_args()
    if parsed.mode == "tune":
        which, of = map(int, parsed.part.split("/"))
        tune(parsed.out, parsed.trials, (which, of), parsed.private, parsed.samples)
    else:
        seeds = range(parsed.first, parsed.first + parsed.seeds)
        run(parsed.out, seeds, parsed.private, parsed.samples)
    print(f"{platform.machine()}, {torch.get_num_threads()} thread")


if __name__ == "__main__":
    with sdpa_kernel(SDPBackend.MATH):  # the one that several networks at once can share
        main()
