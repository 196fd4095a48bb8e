"""Build a PolyMNIST cohort: `prepare.py MNIST_FOLDER OUT [--seed 0] [--train 6000 ...]`.

MNIST_FOLDER holds MNIST in IDX files, as README.md beside this file describes. OUT must not exist
yet; it appears when it is complete.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
SIZE = 28
CLASSES = 10
THRESHOLD = 0.5  # of full brightness: a pixel above it belongs to the digit
DEFAULT_COUNTS = {"train": 6000, "validation": 500, "calibration": 500, "test": 2000}

# Per modality: a photograph, and the region of it that crops are taken from
# (first row, last row + 1, first column, last column + 1).
BACKGROUNDS: dict[str, tuple[str, tuple[int, int, int, int]]] = {
    "m0": ("china.jpg", (60, 390, 85, 330)),  # the tower: red and orange
    "m1": ("china.jpg", (270, 427, 370, 640)),  # trees: grey green
    "m2": ("flower.jpg", (85, 355, 170, 445)),  # the blossom: light orange
    "m3": ("flower.jpg", (0, 427, 0, 160)),  # leaves: dark green
    "m4": ("grace_hopper.jpg", (0, 330, 0, 135)),  # the flag: blue, white and red
}


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Return the bytes of an IDX file of unsigned bytes, plain or gzipped.

    Args:
        path: The file.
        axes: How many axes it must have.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        sys.exit(f"{path}: cannot be read ({error}).")
    header = 4 + 4 * axes
    if len(data) < header or data[:4] != bytes((0, 0, 8, axes)):
        sys.exit(f"{path}: is not an IDX file of bytes with {axes} axes.")
    shape = np.frombuffer(data, ">u4", count=axes, offset=4).astype(int)
    values = np.frombuffer(data, np.uint8, offset=header)
    if len(values) != shape.prod():
        sys.exit(f"{path}: holds {len(values)} bytes where its header states {shape.prod()}.")
    return values.reshape(shape)


def read_digits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return all digit images `(n, 28, 28)` and their labels `(n,)`, train before t10k."""
    images, labels = [], []
    for part in ("train", "t10k"):
        for ending in ("", ".gz"):
            pictures = folder / f"{part}-images-idx3-ubyte{ending}"
            if not pictures.exists():
                continue
            names = [f"{part}-labels-idx1-ubyte{e}" for e in ("", ".gz")]
            found = [folder / name for name in names if (folder / name).exists()]
            if not found:
                sys.exit(f"{folder}: has {pictures.name} but not {names[0]}.")
            images.append(read_idx(pictures, 3))
            labels.append(read_idx(found[0], 1))
            if len(images[-1]) != len(labels[-1]) or images[-1].shape[1:] != (SIZE, SIZE):
                sys.exit(f"{folder}: {pictures.name} does not fit {found[0].name}.")
            break
    if not images:
        sys.exit(f"{folder}: has no train-images-idx3-ubyte or t10k-images-idx3-ubyte, plain or gz")
    return np.concatenate(images), np.concatenate(labels)


def read_backgrounds() -> dict[str, np.ndarray]:
    """Return the photograph `(rows, columns, 3)` of each modality."""
    # Imported here because it takes seconds: a wrong call should be answered at once.
    from matplotlib.cbook import get_sample_data
    from sklearn.datasets import load_sample_image

    photographs = {
        "china.jpg": load_sample_image("china.jpg"),
        "flower.jpg": load_sample_image("flower.jpg"),
    }
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as picture:
        photographs["grace_hopper.jpg"] = np.asarray(picture.convert("RGB"))
    return {name: photographs[file] for name, (file, _) in BACKGROUNDS.items()}


def partition(
    labels: np.ndarray, counts: Mapping[str, int], generator: np.random.Generator
) -> dict[str, list[np.ndarray]]:
    """Share out the digit images over the splits, in proportion to `counts`, class by class.

    Args:
        labels: Class of each digit image.
        counts: Samples per split.
        generator: Source of the shuffle.

    Returns:
        For each split, the digit images of each class.
    """
    ends = np.cumsum(list(counts.values())) / sum(counts.values())
    parts: dict[str, list[np.ndarray]] = {split: [] for split in counts}
    for k in range(CLASSES):
        own = generator.permutation(np.flatnonzero(labels == k))
        pieces = np.split(own, np.rint(ends[:-1] * len(own)).astype(int))
        for split, piece in zip(counts, pieces, strict=True):
            if counts[split] and len(piece) < len(BACKGROUNDS):
                sys.exit(
                    f"There are too few images of the digit {k} for the split {split}: it gets"
                    f" {len(piece)} and a sample needs {len(BACKGROUNDS)} different ones."
                )
            parts[split].append(piece)
    return parts


def draw(
    count: int, digits: Sequence[np.ndarray], generator: np.random.Generator
) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
    """Yield for each sample its class and, per modality, digit image, row and column of the crop.

    Classes occur equally often. A digit image occurs once in a sample and in any number of samples.

    Args:
        count: Samples.
        digits: Digit images of each class.
        generator: Source of every choice.
    """
    for label in generator.permutation(np.arange(count) % CLASSES):
        chosen = generator.choice(digits[label], len(BACKGROUNDS), replace=False)
        places = []
        for digit, (_, (top, bottom, left, right)) in zip(
            chosen, BACKGROUNDS.values(), strict=True
        ):
            row = generator.integers(top, bottom - SIZE + 1)
            column = generator.integers(left, right - SIZE + 1)
            places.append((int(digit), int(row), int(column)))
        yield int(label), places


def paint(digit: np.ndarray, photograph: np.ndarray, row: int, column: int) -> np.ndarray:
    """Return a crop of the photograph with its colours inverted where the digit is.

    Args:
        digit: `(28, 28)` bytes.
        photograph: `(rows, columns, 3)` bytes.
        row: First row of the crop.
        column: First column of the crop.
    """
    crop = photograph[row : row + SIZE, column : column + SIZE]
    return np.where((digit > THRESHOLD * 255)[..., None], 255 - crop, crop)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str | int]]) -> None:
    """Write a small CSV file."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def prepare(source: Path, out: Path, seed: int, counts: Mapping[str, int]) -> None:
    """Write the cohort.

    Args:
        source: Folder with MNIST in IDX files.
        out: Folder to make.
        seed: Seed of every random choice.
        counts: Samples per split.
    """
    images, labels = read_digits(source)
    generator = np.random.default_rng(seed)
    parts = partition(labels, counts, generator)
    backgrounds = read_backgrounds()
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        labelled: list[tuple[str | int, ...]] = []
        splits: list[tuple[str | int, ...]] = []
        truth: list[tuple[str | int, ...]] = []
        for split, count in counts.items():
            for number, (label, places) in enumerate(draw(count, parts[split], generator)):
                record = f"{split}-{number:05d}"
                folder = work / "patients" / record
                folder.mkdir(parents=True)
                for (name, photograph), place in zip(backgrounds.items(), places, strict=True):
                    picture = paint(images[place[0]], photograph, *place[1:])
                    Image.fromarray(picture).save(folder / f"{name}.png")
                labelled.append((record, record, label))
                splits.append((record, split))
                truth.append((record, *(value for place in places for value in place)))
            print(f"{split}: {count} samples of {sum(map(len, parts[split]))} digit images")
        write_csv(work / "labels.csv", ("record_id", "patient_id", "digit"), labelled)
        write_csv(work / "splits.csv", ("patient_id", "split"), splits)
        columns = [f"{name}_{what}" for name in BACKGROUNDS for what in ("digit", "row", "column")]
        write_csv(work / "truth.csv", ("record_id", *columns), truth)
        shutil.copyfile(HERE / "cohort.yaml", work / "cohort.yaml")
        work.chmod(0o755)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="MNIST_FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=0)
    for split, count in DEFAULT_COUNTS.items():
        parser.add_argument(f"--{split}", type=int, default=count, metavar="SAMPLES")
    arguments = parser.parse_args()
    counts = {split: getattr(arguments, split) for split in DEFAULT_COUNTS}
    if min(counts.values()) < 0 or not any(counts.values()) or arguments.seed < 0:
        parser.error("counts and seed are 0 or more, and at least one count is more than 0")
    if arguments.out.exists():
        sys.exit(f"{arguments.out}: exists already. Choose another folder or remove it.")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    prepare(arguments.source, arguments.out, arguments.seed, counts)


if __name__ == "__main__":
    main()
