"""Probability calibration."""

from __future__ import annotations

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F


def fit_temperature(logits: Tensor, labels: Tensor, weights: Tensor) -> float:
    """Return the temperature that minimises the weighted log-loss of softmax(logits / T).

    Args:
        logits: `(R, K)`.
        labels: Int64 `(R,)`.
        weights: `(R,)`.

    Returns:
        T between 0.05 and 20.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    z, w = logits.double(), weights.double()

    def log_loss(log_temperature: float) -> float:
        losses = F.cross_entropy(z / torch.tensor(log_temperature).exp(), labels, reduction="none")
        return float((losses * w).sum() / w.sum())

    found = minimize_scalar(log_loss, bounds=(-3.0, 3.0), method="bounded", options={"xatol": 1e-6})
    return float(torch.tensor(found.x, dtype=torch.float64).exp())
