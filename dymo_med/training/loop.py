"""The only optimiser loop: epochs, validation, best state, checkpoints, exact resume."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dymo_med.config import BackboneTraining, Schedule
from dymo_med.errors import ConfigError, Problem, out_of_memory
from dymo_med.files import write_bytes, write_csv
from dymo_med.training.gmd import Decoupling, ObjectiveGradients
from dymo_med.types import Batch

Progress = Callable[[str, int, int, Mapping[str, float]], None]


def stream(seed: int, *keys: str | int) -> torch.Generator:
    """Return a CPU generator that depends on the seed and the keys alone.

    Every epoch of every stage has its own, so a resumed run draws what the uninterrupted one
    would have drawn.

    Args:
        seed: Seed of the run.
        *keys: What the numbers are for ("backbone", 12).
    """
    text = json.dumps([seed, *keys]).encode()
    number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)


@contextmanager
def new_weights(seed: int, network: str) -> Iterator[None]:
    """Let the weights of a network that is made meanwhile depend on the seed and its name alone.

    Args:
        seed: Seed of the run.
        network: What is made: "imputer", "backbone", "comparator moddrop".

    Raises:
        ConfigError: If memory does not hold the network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream(seed, f"{network} weights").initial_seed() % 2**31))
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise ConfigError(
                Problem(
                    f"Recipe: {network}",
                    "the network is too large for the memory of this computer",
                    expected="sizes as in the recipes that `dymo-med info` names",
                    remedy=f"Make what the recipe says of the {network} smaller",
                )
            ) from error


class MicroBatch:
    """What one training step works on.

    A plain class: the device library copies dataclasses that pass through a wrapped module.

    Args:
        batch: B records.
        weights: `(B,)`, mean about 1.
        generator: CPU generator behind every random number.
    """

    def __init__(self, batch: Batch, weights: Tensor, generator: torch.Generator) -> None:
        self.batch, self.weights, self.generator = batch, weights, generator


class Objective(nn.Module):
    """A network with its training loss and its validation score.

    Attributes:
        decoupling: How the gradients of several losses are merged; None = `forward` returns one.
    """

    decoupling: Decoupling | None = None

    def begin_epoch(self, epoch: int) -> None:
        """Prepare for an epoch, counted from 0."""

    def end_epoch(self) -> None:
        """Finish an epoch's training steps."""

    def begin_batch(self, generator: torch.Generator) -> None:
        """Draw what all parts of a batch have in common."""

    def forward(self, step: MicroBatch) -> Tensor | tuple[Tensor, ...]:
        """Return the loss of a batch or of a part of it, a scalar.

        With `decoupling`, one scalar per subset of modalities, as many for every batch.
        """
        raise TypeError("An objective must define its loss.")

    def validate(self) -> dict[str, float]:
        """Return validation figures; `score` is the one to raise."""
        raise TypeError("An objective must define its validation.")


@dataclass
class _State:
    """Where a stage stands after an epoch."""

    epoch: int = 0
    best_epoch: int = -1
    best_score: float = float("-inf")
    finished: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


class Log:
    """`log.csv`: one row per stage and epoch, rewritten whole so that a resume leaves no gap."""

    FIELDS = ("stage", "epoch", "loss", "score", "figures", "seconds")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages: dict[str, list[dict[str, float]]] = {}

    def best_epoch(self, stage: str) -> int:
        """Return the epoch of a stage with the highest finite score, counted from 0."""
        rows = [row for row in self.stages[stage] if math.isfinite(row["score"])]
        return int(max(rows, key=lambda row: row["score"])["epoch"])

    def write(self) -> None:
        """Write all rows."""
        written = [
            {
                "stage": stage,
                "epoch": int(row["epoch"]),
                "loss": f"{row['loss']:.6g}",
                "score": f"{row['score']:.6g}",
                "figures": " ".join(f"{k}={v:.6g}" for k, v in row.items() if k not in self.FIELDS),
                "seconds": f"{row['seconds']:.3f}",
            }
            for stage, rows in self.stages.items()
            for row in rows
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(self.path, self.FIELDS, written)


def train_stage(
    name: str,
    objective: Objective,
    data: Batch,
    weights: Tensor,
    schedule: Schedule,
    seed: int,
    *,
    fabric: Fabric,
    checkpoint: Path,
    fingerprint: str,
    log: Log,
    progress: Progress | None = None,
) -> None:
    """Train one network to its best validation score.

    A checkpoint (safetensors, one file, replaced atomically) is written after every epoch and
    holds weights, best weights, optimiser state and history. If there is one, the stage goes on
    from it and ends with the same bits on CPU.

    Args:
        name: Name of the stage, for checkpoint, log and progress.
        objective: What is trained; holds the best weights afterwards.
        data: All training records.
        weights: `(n,)` weight of each record, mean about 1.
        schedule: Epochs, batch size, step size, patience.
        seed: Seed of the run.
        fabric: Device and precision.
        checkpoint: File to write to and resume from.
        fingerprint: Hash of everything that must be equal for a resume to make sense.
        log: Where each epoch's figures go.
        progress: Called after every epoch with stage, epoch (from 1), epochs, figures.

    Raises:
        ConfigError: If the checkpoint belongs to another recipe, cohort or version, or the
            training diverges.
    """
    optimizer = torch.optim.AdamW(
        objective.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    module, optimizer = fabric.setup(objective, optimizer)
    state = _State()
    best: dict[str, Tensor] = {}
    if checkpoint.exists():
        state, best = _restore(checkpoint, fingerprint, objective, optimizer)
    log.stages[name] = state.history
    rule = objective.decoupling
    gradients = None if rule is None else ObjectiveGradients(objective.parameters(), rule)
    while not state.finished:
        began = time.monotonic()
        generator = stream(seed, name, state.epoch)
        objective.train()
        objective.begin_epoch(state.epoch)
        for group in optimizer.param_groups:
            group["lr"] = schedule.step_size(state.epoch)
        order = torch.randperm(len(data), generator=generator)
        total = 0.0
        with _network_draws(seed, name, state.epoch, fabric.device):
            for start in range(0, len(data), schedule.batch_size):
                index = order[start : start + schedule.batch_size]
                objective.begin_batch(generator)
                optimizer.zero_grad()
                for part in index.tensor_split(min(schedule.parts, len(index))):
                    batch = data.rows(part).to(fabric.device)
                    loss = module(MicroBatch(batch, weights[part].to(fabric.device), generator))
                    share = len(part) / len(index)
                    with _same_order(fabric.device):
                        if gradients is None:
                            fabric.backward(loss * share)
                        else:
                            gradients.backward(loss, share, fabric.backward)
                            loss = torch.stack([one.detach() for one in loss]).mean()
                    total += _finite(float(loss.detach()), name, schedule) * len(part)
                if gradients is not None:
                    gradients.merge(generator)
                _clip(fabric, module, optimizer, schedule, name)
                optimizer.step()
        objective.end_epoch()
        objective.eval()
        for p in objective.parameters():
            _finite(float(p.detach().abs().sum()), name, schedule)
        with torch.no_grad():
            figures = objective.validate()
        row = {"epoch": state.epoch, "loss": total / len(data), **figures}
        improved = figures["score"] > state.best_score + schedule.min_improvement
        if improved and math.isfinite(figures["score"]):
            state.best_score, state.best_epoch = figures["score"], state.epoch
            best = {k: v.detach().clone() for k, v in objective.state_dict().items()}
        state.history.append({**row, "seconds": time.monotonic() - began})
        state.epoch += 1
        waited = state.epoch - 1 - state.best_epoch
        state.finished = state.epoch >= schedule.epochs or waited >= schedule.patience
        _store(checkpoint, fingerprint, state, objective, best, optimizer)
        log.write()
        if progress is not None:
            progress(name, state.epoch, schedule.epochs, row)
    if not best:
        raise _diverged(name, schedule, "no epoch with a finite score on validation records")
    objective.load_state_dict(best)
    objective.eval()


@contextmanager
def _network_draws(seed: int, stage: str, epoch: int, device: torch.device) -> Iterator[None]:
    """Let what a network itself draws meanwhile (dropout) depend on the seed and the epoch alone.

    PyTorch's layers draw from the process's own generators, which are left as they were.
    """
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(stream(seed, stage, "network", epoch).initial_seed())
        yield


def _finite(value: float, stage: str, schedule: Schedule) -> float:
    """Return a number of the training once it is known to be finite.

    Raises:
        ConfigError: If it is not.
    """
    if not math.isfinite(value):
        raise _diverged(stage, schedule, "a loss or weight that is not finite")
    return value


def _diverged(stage: str, schedule: Schedule, got: str) -> ConfigError:
    """Return the error of a training that leads nowhere."""
    section = "backbone_training" if isinstance(schedule, BackboneTraining) else "imputer_training"
    return ConfigError(
        Problem(
            f"Recipe {section}: training of {stage}",
            "the training diverges",
            expected="losses and gradients that stay finite",
            got=got,
            remedy=f"Lower learning_rate (or clip_gradients) under {section} in the recipe, and"
            " train into a new folder",
        )
    )


def _clip(fabric: Fabric, module: Any, optimizer: Any, schedule: Schedule, stage: str) -> None:
    """Bound the gradient of a step, that of the whole batch and after any decoupling.

    Args:
        fabric: Device and precision.
        module: What is trained, its gradients complete.
        optimizer: Its optimiser.
        schedule: The bounds.
        stage: Name of the stage.

    Raises:
        ConfigError: If a gradient is not finite; without a bound, too.
    """
    norm = math.inf if schedule.clip_gradients is None else schedule.clip_gradients
    # With an infinite bound the factor is exactly 1, and what is not finite is still found.
    total = fabric.clip_gradients(module, optimizer, max_norm=norm, error_if_nonfinite=False)
    if total is not None and not bool(total.isfinite()):
        raise _diverged(stage, schedule, "a gradient that is not finite")
    if schedule.clip_values is not None:
        fabric.clip_gradients(module, optimizer, clip_val=schedule.clip_values)


@contextmanager
def _same_order(device: torch.device) -> Iterator[None]:
    """Add gradients of gathered tokens in a fixed order, whatever the number of CPU threads.

    Elsewhere than on the CPU bits are not promised, and some operations have no ordered form.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or device.type == "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _store(
    path: Path,
    fingerprint: str,
    state: _State,
    objective: nn.Module,
    best: Mapping[str, Tensor],
    optimizer: Any,
) -> None:
    """Write a checkpoint."""
    tensors = {f"model/{k}": v for k, v in objective.state_dict().items()}
    tensors |= {f"best/{k}": v for k, v in best.items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{k}": torch.as_tensor(v) for k, v in values.items()}
    about = {"fingerprint": fingerprint, **vars(state)}
    packed = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(packed, metadata={"state": json.dumps(about)}))


def _restore(
    path: Path, fingerprint: str, objective: nn.Module, optimizer: Any
) -> tuple[_State, dict[str, Tensor]]:
    """Read a checkpoint into the network and the optimiser."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["state"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, OSError):
        raise ConfigError(
            Problem(
                str(path),
                "the checkpoint is damaged",
                expected="a checkpoint that `dymo-med train` wrote",
                remedy="Remove it to train again",
            )
        ) from None
    if about.pop("fingerprint") != fingerprint:
        raise ConfigError(
            Problem(
                str(path),
                "the checkpoint belongs to another recipe, cohort or version",
                expected="a checkpoint of this run",
                remedy="Choose another --out folder, or remove this one",
            )
        )
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
    for key, value in tensors.items():
        part, _, rest = key.partition("/")
        parts[part][rest] = value
    objective.load_state_dict(parts["model"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in parts["optimizer"].items():
        index, _, what = key.partition("/")
        moments.setdefault(int(index), {})[what] = value
    if moments:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return _State(**about), parts["best"]
