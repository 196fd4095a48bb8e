"""Every version of every scan of a batch, segmented once and averaged on request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dymo_med.backbones.shared_unet import ModalityOutput, SharedUNet
from dymo_med.types import Batch, FusionOutput, Recovery

# Logits that are averaged at once: 64 MB in float32.
_MOST_VALUES = 16_000_000
_LEAST_STD = 1e-6
_NOTHING_SIDE = 32  # voxels along an axis


@dataclass(frozen=True)
class Windows:
    """How a volume is looked at.

    Attributes:
        size: Voxels along each axis of a window; larger than the volume = the whole of it.
        overlap: Share of a window that the next one covers again, along each axis.
        flips: Average the logits over all mirrorings of the volume (8 in 3D) instead of one look.
        at_once: Windows that go through the network together.
        body: Look only where the scan holds anything besides zeros (its bounding box, at least a
            window's size); elsewhere the logits are those of a window that holds nothing. For
            grids that hold the largest scan, of which most scans fill a part.
    """

    size: tuple[int, ...]
    overlap: float = 0.5
    flips: bool = False
    at_once: int = 4
    body: bool = False


@dataclass(frozen=True)
class Readout:
    """How a segmentation is read as one of K classes of lesion volume, for the selection.

    Attributes:
        centres: Float `(K,)`, mean of log(1 + mL) of the first region in training patients of
            each class.
        spread: Positive standard deviation within classes, a scalar tensor.
        mean: Float `(D,)`, mean of the pooled embedding over training patients and subsets.
        std: Float `(D,)`, its standard deviation.
        voxel_ml: Volume of a voxel of the network's grid, a scalar tensor.
    """

    centres: Tensor
    spread: Tensor
    mean: Tensor
    std: Tensor
    voxel_ml: Tensor

    def to(self, device: torch.device | str) -> Readout:
        """Return this readout on `device`."""
        return Readout(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def read(self, logits: Tensor, embedding: Tensor) -> FusionOutput:
        """Return class logits of the predicted volume, and the embedding, of unit length.

        The classes' logits are those of a normal distribution of log(1 + mL) about each class's
        centre; the volume is the expected one, the sum of the first region's probabilities.

        Args:
            logits: `(R, regions, *spatial)`.
            embedding: `(R, D)`, pooled.
        """
        volume = torch.log1p(torch.sigmoid(logits[:, 0]).flatten(1).sum(1) * self.voxel_ml)
        classes = -((volume[:, None] - self.centres) / self.spread).square() / 2
        return FusionOutput(classes, self.embedded(embedding))

    def embedded(self, pooled: Tensor) -> Tensor:
        """Return pooled embeddings `(R, D)` standardised by feature and brought to unit length."""
        return F.normalize((pooled - self.mean) / self.std.clamp_min(_LEAST_STD), dim=-1)


class DenseVersions:
    """Logits over any modalities of one batch, and with a readout a `Fuse`.

    Args:
        network: The network.
        observed: What it says of the observed version of each modality, `(B, R, *spatial)` and
            `(B, D)`; None where no record has it.
        recovered: Likewise of the recovered versions.
        readout: How selection reads it; None = there is none.
    """

    def __init__(
        self,
        network: SharedUNet,
        observed: Sequence[ModalityOutput | None],
        recovered: Sequence[ModalityOutput | None],
        readout: Readout | None = None,
    ) -> None:
        self.network = network
        self.observed, self.recovered = tuple(observed), tuple(recovered)
        self.readout = readout

    def logits(self, rows: Tensor, used: Tensor, admitted: Tensor) -> Tensor:
        """Return the mean of the logits of what is used, `(R, regions, *spatial)`.

        Args:
            rows: Int64 `(R,)`: which record of the batch each request is about.
            used: Bool `(R, M)`.
            admitted: Bool `(R, M)`: of those, which to take in their recovered version.
        """
        return self._mean(rows, used, admitted, 0)

    def __call__(self, rows: Tensor, used: Tensor, admitted: Tensor) -> FusionOutput:
        """See `dymo_med.types.Fuse`; zeros where there is no readout, and nothing to judge."""
        if self.readout is None:
            return FusionOutput(torch.zeros(len(rows), 1), torch.zeros(len(rows), 1))
        some = next(x for x in (*self.observed, *self.recovered) if x is not None)
        chunk = max(1, _MOST_VALUES // some.logits[0].numel())
        parts = []
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            request = rows[part], used[part], admitted[part]
            parts.append(self.readout.read(self._mean(*request, 0), self._mean(*request, 1)))
        return FusionOutput(
            torch.cat([p.logits for p in parts]), torch.cat([p.embedding for p in parts])
        )

    def _mean(self, rows: Tensor, used: Tensor, admitted: Tensor, what: int) -> Tensor:
        """Return the mean over what is used of logits (0) or embeddings (1)."""
        taken: list[Tensor | None] = []
        for m, (seen, made) in enumerate(zip(self.observed, self.recovered, strict=True)):
            if not bool(used[:, m].any()):
                taken.append(None)
            elif made is None or not bool(admitted[:, m].any()):
                taken.append(None if seen is None else seen[what][rows])
            elif seen is None:
                taken.append(made[what][rows])
            else:
                swap = admitted[:, m].view(-1, *(1,) * (made[what].ndim - 1))
                taken.append(torch.where(swap, made[what][rows], seen[what][rows]))
        return self.network.combine(taken, used)


@torch.no_grad()
def dense_versions(
    network: SharedUNet,
    batch: Batch,
    windows: Windows,
    recovery: Recovery | None = None,
    readout: Readout | None = None,
    seen: DenseVersions | None = None,
) -> DenseVersions:
    """Segment a batch from each scan alone; what was recovered apart from what was observed.

    Args:
        network: In evaluation mode.
        batch: B records.
        windows: How to look at them.
        recovery: Proposals for what is missing; None = observed scans only.
        readout: See `DenseVersions`.
        seen: The same records looked at in the same way with these scans or more, none of them
            changed: what a scan shows does not depend on which others are there, so no observed
            scan is looked at again.
    """
    observed: list[ModalityOutput | None] = []
    recovered: list[ModalityOutput | None] = []
    for m, spec in enumerate(network.specs):
        there = batch.observed.available[:, m]
        if seen is not None:
            observed.append(seen.observed[m] if bool(there.any()) else None)
        else:
            observed.append(_look(network, spec.name, batch.values[spec.name], there, windows))
        if recovery is None:
            recovered.append(None)
        else:
            made = recovery.values[spec.name]
            recovered.append(_look(network, spec.name, made, recovery.candidates[:, m], windows))
    return DenseVersions(network, observed, recovered, readout)


def _look(
    network: SharedUNet, name: str, values: Tensor, there: Tensor, windows: Windows
) -> ModalityOutput | None:
    """Return logits and embedding of the rows that are there; zeros in the others."""
    rows = there.nonzero().squeeze(1).tolist()
    if not rows:
        return None
    # One by one: what a record gets does not depend, to the bit, on who else is in the batch.
    parts = [slide(network, name, values[[row]], windows) for row in rows]
    whole = []
    for what in range(2):
        part = torch.cat([p[what] for p in parts])
        full = part.new_zeros(len(values), *part.shape[1:])
        full[rows] = part
        whole.append(full)
    return ModalityOutput(*whole)


def slide(network: SharedUNet, name: str, values: Tensor, windows: Windows) -> ModalityOutput:
    """Return what the network says of a whole scan, windows blended with Gaussian weights.

    On CUDA the network computes in bfloat16; results are float32. The embedding is the mean over
    windows.

    Args:
        network: In evaluation mode.
        name: Modality.
        values: `(1, 1, *spatial)`.
        windows: How to look at it.
    """
    if windows.body:
        box = _box(values, windows.size)
        inside = slide(network, name, values[box], replace(windows, body=False))
        logits = inside.logits.new_zeros(1, inside.logits.shape[1], *values.shape[2:])
        if inside.logits.shape != logits.shape:
            logits += _of_nothing(network, name, values, windows)
        logits[box] = inside.logits
        return ModalityOutput(logits, inside.embedding)
    from monai.inferers.utils import sliding_window_inference

    size = tuple(min(w, n) for w, n in zip(windows.size, values.shape[2:], strict=True))
    pooled: list[Tensor] = []

    def window(part: Tensor) -> Tensor:
        with torch.autocast(part.device.type, torch.bfloat16, enabled=part.device.type == "cuda"):
            found = network.run(name, part)
        pooled.append(found.embedding.float())
        return found.logits.float()

    looks = []
    axes = range(2, values.ndim)
    mirrored = list(product((False, True), repeat=len(axes))) if windows.flips else [()]
    for choice in mirrored:
        flipped = [axis for axis, flip in zip(axes, choice, strict=False) if flip]
        looked = values.flip(flipped) if flipped else values
        if size == tuple(values.shape[2:]):
            logits = window(looked)
        else:
            logits = cast(
                "Tensor",
                sliding_window_inference(
                    looked, size, windows.at_once, window, windows.overlap, mode="gaussian"
                ),
            )
        logits = logits.flip(flipped) if flipped else logits
        looks.append(logits)
    return ModalityOutput(torch.stack(looks).mean(0), torch.cat(pooled).mean(0, keepdim=True))


def _box(values: Tensor, size: Sequence[int]) -> tuple[slice, ...]:
    """Return the box of what is not zero in a scan `(1, 1, *spatial)`, not smaller than a window.

    A scan of zeros gets a box of a window's size at the origin.
    """
    found: list[slice] = [slice(None), slice(None)]
    for axis, least in zip(range(2, values.ndim), size, strict=True):
        others = tuple(a for a in range(values.ndim) if a != axis)
        some = (values != 0).any(dim=others).nonzero().flatten().tolist() or [0]
        first, last, n = some[0], some[-1] + 1, values.shape[axis]
        first = max(0, min(first, n - min(least, n)))
        found.append(slice(first, max(last, min(n, first + least))))
    return tuple(found)


def _of_nothing(network: SharedUNet, name: str, values: Tensor, windows: Windows) -> Tensor:
    """Return the mean logits `(1, regions, 1, ...)` of a small window of zeros."""
    sides = [min(_NOTHING_SIDE, w, n) for w, n in zip(windows.size, values.shape[2:], strict=True)]
    found = slide(network, name, values.new_zeros(1, 1, *sides), Windows(tuple(sides)))
    return found.logits.flatten(2).mean(2).view(1, -1, *(1,) * len(sides))
