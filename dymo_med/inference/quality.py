"""How good recoveries are, where the truth is known: the part of an evaluation that was hidden.

Three questions, from the picture to the patient: how near is a recovered scan to the true one, how
near are recovered cells, and does the classifier still say the same with the recovery in the place
of the truth. The last one matters most: a scan can look right and mislead, or be blurred where
nothing depends on it.

`measure` works batch by batch and returns what JSON can hold; a `Collector` turns all of it into
tables, plots and a section of the cohort's page.
"""

from __future__ import annotations

import base64
import io
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dymo_med.backbones import encode_versions
from dymo_med.bundle import ModelBundle
from dymo_med.errors import ConfigError, Problem
from dymo_med.files import write_csv
from dymo_med.inference.answer import Answers
from dymo_med.inference.pictures import png, slices, watermark
from dymo_med.inference.report import words
from dymo_med.metrics import bootstrap_means
from dymo_med.modalities.table import Table
from dymo_med.modalities.tokens import TokenSequence
from dymo_med.types import Batch, Column, ModalitySpec, Recovery

Row = dict[str, Any]
Array = NDArray[Any]

EVERYTHING = "*"  # in the place of a modality: all that was hidden and recovered, at once
COLUMNS = (
    *("scenario", "record_id", "patient_id", "modality", "column"),
    *("metric", "value", "unit"),
)
SUMMARY_COLUMNS = (
    *("scenario", "modality", "column", "metric", "value", "low", "high"),
    *("unit", "records", "patients"),
)
# In the order of tables and plots.
IMAGE_METRICS = ("psnr", "ssim", "nmae")
TABLE_METRICS = ("mae", "mae_sd", "accuracy", "log_loss")
STEP_METRICS = ("cosine",)  # besides mae_sd
FIDELITY = ("same_answer", "probability_change")
WITHIN = "within_90"
METRICS = (*FIDELITY, *IMAGE_METRICS, *TABLE_METRICS, *STEP_METRICS, WITHIN)
# Below this many draws no interval between two of them covers 90 % of what is drawn.
FEWEST_DRAWS = 19

_WINDOW = 7  # voxels of the SSIM's Gaussian window; images have at least 8 along each axis
_SIGMA = 1.5  # its standard deviation, in voxels
_SHARES = ("accuracy", WITHIN, "same_answer")
_KEPT = 2  # pictures per modality
_MOST_PICTURES = 8
_PIXELS = 320  # longest side of a picture
_FILES = ("recovery_summary.csv", "plots/recovery.png", "plots/recovered.png")
_COLOURS = ("#1f5a82", "#a9570c", "#5b8a3c", "#8a4f7d", "#1b2530", "#b08d1f")
_MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class _Value:
    """One number about one record of a batch.

    Attributes:
        row: Which record.
        modality: What was recovered, or `EVERYTHING`.
        metric: One of `METRICS`.
        value: NaN where it is not defined.
        column: Of a table; None = of the modality as a whole.
    """

    row: int
    modality: str
    metric: str
    value: float
    column: Column | None = None


@dataclass(frozen=True)
class Measured:
    """What was measured of a batch, ready for JSON.

    Attributes:
        rows: Of `recovery.csv`.
        pictures: Truth, recovery and difference of a few scans, as `data:` addresses, and their
            `scenario`, `record_id`, `modality` and `extent` (rows, columns; in mm for volumes).
    """

    rows: Sequence[Row]
    pictures: Sequence[Row]


@dataclass
class _Values:
    """One metric of one thing recovered: whose, and what.

    Attributes:
        unit: Of the values.
        record: Positions of records.
        value: One per position.
    """

    unit: str
    record: array[int] = field(default_factory=lambda: array("q"))
    value: array[float] = field(default_factory=lambda: array("d"))


def check_draws(draws: int) -> None:
    """Refuse a number of draws that no 90 % interval can be estimated from.

    Raises:
        ConfigError: If it is neither 0 nor at least 19.
    """
    if draws and draws < FEWEST_DRAWS:
        raise ConfigError(
            Problem(
                "--draws",
                "too few",
                expected=f"0, or at least {FEWEST_DRAWS}",
                got=str(draws),
                remedy="Ask for more, or for none",
            )
        )


def measure(
    bundle: ModelBundle,
    scenario: str,
    answers: Answers,
    truth: Answers,
    *,
    draws: int = 0,
    seed: int = 0,
) -> Measured:
    """Compare what was recovered with what was hidden.

    Only what was measured, hidden and then recovered counts: of a table the hidden cells, and
    neither those that stayed nor those that nobody ever filled.

    Args:
        bundle: The model.
        scenario: What hid something; names the rows.
        answers: Of B records with something hidden.
        truth: Of the same B records, whole.
        draws: How many draws to ask a probabilistic imputer for, to see whether their spread is
            right; 0 = none.
        seed: Seed of the draws.

    Returns:
        One row per record, modality, column and metric.
    """
    cells = _hidden_cells(truth.batch, answers.batch)
    measured = _hidden(truth.batch, answers.batch, cells) & answers.recovery.candidates
    found = [
        *_nearness(bundle, answers.recovery, truth.batch, measured, cells),
        *_log_loss(bundle, answers.batch, truth.batch, measured, cells),
        *_fidelity(bundle, answers.recovery, truth, measured, cells),
    ]
    if draws and bundle.imputer.probabilistic:
        found += _spread(bundle, answers.batch, truth.batch, measured, cells, draws, seed)
    found.sort(key=lambda value: value.row)
    return Measured(
        [
            {
                "scenario": scenario,
                "record_id": truth.batch.record_ids[v.row],
                "patient_id": truth.batch.patient_ids[v.row],
                "modality": v.modality,
                "column": v.column.name if v.column is not None else "",
                "metric": v.metric,
                "value": v.value,
                "unit": _unit(v.metric, v.column),
            }
            for v in found
        ],
        [
            {
                "scenario": scenario,
                "record_id": truth.batch.record_ids[i],
                "modality": spec.name,
                **_picture(spec, truth.batch.values[spec.name][i], answers.recovery, i),
            }
            for m, spec in enumerate(bundle.specs)
            if spec.is_image
            for i in measured[:, m].nonzero().squeeze(1).tolist()[:_KEPT]
        ],
    )


def body(spec: ModalitySpec, truth: Tensor) -> Tensor:
    """Return bool `(*spatial)`: where a true image shows something.

    Intensities that were normalised over voxels other than 0 have exact zeros outside the body;
    in other images everything counts.

    Args:
        spec: The modality.
        truth: `(C, *spatial)`.
    """
    if spec.intensity == "zscore":
        return (truth != 0).any(0)
    return torch.ones_like(truth[0], dtype=torch.bool)


def image_quality(truth: Tensor, recovered: Tensor, inside: Tensor) -> dict[str, float]:
    """Return PSNR, SSIM and NMAE of one recovered image, inside the body.

    The data range of all three is that of the truth inside the body, smallest to largest. Both
    images are brought to 0..1 by it first, which SSIM needs (it is made for intensities that are
    not negative), and set to 0 outside the body, so that nothing there counts.

    Args:
        truth: `(C, *spatial)`, at least 7 voxels along each axis.
        recovered: `(C, *spatial)`.
        inside: Bool `(*spatial)`, True inside the body.

    Returns:
        `psnr`: peak signal-to-noise ratio in dB, infinite for an exact copy. `ssim`: structural
        similarity in a Gaussian window of 7 voxels, averaged over windows that lie in the image
        and are centred in the body; NaN where there is none. `nmae`: mean absolute error as a
        share of the data range. All NaN where the truth is empty or constant inside the body.

    References:
        Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity,
        IEEE Transactions on Image Processing 2004.
    """
    from monai.metrics.regression import PSNRMetric

    values = truth[:, inside]
    low, high = (values.min(), values.max()) if values.numel() else (truth.new_zeros(()),) * 2
    if not bool(high > low):
        return dict.fromkeys(IMAGE_METRICS, math.nan)
    # Windows far from the body do not count and cost as much as others.
    near = _box(inside, _WINDOW // 2)
    inside = inside[near]
    # (1, C, *spatial)
    true = torch.where(inside, (truth[:, *near] - low) / (high - low), 0.0)[None]
    made = torch.where(inside, (recovered[:, *near] - low) / (high - low), 0.0)[None]
    a, b = made[..., inside].flatten(1), true[..., inside].flatten(1)
    edge = _WINDOW // 2
    centred = inside[(slice(edge, -edge),) * inside.ndim]
    return {
        "psnr": float(PSNRMetric(max_val=1.0, reduction="none")(a, b)),
        "ssim": float(similarity(made, true)[..., centred].mean()),
        "nmae": float((a - b).abs().mean()),
    }


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity of two images in every Gaussian window of 7 voxels.

    The same numbers as MONAI's `compute_ssim_and_cs`, whose window is filtered along all axes at
    once: axis by axis a volume takes a tenth of the time.

    Args:
        a: `(B, C, *spatial)`, in 0..1 or near it.
        b: Likewise.

    Returns:
        `(B, C, *spatial)`, 3 voxels less on each side: windows that lie in the image.
    """
    from monai.networks.layers.simplelayers import separable_filtering

    edge, dims = _WINDOW // 2, a.ndim - 2
    window = torch.exp(-0.5 * (torch.arange(-edge, edge + 1).to(a) / _SIGMA) ** 2)
    window = window / window.sum()
    valid = (slice(None), slice(None), *(slice(edge, -edge),) * dims)

    def smooth(image: Tensor) -> Tensor:
        smoothed: Tensor = separable_filtering(image, [window] * dims)
        return smoothed[valid]

    mean_a, mean_b = smooth(a), smooth(b)
    variances = smooth(a * a) - mean_a**2 + smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)


def _box(inside: Tensor, margin: int) -> tuple[slice, ...]:
    """Return the box around what is inside, `margin` voxels wider where the image has them."""
    found = inside.nonzero()
    low = (found.amin(0) - margin).clamp_min(0).tolist()
    high = (found.amax(0) + margin + 1).tolist()
    return tuple(slice(a, b) for a, b in zip(low, high, strict=True))


def cell_quality(truth: float, recovered: float, column: Column) -> dict[str, float]:
    """Return how near one recovered cell is.

    Args:
        truth: In the column's unit, or the category's index.
        recovered: Likewise.
        column: What it is.

    Returns:
        Numbers: `mae` in the unit, and `mae_sd` in standard deviations of training patients where
        these are known. Categories: `accuracy`, 1 or 0.
    """
    if column.type == "categorical":
        return {"accuracy": float(round(recovered) == round(truth))}
    error = abs(recovered - truth)
    return {"mae": error, "mae_sd": error / column.std} if column.std else {"mae": error}


def sequence_quality(truth: Tensor, recovered: Tensor, kind: TokenSequence) -> dict[str, float]:
    """Return how near a recovered sequence of feature vectors is.

    Args:
        truth: `(L, C)`.
        recovered: Likewise.
        kind: Its modality, with the constants of training records.

    Returns:
        `mae_sd`: mean absolute error in standard deviations of each feature. `cosine`: mean over
        steps of the cosine of true and recovered features, standardised; the average record
        has 0.
    """
    spread, center = kind.spread(truth), kind.center(truth)
    true, made = (truth - center) / spread, (recovered - center) / spread
    cosine = torch.nn.functional.cosine_similarity(true, made, dim=1)
    return {"mae_sd": float((made - true).abs().mean()), "cosine": float(cosine.mean())}


def within_interval(draws: Array, truth: Array) -> Array:
    """Return where the truth lies within the central 90 % interval of draws.

    Its ends are the 5th and 95th percentile as Weibull estimates them (rank / (n + 1)): then the
    truth falls between them 90 % of the time, however few the draws, if it is one more of them.

    Args:
        draws: `(n, ...)`, n at least 19.
        truth: `(...)`.

    Returns:
        Bool `(...)`.
    """
    low, high = np.quantile(draws, [0.05, 0.95], axis=0, method="weibull")
    return np.asarray((low <= truth) & (truth <= high))


def _hidden_cells(truth: Batch, left: Batch) -> dict[str, Tensor]:
    """Return per table bool `(B, F)`: cells that were filled and then hidden."""
    return {n: f & ~left.observed_fields[n] for n, f in truth.observed_fields.items()}


def _hidden(truth: Batch, left: Batch, cells: Mapping[str, Tensor]) -> Tensor:
    """Return bool `(B, M)`: images that were hidden, and tables with a hidden cell."""
    hidden = truth.observed.available & ~left.observed.available
    for m, name in enumerate(truth.observed.names):
        if name in cells:
            hidden[:, m] = cells[name].any(1)
    return hidden


def _nearness(
    bundle: ModelBundle,
    recovery: Recovery,
    truth: Batch,
    measured: Tensor,
    cells: Mapping[str, Tensor],
) -> Iterator[_Value]:
    """Yield how near recovered images and cells are to the true ones."""
    for m, spec in enumerate(bundle.specs):
        for i in measured[:, m].nonzero().squeeze(1).tolist():
            true, made = truth.values[spec.name][i], recovery.values[spec.name][i]
            if spec.is_image:
                for metric, value in image_quality(true, made, body(spec, true)).items():
                    yield _Value(i, spec.name, metric, value)
                continue
            if isinstance(kind := bundle.modalities[spec.name], TokenSequence):
                for metric, value in sequence_quality(true, made, kind).items():
                    yield _Value(i, spec.name, metric, value)
                continue
            for f in cells[spec.name][i].nonzero().squeeze(1).tolist():
                column = spec.columns[f]
                for metric, value in cell_quality(float(true[f]), float(made[f]), column).items():
                    yield _Value(i, spec.name, metric, value, column)


def _log_loss(
    bundle: ModelBundle, left: Batch, truth: Batch, measured: Tensor, cells: Mapping[str, Tensor]
) -> Iterator[_Value]:
    """Yield minus the log probability of the true category, of every recovered one."""
    asked = {
        spec.name: measured[:, m, None]
        & cells[spec.name]
        & cells[spec.name].new_tensor([c.type == "categorical" for c in spec.columns])
        for m, spec in enumerate(bundle.specs)
        if spec.columns
    }
    wanted = [name for name, some in asked.items() if bool(some.any())]
    if not wanted:
        return
    with torch.inference_mode():
        found = bundle.imputer.table_likelihood(left, wanted)
    columns = {spec.name: spec.columns for spec in bundle.specs}
    for name, parameters in found.items():
        kind = bundle.modalities[name]
        assert isinstance(kind, Table)
        # A cell that nobody filled may hold anything.
        known = truth.values[name].where(asked[name], 0.0)
        loss = -kind.cell_log_likelihood(parameters, known)
        for i, f in asked[name].nonzero().tolist():
            yield _Value(i, name, "log_loss", float(loss[i, f]), columns[name][f])


def _fidelity(
    bundle: ModelBundle,
    recovery: Recovery,
    truth: Answers,
    measured: Tensor,
    cells: Mapping[str, Tensor],
) -> Iterator[_Value]:
    """Yield whether the classifier says the same with recoveries in the place of the truth.

    The comparison is with the answer to everything that was really measured (the oracle's). What
    really is missing stays missing on both sides, so a perfect recovery always gives the same
    answer.

    Args:
        bundle: The model.
        recovery: Of the B records.
        truth: Of the same, whole.
        measured: Bool `(B, M)`: hidden and recovered.
        cells: Per table bool `(B, F)`: hidden.
    """
    if not bool(measured.any()):
        return
    backbone = bundle.backbone
    one = torch.eye(measured.shape[1], dtype=torch.bool, device=measured.device)
    before = truth.probabilities["observed_only"]
    with torch.inference_mode():
        real = encode_versions(backbone, truth.batch)
        made = encode_versions(backbone, _replaced(truth.batch, recovery, measured, cells)).observed
        for name, tokens in recovery.tokens_for(backbone.space).items():
            own = backbone.token_modality == truth.batch.observed.names.index(name)
            made[:, own] = tokens
        for m, name in enumerate((*truth.batch.observed.names, EVERYTHING)):
            swap = measured if name == EVERYTHING else measured & one[m]
            rows = swap.any(1).nonzero().squeeze(1)
            if not len(rows):
                continue
            tokens = torch.where(
                swap[rows][:, backbone.token_modality][..., None],
                made[rows],
                real.observed[rows],
            )
            logits = backbone.fuse(tokens, real.observed_available[rows]).logits
            after = bundle.calibration.probabilities(logits.cpu())
            index = rows.cpu()
            same = after.argmax(1) == before[index].argmax(1)
            change = (after - before[index]).abs().sum(1) / 2
            for i, s, c in zip(index.tolist(), same.tolist(), change.tolist(), strict=True):
                yield _Value(i, name, "same_answer", float(s))
                yield _Value(i, name, "probability_change", c)


def _replaced(
    truth: Batch, recovery: Recovery, measured: Tensor, cells: Mapping[str, Tensor]
) -> Batch:
    """Return the true batch with recovered values where something was hidden, and nothing else."""
    values, fields = {}, {}
    for m, name in enumerate(truth.observed.names):
        true = truth.values[name]
        swap = measured[:, m].view(-1, *(1,) * (true.ndim - 1))
        if name in cells:
            swap = swap & cells[name]
            fields[name] = truth.observed_fields[name] & measured[:, m, None]
        values[name] = torch.where(swap, recovery.values[name], true)
    return replace(
        truth,
        values=values,
        observed=replace(truth.observed, available=measured),
        observed_fields=fields,
    )


def _spread(
    bundle: ModelBundle,
    left: Batch,
    truth: Batch,
    measured: Tensor,
    cells: Mapping[str, Tensor],
    draws: int,
    seed: int,
) -> Iterator[_Value]:
    """Yield the share of the truth that lies within the central 90 % interval of draws.

    Record by record, since many draws of a whole batch of volumes would not fit into memory, and
    each from a seed of its own, so that neighbours do not matter.
    """
    for i in measured.any(1).nonzero().squeeze(1).tolist():
        digest = sha256(f"{seed}\0{truth.record_ids[i]}".encode()).digest()
        alone = left.rows(torch.tensor([i], device=measured.device))
        found = bundle.imputer.recover(
            alone, draws=draws, seed=int.from_bytes(digest[:4], "big")
        ).draws
        for m, spec in enumerate(bundle.specs):
            if found is None or not bool(measured[i, m]):
                continue
            drawn = found[spec.name][:, 0].cpu().numpy()
            true = truth.values[spec.name][i]
            within = within_interval(drawn, true.cpu().numpy())
            if not spec.columns:
                if spec.is_image:
                    within = within[:, body(spec, true).cpu().numpy()]
                yield _Value(i, spec.name, WITHIN, float(within.mean()))
                continue
            for f in cells[spec.name][i].nonzero().squeeze(1).tolist():
                if spec.columns[f].type == "continuous":
                    yield _Value(i, spec.name, WITHIN, float(within[f]), spec.columns[f])


def _unit(metric: str, column: Column | None) -> str:
    if metric == "mae" and column is not None:
        return column.unit
    return {"psnr": "dB", "mae_sd": "SD", "log_loss": "nats"}.get(metric, "")


# --- Tables, plots and the section of the page ----------------------------------------------------


class Collector:
    """Takes what was measured as it comes, and keeps numbers and a few pictures.

    Args:
        specs: Modalities in canonical order.
    """

    def __init__(self, specs: Sequence[ModalitySpec]) -> None:
        self._specs = tuple(specs)
        self._values: dict[str, dict[tuple[str, str, str], _Values]] = {}
        self._records: dict[str, dict[str, tuple[int, str]]] = {}  # place and patient
        self._pictures: list[Row] = []

    def add(self, measured: Measured) -> None:
        """Take what was measured of a batch."""
        for row in measured.rows:
            records = self._records.setdefault(row["scenario"], {})
            place, _ = records.setdefault(row["record_id"], (len(records), row["patient_id"]))
            key = row["modality"], row["column"], row["metric"]
            values = self._values.setdefault(row["scenario"], {}).setdefault(
                key, _Values(row["unit"])
            )
            # What is not finite (the PSNR of an exact copy) is kept as None.
            if row["value"] is not None:
                values.record.append(place)
                values.value.append(row["value"])
        self._pictures = _choose([*self._pictures, *measured.pictures], self._specs)

    def write(self, out: Path, scenarios: Sequence[str], seed: int) -> dict[str, Any] | None:
        """Write `recovery_summary.csv` and the plots, if anything was measured.

        Args:
            out: Folder of the evaluation.
            scenarios: In order.
            seed: Of the bootstrap.

        Returns:
            What the template needs; None if nothing was measured, and then nothing is written.
        """
        # An earlier run in this folder may have had other scenarios.
        for name in _FILES:
            (out / name).unlink(missing_ok=True)
        if not self._values:
            return None
        summary = self.summary(scenarios, seed)
        write_csv(out / _FILES[0], SUMMARY_COLUMNS, summary)
        (out / "plots").mkdir(exist_ok=True)
        _plot(out / _FILES[1], summary, scenarios)
        if self._pictures:
            _plot_pictures(out / _FILES[2], self._pictures)
        return _view(summary, self._pictures)

    def summary(self, scenarios: Sequence[str], seed: int) -> list[Row]:
        """Return the rows of `recovery_summary.csv`.

        Args:
            scenarios: In order.
            seed: Of the bootstrap.
        """
        order = {
            (name, column): position
            for position, (name, column) in enumerate(
                [(s.name, c) for s in self._specs for c in ("", *(c.name for c in s.columns))]
                + [(EVERYTHING, "")]
            )
        }
        result: list[Row] = []
        for scenario in scenarios:
            patient_ids = [patient for _, patient in self._records.get(scenario, {}).values()]
            keys = sorted(
                self._values.get(scenario, {}).items(),
                key=lambda item: (order[item[0][:2]], METRICS.index(item[0][2])),
            )
            table = np.full((len(patient_ids), len(keys)), np.nan)
            for j, (_, kept) in enumerate(keys):
                table[np.array(kept.record, dtype=int), j] = kept.value
            estimates = bootstrap_means(table, patient_ids, seed=seed)
            for ((modality, column, metric), own), estimate, values in zip(
                keys, estimates, table.T, strict=True
            ):
                patients = [p for p, v in zip(patient_ids, values, strict=True) if v == v]
                result.append(
                    {
                        "scenario": scenario,
                        "modality": modality,
                        "column": column,
                        "metric": metric,
                        "value": estimate.value,
                        "low": estimate.low,
                        "high": estimate.high,
                        "unit": own.unit,
                        "records": len(patients),
                        "patients": len(set(patients)),
                    }
                )
        return result


def _view(summary: Sequence[Row], shown: Sequence[Row]) -> dict[str, Any]:
    """Return the tables of the page's section, as text, and whether there are pictures."""
    text = words()["recovery"]
    tables = {}
    for group, own in _groups(summary).items():
        identity = ("modality", "column") if group == "cells" else ("modality",)
        present = [m for m in METRICS if any(row["metric"] == m for row in own)]
        lines: dict[tuple[str, ...], dict[str, Row]] = {}
        for row in own:
            key = (row["scenario"], *(row[part] for part in identity))
            lines.setdefault(key, {})[row["metric"]] = row
        tables[group] = {
            "heads": [text[part] for part in identity],
            "metrics": [text["metrics"][m] for m in present],
            "rows": [
                {
                    "names": [text["everything"] if k == EVERYTHING else k for k in key],
                    "values": [_cell(found.get(m)) for m in present],
                    "records": max(row["records"] for row in found.values()),
                }
                for key, found in lines.items()
            ],
        }
    spread = any(row["metric"] == WITHIN for row in summary)
    return {**tables, "spread": spread, "pictures": bool(shown)}


def _groups(summary: Sequence[Row]) -> dict[str, list[Row]]:
    """Return what is shown together: of answers, of images, of sequences, of table cells."""
    groups: dict[str, list[Row]] = {"answers": [], "images": [], "sequences": [], "cells": []}
    sequences = {row["modality"] for row in summary if row["metric"] in STEP_METRICS}
    for row in summary:
        if row["column"]:
            group = "cells"
        elif row["metric"] in FIDELITY:
            group = "answers"
        else:
            group = "sequences" if row["modality"] in sequences else "images"
        groups[group].append(row)
    return groups


def _cell(row: Row | None) -> tuple[str, str]:
    """Return an estimate and its interval, as text; shares in per cent.

    Where all patients agree, resampling them says nothing of how sure that is: an interval
    without width is left out.
    """
    if row is None or math.isnan(row["value"]):
        return "–", ""
    metric, sure = row["metric"], row["low"] < row["high"]
    if metric == "mae":  # the interval is that of the MAE in SD, in other units
        return f"{row['value']:.3g} {row['unit'] if row['unit'] != '1' else ''}".strip(), ""
    if metric in _SHARES:
        value, low, high = (f"{100 * row[key]:.0f}" for key in ("value", "low", "high"))
        return f"{value} %", f"{low} to {high}" if sure else ""
    scale = 100 if metric == "probability_change" else 1
    digits = {"psnr": 1, "probability_change": 1, "mae_sd": 2}.get(metric, 3)
    value, low, high = (
        f"{scale * row[key]:.{digits}f}".replace("-", "\N{MINUS SIGN}")
        for key in ("value", "low", "high")
    )
    return value, f"{low} to {high}" if sure else ""


def _plot(path: Path, summary: Sequence[Row], scenarios: Sequence[str]) -> None:
    """Draw small multiples: a panel per metric, what was recovered down, scenarios by colour."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    text = words()["recovery"]
    lines = []
    for own in _groups(summary).values():
        # Units differ from column to column; standard deviations can stand on one axis.
        metrics = [m for m in METRICS if m != "mae" and any(r["metric"] == m for r in own)]
        if metrics:
            lines.append((metrics, list(dict.fromkeys(map(_name, own))), own))
    heights = [0.6 + 0.21 * len(names) for _, names, _ in lines]
    figure = Figure(figsize=(8.6, sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(
        len(lines),
        max(len(metrics) for metrics, _, _ in lines),
        squeeze=False,
        height_ratios=heights,
    )
    for (metrics, names, own), line in zip(lines, panels, strict=True):
        for axes in line[len(metrics) :]:
            axes.set_axis_off()
        for number, (metric, axes) in enumerate(zip(metrics, line, strict=False)):
            rows = [row for row in own if row["metric"] == metric]
            _panel(axes, metric, names, rows, scenarios)
            axes.set_title(text["metrics"][metric], fontsize=8, loc="left")
            axes.set_yticks(range(len(names)), names if number == 0 else [])
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=4, linewidth=1.5, label=scenario)
        for scenario, (colour, marker) in _looks(scenarios).items()
        if any(r["scenario"] == scenario for r in summary)
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)


def _panel(
    axes: Any, metric: str, names: Sequence[str], rows: Sequence[Row], scenarios: Sequence[str]
) -> None:
    """Draw one metric with its intervals, the first name on top."""
    from matplotlib.ticker import MaxNLocator

    scale = 100 if metric == "probability_change" else 1
    looks = _looks(scenarios)
    for row in rows:
        if math.isnan(row["value"]):
            continue
        colour, marker = looks[row["scenario"]]
        number = scenarios.index(row["scenario"])
        y = names.index(_name(row)) + 0.6 * ((number + 0.5) / len(scenarios) - 0.5)
        low, high = scale * row["low"], scale * row["high"]
        axes.plot([low, high], [y, y], color=colour, linewidth=1.5)
        axes.plot(scale * row["value"], y, marker, color=colour, markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    if metric in _SHARES:
        axes.set_xlim(-0.04, 1.04)
        axes.set_xticks([0, 0.5, 1])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", color="#eceef0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _looks(scenarios: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return colour and marker of each scenario."""
    return {
        s: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)])
        for i, s in enumerate(scenarios)
    }


def _name(row: Row) -> str:
    """Return what a row is about, for an axis."""
    if row["modality"] == EVERYTHING:
        return str(words()["recovery"]["everything"])
    return f"{row['modality']}: {row['column']}" if row["column"] else str(row["modality"])


# --- Pictures -------------------------------------------------------------------------------------


def _picture(spec: ModalitySpec, truth: Tensor, recovery: Recovery, row: int) -> Row:
    """Return truth, recovery and difference of one scan, small enough to keep.

    All three by the grey scale of the truth, from the 1st to the 99th percentile inside the body;
    the difference is white where it is half of that scale or more. A volume is cut axially through
    the middle of the body, whatever is there.

    Args:
        spec: The modality.
        truth: `(C, *spatial)`.
        recovery: Of a batch.
        row: Which record of it.
    """
    inside = body(spec, truth).cpu().numpy()
    true = truth.cpu().numpy()
    made = recovery.values[spec.name][row].cpu().numpy()
    low, high = np.percentile(true[:, inside] if inside.any() else true, [1, 99])
    span = max(float(high - low), 1e-6)
    images = [
        np.where(inside, image, 0.0)
        for image in ((true - low) / span, (made - low) / span, 2 * np.abs(made - true) / span)
    ]
    sides = spec.spacing_mm or (1.0,) * inside.ndim
    if inside.ndim == 3:
        at = [int(np.median(axis)) for axis in np.nonzero(inside if inside.any() else ~inside)]
        images = [np.stack([slices(channel, at)[0] for channel in image]) for image in images]
        sides = (sides[1], sides[0])
    pixels = [(255 * i.clip(0, 1)).round().astype(np.uint8) for i in images]
    colour = [np.moveaxis(p if len(p) == 3 else p[[0]].repeat(3, 0), 0, -1) for p in pixels]
    extent = [n * s for n, s in zip(colour[0].shape, sides, strict=False)]
    return {
        "extent": extent,
        **dict(zip(("truth", "recovered", "difference"), map(png, colour), strict=True)),
    }


def _choose(pictures: Sequence[Row], specs: Sequence[ModalitySpec]) -> list[Row]:
    """Return the pictures to show: the first of every modality, then the second, up to eight."""
    rounds: list[list[Row]] = [[] for _ in range(_KEPT)]
    for spec in specs:
        own: dict[str, Row] = {}
        for picture in pictures:
            if picture["modality"] == spec.name:
                # A record that lost a scan in two scenarios is shown once.
                own.setdefault(picture["record_id"], picture)
        for part, picture in zip(rounds, own.values(), strict=False):
            part.append(picture)
    order = [spec.name for spec in specs]
    chosen = [picture for part in rounds for picture in part][:_MOST_PICTURES]
    return sorted(chosen, key=lambda picture: order.index(picture["modality"]))


def _plot_pictures(path: Path, pictures: Sequence[Row]) -> None:
    """Draw a row per scan: truth, recovery with SYNTHETIC in its pixels, difference."""
    from matplotlib.figure import Figure

    text = words()["recovery"]
    figure = Figure(figsize=(6.4, 0.3 + 1.75 * len(pictures)), layout="constrained")
    panels = figure.subplots(len(pictures), 3, squeeze=False)
    for number, (picture, line) in enumerate(zip(pictures, panels, strict=True)):
        for kind, axes in zip(("truth", "recovered", "difference"), line, strict=True):
            image = _enlarged(picture[kind], picture["extent"])
            axes.imshow(watermark(image) if kind == "recovered" else image)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if number == 0:
                axes.set_title(text[kind], fontsize=9)
        line[0].set_ylabel(
            f"{picture['modality']}\n{picture['record_id']}\n{picture['scenario']}",
            fontsize=8,
            rotation=0,
            ha="right",
            va="center",
        )
    figure.savefig(path, dpi=160)


def _enlarged(address: str, extent: Sequence[float]) -> Array:
    """Return a kept picture as uint8 `(rows, columns, 3)` with square pixels, large enough."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    scale = _PIXELS / max(extent)
    height, width = (max(1, round(scale * side)) for side in extent)
    return np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
