"""CyIN: one network whose bottleneck latents are translated into each other and fused.

What the imputer `cyclic` and the backbone `cyclic` have in common: token-level bottlenecks and
cyclic translation (`CyclicLatents`), and cross-modal fusion (`CrossModalFusion`).

Further letters: L aligned tokens per modality, C channels of a latent (`bottleneck`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dymo_med.blocks import Block
from dymo_med.config import Strict
from dymo_med.errors import ConfigError, Problem
from dymo_med.modalities import modality
from dymo_med.registry import nearest
from dymo_med.types import Batch, ModalitySpec, Tokens


class LatentOptions(Strict):
    """Sizes, weights and switches of bottlenecks and translation.

    The switches are there to see what a part is worth: each of them takes it away.

    Attributes:
        length: L, tokens to which every modality is aligned.
        dim: Width of a modality's tokens before the bottleneck.
        hidden: Hidden width of bottleneck encoders and decoders (C_ib).
        bottleneck: Channels of a latent (C_B).
        residual_dims: Channels inside a residual autoencoder, outermost first.
        residual_blocks: Residual autoencoders in a translator.
        width: First channels of image encoders.
        grid: Tokens per axis of an image.
        column_layers: Blocks among a table's columns.
        beta: What a bottleneck keeps is weighed with this against what it forgets.
        gamma: Weight of translation.
        stage_divide: Share of the epochs before translation begins.
        combine: How translations from several sources become one: their mean, or the published
            sum.
        latents: What stands for a modality at inference: the mean of its latent, or one draw, as
            published; a draw depends on a record's place in its batch.
        moving_targets: Whether the translation's loss moves its targets too, as published.
        token_bottleneck: Whether the bottleneck's own loss counts.
        bottleneck_space: Whether latents are random and forget; otherwise they are points.
        cyclic_interaction: Whether a bottleneck is asked for other modalities than its own.
        translation: Whether the translation's own loss counts.
        cycle: Whether it asks that translations lead back, too, to where they came from.
        translated_latents: Whether a missing latent is translated; otherwise it is zero.
    """

    length: Annotated[int, Field(ge=1)] = 8
    dim: Annotated[int, Field(ge=8)] = 32
    hidden: Annotated[int, Field(ge=4)] = 32
    bottleneck: Annotated[int, Field(ge=2)] = 16
    residual_dims: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (16, 8)
    residual_blocks: Annotated[int, Field(ge=1)] = 2
    width: Annotated[int, Field(ge=4)] = 8
    grid: Annotated[int, Field(ge=1)] = 2
    column_layers: Annotated[int, Field(ge=0)] = 1
    beta: Annotated[float, Field(gt=0)] = 16.0
    gamma: Annotated[float, Field(ge=0)] = 10.0
    stage_divide: Annotated[float, Field(ge=0, le=1)] = 0.2
    combine: Literal["mean", "sum"] = "mean"
    latents: Literal["mean", "sample"] = "mean"
    moving_targets: bool = False
    token_bottleneck: bool = True
    bottleneck_space: bool = True
    cyclic_interaction: bool = True
    translation: bool = True
    cycle: bool = True
    translated_latents: bool = True


@dataclass(frozen=True)
class Encoded:
    """Modalities of a batch behind their bottlenecks.

    Attributes:
        features: `(B, M, L, dim)`, what bottlenecks are asked to keep; 0 where unavailable.
        mean: `(B, M, L, C)`, 0 (the prior's mean) where unavailable. Likewise below.
        log_variance: `(B, M, L, C)`.
        available: Bool `(B, M, L)`.
    """

    features: Tensor
    mean: Tensor
    log_variance: Tensor
    available: Tensor

    @property
    def present(self) -> Tensor:
        """Bool `(B, M)`: modalities with something available."""
        return self.available.any(-1)


def kl_per_token(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, e^log_variance) || N(0, I)), averaged over channels, in nats.

    Args:
        mean: `(..., C)`.
        log_variance: `(..., C)`.

    Returns:
        `(...)`.

    References:
        CyIN, NeurIPS 2025, Eq. 36.

    Example:
        >>> kl_per_token(torch.tensor([2.0, 0.0]), torch.zeros(2)).item()
        1.0
    """
    return -0.5 * (log_variance + 1 - mean.square() - log_variance.exp()).mean(-1)


def align_weights(tokens: int, length: int) -> Tensor:
    """Return the weights `(L, N)` by which N tokens become L.

    Each new token averages a run of neighbours; where there are fewer than L, tokens are
    repeated evenly. CyIN's text says average pooling; its code reshapes in an order in which token
    j averages j, j + L, j + 2 L, ..., which for the cells of a picture makes no sense.

    Args:
        tokens: N.
        length: L.

    Example:
        >>> align_weights(4, 2).tolist()
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    return F.adaptive_avg_pool1d(torch.eye(tokens)[None], length)[0].T.contiguous()


class _Bottleneck(nn.Module):
    """From a token to mean and log variance of its latent (1x1 convolutions)."""

    def __init__(self, o: LatentOptions) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(o.dim, o.hidden), nn.ReLU(), nn.Linear(o.hidden, 2 * o.bottleneck)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.net(x).chunk(2, dim=-1)
        # Bounded so that no latent becomes infinitely sure.
        return mean, log_variance.clamp(-10, 10)


class _Convolution(nn.Linear):
    """Convolution of width 3 along the tokens, `(R, L, D)` to `(R, L, D')`, zeros beyond the ends.

    As one matrix product, which for a handful of tokens is several times as fast on a CPU.
    """

    def __init__(self, before: int, after: int, bias: bool = True) -> None:
        super().__init__(3 * before, after, bias)

    def forward(self, x: Tensor) -> Tensor:
        edge = torch.zeros_like(x[:, :1])
        left, right = torch.cat([edge, x[:, :-1]], 1), torch.cat([x[:, 1:], edge], 1)
        return super().forward(torch.cat([left, x, right], 2))


class _ResidualAutoencoder(nn.Module):
    """One block of a translator: convolutions along the tokens, down to few channels and back."""

    def __init__(self, channels: int, dims: Sequence[int]) -> None:
        super().__init__()
        sizes = (channels, *dims)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [_Convolution(before, after, bias=False), nn.LeakyReLU()]
        layers.pop()  # none after the innermost
        back = tuple(reversed(dims))
        for before, after in pairwise(back):
            layers += [_Convolution(before, after), nn.ReLU()]
        layers.append(nn.Linear(back[-1], channels))
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Translator(nn.Module):
    """Cascaded residual autoencoders from one modality's latents to another's, and back.

    Each block adds to what the one before it made of the latents; two convolutions make the
    transition.

    Args:
        channels: C.
        dims: Channels inside a block, outermost first.
        blocks: How many.

    References:
        CyIN, NeurIPS 2025, Eq. 14; Tran et al., Missing Modalities Imputation via Cascaded
        Residual Autoencoder, CVPR 2017.
    """

    def __init__(self, channels: int, dims: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_ResidualAutoencoder(channels, dims) for _ in range(blocks))
        self.transition = nn.Sequential(
            _Convolution(channels, channels),
            nn.ReLU(),
            _Convolution(channels, channels),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Return the other modality's latents `(R, L, C)` from this one's `(R, L, C)`."""
        x = latents
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.transition(x)
        return out


class CyclicLatents(nn.Module):
    """Encoders, token-level bottlenecks and translators of any number of modalities of any kind.

    A modality's encoder gives tokens, which are aligned to L, normalised (without learned scale,
    so that targets cannot shrink to nothing) and put through its bottleneck. A decoder per target
    asks every latent for the features of every modality that the record has, its own (intra) and
    the others' (inter). A translator per unordered pair of modalities turns latents of either into
    the other's.

    Deviations from the published code: targets are not squeezed through a sigmoid, since tokens
    here have both signs; latents are drawn once per record and step instead of once per term (the
    same expectation); terms that need a modality a record lacks are left out of its means, and so
    are blank table cells; tokens are aligned by neighbourhood (`align_weights`).

    Args:
        specs: Modalities in canonical order.
        options: Sizes and switches.

    References:
        CyIN: Complete and Incomplete multimodal learning by cyclic informative bottlenecks,
        NeurIPS 2025 (published code, snapshot da04a3d8).
    """

    def __init__(self, specs: Sequence[ModalitySpec], options: LatentOptions) -> None:
        super().__init__()
        o = self.options = options
        self.specs = tuple(specs)
        sizes = {"width": o.width, "grid": o.grid, "layers": o.column_layers, "heads": 1}
        names = [spec.name for spec in specs]
        encoders = {spec.name: modality(spec).encoder(o.dim, sizes) for spec in specs}
        for name, encoder in encoders.items():
            # Follows from the sizes, so it is no part of the weights.
            weights = align_weights(encoder.tokens, o.length)
            self.register_buffer(f"align_{name}", weights, persistent=False)
        self.encoders = nn.ModuleDict(encoders)
        self.bottlenecks = nn.ModuleDict({name: _Bottleneck(o) for name in names})
        self.decoders = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(o.bottleneck, o.hidden), nn.ReLU(), nn.Linear(o.hidden, o.dim)
                )
                for name in names
            }
        )
        self.pairs = tuple(combinations(range(len(names)), 2))
        self.translators = nn.ModuleDict(
            {
                f"{a}-{b}": Translator(o.bottleneck, o.residual_dims, o.residual_blocks)
                for a, b in self.pairs
            }
        )

    def translator(self, source: int, target: int) -> Translator:
        """Return the translator between two modalities: one for both directions."""
        found = self.translators[f"{min(source, target)}-{max(source, target)}"]
        assert isinstance(found, Translator)
        return found

    def features(self, name: str, values: Tensor, observed_fields: Tensor | None) -> Tokens:
        """Return one modality's aligned tokens `(B, L, dim)`.

        Args:
            name: The modality.
            values: `(B, *shape)`.
            observed_fields: Bool `(B, F)` for tables; None = every cell filled.
        """
        tokens: Tokens = self.encoders[name](values, observed_fields)
        share = self.get_buffer(f"align_{name}").to(tokens.values) * tokens.available[:, None]
        total = share.sum(-1, keepdim=True)  # (B, L, 1)
        x = (share / total.clamp_min(1e-9)) @ tokens.values
        available = total[..., 0] > 0
        x = F.layer_norm(x, x.shape[-1:])
        return Tokens(x * available[..., None], available)

    def latents(self, name: str, values: Tensor, observed_fields: Tensor | None) -> Tokens:
        """Return what stands for a modality at inference, `(B, L, C)`; arguments as `features`."""
        tokens = self.features(name, values, observed_fields)
        mean, log_variance = self.bottlenecks[name](tokens.values)
        if self.options.latents == "sample":
            mean = _draw(mean, log_variance, torch.Generator().manual_seed(0))
        return Tokens(mean * tokens.available[..., None], tokens.available)

    def encode(self, batch: Batch) -> Encoded:
        """Return the observed modalities of a batch behind their bottlenecks.

        Args:
            batch: B records; values where nothing was observed are not looked at.
        """
        found: list[tuple[Tensor, ...]] = []
        for i, spec in enumerate(self.specs):
            rows = batch.observed.available[:, i].nonzero().squeeze(1)
            fields = batch.observed_fields.get(spec.name)
            tokens = self.features(
                spec.name, batch.values[spec.name][rows], None if fields is None else fields[rows]
            )
            mean, log_variance = self.bottlenecks[spec.name](tokens.values)
            keep = tokens.available[..., None]
            parts = (tokens.values, mean * keep, log_variance * keep, tokens.available)
            found.append(tuple(_spread(part, rows, len(batch)) for part in parts))
        return Encoded(*(torch.stack(parts, 1) for parts in zip(*found, strict=True)))

    def draw(self, encoded: Encoded, generator: torch.Generator) -> Tensor:
        """Return one draw of every latent, `(B, M, L, C)`; the means without a bottleneck space."""
        if not self.options.bottleneck_space:
            return encoded.mean
        drawn = _draw(encoded.mean, encoded.log_variance, generator)
        return drawn * encoded.available[..., None]

    def bottleneck_loss(self, encoded: Encoded, latents: Tensor) -> Tensor:
        """Return the token-level bottleneck loss per record, `(B,)`.

        The mean, over the ordered pairs (S, T) of modalities that a record has, of
        KL(p(B_S | S) || N(0, I)) + beta ||T - D_T(B_S)||^2; both are means over channels and
        tokens. Over S = T alone without cyclic interaction.

        Args:
            encoded: B records.
            latents: Draws `(B, M, L, C)`.
        """
        o = self.options
        b, m = encoded.present.shape
        kl = _token_mean(kl_per_token(encoded.mean, encoded.log_variance), encoded.available)
        if not o.bottleneck_space:
            kl = torch.zeros_like(kl)
        total, pairs = kl.new_zeros(b), kl.new_zeros(b)
        for t, spec in enumerate(self.specs):
            guess = self.decoders[spec.name](latents)  # (B, M, L, dim)
            error = (guess - encoded.features[:, t : t + 1]).square().mean(-1)
            both = encoded.available & encoded.available[:, t : t + 1]
            counted = both.any(-1)  # (B, M): from which modalities
            if not o.cyclic_interaction:
                own = torch.arange(m, device=counted.device) == t
                counted = counted & own
            each = kl + o.beta * _token_mean(error, both)
            total = total + (each * counted).sum(1)
            pairs = pairs + counted.sum(1)
        mean: Tensor = total / pairs.clamp_min(1)
        return mean

    def translate(self, latents: Tensor) -> Tensor:
        """Return every modality's translation into every other, `(B, M, M, L, C)`: source, target.

        Args:
            latents: `(B, M, L, C)`, or `(B, M, M, L, C)` to translate entry (s, t) from t into s.
        """
        b, m = latents.shape[:2]
        rows = [latents.new_zeros(b, *latents.shape[-2:]) for _ in range(m * m)]
        for i, j in self.pairs:
            if latents.ndim == 4:
                both = torch.cat([latents[:, i], latents[:, j]])
            else:
                both = torch.cat([latents[:, i, j], latents[:, j, i]])
            rows[i * m + j], rows[j * m + i] = self.translator(i, j)(both).chunk(2)
        return torch.stack(rows, 1).view(b, m, m, *latents.shape[-2:])

    def combined(self, translated: Tensor, counted: Tensor) -> Tensor:
        """Return the translations from all counted sources taken together, `(B, M, L, C)`.

        Args:
            translated: `(B, M, M, L, C)`: source, target.
            counted: Bool `(B, M, M)`: source, target.
        """
        total = (translated * counted[..., None, None]).sum(1)
        if self.options.combine == "mean":
            total = total / counted.sum(1).clamp_min(1)[..., None, None]
        return total

    def translation_loss(self, latents: Tensor, available: Tensor, translated: Tensor) -> Tensor:
        """Return the translation loss per record, `(B,)`: reconstruction and cycle.

        Reconstruction is the mean squared error to the target of every single-source translation
        and of those combined; the cycle leads every translation back where it came from, singly
        and combined. For three modalities these are 9 and 9 terms. Both ends of a term are
        modalities that the record has. Without `cycle` there is reconstruction alone.

        Args:
            latents: Draws `(B, M, L, C)`.
            available: Bool `(B, M, L)`.
            translated: `translate(latents)`.
        """
        present = available.any(-1)
        other = ~torch.eye(present.shape[1], dtype=torch.bool, device=present.device)
        counted = present[:, :, None] & present[:, None] & other  # (B, source, target)
        if not self.options.moving_targets:
            latents = latents.detach()
        total = self._errors(translated, latents, available, counted)
        if not self.options.cycle:
            return total
        back = self.translate(translated)  # (B, source, target): back in the source
        # Seen from where it came from, what comes back is a translation like any other.
        return total + self._errors(back.transpose(1, 2), latents, available, counted)

    def _errors(
        self, translated: Tensor, latents: Tensor, available: Tensor, counted: Tensor
    ) -> Tensor:
        """Return the mean error of translations, one by one and combined, per record."""
        each = (translated - latents[:, None]).square().mean(-1)  # (B, source, target, L)
        each = _token_mean(each, available[:, None].expand_as(each))
        several = counted.sum(1) > 1  # (B, target)
        joint = (self.combined(translated, counted) - latents).square().mean(-1)
        joint = _token_mean(joint, available)
        total = (each * counted).sum((1, 2)) + (joint * several).sum(1)
        return total / (counted.sum((1, 2)) + several.sum(1)).clamp_min(1)

    def replaced(
        self,
        latents: Tensor,
        available: Tensor,
        translated: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Return latents of which some, at random, are translations, and what is available then.

        Each record's modality is, with equal probability, what was measured, its translation from
        one of the other modalities that the record has, or, if there are several, from all of them
        together: of three, each is real with probability 1/4, of M with 1/(M + 1) (2: 1/2). What
        was not measured is translated. (The published code draws once per batch.)

        Args:
            latents: Draws `(B, M, L, C)`.
            available: Bool `(B, M, L)`.
            translated: `translate(latents)`.
            generator: CPU generator.
        """
        present = available.any(-1)
        m = present.shape[1]
        other = ~torch.eye(m, dtype=torch.bool, device=present.device)
        counted = present[:, :, None] & other  # (B, source, target)
        single = counted.transpose(1, 2)  # (B, target, source)
        choices = torch.cat([single, (single.sum(2) > 1)[..., None], present[..., None]], 2)
        versions = torch.cat(
            [
                translated.transpose(1, 2),
                self.combined(translated, counted)[:, :, None],
                latents[:, :, None],
            ],
            2,
        )  # (B, target, M + 2, L, C)
        chosen = torch.multinomial(choices.flatten(0, 1).float().cpu(), 1, generator=generator).to(
            latents.device
        )
        picked = versions.flatten(0, 1)[
            torch.arange(len(chosen), device=chosen.device), chosen[:, 0]
        ]
        real = (chosen[:, 0] == m + 1).view(present.shape)
        return picked.unflatten(0, present.shape), available | ~real[..., None]

    def fill(self, latents: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents with translations where there is none, and what is available then.

        Args:
            latents: `(R, M, L, C)`.
            available: Bool `(R, M, L)`.
        """
        latents = latents * available[..., None]
        if not self.options.translated_latents:
            return latents, torch.ones_like(available)
        present = available.any(-1)
        filled, now = [], []
        for t in range(len(self.specs)):
            total, sources = torch.zeros_like(latents[:, t]), torch.zeros_like(present[:, t]).int()
            for s in range(len(self.specs)):
                rows = present[:, s] & ~available[:, t].all(-1)
                if s != t and bool(rows.any()):
                    index = rows.nonzero().squeeze(1)
                    guess = self.translator(s, t)(latents[index, s])
                    total = total.index_add(0, index, guess.to(total.dtype))
                    sources = sources + rows.int()
            if self.options.combine == "mean":
                total = total / sources.clamp_min(1)[:, None, None]
            filled.append(torch.where(available[:, t, :, None], latents[:, t], total))
            now.append(available[:, t] | (sources > 0)[:, None])
        return torch.stack(filled, 1), torch.stack(now, 1)


@dataclass(frozen=True)
class Dropouts:
    """What shares are dropped while training; random numbers are torch's global ones.

    Attributes:
        attention: Of attention weights across modalities, per source modality; of the form
            `joint` the largest counts.
        memory: Of attention weights within a modality.
        embedding: Of token values, where they enter a transformer.
        output: Of values in the residual network after all transformers.
    """

    attention: tuple[float, ...]
    memory: float = 0.0
    embedding: float = 0.0
    output: float = 0.0


class CrossModalFusion(nn.Module):
    """Cross-modal attention over latents of any set of modalities.

    `pairwise` is the published form: one cross-modal transformer per ordered pair of modalities
    (six for three), a self-attention transformer per target over what they give side by side, the
    mean over tokens, all targets side by side, a residual MLP. Their number grows with M (M - 1);
    `joint` does with one network for any M: every token attends to the tokens of all other
    modalities at once, then to its own modality's; targets are averaged. A source that is not
    available adds nothing to its target, and a target that is not available is left out.

    Args:
        modalities: M.
        length: L.
        channels: C.
        dim: Width of the transformers (C_U).
        heads: Attention heads.
        layers: Layers of a cross-modal transformer.
        memory_layers: Layers of the self-attention after it.
        form: `pairwise` or `joint`.
        dropouts: None = nothing is dropped.
        causal: Whether a token sees only those that are no later than itself, in its own modality
            and in others. The places of aligned tokens correspond.

    References:
        CyIN, NeurIPS 2025, Eq. 21-22; Tsai et al., Multimodal Transformer for Unaligned Multimodal
        Language Sequences, ACL 2019.
    """

    def __init__(
        self,
        modalities: int,
        length: int,
        channels: int,
        dim: int,
        heads: int,
        layers: int,
        memory_layers: int,
        form: Literal["pairwise", "joint"],
        dropouts: Dropouts | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.modalities, self.length, self.form = modalities, length, form
        d = self.dropouts = dropouts or Dropouts((0.0,) * modalities)
        self.causal = causal
        self.inputs = nn.ModuleList(_Convolution(channels, dim) for _ in range(modalities))
        self.position = nn.Parameter(torch.randn(modalities, length, dim) * 0.02)
        pairwise = form == "pairwise"
        wide = dim * max(1, modalities - 1) if pairwise else dim
        every = range(modalities)
        # One network per target and source, which has the source's rate; or one for all.
        rates = (
            [d.attention[s] for t in every for s in every if s != t]
            if pairwise
            else [max(d.attention)] * int(modalities > 1)
        )
        self.crosses = nn.ModuleList(
            nn.ModuleList(_CrossBlock(dim, heads, rate) for _ in range(layers)) for rate in rates
        )
        self.memories = nn.ModuleList(
            nn.ModuleList(Block(wide, heads, d.memory) for _ in range(memory_layers))
            for _ in range(modalities if pairwise else 1)
        )
        self.width = wide * modalities if pairwise else dim
        self.norm = nn.LayerNorm(self.width)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.ReLU(), nn.Linear(self.width, self.width)
        )

    def forward(self, latents: Tensor, available: Tensor) -> Tensor:
        """Return a state `(R, width)`.

        Args:
            latents: `(R, M, L, C)`.
            available: Bool `(R, M, L)`.
        """
        latents = latents.where(available[..., None], latents.new_zeros(()))
        x = torch.stack(
            [layer(latents[:, i]) for i, layer in enumerate(self.inputs)],
            1,
        )
        # One draw for all networks that a modality's tokens enter.
        x = self._dropped(x + self.position, self.dropouts.embedding)  # (R, M, L, dim)
        state = (self._pairwise if self.form == "pairwise" else self._joint)(x, available)
        inside = self._dropped(self.mlp[:2](state), self.dropouts.output)
        out: Tensor = self.norm(state + self.mlp[2](inside))
        return out

    def _dropped(self, x: Tensor, rate: float) -> Tensor:
        """Return `x` with a share of its values dropped, in training alone."""
        return F.dropout(x, rate) if rate and self.training else x

    def _earlier(self, copies: int, device: torch.device) -> Tensor:
        """Return which token (column) each token (row) may see: none that is later than itself.

        Args:
            copies: Modalities side by side.
            device: Where to.

        Returns:
            Bool `(N, N)`, N = copies L; `(1, 1)`, True, where nothing is causal.
        """
        if not self.causal:
            return torch.ones(1, 1, dtype=torch.bool, device=device)
        place = torch.arange(self.length, device=device).repeat(copies)
        return place[None] <= place[:, None]

    def _pairwise(self, x: Tensor, available: Tensor) -> Tensor:
        parts = []
        m, networks = self.modalities, iter(self.crosses)
        earlier = self._earlier(1, x.device)
        for t in range(m):
            seen = []
            for s in range(m):
                if s == t:
                    continue
                y = x[:, t]
                for cross in next(networks):  # type: ignore[attr-defined]
                    y = cross(y, x[:, s], available[:, s, None] & earlier)
                seen.append(y)
            y = self._dropped(torch.cat(seen or [x[:, t]], -1), self.dropouts.embedding)
            # What is not available is left out of the mean; a token sees at least itself.
            own = _self_or(available[:, t]) & earlier
            for block in self.memories[t]:  # type: ignore[attr-defined]
                y = block(y, own)
            parts.append(_mean(y, available[:, t]))
        return torch.cat(parts, 1)

    def _joint(self, x: Tensor, available: Tensor) -> Tensor:
        r, m, n, d = x.shape
        owner = torch.arange(m, device=x.device).repeat_interleave(n)
        same = owner[:, None] == owner[None]
        flat = available.flatten(1)
        earlier = self._earlier(m, x.device)
        y = x.flatten(1, 2)
        source = y
        for network in self.crosses:
            for cross in network:  # type: ignore[attr-defined]
                y = cross(y, source, flat[:, None] & ~same & earlier)
        y = self._dropped(y, self.dropouts.embedding)
        own = (flat[:, None] & same & earlier) | torch.eye(m * n, dtype=torch.bool, device=x.device)
        for block in self.memories[0]:  # type: ignore[attr-defined]
            y = block(y, own[:, None])
        each = _mean(y.view(r * m, n, d), available.flatten(0, 1)).view(r, m, d)
        return _mean(each, available.any(-1))


class _CrossBlock(nn.Module):
    """Pre-norm block in which one modality's tokens attend to others'."""

    def __init__(self, dim: int, heads: int, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.norm_target, self.norm_source = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, source: Tensor, attend: Tensor) -> Tensor:
        """Return `(R, N, D)`.

        Args:
            x: `(R, N, D)`, the target.
            source: `(R, S, D)`.
            attend: Bool, broadcastable to `(R, N, S)`: True where a target's token may see one of
                the source. One that may see none gains nothing.
        """
        r, n, d = x.shape
        head = d // self.heads  # said, not left to -1: there may be no row
        attend = attend.expand(r, n, -1)
        some = attend.any(-1, keepdim=True)
        q = self.query(self.norm_target(x)).view(r, n, self.heads, head).transpose(1, 2)
        k, v = (
            part.view(r, source.shape[1], self.heads, head).transpose(1, 2)
            for part in self.key_value(self.norm_source(source)).chunk(2, -1)
        )
        drop = self.attention_dropout if self.training else 0.0
        seen = (attend | ~some)[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=drop)
        x = x + self.out(y.transpose(1, 2).reshape(r, n, d)) * some
        out: Tensor = x + self.mlp(self.norm(x))
        return out


def _draw(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> Tensor:
    """Return one draw of N(mean, e^log_variance)."""
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
    return mean + noise * (0.5 * log_variance).exp()


def _spread(part: Tensor, rows: Tensor, size: int) -> Tensor:
    """Return `part` placed at `rows` of an otherwise zero (False) tensor with `size` rows."""
    if len(rows) == size:
        return part
    return part.new_zeros(size, *part.shape[1:]).index_copy(0, rows, part)


def _token_mean(x: Tensor, available: Tensor) -> Tensor:
    """Return the mean over the available ones of the last axis; 0 where there is none."""
    return (x * available).sum(-1) / available.sum(-1).clamp_min(1)


def _mean(x: Tensor, available: Tensor) -> Tensor:
    """Return `(R, D)`, the mean over the available of `(R, N, D)`; 0 where there is none."""
    return _token_mean(x.transpose(1, 2), available[:, None])


def _self_or(available: Tensor) -> Tensor:
    """Return bool `(R, 1, N, N)`: every token sees the available ones, and itself."""
    itself = torch.eye(available.shape[1], dtype=torch.bool, device=available.device)
    return (available[:, None] | itself)[:, None]


Rate = Annotated[float, Field(ge=0, lt=1)]


class FusionOptions(Strict):
    """Sizes of the fusion.

    Attributes:
        fusion: Form of `CrossModalFusion`.
        fusion_dim: Width of its transformers (C_U).
        heads: Attention heads.
        layers: Layers of a cross-modal transformer.
        memory_layers: Layers of self-attention after it.
        attention_dropout: Share of attention weights across modalities that is dropped while
            training: a number, or (`pairwise`) one by the name of the source modality, 0 for
            those not named.
        memory_dropout: Likewise within a modality.
        embedding_dropout: Share of token values dropped where they enter a transformer.
        output_dropout: Share of values dropped in the residual network after all transformers.
        causal: Whether a token sees only those that are no later than itself.
    """

    fusion: Literal["pairwise", "joint"] = "pairwise"
    fusion_dim: Annotated[int, Field(ge=8)] = 32
    heads: Annotated[int, Field(ge=1)] = 4
    layers: Annotated[int, Field(ge=1)] = 1
    memory_layers: Annotated[int, Field(ge=1)] = 1
    attention_dropout: Rate | dict[str, Rate] = 0.0
    memory_dropout: Rate = 0.0
    embedding_dropout: Rate = 0.0
    output_dropout: Rate = 0.0
    causal: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.fusion_dim % self.heads:
            raise ValueError("fusion_dim must be a multiple of heads")
        if self.fusion == "joint" and isinstance(self.attention_dropout, dict):
            raise ValueError("attention_dropout must be one number with fusion: joint")
        return self

    def dropouts(self, names: Sequence[str]) -> Dropouts:
        """Return the rates of a cohort's modalities.

        Args:
            names: Modalities in canonical order.

        Raises:
            ConfigError: If a rate is for another modality.
        """
        rates = self.attention_dropout
        if not isinstance(rates, dict):
            rates = dict.fromkeys(names, rates)
        unknown = [name for name in rates if name not in names]
        if unknown:
            raise ConfigError(
                Problem(
                    "Backbone cyclic attention_dropout",
                    f"there is no modality called {', '.join(unknown)}",
                    expected=f"modalities of the cohort: {', '.join(names)}",
                    remedy=nearest(unknown[0], list(names)),
                )
            )
        return Dropouts(
            tuple(rates.get(name, 0.0) for name in names),
            self.memory_dropout,
            self.embedding_dropout,
            self.output_dropout,
        )
