"""What every imputer offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dymo_med.blocks import ConvDecoder, PatchDecoder
from dymo_med.errors import ConfigError, PatientDataError, Problem
from dymo_med.modalities.base import Modality
from dymo_med.types import Batch, LatentTokens, ModalitySpec, Recovery

# The mean image of fewer records than this would show single patients to whoever has the bundle.
_MOST_PRIVATE = 10
# No category is thought to be less likely, where probabilities are frequencies.
RAREST = 1e-3


class Imputer(nn.Module, ABC):
    """Recovers missing modalities, and blank cells of partly filled tables, from observed ones.

    A subclass says what it can recover and proposes values for it; what was observed is passed on
    here, bit for bit, so that no imputer can touch it.

    Attributes:
        Options: Its part of a recipe.
        specs: Modalities in canonical order.
        probabilistic: Whether `propose` can draw.
        closed_form: Whether a draw costs next to nothing and does not depend on a record's
            neighbours, so that answers can be averaged over draws everywhere.
    """

    Options: ClassVar[type[BaseModel]]
    probabilistic: ClassVar[bool]
    closed_form: ClassVar[bool] = False
    specs: tuple[ModalitySpec, ...]

    @abstractmethod
    def __init__(self, specs: Sequence[ModalitySpec], options: BaseModel) -> None:
        super().__init__()

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the training loss per record `(B,)`; terms without data are left out.

        Every imputer with parameters defines it.

        Args:
            batch: B records, possibly incomplete.
            generator: CPU generator behind every random number.

        Raises:
            TypeError: If there is nothing to train.
        """
        raise TypeError(f"{type(self).__name__} has no trainable parameters and so no loss.")

    def start_from(self, batch: Batch) -> None:
        """Take what helps to begin with from the training records, before the first epoch.

        An imputer without trainable parameters is fitted here, and with this it is ready.

        Args:
            batch: All training records.
        """

    @abstractmethod
    def propose(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Return proposed values `(B, *shape)` for the modalities in `wanted`.

        Args:
            batch: B records; values where nothing was observed must not be looked at.
            wanted: Modalities that are missing or partly filled somewhere in the batch.
            generator: CPU generator for one random draw; None = the deterministic best guess.
        """

    def describe(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Return descriptors `(B, P)` of the scans in `wanted`, as scans are stored.

        Only an imputer that knows more of them than its proposed voxels show returns any.

        Args:
            batch: B records.
            wanted: As for `propose`.
            generator: In the state in which `propose` had it: those of the same draw.
        """
        return {}

    def cell_intervals(
        self, batch: Batch, wanted: Sequence[str], share: float
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return between which numbers the cells of the tables in `wanted` are thought to lie.

        By default from `table_likelihood`, a normal distribution in natural units.

        Args:
            batch: B records.
            wanted: Tables.
            share: Of the probability, in the middle.

        Returns:
            Lower and upper ends `(B, F)` in natural units within the columns' ranges, NaN for
            categories; nothing of a table of which values only are stated.
        """
        reach = 2**0.5 * torch.erfinv(torch.tensor(share, dtype=torch.float64)).item()
        found = {}
        for name, parameters in self.table_likelihood(batch, wanted).items():
            spec = next(s for s in self.specs if s.name == name)
            low: list[Tensor] = []
            high: list[Tensor] = []
            at = 0
            for column in spec.columns:
                if column.type == "categorical":
                    blank = torch.full_like(parameters[:, 0], torch.nan)
                    low, high, at = [*low, blank], [*high, blank], at + len(column.values)
                    continue
                middle, spread = parameters[:, at], parameters[:, at + 1].exp() * reach
                for side, ends in ((-spread, low), (spread, high)):
                    end = (middle + side) * (column.std or 1.0) + (column.mean or 0.0)
                    ends.append(end if column.range is None else end.clamp(*column.range))
                at += 2
            found[name] = torch.stack(low, 1), torch.stack(high, 1)
        return found

    def table_likelihood(self, batch: Batch, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Return what is thought of every cell of the tables in `wanted`, beyond its best guess.

        Args:
            batch: B records.
            wanted: Tables.

        Returns:
            Likelihood parameters `(B, P)` as `Table.cell_log_likelihood` reads them, of the
            deterministic best guess; nothing where an imputer states values only.
        """
        return {}

    def latent_tokens(self, batch: Batch, wanted: Sequence[str]) -> LatentTokens | None:
        """Return recoveries as a backbone's own tokens; None for an imputer that has none.

        Args:
            batch: B records.
            wanted: As for `propose`.
        """
        return None

    def tie(self, backbone: nn.Module) -> bool:
        """Take over from a backbone what both have in common, before either is trained or loaded.

        Afterwards it belongs to the backbone alone: it is trained, saved and moved with it.

        Args:
            backbone: The network that recoveries are for.

        Returns:
            Whether there is anything; if so the backbone is trained first.

        Raises:
            ConfigError: If the two should have something in common but differ in its options.
        """
        return False

    def recoverable(self, observed: Tensor) -> Tensor:
        """Return bool `(B, M)`: what could be recovered from these observed modalities.

        True of a modality that is observed means that its blank cells could be. Observing more
        never makes less recoverable.

        Args:
            observed: Bool `(B, M)`.
        """
        return observed.any(1, keepdim=True).expand_as(observed)

    @torch.no_grad()
    def recover(self, batch: Batch, *, draws: int = 0, seed: int = 0) -> Recovery:
        """Propose values for everything that is missing and can be recovered.

        Args:
            batch: B records.
            draws: How many seeded random draws to add for probabilistic imputers.
            seed: Seed of the draws.

        Returns:
            Observed values bit for bit; proposals elsewhere.

        Raises:
            PatientDataError: If a record has nothing observed.
        """
        observed = batch.observed.available
        nothing = (~observed.any(1)).nonzero().squeeze(1).tolist()
        if nothing:
            raise PatientDataError(
                *(
                    Problem(
                        f"Patient {batch.record_ids[i]}",
                        "no modality is observed, so nothing can be recovered",
                        expected=f"at least one of {', '.join(batch.observed.names)}",
                        remedy="Leave the record out",
                    )
                    for i in nothing
                )
            )
        can = self.recoverable(observed)
        recovered = ~observed & can
        completed = self._to_complete(batch) & can
        something = (recovered | completed).any(0).tolist()
        wanted = [n for n, want in zip(batch.observed.names, something, strict=True) if want]
        was_training = self.training
        self.eval()
        try:
            values = self._merge(batch, wanted, None)
            latents = self.latent_tokens(batch, wanted) if wanted else None
            told = self.describe(batch, wanted, None) if wanted else {}
            drawn = [
                self._merge(batch, wanted, torch.Generator().manual_seed(seed * 100_003 + i))
                for i in range(draws if self.probabilistic else 0)
            ]
        finally:
            self.train(was_training)
        return Recovery(
            values=values,
            observed=batch.observed,
            recovered=recovered,
            completed=completed,
            draws={n: torch.stack([d[n] for d in drawn]) for n in wanted} if drawn else None,
            latents=latents,
            descriptors=told,
        )

    @torch.no_grad()
    def draws(
        self,
        batch: Batch,
        recovery: Recovery,
        number: int,
        *,
        seed: int = 0,
        unseen: Sequence[str] = (),
    ) -> Iterator[Recovery]:
        """Return the recovery with one random draw after another in place of the best guess.

        A record's draws do not depend on its neighbours: where they would, it is drawn alone.

        Args:
            batch: B records.
            recovery: What `recover` returned for them.
            number: How many draws; of an imputer that cannot draw there are none.
            seed: Of the draws.
            unseen: Scans whose voxels nobody will look at; they stay the best guess where the
                imputer describes them otherwise.
        """
        if not self.probabilistic:
            return
        wanted = [
            n
            for n, want in zip(
                batch.observed.names, recovery.candidates.any(0).tolist(), strict=True
            )
            if want
        ]
        skipped = {n for n in unseen if n in recovery.descriptors}
        was_training = self.training
        self.eval()
        try:
            for i in range(number if wanted else 0):
                found = [
                    self._drawn(part, wanted, skipped, seed * 100_003 + i)
                    for part in (
                        (batch,)
                        if self.closed_form
                        else (batch.rows(torch.tensor([b])) for b in range(len(batch)))
                    )
                ]
                values, told = (
                    {n: torch.cat([part[side][n] for part in found]) for n in found[0][side]}
                    for side in (0, 1)
                )
                yield replace(
                    recovery,
                    values={**recovery.values, **values},
                    descriptors={**recovery.descriptors, **told},
                    latents=None,
                )
        finally:
            self.train(was_training)

    def _drawn(
        self, batch: Batch, wanted: Sequence[str], skipped: Collection[str], seed: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return one draw: values, and descriptors of scans."""
        shown = [n for n in wanted if n not in skipped]
        values = self._merge(batch, shown, torch.Generator().manual_seed(seed))
        told = self.describe(batch, wanted, torch.Generator().manual_seed(seed))
        return {n: values[n] for n in shown}, told

    def _to_complete(self, batch: Batch) -> Tensor:
        """Return bool `(B, M)`: an observed table with a blank cell that can be recovered.

        That is one of a column that some training record had.
        """
        result = torch.zeros_like(batch.observed.available)
        for m, spec in enumerate(self.specs):
            if spec.name in batch.observed_fields:
                known = torch.tensor([c.known for c in spec.columns], device=result.device)
                blank = ~batch.observed_fields[spec.name] & known
                result[:, m] = batch.observed.available[:, m] & blank.any(dim=1)
        return result

    def _merge(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Return the batch's values with proposals only where something is missing."""
        values = dict(batch.values)
        proposals = self.propose(batch, wanted, generator) if wanted else {}
        for m, name in enumerate(batch.observed.names):
            if name not in proposals:
                continue
            for i, column in enumerate(self.specs[m].columns):
                if not column.known:  # whatever was proposed, drawn or not, is made up
                    proposals[name] = proposals[name].clone()
                    proposals[name][:, i] = column.neutral
            keep = batch.observed.available[:, m]
            keep = keep.view(-1, *(1,) * (values[name].ndim - 1))
            if name in batch.observed_fields:
                keep = keep & batch.observed_fields[name]
            values[name] = torch.where(keep, values[name], proposals[name].to(values[name].dtype))
        return values


class LikelihoodImputer(Imputer):
    """An imputer that has a likelihood, as the modality's kind defines it, of what it proposes.

    Attributes:
        modalities: The kind of each modality, by name.
    """

    modalities: Mapping[str, Modality]

    @abstractmethod
    def likelihoods(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Return likelihood parameters `(B, P)` or `(B, *shape)` of the modalities in `wanted`.

        Args:
            batch: B records; values where nothing was observed must not be looked at.
            wanted: Modalities.
            generator: CPU generator of whatever a draw varies before the likelihood (a latent);
                None = the deterministic best guess.
        """

    def propose(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """See `Imputer.propose`: the likelihood's mean, or one draw from it."""
        found = self.likelihoods(batch, wanted, generator)
        if generator is None:
            return {name: self.modalities[name].mean(p) for name, p in found.items()}
        return {name: self.modalities[name].draw(p, generator) for name, p in found.items()}

    def table_likelihood(self, batch: Batch, wanted: Sequence[str]) -> dict[str, Tensor]:
        """See `Imputer.table_likelihood`."""
        return self.likelihoods(batch, wanted, None)


@torch.no_grad()
def start_from_mean_images(
    specs: Sequence[ModalitySpec], decoders: nn.ModuleDict, batch: Batch
) -> None:
    """Start image decoders from the mean image of the training records.

    Args:
        specs: Modalities in canonical order.
        decoders: Decoder of each modality, by name.
        batch: Training records.
    """
    for m, spec in enumerate(specs):
        decoder = decoders[spec.name]
        rows = batch.observed.available[:, m]
        if isinstance(decoder, ConvDecoder | PatchDecoder) and int(rows.sum()) >= _MOST_PRIVATE:
            decoder.mean_image.copy_(batch.values[spec.name][rows].mean(0))


def require_recovery(imputer: Imputer, name: str) -> None:
    """Refuse an imputer that declares that it can recover nothing a patient of these kinds lacks.

    Asked is the best case: each modality on its own from all the others, and the blank cells of
    each table of several columns from everything. A cohort in which nothing of the kind can be
    asked (a single scan) suits any imputer.

    Args:
        imputer: On the CPU, after `start_from`.
        name: Its name in the table.

    Raises:
        ConfigError: If it can recover none of the modalities.

    Example:
        >>> from dymo_med.imputers import IMPUTERS
        >>> scans = [ModalitySpec(n, "image", f"{n}.png", (1, 8, 8)) for n in ("front", "side")]
        >>> entry = IMPUTERS["iterative"]
        >>> require_recovery(entry(scans, entry.Options()), "iterative")
        Traceback (most recent call last):
        dymo_med.errors.ConfigError: Imputer iterative: it can recover none of front, side. ...
    """
    specs = imputer.specs
    everything = torch.ones(1, len(specs), dtype=torch.bool)
    others = ~torch.eye(len(specs), dtype=torch.bool)
    several_columns = torch.tensor([len(spec.columns) > 1 for spec in specs])
    if len(specs) == 1 and not bool(several_columns.any()):
        return
    absent = imputer.recoverable(others).diagonal()
    blank = imputer.recoverable(everything)[0] & several_columns
    if not bool((absent | blank).any()):
        raise ConfigError(
            Problem(
                f"Imputer {name}",
                f"it can recover none of {', '.join(spec.name for spec in specs)}",
                expected="a modality of a kind that it knows",
                remedy="Choose an imputer in the recipe that recovers modalities of these kinds",
            )
        )


def unfitted(imputer: Imputer) -> RuntimeError:
    """Return what to raise where an imputer is asked before `start_from`."""
    return RuntimeError(
        f"{type(imputer).__name__} knows no training records yet. Call start_from with them, or"
        " load a fitted state."
    )
