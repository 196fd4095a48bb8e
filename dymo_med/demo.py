"""The main job end to end, on data made on the spot."""

from __future__ import annotations

import shutil
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dymo_med.errors import ConfigError, Problem

if TYPE_CHECKING:
    from dymo_med.bundle import ModelBundle

PATIENTS = 24
TRAINING_PATIENTS = 160
# What the one patient of the demo lacks: the most informative sequence, which nothing replaces,
# and one that another sequence can stand in for.
ABSENT = ("t1ce.nii.gz", "flair.nii.gz")
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
        bundle = load_bundle(_train(bundle, out, device, seed, reporter), device)
    described = read_cohort(cohort)
    test = described.in_split("test")
    complete = next(
        (r for r in test if all((r.folder / name).exists() for name in ABSENT)), test[0]
    )
    patient = out / "patient" / complete.record_id
    shutil.copytree(complete.folder, patient)
    for name in ABSENT:
        (patient / name).unlink(missing_ok=True)
    reporter.say(f"Patient {complete.record_id} lacks {', '.join(ABSENT)}")
    prediction = predict_patient(patient, bundle, out / "prediction", seed=seed)
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
            progress=progress,
        )
    reporter.say(f"report:      {out / 'prediction' / 'report.html'}")
    reporter.say(f"cohort page: {out / 'evaluation' / 'index.html'}")
    reporter.say(f"recovered:   {out / 'prediction' / 'recovered'}")
    reporter.say(f"done in {time.monotonic() - began:.0f} s")


def _train(shipped: ModelBundle, out: Path, device: str, seed: int, reporter: Reporter) -> Path:
    """Train a bundle by the shipped one's own recipe on fewer patients; return its folder."""
    import yaml

    from dymo_med.data.simulate import simulate
    from dymo_med.training.train import train

    with reporter.bar("Simulating training patients") as progress:
        cohort = simulate(
            out / "training-cohort", patients=TRAINING_PATIENTS, seed=seed, progress=progress
        )
    recipe = out / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(shipped.provenance["recipe"], sort_keys=False))
    return train(
        recipe,
        cohort,
        out / "run",
        device=device,
        progress=lambda stage, epoch, most, figures: reporter.say(
            f"{stage} epoch {epoch} of at most {most}: loss {figures['loss']:.4f}"
        ),
    )
