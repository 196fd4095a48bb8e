"""Train one recipe with several seeds, evaluate each, and print mean, lowest and highest.

python benchmarks/seeds.py RECIPE COHORT OUT --seeds 5 --missing as-is --missing rate:0.5
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
    arguments = parser.parse_args()
    metrics = arguments.metric or ["auroc", "log_loss"]
    scenarios = tuple(arguments.missing or ["as-is"])
    found: dict[tuple[str, str, str], list[float]] = {}
    for seed in range(arguments.seeds):
        out = arguments.out / f"seed-{seed}"
        began = time.perf_counter()
        bundle = train(
            arguments.recipe, arguments.cohort, out / "run", seed=seed, device="cpu", resume=True
        )
        seconds = time.perf_counter() - began
        loaded = load_bundle(bundle, "cpu")
        evaluate(
            loaded,
            read_cohort(arguments.cohort),
            out / "evaluation",
            scenarios=scenarios,
            reports=0,
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
        print(f"seed {seed}: trained in {seconds:.0f} s; default {picked}", flush=True)
    print(f"\n{platform.processor() or platform.machine()}, torch {torch.__version__}")
    print(f"{arguments.seeds} seeds of training: mean (lowest to highest)\n")
    print("| scenario | method | metric | value |\n|---|---|---|---|")
    for (scenario, method, metric), values in found.items():
        mean = sum(values) / len(values)
        spread = f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"
        print(f"| {scenario} | {method} | {metric} | {spread} |")


if __name__ == "__main__":
    main()
