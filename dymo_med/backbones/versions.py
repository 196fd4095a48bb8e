"""Every version of every modality of a batch, encoded once and fused on request."""

from __future__ import annotations

import torch
from torch import Tensor

from dymo_med.backbones.base import FusionBackbone
from dymo_med.types import Batch, FusionOutput, ModalitySpec, Recovery, Tokens

# Upper bound on token values gathered at once: 16 MB in float32, and some 20 times that inside
# the blocks.
_MOST_VALUES = 4_000_000


class EncodedVersions:
    """A `Fuse` over one batch: observed and recovered versions, each encoded once.

    Args:
        backbone: The network.
        observed: Tokens of the observed versions `(B, N, D)`.
        observed_available: Bool `(B, N)`, False for blank cells and absent modalities.
        recovered: Tokens of the recovered versions `(B, N, D)`; may be `observed` itself where
            nothing was recovered.
    """

    def __init__(
        self,
        backbone: FusionBackbone,
        observed: Tensor,
        observed_available: Tensor,
        recovered: Tensor | None,
    ) -> None:
        self.backbone = backbone
        self.observed = observed
        self.observed_available = observed_available
        self.recovered = recovered

    def __call__(self, rows: Tensor, used: Tensor, admitted: Tensor) -> FusionOutput:
        """See `dymo_med.types.Fuse`."""
        _, n, d = self.observed.shape
        chunk = max(1, _MOST_VALUES // (n * d))
        if len(rows) <= chunk:
            return self._fuse(rows, used, admitted)
        parts = [
            self._fuse(rows[i : i + chunk], used[i : i + chunk], admitted[i : i + chunk])
            for i in range(0, len(rows), chunk)
        ]
        return FusionOutput(
            torch.cat([p.logits for p in parts]), torch.cat([p.embedding for p in parts])
        )

    def _fuse(self, rows: Tensor, used: Tensor, admitted: Tensor) -> FusionOutput:
        owner = self.backbone.token_modality
        use = used[:, owner]  # (R, N)
        tokens = self.observed[rows]
        available = self.observed_available[rows]
        if self.recovered is not None:
            swap = admitted[:, owner]
            tokens = torch.where(swap[..., None], self.recovered[rows], tokens)
            available = available | swap
        return self.backbone.fuse(tokens, available & use)


def encode_versions(
    backbone: FusionBackbone, batch: Batch, recovery: Recovery | None = None
) -> EncodedVersions:
    """Encode a batch for selection.

    Args:
        backbone: The network.
        batch: B records.
        recovery: Proposals for what is missing; None = observed versions only.

    Returns:
        A `Fuse` over these B records. What stands in `batch.values` where nothing was observed
        changes nothing.
    """
    observed = encode_observed(backbone, batch)
    versions = EncodedVersions(
        backbone,
        torch.cat([tokens.values for tokens in observed], dim=1),
        torch.cat([tokens.available for tokens in observed], dim=1),
        None,
    )
    return versions if recovery is None else encode_draw(versions, recovery)


def encode_draw(versions: EncodedVersions, recovery: Recovery) -> EncodedVersions:
    """Return the same observed versions beside other recovered ones.

    Args:
        versions: Over B records.
        recovery: Of these: the best guess, or a draw.
    """
    backbone = versions.backbone
    recovered = versions.observed
    for m, spec in enumerate(backbone.specs):
        rows = recovery.candidates[:, m].nonzero().squeeze(1)
        if len(rows):
            own = (backbone.token_modality == m).nonzero().squeeze(1)
            if recovered is versions.observed:
                recovered = recovered.clone()
            proposal = recovered_tokens(backbone, recovery, spec, rows)
            recovered[rows[:, None], own] = proposal.to(recovered.dtype)
    return EncodedVersions(backbone, versions.observed, versions.observed_available, recovered)


def encode_observed(backbone: FusionBackbone, batch: Batch) -> list[Tokens]:
    """Encode the observed version of each modality.

    Args:
        backbone: The network.
        batch: B records. What stands in `batch.values` where nothing was observed changes nothing.

    Returns:
        M entries in canonical order, of B rows each; absent ones are zero and not available.
    """
    found = []
    for m, spec in enumerate(backbone.specs):
        present = batch.observed.available[:, m].nonzero().squeeze(1)
        values = batch.values[spec.name]
        fields = batch.observed_fields.get(spec.name)
        # Only rows that have the modality are encoded: absent ones cost nothing.
        told = batch.descriptors.get(spec.name)
        tokens = backbone.encode(
            spec.name,
            values[present],
            None if fields is None else fields[present],
            None if told is None else told[present],
        )
        found.append(
            Tokens(
                _spread(tokens.values, present, len(batch)),
                _spread(tokens.available, present, len(batch)),
            )
        )
    return found


def recovered_tokens(
    backbone: FusionBackbone, recovery: Recovery, spec: ModalitySpec, rows: Tensor
) -> Tensor:
    """Return the tokens of a modality's recovered version, `(R, N, D)`, all of them available.

    They are the imputer's own where it recovers in the backbone's space, else those of the values.

    Args:
        backbone: The network.
        recovery: For B records.
        spec: The modality.
        rows: Int64 `(R,)`: records to which it is proposed.
    """
    tokens = recovery.tokens_for(backbone.space)
    if spec.name in tokens:
        return tokens[spec.name][rows]
    values = recovery.values[spec.name][rows]
    told = recovery.descriptors.get(spec.name)
    told = None if told is None else told[rows].to(values.dtype)
    return backbone.encode(spec.name, values, None, told).values


def _spread(part: Tensor, rows: Tensor, size: int) -> Tensor:
    """Return `part` placed at `rows` of an otherwise zero (False) tensor with `size` rows."""
    if len(rows) == size:
        return part
    whole = part.new_zeros(size, *part.shape[1:])
    return whole.index_copy(0, rows, part)
