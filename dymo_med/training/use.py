"""Which modalities a bundle uses: what happens to its answers when contents are exchanged.

Shapley values start from absence, and to a network absence is news: it may answer otherwise because
a scan is there, whatever the scan shows. So contents are exchanged between patients who have the
same modalities. Where that changes nothing, a modality is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dymo_med.backbones import EncodedVersions
from dymo_med.metrics import auroc
from dymo_med.references import Mixed, References, under
from dymo_med.tasks import OverClasses
from dymo_med.training.references import Held
from dymo_med.types import Batch, Interval, Use, UseRow

# Fewer patients who could exchange something tell nothing.
_FEWEST = 10
_MOST_RECORDS = 300
_LEAST_PERMUTATIONS, _MOST_PERMUTATIONS = 39, 199
# Answers of the network that the whole audit may take, about.
_ENOUGH_ANSWERS = 24_000
_RESAMPLES, _DRAWN = 20, 20  # of patients, for each of so many permutations
_CHUNK = 512

Floats = NDArray[np.float64]


def audit_use(
    held: Sequence[Held], references: References | None, task: OverClasses, seed: int
) -> Use:
    """Return what exchanging each modality between patients of the same pattern does.

    Each modality is exchanged by itself, and all scans and all tables as groups. Answers are those
    of the bundle from what was observed, the part of a reference included.

    Args:
        held: Labelled held-back records.
        references: Of the bundle.
        task: What is predicted, and what answers are judged by.
        seed: Of permutations and resamples.

    Returns:
        Rows in canonical order, groups last. Of a modality that fewer than ten patients could
        exchange nothing is said but how many there are.
    """
    network = EncodedVersions(
        held[0].fuse.backbone,
        torch.cat([h.fuse.observed for h in held]),
        torch.cat([h.fuse.observed_available for h in held]),
        None,
    )
    features = torch.cat([h.features for h in held])
    people = _People.of([h.batch for h in held])
    specs = network.backbone.specs
    parts: dict[str, list[int]] = {spec.name: [m] for m, spec in enumerate(specs)}
    for group, wanted in (("all scans", True), ("all tables", False)):
        inside = [m for m, s in enumerate(specs) if (s.is_image if wanted else bool(s.columns))]
        if len(inside) > 1:
            parts[group] = inside
    kept = torch.linspace(0, len(features) - 1, min(len(features), _MOST_RECORDS)).long().unique()
    asked = _Asked(network, features, references, held[0].temperature)
    rng = np.random.default_rng([seed, 7])
    number = int(
        np.clip(
            _ENOUGH_ANSWERS // max(1, len(kept) * len(parts)),
            _LEAST_PERMUTATIONS,
            _MOST_PERMUTATIONS,
        )
    )
    rows = [
        _row(name, part, asked, people, kept, number, task, rng) for name, part in parts.items()
    ]
    return Use(tuple(rows), len(set(people.patients)), number)


def warnings_of(use: Use) -> list[str]:
    """Return a sentence for each modality that would tell something and goes unused.

    Args:
        use: Of a bundle.
    """
    return [
        f"the model does not use {row.part}: exchanging it between patients changes answers by"
        f" {row.change:.3f} on average, though a plain reference on it alone has an AUROC of"
        f" {row.reference.value:.2f} ({row.reference.low:.2f} to {row.reference.high:.2f})"
        for row in use.rows
        if row.neglected
    ]


@dataclass(frozen=True)
class _People:
    """What the audit needs to know of n records besides their tokens."""

    available: Tensor
    patients: tuple[str, ...]
    labels: Tensor
    shares: Tensor | None
    stands_for: Tensor | None

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> _People:
        shares = [b.shares for b in batches if b.shares is not None]
        followed = [b.followed[:, 2] for b in batches if b.followed is not None]
        return cls(
            torch.cat([b.observed.available for b in batches]),
            tuple(p for b in batches for p in b.patient_ids),
            torch.cat([b.labels for b in batches]),
            torch.cat(shares) if shares else None,
            torch.cat(followed) if followed else None,
        )


class _Asked:
    """Asks the bundle about records with other records' contents in some modalities."""

    def __init__(
        self,
        network: EncodedVersions,
        features: Tensor | None,
        references: References | None,
        temperature: float,
    ) -> None:
        self.network, self.features = network, features
        self.references, self.temperature = references, temperature

    def exchanged(self, rows: Tensor, donors: Tensor, part: Sequence[int], used: Tensor) -> Tensor:
        """Return calibrated probabilities `(R, K)`.

        Args:
            rows: `(R,)` records.
            donors: `(R,)` records whose contents stand in for theirs.
            part: In which modalities.
            used: Bool `(R, M)`: the modalities to answer from.
        """
        found = []
        for at in torch.arange(len(rows)).split(_CHUNK):
            i, j, n = rows[at], donors[at], self.network
            swap = torch.isin(n.backbone.token_modality.cpu(), torch.tensor(part))
            there = swap.to(n.observed.device)
            here, other = i.to(n.observed.device), j.to(n.observed.device)
            tokens = torch.where(there[:, None], n.observed[other], n.observed[here])
            available = torch.where(there, n.observed_available[other], n.observed_available[here])
            fuse: EncodedVersions | Mixed
            fuse = EncodedVersions(n.backbone, tokens, available, None)
            mixed = None if self.references is None else self.references.mixed
            if mixed is not None and self.features is not None and self.references is not None:
                owner = torch.tensor(self.references.layout.owner, dtype=torch.int64)
                take = torch.isin(owner, torch.tensor(part))
                seen = torch.where(take, self.features[j], self.features[i])
                fuse = Mixed(fuse, mixed, seen, None, self.references.weight, self.temperature)
            each = used[at].to(n.observed.device)
            own = torch.arange(len(at), device=n.observed.device)
            logits = fuse(own, each, torch.zeros_like(each)).logits
            found.append(torch.softmax(logits.double().cpu() / self.temperature, dim=-1))
        return torch.cat(found)

    def reference(self, rows: Tensor, part: Sequence[int]) -> Tensor | None:
        """Return what a plain reference says of some records from some modalities alone."""
        if self.references is None or self.features is None or not self.references.plain:
            return None
        only = torch.zeros(len(rows), len(self.network.backbone.specs), dtype=torch.bool)
        only[:, list(part)] = True
        seen = under(self.features[rows], self.references.layout, only)
        return self.references.fitted[self.references.plain].probabilities(seen)


def _row(
    name: str,
    part: Sequence[int],
    asked: _Asked,
    people: _People,
    kept: Tensor,
    number: int,
    task: OverClasses,
    rng: np.random.Generator,
) -> UseRow:
    """Return what exchanging one part does."""
    available = people.available
    groups: dict[tuple[bool, ...], list[int]] = {}
    for i in kept.tolist():
        pattern = tuple(available[i].tolist())
        if any(pattern[m] for m in part):
            groups.setdefault(pattern, []).append(i)
    groups = {p: g for p, g in groups.items() if len({people.patients[i] for i in g}) > 1}
    order = [i for group in groups.values() for i in group]
    patients = [people.patients[i] for i in order]
    count = len(set(patients))
    nothing = Interval(None, None, None)
    if count < _FEWEST:
        return UseRow(name, count, None, nothing, nothing, None, nothing, nothing)
    rows = torch.tensor(order)
    shuffled = [
        np.concatenate([rng.permutation(group) for group in groups.values()]) for _ in range(number)
    ]
    donors = torch.from_numpy(np.stack(shuffled)).long()  # (R, n)
    used = available[rows]
    pairs, which = (
        torch.stack([rows.expand(number, -1), donors], dim=-1)
        .flatten(0, 1)
        .unique(dim=0, return_inverse=True)
    )
    each = asked.exchanged(pairs[:, 0], pairs[:, 1], part, available[pairs[:, 0]])
    changed = each[which].view(number, len(rows), -1)
    own = asked.exchanged(rows, rows, part, used)
    weights = np.array([1 / patients.count(p) for p in patients])
    labels = people.labels[rows]
    shares = None if people.shares is None else people.shares[rows]
    loss = task.error(own, labels, shares).numpy()
    lost = np.stack([task.error(c, labels, shares).numpy() for c in changed]) - loss  # (R, n)
    means = lost @ weights / weights.sum()
    total = 0.5 * (changed - own).abs().sum(-1).mean(0).numpy()
    only = torch.zeros_like(used)
    only[:, list(part)] = used[:, list(part)]
    alone = asked.exchanged(rows, rows, part, only)
    told = asked.reference(rows, part)
    drawn = _resamples(patients, rng)

    stands_for = np.ones(len(rows))  # of those whose class is known
    if people.stands_for is not None:
        stands_for = people.stands_for[rows].numpy() * (labels >= 0).numpy()

    def area(probabilities: Tensor, w: Floats) -> Floats:
        return auroc(labels.clamp_min(0).numpy(), probabilities.numpy(), w * stands_for)

    picked = rng.permutation(number)[:_DRAWN]
    base = weights[None]
    auroc_loss = auroc_alone = auroc_reference = nothing
    if task.ranked:
        value = float(area(own, base)[0] - np.mean([area(changed[r], base)[0] for r in picked]))
        spread = [area(own, drawn) - area(changed[r], drawn) for r in picked]
        auroc_loss = _interval(value, np.concatenate(spread))
        many = _resamples(patients, rng, _RESAMPLES * _DRAWN)
        auroc_alone = _interval(float(area(alone, base)[0]), area(alone, many))
        if told is not None:
            auroc_reference = _interval(float(area(told, base)[0]), area(told, many))
    spread = [(drawn * lost[r]).sum(1) / drawn.sum(1) for r in picked]
    return UseRow(
        name,
        count,
        float(total @ weights / weights.sum()),
        auroc_loss,
        _interval(float(means.mean()), np.concatenate(spread)),
        float((1 + (means <= 1e-12).sum()) / (1 + number)),
        auroc_alone,
        auroc_reference,
    )


def _resamples(
    patients: Sequence[str], rng: np.random.Generator, number: int = _RESAMPLES
) -> Floats:
    """Return weights `(number, n)` of records when patients are drawn with replacement."""
    names, owner, visits = np.unique(np.array(patients), return_inverse=True, return_counts=True)
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=number)
    return np.asarray(times[:, owner] / visits[owner], dtype=np.float64)


def _interval(value: float, drawn: Floats) -> Interval:
    """Return a figure with the middle 95 % of its resamples."""
    known = drawn[np.isfinite(drawn)]
    if not isfinite(value) or not len(known):
        return Interval(None, None, None)
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(value, float(low), float(high))
