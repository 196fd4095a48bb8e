"""Do explanations point to what is known to be true of simulated patients?

    python benchmarks/explain.py BUNDLE COHORT [--patients 40] [--csv FILE]

For test patients of a cohort with `truth.csv`, whom the bundle was not made from:

- *modalities*: is the measured modality with the largest Shapley value the one that tells an ideal
  reader most? In two senses of "most": the largest log-odds of the modality alone, and the largest
  Shapley value of the exact posterior of the cells and latents that were recorded (same game, same
  players, the ideal reader's probability instead of the network's; recovered modalities left
  out). Chance: the truth of another patient, averaged over all others who have the modality;
  which keeps what is informative for everybody. Also how the values themselves correlate.
- *voxels*: how much of a scan's saliency (absolute value, smoothed as on the page) lies in the true
  lesion, and does its peak? Chance: the lesion's share of the body; the lesions of the other
  patients; and for the share, that of the scan's own absolute intensity, by which integrated
  gradients from an empty image are multiplied.

Intervals are 95 %: percentiles of 2000 resamples of patients. *odds* is the share of saliency in
the lesion divided by the share of the body that is lesion.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Sequence
from itertools import combinations
from math import factorial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from simulate import cpu_name

from dymo_med import load_bundle, read_cohort
from dymo_med.bundle import ModelBundle, hashed_id
from dymo_med.data.patient import read_record
from dymo_med.data.simulate import DEPICTS, pieces, posterior_high
from dymo_med.inference.answer import answer, explain_record
from dymo_med.inference.pictures import SIGMA
from dymo_med.types import Cohort, CohortRecord

DRAWS = 2000


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of one number per patient, NaN left out, and its interval."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if not len(values):
        return (np.nan,) * 3
    generator = np.random.default_rng(0)
    means = values[generator.integers(0, len(values), (DRAWS, len(values)))].mean(1)
    return values.mean(), *np.percentile(means, [2.5, 97.5])


def ideal_shapley(ratios: dict[str, float], players: list[str], blank: set[str]) -> dict:
    """Return each modality's Shapley value for the exact probability of high grade."""

    def worth(names: tuple[str, ...]) -> float:
        return posterior_high(ratios, [p for p in pieces(names) if p not in blank])

    n = len(players)
    found = {}
    for player in players:
        others = [p for p in players if p != player]
        found[player] = sum(
            factorial(size)
            * factorial(n - size - 1)
            / factorial(n)
            * (worth((*some, player)) - worth(some))
            for size in range(n)
            for some in combinations(others, size)
        )
    return found


def lesion_of(cohort: Path, record_id: str) -> np.ndarray:
    """Return the true lesion, oedema included, in the axes of the network's input (RAS)."""
    image = nib.as_closest_canonical(nib.load(cohort / "truth" / record_id / "lesion.nii.gz"))
    return np.asarray(image.dataobj) > 0


def measure(
    bundle: ModelBundle, cohort: Cohort, records: Sequence[CohortRecord], truth: pd.DataFrame
) -> list[dict]:
    """Return what is known of each record, and what its explanation says."""
    rows = []
    for entry in records:
        record_id = entry.record_id
        record = read_record(entry, bundle.specs, cohort.missing_values)
        answers = answer(bundle, [record])
        explanation = explain_record(bundle, answers, 0, seed=0)
        line = truth.loc[record_id]
        sign = 1 if int(answers.own.output.logits[0].argmax()) else -1
        players = [n for n in answers.own.names if n in record.modalities]
        blank = set(str(line["blank"]).split()) if isinstance(line["blank"], str) else set()
        ratios = {n[4:]: v for n, v in line.items() if n.startswith("llr_")}
        ideal = ideal_shapley(ratios, players, blank)
        alone = {
            n: posterior_high(ratios, [p for p in pieces([n]) if p not in blank]) for n in players
        }
        own = {a.modality: a.value for a in explanation.attributions if not a.name}
        maps = {} if explanation.saliency is None else explanation.saliency.maps
        rows.append(
            {
                "record": record_id,
                "own": {n: own[n] for n in players},
                "ideal": {n: sign * v for n, v in ideal.items()},
                "alone": {n: sign * float(np.log(p / (1 - p))) for n, p in alone.items()},
                "lesion": lesion_of(cohort.root, record_id),
                "heat": {
                    n: gaussian_filter(np.abs(m.cpu().numpy()), SIGMA) for n, m in maps.items()
                },
                "scans": {n: answers.batch.values[n][0, 0].cpu().numpy() for n in maps},
            }
        )
    return rows


def tops(values: dict[str, float], among: list[str]) -> set[str]:
    """Return the names of the largest value in size; T2 and FLAIR tell an ideal reader the same."""
    largest = max(abs(values[n]) for n in among)
    return {n for n in among if abs(values[n]) >= largest - 1e-9}


def modalities(rows: list[dict], truth: str) -> list[tuple[str, np.ndarray]]:
    """Return whether the top modality is right, patient by patient, and by chance."""
    hit, chance, uniform, correlation = [], [], [], []
    for row in rows:
        players = list(row["own"])
        named = min(tops(row["own"], players))
        right = tops(row[truth], players)
        hit.append(named in right)
        others = [r for r in rows if r is not row and set(players) <= set(r["own"])]
        chance.append(np.mean([named in tops(r[truth], players) for r in others] or [np.nan]))
        uniform.append(len(right) / len(players))
        pair = [[row[key][n] for n in players] for key in ("own", truth)]
        correlation.append(pd.Series(pair[0]).corr(pd.Series(pair[1]), "spearman"))
    hit, chance = np.array(hit, float), np.array(chance)
    return [
        ("top modality is right", hit),
        ("by chance: truth of others", chance),
        ("by chance: uniform", np.array(uniform)),
        ("difference to others", hit - chance),
        ("rank correlation within a patient", np.array(correlation)),
    ]


def voxels(rows: list[dict], names: list[str]) -> list[tuple[str, np.ndarray]]:
    """Return how a scan's saliency, or that of all scans together, meets the lesion."""
    found = {key: [] for key in ("peak", "share", "area", "others", "peak_others", "grey")}
    for row in rows:
        shown = [n for n in names if n in row["heat"]]
        if not shown:
            continue
        body = np.any([row["scans"][n] != 0 for n in shown], axis=0)
        heat = np.sum([row["heat"][n] for n in shown], axis=0) * body
        grey = np.sum([np.abs(row["scans"][n]) for n in shown], axis=0)
        peak = np.unravel_index(int(heat.argmax()), heat.shape)
        lesion = row["lesion"] & body
        elsewhere = [r["lesion"] for r in rows if r is not row]
        found["peak"].append(lesion[peak])
        found["peak_others"].append(np.mean([other[peak] for other in elsewhere]))
        found["share"].append(heat[lesion].sum() / heat.sum())
        found["others"].append(np.mean([heat[o & body].sum() for o in elsewhere]) / heat.sum())
        found["area"].append(lesion.sum() / body.sum())
        found["grey"].append(grey[lesion].sum() / grey.sum())
    a = {key: np.array(values, float) for key, values in found.items()}
    return [
        ("peak in the lesion", a["peak"]),
        ("by chance: lesions of others", a["peak_others"]),
        ("by chance: lesion's share of the body", a["area"]),
        ("peak: difference to others", a["peak"] - a["peak_others"]),
        ("share of saliency in the lesion", a["share"]),
        ("by chance: lesions of others", a["others"]),
        ("by chance: share of the intensity", a["grey"]),
        ("share: difference to others", a["share"] - a["others"]),
        ("odds", a["share"] / a["area"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--patients", type=int, default=40)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bundle, cohort = load_bundle(arguments.bundle, "cpu"), read_cohort(arguments.cohort)
    truth = pd.read_csv(arguments.cohort / "truth.csv").set_index("record_id")
    seen = {p for split in bundle.provenance["patients"].values() for p in split}
    test = cohort.in_split("test")
    unseen = [r for r in test if hashed_id(bundle.name, r.patient_id) not in seen]
    records = unseen[: arguments.patients]
    began = time.perf_counter()
    rows = measure(bundle, cohort, records, truth)
    seconds = (time.perf_counter() - began) / len(rows)
    print(
        f"{cpu_name()}, one thread; {len(rows)} patients, {seconds:.1f} s each; selector "
        f"{bundle.choice.name}"
    )
    table = []
    for title, key in (("modality alone", "alone"), ("ideal reader's Shapley values", "ideal")):
        table += [(title, *line) for line in modalities(rows, key)]
    table += [("all scans", *line) for line in voxels(rows, list(DEPICTS))]
    for name in DEPICTS:
        table += [(name, *line) for line in voxels(rows, [name])]
    lines = []
    for title, what, values in table:
        mean, low, high = interval(values)
        lines.append((title, what, np.isfinite(values).sum(), mean, low, high))
        print(f"{title:30s} {what:40s} {mean:7.3f} ({low:.3f} to {high:.3f})")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(("about", "figure", "patients", "mean", "low", "high"))
            writer.writerows(lines)


if __name__ == "__main__":
    main()
