"""What each selector does with good and with bad recoveries, on PolyMNIST.

    python benchmarks/polymnist.py MNIST_FOLDER WORK [--seed-list 0 1 2]

Per seed: samples are drawn (splits share no digit image), an imputer and a backbone per distance
are trained, and every selector is fitted on the calibration split and scored on the test split,
with exactly eta x 5 modalities missing per sample. Recoveries come from

- the trained imputer, and
- a *recovery of known reliability p*: each missing cell is a real training picture of that
  modality, of the right class with probability p, of another class otherwise.

What is finished stays in WORK and is not computed again; several processes may share the work by
taking different seeds. Prints Markdown tables and writes `results.csv`.
"""

import argparse
import importlib.util
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import Tensor

from dymo_med.backbones import BACKBONES, EncodedVersions, FusionBackbone, encode_versions
from dymo_med.config import BackboneTraining, Schedule
from dymo_med.files import write_json
from dymo_med.imputers import IMPUTERS, Imputer
from dymo_med.selection import SELECTORS, fit_statistics
from dymo_med.selection.base import NoOptions
from dymo_med.training.calibration import fit_temperature
from dymo_med.training.loop import Log, train_stage
from dymo_med.training.objectives import (
    FusionObjective,
    ImputerObjective,
    encode_all,
    sampled_subsets,
    subset_logits,
)
from dymo_med.training.selectors import (
    calibration_cases,
    choose,
    fit_all,
    held_out,
    remember,
)
from dymo_med.types import Batch, ModalityMask, ModalitySpec, SubsetStatistics

ROOT = Path(__file__).resolve().parents[1]
COUNTS = {"train": 7000, "validation": 500, "calibration": 1000, "test": 1500}
CALIBRATED = 500  # samples that selectors are fitted on, each with several things hidden
ETAS = (0.2, 0.4, 0.6, 0.8)
RELIABILITIES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
NAMES = tuple(f"m{i}" for i in range(5))
SPECS = tuple(ModalitySpec(n, "image", f"{n}.png", (3, 28, 28), (), "none") for n in NAMES)
BACKBONE = {"dim": 128, "heads": 4, "layers": 2, "projection": 64, "width": 16, "grid": 2}
IMPUTER = {"latent": 64, "map_channels": 0, "width": 16, "grid": 2, "dim": 32, "beta": 0.1}
BACKBONE_TRAINING = BackboneTraining(
    epochs=12,
    batch_size=128,
    learning_rate=1e-3,
    patience=12,
    decay="cosine",
    augmentation={"shift_voxels": 2, "intensity": 0.05},
)
IMPUTER_TRAINING = Schedule(epochs=20, batch_size=128, learning_rate=1e-3, decay="cosine")


def make_data(mnist: Path, seed: int) -> dict[str, Batch]:
    """Return the samples of each split, as `cohorts/polymnist/prepare.py` draws them."""
    spec = importlib.util.spec_from_file_location(
        "prepare", ROOT / "cohorts" / "polymnist" / "prepare.py"
    )
    assert spec is not None and spec.loader is not None
    prepare: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    images, labels = prepare.read_digits(mnist)
    generator = prepare.np.random.default_rng(seed)
    parts = prepare.partition(labels, COUNTS, generator)
    photographs = list(prepare.read_backgrounds().values())
    data = {}
    for split, count in COUNTS.items():
        pictures = torch.empty(5, count, 3, 28, 28)
        classes = torch.empty(count, dtype=torch.int64)
        for i, (label, places) in enumerate(prepare.draw(count, parts[split], generator)):
            classes[i] = label
            for m, (digit, row, column) in enumerate(places):
                painted = prepare.paint(images[digit], photographs[m], row, column)
                pictures[m, i] = torch.from_numpy(painted.copy()).permute(2, 0, 1) / 255
        ids = tuple(f"{split}-{i}" for i in range(count))
        everything = ModalityMask(NAMES, torch.ones(count, 5, dtype=torch.bool))
        data[split] = Batch(
            ids, ids, dict(zip(NAMES, pictures, strict=True)), everything, {}, classes
        )
    return data


def ones(batch: Batch) -> Tensor:
    return torch.ones(len(batch))


def train_backbone(data: dict[str, Batch], distance: str, seed: int, work: Path) -> FusionBackbone:
    entry = BACKBONES["transformer"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = entry(SPECS, 10, entry.Options(**BACKBONE, distance=distance))
    objective = FusionObjective(
        backbone,
        10,
        BACKBONE_TRAINING,
        data["validation"],
        ones(data["validation"]),
        torch.device("cpu"),
        seed,
    )
    run_stage(f"backbone-{distance}", objective, data["train"], BACKBONE_TRAINING, seed, work)
    return backbone.eval().requires_grad_(False)


def train_imputer(data: dict[str, Batch], seed: int, work: Path) -> Imputer:
    entry = IMPUTERS["mopoe"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        imputer = entry(SPECS, entry.Options(**IMPUTER))
    imputer.start_from(data["train"])
    objective = ImputerObjective(
        imputer, data["validation"], ones(data["validation"]), torch.device("cpu"), seed
    )
    run_stage("imputer", objective, data["train"], IMPUTER_TRAINING, seed, work)
    return imputer.eval().requires_grad_(False)


def run_stage(
    name: str, objective: Any, data: Batch, schedule: Schedule, seed: int, work: Path
) -> None:
    train_stage(
        name,
        objective,
        data,
        ones(data),
        schedule,
        seed,
        fabric=Fabric(accelerator="cpu", devices=1),
        checkpoint=work / f"{name}.safetensors",
        fingerprint=f"{name} {schedule!r} {BACKBONE} {IMPUTER}",
        log=Log(work / f"{name}.csv"),
        progress=lambda stage, epoch, epochs, row: print(
            f"{work.name} {stage} {epoch}/{epochs} "
            + " ".join(f"{k}={v:.4g}" for k, v in row.items()),
            flush=True,
        ),
    )


class KnownReliability(Imputer):
    """Each missing cell becomes a real training picture of that modality.

    It shows the right class with probability p, and any of the other classes otherwise. Draws
    depend on seed, sample and modality alone, and those that are right at p stay right above.
    """

    Options = NoOptions
    probabilistic = False

    def __init__(self, p: float, data: dict[str, Batch], seed: int) -> None:
        super().__init__(SPECS, NoOptions())
        self.specs, self.p = SPECS, p
        self.pool = data["train"]
        self.members = [(self.pool.labels == k).nonzero().squeeze(1) for k in range(10)]
        g = torch.Generator().manual_seed(seed)
        self.luck = {s: torch.rand(3, COUNTS[s], 5, generator=g) for s in ("calibration", "test")}

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        raise TypeError("Nothing to train.")

    def classes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the class that each recovery shows `(B, 5)`, and where in that class it lies."""
        split = batch.record_ids[0].split("-")[0]
        rows = torch.tensor([int(i.split("-")[1]) for i in batch.record_ids])
        right, other, place = self.luck[split][:, rows]
        label = batch.labels[:, None].expand(-1, 5)
        wrong = (label + 1 + (other * 9).long()) % 10
        return torch.where(right < self.p, label, wrong), place

    def propose(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        classes, place = self.classes(batch)
        proposals = {}
        for m, name in enumerate(NAMES):
            if name in wanted:
                index = torch.stack(
                    [
                        self.members[k][int(x * len(self.members[k]))]
                        for k, x in zip(classes[:, m].tolist(), place[:, m].tolist(), strict=True)
                    ]
                )
                proposals[name] = self.pool.values[name][index]
        return proposals


def missing_at(batch: Batch, eta: float, seed: int) -> Batch:
    """Return the samples with exactly eta x 5 modalities missing, at random places."""
    g = torch.Generator().manual_seed(round(1000 * eta) + seed)
    rank = torch.rand(len(batch), 5, generator=g).argsort(1).argsort(1)
    return replace(batch, observed=ModalityMask(NAMES, rank >= round(5 * eta)))


@torch.no_grad()
def score(
    data: dict[str, Batch],
    backbone: FusionBackbone,
    statistics: SubsetStatistics,
    temperature: float,
    imputer: Imputer,
    seed: int,
) -> dict[str, Any]:
    """Fit every selector on calibration samples and score it on test samples."""
    cpu = torch.device("cpu")
    held_back = data["calibration"].rows(torch.arange(CALIBRATED))
    cases, patients = calibration_cases(
        imputer, backbone, held_back, ones(held_back), temperature, seed, cpu
    )
    selectors = fit_all(cases, statistics, {})
    answers = held_out(selectors, cases, statistics, patients)
    choice = choose(answers, cases, patients)
    result: dict[str, Any] = {"default": choice.name, "calibration": choice.results}
    test = data["test"]
    for eta in ETAS:
        hidden = missing_at(test, eta, seed)
        parts = [hidden.rows(r) for r in torch.arange(len(hidden)).split(250)]
        recoveries = [imputer.recover(part) for part in parts]
        encoded = [
            encode_versions(backbone, part, recovery)
            for part, recovery in zip(parts, recoveries, strict=True)
        ]
        whole = EncodedVersions(
            backbone,
            torch.cat([e.observed for e in encoded]),
            torch.cat([e.observed_available for e in encoded]),
            torch.cat([e.recovered for e in encoded if e.recovered is not None]),
        )
        fuse = remember(whole, 5, len(test))
        candidates = ~hidden.observed.available
        # What the recoveries show, as the same network reads each by itself.
        rows, column = candidates.nonzero(as_tuple=True)
        only = torch.nn.functional.one_hot(column, 5).bool()
        shown = fuse(rows, only, only).logits.argmax(-1) == test.labels[rows]
        row: dict[str, Any] = {"recovered_right": float(shown.float().mean())}
        for name, selector in selectors.items():
            trace = selector.select(fuse, hidden.observed, candidates, statistics)
            right = trace.output.logits.argmax(-1) == test.labels
            row[name] = float(right.float().mean())
            row[f"{name} admitted"] = float(trace.admitted.sum(1).float().mean())
        row["default"] = row[choice.name]
        result[f"{eta}"] = row
    return result


@torch.no_grad()
def backbone_facts(
    data: dict[str, Batch], backbone: FusionBackbone
) -> tuple[SubsetStatistics, float]:
    """Return the statistics of the training samples and the temperature of the calibration ones."""
    cpu = torch.device("cpu")
    train, held_back = data["train"], data["calibration"]
    statistics = fit_statistics(
        encode_all(backbone, train, cpu),
        train.observed.available,
        train.labels,
        ones(train),
        10,
        backbone.distance,
    )
    logits, rows = subset_logits(
        encode_all(backbone, held_back, cpu), held_back.observed.available, sampled_subsets(5, 0)
    )
    return statistics, fit_temperature(logits, held_back.labels[rows], rows.tolist())


def evaluate_seed(data: dict[str, Batch], distance: str, seed: int, work: Path) -> None:
    """Score every source of recoveries; what is in the file is not computed again."""
    path = work / f"results-{distance}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    backbone = train_backbone(data, distance, seed, work)
    imputer = train_imputer(data, seed, work)
    statistics, temperature = backbone_facts(data, backbone)
    sources: dict[str, Callable[[], Imputer]] = {"imputer": lambda: imputer}
    for p in RELIABILITIES:
        sources[f"{p}"] = partial(KnownReliability, p, data, seed)
    for source, make in sources.items():
        if source not in results:
            began = time.perf_counter()
            results[source] = score(data, backbone, statistics, temperature, make(), seed)
            write_json(path, results)
            seconds = time.perf_counter() - began
            print(f"{work.name} {distance} {source}: {seconds:.0f} s", flush=True)


def show(work: Path, seeds: Sequence[int], distances: Sequence[str]) -> None:
    """Print the tables and write `results.csv`."""
    rows = []
    for seed in seeds:
        for distance in distances:
            path = work / f"seed-{seed}" / f"results-{distance}.json"
            for source, result in json.loads(path.read_text()).items():
                for eta in ETAS:
                    for name, value in result[f"{eta}"].items():
                        rows.append((seed, distance, source, eta, name, value, result["default"]))
    table = pd.DataFrame(
        rows, columns=["seed", "distance", "source", "eta", "method", "value", "chosen"]
    )
    table.to_csv(work / "results.csv", index=False)
    mean, std = (
        getattr(table.groupby(["distance", "source", "eta", "method"]).value, f)()
        for f in ("mean", "std")
    )

    def print_table(distance: str, columns: dict[str, tuple[str, float]]) -> None:
        print("| accuracy, % | " + " | ".join(columns) + " |")
        print("|---" * (len(columns) + 1) + "|")
        for method in (*SELECTORS, "default", "recovered_right"):
            cells = []
            for source, eta in columns.values():
                key = (distance, source, eta, method)
                spread = "" if len(seeds) < 2 else f" ± {100 * std[key]:.1f}"
                cells.append(f"{100 * mean[key]:.1f}{spread}")
            print(f"| {method} | " + " | ".join(cells) + " |")

    sources = ["imputer", *map(str, RELIABILITIES)]
    for distance in distances:
        for source in ("imputer", "0.7"):
            what = "trained imputer" if source == "imputer" else f"reliability {source}"
            print(f"\n{distance}, {what}\n")
            print_table(distance, {f"eta {eta}": (source, eta) for eta in ETAS})
        print(f"\n{distance}, eta 0.8, by reliability\n")
        print_table(distance, {f"p = {p}": (str(p), 0.8) for p in RELIABILITIES})
    print("\ndefault picked, by seed:\n")
    for distance in distances:
        for source in sources:
            part = table[(table.distance == distance) & (table.source == source)]
            picked = part.groupby("seed").chosen.first()
            print(f"- {distance}, {source}: " + ", ".join(picked))
    worst = []
    for distance in distances:
        for source in sources:
            for eta in ETAS:
                key = (distance, source, eta)
                other = max(("observed_only", "trust_all"), key=lambda m: mean[(*key, m)])
                gap = mean[(*key, "default")] - mean[(*key, other)]
                worst.append((gap, std[(*key, "default")], *key, other))
    print("\nthe default against the better of observed_only and trust_all, five worst cells:\n")
    for gap, spread, distance, source, eta, other in sorted(worst)[:5]:
        print(
            f"- {100 * gap:+.2f} (spread {100 * spread:.2f}): {distance}, {source}, {eta}, {other}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mnist", type=Path, metavar="MNIST_FOLDER")
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--seed-list", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--distances", nargs="+", default=["cosine", "euclidean"])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    for seed in arguments.seed_list:
        work = arguments.work / f"seed-{seed}"
        data = make_data(arguments.mnist, seed)
        for distance in arguments.distances:
            evaluate_seed(data, distance, seed, work)
    print(f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}", end="")
    print(f", {time.perf_counter() - began:.0f} s in this run")
    show(arguments.work, arguments.seed_list, arguments.distances)


if __name__ == "__main__":
    main()
