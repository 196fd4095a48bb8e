"""What somebody meets first: help, versions, what is installed and by which name."""

import json
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from dymo_med import __version__
from dymo_med.cli import app, main
from dymo_med.shipped import found, shipped

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = get_command(app).commands


def told(*arguments, **environment):
    done = CliRunner().invoke(app, list(map(str, arguments)), env=environment)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_whole_at_80_columns(command):
    text = told(*filter(None, [command]), "--help", COLUMNS="80")
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "..." not in text.replace("[ARGS]...", "").replace("]...", "")
    options = COMMANDS[command].params if command else []
    names = [o for p in options for o in (*p.opts, *p.secondary_opts) if o.startswith("--")]
    assert [name for name in names if name not in text] == []


def test_the_version_says_whose_and_of_what_else():
    text = told("--version")
    assert text.startswith(f"dymo-med {__version__} (Python 3.")
    assert "torch " in text and "pydicom " in text


def test_info_lists_what_is_installed():
    facts = json.loads(told("info", "--json"))
    assert facts["bundles"] == ["simulated"]
    assert "simulated-small" in facts["recipes"]
    assert "brats2018" in facts["cohorts"]


def test_info_tells_what_a_bundle_needs():
    facts = json.loads(told("info", "simulated", "--json"))
    assert facts["target"]["classes"] == ["low", "high"]
    labs = next(m for m in facts["modalities"] if m["name"] == "labs")
    assert labs["columns"]["ldh"] == "U/L"
    assert "modality labs (ehr.csv), table: ldh U/L" in told("info", "simulated")


def test_info_of_no_bundle_names_those_there_are(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["info", str(tmp_path)])
    assert ended.value.code == 4
    assert "one of simulated" in capsys.readouterr().err


def test_a_name_stands_for_what_is_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundle, recipe = shipped("bundle")["simulated"], shipped("recipe")["simulated-small"]
    assert found(Path("simulated"), "bundle") == bundle
    for text in ("simulated-small", "simulated-small.yaml", "configs/simulated-small.yaml"):
        assert found(Path(text), "recipe") == recipe
    assert found(Path("another"), "recipe") == Path("another")
    assert found(tmp_path / "simulated", "bundle") == tmp_path / "simulated"
    (tmp_path / "simulated").mkdir()  # a cohort of that name is no bundle
    assert found(Path("simulated"), "bundle") == bundle
    (tmp_path / "simulated" / "configs").mkdir()
    (tmp_path / "simulated" / "configs" / "metadata.json").write_text("{}")
    assert found(Path("simulated"), "bundle") == Path("simulated")
    (tmp_path / "simulated-small").write_text("name: mine")
    assert found(Path("simulated-small"), "recipe") == Path("simulated-small")


def test_the_wheel_holds_recipes_and_cohorts():
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert built["targets"]["wheel"]["force-include"] == {
        "configs": "dymo_med/configs",
        "cohorts": "dymo_med/cohorts",
    }
