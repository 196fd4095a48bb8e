"""Gradient boosting on cells and measurements of scans; a gap is a branch of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from torch import Tensor
from torch.nn import functional as F

from dymo_med.references.base import Reference, Training
from dymo_med.references.features import Layout
from dymo_med.types import Scale

# The first are scikit-learn's own; each of the others suits fewer patients than the one before.
_SETTINGS: tuple[dict[str, Any], ...] = (
    {"learning_rate": 0.1, "max_iter": 100, "max_leaf_nodes": 31, "min_samples_leaf": 20},
    {"learning_rate": 0.05, "max_iter": 150, "max_leaf_nodes": 4, "min_samples_leaf": 5},
    {
        "learning_rate": 0.05,
        "max_iter": 100,
        "max_leaf_nodes": 4,
        "min_samples_leaf": 5,
        "max_features": 0.2,
        "l2_regularization": 5.0,
    },
    {"learning_rate": 0.05, "max_iter": 40, "max_leaf_nodes": 3, "min_samples_leaf": 10},
)
# With more values than this a category is taken as a number: scikit-learn's own limit.
_MOST_CATEGORIES = 255
_FOLDS = 3  # of each setting
_MOST_ROWS = 4096  # that are walked through all trees at once


class Boosting(Reference):
    """scikit-learn's histogram gradient boosting, kept as arrays.

    Blank cells, missing modalities and categories that training never saw go where the gain was
    largest in training. Settings are chosen out of a few by cross-validation over training
    patients. What is kept are the nodes of all trees in one row, children behind their parents;
    a record walks all trees at once.

    References:
        Ke et al., LightGBM: A Highly Efficient Gradient Boosting Decision Tree, NeurIPS 2017;
        scikit-learn's `HistGradientBoostingClassifier`.
    """

    name = "boosting"

    def __init__(self, layout: Layout, classes: int, scale: Scale | None) -> None:
        super().__init__(layout, classes, scale)
        self._categorical = [1 < n <= _MOST_CATEGORIES for n in layout.categories]
        self._arrays: dict[str, Tensor] = {}

    def fit(self, data: Training, others: Mapping[str, Reference]) -> dict[str, Any]:
        """See `Reference.fit`."""
        folds = data.folds(_FOLDS)
        chosen, losses, deviation = len(_SETTINGS) - 1, [], None
        if folds:
            errors = [self._errors(data, folds, settings) for settings in _SETTINGS]
            losses = [float((e * data.weights).sum() / data.weights.sum()) for e in errors]
            chosen = int(np.argmin(losses))
            deviation = losses[chosen] ** 0.5
        model = self._fitted(data, torch.arange(len(data.labels)), _SETTINGS[chosen])
        self._arrays = self._trees(model)
        if data.values is not None:
            spread = float(data.values.std(correction=0)) if deviation is None else deviation
            self._arrays["deviation"] = torch.tensor([spread], dtype=torch.float64)
        return {**_SETTINGS[chosen], "cross_validation": losses}

    def probabilities(self, features: Tensor) -> Tensor:
        """See `Reference.probabilities`."""
        raw = torch.cat([self._walk(part) for part in features.double().split(_MOST_ROWS)])
        if self.scale is not None:
            return self.spread(raw[:, 0], self._arrays["deviation"].expand(len(raw)))
        if raw.shape[1] == 1:
            raw = torch.cat([torch.zeros_like(raw), raw], dim=1)
        return torch.softmax(raw, dim=-1)

    def state(self) -> dict[str, Tensor]:
        """See `Reference.state`."""
        return dict(self._arrays)

    def load_state(self, state: Mapping[str, Tensor], others: Mapping[str, Reference]) -> None:
        """See `Reference.load_state`."""
        nodes = len(state["leaf"])
        forms = {
            "baseline": (torch.float64, (1 if self.scale or self.classes == 2 else self.classes,)),
            "roots": (torch.int64, tuple(state["roots"].shape)),
            "feature": (torch.int64, (nodes,)),
            "threshold": (torch.float64, (nodes,)),
            "value": (torch.float64, (nodes,)),
            "left": (torch.int64, (nodes,)),
            "right": (torch.int64, (nodes,)),
            "leaf": (torch.bool, (nodes,)),
            "gap_left": (torch.bool, (nodes,)),
            "categories": (torch.int64, (nodes,)),
            "sides": (torch.uint8, (len(state["sides"]), _MOST_CATEGORIES + 1)),
            **({"deviation": (torch.float64, (1,))} if self.scale else {}),
        }
        wrong = [
            name
            for name in sorted({*forms, *state})
            if name not in forms
            or (state[name].dtype, tuple(state[name].shape)) != forms[name]
            or (state[name].is_floating_point() and bool(state[name].isnan().any()))
        ]
        at = torch.arange(nodes)
        inner = ~state["leaf"]
        if not wrong:
            # Children lie behind their parents, so that every walk ends.
            ahead = all(
                bool(((state[side] > at) & (state[side] < nodes))[inner].all())
                for side in ("left", "right")
            )
            roots, categories = state["roots"], state["categories"]
            inside = (
                roots.ndim == 2
                and roots.shape[1] == forms["baseline"][1][0]
                and bool(((roots >= 0) & (roots < nodes)).all())
                and bool(((state["feature"] >= 0) & (state["feature"] < len(self.layout))).all())
                and bool(((categories >= -1) & (categories < len(state["sides"]))).all())
            )
            wrong = [] if ahead and inside else ["left", "right"]
        if wrong:
            raise ValueError(f"boosting: {', '.join(wrong)} cannot be right")
        self._arrays = dict(state)

    def _matrix(self, features: Tensor) -> Any:
        """Return what scikit-learn is given."""
        return features.numpy()

    def _fitted(self, data: Training, rows: Tensor, settings: Mapping[str, Any]) -> Any:
        """Return a fitted scikit-learn model."""
        kind, target = HistGradientBoostingClassifier, data.labels[rows].numpy()
        if data.values is not None:
            kind, target = HistGradientBoostingRegressor, data.values[rows].numpy()
        model = kind(
            **settings,
            early_stopping=False,
            categorical_features=self._categorical if any(self._categorical) else None,
            random_state=data.seed % 2**32,
        )
        features = data.features[rows]
        # scikit-learn 1.9 cannot bin a column of gaps alone; one that never varies is never split.
        features = features.masked_fill(features.isnan().all(0), 0.0)
        return model.fit(self._matrix(features), target, sample_weight=data.weights[rows].numpy())

    def _errors(
        self,
        data: Training,
        folds: list[tuple[Tensor, Tensor]],
        settings: Mapping[str, Any],
    ) -> Tensor:
        """Return each record's log-loss, or squared error, by models that never saw its patient."""
        errors = torch.zeros(len(data.labels), dtype=torch.float64)
        for outside, inside in folds:
            model = self._fitted(data, outside, settings)
            given = self._matrix(data.features[inside])
            if data.values is not None:
                found = torch.from_numpy(model.predict(given))
                errors[inside] = (found - data.values[inside]).square()
            else:
                # A class that a fold lacks has probability 0 there.
                found = torch.full((len(inside), self.classes), 1e-6, dtype=torch.float64)
                found[:, torch.from_numpy(model.classes_)] = torch.from_numpy(
                    model.predict_proba(given)
                ).clamp_min(1e-6)
                errors[inside] = F.nll_loss(found.log(), data.labels[inside], reduction="none")
        return errors

    def _trees(self, model: Any) -> dict[str, Tensor]:
        """Return a fitted model's trees as arrays.

        scikit-learn puts categorical features first and numbers the categories it met; here both
        are turned back, so that a walk needs features as they are.
        """
        categorical = np.flatnonzero(self._categorical)
        numeric = np.flatnonzero(~np.array(self._categorical, dtype=bool))
        order = np.concatenate([categorical, numeric]).astype(np.int64)
        met: dict[int, Any] = {}
        if len(categorical):
            encoder = model._preprocessor.named_transformers_["encoder"]
            met = {
                place: seen[~np.isnan(seen)].astype(np.int64)
                for place, seen in enumerate(encoder.categories_)
            }
        parts: list[Any] = []
        roots: list[list[int]] = []
        sides = [np.zeros((0, _MOST_CATEGORIES + 1), dtype=np.uint8)]
        places: list[Any] = []
        start, rows = 0, 0
        for trees in model._predictors:
            roots.append([])
            for tree in trees:
                roots[-1].append(start)
                nodes = tree.nodes.copy()
                for child in ("left", "right"):
                    nodes[child] += start
                place = np.full(len(nodes), -1, dtype=np.int64)
                chosen = np.flatnonzero((nodes["is_categorical"] != 0) & (nodes["is_leaf"] == 0))
                for i in chosen:
                    bits = tree.raw_left_cat_bitsets[nodes["bitset_idx"][i]]
                    seen = met[int(nodes["feature_idx"][i])]
                    # 0 = to the right, 1 = to the left, 2 = as a gap goes: training never met it.
                    side = np.full(_MOST_CATEGORIES + 1, 2, dtype=np.uint8)
                    code = np.arange(len(seen))
                    side[seen] = (bits[code // 32] >> (code % 32).astype(np.uint32)) & 1
                    sides.append(side[None])
                    place[i] = rows
                    rows += 1
                parts.append(nodes)
                places.append(place)
                start += len(nodes)
        nodes = np.concatenate(parts)
        leaf = nodes["is_leaf"] != 0
        return {
            "baseline": torch.from_numpy(np.array(model._baseline_prediction, float).reshape(-1)),
            "roots": torch.tensor(roots, dtype=torch.int64),
            "feature": torch.from_numpy(np.where(leaf, 0, order[nodes["feature_idx"]])),
            "threshold": torch.from_numpy(np.where(leaf, 0.0, nodes["num_threshold"])),
            "value": torch.from_numpy(nodes["value"].astype(np.float64)),
            "left": torch.from_numpy(np.where(leaf, 0, nodes["left"].astype(np.int64))),
            "right": torch.from_numpy(np.where(leaf, 0, nodes["right"].astype(np.int64))),
            "leaf": torch.from_numpy(leaf),
            "gap_left": torch.from_numpy(nodes["missing_go_to_left"] != 0),
            "categories": torch.from_numpy(np.concatenate(places)),
            "sides": torch.from_numpy(np.concatenate(sides)),
        }

    def _walk(self, features: Tensor) -> Tensor:
        """Return raw scores `(R, T)`: the baseline and what the leaves of all trees add."""
        a = self._arrays
        iterations, columns = a["roots"].shape
        if not len(features):
            return torch.empty(0, columns, dtype=torch.float64)
        node = a["roots"].flatten().expand(len(features), -1)
        while not bool(a["leaf"][node].all()):
            x = features.gather(1, a["feature"][node])
            gap = x.isnan()
            left = x <= a["threshold"][node]
            table = a["categories"][node]
            if len(a["sides"]):
                cell = x.nan_to_num(0.0).clamp(0, _MOST_CATEGORIES).long()
                side = a["sides"][table.clamp_min(0), cell]
                left = torch.where(table >= 0, side == 1, left)
                gap = gap | ((table >= 0) & (side == 2))
            left = torch.where(gap, a["gap_left"][node], left)
            ahead = torch.where(left, a["left"][node], a["right"][node])
            node = torch.where(a["leaf"][node], node, ahead)
        added = a["value"][node].view(len(features), iterations, columns).sum(1)
        return a["baseline"] + added
