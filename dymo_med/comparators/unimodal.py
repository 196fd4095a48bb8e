"""The best single modality that a patient has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dymo_med.comparators.base import Comparator, narrowed
from dymo_med.comparators.embedding import Embedding, Sizes
from dymo_med.tasks import PLAIN, OverClasses
from dymo_med.types import Batch, ModalitySpec

# Records that are answered at once while modalities are ranked.
_CHUNK = 64


class SingleModality(Comparator):
    """One network for one modality: its encoder, a class token, a linear head.

    Its batches hold only records that have the modality.

    Args:
        specs: The one modality, fitted.
        classes: Number of classes K.
        options: Sizes.
    """

    Options = Sizes

    def __init__(self, specs: Sequence[ModalitySpec], classes: int, options: BaseModel) -> None:
        super().__init__(specs, classes, options)
        (spec,) = self.specs = tuple(specs)
        self.embedding = Embedding(spec, options)
        self.head = nn.Linear(self.embedding.class_token.numel(), classes)

    def forward(self, batch: Batch) -> Tensor:
        """See `Comparator.forward`."""
        logits: Tensor = self.head(self.embedding(batch))
        return logits


class Unimodal(Comparator):
    """Answers with the best single modality that a patient has, whatever else there is.

    One network per modality, each trained for itself on the records that have the modality, each
    to its own best epoch. Afterwards modalities are ranked by the log-loss of their network among
    the validation records that have them, and a patient's answer is that of the network of the
    first in rank of what is observed.

    Of a regression the mean absolute error takes the place of the log-loss.

    Equal log-losses rank in the cohort's order of modalities. A modality that no labelled
    validation record has ranks behind all that were measured, in the cohort's order too. So does
    every modality before `finish`.

    Log-losses of modalities are not of the same records where modalities are missing, so the rank
    is that of the cohort as it is: a modality that is ordered for hard cases looks worse.

    Args:
        specs: Modalities in canonical order, fitted.
        classes: Number of classes K.
        options: Sizes, the same for every modality.
    """

    Options = Sizes
    log_loss: Tensor

    def __init__(self, specs: Sequence[ModalitySpec], classes: int, options: BaseModel) -> None:
        super().__init__(specs, classes, options)
        self.specs = tuple(specs)
        self.classes = classes
        self.networks = nn.ModuleDict(
            {spec.name: SingleModality([spec], classes, options) for spec in specs}
        )
        unknown = torch.full((len(self.specs),), torch.inf, dtype=torch.float64)
        self.register_buffer("log_loss", unknown)

    def parts(self) -> Mapping[str, Comparator]:
        """See `Comparator.parts`: one per modality."""
        return {name: cast(Comparator, network) for name, network in self.networks.items()}

    def ranking(self) -> tuple[str, ...]:
        """Return the names of the modalities, the best first."""
        return tuple(self.specs[m].name for m in self._order().tolist())

    def _order(self) -> Tensor:
        return self.log_loss.argsort(stable=True)

    @torch.no_grad()
    def finish(self, batch: Batch, weights: Tensor, task: OverClasses = PLAIN) -> None:
        """See `Comparator.finish`: ranks modalities by validation log-loss, or absolute error."""
        where = self.log_loss.device
        for m, network in enumerate(self.parts().values()):
            found, rows = narrowed(batch, network.specs)
            known = found.known.nonzero().squeeze(1)
            if not len(known):
                self.log_loss[m] = torch.inf
                continue
            losses = []
            for chunk in known.split(_CHUNK):
                part = found.rows(chunk)
                logits = network(part.to(where)).double().cpu()
                losses.append(task.judged(logits, part.labels, part.shares))
            w = weights[rows[known]].double()
            self.log_loss[m] = float((torch.cat(losses) * w).sum() / w.sum())

    def forward(self, batch: Batch) -> Tensor:
        """See `Comparator.forward`."""
        return self.under(batch, batch.observed.available[None])[0]

    def under(self, batch: Batch, used: Tensor) -> Tensor:
        """See `Comparator.under`: each modality is asked once.

        Raises:
            ValueError: If nothing is left of a record.
        """
        if not bool(used.any(-1).all()):
            raise ValueError("A record without any modality has no best one.")
        order = self._order()
        weight = next(self.parameters())
        answers = weight.new_zeros(len(batch), len(self.specs), self.classes)
        for m, network in enumerate(self.parts().values()):
            part, rows = narrowed(batch, network.specs)
            if len(rows):
                answers[rows, m] = network(part)
        first = used[..., order].to(torch.uint8).argmax(-1)  # place of the best in the ranking
        chosen = order[first]  # (S, B)
        return answers[torch.arange(len(batch), device=chosen.device), chosen]
