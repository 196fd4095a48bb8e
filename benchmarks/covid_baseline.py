"""What plain classifiers reach on the tables of a cohort, and how much of it is missingness.

    python benchmarks/covid_baseline.py COHORT [--csv FILE] [--seed 0]

Logistic regression and gradient-boosted trees on the same columns and the same patients as a
bundle: fitted on train, validation and calibration (a bundle sees all three), scored on test. Each
patient counts once, however many visits; 95 % intervals are by bootstrap over patients.

- `values`: the cells, blanks filled with the column's median (categories: the most frequent one).
  Trees can still recognise a filled blank by that very value.
- `values + blanks`: the same, and for each column whether it was blank.
- `blanks only`: whether each column was blank and each picture absent; no measured value at all.

Where `blanks only` scores well, the pattern of absence gives the label away, and any model that
can see the pattern may be using it.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from dymo_med.data.batch import collate
from dymo_med.data.cohort import read_cohort
from dymo_med.data.patient import read_record
from dymo_med.metrics import bootstrap, patient_weights
from dymo_med.types import Batch, Cohort

FITTED_ON = ("train", "validation", "calibration")


def read_split(cohort: Cohort, splits: tuple[str, ...]) -> Batch:
    """Return all labelled records of some splits."""
    records = [
        read_record(entry, cohort.specs, cohort.missing_values, require_something=False)
        for split in splits
        for entry in cohort.in_split(split)
        if entry.label is not None
    ]
    return collate(records, cohort.specs)


def cells(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Return all tables' values `(B, F)`, NaN = blank, and what is absent `(B, F + images)`."""
    values = torch.cat([batch.values[name] for name in batch.observed_fields], dim=1)
    filled = torch.cat(list(batch.observed_fields.values()), dim=1)
    pictures = [m for m, n in enumerate(batch.observed.names) if n not in batch.observed_fields]
    absent = torch.cat([~filled, ~batch.observed.available[:, pictures]], dim=1)
    table = values.double().masked_fill(~filled, torch.nan).numpy()
    return table, absent.double().numpy()


def models(categorical: list[int], count: int, seed: int) -> dict[str, ClassifierMixin]:
    """Return the classifiers; columns after the first `count` are indicators.

    Args:
        categorical: Positions of categorical columns.
        count: Number of table columns.
        seed: Seed of the trees.
    """
    continuous = [i for i in range(count) if i not in categorical]
    filled = make_column_transformer(
        (make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), continuous),
        (
            make_pipeline(
                SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore")
            ),
            categorical,
        ),
        remainder="passthrough",
        sparse_threshold=0,
    )
    trees = HistGradientBoostingClassifier(
        max_iter=100, learning_rate=0.05, min_samples_leaf=10, random_state=seed
    )
    return {
        "logistic regression": make_pipeline(filled, LogisticRegression(max_iter=2000)),
        "gradient boosting": make_pipeline(filled, trees),
    }


def main() -> None:
    """Parse the command line, fit, score, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    cohort = read_cohort(arguments.cohort)
    columns = [column for spec in cohort.specs for column in spec.columns]
    categorical = [i for i, column in enumerate(columns) if column.type == "categorical"]
    fit, test = read_split(cohort, FITTED_ON), read_split(cohort, ("test",))
    weights = patient_weights(fit.patient_ids)
    (fit_cells, fit_absent), (test_cells, test_absent) = cells(fit), cells(test)
    # A column blank in all of the fitting data has no median.
    seen = [i for i in range(len(columns)) if not np.isnan(fit_cells[:, i]).all()]
    categorical = [seen.index(i) for i in categorical if i in seen]
    fit_cells, test_cells = fit_cells[:, seen], test_cells[:, seen]
    inputs = {
        "values": (fit_cells, test_cells, len(seen)),
        "values + blanks": (
            np.hstack([fit_cells, fit_absent[:, seen]]),
            np.hstack([test_cells, test_absent[:, seen]]),
            len(seen),
        ),
        "blanks only": (fit_absent, test_absent, 0),
    }
    probabilities = {}
    for name, (x, x_test, count) in inputs.items():
        chosen = models(categorical if count else [], count, arguments.seed)
        for model_name, model in chosen.items():
            model.fit(x, fit.labels.numpy(), **{f"{model.steps[-1][0]}__sample_weight": weights})
            probabilities[f"{model_name}, {name}"] = model.predict_proba(x_test)
    prior = float(np.average(fit.labels.numpy(), weights=weights))
    probabilities["prior"] = np.tile([1 - prior, prior], (len(test), 1))
    scores = bootstrap(
        test.labels.tolist(),
        probabilities,
        test.patient_ids,
        metrics=["auroc", "log_loss"],
        seed=arguments.seed,
    )
    print(
        f"fitted on {len(fit)} visits of {len(set(fit.patient_ids))} patients, scored on"
        f" {len(test)} visits of {len(set(test.patient_ids))} patients"
        f" ({int(test.labels.sum())} visits positive)"
    )
    rows = []
    for name, metrics in scores.items():
        for metric, score in metrics.items():
            rows.append((name, metric, score.value, score.low, score.high))
        a, b = metrics["auroc"], metrics["log_loss"]
        print(
            f"{name:38s} AUROC {a.value:.3f} [{a.low:.3f}, {a.high:.3f}]"
            f"   log loss {b.value:.3f} [{b.low:.3f}, {b.high:.3f}]"
        )
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["method", "metric", "value", "low", "high"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
