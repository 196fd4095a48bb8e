"""The floor that every imputer has to beat: the same average patient for everybody."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel
from torch import Tensor

from dymo_med.config import Strict
from dymo_med.imputers.base import RAREST, Imputer, unfitted
from dymo_med.modalities import modality
from dymo_med.types import Batch, ModalitySpec

# The mean image of fewer patients than this would show single patients to whoever has the bundle.
_MOST_PRIVATE = 10


class Template(Imputer):
    """Proposes the training records' average, whatever was observed.

    An image is their mean image; a table's continuous cells are column means and its categorical
    ones the most frequent category. It is there to be compared with: an imputer that a downstream
    model does not prefer to this one has recovered nothing about the patient.

    Images that fewer than ten training patients have are not recoverable, because their mean
    image would give single patients away.

    Args:
        specs: Modalities in canonical order.
        options: None.
    """

    class Options(Strict):
        """No options."""

    probabilistic = False
    records: Tensor
    known: Tensor

    def __init__(self, specs: Sequence[ModalitySpec], options: BaseModel) -> None:
        super().__init__(specs, options)
        Template.Options.model_validate(options.model_dump())
        self.specs = tuple(specs)
        # Buffers are the fitted state, saved like weights.
        self.register_buffer("records", torch.zeros((), dtype=torch.int64))
        self.register_buffer("known", torch.zeros(len(self.specs), dtype=torch.bool))
        for spec in self.specs:
            self.register_buffer(f"average_{spec.name}", torch.zeros(spec.shape))

    def start_from(self, batch: Batch) -> None:
        """Average the training records."""
        self.records.fill_(len(batch))
        for m, spec in enumerate(self.specs):
            rows = batch.observed.available[:, m]
            values = batch.values[spec.name][rows]
            average = self.get_buffer(f"average_{spec.name}")
            if spec.columns:
                columns = modality(spec).fit(values, batch.observed_fields[spec.name][rows]).columns
                frequencies = [torch.tensor(column.frequencies) for column in columns]
                typical = [
                    f.argmax() if len(f) else column.mean
                    for f, column in zip(frequencies, columns, strict=True)
                ]
                average.copy_(torch.tensor(typical))
                self.known[m] = True
                continue
            patients = {p for p, has in zip(batch.patient_ids, rows.tolist(), strict=True) if has}
            self.known[m] = len(patients) >= _MOST_PRIVATE
            if self.known[m]:
                average.copy_(values.mean(0))

    def recoverable(self, observed: Tensor) -> Tensor:
        """Return bool `(B, M)`: everything that has an average, from anything.

        Raises:
            RuntimeError: Before `start_from`.
        """
        if not self.records:
            raise unfitted(self)
        return super().recoverable(observed) & self.known

    def propose(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """See `Imputer.propose`."""
        averages = {name: self.get_buffer(f"average_{name}") for name in wanted}
        return {
            name: average.expand(len(batch), *average.shape) for name, average in averages.items()
        }

    def table_likelihood(self, batch: Batch, wanted: Sequence[str]) -> dict[str, Tensor]:
        """See `Imputer.table_likelihood`: categories are as likely as among training patients."""
        found = {}
        for spec in self.specs:
            if spec.name not in wanted or not spec.columns:
                continue
            parts = []
            for column in spec.columns:
                if column.type == "categorical":
                    even = (1 / len(column.values),) * len(column.values)
                    shares = torch.tensor(column.frequencies or even)
                    parts.append(shares.clamp_min(RAREST).log())
                else:
                    parts.append(torch.zeros(2))  # mean and log spread in standardised units
            row = torch.cat(parts).to(batch.observed.available.device)
            found[spec.name] = row.expand(len(batch), -1)
        return found
