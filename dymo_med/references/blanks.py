"""What is missing as the only input: how far does the pattern of gaps tell the answer?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

from dymo_med.references.base import Reference, Training

# Gaps are few inputs; a weak penalty keeps a gap that only one class has from deciding alone.
_STRENGTH = 1.0


class BlanksOnly(Reference):
    """Logistic (for a number, ridge) regression on which modalities and cells are there.

    It looks at no value. Where it answers as well as a model does, that model may have learned who
    was examined, and not what was found. It therefore has no part in a bundle's answers.
    """

    name = "blanks_only"
    partner = False

    def fit(self, data: Training, others: Mapping[str, Reference]) -> dict[str, Any]:
        """See `Reference.fit`."""
        inputs, weights = self._inputs(data.features).numpy(), data.weights.numpy()
        width = 1 if data.values is not None else self.classes
        coefficients = torch.zeros(inputs.shape[1], width, dtype=torch.float64)
        intercept = torch.zeros(width, dtype=torch.float64)
        deviation = 1.0
        if data.values is not None:
            values = data.values.numpy()
            line = Ridge(_STRENGTH).fit(inputs, values, sample_weight=weights)
            coefficients[:, 0] = torch.from_numpy(line.coef_)
            intercept[0] = float(line.intercept_)
            deviation = float((values - line.predict(inputs)).std())
        else:
            shares = torch.bincount(data.labels, data.weights, self.classes).double()
            intercept = (shares / shares.sum()).clamp_min(1e-6).log()
            seen = data.labels.unique()
            if len(seen) > 1 and inputs.shape[1]:
                model = LogisticRegression(C=1 / _STRENGTH, max_iter=1000)
                model.fit(inputs, data.labels.numpy(), sample_weight=weights)
                rows = torch.from_numpy(model.coef_)
                start = torch.from_numpy(model.intercept_)
                if len(seen) == 2:  # scikit-learn states the second of two classes only
                    rows = torch.cat([torch.zeros_like(rows), rows])
                    start = torch.cat([torch.zeros_like(start), start])
                intercept = torch.full((self.classes,), -20.0, dtype=torch.float64)
                intercept[seen] = start
                coefficients[:, seen] = rows.T
        self._arrays = {
            "coefficients": coefficients.contiguous(),
            "intercept": intercept,
            "deviation": torch.tensor([max(deviation, 1e-6)], dtype=torch.float64),
        }
        return {"inputs": inputs.shape[1]}

    def probabilities(self, features: Tensor) -> Tensor:
        """See `Reference.probabilities`."""
        scores = self._inputs(features) @ self._arrays["coefficients"] + self._arrays["intercept"]
        if self.scale is None:
            return torch.softmax(scores, dim=-1)
        return self.spread(scores[:, 0], self._arrays["deviation"].expand(len(scores)))

    def state(self) -> dict[str, Tensor]:
        """See `Reference.state`."""
        return dict(self._arrays)

    def load_state(self, state: Mapping[str, Tensor], others: Mapping[str, Reference]) -> None:
        """See `Reference.load_state`."""
        width = 1 if self.scale is not None else self.classes
        shapes = {
            "coefficients": (len(self._columns()), width),
            "intercept": (width,),
            "deviation": (1,),
        }
        found = {name: state[name] for name in shapes}
        if state.keys() != shapes.keys() or any(
            tuple(found[name].shape) != shape or not bool(found[name].isfinite().all())
            for name, shape in shapes.items()
        ):
            raise ValueError("no arrays of a regression on gaps")
        if not bool(found["deviation"] > 0):
            raise ValueError("a standard deviation that is not above 0")
        self._arrays = found

    def _columns(self) -> list[int]:
        """Return the features whose presence counts: each cell, and one of each measurement."""
        first: set[int] = set()
        found = []
        for f, (owner, measured) in enumerate(
            zip(self.layout.owner, self.layout.measured, strict=True)
        ):
            if measured and owner in first:
                continue  # of a scan everything is there or nothing
            first.add(owner)
            found.append(f)
        return found

    def _inputs(self, features: Tensor) -> Tensor:
        return (~features[:, self._columns()].isnan()).double()
