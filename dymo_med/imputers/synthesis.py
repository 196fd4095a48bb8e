"""Scans from other scans of the same grid by one conditional U-Net, at clinical resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Annotated, Any, cast

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dymo_med.config import Strict
from dymo_med.imputers.base import Imputer
from dymo_med.types import Batch, ModalitySpec

# Voxels that are tried as the centre of a training patch before one outside the body is taken.
_TRIES = 16
_SLOPE = 0.1  # of the leaky ReLU below zero
_SIGMA = 0.125  # standard deviation of a window's weights, as a share of its side
_LEAST = 0.01  # mean square of features below which they are not scaled up any more
# The last convolution starts small, so that training starts from 0, the mean of z-scored scans.
_FIRST_STEP = 0.1


class SynthesisOptions(Strict):
    """Sizes of the network and of its patches.

    Attributes:
        width: Channels at full resolution; they double at each halving, up to 8 times.
        levels: How often the resolution is halved.
        patch: Voxels along each axis of a training patch and of a sliding window, a multiple of
            2^levels; smaller images are taken whole.
        overlap: Share of a sliding window that the next one covers again, along each axis.
        windows: Sliding windows that go through the network at once.
    """

    width: Annotated[int, Field(ge=4)] = 16
    levels: Annotated[int, Field(ge=1, le=6)] = 3
    patch: Annotated[int, Field(ge=8)] = 64
    overlap: Annotated[float, Field(ge=0, le=0.9)] = 0.5
    windows: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _fits(self) -> SynthesisOptions:
        if self.patch % 2**self.levels:
            raise ValueError(f"patch must be a multiple of {2**self.levels} (2^levels)")
        return self


@dataclass(frozen=True)
class _Grid:
    """Scans that share a voxel grid.

    Attributes:
        members: Positions among the modalities, in canonical order; G of them, at least two.
        spatial: Voxels along each axis.
        window: Voxels along each axis of a patch or window, multiples of the network's stride.
        overlap: Of windows, along each axis.
        tiled: Voxels along each axis that windows cover with this overlap throughout; at least
            `spatial`.
    """

    members: tuple[int, ...]
    spatial: tuple[int, ...]
    window: tuple[int, ...]
    overlap: tuple[float, ...]
    tiled: tuple[int, ...]


class _UNet(nn.Module):
    """From some of the G scans of a grid to all of them.

    Args:
        specs: The G scans.
        o: Sizes.
    """

    normalised: Tensor
    scan_of: Tensor

    def __init__(self, specs: Sequence[ModalitySpec], o: SynthesisOptions) -> None:
        # Loaded here, as it takes seconds that only this imputer needs.
        from monai.networks.nets.basic_unet import Down, TwoConv, UpCat

        super().__init__()
        counts = [spec.shape[0] for spec in specs]
        # These come with the specs, so they are not part of the weights.
        normalised = torch.tensor([spec.intensity == "zscore" for spec in specs])
        self.register_buffer("normalised", normalised, persistent=False)
        scan_of = torch.arange(len(specs)).repeat_interleave(torch.tensor(counts))
        self.register_buffer("scan_of", scan_of, persistent=False)
        axes = len(specs[0].shape) - 1
        widths = [o.width * 2 ** min(i, 3) for i in range(o.levels + 1)]
        # Activation, no normalisation within blocks, biases, no dropout.
        rest: Any = (("leakyrelu", {"negative_slope": _SLOPE, "inplace": True}), None, True, 0.0)
        self.first = TwoConv(axes, sum(counts) + len(specs), widths[0], *rest)
        self.downs = nn.ModuleList(
            Down(axes, fine, coarse, *rest) for fine, coarse in pairwise(widths)
        )
        self.ups = nn.ModuleList(
            UpCat(axes, coarse, fine, fine, *rest, upsample="deconv")
            for fine, coarse in reversed(list(pairwise(widths)))
        )
        self.last = (nn.Conv2d, nn.Conv3d)[axes - 2](widths[0], sum(counts), 1)
        self._start()

    def _start(self) -> None:
        """Draw weights under which signals neither fade nor grow within a block.

        They are He et al.'s. From torch's own, under which signals fade, the simulated cohort took
        about twice as many steps.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(layer.weight, a=_SLOPE, nonlinearity="leaky_relu")
            elif isinstance(layer, nn.ConvTranspose2d | nn.ConvTranspose3d):
                # Kernel and stride are 2: each voxel hears one cell, in all its channels.
                nn.init.normal_(layer.weight, std=layer.in_channels**-0.5)
            else:
                continue
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.last.weight.mul_(_FIRST_STEP)

    def forward(self, x: Tensor, shown: Tensor) -> Tensor:
        """Return all scans, side by side along the channels, `(B, C, *spatial)`.

        Args:
            x: `(B, C, *spatial)`, zeros where a scan is not shown.
            shown: Bool `(B, G)`, at least one per row.
        """
        spread = (..., *(None,) * (x.ndim - 2))
        maps = shown.to(x.dtype)[spread].expand(-1, -1, *x.shape[2:])
        levels = [_scaled(self.first(torch.cat([x, maps], 1)))]
        for down in self.downs:
            levels.append(_scaled(down(levels[-1])))
        y = levels.pop()
        for up in self.ups:
            y = _scaled(up(y, levels.pop()))
        y = self.last(y)
        # Scans that are not shown are zeros too, so only those shown have a say.
        empty = (x == 0).all(1, keepdim=True)
        clear = (self.normalised | ~shown).all(1, keepdim=True) & self.normalised[self.scan_of]
        return torch.where(empty & clear[spread], y.new_zeros(()), y)


class Synthesis(Imputer):
    """Synthesises absent scans, voxel by voxel, from those of the same grid that are there.

    Scans with the same voxels (number and spacing along each axis) form a group, and each group of
    at least two has one U-Net for any subset to any target: inputs are all G scans, zeros in place
    of an absent one, and beside them G maps of 1 (there) or 0 (absent), as a zero is also a
    measurement; outputs are all G scans. It is assumed that the scans of a group are in register.
    What it recovers: an image from at least one other image of its group, so that observing more
    never makes less recoverable. Tables it leaves alone: it neither recovers nor completes them,
    and looks at none.

    Training shows the network one random patch per record and step, with a random non-empty proper
    subset of the scans that the record has; the others are the targets. Records with fewer than
    two scans of a group teach nothing and have a loss of 0; no scan has to be there in all
    records. The loss is the mean absolute error: within what the shown scans leave open, its
    optimum is the median, which keeps an edge where the mean of two positions of it blurs, and a
    voxel out of register weighs no more than its error. Lesions are learned late: after a few
    hundred steps on the simulated cohort, anatomy was sharp and a bright lesion of a FLAIR had a
    sixth of its brightness, with the squared error just as much. A score over the whole body hides
    that.

    Recovery slides windows of a patch's size over the volume and blends them with Gaussian
    weights, so that memory does not grow with the number of windows, and voxels near the edge of
    one window, of whose surroundings it has seen half, come from its neighbours. Two windows must
    agree about a voxel, or seams appear. Hence:

    - Features are normalised voxel by voxel, over channels, to a mean square of 1 (as Karras et
      al. do). Instance and group norm take their statistics from the window: a window half full
      of background would put the same tissue at another level. Batch norm has fixed statistics at
      recovery, but those of a few patches under varying subsets, in which zeros stand for absent
      scans, and in training it lets patients look at one another. Without any normalisation
      training took twice as many steps (measured on the simulated cohort).
    - Upsampling is a transposed convolution of kernel and stride 2, which puts each voxel at the
      same place in every window. (Linear interpolation with aligned corners, which MONAI's blocks
      default to, shifts features by an amount that depends on the window's size.)
    - Windows start at multiples of the network's stride, so that pooling divides the volume in the
      same cells in each of them, and the volume is padded (its last voxels repeated) to what they
      tile evenly: a last window that is moved back to fit would have its neighbour's edge, of
      which that one knows least, where its own is.

    Scans that are z-scored have exact zeros outside the body. A z-scored scan synthesised from
    z-scored scans is 0 where these are all 0, in training too, so that no capacity goes into
    telling air from air.

    Rows are recovered one by one, and only those that lack a scan that is wanted: what a patient
    gets does not depend, to the bit, on who else is in the batch. For a window of V voxels that
    takes O(width^2 V) multiplications and O(width V) memory.

    Deviations from MM-GAN, whose multi-input, multi-output scheme this is: availability maps
    beside the zeros, a random subset per record in place of a curriculum from easy to hard, and no
    adversarial loss, which makes a scan look right where it cannot be.

    Args:
        specs: Modalities in canonical order.
        options: Sizes.

    References:
        Sharma, Hamarneh: Missing MRI Pulse Sequence Synthesis Using Multi-Modal Generative
        Adversarial Network, IEEE Transactions on Medical Imaging 2020 (MM-GAN).
        Chartsias, Joyce, Giuffrida, Tsaftaris: Multimodal MR Synthesis via Modality-Invariant
        Latent Representation, IEEE Transactions on Medical Imaging 2018 (mean absolute error).
        Falk et al.: U-Net: deep learning for cell counting, detection, and morphometry, Nature
        Methods 2019 (the blocks, in MONAI's form).
        Karras, Aila, Laine, Lehtinen: Progressive Growing of GANs for Improved Quality, Stability,
        and Variation, ICLR 2018 (normalisation over channels).
    """

    Options = SynthesisOptions
    probabilistic = False
    in_group: Tensor

    def __init__(self, specs: Sequence[ModalitySpec], options: BaseModel) -> None:
        super().__init__(specs, options)
        o = SynthesisOptions.model_validate(options.model_dump())
        self.specs = tuple(specs)
        self.windows = o.windows
        together: dict[tuple[object, ...], list[int]] = {}
        for m, spec in enumerate(self.specs):
            if spec.is_image:
                together.setdefault((spec.shape[1:], spec.spacing_mm), []).append(m)
        self.grids = [
            _grid(members, self.specs[members[0]].shape[1:], o)
            for members in together.values()
            if len(members) > 1
        ]
        self.networks = nn.ModuleList(
            _UNet([self.specs[m] for m in grid.members], o) for grid in self.grids
        )
        in_group = torch.zeros(len(self.grids), len(self.specs), dtype=torch.bool)
        for row, grid in zip(in_group, self.grids, strict=True):
            row[list(grid.members)] = True
        self.register_buffer("in_group", in_group, persistent=False)

    def recoverable(self, observed: Tensor) -> Tensor:
        """Return bool `(B, M)`: images of which another image of the same group is observed."""
        result = torch.zeros_like(observed)
        for members in self.in_group:
            others = (observed & members).sum(1, keepdim=True) - observed.to(torch.int64)
            result |= members & (others > 0)
        return result

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the mean absolute error per record `(B,)`, added up over groups.

        Args:
            batch: B records, possibly incomplete.
            generator: CPU generator of subsets and patches.

        Raises:
            TypeError: If no two scans share a grid.
        """
        if not self.grids:
            return super().loss(batch, generator)
        # A batch in which nobody has two scans still has a gradient: zero.
        start = next(self.parameters()).sum() * 0
        loss = start.expand(len(batch))
        for grid, network in zip(self.grids, self.networks, strict=True):
            observed = batch.observed.available[:, list(grid.members)]
            shown = random_proper_subsets(observed, generator)
            rows = shown.any(1).nonzero().squeeze(1)
            if not len(rows):
                continue
            shown, target = shown[rows], (observed & ~shown)[rows]  # (R, G)
            truth = self._patches(batch, grid, rows.tolist(), shown, generator)  # (R, C, *size)
            pick = (..., *(None,) * len(grid.spatial))
            scan_of = cast("Tensor", network.scan_of)
            # What is absent may hold anything, NaN included.
            zero = truth.new_zeros(())
            x = torch.where(shown[:, scan_of][pick], truth, zero)
            asked = target[:, scan_of][pick]
            size = truth.shape[2:]
            made = network(_padded(x, grid.window), shown)[_box(size)]
            error = torch.where(asked, made - torch.where(asked, truth, zero), zero).abs()
            voxels = asked.flatten(1).sum(1) * prod(size)
            loss = loss.index_add(0, rows, error.flatten(1).sum(1) / voxels)
        return loss

    def _patches(
        self,
        batch: Batch,
        grid: _Grid,
        rows: Sequence[int],
        shown: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return a random patch of each row, all scans side by side, `(R, C, *size)`.

        Args:
            batch: B records.
            grid: Whose scans.
            rows: R of the records.
            shown: Bool `(R, G)`, at least one per row.
            generator: CPU generator.
        """
        scans = [batch.values[self.specs[m].name] for m in grid.members]
        first = shown.to(torch.int64).argmax(1).tolist()
        patches = []
        for row, g in zip(rows, first, strict=True):
            at = _around_body(scans[g][row], grid.window, generator)
            patches.append(torch.cat([scan[row][(slice(None), *at)] for scan in scans]))
        return torch.stack(patches)

    def propose(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """See `Imputer.propose`. Zeros for rows that have the scan, or no other of its group."""
        proposals = {name: torch.zeros_like(batch.values[name]) for name in wanted}
        for grid, network in zip(self.grids, self.networks, strict=True):
            names = [self.specs[m].name for m in grid.members]
            shown = batch.observed.available[:, list(grid.members)]
            for row, there in enumerate(shown.tolist()):
                absent = [g for g, n in enumerate(names) if n in proposals and not there[g]]
                if not absent or not any(there):
                    continue
                x = torch.cat(
                    [
                        batch.values[n][row] if has else torch.zeros_like(batch.values[n][row])
                        for n, has in zip(names, there, strict=True)
                    ]
                )
                made = self._slide(network, grid, x[None], shown[[row]], absent)
                at = 0
                for g in absent:
                    channels = self.specs[grid.members[g]].shape[0]
                    proposals[names[g]][row] = made[0, at : at + channels]
                    at += channels
        return proposals

    def _slide(
        self, network: nn.Module, grid: _Grid, x: Tensor, shown: Tensor, absent: Sequence[int]
    ) -> Tensor:
        """Return the scans in `absent` of one record, side by side, `(1, c, *spatial)`.

        Args:
            network: Of the grid.
            grid: Where the scans lie.
            x: `(1, C, *spatial)`, zeros where a scan is not shown.
            shown: Bool `(1, G)`.
            absent: Positions among the G scans, ascending.
        """
        from monai.inferers.utils import sliding_window_inference

        scan_of = cast("Tensor", network.scan_of)
        channels = torch.isin(scan_of, torch.tensor(absent, device=x.device))

        def window(part: Tensor) -> Tensor:
            made: Tensor = network(part, shown.expand(len(part), -1))[:, channels]
            return made

        made = sliding_window_inference(
            _padded(x, grid.tiled),
            grid.window,
            self.windows,
            window,
            overlap=grid.overlap,
            roi_weight_map=_gaussian(grid.window).to(x),
        )
        return cast("Tensor", made)[_box(grid.spatial)]


def _scaled(x: Tensor) -> Tensor:
    """Return features `(B, C, *spatial)` scaled to a mean square of 1 over C, voxel by voxel."""
    return x * (x.square().mean(1, keepdim=True) + _LEAST).rsqrt()


def random_proper_subsets(available: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each row a subset drawn uniformly from its non-empty proper subsets.

    Args:
        available: Bool `(B, G)`; rows with fewer than two True have no such subset, and get none.
        generator: CPU generator.

    Returns:
        Bool `(B, G)`.

    Example:
        >>> pair = torch.tensor([[True, False, True], [False, True, False]])
        >>> random_proper_subsets(pair, torch.Generator().manual_seed(0)).sum(1).tolist()
        [1, 0]
    """
    result = torch.zeros_like(available)
    todo = available.sum(1) > 1
    while bool(todo.any()):
        coin = torch.rand(available.shape, generator=generator).to(available.device) < 0.5
        result = torch.where(todo[:, None], coin & available, result)
        todo = todo & (~result.any(1) | (result == available).all(1))
    return result


def _grid(members: Sequence[int], spatial: Sequence[int], o: SynthesisOptions) -> _Grid:
    """Return where and how the network looks at the scans of a group."""
    stride = 2**o.levels
    window = tuple(min(o.patch, -(-size // stride) * stride) for size in spatial)
    overlap, tiled = [], []
    for side, size in zip(window, spatial, strict=True):
        step = max(stride, int(side * (1 - o.overlap)) // stride * stride)
        # MONAI rounds down to voxels; half a voxel more keeps rounding errors out of that.
        overlap.append(max(0.0, 1 - (step + 0.5) / side))
        tiled.append(side + max(0, -(-(size - side) // step)) * step)
    return _Grid(tuple(members), tuple(spatial), window, tuple(overlap), tuple(tiled))


def _gaussian(window: Sequence[int]) -> Tensor:
    """Return the weight of each voxel of a window in the blend, `(*window)`, 1 at its centre.

    MONAI's own Gaussian weights are the same, but cut off at 0.001, which all voxels near a face
    of the window fall below. Near a face of the image, where every window lies at its own face,
    windows would be averaged evenly, and seams appeared.

    Args:
        window: Voxels along each axis.
    """
    weight = torch.ones(())
    for side in window:
        x = (torch.arange(side) - (side - 1) / 2) / (_SIGMA * side)
        weight = weight[..., None] * (-x.square() / 2).exp()
    return weight


def _around_body(
    scan: Tensor, window: Sequence[int], generator: torch.Generator
) -> tuple[slice, ...]:
    """Return where a patch lies that is centred, if possible, on a voxel that is not 0.

    Centres are moved inwards until the patch lies in the image, so that edges and corners of the
    image are seen as often as its middle.

    Args:
        scan: `(C, *spatial)`.
        window: Voxels of the patch along each axis, at most; smaller axes are taken whole.
        generator: CPU generator.
    """
    spatial = scan.shape[1:]
    spots = torch.stack([torch.randint(n, (_TRIES,), generator=generator) for n in spatial])
    body = (scan[(slice(None), *spots.to(scan.device))] != 0).any(0).tolist()
    centre = spots[:, body.index(True) if any(body) else 0].tolist()
    result = []
    for c, side, size in zip(centre, window, spatial, strict=True):
        start = max(0, min(c - side // 2, size - side))
        result.append(slice(start, min(start + side, size)))
    return tuple(result)


def _padded(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return `(B, C, *size)` from `(B, C, *spatial)`, the last voxels of each axis repeated."""
    ends: list[int] = []
    for now, then in zip(reversed(x.shape[2:]), reversed(size), strict=True):
        ends += [0, then - now]
    return F.pad(x, ends, mode="replicate") if any(ends) else x


def _box(size: Sequence[int]) -> tuple[slice, ...]:
    """Return the index that crops `(B, C, *padded)` to `(B, C, *size)`."""
    return (slice(None), slice(None), *(slice(n) for n in size))
