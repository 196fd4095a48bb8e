"""Fitting of the temperature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from dymo_med.tasks import class_loss

# A priori log T is normal around 0 with this standard deviation: in 95 of 100 cases T is between
# 0.38 and 2.7.
PRIOR = 0.5
# On fewer patients than this a temperature may soften answers but not sharpen them.
FEWEST = 30
_MOST = 3.0  # |log T|


def fit_temperature(logits: Tensor, truth: Tensor, patients: Sequence[Hashable]) -> float:
    """Return the most probable temperature T of softmax(logits / T).

    It minimises the sum over patients of each one's mean log-loss, plus (log T)^2 / (2 * 0.5^2):
    log T is normal around 0 beforehand, so that few patients hardly move T from 1.

    T is at least 1 on fewer than 30 patients. So it is where every answer is right: then the
    likelihood grows with every further sharpening, and says nothing of how much is too much.

    Args:
        logits: `(R, K)`.
        truth: Int64 `(R,)`, or shares `(R, K)` where classes are known in part.
        patients: Whose case each of the R is; every patient counts the same, however many cases
            there are.

    Returns:
        T between 0.05 and 20.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017; the prior and the two
        rules are this package's own.
    """
    z = logits.double()
    cases = Counter(patients)
    w = torch.tensor([1.0 / cases[p] for p in patients], dtype=torch.float64)

    def objective(log_temperature: float) -> float:
        scale = torch.tensor(log_temperature, dtype=torch.float64).exp()
        losses = class_loss(z / scale, truth)
        return float((losses * w).sum()) + log_temperature**2 / (2 * PRIOR**2)

    answers = z.argmax(-1)
    if truth.is_floating_point():
        all_right = bool((truth.gather(1, answers[:, None]) > 0).all())
    else:
        all_right = bool((answers == truth).all())
    low = 0.0 if len(cases) < FEWEST or all_right else -_MOST
    # The objective may have two valleys: look at all of it, then closely at the deepest.
    grid = torch.linspace(low, _MOST, 31, dtype=torch.float64).tolist()
    best = min(range(len(grid)), key=lambda i: objective(grid[i]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    found = minimize_scalar(objective, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    at = found.x if found.fun < objective(grid[best]) else grid[best]
    return float(torch.tensor(at, dtype=torch.float64).exp())
