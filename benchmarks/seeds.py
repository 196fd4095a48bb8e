"""Train one recipe with several seeds, evaluate each, and print mean, lowest and highest.

python benchmarks/seeds.py RECIPE COHORT OUT --seeds 5 --missing as-is --missing rate:0.5

With `--against OTHER_RECIPE` bundles of that recipe, of the same seeds, are set beside it.
"""

import argparse
import csv
import platform
import time
from pathlib import Path

import torch

from dymo_med import evaluate, load_bundle, read_cohort, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--missing", action="append", default=None)
    parser.add_argument("--metric", action="append", default=None)
    parser.add_argument("--against", action="append", type=Path, default=[])
    arguments = parser.parse_args()
    metrics = arguments.metric or ["auroc", "log_loss"]
    scenarios = tuple(arguments.missing or ["as-is"])
    found: dict[tuple[str, str, str], list[float]] = {}
    for seed in range(arguments.seeds):
        out = arguments.out / f"seed-{seed}"
        bundles, seconds = [], []
        for recipe in (arguments.recipe, *arguments.against):
            began = time.perf_counter()
            # The run of the recipe itself keeps its place, whatever it is set beside.
            run = out / ("run" if recipe == arguments.recipe else f"run-{recipe.stem}")
            bundle = train(recipe, arguments.cohort, run, seed=seed, device="cpu", resume=True)
            seconds.append(f"{time.perf_counter() - began:.0f} s")
            bundles.append(load_bundle(bundle, "cpu"))
        loaded, *others = bundles
        evaluate(
            loaded,
            read_cohort(arguments.cohort),
            out / "evaluation",
            scenarios=scenarios,
            reports=0,
            against=others,
        )
        with (out / "evaluation" / "metrics.csv").open(newline="") as stream:
            for row in csv.DictReader(stream):
                if row["metric"] in metrics:
                    names = [row["method"]]
                    # Which selector is the default may differ from seed to seed.
                    if row["method"] == loaded.choice.name:
                        names.append("the default")
                    for name in names:
                        key = (row["scenario"], name, row["metric"])
                        found.setdefault(key, []).append(float(row["value"]))
        picked = f"{loaded.choice.name}. {loaded.choice.why}"
        print(f"seed {seed}: trained in {', '.join(seconds)}; default {picked}", flush=True)
    print(f"\n{platform.processor() or platform.machine()}, torch {torch.__version__}")
    print(f"{arguments.seeds} seeds of training: mean (lowest to highest)\n")
    print("| scenario | method | metric | value |\n|---|---|---|---|")
    for (scenario, method, metric), values in found.items():
        mean = sum(values) / len(values)
        spread = f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"
        print(f"| {scenario} | {method} | {metric} | {spread} |")


if __name__ == "__main__":
    main()
