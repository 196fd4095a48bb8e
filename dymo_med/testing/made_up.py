"""Modalities and records that components are tried on."""

from __future__ import annotations

import dataclasses

import torch

from dymo_med.types import Batch, Column, ModalityMask, ModalitySpec, Steps

SPECS = (
    ModalitySpec("volume", "image", "v.nii.gz", (1, 9, 8, 10), (4.0, 4.0, 4.0), "zscore"),
    ModalitySpec("film", "image", "f.png", (1, 16, 12), (), "zscore"),
    ModalitySpec(
        "labs",
        "table",
        "ehr.csv",
        (3,),
        columns=(
            Column("crp", "continuous", "mg/L", (0.0, 500.0), mean=40.0, std=30.0),
            Column("sex", "categorical", values=("F", "M"), frequencies=(0.5, 0.5)),
            Column("stage", "categorical", values=("i", "ii", "iii"), frequencies=(0.5, 0.3, 0.2)),
        ),
    ),
    ModalitySpec(
        "age", "table", "ehr.csv", (1,), columns=(Column("age", "continuous", mean=60.0, std=9.0),)
    ),
    # On the grid of the film: some imputers recover an image from others of its grid alone.
    ModalitySpec("side", "image", "s.png", (1, 16, 12), (), "zscore"),
    ModalitySpec(
        "gait", "tokens", "g.npy", (5, 3), steps=Steps(mean=(1.0, 0.0, 0.0), std=(2.0, 1.0, 0.5))
    ),
)
NAMES = tuple(s.name for s in SPECS)
K = 3


def make_batch(n: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """Return n records of `SPECS` with gaps, on the CPU.

    Args:
        n: How many.
        seed: Of every number.
        dtype: Of values.
    """
    g = torch.Generator().manual_seed(seed)
    values = {
        "volume": torch.randn(n, 1, 9, 8, 10, generator=g, dtype=dtype),
        "film": torch.randn(n, 1, 16, 12, generator=g, dtype=dtype),
        "labs": torch.stack(
            [
                torch.rand(n, generator=g, dtype=dtype) * 100,
                torch.randint(2, (n,), generator=g).to(dtype),
                torch.randint(3, (n,), generator=g).to(dtype),
            ],
            1,
        ),
        "age": 50 + 10 * torch.randn(n, 1, generator=g, dtype=dtype),
        "side": torch.randn(n, 1, 16, 12, generator=g, dtype=dtype),
        "gait": 1 + torch.randn(n, 5, 3, generator=g, dtype=dtype),
    }
    available = torch.rand(n, len(SPECS), generator=g) < 0.6
    available[:, 0] |= ~available.any(1)
    fields = {
        "labs": (torch.rand(n, 3, generator=g) < 0.7) & available[:, 2:3],
        "age": available[:, 3:4].clone(),
    }
    fields["labs"][:, 0] |= available[:, 2]
    fields["labs"][::2, 1] = False
    ids = tuple(f"r{i}" for i in range(n))
    labels = torch.arange(n) % K
    return Batch(ids, ids, values, ModalityMask(NAMES, available), fields, labels)


def noisy(batch: Batch, seed: int = 1) -> Batch:
    """Return the same batch with other numbers wherever nothing was observed.

    Args:
        batch: Of `make_batch`.
        seed: Of the numbers.
    """
    g = torch.Generator().manual_seed(seed)
    values = {}
    for m, name in enumerate(NAMES):
        v = batch.values[name]
        keep = batch.observed.available[:, m].view(-1, *(1,) * (v.ndim - 1))
        if name in batch.observed_fields:
            keep = keep & batch.observed_fields[name]
        values[name] = torch.where(keep, v, torch.rand(v.shape, generator=g, dtype=v.dtype) * 2)
    return dataclasses.replace(batch, values=values)


WITHOUT_STAGE = tuple(
    dataclasses.replace(
        spec,
        columns=tuple(dataclasses.replace(c, known=c.name != "stage") for c in spec.columns),
    )
    for spec in SPECS
)
