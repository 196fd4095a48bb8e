"""Plain references: what a few lines of scikit-learn make of the same patients.

They are trained by every `train`, judged by every `evaluate`, and where one of them is better than
the network, a bundle's answers rest on it too.
"""

from __future__ import annotations

from dymo_med.references.average import Average
from dymo_med.references.base import FittedReference, Reference, References, Training
from dymo_med.references.blanks import BlanksOnly
from dymo_med.references.boosting import Boosting
from dymo_med.references.features import (
    Layout,
    features_of,
    layout_of,
    recovered_features,
    summary,
    under,
)
from dymo_med.references.logistic import Logistic
from dymo_med.references.mixed import Mixed, answering
from dymo_med.registry import Registry

# In this order: the mean is made of those before it.
REFERENCES: Registry[Reference] = Registry(
    "reference",
    {
        "boosting": Boosting,
        "logistic": Logistic,
        "reference_mean": Average,
        "blanks_only": BlanksOnly,
    },
)

__all__ = [
    "REFERENCES",
    "FittedReference",
    "Layout",
    "Mixed",
    "Reference",
    "References",
    "Training",
    "answering",
    "features_of",
    "layout_of",
    "recovered_features",
    "summary",
    "under",
]
