"""Works out `derived.json`: what the published rule gives on small made-up inputs.

    python tests/golden/derive.py

Plain loops in arithmetic of 40 digits, written from the formulas and without any of the project's
code, so that tails neither underflow nor round. Inputs come from a seed by a generator that is
spelled out here, and are the same on every machine. Masks are bit numbers: modality i is 1 << i.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mpmath as mp

FILE = Path(__file__).with_name("derived.json")
MODALITIES, CLASSES, WIDTH, PATIENTS = 4, 4, 6, 16
SUBSETS = range(1, 2**MODALITIES)
TEMPERATURE = 0.1
# By name: which factor, and whether all positive rewards of the first step are admitted at once.
RULES = {
    "dymo": (None, False),
    "dymo_ratio": ("ratio", False),
    "dymo_uncalibrated": ("none", False),
    "simultaneous": ("none", True),
}
PUBLISHED = {"cosine": "log_ratio", "euclidean": "ratio"}
WORLDS = {
    # name: distance, seed, which subsets have statistics of their own
    "cosine": ("cosine", 114, tuple(SUBSETS)),
    "euclidean": ("euclidean", 127, tuple(SUBSETS)),
    "gaps": ("cosine", 110, (1, 2, 3, 4, 8, 9, 12, 15)),
    "ties": ("cosine", 25, tuple(SUBSETS)),
}
RATIOS = (0.0, 0.5, 1.0, 3.0, 5.4, 6.0, 12.0, 40.0, 100.0)
RECORDS, TRAINED_ON, TRAINED_CLASSES, TRAINED_WIDTH = 14, 3, 2, 3


def uniform(seed: int) -> Iterator[float]:
    """Yield numbers in [0, 1): the upper 53 bits of a linear congruential generator (Knuth's)."""
    state = seed
    while True:
        state = (6364136223846793005 * state + 1442695040888963407) % 2**64
        yield (state >> 11) / 2**53


class Source:
    """Draws from one stream."""

    def __init__(self, seed: int) -> None:
        self.stream = uniform(seed)

    def number(self) -> float:
        """Return a number in [0, 1)."""
        return next(self.stream)

    def below(self, n: int) -> int:
        """Return one of 0 .. n - 1."""
        return int(self.number() * n)

    def bell(self, size: int) -> list[float]:
        """Return numbers with mean 0 and variance 1: sums of twelve uniform ones."""
        return [sum(self.number() for _ in range(12)) - 6 for _ in range(size)]


def unit(x: list[float]) -> list[float]:
    """Return `x` at length 1."""
    length = math.sqrt(sum(v * v for v in x))
    return [v / length for v in x]


def world(name: str) -> dict[str, Any]:
    """Return the inputs of a world: what a backbone says, statistics, masks."""
    distance, seed, stored = WORLDS[name]
    source = Source(seed)
    templates = [unit(source.bell(WIDTH)) for _ in range(CLASSES)]
    prototypes = {
        s: [
            [0.8 * t + 0.05 * e for t, e in zip(c, source.bell(WIDTH), strict=True)]
            for c in templates
        ]
        for s in SUBSETS
    }
    wide = 0.35 if distance == "cosine" else 0.9
    spread = {s: [wide * (0.5 + source.number()) for _ in range(CLASSES)] for s in SUBSETS}
    embedding: dict[tuple[int, int], list[float]] = {}
    logits: dict[tuple[int, int], list[float]] = {}
    observed, candidates = [], []
    for b in range(PATIENTS):
        true = source.below(CLASSES)
        shown = [
            true if source.number() < 0.6 else source.below(CLASSES) for _ in range(MODALITIES)
        ]
        sharp = [0.3 + source.number() for _ in range(MODALITIES)]
        for s in SUBSETS:
            inside = [m for m in range(MODALITIES) if s >> m & 1]
            z = [
                sum(sharp[m] * templates[shown[m]][d] for m in inside) + 0.25 * e
                for d, e in enumerate(source.bell(WIDTH))
            ]
            embedding[b, s] = unit(z) if distance == "cosine" else [v / len(inside) for v in z]
            votes = [sum(sharp[m] for m in inside if shown[m] == k) for k in range(CLASSES)]
            logits[b, s] = [v + 0.2 * e for v, e in zip(votes, source.bell(CLASSES), strict=True)]
        seen = 1 + source.below(2**MODALITIES - 1)
        if b < 8:  # half of them have one modality alone: the most to choose from
            seen = 1 << b % MODALITIES
        observed.append(seen)
        lost = 1 << source.below(2 * MODALITIES)  # of some, one modality could not be recovered
        candidates.append((2**MODALITIES - 1) & ~seen & ~lost)
    if name == "ties":  # modalities 1 and 2 are twins, and 3 says nothing at all
        for table in (prototypes, spread):
            for s in SUBSETS:
                table[s] = table[_plain(s)]  # type: ignore[index]
        for answers in (embedding, logits):
            for b, s in list(answers):
                answers[b, s] = answers[b, _plain(s)]
        observed = [1 + (0 if b % 2 else 8) for b in range(PATIENTS)]
        candidates = [15 & ~seen for seen in observed]
    overall = [
        [sum(prototypes[s][k][d] for s in stored) / len(stored) for d in range(WIDTH)]
        for k in range(CLASSES)
    ]
    return {
        "distance": distance,
        "stored": stored,
        "embedding": embedding,
        "logits": logits,
        "prototypes": prototypes,
        "spread": spread,
        "overall": overall,
        "observed": observed,
        "candidates": candidates,
    }


def _plain(s: int) -> int:
    """Return the subset that stands for `s` in the world of ties."""
    without = s & 7
    if without & 6 == 4:
        without ^= 6  # 2 alone is as 1 alone
    return without or 8


def dot(x: list[float], y: list[float]) -> Any:
    return mp.fsum(mp.mpf(a) * mp.mpf(b) for a, b in zip(x, y, strict=True))


def squared(x: list[float], y: list[float]) -> Any:
    return mp.fsum((mp.mpf(a) - mp.mpf(b)) ** 2 for a, b in zip(x, y, strict=True))


def quality(w: dict[str, Any], b: int, s: int) -> Any:
    """q = max_k softmax_k(sim / tau), over the overall prototypes."""
    z = w["embedding"][b, s]
    if w["distance"] == "cosine":
        scores = [dot(z, c) / mp.mpf(TEMPERATURE) for c in w["overall"]]
    else:
        scores = [-squared(z, c) / mp.mpf(TEMPERATURE) for c in w["overall"]]
    return mp.exp(max(scores)) / mp.fsum(mp.exp(v) for v in scores)


def row_of(w: dict[str, Any], s: int) -> int:
    """Return `s`, or its largest part with statistics, the lowest number among equals."""
    parts = [t for t in w["stored"] if t & ~s == 0]
    return min(parts, key=lambda t: (-t.bit_count(), t))


def tail(w: dict[str, Any], b: int, s: int) -> Any:
    """p = 2 (1 - Phi(delta / sigma)), of the classifier's class and the subset's own numbers."""
    logits, t = w["logits"][b, s], row_of(w, s)
    k = logits.index(max(logits))  # the first of equals
    z, c = w["embedding"][b, s], w["prototypes"][t][k]
    delta = 1 - dot(z, c) if w["distance"] == "cosine" else mp.sqrt(squared(z, c))
    return mp.erfc(max(delta, 0) / mp.mpf(w["spread"][t][k]) / mp.sqrt(2))


def factor(before: Any, after: Any, calibration: str) -> Any:
    """alpha: 1 where p' >= p, else as the calibration says."""
    if calibration == "none" or after >= before:
        return mp.mpf(1)
    return after / before if calibration == "ratio" else mp.log(before) / mp.log(after)


def reward(w: dict[str, Any], b: int, s: int, larger: int, calibration: str) -> Any:
    alpha = factor(tail(w, b, s), tail(w, b, larger), calibration)
    return alpha * quality(w, b, larger) - quality(w, b, s)


def walk(w: dict[str, Any], b: int, calibration: str, at_once: bool) -> dict[str, Any]:
    """Return one patient's admissions, rewards by step and candidate, and final subset."""
    used, open_ = w["observed"][b], w["candidates"][b]
    chosen: list[int] = []
    rewards: list[dict[int, Any]] = []
    while open_:
        found = {
            u: reward(w, b, used, used | 1 << u, calibration)
            for u in range(MODALITIES)
            if open_ >> u & 1
        }
        rewards.append(found)
        assert all(r == 0 or abs(r) > 1e-6 for r in found.values()), "a decision hangs by a thread"
        positive = {u: r for u, r in found.items() if r > 0}
        if at_once:
            chosen += sorted(positive)
            used |= sum(1 << u for u in positive)
            break
        open_ &= ~sum(1 << u for u, r in found.items() if r < 0)
        if not positive:
            break
        best = max(positive, key=lambda u: (positive[u], -u))
        chosen.append(best)
        used |= 1 << best
        open_ &= ~(1 << best)
    return {"chosen": chosen, "rewards": rewards, "used": used}


def training() -> dict[str, Any]:
    """Return training records with gaps: weights, labels, masks, and a unit vector per subset.

    Of class 1 one record alone has everything, and nobody has modalities 1 and 2 together
    without modality 0.
    """
    source = Source(15)
    available = [7, 7, 7, 3, 5, 1, 2, 7, 3, 3, 5, 5, 4, 2]
    labels = [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    weights = [1.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
    embedding = {
        (i, s): unit(source.bell(TRAINED_WIDTH)) for i in range(RECORDS) for s in range(1, 8)
    }
    return {"available": available, "labels": labels, "weights": weights, "embedding": embedding}


def statistics(distance: str) -> dict[str, Any]:
    """Return weighted means and root mean square distances, with what is too little borrowed."""
    t = training()
    means: dict[tuple[int, int], list[Any]] = {}
    spreads: dict[tuple[int, int], Any] = {}
    counts: dict[tuple[int, int], int] = {}
    for s in range(1, 8):
        for k in range(TRAINED_CLASSES):
            rows = [i for i in range(RECORDS) if t["available"][i] & s == s and t["labels"][i] == k]
            counts[s, k] = len(rows)
            total = mp.fsum(mp.mpf(t["weights"][i]) for i in rows)
            if len(rows) < 2:
                continue
            z = {i: t["embedding"][i, s] for i in rows}
            mean = [
                mp.fsum(mp.mpf(t["weights"][i]) * z[i][d] for i in rows) / total
                for d in range(TRAINED_WIDTH)
            ]
            squares = [
                (1 - dot(z[i], mean)) ** 2 if distance == "cosine" else squared(z[i], mean)
                for i in rows
            ]
            means[s, k] = mean
            spreads[s, k] = mp.sqrt(
                mp.fsum(mp.mpf(t["weights"][i]) * q for i, q in zip(rows, squares, strict=True))
                / total
            )
    overall = []
    for k in range(TRAINED_CLASSES):
        own = [s for s in range(1, 8) if (s, k) in means]
        overall.append(
            [mp.fsum(means[s, k][d] for s in own) / len(own) for d in range(TRAINED_WIDTH)]
        )
    borrowed = {}
    for s in range(1, 8):
        for k in range(TRAINED_CLASSES):
            parts = [p for p in range(1, 8) if p & ~s == 0 and (p, k) in spreads]
            borrowed[s, k] = min(parts, key=lambda p: (-p.bit_count(), p))
    grid = [[borrowed[s, k] for k in range(TRAINED_CLASSES)] for s in range(1, 8)]
    return {
        "counts": [[counts[s, k] for k in range(TRAINED_CLASSES)] for s in range(1, 8)],
        "borrowed_from": grid,
        "prototypes": [
            [[shown(v) for v in means[s, k]] for k, s in enumerate(row)] for row in grid
        ],
        "spread": [[shown(spreads[s, k]) for k, s in enumerate(row)] for row in grid],
        "overall": [[shown(v) for v in row] for row in overall],
    }


def shown(x: Any) -> float:
    """Return a number as it is stored: rounded to 13 digits."""
    return float(mp.nstr(x, 13))


def derive() -> dict[str, Any]:
    """Return all that is stored."""
    mp.mp.dps = 40
    found: dict[str, Any] = {
        "tails": [[r, shown(mp.log(mp.erfc(mp.mpf(r) / mp.sqrt(2))))] for r in RATIOS],
        "statistics": {distance: statistics(distance) for distance in PUBLISHED},
    }
    for name, (distance, _, _) in WORLDS.items():
        w = world(name)
        entry: dict[str, Any] = {
            "quality": [[shown(quality(w, b, s)) for s in SUBSETS] for b in range(PATIENTS)],
            "log_tail": [[shown(mp.log(tail(w, b, s))) for s in SUBSETS] for b in range(PATIENTS)],
        }
        for rule, (calibration, at_once) in RULES.items():
            walks = [
                walk(w, b, calibration or PUBLISHED[distance], at_once) for b in range(PATIENTS)
            ]
            entry[rule] = {
                "chosen": [p["chosen"] for p in walks],
                "used": [p["used"] for p in walks],
                "rewards": [
                    [{str(u): shown(r) for u, r in step.items()} for step in p["rewards"]]
                    for p in walks
                ],
            }
        found[name] = entry
    return found


if __name__ == "__main__":
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in derive().items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
