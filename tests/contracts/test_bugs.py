"""A bug that one record brings up costs that record an answer, whatever the task and the stage."""

import csv

import pytest
import torch

from dymo_med.bundle import load_bundle
from dymo_med.cli import main
from dymo_med.data.cohort import read_cohort
from dymo_med.errors import BundleError, Problem
from dymo_med.inference import check, evaluate, quality, read_ahead, segment_evaluate
from tests.contracts.conftest import LACKS, TASKS

VICTIM, SCENARIO = "p18", "rate:0.6"
HIDDEN = "hidden value 12"  # what no message may repeat
BUNDLES = {"segmentation": ("segmentation", "shared_unet", "synthesis")}
BUGS = {
    "read": ("read", read_ahead, "examine_record", RuntimeError(HIDDEN)),
    "a library's error of files": ("read", read_ahead, "examine_record", OSError(HIDDEN)),
    "a file the disk does not give": ("read", read_ahead, "examine_record", OSError(5, HIDDEN)),
    "hide": ("hide", evaluate, "apply", IndexError(HIDDEN)),
    "answer": ("predict", evaluate, "answer", RuntimeError(HIDDEN)),
    "memory of a GPU": (
        *("predict", evaluate, "answer"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ),
    "memory": ("predict", evaluate, "answer", MemoryError()),
    "quality": ("predict", quality, "measure", ValueError(HIDDEN)),
    "report": ("report", evaluate, "explain_record", AssertionError(HIDDEN)),
    "page": ("report", evaluate, "write_prediction", KeyError(HIDDEN)),
}
SEGMENTATION_BUGS = {
    "read": ("read", segment_evaluate, "read_known", RuntimeError(HIDDEN)),
    "mask": ("read", segment_evaluate, "own_grid", ZeroDivisionError(HIDDEN)),
    "answer": ("predict", segment_evaluate, "segment_record", RuntimeError(HIDDEN)),
    "memory": ("predict", segment_evaluate, "segment_record", MemoryError()),
}


def concerned(given):
    """The ids of the records that a call is about."""
    found = []
    for value in given:
        if isinstance(value, list):
            found += concerned(value)
        elif isinstance(value, int) and len(found) == len(LACKS):  # a row of the batch before
            return [found[value]]
        else:
            batch = getattr(value, "batch", value)
            found += getattr(batch, "record_ids", ())
            found += [batch.record_id] if hasattr(batch, "record_id") else []
    return found


def breaking(monkeypatch, owner, name, error):
    original = getattr(owner, name)

    def breaks(*given, **named):
        if VICTIM in concerned(given):
            raise error
        return original(*given, **named)

    monkeypatch.setattr(owner, name, breaks)


def evaluated(tiny, task, out, *more):
    """Evaluate on the command line; return the exit code, the failures and who was answered."""
    bundle = tiny.bundle(*BUNDLES.get(task, (task,)))
    arguments = ["evaluate", "-b", bundle, "-c", tiny.cohort(task), "-o", out, "-d", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in (*arguments, "-m", SCENARIO, *more)])
    with (out / "failures.csv").open() as stream:
        failures = list(csv.DictReader(stream))
    table = "cases.csv" if task == "segmentation" else "predictions.csv"
    with (out / table).open() as stream:
        return stopped.value.code, failures, {row["record_id"] for row in csv.DictReader(stream)}


@pytest.fixture
def plain(monkeypatch):
    """Evaluations without page and plots."""
    for page in ("write_pages", "write_number_page"):
        monkeypatch.setattr(evaluate, page, lambda *_, **__: None)
    for plot in ("_plot", "_plot_pictures"):
        monkeypatch.setattr(quality, plot, lambda *_: None)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("task", "case"),
    [
        *(("classification", case) for case in BUGS),
        ("regression", "answer"),
        *(("segmentation", case) for case in SEGMENTATION_BUGS),
    ],
)
def test_a_bug_in_one_record_costs_a_row(tiny, capsys, monkeypatch, tmp_path, task, case):
    bugs = SEGMENTATION_BUGS if task == "segmentation" else BUGS
    stage, owner, name, error = bugs[case]
    breaking(monkeypatch, owner, name, error)
    reports = stage == "report"
    pages = [] if task == "segmentation" else ["--reports", 4 * reports]
    code, failures, answered = evaluated(tiny, task, tmp_path / "out", *pages)
    assert code == 1
    (row,) = failures
    everywhere = stage == "read" or task == "segmentation"
    assert (row["record_id"], row["stage"]) == (VICTIM, stage)
    assert row["scenario"] == ("all" if everywhere else SCENARIO)
    assert type(error).__name__ in row["message"] and HIDDEN not in row["message"]
    assert ("memory" in row["message"]) == case.startswith("memory")
    assert set(LACKS) - answered == (set() if reports else {VICTIM})
    if reports:
        names = {path.name for path in (tmp_path / "out" / "reports").iterdir()}
        assert names == set(LACKS) - {VICTIM}
    printed = capsys.readouterr().err
    assert "1 failure, 1 of them unexpected" in printed and HIDDEN not in printed
    if case == "answer":  # what is finished stays as it is: going on says the same
        code, again, _ = evaluated(tiny, task, tmp_path / "out", *pages, "--resume")
        assert (code, again) == (1, failures)


@pytest.mark.usefixtures("plain")
def test_what_memory_holds_for_some_records_only_is_still_answered(tiny, monkeypatch, tmp_path):
    original = evaluate.answer

    def cramped(bundle, records, **given):
        if len(records) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(bundle, records, **given)

    monkeypatch.setattr(evaluate, "answer", cramped)
    code, failures, answered = evaluated(tiny, "classification", tmp_path / "out", "--reports", 0)
    assert (code, failures, answered) == (0, [], set(LACKS))


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), BundleError(Problem("bundle", "is gone"))],
    ids=["a full disk", "the bundle"],
)
def test_what_concerns_all_records_ends_an_evaluation(tiny, monkeypatch, tmp_path, error):
    breaking(monkeypatch, evaluate, "write_prediction", error)
    model = load_bundle(tiny.bundle(), "cpu")
    with pytest.raises(type(error)):
        evaluate.evaluate(model, read_cohort(tiny.cohort("classification")), tmp_path / "out")
    assert not (tmp_path / "out" / "failures.csv").exists()


def test_every_task_is_in_the_table():
    assert {*BUNDLES, "classification", "regression"} == set(TASKS)


def test_a_survey_of_a_cohort_goes_on_after_a_bug(tiny, capsys, monkeypatch):
    breaking(monkeypatch, check, "examine_record", RuntimeError(HIDDEN))
    folder = tiny.cohort("classification")
    with pytest.raises(SystemExit) as end:
        main(["check", str(folder)])
    assert end.value.code == 1
    said = capsys.readouterr()
    assert HIDDEN not in said.out + said.err
    found = check.check(folder)
    assert [p.where for p in found.problems] == [f"Patient {VICTIM}"]
    assert {row.record_id for row in found.rows} >= {"p17", "p19"}
