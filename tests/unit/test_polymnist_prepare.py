"""The preparation script of PolyMNIST: on made-up digits, and on MNIST where it is at hand."""

import csv
import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.cbook import get_sample_data
from PIL import Image
from sklearn.datasets import load_sample_image

from dymo_med.backbones import BACKBONES
from dymo_med.config import read_recipe
from dymo_med.data.cohort import read_cohort
from dymo_med.data.patient import read_patient
from dymo_med.imputers import IMPUTERS
from dymo_med.inference.check import check
from dymo_med.selection import SELECTORS
from tests.conftest import shared_data

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ("--train", 20, "--validation", 10, "--calibration", 10, "--test", 20)
NAMES = ("m0", "m1", "m2", "m3", "m4")
PHOTOGRAPHS = ("china.jpg", "china.jpg", "flower.jpg", "flower.jpg", "grace_hopper.jpg")


def prepare(source, out, *options):
    command = [sys.executable, REPOSITORY / "cohorts" / "polymnist" / "prepare.py", source, out]
    command = [str(part) for part in (*command, *options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write_idx(path, values):
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    data = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def read_idx(path):
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Thirty made-up images of each digit, a part of them plain and a part gzipped."""
    folder = tmp_path_factory.mktemp("mnist")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, 28, 28))
    images[:, :4], images[:, -4:] = 127, 128  # just below and just above the threshold
    labels = rng.permutation(np.arange(300) % 10)
    write_idx(folder / "train-images-idx3-ubyte", images[:200])
    write_idx(folder / "train-labels-idx1-ubyte", labels[:200])
    write_idx(folder / "t10k-images-idx3-ubyte.gz", images[200:])
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", labels[200:])
    return folder


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """The cohort of sixty samples, made once."""
    out = tmp_path_factory.mktemp("polymnist") / "out"
    done = prepare(source, out, *SMALL)
    assert done.returncode == 0, done.stderr
    return out


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def content_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def require_the_rule(out, images, labels):
    """Check every picture of a cohort against the construction rule, and the splits."""
    photographs = {name: load_sample_image(name) for name in ("china.jpg", "flower.jpg")}
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as picture:
        photographs["grace_hopper.jpg"] = np.asarray(picture.convert("RGB"))
    split_of = {row["patient_id"]: row["split"] for row in rows_of(out / "splits.csv")}
    label_of = {row["record_id"]: row for row in rows_of(out / "labels.csv")}
    used = {}
    for row in rows_of(out / "truth.csv"):
        record = row["record_id"]
        assert label_of[record]["patient_id"] == record
        digits = [int(row[f"{name}_digit"]) for name in NAMES]
        assert len(set(digits)) == len(NAMES)
        used.setdefault(split_of[record], set()).update(digits)
        for name, file, digit in zip(NAMES, PHOTOGRAPHS, digits, strict=True):
            assert labels[digit] == int(label_of[record]["digit"])
            top, left = int(row[f"{name}_row"]), int(row[f"{name}_column"])
            expected = photographs[file][top : top + 28, left : left + 28].copy()
            inside = images[digit] > 127.5
            expected[inside] = 255 - expected[inside]
            with Image.open(out / "patients" / record / f"{name}.png") as picture:
                assert picture.mode == "RGB"
                assert np.array_equal(np.asarray(picture), expected)
    assert sum(len(part) for part in used.values()) == len(set.union(*used.values()))
    return used


def test_pictures_follow_the_rule_and_splits_share_no_digit_image(source, made):
    images, labels = (
        np.concatenate([read_idx(source / f"train-{name}"), read_idx(source / f"t10k-{name}.gz")])
        for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    used = require_the_rule(made, images, labels)
    assert set(used) == {"train", "validation", "calibration", "test"}


def test_a_cohort_comes_out(made):
    assert check(made).problems == ()
    cohort = read_cohort(made)
    counts = [len(cohort.in_split(s)) for s in ("train", "validation", "calibration", "test")]
    assert counts == [20, 10, 10, 20]
    assert {record.label for record in cohort.in_split("test")} == set(range(10))
    record = read_patient(cohort.records[0].folder, cohort.specs)
    assert set(record.modalities) == set(NAMES)
    for value in record.modalities.values():
        assert value.values.shape == (3, 28, 28)
        assert value.values.min() == 0 and value.values.max() == 1


def test_the_seed_decides_everything(source, made, tmp_path):
    assert prepare(source, tmp_path / "same", *SMALL).returncode == 0
    assert prepare(source, tmp_path / "other", *SMALL, "--seed", 1).returncode == 0
    assert content_of(tmp_path / "same") == content_of(made)
    assert (tmp_path / "other" / "truth.csv").read_bytes() != (made / "truth.csv").read_bytes()


def test_what_prepare_refuses(source, made, tmp_path):
    assert "exists already" in prepare(source, made).stderr
    assert "has no train-images" in prepare(tmp_path, tmp_path / "out").stderr
    assert "too few images" in prepare(source, tmp_path / "out", "--calibration", 1).stderr
    assert "0 or more" in prepare(source, tmp_path / "out", "--train", -1).stderr
    broken = tmp_path / "broken"
    broken.mkdir()
    whole = (source / "train-images-idx3-ubyte").read_bytes()
    (broken / "train-images-idx3-ubyte").write_bytes(whole)
    assert "but not" in prepare(broken, tmp_path / "out").stderr
    (broken / "train-labels-idx1-ubyte").write_bytes(whole)
    assert "is not an IDX file" in prepare(broken, tmp_path / "out").stderr
    (broken / "train-images-idx3-ubyte").write_bytes(whole[:-1])
    assert "its header states" in prepare(broken, tmp_path / "out").stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


def test_the_recipe_is_valid():
    tables = {"imputer": IMPUTERS, "backbone": BACKBONES, "selector": SELECTORS}
    recipe = read_recipe(REPOSITORY / "configs" / "polymnist.yaml", tables)
    assert recipe.imputer.options["map_channels"] == 0
    assert recipe.backbone_training.subsets == 5


@pytest.mark.shared
def test_real_digits(tmp_path):
    folder = shared_data("mnist")
    done = prepare(folder, tmp_path / "out", *SMALL)
    assert done.returncode == 0, done.stderr
    images = read_idx(folder / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz")
    require_the_rule(tmp_path / "out", images, labels)
