"""Does evaluating cost the same per patient, and the same memory, whatever the cohort's size?

    python benchmarks/evaluation.py WORK [--sizes 200 2000] [--missing as-is --missing rate:0.5]

Makes patients with two pictures and two tables on the spot, trains a tiny bundle on other ones of
the same kind, and evaluates test splits of every size with `reports=0`, each in a process of its
own. Times are of the processor: *answering* per patient (all scenarios and methods), the lower
quartile over batches, which other processes disturb least; *tables* all that comes after the last
batch: metrics, plots, the page. *wall* is by the clock, from start to end. *memory* is the most
that the process ever held (`ru_maxrss`), libraries included. Patients and bundle are kept in WORK
and not made again.
"""

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

OTHERS = {"train": 120, "validation": 30, "calibration": 60}
SIDE = 32
SCENARIOS = ("as-is", "rate:0.5", "drop:film", "mcar:0.4")

# Read as YAML, of which JSON is a part: nothing heavy is imported here, because a process's
# ru_maxrss starts from that of the process which started it.
COHORT = {
    "name": "benchmark",
    "description": "Made on the spot; for timing only.",
    "task": {"type": "classification", "target": "grade", "classes": ["low", "high"]},
    "modalities": {
        "film": {"kind": "image", "dims": 2, "file": "film.png", "size": [SIDE, SIDE]},
        "scan": {"kind": "image", "dims": 2, "file": "scan.png", "size": [SIDE, SIDE]},
        "demographics": {
            "kind": "table",
            "file": "ehr.csv",
            "columns": {
                "age": {"type": "continuous", "unit": "years", "range": [0, 120]},
                "sex": {"type": "categorical", "values": ["F", "M"]},
            },
        },
        "labs": {
            "kind": "table",
            "file": "ehr.csv",
            "columns": {
                "ldh": {"type": "continuous", "unit": "U/L", "range": [0, 2000]},
                "crp": {"type": "continuous", "unit": "mg/L", "range": [0, 500]},
            },
        },
    },
    "subgroups": {"sex": {"column": "sex"}, "age": {"column": "age", "edges": [50]}},
}
RECIPE = {
    "name": "benchmark",
    "description": "Hardly trained; for timing only.",
    "imputer": {"name": "mopoe", "latent": 8, "dim": 16, "width": 4, "grid": 2, "hidden": 16},
    "backbone": {
        "name": "transformer",
        "dim": 16,
        "heads": 2,
        "layers": 1,
        "projection": 8,
        "width": 4,
        "grid": 2,
    },
    "comparators": [{"name": "moddrop", "dim": 16, "width": 4, "grid": 2}],
    "imputer_training": {"epochs": 3, "batch_size": 16},
    "backbone_training": {"epochs": 4, "batch_size": 16, "subsets": 3},
}


def write_patient(folder: Path, number: int, high: bool) -> None:
    """Write one patient; about a quarter of the films and of the laboratory values are absent."""
    rng = np.random.default_rng(number)
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    for name, lacking in (("film", 0.25), ("scan", 0.0)):
        spot = (rows - 16) ** 2 + (columns - 12) ** 2 < (90 if high else 40)
        grey = 70 + 60 * spot + rng.normal(0, 30, spot.shape)
        if rng.random() >= lacking:
            picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
            picture.save(folder / f"{name}.png", compress_level=1)
    labs = (f"{rng.normal(260 + 60 * high, 70):.1f}", f"{abs(rng.normal(20, 15)):.1f}")
    cells = [f"{rng.normal(55, 12):.0f}", str(rng.choice(["F", "M"]))]
    cells += labs if rng.random() >= 0.25 else ("", "")
    (folder / "ehr.csv").write_text("age,sex,ldh,crp\n" + ",".join(cells) + "\n")


def write_cohorts(work: Path, sizes: list[int]) -> dict[int, Path]:
    """Write one folder of patients and a description per size; return the descriptions."""
    splits = [split for split, count in OTHERS.items() for _ in range(count)]
    splits += ["test"] * max(sizes)
    lines = []
    for number, split in enumerate(splits):
        patient, high = f"p{number:05d}", bool(number * 7919 % 5 < 2)
        lines.append((patient, "high" if high else "low", split))
        if not (work / "patients" / patient / "ehr.csv").exists():
            write_patient(work / "patients" / patient, number, high)
    found = {}
    for size in sizes:
        some = lines[: sum(OTHERS.values()) + size]
        files = {"labels": f"labels-{size}.csv", "splits": f"splits-{size}.csv"}
        text = "\n".join(f"{p},{label}" for p, label, _ in some)
        (work / files["labels"]).write_text(f"patient_id,grade\n{text}\n")
        text = "\n".join(f"{p},{split}" for p, _, split in some)
        (work / files["splits"]).write_text(f"patient_id,split\n{text}\n")
        found[size] = work / f"cohort-{size}.yaml"
        found[size].write_text(json.dumps({**COHORT, **files}, indent=1))
    return found


def train_it(work: Path, cohort: Path) -> None:
    """Train the bundle. Runs in a process of its own."""
    from dymo_med import train

    (work / "recipe.yaml").write_text(json.dumps(RECIPE, indent=1))
    shutil.rmtree(work / "run", ignore_errors=True)
    train(work / "recipe.yaml", cohort, work / "run", device="cpu")


def evaluate_it(work: Path, cohort: Path, scenarios: list[str]) -> None:
    """Evaluate and print what it took as JSON. Runs in a process of its own."""
    import torch

    from dymo_med import evaluate, load_bundle, read_cohort

    torch.set_num_threads(1)
    out = work / f"evaluation-{cohort.stem}"
    shutil.rmtree(out, ignore_errors=True)
    ticks: list[tuple[float, int]] = []
    began = time.perf_counter()
    clock = time.process_time
    result = evaluate(
        load_bundle(work / "run" / "bundle", "cpu"),
        read_cohort(cohort),
        out,
        scenarios=scenarios,
        reports=0,
        progress=lambda done, _: ticks.append((clock(), done)),
    )
    ended = clock()
    batches = ticks[len(scenarios) - 1 :: len(scenarios)]  # when all scenarios of one were done
    each = [len(scenarios) * (t1 - t0) / (n1 - n0) for (t0, n0), (t1, n1) in pairwise(batches[:-1])]
    figures = {
        "patients": result.records,
        "answering": float(np.percentile(each, 25)),
        "tables": ended - ticks[-1][0],
        "wall": time.perf_counter() - began,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--missing", action="append")
    parser.add_argument("--child", choices=("train", "evaluate"), help=argparse.SUPPRESS)
    parser.add_argument("--cohort", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scenarios = arguments.missing or list(SCENARIOS)
    if arguments.child == "train":
        train_it(arguments.work, arguments.cohort)
        return
    if arguments.child == "evaluate":
        evaluate_it(arguments.work, arguments.cohort, scenarios)
        return
    cohorts = write_cohorts(arguments.work, arguments.sizes)

    def child(kind: str, cohort: Path) -> str:
        command = [sys.executable, __file__, str(arguments.work), "--child", kind]
        command += ["--cohort", str(cohort), *(f"--missing={s}" for s in scenarios)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    if not (arguments.work / "run" / "bundle").exists():
        child("train", cohorts[arguments.sizes[0]])
    print(f"{platform.processor() or platform.machine()}, one thread; {', '.join(scenarios)}")
    print("patients  answering ms/patient  tables s  wall ms/patient  memory MB")
    found = []
    for size in arguments.sizes:
        f = json.loads(child("evaluate", cohorts[size]).splitlines()[-1])
        found.append(f)
        print(
            f"{f['patients']:8d}  {1000 * f['answering']:20.1f}  {f['tables']:8.1f}"
            f"  {1000 * f['wall'] / f['patients']:15.1f}  {f['memory_mb']:9.0f}",
            flush=True,
        )
    first, last = found[0], found[-1]
    print(
        f"ratio, {last['patients']} to {first['patients']} patients:"
        f" answering {last['answering'] / first['answering']:.2f},"
        f" memory {last['memory_mb'] / first['memory_mb']:.2f}"
    )


if __name__ == "__main__":
    main()
