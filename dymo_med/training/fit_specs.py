"""Constants of modalities, fitted on training records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from dymo_med.modalities import modality
from dymo_med.training.objectives import of_known_class
from dymo_med.types import Batch, ModalitySpec


def fit_specs(specs: Sequence[ModalitySpec], batch: Batch) -> tuple[ModalitySpec, ...]:
    """Return the specs with constants fitted on training records that have the modality.

    Args:
        specs: Modalities in canonical order.
        batch: Training records.
    """
    fitted = []
    for m, spec in enumerate(specs):
        rows = batch.observed.available[:, m]
        fields = batch.observed_fields.get(spec.name)
        told = batch.descriptors.get(spec.name)
        fitted.append(
            modality(spec).fit(
                batch.values[spec.name][rows],
                None if fields is None else fields[rows],
                None if told is None else told[rows],
            )
        )
    return tuple(fitted)


def fit_importances(specs: Sequence[ModalitySpec], batch: Batch) -> tuple[ModalitySpec, ...]:
    """Return the specs with how much each table column tells about the target.

    The measure is the mean decrease in impurity of one random forest over all columns of all
    tables. A forest needs no scaling, takes blank cells as they are and finds effects that are
    not linear or depend on other columns. Columns that say the same share what they are worth;
    by permutation each of them would seem worthless. Trees grown to the last record overrate
    columns of many distinct values, hence leaves of at least five records. That a cell is blank
    can tell something too, and counts for its column.

    Args:
        specs: Modalities in canonical order.
        batch: Training records; those without a label are left out.

    Returns:
        Specs whose columns' importances sum to 1 over all tables, or are all 0 where the forest
        finds nothing. A column that is blank in all of these records has 0.

    References:
        Breiman, Random Forests, Machine Learning 45, 2001; Strobl et al., Bias in random forest
        variable importance measures, BMC Bioinformatics 8:25, 2007.
    """
    from sklearn.ensemble import RandomForestClassifier

    tables = [spec for spec in specs if spec.columns]
    if not tables:
        return tuple(specs)
    known, weights = of_known_class(batch)
    blank = torch.tensor(torch.nan, dtype=torch.float64)
    cells = torch.cat(
        [known.values[s.name].double().where(known.observed_fields[s.name], blank) for s in tables],
        dim=1,
    ).numpy()  # (n, columns of all tables)
    some = np.flatnonzero(~np.isnan(cells).all(0))
    shares = np.zeros(cells.shape[1])
    if len(some):
        forest = RandomForestClassifier(
            n_estimators=200,
            min_samples_leaf=5,
            max_samples=min(len(known), 10_000),  # of a large cohort a tree need not see all
            random_state=0,
            n_jobs=1,
        )
        forest.fit(cells[:, some], known.labels.numpy(), sample_weight=weights.numpy())
        shares[some] = forest.feature_importances_
    left = iter(shares.tolist())
    return tuple(
        replace(s, columns=tuple(replace(c, importance=next(left)) for c in s.columns))
        for s in specs
    )
