"""A run that is stopped, or runs out of disk, leaves nothing half-written and loses nothing."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from dymo_med import files
from dymo_med.cli import main
from dymo_med.data import simulate
from dymo_med.inference import predict
from dymo_med.modalities import image, table

SMALL = ["-n", 8, "--size", 16, "-q"]


def stop(number):
    """Return what to do in the middle of a run: send this signal to it."""
    return lambda: os.kill(os.getpid(), number)


def fill():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out")


TROUBLE = {
    "told to stop": (stop(signal.SIGTERM), 143),
    "interrupted": (stop(signal.SIGINT), 130),
    "disk full": (fill, 2),
}


def commands(patient, bundle, out):
    source = ["-i", patient, "-b", bundle, "-o", out, "-d", "cpu"]
    return {
        "predict": ["predict", *source, "--no-explain", "--draws", 0],
        "impute": ["impute", *source],
        "simulate": ["simulate", out, *SMALL],
    }


def ended(arguments):
    """Return how a command ended."""
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
        main([str(a) for a in arguments])
    return getattr(stopped.value, "code", 130) or 0


@pytest.mark.parametrize("trouble", TROUBLE)
@pytest.mark.parametrize("command", ["predict", "impute", "simulate"])
def test_nothing_is_left_and_nothing_is_lost(
    bundle_dir, cohort_dir, tmp_path, monkeypatch, request, command, trouble
):
    # A test run in the background may have been started with interrupts ignored.
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, old))
    patient = shutil.copytree(cohort_dir / "patients" / "p001", tmp_path / "p001")
    out = tmp_path / "out"
    happen, code = TROUBLE[trouble]
    arguments = commands(patient, bundle_dir, out)[command]
    earlier = {}
    if command != "simulate":  # which replaces nothing
        assert ended(arguments) == 0
        earlier = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    before = sorted(tmp_path.rglob("*"))
    module, name = (simulate, "_write_rows") if command == "simulate" else (files, "write_bytes")
    calls, write = 0, getattr(module, name)

    def at_the_second_file(*values):
        nonlocal calls
        calls += 1
        if calls == 2:
            happen()
        return write(*values)

    for user in (module, predict, image, table):
        if hasattr(user, name):
            monkeypatch.setattr(user, name, at_the_second_file)
    assert ended(arguments) == code
    assert sorted(tmp_path.rglob("*")) == before
    assert {p: p.read_bytes() for p in earlier} == earlier


@pytest.mark.parametrize("why", [errno.EACCES, errno.EROFS])
def test_a_place_that_cannot_be_written(bundle_dir, cohort_dir, tmp_path, monkeypatch, capsys, why):
    """As of a read-only disk; the superuser could write where permissions are only taken away."""
    patient, parent = cohort_dir / "patients" / "p001", tmp_path / "parent"
    parent.mkdir()
    make = Path.mkdir

    def refuse(path, *arguments, **options):
        if path.parent == parent:
            raise OSError(why, os.strerror(why), str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert ended(commands(patient, bundle_dir, parent / "out")["impute"]) == 2
    assert list(parent.iterdir()) == []
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and os.strerror(why) in said and "Traceback" not in said


def test_two_who_write_one_folder_at_once(tmp_path, monkeypatch):
    """One is faster, in the moment in which the other has moved an earlier result away."""
    out, rename, others = tmp_path / "out", Path.rename, iter(("second", "third"))

    def write(text):
        with files.complete_folder(out, "marker", ("marker", "more")) as folder:
            for name in ("marker", "more"):
                (folder / name).write_text(text)

    def late(path, target):
        if target == out and (other := next(others, None)):
            write(other)
        return rename(path, target)

    write("earlier")
    monkeypatch.setattr(Path, "rename", late)
    write("first")
    assert next(others, None) is None
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "marker").read_text() == (out / "more").read_text() == "first"


def test_training_told_to_stop_while_it_writes_the_bundle(
    bundle_dir, cohort_dir, tmp_path, monkeypatch
):
    run = shutil.copytree(bundle_dir.parent, tmp_path / "run")
    shutil.rmtree(run / "bundle")
    before, write, calls = sorted(tmp_path.rglob("*")), files.write_bytes, 0

    def at_the_second_file(path, content):
        nonlocal calls
        calls += "configs" in path.parts
        if calls == 2:
            stop(signal.SIGTERM)()
        return write(path, content)

    monkeypatch.setattr(files, "write_bytes", at_the_second_file)
    arguments = ["train", bundle_dir.parents[1] / "recipe.yaml", "-c", cohort_dir, "-o", run]
    assert ended([*arguments, "--resume", "-d", "cpu", "-q"]) == 143
    assert calls == 2 and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("where", ["{patient}", "{patient}/out", "{link}", "{file}", "{file}/out"])
def test_odd_places_for_results(bundle_dir, cohort_dir, tmp_path, capsys, where):
    """Beside the patient's files or through a link it works; never in place of what is there."""
    patient = shutil.copytree(cohort_dir / "patients" / "p001", tmp_path / "p001")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("mine")
    names = {"patient": patient, "link": tmp_path / "link", "file": tmp_path / "file"}
    out = where.format(**names)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code = ended(commands(patient, bundle_dir, out)["impute"])
    works = where in ("{patient}/out", "{link}")
    assert code == (0 if works else 2)
    assert {p: p.read_bytes() for p in before} == before
    assert (tmp_path / "link").is_symlink()
    assert not list(tmp_path.rglob(".*"))
    assert works or "Traceback" not in capsys.readouterr().err
