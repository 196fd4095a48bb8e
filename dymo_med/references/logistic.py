"""Logistic (for a number, ridge) regression with multiple imputation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor
from torch.nn import functional as F

from dymo_med import gaussian
from dymo_med.references.base import Reference, Training, quantiles

_DRAWS = 10
# Of one scan or sequence at most; and not more than one to so many records that have it.
_COMPONENTS, _RECORDS_PER_COMPONENT = 8, 10
_STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_FARTHEST = 5.0  # standard deviations: further off counts as this
_SKEWED = 1.5  # numbers above 0 that are more skewed enter by their logarithm
_ENOUGH_ROWS = 20_000
_CHUNK_NUMBERS = 8_000_000
_VECTORS = ("center", "scale", "logarithm", "mean", "source")


class Logistic(Reference):
    """Regression on standardised cells and whitened principal components of measurements.

    What is missing is drawn from the joint normal distribution of all inputs, which is fitted on
    all training records, labelled or not; a category enters it as one number per category. The
    coefficients are fitted on 10 completed copies of the training records; an answer is the mean
    over 10 draws. As the score is linear in the inputs, its distribution given what was observed
    is normal as well, and draws are taken from that: the same distribution at a fraction of the
    work. The strength of the ridge penalty is chosen by cross-validation over training patients.

    References:
        Rubin, Multiple Imputation for Nonresponse in Surveys, 1987; Sperrin et al., Missing data
        should be handled differently for prediction than for description or causal explanation,
        J. Clin. Epidemiol. 125, 2020.
    """

    name = "logistic"

    def fit(self, data: Training, others: Mapping[str, Reference]) -> dict[str, Any]:
        """See `Reference.fit`."""
        self._arrays: dict[str, Tensor] = {}
        self._scale(data.everybody)
        whole = self._inputs(data.everybody)
        mean, covariance = gaussian.fit(whole)
        self._arrays |= {"mean": mean, "covariance": covariance}
        completed = self._completed(self._inputs(data.features), data.seed)  # (m, n, d)
        chosen, losses = 0.1, []
        folds = data.folds()
        if folds:
            errors = [self._errors(data, completed, folds, c) for c in _STRENGTHS]
            losses = [float((e * data.weights).sum() / data.weights.sum()) for e in errors]
            chosen = _STRENGTHS[int(np.argmin(losses))]
        coefficients, intercept = self._regression(
            data, completed, torch.arange(len(data.labels)), chosen
        )
        self._arrays |= {"coefficients": coefficients, "intercept": intercept}
        if data.values is not None:
            spread = float(data.values.std(correction=0)) if not losses else min(losses) ** 0.5
            self._arrays["deviation"] = torch.tensor([spread], dtype=torch.float64)
        return {"C": chosen, "inputs": len(mean), "cross_validation": losses}

    def probabilities(self, features: Tensor) -> Tensor:
        """See `Reference.probabilities`."""
        inputs = self._inputs(features.double())
        known, owner = (~inputs.isnan()).unique(dim=0, return_inverse=True)
        a = self._arrays
        weights, left = gaussian.projected(a["covariance"], known, a["coefficients"])
        roots = _root(left)
        gap = (inputs - a["mean"]).nan_to_num(0.0)
        mean = a["intercept"] + a["mean"] @ a["coefficients"]
        mean = mean + (gap[:, :, None] * weights[owner]).sum(1)  # (R, S)
        if self.scale is not None:
            own = roots[owner, 0, 0].square() + a["deviation"].square()
            return self.spread(mean[:, 0], own.sqrt())
        drawn = mean[:, None] + torch.einsum("rst,mt->rms", roots[owner], a["draws"])
        if drawn.shape[-1] == 1:
            drawn = torch.cat([torch.zeros_like(drawn), drawn], dim=-1)
        return torch.softmax(drawn, dim=-1).mean(1)

    def state(self) -> dict[str, Tensor]:
        """See `Reference.state`."""
        return dict(self._arrays)

    def load_state(self, state: Mapping[str, Tensor], others: Mapping[str, Reference]) -> None:
        """See `Reference.load_state`."""
        width, d = len(self._owners()), len(state["mean"])
        scores = 1 if self.scale is not None or self.classes == 2 else self.classes
        forms = {
            "center": (torch.float64, (width,)),
            "scale": (torch.float64, (width,)),
            "logarithm": (torch.bool, (width,)),
            "projection": (torch.float64, (width, d)),
            "source": (torch.int64, (d,)),
            "mean": (torch.float64, (d,)),
            "covariance": (torch.float64, (d, d)),
            "draws": (torch.float64, (_DRAWS, scores)),
            "coefficients": (torch.float64, (d, scores)),
            "intercept": (torch.float64, (scores,)),
            **({"deviation": (torch.float64, (1,))} if self.scale else {}),
        }
        wrong = [
            name
            for name in sorted({*forms, *state})
            if name not in forms
            or (state[name].dtype, tuple(state[name].shape)) != forms[name]
            or not bool(state[name].isfinite().all())
        ]
        if not wrong and not (
            bool(((state["source"] >= 0) & (state["source"] < width)).all())
            and bool((state["scale"] > 0).all())
        ):
            wrong = ["source", "scale"]
        if wrong:
            raise ValueError(f"logistic: {', '.join(wrong)} cannot be right")
        self._arrays = dict(state)

    def _owners(self) -> list[tuple[int, int]]:
        """Return of each standardised number the feature behind it and its category, else -1."""
        return [
            (i, k)
            for i, n in enumerate(self.layout.categories)
            for k in (range(n) if n > 1 else (-1,))
        ]

    def _numbers(self, features: Tensor) -> Tensor:
        """Return `(R, U)`: numbers as they are, a 0 or 1 per category, NaN where nothing is."""
        owners = self._owners()
        index = torch.tensor([i for i, _ in owners], dtype=torch.int64)
        category = torch.tensor([k for _, k in owners], dtype=torch.int64)
        found = features[:, index]
        return torch.where(
            (category < 0) | found.isnan(), found, (found == category).to(found.dtype)
        )

    def _standard(self, features: Tensor) -> Tensor:
        """Return `(R, U)` standardised numbers, NaN where nothing is."""
        a = self._arrays
        numbers = self._numbers(features)
        numbers = torch.where(a["logarithm"], numbers.clamp_min(1e-9).log(), numbers)
        return ((numbers - a["center"]) / a["scale"]).clamp(-_FARTHEST, _FARTHEST)

    def _scale(self, everybody: Tensor) -> None:
        """Fit how features become inputs: constants of standardising, and components."""
        numbers = self._numbers(everybody).numpy()
        width = numbers.shape[1]
        center, scale = np.zeros(width), np.ones(width)
        logarithm = np.zeros(width, dtype=bool)
        for u, (_, category) in enumerate(self._owners()):
            seen = numbers[:, u][~np.isnan(numbers[:, u])]
            if not len(seen):
                continue
            if category < 0 and seen.min() > 0 and _skew(seen) > _SKEWED:
                logarithm[u], seen = True, np.log(seen.clip(1e-9))
            center[u] = seen.mean()
            deviation = seen.std()
            # A number that never varied says nothing, whatever it is.
            scale[u] = deviation if deviation > 1e-9 * max(1.0, abs(center[u])) else np.inf
        self._arrays = {
            "center": torch.from_numpy(center),
            "scale": torch.from_numpy(np.where(np.isinf(scale), 1e12, scale)),
            "logarithm": torch.from_numpy(logarithm),
        }
        standard = self._standard(everybody)
        columns: list[Tensor] = []
        source: list[int] = []
        blocks: dict[int, list[int]] = {}
        for u, (i, _) in enumerate(self._owners()):
            if self.layout.measured[i]:
                blocks.setdefault(self.layout.owner[i], []).append(u)
            else:
                columns.append(F.one_hot(torch.tensor(u), width).double())
                source.append(u)
        for block in blocks.values():
            seen = standard[:, block]
            seen = seen[~seen.isnan().all(1)].nan_to_num(0.0)
            if len(seen) < 2:
                continue
            most = min(_COMPONENTS, len(seen) // _RECORDS_PER_COMPONENT or 1, len(block))
            _, singular, axes = torch.linalg.svd(seen - seen.mean(0), full_matrices=False)
            spread = singular / (len(seen) - 1) ** 0.5
            for c in range(min(most, int((spread > 1e-3).sum()))):
                column = torch.zeros(width, dtype=torch.float64)
                column[block] = axes[c] / spread[c]
                columns.append(column)
                source.append(block[0])
        self._arrays["projection"] = (
            torch.stack(columns, dim=1) if columns else torch.zeros(width, 0, dtype=torch.float64)
        )
        self._arrays["source"] = torch.tensor(source, dtype=torch.int64)

    def _inputs(self, features: Tensor) -> Tensor:
        """Return `(R, d)` inputs of the regression, NaN where nothing is."""
        a = self._arrays
        standard = self._standard(features)
        found = standard.nan_to_num(0.0) @ a["projection"]
        return found.masked_fill(standard.isnan()[:, a["source"]], torch.nan)

    def _completed(self, inputs: Tensor, seed: int) -> Tensor:
        """Return `(m, n, d)`: copies of the inputs with draws where nothing is."""
        a = self._arrays
        generator = torch.Generator().manual_seed(seed)
        scores = 1 if self.scale is not None or self.classes == 2 else self.classes
        if scores == 1:  # evenly spread: the mean over so few draws is better for it
            a["draws"] = quantiles(_DRAWS)[:, None]
        else:  # each with its opposite, for the same reason
            half = torch.randn(_DRAWS // 2, scores, generator=generator, dtype=torch.float64)
            a["draws"] = torch.cat([half, -half])
        copies = max(1, min(_DRAWS, _ENOUGH_ROWS // max(1, len(inputs))))
        d = max(inputs.shape[1], 1)
        known, owner = (~inputs.isnan()).unique(dim=0, return_inverse=True)
        gap = (inputs - a["mean"]).nan_to_num(0.0)
        found = inputs.expand(copies, -1, -1).clone()
        noise = torch.randn(found.shape, generator=generator, dtype=torch.float64)
        for part in torch.arange(len(known)).split(max(1, _CHUNK_NUMBERS // d**2)):
            weights, left = gaussian.conditional(a["covariance"], known[part])
            roots = _root(left)
            for g, pattern in enumerate(part.tolist()):
                at = (owner == pattern).nonzero().squeeze(1)
                drawn = a["mean"] + gap[at] @ weights[g] + noise[:, at] @ roots[g].T
                found[:, at] = torch.where(known[pattern], found[:, at], drawn)
        return found

    def _regression(
        self, data: Training, completed: Tensor, rows: Tensor, strength: float
    ) -> tuple[Tensor, Tensor]:
        """Return coefficients `(d, S)` and intercepts `(S,)` from all copies of some records."""
        copies = len(completed)
        given = completed[:, rows].flatten(0, 1).numpy()
        weights = (data.weights[rows] / copies).repeat(copies).numpy()
        scores = 1 if self.scale is not None or self.classes == 2 else self.classes
        coefficients = np.zeros((given.shape[1], scores))
        if data.values is not None:
            values = data.values[rows].repeat(copies).numpy()
            intercept = np.array([np.average(values, weights=weights)])
            if given.shape[1]:
                ridge = Ridge(alpha=1 / strength).fit(given, values, sample_weight=weights)
                coefficients[:, 0], intercept[0] = ridge.coef_, ridge.intercept_
            return torch.from_numpy(coefficients), torch.from_numpy(intercept)
        labels = data.labels[rows].repeat(copies).numpy()
        shares = np.bincount(labels, weights=weights, minlength=self.classes)
        base = np.log(np.clip(shares / shares.sum(), 1e-6, None))
        intercept = base[1:] - base[:1] if scores == 1 else base
        met = np.unique(labels)
        if given.shape[1] and len(met) > 1:
            model = LogisticRegression(C=strength, max_iter=1000, tol=1e-6)
            model.fit(given, labels, sample_weight=weights)
            if scores == 1:
                coefficients[:, 0], intercept = model.coef_[0], model.intercept_
            elif len(met) == 2:  # a fold of two classes of more
                coefficients[:, met[1]], intercept[met[1]] = model.coef_[0], model.intercept_[0]
                intercept[met[0]] = 0.0
            else:
                coefficients[:, met] = model.coef_.T
                intercept[met] = model.intercept_
        return torch.from_numpy(coefficients), torch.from_numpy(np.asarray(intercept, float))

    def _errors(
        self,
        data: Training,
        completed: Tensor,
        folds: list[tuple[Tensor, Tensor]],
        strength: float,
    ) -> Tensor:
        """Return each record's log-loss, or squared error, by fits that never saw its patient."""
        errors = torch.zeros(len(data.labels), dtype=torch.float64)
        for outside, inside in folds:
            coefficients, intercept = self._regression(data, completed, outside, strength)
            scores = completed[:, inside] @ coefficients + intercept  # (m, n, S)
            if data.values is not None:
                errors[inside] = (scores[..., 0].mean(0) - data.values[inside]).square()
                continue
            if scores.shape[-1] == 1:
                scores = torch.cat([torch.zeros_like(scores), scores], dim=-1)
            found = torch.softmax(scores, dim=-1).mean(0).clamp_min(1e-6).log()
            errors[inside] = F.nll_loss(found, data.labels[inside], reduction="none")
        return errors


def _root(covariance: Tensor) -> Tensor:
    """Return a square root of covariances `(G, d, d)` that may be singular."""
    values, vectors = torch.linalg.eigh((covariance + covariance.transpose(-1, -2)) / 2)
    root: Tensor = vectors * values.clamp_min(0).sqrt()[..., None, :]
    return root


def _skew(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Return the third standardised moment, 0 of what does not vary."""
    deviation = values.std()
    if not deviation > 0:
        return 0.0
    return float((((values - values.mean()) / deviation) ** 3).mean())
