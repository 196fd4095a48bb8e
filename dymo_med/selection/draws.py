"""Answers that are means over draws of the recoveries, and selectors that use them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, final

import torch
from pydantic import Field
from scipy.stats import binom
from torch import Tensor

from dymo_med.config import Strict
from dymo_med.selection.base import Admits, Cases, Fitted, Selector, WithDraws, require_something
from dymo_med.selection.greedy import make_trace
from dymo_med.types import Fuse, FusionOutput, ModalityMask, SelectionTrace, SubsetStatistics


@dataclass(frozen=True)
class Integrated:
    """A `Fuse` whose answers with recoveries are means over draws of them.

    Its logits are such that softmax(logits / temperature) gives the mean of the draws' calibrated
    probabilities; its embedding is their mean. An answer without any recovery has no draws.

    Attributes:
        parts: One `Fuse` per draw, over the same B records.
        temperature: Of the probabilities that are averaged.
    """

    parts: tuple[Fuse, ...]
    temperature: float

    def __call__(self, rows: Tensor, used: Tensor, admitted: Tensor) -> FusionOutput:
        """See `dymo_med.types.Fuse`."""
        first = self.parts[0](rows, used, admitted)
        made = (used & admitted).any(1).nonzero().squeeze(1)
        if not len(made):
            return first
        some = [first.logits[made]]
        vectors = first.embedding[made]
        for part in self.parts[1:]:
            output = part(rows[made], used[made], admitted[made])
            some.append(output.logits)
            vectors = vectors + output.embedding
        logs = torch.stack([(z.double() / self.temperature).log_softmax(-1) for z in some])
        mean = (logs.logsumexp(0) - math.log(len(self.parts))) * self.temperature
        return FusionOutput(
            first.logits.index_copy(0, made, mean.to(first.logits.dtype)),
            first.embedding.index_copy(0, made, vectors / len(self.parts)),
        )

    def each(self, rows: Tensor, used: Tensor, admitted: Tensor) -> Tensor:
        """Return the logits of every draw `(n, R, K)`."""
        return torch.stack([part(rows, used, admitted).logits for part in self.parts])


def over_draws(fuse: Fuse) -> Fuse:
    """Return what averages over draws; of an imputer that cannot draw, its best guesses.

    Args:
        fuse: Of best guesses, with draws or without.
    """
    return fuse.drawn if isinstance(fuse, WithDraws) else fuse


@dataclass(frozen=True)
class Joined:
    """Several `Fuse` one behind the other, as one over the patients of all.

    Attributes:
        parts: Each over patients of its own.
        sizes: How many.
    """

    parts: tuple[Fuse, ...]
    sizes: tuple[int, ...]

    def __call__(self, rows: Tensor, used: Tensor, admitted: Tensor) -> FusionOutput:
        """See `dymo_med.types.Fuse`."""
        ends = torch.tensor(self.sizes, device=rows.device).cumsum(0)
        owner = torch.searchsorted(ends, rows, right=True)
        found, places = [], []
        for i in owner.unique().tolist():
            at = (owner == i).nonzero().squeeze(1)
            own = rows[at] - (int(ends[i]) - self.sizes[i])
            found.append(self.parts[i](own, used[at], admitted[at]))
            places.append(at)
        if not found:
            return self.parts[0](rows, used, admitted)
        back = torch.cat(places).argsort()
        return FusionOutput(
            torch.cat([f.logits for f in found])[back],
            torch.cat([f.embedding for f in found])[back],
        )


def joined(parts: Sequence[Fuse], sizes: Sequence[int]) -> Fuse:
    """Return one `Fuse` over the patients of several, with draws where any of them has some."""
    single = Joined(tuple(f.single if isinstance(f, WithDraws) else f for f in parts), tuple(sizes))
    if not any(isinstance(f, WithDraws) for f in parts):
        return single
    return WithDraws(single, Joined(tuple(map(over_draws, parts)), tuple(sizes)))


@final
class Average(Selector):
    """Admit every recovery, and average the answer over draws of all of them.

    Each draw is answered for as if it had been measured. Where imputer and network are both
    right, the mean is the answer without any recovery (a martingale). Where the imputer knows
    more than the network, as from patients without a label, it is the better one. Unlike
    `trust_all`, which answers from the best guess alone, it does not take a guess for a
    measurement.

    References:
        Rubin, Multiple Imputation for Nonresponse in Surveys, 1987.
    """

    name = "average"
    decides_by = "draws"
    admits = "everything"
    integrates = True

    def select(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, statistics: SubsetStatistics
    ) -> SelectionTrace:
        """See `Selector.select`."""
        require_something(observed)
        rows = torch.arange(len(candidates), device=candidates.device)
        output = over_draws(fuse)(rows, observed.available | candidates, candidates)
        return make_trace(self.name, observed, candidates, candidates.clone(), [], 0.0, output)


# Groups of patterns, each with a bound of its own: by how much is missing.
GROUPS = ("blank cells only", "less than half missing", "half missing or more")
# Largest moves of the answer that are tried, in total variation, the strictest first.
MOVES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


class GuardOptions(Strict):
    """What a guard promises.

    Attributes:
        harm: Largest share of a group's patients whom recoveries may harm.
        error: With what probability, over calibration patients, the promise may be broken.
    """

    harm: Annotated[float, Field(gt=0, lt=1)] = 0.05
    error: Annotated[float, Field(gt=0, lt=1)] = 0.1


@dataclass(frozen=True)
class Guarantee:
    """What was proven for a group of patterns.

    Attributes:
        patients: Calibration patients in it.
        most: Largest move of the answer up to which recoveries are admitted; 0 = none.
        harmed: Of the patients, whom recoveries harm at that threshold.
        lost: Mean probability of the true class that they lose there.
        bound: Upper confidence bound on the share that is harmed; 1 = nothing is admitted.
    """

    patients: int
    most: float
    harmed: int
    lost: float
    bound: float


@dataclass(frozen=True)
class _Model:
    """What was proven of each group, and the temperature of the probabilities behind it."""

    groups: tuple[Guarantee, ...]
    temperature: float


@final
class Guarded(Fitted[_Model]):
    """Admit the average over draws only where it is proven to harm few patients.

    Harm is an answer that was right from measurements alone and is wrong with recoveries. A
    patient's recoveries are admitted, all or none, if they move the answer by no more than a
    threshold. In each group of patterns the thresholds are tested from the strictest to the
    loosest, and testing ends with the first of which it is not proven that less than `harm` of
    all patients of the group are harmed, and that less than `harm` of the true class's
    probability is lost on average. So the probability, over calibration patients, that any of
    the groups is harmed more is at most `error`, for any model, imputer and sample size (Learn
    then Test with fixed sequences, and Bonferroni over groups). Each calibration patient counts
    once in a group, with one case drawn for him.

    With too few patients in a group nothing can be proven, and nothing is admitted; `needed`
    says how many it takes if none of them is harmed.

    Args:
        options: See `GuardOptions`.

    References:
        Angelopoulos, Bates, Candes, Jordan, Lei: Learn then Test, Ann. Appl. Stat. 19 (2025);
        Bates et al., Distribution-free, risk-controlling prediction sets, J. ACM 68 (2021), for
        the bound on means; Clopper and Pearson, Biometrika 26 (1934), for that on shares.
    """

    name = "guarded"
    decides_by = "guard"
    admits = "everything"
    Options = GuardOptions
    integrates = True

    def select(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, statistics: SubsetStatistics
    ) -> SelectionTrace:
        """See `Selector.select`."""
        require_something(observed)
        limits = torch.tensor([g.most for g in self.model.groups], dtype=torch.float64)
        before, after, moved = _both(fuse, observed, candidates, self.model.temperature)
        limit = limits.to(moved.device)[groups_of(observed.available, candidates)]
        inside = (moved <= limit) & candidates.any(1) & (limit > 0)
        admitted = candidates & inside[:, None]
        output = FusionOutput(
            torch.where(inside[:, None], after.logits, before.logits),
            torch.where(inside[:, None], after.embedding, before.embedding),
        )
        return make_trace(self.name, observed, candidates, admitted, [], 0.0, output)

    def admits_in(self, trace: SelectionTrace, row: int) -> Admits:
        """See `Selector.admits_in`: all or none."""
        return "everything" if bool(trace.admitted[row].any()) else "nothing"

    def promise(self, trace: SelectionTrace, row: int) -> str:
        """See `Selector.promise`."""
        if not bool(trace.candidates[row].any()):
            return ""
        return self.sentence(trace.observed[row], trace.candidates[row])

    def fit(self, cases: Cases, statistics: SubsetStatistics) -> None:
        """See `Selector.fit`."""
        cases = cases.of_known_class()
        before, after, moved = _both(
            cases.fuse, cases.observed, cases.candidates, cases.temperature
        )
        p, q = (
            torch.softmax(z.logits.double() / cases.temperature, -1).cpu() for z in (before, after)
        )
        labels, moved = cases.labels.cpu(), moved.cpu()
        harmed = (p.argmax(-1) == labels) & (q.argmax(-1) != labels)
        lost = (p - q).gather(1, labels[:, None]).squeeze(1).clamp_min(0)
        group = groups_of(cases.observed.available, cases.candidates).cpu()
        some = cases.candidates.any(1).cpu()
        rows = [_one_each(cases, (group == g) & some) for g in range(len(GROUPS))]
        share = self.options.error / max(1, sum(len(r) > 0 for r in rows))
        found = (prove(harmed[r], lost[r], moved[r], self.options.harm, share) for r in rows)
        self._model = _Model(tuple(found), cases.temperature)

    def needed(self) -> int:
        """Return how many patients of a group prove something if none of them is harmed."""
        met = max(1, sum(g.patients > 0 for g in self.model.groups))
        return needed(self.options.harm, self.options.error / met)

    def sentences(self) -> tuple[str, ...]:
        """Return what was proven, a sentence for each group that calibration patients are in."""
        found = []
        for name, g in zip(GROUPS, self.model.groups, strict=True):
            if not g.patients:
                continue
            if g.most:
                found.append(
                    f"{name}: recoveries that move the answer by up to {g.most:.0%} are admitted;"
                    f" {g.harmed} of {g.patients} patients harmed, at most {g.bound:.1%} with"
                    f" {1 - self.options.error:.0%} confidence."
                )
                continue
            few = g.patients < self.needed()
            why = (
                f"{g.patients} patients are too few, {self.needed()} are needed if none is harmed"
                if few
                else f"it is not proven on {g.patients} patients that less than"
                f" {self.options.harm:.0%} are harmed"
            )
            found.append(f"{name}: no recovery is admitted; {why}.")
        return tuple(found)

    def sentence(self, observed: Tensor, candidates: Tensor) -> str:
        """Return what was proven of the group that one patient is in.

        Args:
            observed: Bool `(M,)`.
            candidates: Bool `(M,)`.
        """
        group = int(groups_of(observed[None], candidates[None])[0])
        if not self.model.groups[group].patients:
            return f"{GROUPS[group]}: no calibration patient is like that; nothing is admitted."
        known = [i for i, g in enumerate(self.model.groups) if g.patients]
        return self.sentences()[known.index(group)]

    def state(self) -> dict[str, Any]:
        """See `Selector.state`."""
        return {
            "groups": list(GROUPS),
            "temperature": self.model.temperature,
            **{
                key: [getattr(g, key) for g in self.model.groups]
                for key in ("patients", "most", "harmed", "lost", "bound")
            },
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Selector.load_state`."""
        if state["groups"] != list(GROUPS):
            raise ValueError("guarded was fitted to other groups than this version's.")
        rows = zip(
            *(state[k] for k in ("patients", "most", "harmed", "lost", "bound")), strict=True
        )
        found = tuple(
            Guarantee(int(n), float(most), int(harmed), float(lost), float(bound))
            for n, most, harmed, lost, bound in rows
        )
        if len(found) != len(GROUPS) or not all(
            0 <= g.most <= 1 and 0 <= g.harmed <= g.patients and 0 <= g.bound <= 1 for g in found
        ):
            raise ValueError("guarded: its groups cannot be right")
        self._model = _Model(found, float(state["temperature"]))


def groups_of(observed: Tensor, candidates: Tensor) -> Tensor:
    """Return to which of `GROUPS` each patient belongs, int64 `(B,)`.

    Args:
        observed: Bool `(B, M)`.
        candidates: Bool `(B, M)`.
    """
    missing = (~observed).sum(1)
    many = 2 * missing >= observed.shape[1]
    return torch.where((candidates & ~observed).any(1), 1 + many.long(), torch.zeros_like(missing))


def prove(harmed: Tensor, lost: Tensor, moved: Tensor, harm: float, error: float) -> Guarantee:
    """Return up to which move of the answer it is proven that few patients are harmed.

    Args:
        harmed: Bool `(n,)`: whom recoveries harm, each patient once.
        lost: Float64 `(n,)` in 0 to 1: what the true class's probability loses.
        moved: Float64 `(n,)` in 0 to 1: by how much the answer moves.
        harm: What is to be proven of the share that is harmed, and of the mean loss.
        error: Probability with which the proof may be wrong.
    """
    n = len(harmed)
    found = Guarantee(n, 0.0, 0, 0.0, 1.0)
    for most in MOVES if n else ():
        inside = moved <= most
        count, mean = int((harmed & inside).sum()), float((lost * inside).mean())
        if float(binom.cdf(count, n, harm)) > error or mean_p_value(mean, n, harm) > error:
            break
        found = Guarantee(n, most, count, mean, share_bound(count, n, error))
    return found


def share_bound(count: int, n: int, error: float) -> float:
    """Return the upper confidence bound of Clopper and Pearson on a share.

    Args:
        count: Of n.
        n: How many there are.
        error: Probability that the share is above the bound.

    Example:
        >>> round(share_bound(0, 45, 0.1), 4)
        0.0499
    """
    from scipy.stats import beta

    return 1.0 if count >= n else float(beta.ppf(1 - error, count + 1, n - count))


def mean_p_value(mean: float, n: int, bound: float) -> float:
    """Return the p-value of Hoeffding and Bentkus that a mean of [0, 1] is not below a bound.

    Args:
        mean: Of n independent numbers.
        n: How many there are.
        bound: Upper bound on their expectation, to be proven.

    References:
        Bates et al., Distribution-free, risk-controlling prediction sets, J. ACM 68 (2021).
    """
    if mean >= bound:
        return 1.0
    apart = (1 - mean) * math.log((1 - mean) / (1 - bound))
    if mean > 0:
        apart += mean * math.log(mean / bound)
    bentkus = math.e * float(binom.cdf(math.ceil(n * mean), n, bound))
    return min(math.exp(-n * apart), bentkus, 1.0)


def needed(harm: float, error: float) -> int:
    """Return how many patients prove a bound if none of them is harmed.

    Example:
        >>> needed(0.05, 0.1)
        45
    """
    return math.ceil(math.log(error) / math.log1p(-harm))


def _both(
    fuse: Fuse, observed: ModalityMask, candidates: Tensor, temperature: float
) -> tuple[FusionOutput, FusionOutput, Tensor]:
    """Return the answers without and with recoveries, and how far apart they are `(B,)`."""
    rows = torch.arange(len(candidates), device=candidates.device)
    both = over_draws(fuse)
    before = both(rows, observed.available, torch.zeros_like(candidates))
    after = both(rows, observed.available | candidates, candidates)
    p, q = (torch.softmax(z.logits.double() / temperature, -1) for z in (before, after))
    return before, after, (p - q).abs().sum(-1) / 2


def _one_each(cases: Cases, inside: Tensor) -> Tensor:
    """Return one case of each patient among some, int64 `(n,)`, drawn by position alone."""
    order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(0)).tolist()
    first: dict[str, int] = {}
    names: Sequence[str] = cases.patients or [str(i) for i in range(len(cases))]
    for i in order:
        if inside[i]:
            first.setdefault(names[i], i)
    return torch.tensor(sorted(first.values()), dtype=torch.int64)
