"""The dynamic-sharing U-Net: one trunk for every modality, its own normalisation for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Annotated, NamedTuple

import torch
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Pool
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.nn import functional as F

from dymo_med.config import Strict
from dymo_med.types import ModalitySpec

Width = Annotated[int, Field(ge=2)]
_LINEAR = {2: "bilinear", 3: "trilinear"}
# A lesion fills few voxels: an untrained network says 5 % everywhere, not 50 %.
_FIRST_LOGIT = -3.0


class ModalityOutput(NamedTuple):
    """What the trunk says about one modality, or about every one side by side.

    Attributes:
        logits: `(B, R, *spatial)` of one modality, `(B, M, R, *spatial)` of all.
        embedding: `(B, D)` of one modality, `(B, M, D)` of all: the bottleneck's mean over space.
    """

    logits: Tensor
    embedding: Tensor


class SharedUNet(nn.Module):
    """A U-Net that sees one modality at a time, for any number of modalities, in 2D or 3D.

    Every convolution is shared by all modalities; only the group normalisations are the
    modality's own. Each level is twice convolution (3), group normalisation and ReLU; levels are
    joined by max-pooling on the way down and linear interpolation on the way up; a convolution
    (1) gives one logit per region. The answer to a set of modalities is the mean of their logits,
    before the sigmoid; an absent modality is left out of it and costs nothing.

    Deviations from the published code, on purpose: what comes up is interpolated to the size of
    what it meets, so that sizes need not be multiples of 16 (the same where they are); a
    normalisation of fewer channels than groups, or of a number that groups do not divide, has
    their greatest common divisor of groups; the last convolution's bias starts at -3, so that the
    first probabilities are those of a small lesion (there it starts near 0, and the first epochs
    go into learning that most voxels are none). The released script has `width_ratio` 0.5.

    Args:
        specs: Modalities in canonical order: images of one channel and equally many axes.
        regions: Number of regions R, each with its own sigmoid (they may overlap).
        options: Sizes.

    Attributes:
        specs: Modalities in canonical order.
        regions: R.
        embedding_size: Length D of the pooled embedding.

    Raises:
        ValueError: If the modalities cannot share a trunk.

    References:
        Isensee et al., nnU-Net, Nature Methods 18, 2021 (kernels of anisotropic voxels).
        Wang et al., Gradient-guided Modality Decoupling for Missing-Modality Robustness, AAAI
        2024 (published code: the 3D U-Net with shared convolutions and modality-specific norms).
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017 (the first bias).
    """

    class Options(Strict):
        """Sizes of the network.

        Attributes:
            widths: Channels at each level before `width_ratio`, from fine to coarse; the
                coarsest has half of it, since its channels join as many from the way down.
            width_ratio: Factor on all widths.
            groups: Groups of a normalisation.
            anisotropic: Leave long axes of the voxels alone: along an axis on which voxels are
                more than twice as long as on their shortest one, a level convolves nothing and
                pools nothing. Pooling the others makes voxels even, and from there on every axis
                takes part. For thick slices.
        """

        widths: Annotated[tuple[Width, ...], Field(min_length=2)] = (32, 64, 128, 256, 512)
        width_ratio: Annotated[float, Field(gt=0)] = 0.5
        groups: Annotated[int, Field(ge=1)] = 8
        anisotropic: bool = False

    def __init__(self, specs: Sequence[ModalitySpec], regions: int, options: BaseModel) -> None:
        super().__init__()
        o = SharedUNet.Options.model_validate(options.model_dump())
        shapes = {spec.name: spec.shape for spec in specs}
        if any(spec.kind != "image" or spec.shape[0] != 1 for spec in specs):
            raise ValueError(f"every modality must be an image of one channel, got {shapes}.")
        if len({len(shape) for shape in shapes.values()}) != 1:
            raise ValueError(f"all modalities must have equally many axes, got {shapes}.")
        self.specs = tuple(specs)
        self.regions = regions
        axes = len(specs[0].shape) - 1
        names = [spec.name for spec in specs]
        # Even, so that half of a width is a whole number of channels.
        w = [max(2, 2 * round(width * o.width_ratio / 2)) for width in o.widths]
        coarsest = len(w) - 1
        self.embedding_size = w[coarsest] // 2
        outputs = [*w[:-1], self.embedding_size]
        even = [(True,) * axes] * len(w)
        takes_part = _even_axes(specs[0].spacing_mm, len(w)) if o.anisotropic else even
        kernels = [tuple(3 if part else 1 for part in level) for level in takes_part]
        down = [
            _DoubleConv(axes, inputs, n, n, names, o.groups, kernel)
            for inputs, n, kernel in zip([1, *outputs], outputs, kernels, strict=False)
        ]
        up, channels = [], self.embedding_size
        for i in reversed(range(coarsest)):
            joined, channels = channels + w[i], w[i] // 2 if i else w[0]
            up.append(_DoubleConv(axes, joined, joined // 2, channels, names, o.groups, kernels[i]))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        # One on the way into each level but the finest.
        self.pools = nn.ModuleList(
            Pool[Pool.MAX, axes](kernel_size=tuple(2 if part else 1 for part in level))
            for level in takes_part[:-1]
        )
        self.head = Convolution(axes, w[0], regions, kernel_size=1, conv_only=True)
        nn.init.constant_(self.head.conv.bias, _FIRST_LOGIT)
        self._mode = _LINEAR[axes]

    def run(self, name: str, values: Tensor) -> ModalityOutput:
        """Return logits and embedding of one modality.

        Args:
            name: Modality.
            values: `(B, 1, *spatial)`; each axis at least 2 to the power of the levels less one.
        """
        x, passed = values, []
        for i, level in enumerate(self.down):
            x = level(self.pools[i - 1](x) if i else x, name)
            passed.append(x)
        embedding = passed.pop().flatten(2).mean(-1)
        for level in self.up:
            beside = passed.pop()
            x = F.interpolate(x, size=beside.shape[2:], mode=self._mode, align_corners=True)
            x = level(torch.cat([beside, x], dim=1), name)
        return ModalityOutput(self.head(x), embedding)

    def outputs(
        self, values: Mapping[str, Tensor], available: Tensor | None = None
    ) -> list[ModalityOutput | None]:
        """Return what the trunk says about each modality, one after the other.

        Each modality has its own part of the autograd graph, so that a loss of `combine(...)`
        goes back through the modalities of its subset alone.

        Args:
            values: `(B, 1, *spatial)` by name; a modality without an entry is absent.
            available: Bool `(B, M)`: rows on which a modality is run; None = all rows of every
                entry of `values`.

        Returns:
            M entries in canonical order: `(B, R, *spatial)` and `(B, D)`, NaN in rows that lack
            the modality; None where every row lacks it.
        """
        found: list[ModalityOutput | None] = []
        for m, spec in enumerate(self.specs):
            whole = values.get(spec.name)
            if whole is None or (available is not None and not bool(available[:, m].any())):
                found.append(None)
            elif available is None or bool(available[:, m].all()):
                found.append(self.run(spec.name, whole))
            else:
                rows = available[:, m].nonzero().squeeze(1)
                part = self.run(spec.name, whole[rows])
                found.append(ModalityOutput(*(_spread(x, rows, len(whole)) for x in part)))
        return found

    def per_modality(
        self, values: Mapping[str, Tensor], available: Tensor | None = None
    ) -> ModalityOutput:
        """Return what the trunk says about all modalities, side by side.

        Args:
            values: `(B, 1, *spatial)` by name; a modality without an entry is absent.
            available: Bool `(B, M)`: rows on which a modality is run; None = all rows of every
                entry of `values`.

        Returns:
            Logits `(B, M, R, *spatial)` and embeddings `(B, M, D)`, NaN where a row lacks the
            modality.

        Raises:
            ValueError: If every row lacks every modality.
        """
        found = self.outputs(values, available)
        some = next((x for x in found if x is not None), None)
        if some is None:
            raise ValueError("at least one row must have at least one modality.")
        absent = ModalityOutput(*(torch.full_like(x, torch.nan) for x in some))
        filled = [absent if x is None else x for x in found]
        return ModalityOutput(*(torch.stack(parts, dim=1) for parts in zip(*filled, strict=True)))

    @staticmethod
    def combine(logits: Tensor | Sequence[Tensor | None], available: Tensor) -> Tensor:
        """Return the mean of the logits (or embeddings) of each row's available modalities.

        Args:
            logits: `(B, M, ...)`, or M tensors `(B, ...)` (None where nobody has the modality).
            available: Bool `(B, M)`. What stands in an unavailable entry changes nothing, and no
                gradient flows into a modality that no row uses.

        Returns:
            `(B, ...)`; NaN in rows without any modality.

        Raises:
            ValueError: If no row has a modality, or one is available without logits.
        """
        parts = logits.unbind(1) if isinstance(logits, Tensor) else logits
        used = [m for m in range(available.shape[1]) if bool(available[:, m].any())]
        total = None
        for m in used:
            part = parts[m]
            if part is None:
                raise ValueError(f"modality {m} is available but has no logits.")
            mask = available[:, m].view(-1, *(1,) * (part.ndim - 1))
            # Not a product: 0 times NaN is NaN.
            part = part.where(mask, part.new_zeros(()))
            total = part if total is None else total + part
        if total is None:
            raise ValueError("at least one row must have at least one modality.")
        count = available.sum(1).view(-1, *(1,) * (total.ndim - 1)).to(total.dtype)
        return total / count

    def specific_modules(self) -> list[nn.Module]:
        """Return the modules that hold each modality's own parameters."""
        return [module.norms for module in self.modules() if isinstance(module, _DoubleConv)]


class _DoubleConv(nn.Module):
    """Twice: shared convolution, the modality's own group normalisation, ReLU."""

    def __init__(
        self,
        axes: int,
        inputs: int,
        hidden: int,
        outputs: int,
        names: Sequence[str],
        groups: int,
        kernel: tuple[int, ...],
    ) -> None:
        super().__init__()
        sizes = (inputs, hidden, outputs)
        self.convs = nn.ModuleList(
            Convolution(axes, sizes[i], sizes[i + 1], kernel_size=kernel, conv_only=True)
            for i in (0, 1)
        )
        self.norms = nn.ModuleDict(
            {
                name: nn.ModuleList(nn.GroupNorm(gcd(groups, n), n) for n in (hidden, outputs))
                for name in names
            }
        )

    def forward(self, x: Tensor, name: str) -> Tensor:
        """Return `(B, outputs, *spatial)` of `(B, inputs, *spatial)`."""
        norms: nn.ModuleList = self.norms[name]  # type: ignore[assignment]
        for conv, norm in zip(self.convs, norms, strict=True):
            x = F.relu(norm(conv(x)), inplace=True)
        return x


def _even_axes(spacing_mm: Sequence[float], levels: int) -> list[tuple[bool, ...]]:
    """Return per level, from fine to coarse, which axes are convolved and pooled on.

    Args:
        spacing_mm: Length of a voxel along each axis, at the finest level.
        levels: How many there are.

    Example:
        >>> _even_axes((1.0, 1.0, 3.0), 3)
        [(True, True, False), (True, True, True), (True, True, True)]
    """
    lengths, found = list(spacing_mm), []
    for _ in range(levels):
        part = tuple(mm <= 2 * min(lengths) for mm in lengths)
        found.append(part)
        lengths = [mm * (2 if even else 1) for mm, even in zip(lengths, part, strict=True)]
    return found


def _spread(part: Tensor, rows: Tensor, size: int) -> Tensor:
    """Return `part` placed at `rows` of a tensor of NaN with `size` rows."""
    return part.new_full((size, *part.shape[1:]), torch.nan).index_copy(0, rows, part)
