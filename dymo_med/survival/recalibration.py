"""Survival curves set right on patients on whom the network was not trained, and how surely.

With h_k the hazards of a predicted distribution, the hazards that are stated are h'_k with
logit h'_k = a + b logit h_k: a raises or lowers all risks, b makes differences between patients
larger or smaller. a and b are the most probable ones under the likelihood of events and censored
patients, with a and log b normal around 0 beforehand, so that few patients hardly move a curve.

How far a and b are known is read from the curvature of that likelihood, robustly against several
records of one patient (sandwich estimate), and gives the band around each curve: it says where the
share of patients without an event lies, among patients for whom such a curve was predicted, as far
as the calibration patients can tell. It is no interval for one patient's time (that is the bound),
and it knows nothing of a population other than theirs.

References:
    Cox, Two further applications of a model for binary regression, Biometrika 45, 1958 (intercept
    and slope). van Houwelingen, Validation, calibration, revision and combination of prognostic
    survival models, Statistics in Medicine 19, 2000. Huber, Fifth Berkeley Symposium, 1967
    (sandwich estimate). Kalbfleisch and Prentice, The Statistical Analysis of Failure Time Data,
    2002 (intervals on the scale of log(-log S)).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import norm
from torch import Tensor

from dymo_med.survival.bins import TimeBins, log_likelihood

# Standard deviations of a and log b beforehand: training patients, of whom there are more, told how
# frequent events are.
PRIOR = (0.3, 0.5)
BAND = 0.9
# On fewer patients with an event curves stay as they are, without a band.
FEWEST = 10
_LEAST = 1e-7  # of a hazard, before its logit is taken
_SANE = 10.0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Recalibration:
    """How predicted distributions become those that are stated.

    Attributes:
        intercept: a.
        slope: b, positive.
        covariance: Of a and log b, three numbers: variance, covariance, variance; None = not
            fitted, and there is no band.
        patients: On whom it was fitted.
        events: Of those, how many had an event.
    """

    intercept: float = 0.0
    slope: float = 1.0
    covariance: tuple[float, float, float] | None = None
    patients: int = 0
    events: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: If a number is out of its range.
        """
        if not abs(self.intercept) <= _SANE or not 1 / _SANE <= self.slope <= _SANE:
            raise ValueError("intercept and slope must be sane")
        if self.covariance is not None:
            first, both, second = self.covariance
            if not (first >= 0 and second >= 0 and both**2 <= first * second * (1 + 1e-6) + 1e-12):
                raise ValueError("the covariance must be one")

    def apply(self, probabilities: Tensor, bins: TimeBins) -> Tensor:
        """Return the distribution that is stated, float64 `(..., K)`.

        Args:
            probabilities: `(..., K)`.
            bins: Of the K.
        """
        odds = _log_odds(probabilities, bins)
        return _applied(self._theta(odds), odds, bins)

    def _theta(self, like: Tensor) -> Tensor:
        return like.new_tensor([self.intercept, np.log(self.slope)])

    def band(
        self, stated: Tensor, bins: TimeBins, times: Sequence[float]
    ) -> tuple[Tensor, Tensor] | None:
        """Return the lower and upper ends of the pointwise band of each curve, `(n, m)` each.

        Args:
            stated: `(n, K)`, as `apply` returned it.
            bins: Of the K.
            times: m times.

        Returns:
            None where nothing was fitted.
        """
        if self.covariance is None:
            return None
        odds = (_log_odds(stated, bins) - self.intercept) / self.slope  # as predicted
        first, both, second = self.covariance
        spread = odds.new_tensor([[first, both], [both, second]])

        def doubled(theta: Tensor) -> Tensor:
            left = bins.survival(_applied(theta, odds, bins), times).clamp(1e-12, 1 - 1e-12)
            return (-left.log()).log()

        theta = self._theta(odds)
        slopes = torch.func.jacfwd(doubled)(theta)  # (n, m, 2)
        error = ((slopes @ spread) * slopes).sum(-1).clamp_min(0).sqrt()
        middle, reach = doubled(theta), float(norm.ppf((1 + BAND) / 2)) * error
        low, high = (torch.exp(-torch.exp(middle + side * reach)) for side in (1, -1))
        sure = torch.tensor([t <= 0 for t in times], device=odds.device)  # everybody is alive at 0
        return torch.where(sure, 1.0, low), torch.where(sure, 1.0, high)


def fit_recalibration(
    probabilities: Tensor,
    fits: Tensor,
    events: Tensor,
    patients: Sequence[Hashable],
    bins: TimeBins,
    weights: Tensor | None = None,
) -> Recalibration:
    """Return the most probable recalibration.

    Args:
        probabilities: `(R, K)` predicted for cases of patients on whom nothing else was trained.
        fits: `(R, K)` what is known of them (`TimeBins.fits`).
        events: Bool `(R,)`.
        patients: Whose case each is; every patient counts the same.
        bins: Of the K.
        weights: `(R,)` of cases within their patients; None = the same.
    """
    order = {p: i for i, p in enumerate(dict.fromkeys(patients))}
    who = torch.tensor([order[p] for p in patients], dtype=torch.int64)
    n = len(order)
    happened = len({p for p, event in zip(patients, events.tolist(), strict=True) if event})
    if happened < FEWEST:
        return Recalibration(patients=n, events=happened)
    own = torch.ones(len(who), dtype=torch.float64) if weights is None else weights.double()
    total = torch.zeros(n, dtype=torch.float64).index_add_(0, who, own)
    share = own / total[who].clamp_min(1e-300)
    odds, prior = _log_odds(probabilities, bins), torch.tensor(PRIOR, dtype=torch.float64)

    def losses(theta: Tensor) -> Tensor:
        p = _applied(theta, odds, bins).clamp_min(1e-12).log()
        each = -log_likelihood(p, fits) * share
        return torch.zeros(n, dtype=torch.float64).index_add(0, who, each)

    def objective(theta: Tensor) -> Tensor:
        return losses(theta).sum() + (theta / prior).square().sum() / 2

    def both(x: Floats) -> tuple[float, Floats]:
        theta = torch.tensor(x, dtype=torch.float64)
        slope = torch.func.grad(objective)(theta)
        return float(objective(theta)), slope.numpy()

    bounds = [(-_SANE, _SANE), (-np.log(_SANE), np.log(_SANE))]
    found = minimize(both, np.zeros(2), jac=True, method="L-BFGS-B", bounds=bounds)
    theta = torch.tensor(found.x, dtype=torch.float64)
    curvature = torch.func.hessian(objective)(theta)
    scores = torch.func.jacfwd(losses)(theta)  # (n, 2)
    inverse = torch.linalg.pinv(curvature, hermitian=True)
    middle = scores.T @ scores * n / max(n - 1, 1)
    spread = inverse @ middle @ inverse
    return Recalibration(
        float(theta[0]),
        float(theta[1].exp()),
        (float(spread[0, 0]), float(spread[0, 1]), float(spread[1, 1])),
        n,
        happened,
    )


def _log_odds(probabilities: Tensor, bins: TimeBins) -> Tensor:
    return torch.logit(bins.hazards(probabilities.double()).clamp(_LEAST, 1 - _LEAST))


def _applied(theta: Tensor, odds: Tensor, bins: TimeBins) -> Tensor:
    return bins.from_hazards(torch.sigmoid(theta[0] + theta[1].exp() * odds))
