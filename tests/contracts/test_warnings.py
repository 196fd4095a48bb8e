"""Libraries are not silenced: what they say is logged, and what concerns the user is said."""

import logging
import sys
import warnings

import pytest
import yaml
from sklearn.exceptions import ConvergenceWarning

from dymo_med.bundle import load_bundle
from dymo_med.cli import main
from dymo_med.data.cohort import read_cohort
from dymo_med.inference import evaluate as module
from dymo_med.inference import predict, recovered
from dymo_med.logs import LIBRARIES, OURS, heard
from dymo_med.selection.gate import Gate
from dymo_med.training import fusion, selectors
from dymo_med.training import train as training
from tests.contracts.conftest import recipe_of


def run(capsys, *arguments, code=0):
    """Run a command; return what it printed on standard error."""
    before = warnings.showwarning, list(warnings.filters)
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    printed = capsys.readouterr()
    assert stopped.value.code == code, printed.out + printed.err
    # Everything is as it was.
    assert (warnings.showwarning, list(warnings.filters)) == before
    assert logging.getLogger(OURS).level == logging.NOTSET
    assert not logging.getLogger(LIBRARIES).handlers
    return printed.err


def warning_of(monkeypatch, owner, name, text, category=UserWarning):
    original = getattr(owner, name)

    def warns(*given, **named):
        warnings.warn(text, category, stacklevel=1)
        return original(*given, **named)

    monkeypatch.setattr(owner, name, warns)


@pytest.fixture(autouse=True)
def _as_a_user(monkeypatch):
    """Without what pytest asks of warnings, by which a user's choice is known."""
    monkeypatch.setattr(sys, "warnoptions", [])


def commands(tiny, tmp_path):
    bundle, patient = tiny.bundle(), tiny.patients / "p17"
    about = "-b", bundle, "-d", "cpu", "-o", tmp_path / "out"
    return {
        "predict": ["predict", "-i", patient, *about, "--no-explain"],
        "impute": ["impute", "-i", patient, *about],
        "evaluate": ["evaluate", "-c", tiny.cohort("classification"), *about, "--reports", 0],
    }


@pytest.mark.parametrize("name", ["predict", "impute", "evaluate"])
def test_warnings_of_libraries_are_shown_on_request(tiny, capsys, tmp_path, monkeypatch, name):
    monkeypatch.setattr(module, "write_pages", lambda *_, **__: None)
    owner = {"evaluate": module, "predict": predict, "impute": recovered}[name]
    warning_of(monkeypatch, owner, "answer", "an axis is\n  deprecated")
    arguments = commands(tiny, tmp_path)[name]
    printed = run(capsys, *arguments, "--verbose")
    assert "warning: UserWarning: an axis is deprecated" in printed
    again = [tmp_path / "quiet" if a == tmp_path / "out" else a for a in arguments]
    assert "deprecated" not in run(capsys, *again)


def test_who_chose_what_python_warns_of_is_left_with_it(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    with heard(logging.NullHandler()), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            warnings.warn("as asked", UserWarning, stacklevel=1)


def test_a_training_keeps_what_was_warned_of(tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "draw_curves", lambda *_: None)
    warning_of(monkeypatch, fusion, "fit_statistics", "singular")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of("classification", "transformer", "template")))
    about = "train", recipe, "-c", tiny.cohort("classification"), "-d", "cpu", "-o"
    assert "singular" not in run(capsys, *about, tmp_path / "run")
    (line,) = (tmp_path / "run" / "warnings.log").read_text().splitlines()
    assert line.endswith(" UserWarning: singular") and str(tmp_path) not in line
    monkeypatch.undo()
    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.setattr(training, "draw_curves", lambda *_: None)
    run(capsys, *about, tmp_path / "calm")
    assert not (tmp_path / "calm" / "warnings.log").exists()


def test_a_fit_that_does_not_converge_is_heard(tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "draw_curves", lambda *_: None)
    warning_of(monkeypatch, Gate, "fit", "lbfgs failed to converge", ConvergenceWarning)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of("classification", "transformer", "template")))
    out = tmp_path / "run"
    printed = run(
        *(
            capsys,
            "train",
            recipe,
            "-c",
            tiny.cohort("classification"),
            "-d",
            "cpu",
            "-o",
            out,
            "-q",
        )
    )
    said = "Selector gate: its fit on calibration patients did not converge"
    assert f"note: {said}" in printed and "lbfgs" not in printed
    assert said in (out / "warnings.log").read_text()


def test_other_warnings_of_a_fit_pass_as_they_are(caplog):
    with pytest.warns(RuntimeWarning, match="overflow"), selectors._convergence_heard("gate"):
        warnings.warn("overflow", RuntimeWarning, stacklevel=1)
    assert not caplog.records


# --- All reports ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, 4, 1_000_000, None])
def test_all_reports_are_all_reports_however_that_is_put(
    tiny, capsys, tmp_path, monkeypatch, first
):
    monkeypatch.setattr(module, "write_pages", lambda *_, **__: None)
    monkeypatch.setattr(module._Run, "_report", lambda *_: None)
    bundle, cohort = load_bundle(tiny.bundle(), "cpu"), read_cohort(tiny.cohort("classification"))
    out = tmp_path / "out"
    if first is None:  # the command line, which says nothing of reports
        run(capsys, *commands(tiny, tmp_path)["evaluate"][:-2])
    else:
        evaluate = module.evaluate(bundle, cohort, out, reports=first)
        assert evaluate.records == 4
    for again in (True, 4, 1_000_000):
        module.evaluate(bundle, cohort, out, reports=again, resume=True)
    arguments = commands(tiny, tmp_path)["evaluate"][:-2]
    run(capsys, *arguments, "--resume")
    run(capsys, *arguments, "--resume", "--reports", 3, code=2)
