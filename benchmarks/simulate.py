"""How fast the simulator is, and how much evidence its patients carry.

Prints seconds per patient; the Bayes AUROC of modalities and of sets of them (what an ideal
reader of the latents would reach); the AUROC of one hand-made number per latent, measured with the
true lesion mask (is the latent in the pixels?); and the AUROC of cross-validated logistic
regression and gradient boosting on simple summaries of each modality, of all scans and of all
tables (can a plain method find it without the mask?).
Writes the same numbers as CSV with `--csv`.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dymo_med.data.dials import SETTINGS, Dials
from dymo_med.data.simulate import (
    CLASSES,
    DEPICTS,
    MODALITIES,
    TABLES,
    draw_evidence,
    pieces,
    posterior_high,
    simulate,
)

Row = tuple[str, str, float]

SUBSETS = (
    *((name,) for name in MODALITIES),
    ("t1", "t2"),
    ("t2", "flair"),
    ("t1", "t2", "flair"),
    tuple(DEPICTS),
    tuple(TABLES),
    ("flair", *TABLES),
    tuple(n for n in MODALITIES if n != "t1ce"),
    MODALITIES,
)


def cpu_name() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def bayes(draws: int, dials: Dials) -> list[Row]:
    """Return the AUROC of the exact posterior for each subset of complete modalities."""
    generator = np.random.default_rng(0)
    everything = dials.model_copy(update={"missing": 0.0})
    drawn = [draw_evidence(generator, everything) for _ in range(draws)]
    labels = [evidence.label for evidence in drawn]
    rows = []
    for subset in SUBSETS:
        observed = pieces(subset, dials)
        posterior = [posterior_high(e.log_likelihood_ratios, observed, dials) for e in drawn]
        rows.append(("bayes", " ".join(subset), roc_auc_score(labels, posterior)))
    return rows


def standardised(path: Path) -> np.ndarray:
    """Return an image `(V, V, V)` with mean 0 and variance 1 inside the brain, NaN outside."""
    values = np.asarray(nib.load(path).dataobj, dtype=np.float32)
    brain = values[values > 0]
    return np.where(values > 0, (values - brain.mean()) / brain.std(), np.nan)


def summaries(image: np.ndarray) -> list[float]:
    """Return percentiles of an image and of its smoothed version, and shares of outliers."""
    brain = ~np.isnan(image)
    smooth = ndimage.gaussian_filter(np.where(brain, image, 0), 1.0)[brain]
    levels = [0.5, 1, 5, 50, 95, 99, 99.5, 99.9]
    above = [(smooth > level).mean() for level in (1.0, 1.5, 2.0, 3.0)]
    return [*np.percentile(image[brain], levels), *np.percentile(smooth, levels), *above]


def hand_made(images: dict[str, np.ndarray], lesion: np.ndarray) -> dict[str, float]:
    """Return one number per latent, measured with the true lesion `(V, V, V)`."""
    tumour, core = lesion >= 2, lesion == 3
    shell = ndimage.binary_dilation(tumour, iterations=4) & ~tumour
    return {
        "enhancement (t1ce, mean of rim)": np.nanmean(images["t1ce"][lesion == 2]),
        "oedema (flair, mean around tumour)": np.nanmean(images["flair"][shell]),
        "oedema (t2, mean around tumour)": np.nanmean(images["t2"][shell]),
        "oedema (t1, mean around tumour)": np.nanmean(images["t1"][shell]),
        "necrosis (core share of tumour)": core.sum() / tumour.sum(),
        "size (tumour voxels)": tumour.sum(),
    }


PLAIN = {
    "logistic regression": make_pipeline(
        SimpleImputer(), StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)
    ),
    "boosting": HistGradientBoostingClassifier(
        max_iter=100, learning_rate=0.06, max_leaf_nodes=8, min_samples_leaf=10, random_state=0
    ),
}


def cross_validated(name: str, features: pd.DataFrame, labels: np.ndarray) -> float:
    """Return the AUROC of a plain method, ten folds."""
    found = cross_val_predict(PLAIN[name], features, labels, cv=10, method="predict_proba")
    return float(roc_auc_score(labels, found[:, 1]))


def readable(root: Path) -> list[Row]:
    """Return AUROCs of hand-made numbers and of plain methods on a cohort's files."""
    truth = pd.read_csv(root / "truth.csv")
    labels = (truth["label"] == CLASSES[1]).to_numpy().astype(int)
    numbers, tables = [], []
    features: dict[str, list[list[float]]] = {name: [] for name in DEPICTS}
    for record_id in truth["record_id"]:
        folder = root / "patients" / record_id
        images = {name: standardised(folder / f"{name}.nii.gz") for name in DEPICTS}
        lesion = np.asarray(nib.load(root / "truth" / record_id / "lesion.nii.gz").dataobj)
        numbers.append(hand_made(images, lesion))
        for name, image in images.items():
            features[name].append(summaries(image))
        tables.append(pd.read_csv(folder / "ehr.csv"))

    rows = []
    for name, values in pd.DataFrame(numbers).items():
        latent = truth[f"z_{name.split()[0]}"]
        rows.append(("rank correlation with latent", name, abs(values.corr(latent, "spearman"))))
        auroc = roc_auc_score(labels, values)
        rows.append(("hand-made AUROC", name, max(auroc, 1 - auroc)))
    cells = pd.concat(tables, ignore_index=True)
    frames = {name: pd.DataFrame(values) for name, values in features.items()}
    for name, columns in TABLES.items():
        frames[name] = pd.get_dummies(cells[list(columns)], drop_first=True, dtype=float)
    for group in (tuple(DEPICTS), tuple(TABLES)):
        columns = [frames[name].add_prefix(f"{name} ") for name in group]
        frames[" ".join(group)] = pd.concat(columns, axis=1)
    for method in PLAIN:
        for name, frame in frames.items():
            rows.append((f"{method} AUROC", name, cross_validated(method, frame, labels)))
    return rows


def main() -> None:
    """Measure, print, and write CSV if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=200)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--setting", choices=list(SETTINGS), default="default")
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    dials = SETTINGS[options.setting]

    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        root = simulate(
            Path(scratch) / "cohort", options.patients, size=options.size, missing=0, dials=dials
        )
        seconds = (time.perf_counter() - start) / options.patients
        megabytes = sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) / 1e6
        rows: list[Row] = [
            ("seconds per patient", f"{options.size}^3", seconds),
            ("megabytes per patient", f"{options.size}^3", megabytes / options.patients),
            *bayes(options.draws, dials),
            *readable(root),
        ]
    print(f"{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for kind, name, value in rows:
        print(f"{kind:30}  {name:60}  {value:.3f}")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([("measure", "of", "value"), *rows])


if __name__ == "__main__":
    main()
