"""Survival in discrete time: bins, censoring, recalibrated curves, lower bounds and metrics.

Everything here is numbers in, numbers out; nothing reads a cohort or knows of a network.
"""

from dymo_med.survival.bins import TimeBins, fit_bins, log_likelihood
from dymo_med.survival.bound import TimeBound, bound_of, latest_bound, level_of
from dymo_med.survival.censoring import Step, censoring, kaplan_meier, known_weights
from dymo_med.survival.follow_up import DAYS, FollowUp, in_unit, usable
from dymo_med.survival.guarantee import Guarantee, LowerBounds
from dymo_med.survival.recalibration import Recalibration, fit_recalibration
from dymo_med.survival.statement import LEAST, Statement, state

__all__ = [
    "DAYS",
    "LEAST",
    "FollowUp",
    "Guarantee",
    "LowerBounds",
    "Recalibration",
    "Statement",
    "Step",
    "TimeBins",
    "TimeBound",
    "bound_of",
    "censoring",
    "fit_bins",
    "fit_recalibration",
    "in_unit",
    "kaplan_meier",
    "known_weights",
    "latest_bound",
    "level_of",
    "log_likelihood",
    "state",
    "usable",
]
