"""Predict for patients whose imaging or records are incomplete, and show what was made up.

The names below load on first use, so that importing the package (and `dymo-med --help`) stays
fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # so that editors complete the names below
    from dymo_med.bundle import ModelBundle, load_bundle
    from dymo_med.bundle_segmentation import SegmentationBundle, load_segmentation_bundle
    from dymo_med.data.cohort import read_cohort
    from dymo_med.data.simulate import simulate
    from dymo_med.errors import (
        BundleError,
        ConfigError,
        DymoMedError,
        PatientDataError,
        RefusedError,
    )
    from dymo_med.inference.evaluate import evaluate
    from dymo_med.inference.predict import predict_patient
    from dymo_med.inference.recovered import impute_patient
    from dymo_med.inference.segment import Segmentation, segment_patient
    from dymo_med.inference.segment_evaluate import evaluate_segmentation
    from dymo_med.training.train import train
    from dymo_med.types import Cohort, Prediction

__version__ = "0.1.0"

_PUBLIC = {
    "load_bundle": "dymo_med.bundle",
    "load_segmentation_bundle": "dymo_med.bundle_segmentation",
    "read_cohort": "dymo_med.data.cohort",
    "simulate": "dymo_med.data.simulate",
    "train": "dymo_med.training.train",
    "predict_patient": "dymo_med.inference.predict",
    "segment_patient": "dymo_med.inference.segment",
    "evaluate": "dymo_med.inference.evaluate",
    "evaluate_segmentation": "dymo_med.inference.segment_evaluate",
    "impute_patient": "dymo_med.inference.recovered",
    "ModelBundle": "dymo_med.bundle",
    "SegmentationBundle": "dymo_med.bundle_segmentation",
    "Cohort": "dymo_med.types",
    "Prediction": "dymo_med.types",
    "Segmentation": "dymo_med.inference.segment",
    "DymoMedError": "dymo_med.errors",
    "ConfigError": "dymo_med.errors",
    "PatientDataError": "dymo_med.errors",
    "RefusedError": "dymo_med.errors",
    "BundleError": "dymo_med.errors",
}

__all__ = [
    "BundleError",
    "Cohort",
    "ConfigError",
    "DymoMedError",
    "ModelBundle",
    "PatientDataError",
    "Prediction",
    "RefusedError",
    "Segmentation",
    "SegmentationBundle",
    "__version__",
    "evaluate",
    "evaluate_segmentation",
    "impute_patient",
    "load_bundle",
    "load_segmentation_bundle",
    "predict_patient",
    "read_cohort",
    "segment_patient",
    "simulate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'dymo_med' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
