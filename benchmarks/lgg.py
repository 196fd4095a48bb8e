"""Outlines of real gliomas by subset of scans; what sharing, decoupling and synthesis pay.

    python benchmarks/lgg.py SOURCE WORK [--seeds 0 1 2] [--methods shared gmd each synthesis]

SOURCE is laid out as cohorts/lgg/README.md describes. Per seed patients are split anew
(`prepare.py --seed`), trained on the same seed and evaluated on the test split, on the scan's own
grid, every subset of what a patient has. What is there already is not done again: the run can be
interrupted, and more seeds added. Then a table of all seeds found: a patient who was a test patient
of several seeds is averaged first; 95 % intervals resample patients.

- *shared*: configs/lgg-outline.yaml, one network for all scans, mean of the losses of the subsets.
- *gmd*: the same with `gradient: gmd`.
- *each*: the same network, one for each subset, trained and asked with exactly these scans.
- *synthesis*: *shared* with an imputer; rows `trust_all`, `dymo` and `oracle` beside
  `observed_only`.

Full size takes about an hour per network and seed on one CPU core.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import platform
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import yaml

from dymo_med import evaluate_segmentation, load_segmentation_bundle, read_cohort, train
from dymo_med.metrics import bootstrap_means

ROOT = Path(__file__).resolve().parents[1]
SCANS = ("flair", "t1", "t1ce")
SUBSETS = [c for n in (1, 2, 3) for c in combinations(SCANS, n)]
CHANGES = {
    "shared": {},
    "gmd": {"gradient": "gmd", "clip_gradients": None},
    "each": {"subsets": 1},
    "synthesis": {},
}


def run(cohort: Path, recipe: Path, out: Path, seed: int, scenarios: tuple[str, ...]) -> Path:
    """Train and evaluate what is not there yet; return the table of cases."""
    if not (out / "evaluation" / "run.json").is_file():
        began = time.process_time()
        bundle = train(recipe, cohort, out / "run", seed=seed, device="cpu", resume=True)
        evaluate_segmentation(
            load_segmentation_bundle(bundle, "cpu"),
            read_cohort(cohort),
            out / "evaluation",
            scenarios=scenarios,
            resume=True,
        )
        print(f"{out}: {time.process_time() - began:.0f} s of CPU", flush=True)
    return out / "evaluation" / "cases.csv"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(CHANGES), default=list(CHANGES))
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs" / "lgg-outline.yaml")
    given = parser.parse_args()
    spec = importlib.util.spec_from_file_location(
        "prepare", ROOT / "cohorts" / "lgg" / "prepare.py"
    )
    assert spec is not None and spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    given.work.mkdir(parents=True, exist_ok=True)
    rows: dict[tuple[str, str], list[tuple[str, float, float, bool]]] = {}

    def take(name: str, path: Path, only: str = "") -> None:
        with path.open(encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                if row["method"] == "observed_only" and only in ("", row["observed"]):
                    key = name, row["observed"]
                elif row["method"] != "observed_only" and row["scenario"].startswith("drop"):
                    key = f"{name}: {row['method']}", row["observed"]
                else:
                    continue
                missed = row["outcome"] == "missed"
                values = float(row["dice"]), float(row["hd95_mm"]), missed
                rows.setdefault(key, []).append((row["patient_id"], *values))

    for seed in given.seeds:
        place = given.work / f"seed-{seed}"
        if not (place / "cohort").is_dir():
            place.mkdir(exist_ok=True)
            prepare.prepare(given.source, place / "cohort", seed)
        described = yaml.safe_load((place / "cohort" / "cohort.yaml").read_text())
        for method in given.methods:
            plan = yaml.safe_load(given.recipe.read_text())
            plan["name"] = f"lgg-{method}"
            plan["backbone_training"] |= CHANGES[method]
            scenarios: tuple[str, ...] = ("subsets",)
            if method == "synthesis":
                plan["imputer"] = {"name": "synthesis", "width": 16, "levels": 2, "patch": 32}
                plan["imputer_training"] = {"epochs": 60, "batch_size": 2, "learning_rate": 0.002}
                scenarios = (
                    "drop:flair",
                    "drop:t1",
                    "drop:t1ce",
                    "drop:t1,t1ce",
                    "drop:flair,t1ce",
                )
            recipe = place / f"{method}.yaml"
            recipe.write_text(yaml.safe_dump(plan, sort_keys=False))
            if method != "each":
                out = place / method
                take(method, run(place / "cohort", recipe, out, seed, scenarios))
                continue
            for kept in SUBSETS:
                name = "+".join(kept)
                part = {s: m for s, m in described["modalities"].items() if s in kept}
                cohort = place / "cohort" / f"cohort-{name}.yaml"
                cohort.write_text(yaml.safe_dump(described | {"modalities": part}, sort_keys=False))
                take(method, run(cohort, recipe, place / "each" / name, seed, ("as-is",)), name)

    seeds = ", ".join(map(str, given.seeds))
    print(f"\nseeds {seeds}; {platform.machine()}, torch {torch.__version__}")
    print("\n| scans | method | Dice | HD95, mm | missed | patients |\n|---|---|---|---|---|---|")
    for subset in ["+".join(kept) for kept in SUBSETS]:
        for (method, observed), found in rows.items():
            if observed != subset:
                continue
            owners = [patient for patient, *_ in found]
            values = np.array([[dice, distance] for _, dice, distance, _ in found])
            d, h = bootstrap_means(values, owners)
            missed = f"{sum(m for *_, m in found)} of {len(found)}"
            print(
                f"| {subset} | {method} | {d.value:.3f} ({d.low:.3f} to {d.high:.3f})"
                f" | {h.value:.0f} ({h.low:.0f} to {h.high:.0f}) | {missed} | {len(set(owners))} |"
            )


if __name__ == "__main__":
    main()
