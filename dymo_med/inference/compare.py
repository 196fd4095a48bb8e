"""What the comparators and references of a bundle say of a batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dymo_med.bundle import ModelBundle
from dymo_med.calibration import supported
from dymo_med.errors import PatientDataError, Problem
from dymo_med.references import features_of
from dymo_med.types import Batch


def comparator_probabilities(bundle: ModelBundle, batch: Batch) -> dict[str, Tensor]:
    """Return calibrated probabilities of every comparator and reference, from what is observed.

    Args:
        bundle: The model.
        batch: B records, on any device.

    Returns:
        Float64 `(B, K)` on the CPU by name, in the recipe's order, references last; empty where the
        bundle has neither. A record's own row does not depend on its neighbours.

    Raises:
        PatientDataError: If a record has nothing observed.
    """
    nothing = (~batch.observed.available.any(1)).nonzero().squeeze(1).tolist()
    if nothing:
        raise PatientDataError(
            *(
                Problem(
                    f"Patient {batch.record_ids[i]}",
                    "no modality is observed, so there is nothing to answer from",
                    expected=f"at least one of {', '.join(batch.observed.names)}",
                    remedy="Leave the record out",
                )
                for i in nothing
            )
        )
    with torch.inference_mode():
        here = batch.to(bundle.device)
        found = {
            name: replace(bundle.calibration, temperature=fitted.temperature).probabilities(
                fitted.network(here).cpu()
            )
            for name, fitted in bundle.comparators.items()
        }
        return {**found, **reference_probabilities(bundle, batch)}


def reference_probabilities(bundle: ModelBundle, batch: Batch) -> dict[str, Tensor]:
    """Return calibrated probabilities of every reference, from what is observed alone.

    Args:
        bundle: The model.
        batch: B records, on any device.

    Returns:
        Float64 `(B, K)` on the CPU by name; empty where the bundle has none.
    """
    if bundle.references is None:
        return {}
    features = features_of(batch, bundle.specs)
    n = bundle.calibration.patients
    return {
        name: supported(fitted.probabilities(features), n)
        for name, fitted in bundle.references.fitted.items()
    }
