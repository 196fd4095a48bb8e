"""Do prediction sets and intervals hold the truth as often as they promise?

    python benchmarks/coverage.py [--cohorts 200] [--modalities 1 2 3 4 5 6] [--task classification]

Cohorts are simulated whose networks need no training: a modality is a vector of evidence for each
class, noisier or clearer by modality, and the backbone adds up what it is given, twice as sure as
it should be. The imputer proposes the mean of what is there, off by a fixed error per patient.
Everything after that is the package's own: temperature, choice of the selector, bounds, sets. Each
cohort has its own 20 validation patients and 5, 9, 19, 30 or 60 calibration patients (one in four
comes twice), each of whom lacks modalities at random.

Coverage is of 40 new patients a cohort, with what they have as it is (`as-is`), with a share of
their modalities hidden (`rate`), and with nothing but certain modalities (`keep`, every
combination; the mean over these and the lowest one are printed). `+-` is the Monte-Carlo error:
1.96 standard errors over cohorts. `telling` is as-is again in a world in which sicker patients
lack more: what is missing tells something there, and only as-is is promised anything.

Promised is a mean over cohorts of 90 % or more. The last lines say whether one is below that by
more than its error, and what share of means would be by chance if all were exactly 90 %.
"""

import argparse
import itertools
import platform
import time
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional as F

from dymo_med.backbones import FusionBackbone, encode_versions
from dymo_med.calibration import Calibration
from dymo_med.config import Strict
from dymo_med.conformal import COVERAGE, Conformal
from dymo_med.imputers import Imputer
from dymo_med.selection import SELECTORS, fit_statistics
from dymo_med.tasks import PLAIN, Regression
from dymo_med.training.calibration import fit_temperature
from dymo_med.training.held_back import only, try_out
from dymo_med.training.objectives import encode_all, sampled_subsets, subset_logits
from dymo_med.training.selectors import calibration_cases, choose, held_out
from dymo_med.types import Batch, FusionOutput, ModalityMask, ModalitySpec, Scale, Tokens

SIZES = (5, 9, 19, 30, 60)
RATES = (0.25, 0.5, 0.75)
K = 3
SCALE = Scale(0.0, 2.0, (0.0, 1.0, 2.0))
CPU = torch.device("cpu")
METHODS = ("observed_only", "trust_all", "dymo")


class Evidence(FusionBackbone):
    """Adds up the evidence that it is given, and is too sure of the sum."""

    distance = "cosine"
    Options = Strict

    def __init__(self, specs: Any, classes: int, options: BaseModel) -> None:
        super().__init__(specs, classes, options)
        self.specs = tuple(specs)
        self.token_modality = torch.arange(len(self.specs))

    def encode(self, name: str, values: Tensor, *_: Any) -> Tokens:
        return Tokens(values, torch.ones(values.shape[:2], dtype=torch.bool))

    def fuse_all(self, tokens: Tensor, available: Tensor) -> FusionOutput:
        logits = 2 * (tokens * available[..., None]).sum(1)
        return FusionOutput(logits, F.normalize(logits.softmax(-1), dim=-1))

    def specific_modules(self) -> list[torch.nn.Module]:
        return []


class Guess(Imputer):
    """Proposes the mean of what is there, off by an error that is the patient's own."""

    probabilistic = False
    Options = Strict

    def __init__(self, specs: Any, options: BaseModel) -> None:
        super().__init__(specs, options)
        self.specs = tuple(specs)

    def propose(self, batch: Batch, wanted: Any, generator: Any) -> dict[str, Tensor]:
        there = batch.observed.available[..., None, None].float()  # (B, M, 1, 1)
        whole = torch.stack([batch.values[s.name] for s in self.specs], 1)
        mean = (whole * there).sum(1) / there.sum(1).clamp_min(1)
        # The same for a patient whatever is hidden: from a number that is no modality's.
        error = batch.values["error"]
        return dict.fromkeys(wanted, mean + error)


class World:
    """Patients of one kind.

    Args:
        modalities: M.
        regression: Whether the truth is a number.
        telling: Whether sicker patients lack more.
    """

    def __init__(self, modalities: int, *, regression: bool = False, telling: bool = False) -> None:
        self.names = tuple("abcdef"[:modalities])
        self.specs = tuple(ModalitySpec(n, "tokens", n, (1, K)) for n in self.names)
        self.task = Regression.of("y", SCALE) if regression else PLAIN
        self.scale = self.task.scale
        self.telling = telling
        self.backbone = Evidence(self.specs, K, Strict()).eval()
        self.imputer = Guess(self.specs, Strict()).eval()
        training = self.draw(300, torch.Generator().manual_seed(7), twice=False)
        self.statistics = fit_statistics(
            encode_all(self.backbone, training, CPU),
            training.observed.available,
            training.labels,
            torch.ones(len(training)),
            K,
            "cosine",
        )

    def draw(self, patients: int, g: torch.Generator, *, twice: bool = True) -> Batch:
        """Return records of so many patients, of whom one in four comes twice."""
        m = len(self.names)
        value = 2 * torch.rand(patients, generator=g)
        shares = SCALE.shares(value.double()).float()
        labels = shares.argmax(1) if self.scale else torch.randint(K, (patients,), generator=g)
        target = shares if self.scale else F.one_hot(labels, K).float()
        # Some patients look like another class than theirs, in every modality and visit.
        own = 0.7 * torch.randn(patients, K, generator=g)
        visit = torch.arange(patients)
        if twice:
            visit = torch.cat([visit, visit[: patients // 4]])
        clear = torch.linspace(0.6, 1.8, m) if m > 1 else torch.tensor([1.2])
        noise = torch.randn(len(visit), m, K, generator=g)
        seen = clear[:, None] * target[visit, None] + 0.5 * own[visit, None] + noise
        lack = torch.full((len(visit), m), 0.25)
        if self.telling:
            lack = torch.tensor([0.05, 0.2, 0.65])[labels[visit]][:, None].expand(-1, m)
        there = torch.rand(len(visit), m, generator=g) >= lack
        some = torch.randint(m, (len(visit), 1), generator=g)
        there = there | (F.one_hot(some, m)[:, 0].bool() & ~there.any(1, keepdim=True))
        values = {n: seen[:, i, None] for i, n in enumerate(self.names)}
        values["error"] = 0.8 * torch.randn(len(visit), 1, K, generator=g)
        ids = tuple(f"p{i:03d}" for i in visit.tolist())
        return Batch(
            tuple(f"{p}-{i}" for i, p in enumerate(ids)),
            ids,
            values,
            ModalityMask(self.names, there),
            {},
            labels[visit],
            shares[visit] if self.scale else None,
        )

    def fit(self, g: torch.Generator, seed: int) -> tuple[dict[str, Any], str, float]:
        """Return selectors, the default one and the temperature, from 20 validation patients."""
        batch = self.draw(20, g)
        temperature = 1.0
        if self.scale is None:
            logits, rows = subset_logits(
                encode_all(self.backbone, batch, CPU),
                batch.observed.available,
                sampled_subsets(len(self.names), seed),
            )
            owners = [batch.patient_ids[i] for i in rows.tolist()]
            temperature = fit_temperature(logits, batch.labels[rows], owners)
        weights = torch.ones(len(batch))
        cases, patients = calibration_cases(
            self.imputer, self.backbone, batch, weights, temperature, seed, CPU
        )
        selectors = {name: SELECTORS[name]() for name in METHODS}
        answers = held_out(selectors, cases, self.statistics, patients)
        return selectors, choose(answers, cases, patients, self.task).name, temperature

    def bounds(
        self, selector: Any, temperature: float, patients: int, g: torch.Generator, seed: int
    ) -> tuple[Conformal, Calibration]:
        """Return what sets of so many calibration patients go by."""
        limit = None if self.scale else patients
        calibration = Calibration(temperature, 20, limit)
        tested = try_out(
            self.imputer,
            self.backbone,
            {"m": selector},
            self.statistics,
            calibration,
            self.draw(patients, g),
            seed,
            CPU,
            self.task,
        )
        return tested.conformal(), calibration

    def logits(self, selector: Any, batch: Batch) -> Tensor:
        """Return the selector's answers `(B, K)`."""
        with torch.no_grad():
            recovery = self.imputer.recover(batch)
            fuse = encode_versions(self.backbone, batch, recovery)
            trace = selector.select(fuse, batch.observed, recovery.candidates, self.statistics)
        return trace.output.logits

    def held(
        self, conformal: Conformal, calibration: Calibration, batch: Batch, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return of each record whether the truth is held, and the size of set or interval."""
        p = calibration.probabilities(logits)
        patterns = ["+".join(batch.observed.of(i)) for i in range(len(batch))]
        if self.scale is None:
            members = torch.from_numpy(conformal.sets("m", p.numpy(), patterns).members)
            return members.gather(1, batch.labels[:, None])[:, 0].double(), members.double().sum(1)
        found = conformal.intervals("m", self.scale.value(p).numpy(), patterns, self.scale)
        truth = self.scale.value(batch.shares.double()).numpy()
        inside = (found.low - 1e-9 <= truth) & (truth <= found.high + 1e-9)
        return torch.from_numpy(inside).double(), torch.from_numpy(found.high - found.low)


def scenarios(names: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Return the scenarios: a name, and what is left of what records have."""

    def rate(share: float) -> Any:
        def left(available: Tensor, g: torch.Generator) -> Tensor:
            count = available.sum(1)
            taken = torch.minimum((share * count.float()).round().long(), count - 1)
            rank = torch.rand(available.shape, generator=g).masked_fill(~available, 2.0)
            return available & (rank.argsort(1).argsort(1) >= taken[:, None])

        return left

    def keep(subset: tuple[int, ...]) -> Any:
        inside = torch.zeros(len(names), dtype=torch.bool)
        inside[list(subset)] = True
        return lambda available, _: available & inside

    subsets = [
        s for n in range(1, len(names)) for s in itertools.combinations(range(len(names)), n)
    ]
    return [
        ("as-is", lambda available, _: available),
        *((f"rate:{r}", rate(r)) for r in RATES),
        *((f"keep:{','.join(names[i] for i in s)}", keep(s)) for s in subsets),
    ]


def coverage(
    world: World, cohorts: int, sizes: tuple[int, ...] = SIZES, patients: int = 40, seed: int = 0
) -> dict[tuple[int, str], tuple[float, float, float]]:
    """Return mean coverage, its standard error over cohorts and mean size, by n and scenario."""
    rules = scenarios(world.names)
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for cohort in range(cohorts):
        g = torch.Generator().manual_seed(seed * 100_003 + cohort)
        selectors, name, temperature = world.fit(g, cohort)
        fitted = {n: world.bounds(selectors[name], temperature, n, g, cohort) for n in sizes}
        new = world.draw(patients, g, twice=False)
        for rule, left in rules:
            mask = left(new.observed.available, g)
            some = mask.any(1).nonzero().squeeze(1)
            if not len(some):
                continue
            batch = only(new.rows(some), mask[some])
            logits = world.logits(selectors[name], batch)
            for n, (conformal, calibration) in fitted.items():
                inside, size = world.held(conformal, calibration, batch, logits)
                found.setdefault((n, rule), []).append((float(inside.mean()), float(size.mean())))
    result = {}
    for key, rows in found.items():
        table = np.array(rows)
        error = table[:, 0].std(ddof=1) / len(rows) ** 0.5
        result[key] = (float(table[:, 0].mean()), float(error), float(table[:, 1].mean()))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cohorts", type=int, default=200)
    parser.add_argument("--modalities", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--task", choices=("classification", "regression"), default=None)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    below: list[Any] = []
    means = 0
    for task in (asked.task,) if asked.task else ("classification", "regression"):
        size_of = "classes in set" if task == "classification" else "width (of 2)"
        print(f"\n{task}: mean coverage in % over {asked.cohorts} cohorts; {size_of} as-is")
        print(
            f"{'M':>2} {'n':>3}  {'as-is':>11}"
            + "".join(f"  {f'rate:{r}':>11}" for r in RATES)
            + f"  {'keep, mean':>10}  {'keep, lowest':>12}  {'telling':>11}  {'size':>5}"
        )
        for m in asked.modalities:
            world = World(m, regression=task == "regression")
            other = World(m, regression=task == "regression", telling=True)
            found = coverage(world, asked.cohorts)
            told = {k: v for k, v in coverage(other, asked.cohorts).items() if k[1] == "as-is"}
            for n in SIZES:
                rows = {rule: v for (size, rule), v in found.items() if size == n}
                rows["telling"] = told[n, "as-is"]
                kept = [v for rule, v in rows.items() if rule.startswith("keep")]
                low = min(kept, key=lambda v: v[0] + 1.96 * v[1]) if kept else None
                cells = [rows["as-is"], *(rows[f"rate:{r}"] for r in RATES)]
                text = [_cell(c) for c in cells]
                text.append(f"{100 * np.mean([v[0] for v in kept]):10.1f}" if kept else " " * 10)
                text.append(f"{_cell(low):>12}" if low else " " * 12)
                text.append(_cell(rows["telling"]))
                print(f"{m:>2} {n:>3}  {'  '.join(text)}  {rows['as-is'][2]:5.2f}", flush=True)
                means += len(rows)
                below += [
                    (task, m, n, rule, v)
                    for rule, v in rows.items()
                    if v[0] + 1.96 * v[1] < COVERAGE
                ]
    print(f"\n{len(below)} of {means} means are below {COVERAGE:.0%} by more than their error")
    print("(by chance alone 2.5 % would be, if every coverage were exactly that)")
    for task, m, n, rule, v in below:
        print(f"  {task}, {m} modalities, {n} patients, {rule}: {_cell(v)}")
    print(
        f"{time.perf_counter() - start:.0f} s on one core of {platform.machine()}"
        f" ({platform.system()}, Python {platform.python_version()}, torch {torch.__version__})"
    )


def _cell(value: tuple[float, float, float]) -> str:
    return f"{100 * value[0]:5.1f} +-{100 * 1.96 * value[1]:3.1f}"


if __name__ == "__main__":
    main()
