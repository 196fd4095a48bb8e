"""Table cells from other table cells by chained regressions, as scikit-learn fits them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from torch.nn import functional as F

from dymo_med.config import Strict
from dymo_med.imputers.base import RAREST, LikelihoodImputer, unfitted
from dymo_med.modalities import modality
from dymo_med.types import Batch, ModalitySpec


class Iterative(LikelihoodImputer):
    """Each column is regressed on all the others, in rounds; tables only.

    The columns of all tables lie side by side as J features: a continuous cell in standardised
    units, a categorical cell as indicators of all its categories but the first. (With an
    indicator of every category, each would be one minus its siblings: a perfect regression that
    uses nothing else, so that blank cells never leave the frequencies they start from.)
    scikit-learn's `IterativeImputer` fits Bayesian ridge regressions to these features of the
    training records. What it learned is kept as arrays and replayed here, for all patients at
    once: blanks start at the feature's mean, then one feature after the other is predicted and
    kept within its range (0 to 1 for indicators). The proposed category is the one with the
    largest indicator among the column's own, the first one's being what the others leave.

    It recovers no image. It needs at least one filled cell, in whichever table: a patient without
    any table gets none from it, as there is nothing that it could condition on. Rows of other
    patients are never looked at after fitting; the published DyMo experiments fit on training and
    test records together, and impute categorical and continuous columns apart.

    Fitting costs O(R n J^2 min(n, J)) for R rounds over n records, applying it O(R J^2) a row.

    Args:
        specs: Modalities in canonical order, fitted.
        options: How long to iterate.

    References:
        Van Buuren, Groothuis-Oudshoorn: mice: Multivariate Imputation by Chained Equations in R,
        Journal of Statistical Software 45(3), 2011.
    """

    class Options(Strict):
        """How long to iterate.

        Attributes:
            rounds: At most this many rounds over all features.
            tolerance: Stop after a round whose largest change is below this share of the largest
                observed feature.
        """

        rounds: Annotated[int, Field(ge=1)] = 10
        tolerance: Annotated[float, Field(ge=0)] = 1e-3

    probabilistic = False
    records: Tensor
    rounds: Tensor
    order: Tensor
    start: Tensor
    coefficients: Tensor
    intercepts: Tensor
    low: Tensor
    high: Tensor
    is_table: Tensor

    def __init__(self, specs: Sequence[ModalitySpec], options: BaseModel) -> None:
        super().__init__(specs, options)
        o = Iterative.Options.model_validate(options.model_dump())
        self.specs = tuple(specs)
        self.tolerance = o.tolerance
        self.tables = [spec for spec in self.specs if spec.columns]
        self.modalities = {spec.name: modality(spec) for spec in self.tables}
        limits: list[tuple[float, float]] = []
        for column in (column for spec in self.tables for column in spec.columns):
            if column.type == "categorical":
                limits += [(0.0, 1.0)] * (len(column.values) - 1)
            else:
                low, high = column.range or (-torch.inf, torch.inf)
                center, scale = column.mean or 0.0, column.std or 1.0
                limits.append(((low - center) / scale, (high - center) / scale))
        j = len(limits)
        bounds = torch.tensor(limits, dtype=torch.float64).view(j, 2)
        self.register_buffer("low", bounds[:, 0], persistent=False)
        self.register_buffer("high", bounds[:, 1], persistent=False)
        is_table = torch.tensor([bool(spec.columns) for spec in self.specs])
        self.register_buffer("is_table", is_table, persistent=False)
        # The fitted state, saved like weights; double precision, as scikit-learn computes in.
        self.register_buffer("records", torch.zeros((), dtype=torch.int64))
        self.register_buffer("rounds", torch.zeros((), dtype=torch.int64))
        self.register_buffer("order", torch.arange(j))
        self.register_buffer("start", torch.zeros(j, dtype=torch.float64))
        self.register_buffer("coefficients", torch.zeros(o.rounds, j, j, dtype=torch.float64))
        self.register_buffer("intercepts", torch.zeros(o.rounds, j, dtype=torch.float64))

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the features `(B, J)`, double precision, and bool `(B, J)`: what is known.

        Args:
            batch: B records.
        """
        parts, known = [], []
        for spec in self.tables:
            filled = batch.observed_fields[spec.name]
            # A blank cell may hold anything, also what is no category.
            values = batch.values[spec.name].double().where(filled, 0.0)
            for i, column in enumerate(spec.columns):
                if column.type == "categorical":
                    index = values[:, i].round().long()
                    part = F.one_hot(index, len(column.values))[:, 1:].double()
                else:
                    part = (values[:, i : i + 1] - (column.mean or 0.0)) / (column.std or 1.0)
                parts.append(part)
                known.append(filled[:, i : i + 1].expand_as(part))
        return torch.cat(parts, 1), torch.cat(known, 1)

    def start_from(self, batch: Batch) -> None:
        """Fit the regressions to training records; those without any filled cell are left out."""
        # Loaded here, as it takes a second that only training has.
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.experimental import enable_iterative_imputer  # noqa: F401
        from sklearn.impute import IterativeImputer

        if not self.tables:
            return
        x, known = self.features(batch)
        rows = known.any(1)
        rounds = len(self.coefficients)
        chain = IterativeImputer(
            max_iter=rounds,
            tol=self.tolerance,
            min_value=self.low.numpy(),
            max_value=self.high.numpy(),
            keep_empty_features=True,
        )
        with warnings.catch_warnings():
            # Stopping after the given number of rounds is what the recipe asks for.
            warnings.simplefilter("ignore", ConvergenceWarning)
            chain.fit(x.where(known, torch.nan)[rows].numpy())
        self.records.fill_(int(rows.sum()))
        self.rounds.fill_(chain.n_iter_)
        self.start.copy_(torch.from_numpy(chain.initial_imputer_.statistics_))
        features = len(self.start)
        for step, (target, others, regression) in enumerate(chain.imputation_sequence_):
            turn = step // features
            self.order[step % features] = int(target)
            self.coefficients[turn, target, others] = torch.from_numpy(regression.coef_)
            self.intercepts[turn, target] = float(regression.intercept_)

    def recoverable(self, observed: Tensor) -> Tensor:
        """Return bool `(B, M)`: all tables, where at least one table is observed."""
        return self.is_table & (observed & self.is_table).any(1, keepdim=True)

    def likelihoods(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """See `LikelihoodImputer.likelihoods`.

        A number's spread is not estimated; it counts as that of the training patients.

        Raises:
            RuntimeError: Before `start_from`.
        """
        if not self.records:
            raise unfitted(self)
        x, known = self.features(batch)
        x = x.where(known, self.start)
        order = self.order.tolist()
        for turn in range(int(self.rounds)):
            for j in order:
                predicted = x @ self.coefficients[turn, j] + self.intercepts[turn, j]
                predicted = predicted.clamp(self.low[j], self.high[j])
                x[:, j] = x[:, j].where(known[:, j], predicted)
        found, at = {}, 0
        for spec in self.tables:
            parts = []
            for column in spec.columns:
                size = max(1, len(column.values) - 1)
                cell = x[:, at : at + size]
                if column.type == "categorical":
                    # Linear regressions on indicators can leave 0..1.
                    share = torch.cat([1 - cell.sum(1, keepdim=True), cell], 1)
                    parts.append(share.clamp_min(RAREST).log())
                else:
                    parts += [cell, torch.zeros_like(cell)]
                at += size
            if spec.name in wanted:
                found[spec.name] = torch.cat(parts, 1)
        return found
