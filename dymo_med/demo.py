"""The main job end to end, on data made on the spot."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dymo_med.errors import ConfigError, Problem

if TYPE_CHECKING:
    from dymo_med.bundle import ModelBundle
    from dymo_med.types import Cohort

PATIENTS = 60
TRAINING_PATIENTS = 160
REPORTS = 12
# Of choosing a recipe and training, where the demo is asked to.
BUDGET_S = 300.0
# What the one patient of the demo lacks: a scan that another sequence can stand in for, and a
# table that nothing else tells much about.
ABSENT_SCAN = "flair"
ABSENT_TABLE = "labs"
SCENARIOS = ("as-is", "rate:0.5")


class Reporter(Protocol):
    """What the demo needs of the command line's reporter."""

    def say(self, text: str) -> None:
        """Print one line."""

    def bar(self, title: str) -> Any:
        """Return a context manager that yields a function of (done, total)."""


def shipped_bundle() -> Path:
    """Return the bundle that comes with the package."""
    return Path(str(resources.files("dymo_med") / "bundles" / "simulated"))


def run_demo(out: Path, *, device: str, seed: int, train_first: bool, reporter: Reporter) -> None:
    """Simulate, train or take the shipped bundle, predict one patient, evaluate a small cohort.

    Args:
        out: Folder for everything; an earlier demo in it is replaced.
        device: `auto`, `cpu` or `cuda`.
        seed: Seed of the simulated patients.
        train_first: Train a bundle (some minutes) instead of using the shipped one.
        reporter: Where progress goes.

    Raises:
        ConfigError: If `out` holds something that is not an earlier demo.
    """
    began = time.monotonic()
    marker = out / ".dymo-med-demo"
    if out.exists() and any(out.iterdir()):
        if not marker.exists():
            raise ConfigError(
                Problem(
                    str(out),
                    "the folder holds something that is not an earlier demo",
                    expected="a new or empty folder, or an earlier demo",
                    remedy="Choose another folder with --out",
                )
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    marker.touch()

    from dymo_med.data.simulate import simulate

    with reporter.bar("Simulating patients") as progress:
        # Seeds from 1000 on: none of these patients was used to train the shipped bundle.
        cohort = simulate(out / "cohort", patients=PATIENTS, seed=1000 + seed, progress=progress)

    from dymo_med.bundle import load_bundle
    from dymo_med.data.cohort import read_cohort
    from dymo_med.inference.evaluate import evaluate
    from dymo_med.inference.predict import predict_patient

    bundle = load_bundle(shipped_bundle(), device)
    if train_first:
        bundle = load_bundle(_train(out, device, seed, reporter), device)
    described = read_cohort(cohort)
    # None of them took part in making the bundle, so all of them may be reported on.
    described = replace(described, splits=dict.fromkeys(described.splits, "test"))
    chosen = _instructive(bundle, described, out / "incomplete", seed)
    reporter.say(f"Patient {chosen.name} lacks {ABSENT_SCAN} and {ABSENT_TABLE}")
    prediction = predict_patient(chosen, bundle, out / "prediction", seed=seed)
    for name, probability in zip(prediction.classes, prediction.probabilities, strict=True):
        reporter.say(f"  {name}: {probability:.1%}")
    reporter.say(f"  trusted: {', '.join(prediction.trusted) or 'nothing'}")
    reporter.say(f"  rejected: {', '.join(prediction.rejected) or 'nothing'}")
    with reporter.bar("Evaluating the cohort") as progress:
        evaluate(
            bundle,
            described,
            out / "evaluation",
            split="test",
            scenarios=SCENARIOS,
            seed=seed,
            reports=REPORTS,
            progress=progress,
        )
    reporter.say(f"report:      {out / 'prediction' / 'report.html'}")
    reporter.say(f"cohort page: {out / 'evaluation' / 'index.html'}")
    reporter.say(f"recovered:   {out / 'prediction' / 'recovered'}")
    reporter.say(f"done in {time.monotonic() - began:.0f} s")


def _instructive(bundle: ModelBundle, cohort: Cohort, folder: Path, seed: int) -> Path:
    """Take a scan and a table from every test patient; return one patient worth showing.

    That is the first of whose two recoveries one was trusted and the other was not; else the
    first.
    """
    from dymo_med.data.patient import read_patient
    from dymo_med.inference.predict import predict_batch

    specs = {spec.name: spec for spec in cohort.specs}
    blank = {column.name for column in specs[ABSENT_TABLE].columns}
    patients = []
    for record in cohort.in_split("test"):
        patient = folder / record.record_id
        shutil.copytree(record.folder, patient)
        (patient / specs[ABSENT_SCAN].file).unlink(missing_ok=True)
        table = patient / specs[ABSENT_TABLE].file
        header, cells = (line.split(",") for line in table.read_text(encoding="utf-8").splitlines())
        cells = ["" if h in blank else c for h, c in zip(header, cells, strict=True)]
        table.write_text(f"{','.join(header)}\n{','.join(cells)}\n", encoding="utf-8")
        patients.append(patient)
    records = [read_patient(patient, bundle.specs) for patient in patients]
    both = {ABSENT_SCAN, ABSENT_TABLE}
    for patient, answer in zip(
        patients, predict_batch(bundle, records, explain=False, seed=seed), strict=True
    ):
        if both & set(answer.trusted) and both & set(answer.rejected):
            return patient
    return patients[0]


def _train(out: Path, device: str, seed: int, reporter: Reporter) -> Path:
    """Train a bundle by a recipe that is chosen for its patients; return its folder."""
    from dymo_med.data.simulate import simulate
    from dymo_med.training.train import train

    with reporter.bar("Simulating training patients") as progress:
        cohort = simulate(
            out / "training-cohort", patients=TRAINING_PATIENTS, seed=seed, progress=progress
        )
    return train(
        None,
        cohort,
        out / "run",
        device=device,
        seed=seed,
        budget_s=BUDGET_S,
        say=reporter.say,
        progress=lambda stage, epoch, most, figures: reporter.say(
            f"{stage} epoch {epoch} of at most {most}: loss {figures['loss']:.4f}"
        ),
    )
