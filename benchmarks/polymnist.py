"""What each selector does with good and with bad recoveries, on PolyMNIST.

    python benchmarks/polymnist.py MNIST_FOLDER WORK [--seeds 3] [--distances cosine euclidean]

Per seed: samples are drawn (splits share no digit image), an imputer and a backbone per distance
are trained, and every selector is fitted on the calibration split and scored on the test split,
with exactly eta x 5 modalities missing per sample. Recoveries come from

- the trained imputer, and
- a *recovery of known reliability p*: each missing cell is a real training picture of that
  modality, of the right class with probability p, of another class otherwise.

What is finished stays in WORK and is not computed again; several processes may share the work by
taking different seeds or distances. Prints Markdown tables and writes `results.csv`.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from dymo_med.backbones import BACKBONES, FusionBackbone
from dymo_med.config import BackboneTraining, Schedule
from dymo_med.imputers import IMPUTERS, Imputer
from dymo_med.training.loop import Log, train_stage
from dymo_med.training.objectives import FusionObjective, ImputerObjective
from dymo_med.types import Batch, ModalityMask, ModalitySpec

ROOT = Path(__file__).resolve().parents[1]
COUNTS = {"train": 7000, "validation": 500, "calibration": 1000, "test": 1500}
NAMES = tuple(f"m{i}" for i in range(5))
SPECS = tuple(ModalitySpec(n, "image", f"{n}.png", (3, 28, 28), (), "none") for n in NAMES)
BACKBONE = {"dim": 128, "heads": 4, "layers": 2, "projection": 64, "width": 16, "grid": 2}
IMPUTER = {"latent": 64, "map_channels": 0, "width": 16, "grid": 2, "dim": 32, "beta": 0.1}
BACKBONE_TRAINING = BackboneTraining(
    epochs=30,
    batch_size=128,
    learning_rate=1e-3,
    patience=30,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mnist", type=Path, metavar="MNIST_FOLDER")
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--seed-list", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--distances", nargs="+", default=["cosine", "euclidean"])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for seed in arguments.seed_list:
        work = arguments.work / f"seed-{seed}"
        data = make_data(arguments.mnist, seed)
        for distance in arguments.distances:
            train_backbone(data, distance, seed, work)
        train_imputer(data, seed, work)


if __name__ == "__main__":
    main()
