"""Files: cells that spreadsheets would act on, what killed runs leave, and a full disk."""

import csv
import errno
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dymo_med
from dymo_med import files
from dymo_med.cli import main
from dymo_med.files import as_text, as_was, complete_folder, csv_stream, csv_text, write_csv

PACKAGE = Path(dymo_med.__file__).parent


def read(text):
    return list(csv.reader(io.StringIO(text, newline="")))


# --- Cells ----------------------------------------------------------------------------------------

ACTS = ["=1+1", "+1+1", "-2+3", "@A1", "\t=1", "\r=1", "\n=1", "\x00", "\x1b[2J", "-", "-inf"]
ACTS += [" =1", "\ufeff=1", "\u200b@A1", "\uff1d1", "\uff0b1", "\uff0d1+1", "\uff20A1"]
PLAIN = ["", "plain", "a=1", "1-2", "a@b", "'tis", "-2", "-2.5", "+5", "-1e-05", ".5", "0", "a, =b"]


@pytest.mark.parametrize("cell", ACTS)
def test_what_a_spreadsheet_would_act_on_is_marked_as_text(cell):
    marked = as_text(cell)
    assert re.sub(r"^[ \ufeff\u200b]*", "", marked).startswith("'") and as_was(marked) == cell


@pytest.mark.parametrize("cell", ["a;=1+1", "a\t@A1", "a\n=1+1", "a\r\n+1", "a;\ufeff=1"])
def test_so_is_what_begins_a_cell_where_others_divide(cell):
    """Where lists are divided by semicolons, a cell in quotes ends at one."""
    parts = re.split(r"[;\t\r\n]+", as_text(cell))
    assert not any(p.lstrip("\ufeff")[:1] in tuple("=+-@") for p in parts if p)
    assert as_was(as_text(cell)) == cell


@pytest.mark.parametrize("cell", PLAIN)
def test_numbers_and_words_stay_as_they_are(cell):
    assert as_text(cell) == cell == as_was(cell)


def test_no_two_cells_become_one():
    signs = ["'", "=", "-", "1", "a", " ", ";", "\n", "\ufeff", "e", "."]
    cells = ["".join(c) for n in range(5) for c in itertools.product(signs, repeat=n)]
    marked = [as_text(cell) for cell in cells]
    assert len(set(marked)) == len(cells) and [as_was(m) for m in marked] == cells


def test_headers_and_cells_of_a_table_are_marked_and_numbers_are_not(tmp_path):
    header = ("=name", "number")
    rows = [{"=name": "=1+1", "number": -2.5}, {"=name": None, "number": -3}]
    expected = [["'=name", "number"], ["'=1+1", "-2.5"], ["", "-3"]]
    write_csv(tmp_path / "a.csv", header, rows)
    with csv_stream(tmp_path / "b.csv", header) as append:
        append(rows)
    for name in ("a.csv", "b.csv"):
        assert read((tmp_path / name).read_text()) == expected
    assert read(csv_text(header, rows)) == expected


def test_all_tables_are_written_in_one_place():
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"csv\.(writer|DictWriter)\(|\.to_csv\(", path.read_text(encoding="utf-8"))
    }
    # Arrays in memory are read as files are, from a folder that nobody opens and that goes at once.
    assert found == {"files.py", "inference/in_memory.py"}


# --- What killed runs leave -----------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from dymo_med import files
out = Path(sys.argv[1])
rename = Path.rename
def late(path, target):
    if path == out:
        rename(path, target)
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)
if sys.argv[2] == "swap":
    Path.rename = late
with files.complete_folder(out, "marker", ("marker",)) as folder:
    (folder / "marker").write_text("new")
    if sys.argv[2] == "hold":
        print("holds", flush=True)
        sys.stdin.read()
    if sys.argv[2] == "folder":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "file":
        os.replace = None
        Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        files.write_bytes(out.parent / "page.html", b"a patient")
"""


def script(out, how, **options):
    command = [sys.executable, "-c", KILLED, str(out), how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)


def kill(out, how):
    assert script(out, how).wait() == -9


def write(out, text="again"):
    with complete_folder(out, "marker", ("marker",)) as folder:
        (folder / "marker").write_text(text)


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A folder in which a run was killed while it wrote another folder, and one while a file."""
    folder = tmp_path_factory.mktemp("left")
    kill(folder / "out", "file")
    assert len(hidden(folder)) == 2
    return folder


@pytest.fixture
def place(left, tmp_path):
    return shutil.copytree(left, tmp_path / "place")


@pytest.mark.parametrize("name", ["out", "another"])
def test_the_next_run_removes_what_a_killed_one_left(place, caplog, name):
    write(place / name)
    assert hidden(place) == [] and (place / name / "marker").read_text() == "again"
    assert "removed what killed runs had left (2)" in caplog.text


def test_so_does_one_that_writes_a_file(place, caplog):
    files.write_bytes(place / "page.html", b"a page")
    assert [p.name for p in place.iterdir()] == ["page.html"] and "(2)" in caplog.text


def test_what_a_running_process_writes_is_left_alone(tmp_path, monkeypatch):
    with script(tmp_path / "out", "hold", text=True) as running:
        assert running.stdout.readline() == "holds\n"
        (name,) = hidden(tmp_path)
        write(tmp_path / "other")
        assert hidden(tmp_path) == [name]
        # As if it ran in another container, where its number says nothing: its lock does.
        monkeypatch.setattr(files, "_runs", lambda _: False)
        write(tmp_path / "other")
        assert hidden(tmp_path) == [name]
        running.stdin.close()
        assert running.wait() == 0
    assert (tmp_path / "out" / "marker").read_text() == "new"


def test_what_this_process_writes_is_left_alone(tmp_path):
    with complete_folder(tmp_path / "out", "marker", ("marker",)) as folder:
        write(tmp_path / "other")
        (folder / "marker").write_text("mine")
    assert (tmp_path / "out" / "marker").read_text() == "mine"


@pytest.mark.parametrize("whose", ["another user", "another computer", "a link", "another name"])
def test_what_may_be_somebody_elses_is_left_alone(place, monkeypatch, caplog, whose):
    if whose == "another user":
        monkeypatch.setattr(os, "getuid", lambda: 4242)
    if whose == "another computer":
        monkeypatch.setattr(files.platform, "node", lambda: "elsewhere")
        for path in place.iterdir():
            os.utime(path, (0, 0))
    names = hidden(place)
    if whose == "a link":
        for name in names:
            (place / name).rename(place / f"real{name}")
            (place / name).symlink_to(place / f"real{name}")
    if whose == "another name":
        names = [".dymo-med.mine", ".report.html.0a1b2c3d"]
        for name in names:
            (place / name).write_text("mine")
    write(place / "out")
    assert set(names) <= set(hidden(place))
    assert ("another computer" in caplog.text) == (whose == "another computer")


@pytest.mark.parametrize("name", ["out", "another"])
def test_killed_while_it_replaced_a_result(tmp_path, caplog, name):
    """The earlier result is put back by whoever writes it next; others leave both alone."""
    write(tmp_path / "out", "earlier")
    kill(tmp_path / "out", "swap")
    assert not (tmp_path / "out").exists() and len(hidden(tmp_path)) == 2
    if name == "another":
        write(tmp_path / name)
        assert len(hidden(tmp_path)) == 2
    with pytest.raises(KeyError), complete_folder(tmp_path / "out", "marker", ("marker",)):
        raise KeyError
    assert (tmp_path / "out" / "marker").read_text() == "earlier" and hidden(tmp_path) == []
    assert "put back" in caplog.text


# --- A full disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Free some space there, or write to another disk."),
        (errno.EDQUOT, "Free some space there, or write to another disk."),
        (errno.EROFS, "Write to another place."),
        (errno.EACCES, "Check the path and its permissions."),
    ],
)
def test_trouble_with_the_disk_names_the_file_and_a_remedy(
    tmp_path, monkeypatch, capsys, number, remedy
):
    """A full disk says nothing of the file when something is written to it."""

    def full(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)

    def part():
        with complete_folder(tmp_path / "out", "marker", ("marker",)) as folder:
            files.write_json(folder / "part.json", {})

    def stream():
        with csv_stream(tmp_path / "b.csv", ("a",)):
            pass

    writers = {"a.csv": lambda: write_csv(tmp_path / "a.csv", ("a",), []), "b.csv": stream}
    for name, writer in {**writers, "out/part.json": part}.items():
        path = tmp_path / name
        monkeypatch.setattr("dymo_med.cli.app", lambda writer=writer, **_: writer())
        with pytest.raises(SystemExit) as stopped:
            main([])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1
        assert f"error: {path}: {os.strerror(number)}. {remedy}" in said
        assert list(tmp_path.iterdir()) == []


# --- Messages of libraries ------------------------------------------------------------------------

NOISY = """
import logging, os, sys
from dymo_med import cli
from dymo_med.errors import PatientDataError, Problem
def app(**_):
    os.write(2, b"libtiff: a warning\\n" * 3)
    logging.StreamHandler().emit(logging.makeLogRecord({"msg": "nibabel: another"}))
    logging.getLogger("dymo_med.files").warning("ours")
    if sys.argv[1] == "wrong":
        raise PatientDataError(Problem("Patient p01", "is wrong"))
    sys.exit(0)
cli.app = app
cli.main([])
"""


@pytest.mark.parametrize("how", ["wrong", "well"])
def test_lines_of_libraries_come_after_our_own_and_never_beside_an_error(how):
    done = subprocess.run([sys.executable, "-c", NOISY, how], capture_output=True, text=True)
    ours = ["note: ours"] + ["error: Patient p01: is wrong."] * (how == "wrong")
    theirs = ["libtiff: a warning", "nibabel: another"] if how == "well" else []
    assert done.stderr.splitlines() == [*ours, *theirs]
    assert done.returncode == (3 if how == "wrong" else 0)


def test_there_need_be_no_standard_error():
    done = subprocess.run(
        ["sh", "-c", '"$0" -m dymo_med --version 2>&-', sys.executable], capture_output=True
    )
    assert done.returncode == 0 and done.stdout
