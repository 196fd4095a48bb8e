"""Which modalities an answer rests on, and every number behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class FusionOutput:
    """What a fusion backbone says of a set of modalities.

    Attributes:
        logits: Float `(R, K)`, uncalibrated.
        embedding: Float `(R, D)`, unit length for the cosine distance.
    """

    logits: Tensor
    embedding: Tensor


class Fuse(Protocol):
    """Fusion over versions of modalities that were encoded beforehand; cheap, called often."""

    def __call__(self, rows: Tensor, used: Tensor, admitted: Tensor) -> FusionOutput:
        """Fuse.

        Args:
            rows: Int64 `(R,)`: which patient of the batch each request is about.
            used: Bool `(R, M)`: the modalities to fuse.
            admitted: Bool `(R, M)`: of those, which to take in their recovered (or completed)
                version; the others are taken as observed.
        """
        ...


@dataclass(frozen=True)
class SubsetStatistics:
    """Class prototypes and spreads of the embedding, per subset of modalities.

    Attributes:
        distance: `cosine` or `euclidean`.
        subsets: Bool `(S, M)`, the subsets that are kept, ascending by `subset_id`.
        prototypes: Float `(S, K, D)`, mean embedding of training patients of class k who have
            all of subset s; cosine means are not re-normalised.
        overall: Float `(K, D)`, unweighted mean of `prototypes` over subsets.
        spread: Float `(S, K)`, root mean square distance to the prototype.
        counts: Int64 `(S, K)`, training records that have all of s, per class.
        borrowed_from: Int64 `(S, K)`: index of the subset whose numbers were borrowed where
            counts is too small; its own index otherwise.
    """

    distance: Literal["cosine", "euclidean"]
    subsets: Tensor
    prototypes: Tensor
    overall: Tensor
    spread: Tensor
    counts: Tensor
    borrowed_from: Tensor

    def to(self, device: torch.device | str) -> SubsetStatistics:
        """Return these statistics on `device`."""
        return replace(
            self,
            **{
                name: getattr(self, name).to(device)
                for name in (
                    "subsets",
                    "prototypes",
                    "overall",
                    "spread",
                    "counts",
                    "borrowed_from",
                )
            },
        )


@dataclass(frozen=True)
class Mixture:
    """An answer that is an average over subsets.

    Attributes:
        rows: Int64 `(P,)`, ascending: the patient each averaged subset is of.
        admitted: Bool `(P, M)`: the candidates in it, beside everything observed.
        weight: Float `(P,)`, adding up to 1 per patient.
    """

    rows: Tensor
    admitted: Tensor
    weight: Tensor


@dataclass(frozen=True)
class SelectionTrace:
    """Every number behind a selection; enough to replay it offline.

    Attributes:
        names: Modality names in canonical order.
        method: Selector that made it.
        observed: Bool `(B, M)`.
        candidates: Bool `(B, M)`.
        used: Bool `(B, M)`: observed or trusted.
        admitted: Bool `(B, M)`: candidates that were trusted.
        chosen: Int64 `(T, B)`: modality admitted in that step, -1 = stopped; the best of them
            where a selector admits several at once.
        reward: Float `(T, B, M)`, NaN where there was no candidate. Likewise below.
        quality_before: Float `(T, B)`.
        quality_after: Float `(T, B, M)`.
        similarity_before: Float `(T, B)`: log tail probability to the predicted class.
        similarity_after: Float `(T, B, M)`.
        factor: Float `(T, B, M)`: similarity calibration factor.
        borrowed: Bool `(T, B, M)`: statistics of another subset had to be borrowed, for the value
            before or after.
        trust: Float `(T, B, M)`: what a fitted selector gives for admitting the candidate, 0 to
            1; NaN for those that go by the reward.
        threshold: What reward (or trust, where there is one) has to exceed to be admitted.
        output: Fusion of the final subset: logits `(B, K)`, embedding `(B, D)`; of an average, the
            logits that its probabilities come from, and the embedding of `used`.
        mixture: The subsets that were averaged; None = the answer is that of `used` alone. In an
            average a candidate counts as admitted if the subsets with it weigh more than half.
    """

    names: tuple[str, ...]
    method: str
    observed: Tensor
    candidates: Tensor
    used: Tensor
    admitted: Tensor
    chosen: Tensor
    reward: Tensor
    quality_before: Tensor
    quality_after: Tensor
    similarity_before: Tensor
    similarity_after: Tensor
    factor: Tensor
    borrowed: Tensor
    trust: Tensor
    threshold: float
    output: FusionOutput
    mixture: Mixture | None = None

    @property
    def rejected(self) -> Tensor:
        """Bool `(B, M)`: candidates that were not admitted."""
        return self.candidates & ~self.admitted


@dataclass(frozen=True)
class SelectionStep:
    """One candidate in one step of one patient's selection (a row of `selection.csv`).

    Only what exceeds `threshold` can be admitted: `trust` where the selector gives one, else
    `reward`.
    """

    step: int
    modality: str
    version: Literal["recovered", "completed"]
    quality_before: float
    quality_after: float
    similarity_before: float
    similarity_after: float
    factor: float
    reward: float
    decision: Literal["admitted", "rejected", "not yet", "stopped"]
    borrowed: bool
    trust: float | None = None
    threshold: float = 0.0


@dataclass(frozen=True)
class Choice:
    """Which selector is the default, and why.

    Attributes:
        name: The default.
        why: A sentence.
        results: Per selector, on held-back patients: log-loss, accuracy, answers of the observed
            modalities that it spoilt and put right (shares of patients), all cross-fitted.
        patients: How many there were.
    """

    name: str
    why: str
    results: Mapping[str, Mapping[str, float]]
    patients: int
