"""A survival time as a distribution over bins, the last of them without an end.

K - 1 bins with an end, (0, t_1], (t_1, t_2], ... (an event at 0 is in the first), and a tail,
everything after t_{K-1}. A network gives K probabilities, as for K classes; so whatever is defined
on classes is defined on survival times as well. Within a bin that ends, time is uniform: the
survival curve is straight between edges.

Probabilities and discrete-time hazards are two ways to write the same distribution: the hazard of
bin k is the probability of an event in it among those who reach it, h_k = p_k / (p_k + ... + p_K).

What is known of a patient is a row of K numbers, the share of each bin that fits: for an event, 1
in its bin; for somebody last seen alive at c, 0 before c, 1 after it, and in the bin of c the share
that lies after it. The inner product with the probabilities is the likelihood, P(T in the bin) or
P(T > c).

References:
    Tutz and Schmid, Modeling Discrete Time-to-Event Data, Springer 2016. Kvamme and Borgan,
    Continuous and discrete-time survival prediction with neural networks, Lifetime Data Analysis
    27, 2021 (bins at quantiles of the Kaplan-Meier estimate; straight curves between edges).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor, isfinite, log10

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dymo_med.survival.censoring import kaplan_meier

# Bins that end, at most and at least, and events of training patients for each of them.
_MOST_BINS, _FEWEST_BINS, _EVENTS_PER_BIN = 8, 3, 10
# The last edge is a time at which so many training patients, and so large a share, are followed.
_FOLLOWED, _FOLLOWED_SHARE = 5, 0.1


@dataclass(frozen=True)
class TimeBins:
    """Where bins of survival time end.

    Attributes:
        edges: Ends of the K - 1 bins that have one, positive and ascending.
        unit: Of all times, for people.

    Example:
        >>> bins = TimeBins((1.0, 3.0), "years")
        >>> bins.names
        ('until 1 years', '1 to 3 years', 'after 3 years')
        >>> bins.fits(torch.tensor([2.5, 2.0]), torch.tensor([True, False])).tolist()
        [[0.0, 1.0, 0.0], [0.0, 0.5, 1.0]]
        >>> bins.survival(torch.tensor([0.2, 0.4, 0.4]), [0.5, 2.0, 3.0]).tolist()
        [0.8999999761581421, 0.6000000238418579, 0.4000000059604645]
    """

    edges: tuple[float, ...]
    unit: str = ""

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise((0.0, *self.edges)))
        if not self.edges or not rising or not isfinite(self.edges[-1]):
            raise ValueError("The bins' edges must be finite and rise from above 0.")
        if len({f"{edge:g}" for edge in self.edges}) < len(self.edges):
            raise ValueError("The bins' edges are too close to each other to have names.")

    def __len__(self) -> int:
        """Return K."""
        return len(self.edges) + 1

    @property
    def names(self) -> tuple[str, ...]:
        """K names of bins."""
        ends = [f"{edge:g}" for edge in self.edges]
        inner = (f"{a} to {b}" for a, b in pairwise(ends))
        return tuple(
            f"{text} {self.unit}".rstrip()
            for text in (f"until {ends[0]}", *inner, f"after {ends[-1]}")
        )

    @property
    def last(self) -> float:
        """The last edge: nothing is said about when after it."""
        return self.edges[-1]

    def bin(self, time: float, event: bool) -> int | None:
        """Return the bin that a patient's time is known to lie in; None if censoring hides it.

        Args:
            time: Of the event, or when the patient was last seen without one.
            event: Which of both.
        """
        if time >= self.last and not event:
            return len(self) - 1
        return int(np.searchsorted(self.edges, time)) if event else None

    def fits(self, times: Tensor, events: Tensor) -> Tensor:
        """Return what share of each bin agrees with what is known of each patient.

        Args:
            times: `(n,)`, NaN = nothing is known.
            events: Bool `(n,)`.

        Returns:
            Float32 `(n, K)`; rows of 0 where nothing is known.
        """
        ends = torch.tensor(self.edges, dtype=torch.float64)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        t = times.double()
        known = ~t.isnan()
        after = ((ends - t[:, None]) / (ends - starts)).clamp(0, 1)  # share of a bin after t
        censored = torch.cat([after, torch.ones_like(t)[:, None]], 1)
        own = torch.searchsorted(ends, t.nan_to_num(0.0))  # (t_{k-1}, t_k] holds t_k
        happened = torch.nn.functional.one_hot(own, len(self)).double()
        found = torch.where(events[:, None].bool(), happened, censored)
        return torch.where(known[:, None], found, found.new_zeros(())).float()

    def survival(self, probabilities: Tensor, times: Sequence[float]) -> Tensor:
        """Return P(T > t) for each of some times; after the last edge it stays as it is there.

        Args:
            probabilities: `(..., K)`.
            times: m times.

        Returns:
            `(..., m)`.
        """
        weights = self.fits(
            torch.tensor([min(float(t), self.last) for t in times], dtype=torch.float64),
            torch.zeros(len(times), dtype=torch.bool),
        )
        return probabilities @ weights.T.to(probabilities)

    def cumulative(self, probabilities: Tensor, times: Tensor) -> Tensor:
        """Return P(T <= t) for each patient's own time, `(n,)`; 1 from the last edge on.

        Args:
            probabilities: `(n, K)`.
            times: `(n,)`.
        """
        reach = self.fits(times, torch.zeros(len(times), dtype=torch.bool)).to(probabilities)
        found = 1 - (probabilities * reach).sum(1)
        return torch.where(times.to(found) >= self.last, found.new_ones(()), found)

    def hazards(self, probabilities: Tensor) -> Tensor:
        """Return discrete-time hazards `(..., K - 1)`."""
        reached = probabilities.flip(-1).cumsum(-1).flip(-1)
        least = torch.finfo(probabilities.dtype).tiny
        return probabilities[..., :-1] / reached[..., :-1].clamp_min(least)

    def from_hazards(self, hazards: Tensor) -> Tensor:
        """Return probabilities `(..., K)` from hazards `(..., K - 1)`."""
        left = torch.cumprod(1 - hazards, -1)
        reached = torch.cat([torch.ones_like(left[..., :1]), left], -1)
        return torch.cat([hazards * reached[..., :-1], reached[..., -1:]], -1)

    def quantile(self, probabilities: Tensor, level: float) -> Tensor:
        """Return the first time at which P(T <= t) is `level`; the last edge if it never is.

        Args:
            probabilities: `(n, K)`.
            level: From 0 to 1.

        Returns:
            `(n,)`.
        """
        p = probabilities.double()
        until = torch.cat([p.new_zeros(len(p), 1), p[:, :-1].cumsum(1)], 1)  # at 0 and every edge
        times = torch.tensor([0.0, *self.edges], dtype=torch.float64, device=p.device)
        asked = torch.full((len(p), 1), float(level), dtype=torch.float64, device=p.device)
        right = torch.searchsorted(until, asked).squeeze(1)
        beyond = right > len(self.edges)
        right = right.clamp(1, len(self.edges))
        rows = torch.arange(len(p), device=p.device)
        before, after = until[rows, right - 1], until[rows, right]
        part = ((level - before) / (after - before).clamp_min(1e-300)).clamp(0, 1)
        found = times[right - 1] + part * (times[right] - times[right - 1])
        return torch.where(beyond, times[-1], found)

    def restricted_mean(self, probabilities: Tensor) -> Tensor:
        """Return E[min(T, last edge)], the area under the curve, `(...)`.

        References:
            Royston and Parmar, Restricted mean survival time, BMC Med Res Methodol 13, 2013.
        """
        ends = torch.tensor(self.edges, dtype=probabilities.dtype, device=probabilities.device)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        middles = torch.cat([(starts + ends) / 2, ends[-1:]])
        return probabilities @ middles


def log_likelihood(log_probabilities: Tensor, fits: Tensor) -> Tensor:
    """Return log P(what is known of each patient) `(n,)`.

    Of an event it is the log-probability of its bin, so that the negative is a cross entropy; of a
    censored patient it is log P(T > c).

    Args:
        log_probabilities: `(n, K)`.
        fits: `(n, K)` (`TimeBins.fits`), none of its rows all 0.
    """
    return torch.logsumexp(log_probabilities + fits.to(log_probabilities).log(), -1)


def fit_bins(
    times: NDArray[np.float64],
    events: NDArray[np.bool_],
    weights: NDArray[np.float64],
    unit: str = "",
    bins: int | None = None,
) -> TimeBins:
    """Return bins in each of which about as many events are expected.

    Edges lie at equal steps of the Kaplan-Meier estimate, rounded to three digits. The last one is
    the latest event at which enough patients are still followed: five and a tenth of all.

    Args:
        times: `(n,)` of training patients.
        events: Bool `(n,)`.
        weights: `(n,)`, by which every patient counts the same.
        unit: Of the times.
        bins: How many have an end; None = one for ten events, from three to eight.

    Raises:
        ValueError: If no event is followed so well, or edges fall together.

    References:
        Kvamme and Borgan 2021 (see above).
    """
    followed = (weights * (times >= times[:, None])).sum(1)  # with a weight, at each one's time
    enough = max(_FOLLOWED, _FOLLOWED_SHARE * weights.sum())
    seen = times[events & (followed >= enough) & (times > 0)]
    if not len(seen):
        raise ValueError("no event is known at a time when enough patients are followed")
    last = float(seen.max())
    inside = events & (times <= last)
    if bins is None:
        bins = int(min(_MOST_BINS, max(_FEWEST_BINS, weights[inside].sum() // _EVENTS_PER_BIN)))
    curve = kaplan_meier(times, events, weights)
    levels = 1 - (1 - curve(last)) * np.arange(1, bins) / bins
    candidates = np.unique(times[inside & (times > 0)])
    survival = curve(candidates)
    edges = [float(candidates[np.argmax(survival <= level + 1e-12)]) for level in levels]
    # Three digits read better, and are no single patient's time.
    last = _three_digits(last, floor)
    rounded = [_three_digits(e, round) for e in edges]
    return TimeBins(tuple(dict.fromkeys([*(e for e in rounded if e < last), last])), unit)


def _three_digits(time: float, way: Callable[[float], int]) -> float:
    """Return a time rounded to three digits."""
    digits = 2 - floor(log10(time))
    return float(round(way(time * 10.0**digits) / 10.0**digits, max(digits, 0)))
