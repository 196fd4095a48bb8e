"""The network and a reference as one answer, for everything that asks a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dymo_med.references.base import FittedReference, References
from dymo_med.references.features import features_of, recovered_features, under
from dymo_med.types import Batch, Fuse, FusionOutput, ModalitySpec, Recovery

_LEAST = 1e-9  # of a probability, before its logarithm is taken


@dataclass(frozen=True)
class Mixed:
    """A `Fuse` whose probabilities are a weighted mean of the network's and a reference's.

    Its logits are such that softmax(logits / temperature), as everywhere, gives the mean of both
    calibrated answers; its embedding is the network's. So subsets, selection, averages and draws
    ask both, and a recovery enters the reference by its recovered cells and measurements.

    Attributes:
        network: Over B records.
        reference: The other half.
        observed: Features of the observed versions, float64 `(B, P)` on the CPU.
        recovered: Of the recovered versions `(B, P)`; None where nothing was recovered.
        weight: Share of the network, 0 to 1.
        temperature: Of the network.
    """

    network: Fuse
    reference: FittedReference
    observed: Tensor
    recovered: Tensor | None
    weight: float
    temperature: float

    def __call__(self, rows: Tensor, used: Tensor, admitted: Tensor) -> FusionOutput:
        """See `dymo_med.types.Fuse`."""
        output = self.network(rows, used, admitted)
        here, use = rows.cpu(), used.cpu()
        features = self.observed[here]
        if self.recovered is not None:
            owner = torch.tensor(self.reference.model.layout.owner, dtype=torch.int64)
            swap = admitted.cpu()[:, owner]
            features = torch.where(swap, self.recovered[here], features)
        features = under(features, self.reference.model.layout, use)
        return FusionOutput(self.mix(output.logits, features), output.embedding)

    def mix(self, logits: Tensor, features: Tensor) -> Tensor:
        """Return the logits of the mean.

        Args:
            logits: Of the network `(R, K)`.
            features: Float64 `(R, P)` on the CPU.
        """
        return mixed_logits(
            logits, self.reference.probabilities(features), self.weight, self.temperature
        )


def answering(
    network: Fuse,
    references: References | None,
    batch: Batch,
    recovery: Recovery | None,
    specs: Sequence[ModalitySpec],
    temperature: float,
) -> Fuse:
    """Return what answers: the network alone, or with the reference that has a part in it.

    Args:
        network: Over B records.
        references: Weighed; None = there are none.
        batch: The records.
        recovery: Of these; None = observed versions only.
        specs: Modalities in canonical order.
        temperature: Of the network.
    """
    other = None if references is None else references.mixed
    if other is None or references is None:
        return network
    observed = features_of(batch, specs)
    recovered = None if recovery is None else recovered_features(observed, recovery, specs)
    return Mixed(network, other, observed, recovered, references.weight, temperature)


def mixed_logits(logits: Tensor, other: Tensor, weight: float, temperature: float) -> Tensor:
    """Return logits whose softmax at this temperature is the mean of two answers.

    Args:
        logits: Of the network `(R, K)`; gradients flow through them.
        other: Calibrated probabilities of a reference `(R, K)`.
        weight: Share of the network.
        temperature: Of the network.
    """
    own = torch.softmax(logits.double() / temperature, dim=-1)
    mean = weight * own + (1 - weight) * other.to(own)
    return (temperature * mean.clamp_min(_LEAST).log()).to(logits.dtype)
