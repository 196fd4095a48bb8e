"""Several networks of one kind that answer as one: the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dymo_med.backbones.base import FusionBackbone
from dymo_med.modalities import modality
from dymo_med.types import FusionOutput, Tokens


class Ensemble(FusionBackbone):
    """The mean of networks that were trained from different weights.

    From few patients each network learns something else by chance, and stops at an epoch that few
    validation patients chose; the mean has less of both. Everything that asks a backbone goes
    through it: a modality's tokens are those of all members one behind the other, the logits are
    the logarithm of the mean probability, and the embedding, in which selection measures, holds
    the members' embeddings side by side.

    Args:
        members: Backbones of one class and one set of options, which recover nothing themselves.
    """

    def __init__(self, members: Sequence[FusionBackbone]) -> None:
        nn.Module.__init__(self)
        if any(member.recovers or member.space is not None for member in members):
            raise ValueError("A network that recovers modalities itself cannot be averaged.")
        self.members = nn.ModuleList(members)
        self.specs = members[0].specs
        self.distance = members[0].distance
        self.embedding_size = sum(member.embedding_size for member in members)
        self.register_buffer("token_modality", members[0].token_modality, persistent=False)

    def _each(self) -> list[FusionBackbone]:
        return [cast("FusionBackbone", member) for member in self.members]

    def described(self, name: str) -> bool:
        """See `FusionBackbone.described`."""
        return self._each()[0].described(name)

    def sees_voxels(self, name: str) -> bool:
        """See `FusionBackbone.sees_voxels`."""
        return self._each()[0].sees_voxels(name)

    def encode(
        self,
        name: str,
        values: Tensor,
        observed_fields: Tensor | None = None,
        descriptors: Tensor | None = None,
    ) -> Tokens:
        """Return the members' tokens `(B, N, members D)`. See `FusionBackbone.encode`."""
        if descriptors is None and self.described(name):  # once, not by every member
            spec = next(spec for spec in self.specs if spec.name == name)
            descriptors = modality(spec).describe(values)
        found = [m.encode(name, values, observed_fields, descriptors) for m in self._each()]
        return Tokens(torch.cat([tokens.values for tokens in found], dim=2), found[0].available)

    def fuse_all(self, tokens: Tensor, available: Tensor) -> FusionOutput:
        """Return the mean answer. See `FusionBackbone.fuse`."""
        count = len(self.members)
        parts = tokens.chunk(count, dim=2)
        found = [m.fuse_all(part, available) for m, part in zip(self._each(), parts, strict=True)]
        logs = torch.stack([output.logits.log_softmax(-1) for output in found])
        # Divided so that a unit vector of each member makes a unit vector.
        embedding = torch.cat([output.embedding for output in found], dim=-1) / count**0.5
        return FusionOutput(logs.logsumexp(0) - torch.tensor(float(count)).log(), embedding)

    def specific_modules(self) -> list[nn.Module]:
        """See `FusionBackbone.specific_modules`."""
        return [module for member in self._each() for module in member.specific_modules()]


def as_one(members: Sequence[FusionBackbone]) -> FusionBackbone:
    """Return the one network there is, or the mean of several."""
    return members[0] if len(members) == 1 else Ensemble(members)
