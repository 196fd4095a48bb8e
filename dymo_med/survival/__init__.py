"""Survival in discrete time: bins, censoring, recalibrated curves, lower bounds and metrics.

Everything here is numbers in, numbers out; nothing reads a cohort or knows of a network.
"""

from dymo_med.survival.bins import TimeBins, fit_bins, log_likelihood
from dymo_med.survival.bound import TimeBound, bound_of, latest_bound
from dymo_med.survival.censoring import Step, censoring, kaplan_meier, known_weights
from dymo_med.survival.recalibration import Recalibration, fit_recalibration

__all__ = [
    "Recalibration",
    "Step",
    "TimeBins",
    "TimeBound",
    "bound_of",
    "censoring",
    "fit_bins",
    "fit_recalibration",
    "kaplan_meier",
    "known_weights",
    "latest_bound",
    "log_likelihood",
]
