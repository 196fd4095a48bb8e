"""Every imputer against the floor (the average patient) on one cohort.

    python benchmarks/imputers.py COHORT RECIPE WORK [--imputers mopoe tip ...] [--options FILE]

The recipe is trained once, for the classifier. Then every imputer is trained on the cohort's
training patients with the recipe's `imputer_training` (stopped on validation patients), and
recovers what is hidden from test patients, for all imputers alike:

- *one*: each modality in turn, everything else left;
- *half*, *most*: .5 and .8 of each patient's modalities, at random.

Task fidelity is how often the classifier, trained on real data, keeps its answer when recoveries
replace the truth. An imputer is compared with the floor on what it can recover, patient by
patient; intervals resample patients. Finished imputers are kept in WORK and not trained again.
"""

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning_fabric import Fabric

from dymo_med import load_bundle, read_cohort, train
from dymo_med.bundle import ModelBundle, read_recipe
from dymo_med.data.batch import collate
from dymo_med.data.missingness import apply, parse_scenario
from dymo_med.data.patient import read_record
from dymo_med.files import write_json
from dymo_med.imputers import IMPUTERS, Imputer
from dymo_med.inference.answer import answer
from dymo_med.inference.quality import EVERYTHING, measure
from dymo_med.metrics import bootstrap_means
from dymo_med.training.loop import Log, train_stage
from dymo_med.training.objectives import ImputerObjective
from dymo_med.types import Batch, Cohort, PatientRecord, Split

FLOOR = "template"
RATES = {"half": 0.5, "most": 0.8}
_CHUNK = 16
_KEYS = ("record_id", "patient_id", "modality", "column", "metric", "value")


def read(bundle: ModelBundle, cohort: Cohort, split: Split) -> list[PatientRecord]:
    return [
        record
        for entry in cohort.in_split(split)
        if (
            record := read_record(
                entry, bundle.specs, cohort.missing_values, require_something=False
            )
        ).modalities
    ]


def left_out(whole: PatientRecord, left: PatientRecord) -> bool:
    return len(left.modalities) < len(whole.modalities)


def weights(batch: Batch) -> torch.Tensor:
    """Return `(n,)`: every patient counts the same."""
    own = torch.tensor([1 / batch.patient_ids.count(p) for p in batch.patient_ids])
    return own / own.mean()


def fit(
    name: str,
    options: dict[str, Any],
    bundle: ModelBundle,
    data: dict[Split, Batch],
    recipe: Path,
    work: Path,
) -> tuple[Imputer, float, int]:
    """Return a trained imputer, the CPU seconds it took, and the number of epochs."""
    schedule = read_recipe(recipe).imputer_training
    entry = IMPUTERS[name]
    known = {k: v for k, v in options.items() if k in entry.Options.model_fields}
    validated = entry.Options(**known)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        imputer = entry(bundle.specs, validated)
    began = time.process_time()
    imputer.start_from(data["train"])
    seconds, epochs = time.process_time() - began, 0
    if any(True for _ in imputer.parameters()):
        checkpoint, log = work / f"{name}.safetensors", Log(work / f"{name}.csv")
        note = work / f"{name}-seconds.json"
        began = time.process_time()
        train_stage(
            "imputer",
            ImputerObjective(
                imputer, data["validation"], weights(data["validation"]), torch.device("cpu"), 0
            ),
            data["train"],
            weights(data["train"]),
            schedule,
            0,
            fabric=Fabric(accelerator="cpu", devices=1),
            checkpoint=checkpoint,
            fingerprint=f"{name} {validated!r} {schedule!r} {bundle.bundle_id}",
            log=log,
        )
        if not note.exists():
            write_json(note, {"seconds": time.process_time() - began})
        seconds = json.loads(note.read_text())["seconds"]
        epochs = len(log.stages["imputer"])
    return imputer.eval().requires_grad_(False), seconds, epochs


def recoveries(bundle: ModelBundle, records: list[PatientRecord]) -> tuple[list[Any], float]:
    """Return rows `(setting, record, patient, modality, column, metric, value)` and ms a record."""
    names = [spec.name for spec in bundle.specs]
    settings = [("one", parse_scenario(f"drop:{n}", bundle.specs)) for n in names]
    settings += [(k, parse_scenario(f"rate:{r}", bundle.specs)) for k, r in RATES.items()]
    rows, spent, asked = [], 0.0, 0
    for setting, rule in settings:
        pairs = [(r, apply(rule, r, bundle.specs, 0)) for r in records]
        pairs = [(a, b) for a, b in pairs if b.modalities and left_out(a, b)]
        if setting == "one":
            pairs = [(a, b) for a, b in pairs if set(rule.names) & set(a.modalities)]
        for start in range(0, len(pairs), _CHUNK):
            whole, left = zip(*pairs[start : start + _CHUNK], strict=True)
            truth, answers = answer(bundle, whole), answer(bundle, left)
            began = time.process_time()
            bundle.imputer.recover(answers.batch)
            spent, asked = spent + time.process_time() - began, asked + len(left)
            rows += [
                (setting, *(r[key] for key in _KEYS))
                for r in measure(bundle, rule.text, answers, truth).rows
            ]
    return rows, 1000 * spent / asked


def summary(rows: list[Any], floor: list[Any], images: set[str]) -> dict[str, str]:
    """Return the cells of one imputer's line; fidelity beside the floor's on the same records."""

    def pick(source: list[Any], setting: str, metric: str, group: str) -> dict[Any, float]:
        groups = {"scans": images.__contains__, "*": EVERYTHING.__eq__}
        inside = groups.get(group, lambda n: n not in images and n != EVERYTHING)
        return {
            (s, record, patient, name, column): value
            for s, record, patient, name, column, m, value in source
            if (s, m) == (setting, metric) and inside(name) and np.isfinite(value)
        }

    cells = {}
    for key, metric, group, digits in (
        ("PSNR dB", "psnr", "scans", 2),
        ("SSIM", "ssim", "scans", 3),
        ("NMAE", "nmae", "scans", 3),
        ("MAE SD", "mae_sd", "cells", 3),
        ("right category %", "accuracy", "cells", 1),
        ("category log-loss", "log_loss", "cells", 3),
    ):
        values = list(pick(rows, "one", metric, group).values())
        scale = 100 if metric == "accuracy" else 1
        cells[key] = f"{scale * np.mean(values):.{digits}f}" if values else ""
    for setting, group in (("one", "scans"), ("one", "cells"), ("half", "*"), ("most", "*")):
        for metric, key in (("same_answer", "same %"), ("probability_change", "change")):
            own, theirs = (pick(source, setting, metric, group) for source in (rows, floor))
            both = [k for k in own if k in theirs]
            if not both:
                cells[f"{setting} {group}: {key}"] = ""
                continue
            # A patient may count with several modalities; bootstrap_means averages them first.
            table = np.array([(own[k], theirs[k], own[k] - theirs[k]) for k in both])
            found = bootstrap_means(table, [k[2] for k in both])
            gap = found[2]
            cells[f"{setting} {group}: {key}"] = (
                f"{100 * found[0].value:.1f} / {100 * found[1].value:.1f}"
                f" ({100 * gap.value:+.1f}, {100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
            )
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cohort", type=Path)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--imputers", nargs="+", default=list(IMPUTERS))
    parser.add_argument(
        "--options", type=Path, help="YAML: options by imputer; `all` for those that know them."
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = yaml.safe_load(arguments.options.read_text()) if arguments.options else {}
    if not (arguments.work / "run" / "bundle").is_dir():
        train(arguments.recipe, arguments.cohort, arguments.work / "run", resume=True, device="cpu")
    bundle = load_bundle(arguments.work / "run" / "bundle", "cpu")
    cohort = read_cohort(arguments.cohort)
    data = {
        split: collate(read(bundle, cohort, split), bundle.specs)
        for split in ("train", "validation")
    }
    test = read(bundle, cohort, "test")
    images = {spec.name for spec in bundle.specs if not spec.columns}
    chosen = [FLOOR, *(n for n in arguments.imputers if n != FLOOR)]
    lines: dict[str, dict[str, str]] = {}
    floor: list[Any] = []
    for name in chosen:
        given = {**options.get("all", {}), **options.get(name, {})}
        imputer, seconds, epochs = fit(name, given, bundle, data, arguments.recipe, arguments.work)
        # What it declares, asked of a patient who lacks one thing.
        lacking = ~torch.eye(len(bundle.specs), dtype=torch.bool)
        if not bool(imputer.recoverable(lacking).diagonal().any()):
            print(f"{name}: recovers nothing of this cohort", flush=True)
            continue
        rows, each = recoveries(replace(bundle, imputer=imputer), test)
        if name == FLOOR:
            floor = rows
        lines[name] = {
            "train s": f"{seconds:.0f}",
            "epochs": str(epochs),
            "recover ms": f"{each:.1f}",
            **summary(rows, floor, images),
        }
        write_json(arguments.work / f"{name}-line.json", lines[name])
        print(name, json.dumps(lines[name]), flush=True)
    print(f"\n{cohort.name}: {len(data['train'])} training and {len(test)} test records")
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}, seconds of CPU time\n")
    columns = [c for c in lines[FLOOR] if any(line[c] for line in lines.values())]
    print("| imputer | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, line in lines.items():
        print(f"| {name} | " + " | ".join(line[c] for c in columns) + " |")


if __name__ == "__main__":
    main()
