"""The command line: parse, call one function, turn errors into exit codes.

Heavy libraries load inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import metadata
from os import environ
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.markup import escape

from dymo_med import __version__
from dymo_med.errors import BundleError, ConfigError, DymoMedError, Problem, out_of_memory
from dymo_med.logs import LIBRARIES, be_verbose, heard, is_verbose
from dymo_med.shipped import found, shipped

if TYPE_CHECKING:
    from dymo_med.bundle import ModelBundle
    from dymo_med.bundle_segmentation import SegmentationBundle
    from dymo_med.inference.segment import Segmentation
    from dymo_med.types import CohortRecord, ModalitySpec, Prediction

app = typer.Typer(
    name="dymo-med",
    help="Predict for patients whose imaging or records are incomplete, "
    "and show what was made up and what was trusted.",
    no_args_is_help=True,
    rich_markup_mode=None,  # its tables cut the names of options at 80 columns
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_SPACE, _PLACE = "Free some space there, or write to another disk", "Write to another place"
_MAY, _PATH = "Check the path and its permissions", "Check the path"
# Trouble with a path or a disk, not a bug; and what to do about it.
_ENVIRONMENT = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _SPACE),
    **dict.fromkeys((errno.EACCES, errno.EPERM), _MAY),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP), _PATH),
    **dict.fromkeys((errno.EROFS, errno.ENAMETOOLONG), _PLACE),
    errno.EIO: "The disk or the network drive fails; write to another one, and have it checked",
}
_MEMORY = (
    "Stop what else uses it, or use --device cpu; in training smaller batches or more parts need"
    " less"
)
# Lines of libraries that are repeated after our own.
_MOST_LINES = 20
out_console = Console(highlight=False, soft_wrap=True)
err_console = Console(stderr=True, highlight=False, soft_wrap=True)

Device = Annotated[str, typer.Option("--device", "-d", help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of every random choice.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


def _hear(verbose: bool) -> bool:
    if verbose:
        be_verbose()
    return verbose


Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=_hear,
        help="Print more: every epoch, warnings of libraries, tracebacks of records that failed.",
    ),
]


def _bundle(path: Path | None) -> Path | None:
    return None if path is None else found(path, "bundle")


def _recipe(path: Path | None) -> Path | None:
    return None if path is None else found(path, "recipe")


Bundle = Annotated[
    Path,
    typer.Option(
        "--bundle",
        "-b",
        callback=_bundle,
        help="Bundle folder that `dymo-med train` wrote, or `simulated`, which is installed.",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")]
PatientDir = Annotated[
    Path, typer.Option("--patient-dir", "-i", help="Folder with the patient's scans and tables.")
]
Flips = Annotated[
    bool,
    typer.Option("--flips", help="Of a segmentation: average over mirrored scans; 8 times slower."),
]
Pdf = Annotated[
    bool, typer.Option("--pdf", help="Write the page as a PDF too, beside it: report.pdf.")
]
Dicom = Annotated[
    bool,
    typer.Option(
        "--dicom", help="Write DICOM: structured report, page, recovered scans, outlines."
    ),
]
Fhir = Annotated[
    bool, typer.Option("--fhir", help="Write a FHIR R4 Bundle: report, risk, device, provenance.")
]
Bids = Annotated[
    bool, typer.Option("--bids", help="Of a BIDS dataset: write recovered scans as derivatives.")
]
Identify = Annotated[
    bool,
    typer.Option(
        "--identify", help="Show the patient's identifier from the header, not a pseudonym."
    ),
]
WithoutRefused = Annotated[
    bool,
    typer.Option(
        "--treat-refused-as-missing",
        help="Answer without modalities that the quality gate refuses; the report says so.",
    ),
]
CohortPath = Annotated[
    Path, typer.Option("--cohort", "-c", help="Cohort folder, or its cohort.yaml.")
]


class Update(Protocol):
    """Tells how far some work is."""

    def __call__(self, done: int, total: int, title: str | None = None, /) -> None:
        """Report `done` of `total`; `title` renames the work from then on."""


class Reporter:
    """Prints progress: a bar on a terminal, plain lines in a log, nothing when quiet.

    Args:
        quiet: Print nothing.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def say(self, text: str) -> None:
        """Print one line unless quiet."""
        if not self.quiet:
            out_console.print(escape(text))

    @contextmanager
    def bar(self, title: str) -> Iterator[Update]:
        """Yield a function of (done, total), and optionally another title from then on."""
        if self.quiet:
            yield lambda done, total, title=None: None
            return
        if not out_console.is_terminal:
            yield self._lines(title)
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=out_console, transient=True) as progress:
            task = progress.add_task(title, total=None)

            def update(done: int, total: int, title: str | None = None) -> None:
                if title is not None:
                    progress.update(task, description=escape(title))
                progress.update(task, completed=done, total=total)

            yield update

    def _lines(self, title: str) -> Update:
        """Return a function that prints a line at every tenth of the way."""
        printed, first, began = -1, 0, time.monotonic()

        def update(done: int, total: int, other: str | None = None) -> None:
            nonlocal printed, title, first, began
            if other is not None and other != title:
                title, printed, first, began = other, -1, done, time.monotonic()
            tenth = 10 * done // max(1, total)
            if tenth > printed:
                if printed < 0:
                    # What an earlier run had done took this one no time.
                    first, began = done, time.monotonic()
                printed = tenth
                self.say(f"{title}: {done} of {total}{_left(done - first, total - done, began)}")

        return update


def _left(done: int, left: int, began: float) -> str:
    """Return how long the rest will take, if it is worth saying."""
    seconds = (time.monotonic() - began) * left / done if done else 0.0
    if seconds < 30:
        return ""
    return f", about {seconds / 60:.0f} min left" if seconds >= 90 else ", about a minute left"


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print name and version, and those of the rest.")
    ] = False,
) -> None:
    if version:
        rest = ", ".join(f"{name} {number}" for name, number in _versions().items())
        out_console.print(f"dymo-med {__version__} ({rest})")
        raise typer.Exit


def _versions() -> dict[str, str]:
    """Return versions of what answers rest on, without loading any of it."""
    names = ("torch", "monai", "numpy", "SimpleITK", "pydicom", "highdicom")
    return {"Python": platform.python_version(), **{n: metadata.version(n) for n in names}}


@app.command()
def info(
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle. Without one: what is installed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Tell what a bundle is for and what it needs, or what is installed."""
    from dymo_med.files import read_json

    facts: dict[str, Any] = {"dymo-med": __version__, "versions": _versions()}
    if bundle is None:
        facts |= {f"{kind}s": list(shipped(kind)) for kind in ("bundle", "recipe", "cohort")}
    else:
        place = found(bundle, "bundle")
        try:
            known = read_json(place / "configs" / "metadata.json")
            keys = ("name", "version", "description", "target")
            facts = {"bundle": str(bundle), **{key: known[key] for key in keys}}
            facts["made_with"] = known["required_packages_version"]
            facts["cohort"] = known["provenance"]["cohort"]
            facts["records"] = known["provenance"]["records"]
            facts["modalities"] = [
                {
                    **{key: spec[key] for key in ("name", "kind", "file")},
                    "columns": {c["name"]: c.get("unit", "") for c in spec.get("columns", ())},
                }
                for spec in known["modalities"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(
                Problem(
                    str(bundle),
                    "this is not a readable bundle",
                    expected=f"a bundle folder, or one of {', '.join(shipped('bundle'))}",
                    got=type(error).__name__,
                    remedy="Give the bundle folder that `dymo-med train` wrote (RUN/bundle)",
                )
            ) from error
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        return
    for name, value in facts.items():
        if name == "modalities":
            for spec in value:
                columns = ", ".join(f"{c} {u}".rstrip() for c, u in spec["columns"].items())
                kind = f"{spec['kind']}: {columns}" if columns else spec["kind"]
                out_console.print(escape(f"modality {spec['name']} ({spec['file']}), {kind}"))
        else:
            shown = value if isinstance(value, str) else None
            if isinstance(value, Mapping):
                shown = ", ".join(
                    f"{k} {' or '.join(v) if isinstance(v, list) else v}" for k, v in value.items()
                )
            out_console.print(escape(f"{name}: {shown if shown is not None else ', '.join(value)}"))


@app.command()
def demo(
    out: Out = Path("demo"),
    device: Device = "auto",
    seed: Seed = 0,
    train: Annotated[
        bool, typer.Option("--train", help="Train a bundle first instead of using the shipped one.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole path on data made on the spot; print where the report is."""
    from dymo_med.demo import run_demo

    run_demo(out, device=device, seed=seed, train_first=train, reporter=Reporter(quiet))


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="Folder for the cohort.")],
    patients: Annotated[int, typer.Option("--patients", "-n", min=8, help="How many.")] = 400,
    seed: Seed = 0,
    size: Annotated[
        int, typer.Option("--size", min=16, max=256, help="Voxels along each axis.")
    ] = 48,
    setting: Annotated[
        str, typer.Option("--setting", help="How easy or hard: default or hard.")
    ] = "default",
    dials: Annotated[
        Path | None, typer.Option("--dials", help="YAML file of dials that the setting changes.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Make a multi-sequence MRI and EHR cohort with known truth."""
    from dymo_med.data.dials import setting as named
    from dymo_med.data.simulate import simulate as run

    reporter = Reporter(quiet)
    chosen = named(setting, dials)
    with reporter.bar("Simulating patients") as progress:
        folder = run(out, patients, seed=seed, size=size, progress=progress, dials=chosen)
    reporter.say(f"{patients} patients in {folder}")
    reporter.say(f"next: dymo-med check {folder}")


@app.command()
def check(
    path: Annotated[
        Path,
        typer.Argument(help="A cohort, a patient directory, a recipe, a bundle or a prediction."),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            help="The bundle or cohort that a patient directory is for, the cohort that a recipe "
            "is for, the bundle that a cohort is for.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Validate a cohort, patient directory, recipe or bundle, or audit a prediction."""
    from dymo_med.inference.check import check as run

    reporter = Reporter(quiet or as_json)
    with reporter.bar("Checking") as progress:
        report = run(path, against=against, progress=progress)
    if as_json:
        sys.stdout.write(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")
    else:
        for problem in report.problems:
            err_console.print(escape(str(problem)))
        if not quiet:
            from dymo_med.inference.check_tables import tables

            for part in tables(report):
                out_console.print(part, soft_wrap=False)
                out_console.print()
        for note in report.notes:
            reporter.say(f"note: {note}")
        if report.unused:
            reporter.say(f"not looked at: {_first(report.unused, 10)}")
        if report.admitted is not None:
            same = "as stated" if report.reproduced else "not as stated"
            reporter.say(f"replayed: {', '.join(report.admitted) or 'nothing'} admitted, {same}")
        count = len(report.problems)
        noted = f", {_count(len(report.notes), 'note')}" if report.notes else ""
        reporter.say(f"{path}: {report.kind}, {_count(count, 'problem')}{noted}")
    raise typer.Exit(report.exit_code)


def _count(number: int, noun: str, nouns: str = "") -> str:
    """Return for example "no problem", "1 problem", "2 problems"."""
    return f"{number or 'no'} {(nouns or noun + 's') if number > 1 else noun}"


def _first(files: Mapping[str, int], most: int) -> str:
    """Return the names of the first files, with the number of records where there are several."""
    shown = [f"{f} ({n} records)" if n > 1 else f for f, n in list(files.items())[:most]]
    rest = len(files) - len(shown)
    return ", ".join(shown) + (f" and {_count(rest, 'other')}" if rest else "")


def _seconds(budget: str) -> float:
    """Return a length of time in seconds.

    Raises:
        ConfigError: If it is no length of time.
    """
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)\s*(s|m|min|h)?", budget.strip().lower())
    number = float(found[1]) if found else 0.0
    if not found or not number:
        raise ConfigError(
            Problem(
                "--budget",
                "it is no length of time",
                expected="a number and s, m or h",
                got=budget[:20],
                remedy="Write for example 20m",
            )
        )
    return number * {"s": 1, "m": 60, "min": 60, "h": 3600, None: 60}[found[2]]


@app.command()
def describe(
    folder: Annotated[
        Path, typer.Argument(help="Folder of patient directories, or a BIDS dataset.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write; default: cohort.yaml in the folder."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write a first cohort.yaml: types, ranges, what to confirm, likely identifiers left out."""
    from dymo_med.data.describe import describe as run
    from dymo_med.files import write_text

    path = out or folder / "cohort.yaml"
    if path.exists():
        raise ConfigError(
            Problem(
                str(path),
                "is there already",
                expected="a new file",
                remedy="Remove it, or name another one with --out",
            )
        )
    found = run(folder)
    write_text(path, found.text)
    reporter = Reporter(quiet)
    for name, count in found.modalities.items():
        reporter.say(f"{name}: {count} of {_count(found.records, 'record')}")
    for column, why in found.left_out.items():
        reporter.say(f"left out: {column}, {why}")
    for what in found.confirm:
        reporter.say(f"confirm: {what}")
    reporter.say(f"cohort: {path}; look at every line that says CONFIRM")
    reporter.say(f"next: dymo-med check {folder}")


@app.command()
def train(
    cohort: CohortPath,
    out: Out,
    recipe: Annotated[
        Path | None,
        typer.Argument(
            callback=_recipe,
            help="Recipe (YAML), or the name of one that is installed. Without one, it is chosen"
            " from the cohort.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Time for choosing a recipe and training, such as 90s, 20m or 2h. [default: 20m]",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoints in --out.")
    ] = False,
    harm: Annotated[
        float | None,
        typer.Option(
            "--harm",
            help="Use recoveries only where it is proven that they turn less than this share of"
            " patients' answers from right to wrong, such as 0.05.",
        ),
    ] = None,
    device: Device = "auto",
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Instead of the recipe's seed.")
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train imputer and backbone, fit statistics and calibration, write a bundle."""
    from dymo_med.training.train import BUDGET_S
    from dymo_med.training.train import train as run

    reporter = Reporter(quiet)
    budget_s = BUDGET_S if budget is None else _seconds(budget)
    if recipe is not None and budget is not None:
        raise ConfigError(
            Problem(
                "--budget",
                "a recipe says how long to train, and there is one",
                expected="no recipe, or no budget",
                remedy="Leave one of them out",
            )
        )
    if harm is not None and not 0 < harm < 1:
        raise ConfigError(
            Problem(
                "--harm",
                "it is no share of patients",
                expected="a number above 0 and below 1",
                got=f"{harm:g}",
                remedy="Write for example 0.05",
            )
        )
    warned: list[str] = []
    with reporter.bar("Reading records") as update:

        def epoch(stage: str, done: int, most: int, figures: Mapping[str, float]) -> None:
            if out_console.is_terminal:
                update(done, most, f"{stage}: loss {figures['loss']:.4f}")
            elif verbose or done == 1 or done % 5 == 0:
                shown = "  ".join(f"{k} {v:.4f}" for k, v in figures.items() if k != "epoch")
                reporter.say(f"{stage} epoch {done} of at most {most}: {shown}")

        bundle = run(
            recipe,
            cohort,
            out,
            resume=resume,
            device=device,
            seed=seed,
            budget_s=budget_s,
            harm=harm,
            progress=epoch,
            reading=update,
            say=reporter.say,
            warn=warned.append,
        )
    for text in warned:
        err_console.print(f"[bold yellow]warning:[/] {escape(text)}")
    reporter.say(f"bundle: {bundle}")
    reporter.say(f"next: dymo-med evaluate --bundle {bundle} --cohort {cohort} --out EVALUATION")


@app.command()
def predict(
    bundle: Bundle,
    out: Out,
    patient_dir: Annotated[
        Path | None,
        typer.Option(
            "--patient-dir",
            "-i",
            help="Folder with one patient's scans and tables, or with a folder for each of many.",
        ),
    ] = None,
    cohort: Annotated[
        Path | None,
        typer.Option(
            "--cohort", "-c", help="Instead: all patients of a cohort; needs no labels or splits."
        ),
    ] = None,
    no_explain: Annotated[
        bool, typer.Option("--no-explain", help="Leave out attributions (faster).")
    ] = False,
    selector: Annotated[
        str | None, typer.Option("--selector", help="Another selector than the bundle's default.")
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            "--draws",
            min=0,
            max=1000,
            help="Draw recoveries so often to see what would change; default 20.",
        ),
    ] = None,
    pdf: Pdf = False,
    dicom: Dicom = False,
    fhir: Fhir = False,
    bids: Bids = False,
    identify: Identify = False,
    without_refused: WithoutRefused = False,
    probabilities: Annotated[
        bool,
        typer.Option("--probabilities", help="Of a segmentation: write each region's map too."),
    ] = False,
    flips: Flips = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Of many patients: go on with an interrupted run.")
    ] = False,
    num_parts: Annotated[
        int, typer.Option("--num-parts", min=1, help="Of many: how many processes share the work.")
    ] = 1,
    part_id: Annotated[
        int, typer.Option("--part-id", min=0, help="Which of them this is, from 0.")
    ] = 0,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Answer for one patient, or for each of many: prediction.json, report.html, recovered/."""
    from dymo_med.bundle import load_bundle, task_of
    from dymo_med.bundle_segmentation import SegmentationBundle, load_segmentation_bundle
    from dymo_med.inference.many import find_records, records_of
    from dymo_med.inference.predict import predict_patient
    from dymo_med.inference.segment import segment_patient

    if (patient_dir is None) == (cohort is None):
        raise typer.BadParameter("name one of --patient-dir and --cohort", param_hint="predict")
    outputs = _asked(dicom=dicom, fhir=fhir, bids=bids)
    model: SegmentationBundle | ModelBundle
    if task_of(bundle) == "segmentation":
        asked = {"--no-explain": no_explain, "--identify": identify and not outputs}
        _refuse("a segmentation", asked | {"--draws": draws is not None})
        model = load_segmentation_bundle(bundle, device)
        options: dict[str, Any] = {
            "probabilities": probabilities,
            "flips": flips,
            "selector": selector,
            "seed": seed,
            "pdf": pdf,
            "treat_refused_as_missing": without_refused,
        }
    else:
        _refuse(
            "a classification or regression", {"--probabilities": probabilities, "--flips": flips}
        )
        model = load_bundle(bundle, device)
        model = model if selector is None else model.with_selector(selector)
        options = {
            "explain": not no_explain,
            "seed": seed,
            "draws": 20 if draws is None else draws,
            "pdf": pdf,
            "identify": identify,
            "treat_refused_as_missing": without_refused,
        }
    if cohort is not None:
        records, specs, missing_values = records_of(model, cohort)
        model = replace(model, specs=specs, missing_values=missing_values)
    else:
        assert patient_dir is not None
        records = find_records(patient_dir, model.specs)
    if records:
        many = {"selector": selector, **options, "outputs": outputs, "identified": identify}
        _predict_many(
            model, records, out, options, many, resume, num_parts, part_id, Reporter(quiet)
        )
        return
    assert patient_dir is not None
    if resume or num_parts > 1:
        what = "--resume" if resume else "--num-parts"
        raise typer.BadParameter(
            "the folder is one patient's, and this is for many", param_hint=what
        )
    reporter = Reporter(quiet)
    if isinstance(model, SegmentationBundle):
        _tell_segmentation(segment_patient(patient_dir, model, out, **options), out, reporter)
        if pdf:
            reporter.say(f"pdf: {out / 'report.pdf'}")
    else:
        _tell_prediction(predict_patient(patient_dir, model, out, **options), out, pdf, reporter)
    _export(out, outputs, patient_dir, None, identify, model.specs, reporter)


def _predict_many(
    model: ModelBundle | SegmentationBundle,
    records: Sequence[CohortRecord],
    out: Path,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    resume: bool,
    num_parts: int,
    part_id: int,
    reporter: Reporter,
) -> None:
    """Answer for many patients, and say what became of them."""
    from dymo_med.bundle_segmentation import SegmentationBundle
    from dymo_med.inference.many import predict_many
    from dymo_med.inference.predict import predict_patient
    from dymo_med.inference.segment import segment_patient

    def one(entry: CohortRecord, place: Path) -> object:
        known = {**options, "patient_id": entry.patient_id}
        if isinstance(model, SegmentationBundle):
            return segment_patient(entry.folder, model, place, **known)
        return predict_patient(entry.folder, model, place, **known)

    def also(entry: CohortRecord, place: Path) -> None:
        identify, quiet = settings["identified"], Reporter(True)
        _export(place, settings["outputs"], entry.folder, None, identify, model.specs, quiet)

    with reporter.bar("Predicting") as progress:
        result = predict_many(
            model,
            records,
            one,
            out,
            settings=settings,
            also=also if settings["outputs"] else None,
            resume=resume,
            num_parts=num_parts,
            part_id=part_id,
            command=shlex.join(["dymo-med", *sys.argv[1:]]),
            progress=progress,
        )
    if result.open_records:
        still = _count(result.open_records, "patient")
        reporter.say(f"part {part_id} of {num_parts} is done; {still} left to other parts")
        return
    told = ", ".join(f"{n} {status}" for status, n in sorted(result.counts.items()))
    reporter.say(f"{_count(result.records, 'record')}: {told}")
    if result.seen:
        was = _count(result.seen, "patient was", "patients were")
        reporter.say(f"note: {was} used to make the bundle: of them it is too sure")
    reporter.say(f"work list: {out / 'index.html'}")
    _end(result.failures, result.unexpected, out)


def _end(failures: int, unexpected: int, out: Path) -> None:
    """Say how many records failed, if any did, and end with the exit code that follows.

    Raises:
        Exit: If there are failures.
    """
    if failures:
        failed = _count(failures, "failure")
        if unexpected:
            failed += f", {unexpected} of them unexpected"
        err_console.print(escape(f"{failed}; see {out / 'failures.csv'}"))
        raise typer.Exit(1 if unexpected else 3)


def _tell_prediction(prediction: Prediction, out: Path, pdf: bool, reporter: Reporter) -> None:
    """Say what was answered."""
    shares = ", ".join(
        f"{c} {p:.1%}" for c, p in zip(prediction.classes, prediction.probabilities, strict=True)
    )
    if prediction.status == "abstained":
        shares = f"no answer, see below ({shares})"
    reporter.say(f"{prediction.record_id}: {shares}")
    number = prediction.value
    if number is not None:
        ends = ""
        if number.low is not None and number.high is not None:
            ends = f" ({number.coverage:.0%} interval {number.low:.4g} to {number.high:.4g})"
        reporter.say(f"value: {number.value:.4g} {number.unit}".rstrip() + ends)
    for word in ("observed", "refused", "trusted", "rejected", "absent"):
        names = getattr(prediction, word)
        if names:
            reporter.say(f"{word}: {', '.join(names)}")
    for warning in prediction.warnings:
        reporter.say(f"note: {warning}")
    reporter.say(f"report: {out / 'report.html'}")
    if pdf:
        reporter.say(f"pdf: {out / 'report.pdf'}")


def _export(
    folder: Path,
    names: Sequence[str],
    patient_dir: Path | None,
    out: Path | None,
    identify: bool,
    specs: Sequence[ModalitySpec],
    reporter: Reporter,
) -> None:
    """Write a prediction in other standards, and say where."""
    if not names:
        return
    from dymo_med.outputs import export as run

    files = {spec.name: spec.file for spec in specs}
    places, notes = run(folder, names, patient_dir, out=out, identify=identify, files=files)
    for note in notes:
        reporter.say(f"note: {note}")
    for name, place in zip(names, places, strict=True):
        reporter.say(f"{name}: {place}")


@app.command()
def export(
    prediction: Annotated[Path, typer.Argument(help="Folder that `dymo-med predict` wrote.")],
    patient_dir: Annotated[
        Path | None,
        typer.Option(
            "--patient-dir",
            "-i",
            help="The patient directory it was made from, so that DICOM refers to its images.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where to; default: beside the prediction."),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle",
            "-b",
            callback=_bundle,
            help="The bundle: knows how BIDS names its modalities.",
        ),
    ] = None,
    dicom: Dicom = False,
    fhir: Fhir = False,
    bids: Bids = False,
    identify: Identify = False,
    quiet: Quiet = False,
) -> None:
    """Write an earlier prediction for other systems: DICOM, FHIR, BIDS."""
    outputs = _asked(dicom=dicom, fhir=fhir, bids=bids)
    if not outputs:
        raise typer.BadParameter("say which: --dicom, --fhir or --bids", param_hint="export")
    specs: Sequence[ModalitySpec] = ()
    if bundle is not None:
        from dymo_med.bundle import load_bundle, task_of
        from dymo_med.bundle_segmentation import load_segmentation_bundle

        load = load_segmentation_bundle if task_of(bundle) == "segmentation" else load_bundle
        specs = load(bundle, "cpu").specs
    _export(prediction, outputs, patient_dir, out, identify, specs, Reporter(quiet))


def _asked(**outputs: bool) -> list[str]:
    """Return the outputs for other systems that were asked for."""
    return [name for name, given in outputs.items() if given]


def _tell_segmentation(answer: Segmentation, out: Path, reporter: Reporter) -> None:
    """Say what was found."""
    found = ", ".join(f"{name} {ml:.1f} mL" for name, ml in answer.volumes_ml.items())
    reporter.say(f"{answer.record_id}: {found}")
    for word in ("observed", "trusted", "rejected", "absent"):
        names = getattr(answer, word)
        if names:
            reporter.say(f"{word}: {', '.join(names)}")
    for warning in answer.warnings:
        reporter.say(f"note: {warning}")
    reporter.say(f"segmentation: {out / 'segmentation.nii.gz'}")
    reporter.say(f"report: {out / 'report.html'}")


def _refuse(task: str, options: Mapping[str, bool]) -> None:
    """Refuse options that a bundle's task has no use for.

    Raises:
        ConfigError: If one was given.
    """
    for name, given in options.items():
        if given:
            raise ConfigError(
                Problem(
                    name,
                    f"the bundle is for {task}",
                    got="an option that it does not have",
                    remedy="Leave the option out",
                )
            )


@app.command()
def report(
    prediction: Annotated[
        Path, typer.Argument(help="The prediction.json of an earlier prediction.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page; default: report.html beside it.")
    ] = None,
    pdf: Pdf = False,
    quiet: Quiet = False,
) -> None:
    """Make the page of a prediction again, from its prediction.json alone."""
    from dymo_med.inference.prediction_file import read_prediction
    from dymo_med.inference.report import write_report
    from dymo_med.inference.segmentation_file import is_segmentation, read_segmentation
    from dymo_med.inference.segmentation_page import write_segmentation_report

    page = out or prediction.with_name("report.html")
    if page.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter("the page's name must end in .html", param_hint="--out")
    reporter = Reporter(quiet)
    if is_segmentation(prediction):
        outline = read_segmentation(prediction)
        write_segmentation_report(outline, page)
        reporter.say(f"report: {page}")
        if pdf:
            from dymo_med.inference.segmentation_pdf import write_segmentation_pdf

            write_segmentation_pdf(outline, page.with_suffix(".pdf"))
            reporter.say(f"pdf: {page.with_suffix('.pdf')}")
        return
    file = read_prediction(prediction)
    write_report(file, page)
    reporter.say(f"report: {page}")
    if pdf:
        from dymo_med.inference.pdf import write_pdf

        write_pdf(file, page.with_suffix(".pdf"))
        reporter.say(f"pdf: {page.with_suffix('.pdf')}")


@app.command()
def review(
    out: Annotated[
        Path,
        typer.Argument(help="A prediction's folder, a folder of these, or an evaluation."),
    ],
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Where to listen; 0: any free port.")
    ] = 8000,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Only print the address.")
    ] = False,
) -> None:
    """Read patients' pages in the browser and keep verdicts beside them, in review.json."""
    from dymo_med.review import ReviewServer

    server = ReviewServer(out, port)
    # Where there is no screen, a browser of text would take over the terminal.
    screen = not sys.platform.startswith("linux") or {"DISPLAY", "WAYLAND_DISPLAY"} & set(environ)
    if screen and not no_browser:
        import webbrowser

        webbrowser.open(server.url)
    reporter = Reporter(False)
    reporter.say(f"{_count(len(server.pages.keys()), 'patient')} at {server.url}")
    with suppress(KeyboardInterrupt):
        reporter.say("Ctrl-C stops it")
        server.run()


@app.command()
def evaluate(
    bundle: Bundle,
    cohort: CohortPath,
    out: Out,
    split: Annotated[str, typer.Option("--split", help="Split to report on.")] = "test",
    missing: Annotated[
        list[str] | None,
        typer.Option(
            "--missing",
            "-m",
            help="as-is, rate:0.4, mean-rate:0.4, batch-rate:0.4, drop:t1ce,labs, keep:t1+t2, "
            "keep:*, cells:0.3, columns:0.3, columns-most:0.3, columns-least:0.3, mcar:0.3, "
            "mar:0.3, mnar:0.3 or replay:FILE; repeatable.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted evaluation.")
    ] = False,
    reports: Annotated[
        int | None,
        typer.Option(
            "--reports", min=0, help="Write at most this many patient reports; default: all."
        ),
    ] = None,
    selector: Annotated[
        list[str] | None,
        typer.Option("--selector", help="Compare this selector too; repeatable."),
    ] = None,
    draws: Annotated[
        int,
        typer.Option(
            "--draws", min=0, help="Draw recoveries so often (19 or more) to judge their spread."
        ),
    ] = 0,
    allow_overlap: Annotated[
        bool,
        typer.Option("--allow-overlap", help="Evaluate on patients whom the bundle was made from."),
    ] = False,
    identify: Identify = False,
    without_refused: WithoutRefused = False,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against", help="Bundle of the same cohort to set beside this one; repeatable."
        ),
    ] = None,
    flips: Flips = False,
    num_parts: Annotated[
        int, typer.Option("--num-parts", min=1, help="How many processes share the work.")
    ] = 1,
    part_id: Annotated[
        int, typer.Option("--part-id", min=0, help="Which of them this is, from 0.")
    ] = 0,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Evaluate a cohort under missing-data scenarios, each method side by side."""
    from dymo_med.bundle import load_bundle, task_of
    from dymo_med.bundle_segmentation import load_segmentation_bundle
    from dymo_med.data.cohort import read_cohort
    from dymo_med.inference.evaluate import evaluate as run
    from dymo_med.inference.segment_evaluate import evaluate_segmentation

    reporter = Reporter(quiet)
    segments = task_of(bundle) == "segmentation"
    if segments:
        asked = {"--draws": draws > 0, "--identify": identify, "--against": bool(against)}
        _refuse("a segmentation", asked | {"--reports": reports is not None})
    else:
        _refuse("a classification or regression", {"--flips": flips})
    with reporter.bar("Evaluating") as progress:
        if segments:
            result = evaluate_segmentation(
                load_segmentation_bundle(bundle, device),
                read_cohort(cohort),
                out,
                split=split,
                scenarios=tuple(missing or ["subsets"]),
                methods=tuple(selector or ()),
                flips=flips,
                seed=seed,
                resume=resume,
                allow_overlap=allow_overlap,
                treat_refused_as_missing=without_refused,
                num_parts=num_parts,
                part_id=part_id,
                command=shlex.join(["dymo-med", *sys.argv[1:]]),
                progress=progress,
            )
        else:
            result = run(
                load_bundle(bundle, device),
                read_cohort(cohort),
                out,
                split=split,
                scenarios=tuple(missing or ["as-is"]),
                seed=seed,
                resume=resume,
                reports=True if reports is None else reports,
                methods=tuple(selector or ()),
                draws=draws,
                allow_overlap=allow_overlap,
                identify=identify,
                treat_refused_as_missing=without_refused,
                against=tuple(load_bundle(other, device) for other in against or ()),
                num_parts=num_parts,
                part_id=part_id,
                command=shlex.join(["dymo-med", *sys.argv[1:]]),
                progress=progress,
            )
    if result.open_batches:
        still = _count(result.open_batches, "unfinished batch", "unfinished batches")
        reporter.say(f"part {part_id} of {num_parts} is done; {still} left to other parts")
        return
    for note in result.notes:
        reporter.say(f"note: {note}")
    reporter.say(f"cohort page: {out / 'index.html'}")
    _end(result.failures, result.unexpected, out)


@app.command()
def impute(
    patient_dir: PatientDir,
    bundle: Bundle,
    out: Out,
    identify: Identify = False,
    without_refused: WithoutRefused = False,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write only the recovered scans and tables of one patient."""
    from dymo_med.bundle import load_bundle, task_of
    from dymo_med.bundle_segmentation import load_segmentation_bundle
    from dymo_med.inference.recovered import impute_patient
    from dymo_med.inference.segment import impute_segmented

    if task_of(bundle) == "segmentation":
        _refuse("a segmentation", {"--identify": identify})
        model = load_segmentation_bundle(bundle, device)
        written = impute_segmented(
            patient_dir, model, out, seed=seed, treat_refused_as_missing=without_refused
        )
    else:
        written = impute_patient(
            patient_dir,
            load_bundle(bundle, device),
            out,
            seed=seed,
            identify=identify,
            treat_refused_as_missing=without_refused,
        )
    reporter = Reporter(quiet)
    for file in written:
        reporter.say(str(file))
    if not written:
        reporter.say("nothing was missing")


# The list of commands shows whole sentences: without this, they are cut to the terminal's width.
for _registered in app.registered_commands:
    _registered.short_help = str(_registered.callback.__doc__).split("\n")[0]


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line and exit with a documented code.

    0 done; 1 a bug; 2 usage, recipe or cohort description wrong; 3 patient data wrong; 4 bundle
    wrong or incompatible.
    """
    if threading.current_thread() is threading.main_thread():
        # A run that is told to stop cleans up like one that fails; killed at once, it could not.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with _ours_first():
        try:
            return app(args=arguments, standalone_mode=True)
        except DymoMedError as error:
            for problem in error.problems:
                err_console.print(f"error: {escape(str(problem))}")
            sys.exit(error.exit_code)
        except OSError as error:
            if error.errno not in _ENVIRONMENT:
                raise
            name = os.fsdecode(error.filename or "a file")
            remedy = _ENVIRONMENT[error.errno]
            err_console.print(f"error: {escape(name)}: {error.strerror}. {remedy}.")
            sys.exit(2)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            err_console.print(f"error: memory does not hold what this takes. {_MEMORY}.")
            sys.exit(2)


@contextmanager
def _ours_first() -> Iterator[None]:
    """Keep back what libraries print on standard error until our own messages are out.

    They print from C as well, past everything that Python could turn off. Beside an error that we
    name ourselves their lines are left out: one message says what is wrong. What this package logs
    is a note of its own.
    """
    try:
        own = os.dup(2)
    except OSError:  # there is no standard error
        with heard(_Notes()):
            yield
        return
    before = sys.stderr
    with tempfile.TemporaryFile() as kept, _Ours(own) as ours:
        if _is_standard(before):
            before.flush()
            sys.stderr = ours
        os.dup2(kept.fileno(), 2)
        named = False
        try:
            with heard(_Notes()):
                yield
        except SystemExit as stopped:
            named = stopped.code not in (None, 0)
            raise
        finally:
            with suppress(OSError, ValueError):
                before.flush()
            os.dup2(ours.fileno(), 2)
            sys.stderr = before
            kept.seek(0)
            text = "" if named else kept.read(2**20).decode(errors="replace")
            lines = dict.fromkeys(text.split("\n"))
            for line in [line for line in lines if line.strip()][:_MOST_LINES]:
                err_console.print(escape(repr(line[:500])[1:-1]))


class _Ours(io.TextIOWrapper):
    """Standard error for us and for what prints in our name; lines of all others go to number 2.

    Args:
        number: File descriptor of the real one.
    """

    _names = ("dymo_med", "rich", "typer", "click")

    def __init__(self, number: int) -> None:
        super().__init__(os.fdopen(number, "wb"), "utf-8", "replace", line_buffering=True)

    def write(self, text: str) -> int:
        """Write a text for its caller."""
        caller = str(sys._getframe(1).f_globals.get("__name__", ""))
        if caller.partition(".")[0] in self._names:
            return super().write(text)
        return os.write(2, text.encode(errors="replace")) and len(text)


class _Notes(logging.Handler):
    """Prints what this package logs; on request what libraries warn of, and tracebacks."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line, and the traceback if there is one."""
        library = record.name == LIBRARIES
        if library and not is_verbose():
            return
        word = "warning" if library else "note"
        err_console.print(escape(f"{word}: {record.getMessage()}"))
        if record.exc_info:
            text = "".join(traceback.format_exception(*record.exc_info))
            err_console.print(escape(text), end="")


def _is_standard(stream: Any) -> bool:
    """Return whether a stream writes to standard error, and not to what a test put there."""
    try:
        return bool(stream.fileno() == 2)
    except (AttributeError, OSError, ValueError):
        return False
