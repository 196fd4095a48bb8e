"""Greedy selection by a small model fitted on held-back patients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dymo_med.selection.base import Cases, Fitted
from dymo_med.selection.evidence import FEATURES, Alone, Standardiser, ask_alone, features
from dymo_med.selection.greedy import Candidates, GreedySearch, RewardOptions, assess, attempt
from dymo_med.types import Fuse, ModalityMask, SelectionTrace, SubsetStatistics

# A single patient's log-loss may not weigh more than this when the gate is fitted.
_MOST_GAIN = 3.0
# Score that stands for certainty.
_CERTAIN = 10.0


class GateOptions(RewardOptions):
    """Settings of the gate.

    Attributes:
        strength: Inverse strength of the ridge penalty, as in scikit-learn's `C`.
    """

    strength: Annotated[float, Field(gt=0)] = 1.0


@dataclass(frozen=True)
class _Model:
    """A logistic regression.

    Attributes:
        scale: Of the features.
        weight: Float64 `(P,)`.
        bias: Added to the score.
        temperature: Of the probabilities among the features.
    """

    scale: Standardiser
    weight: Tensor
    bias: float
    temperature: float


@final
class Gate(Fitted[_Model], GreedySearch):
    """Admit the candidate with the best odds of gain against loss, while they are above even.

    A ridge-penalised logistic regression on what the trace knows of a candidate, what it says by
    itself and whether that agrees with the rest (`evidence.FEATURES`). Fitted on held-back patients
    to tell whether admitting it raises the probability of the true class; each example weighs as
    much as the log of that probability changes (at most 3), so the score is the share of expected
    gain in all expected change, and one half means that nothing is to be gained.

    Args:
        options: See `GateOptions`.
    """

    name = "gate"
    decides_by = "trust"
    Options = GateOptions

    def select(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, statistics: SubsetStatistics
    ) -> SelectionTrace:
        """See `Selector.select`."""
        _ = self.model
        # Nothing is rejected for good: a candidate may help once another is in.
        return self.walk(fuse, observed, candidates, statistics, threshold=0.5)[0]

    def prepare(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, logits: Tensor
    ) -> Alone:
        """Ask every candidate alone."""
        return ask_alone(fuse, observed, candidates, logits.shape[1], self.model.temperature)

    def trust(self, step: Candidates, aid: Any) -> Tensor | None:
        """Return the probability that the candidate helps."""
        model = self.model
        x = model.scale(features(step, aid))
        return torch.sigmoid(x @ model.weight.to(x.device) + model.bias)

    def fit(self, cases: Cases, statistics: SubsetStatistics) -> None:
        """See `Selector.fit`.

        Examples are all (state, open candidate) pairs along one path per case: the observed
        modalities, then candidates one after the other, in an order that rotates from case to
        case so that every candidate comes at every place.
        """
        from sklearn.linear_model import LogisticRegression

        examples = _examples(cases, statistics, self.options)
        if examples is None:  # nothing can be said of candidates nobody has seen: admit none
            size = len(FEATURES) + cases.candidates.shape[1]
            zero = torch.zeros(size, dtype=torch.float64)
            self._model = _Model(Standardiser(zero, zero + 1), zero, -_CERTAIN, cases.temperature)
            return
        x, gain, weight = examples
        scale = Standardiser.of(x, weight)
        helps = gain > 0
        importance = weight * gain.abs()
        if bool(helps.all()) or not bool(helps.any()) or float(importance.sum()) == 0:
            bias = _CERTAIN if bool(helps.all()) else -_CERTAIN
            zero = torch.zeros(x.shape[1], dtype=torch.float64)
            self._model = _Model(scale, zero, bias, cases.temperature)
            return
        # The penalty is measured against as many examples as there are patients.
        importance = importance / importance.sum() * float(cases.weights.sum())
        fitted = LogisticRegression(C=self.options.strength, max_iter=1000).fit(
            scale(x).numpy(), helps.numpy(), importance.numpy()
        )
        self._model = _Model(
            scale,
            torch.from_numpy(fitted.coef_[0].copy()).double(),
            float(fitted.intercept_[0]),
            cases.temperature,
        )

    def state(self) -> dict[str, Any]:
        """See `Selector.state`."""
        m = self.model
        return {
            "features": list(FEATURES),
            "mean": m.scale.mean.tolist(),
            "std": m.scale.std.tolist(),
            "weight": m.weight.tolist(),
            "bias": m.bias,
            "temperature": m.temperature,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Selector.load_state`."""
        if state["features"] != list(FEATURES):
            raise ValueError("gate was fitted to other features than this version's.")
        mean, std, weight = (
            torch.tensor(state[k], dtype=torch.float64) for k in ("mean", "std", "weight")
        )
        self._model = _Model(
            Standardiser(mean, std), weight, float(state["bias"]), float(state["temperature"])
        )


def _examples(
    cases: Cases, statistics: SubsetStatistics, options: RewardOptions
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return features `(R, P)`, gain of the true class's log-probability `(R,)`, weights `(R,)`.

    None if no case has a candidate.
    """
    b, m = cases.candidates.shape
    device = cases.candidates.device
    observed = cases.observed.available
    everyone = torch.arange(b, device=device)
    admitted = torch.zeros_like(observed)
    output = cases.fuse(everyone, observed, admitted)
    alone = ask_alone(
        cases.fuse, cases.observed, cases.candidates, output.logits.shape[1], cases.temperature
    )
    turn = (torch.arange(m, device=device)[None] + everyone[:, None]) % m  # (B, M), a rotation
    found, gains, owners = [], [], []
    while bool((open_ := cases.candidates & ~admitted).any()):
        rows, column = open_.nonzero(as_tuple=True)
        step, _ = attempt(
            cases.fuse,
            rows,
            column,
            admitted,
            observed,
            assess(output, observed | admitted, statistics, options.temperature),
            output.logits,
            statistics,
            options,
        )
        found.append(features(step, alone))
        before, after = (
            F.cross_entropy(z.double() / cases.temperature, cases.labels[rows], reduction="none")
            for z in (step.logits_before, step.logits_after)
        )
        gains.append((before - after).clamp(-_MOST_GAIN, _MOST_GAIN))
        owners.append(rows)
        first = torch.where(open_, turn, m).argmin(1)
        going = open_.any(1).nonzero().squeeze(1)
        admitted[going, first[going]] = True
        output = cases.fuse(everyone, observed | admitted, admitted)
    if not found:
        return None
    x, gain, owner = torch.cat(found), torch.cat(gains), torch.cat(owners)
    # A case's examples together weigh what the case does.
    weight = cases.weights.double()[owner] / torch.bincount(owner, minlength=b)[owner]
    return x.cpu(), gain.cpu(), weight.cpu()
