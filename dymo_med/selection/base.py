"""What every selector offers, and what selectors are fitted on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel
from torch import Tensor

from dymo_med.config import Strict
from dymo_med.selection.reward import Distance, SimilarityCalibration
from dymo_med.types import Fuse, FusionOutput, ModalityMask, SelectionTrace, SubsetStatistics

ModelT = TypeVar("ModelT")


@dataclass(frozen=True)
class Part:
    """A `Fuse` over some of another's patients.

    Attributes:
        whole: Over B patients.
        index: Int64 `(R,)`: which of them.
    """

    whole: Fuse
    index: Tensor

    def __call__(self, rows: Tensor, used: Tensor, admitted: Tensor) -> FusionOutput:
        """See `dymo_med.types.Fuse`."""
        return self.whole(self.index[rows], used, admitted)


@dataclass(frozen=True)
class WithDraws:
    """A `Fuse` of best guesses that knows draws of them as well.

    Attributes:
        single: Of the best guesses; what is asked without further ado.
        drawn: The mean over draws.
    """

    single: Fuse
    drawn: Fuse

    def __call__(self, rows: Tensor, used: Tensor, admitted: Tensor) -> FusionOutput:
        """See `dymo_med.types.Fuse`."""
        return self.single(rows, used, admitted)


@dataclass(frozen=True)
class Cases:
    """Held-back patients whose answer is known, with what was hidden from them recovered.

    Attributes:
        fuse: Over B cases; a patient may be several cases, with other modalities hidden.
        observed: What each case has.
        candidates: Bool `(B, M)`: what was recovered or completed.
        labels: Int64 `(B,)`.
        weights: Float `(B,)`; the cases of a patient add up to 1.
        temperature: Probabilities are softmax(logits / temperature).
        shares: Where labels do not say all, as in `Batch`: `(B, K)`.
        followed: Of survival, as in `Batch`: `(B, 3)`; None = all classes are known.
        patients: Whose case each is; none given = everybody is another patient.
    """

    fuse: Fuse
    observed: ModalityMask
    candidates: Tensor
    labels: Tensor
    weights: Tensor
    temperature: float
    shares: Tensor | None = None
    followed: Tensor | None = None
    patients: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return B."""
        return len(self.labels)

    def rows(self, index: Tensor) -> Cases:
        """Return the cases at integer positions `index` `(R,)`."""
        whole = self.fuse
        part: Fuse = Part(whole, index)
        if isinstance(whole, WithDraws):
            part = WithDraws(Part(whole.single, index), Part(whole.drawn, index))
        return replace(
            self,
            fuse=part,
            observed=replace(self.observed, available=self.observed.available[index]),
            candidates=self.candidates[index],
            labels=self.labels[index],
            weights=self.weights[index],
            shares=None if self.shares is None else self.shares[index],
            followed=None if self.followed is None else self.followed[index],
            patients=tuple(self.patients[i] for i in index.tolist()) if self.patients else (),
        )

    def of_known_class(self) -> Cases:
        """Return the cases whose class is known, weighted so that they stand for the others too."""
        if self.followed is None:
            return self
        part = self.rows((self.labels >= 0).nonzero().squeeze(1))
        assert part.followed is not None
        weights = part.weights * part.followed[:, 2].to(part.weights)
        # As many patients as before, however many of them are censored.
        weights = weights * (self.weights.sum() / weights.sum().clamp_min(1e-12))
        return replace(part, weights=weights, followed=None)


DecidesBy = Literal["rule", "draws", "guard", "reward", "trust", "weights"]
Admits = Literal["nothing", "everything", "one", "all"]


class NoOptions(Strict):
    """A selector without options."""


class Selector(ABC):
    """Decides from observed and recovered modalities; sees no label and changes no argument.

    Args:
        options: Its part of a recipe.

    Attributes:
        needs_fit: Whether `fit` or `load_state` must come before `select`.
        integrates: Whether it asks for draws of recoveries (`draws.over_draws`).
        decides_by: `rule` (looks at nothing), `draws` (likewise, and averages over draws), `guard`
            (all or none, by what was proven), `reward`, `trust`, or `weights` (an average).
        admits: `nothing` or `everything`, whatever it sees; `one` candidate per step, or `all` of
            those that it admits at once.
    """

    Options: ClassVar[type[BaseModel]] = NoOptions
    name: ClassVar[str]
    needs_fit: ClassVar[bool] = False
    integrates: ClassVar[bool] = False
    decides_by: ClassVar[DecidesBy]
    admits: ClassVar[Admits]

    def __init__(self, options: BaseModel | None = None) -> None:
        self.options: Any = self.Options.model_validate(options.model_dump() if options else {})

    @abstractmethod
    def select(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, statistics: SubsetStatistics
    ) -> SelectionTrace:
        """Select.

        Args:
            fuse: Over the same B patients.
            observed: What was measured; every patient has something.
            candidates: Bool `(B, M)`: recovered modalities, and observed tables whose blanks were
                filled.
            statistics: Of the backbone behind `fuse`.

        Returns:
            The decision and every number behind it.

        Raises:
            ValueError: If a patient has nothing observed (there is nothing to judge by), or the
                selector needs a fit and has none.
        """

    def admits_in(self, trace: SelectionTrace, row: int) -> Admits:
        """Return how it admits, for one patient of a trace of its own."""
        return self.admits

    def similarity_calibration(self, distance: Distance) -> SimilarityCalibration | None:
        """Return the similarity calibration behind its rewards; None where it has none."""
        return None

    def promise(self, trace: SelectionTrace, row: int) -> str:
        """Return what was proven for patients like one of a trace; empty where nothing is."""
        return ""

    def fit(self, cases: Cases, statistics: SubsetStatistics) -> None:  # noqa: B027
        """Fit whatever is fitted; nothing by default.

        Args:
            cases: Of patients whom neither networks nor prediction sets were fitted on.
            statistics: Of the backbone behind them.
        """

    def state(self) -> dict[str, Any]:
        """Return what was fitted, ready for JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take up what `state` returned.

        Raises:
            KeyError: If something is absent from it.
            ValueError: If it is from a version that fitted something else.
        """


class Fitted(Selector, Generic[ModelT]):
    """A selector that knows nothing before it is fitted."""

    needs_fit = True

    def __init__(self, options: BaseModel | None = None) -> None:
        super().__init__(options)
        self._model: ModelT | None = None

    @property
    def model(self) -> ModelT:
        """What was fitted.

        Raises:
            ValueError: If nothing was.
        """
        if self._model is None:
            raise ValueError(f"{self.name} must be fitted first.")
        return self._model


def require_something(observed: ModalityMask) -> None:
    """Check that every patient has something to judge by.

    Raises:
        ValueError: If one has not.
    """
    if not bool(observed.available.any(1).all()):
        raise ValueError("Every patient needs at least one observed modality to select from.")
