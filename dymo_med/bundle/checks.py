"""What a bundle may hold, whoever made it: files, keys, numbers and sizes.

Checksums show damage; they do not show that a bundle means harm, since whoever changes a file can
change its checksum too. So nothing in a bundle may name a file outside the patient directory, ask
for more memory than its own weights take, or hold numbers that no training leads to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules import module as registration

from dymo_med import limits
from dymo_med.errors import BundleError, Problem
from dymo_med.modalities.image import plain_name
from dymo_med.tasks import TASKS
from dymo_med.types import ModalitySpec

_AGAIN = "Copy the bundle again from where it was made"
_ENTRY = ("options", "temperature", "best_epoch", "validation")
# Every file of a bundle that is no model card, and the keys that it may have; None = not these.
KEYS: Mapping[str, tuple[str, ...] | None] = {
    "configs/metadata.json": (
        *("schema_version", "name", "version", "monai_version", "pytorch_version"),
        *("numpy_version", "required_packages_version", "task", "description", "authors"),
        *("copyright", "network_data_format", "target", "modalities", "missing_values"),
        "provenance",
    ),
    "configs/inference.json": (
        *("imputer", "backbone", "members", "selector", "distance", "temperature", "base_rates"),
        *("window", "overlap", "body"),
    ),
    "configs/selectors.json": ("why", "calibration", "entries"),
    "configs/calibration.json": ("fitted_on", "patients", "confidence", "right", "recalibration"),
    "configs/conformal.json": ("patterns", "coverage", "scores", "errors", "times"),
    "configs/outline.json": ("coverage", "missed", "volumes", "thresholds", "overlap"),
    "configs/performance.json": ("rows", "patients", "fewest"),
    "configs/quality.json": ("limits", "ranges", "records"),
    "configs/comparators.json": None,
    "configs/references.json": (
        *("weight", "partner", "why", "better", "losses", "patients", "entries"),
    ),
    "configs/draws.json": ("rows", "draws"),
    "configs/novelty.json": ("alarm", "strange", "usual"),
    "configs/use.json": ("rows", "patients", "permutations"),
    "models/imputer.safetensors": None,
    "models/backbone.safetensors": None,
    "models/statistics.safetensors": None,
    "models/comparators.safetensors": None,
    "models/references.safetensors": None,
    "models/novelty.safetensors": None,
}
_INNER = {key: inner for task in TASKS.values() for key, inner in task.stored.items()}
_TARGET = ("type", "target", "classes", *_INNER)
_MOST_FILES = 1000
LARGEST_CONFIG_BYTES = 2**26
"""Of a file of a bundle that is read as text."""
# No training ends outside of these: the optimiser's steps, and what is standardised, forbid it.
LARGEST_WEIGHT = 1e4
LARGEST_BUFFER = 1e12
LARGEST_NUMBER = 1e15
TEMPERATURES = (0.01, 100.0)
_MOST_OVERLAP = 0.9
_LARGEST_OPTION = 2**16


def check_files(path: Path) -> None:
    """Check names, kinds and sizes of a bundle's files before any of them is read.

    Args:
        path: Bundle folder.

    Raises:
        BundleError: If one is no regular file, unknown, or larger than what is read.
    """
    found = [path / "checksums.json"]
    for part in ("configs", "docs", "models"):
        for file in (path / part).rglob("*"):
            found.append(file)
            if len(found) > _MOST_FILES:
                raise _wrong(str(path), "the folder holds more files than a bundle has")
    for file in found:
        name = file.relative_to(path).as_posix()
        try:
            if file.is_dir() or file.name.startswith(".") or not file.exists():
                continue
            regular, size = file.is_file(), file.stat().st_size
        except (OSError, RuntimeError):
            continue  # whoever reads it says what is wrong
        if not regular:
            raise _wrong(f"{path}: {name}", "it is not a regular file", "files")
        if name.split("/")[0] in ("configs", "models") and name not in KEYS:
            raise _wrong(f"{path}: {name}", "the file is not part of a bundle", ", ".join(KEYS))
        most = limits.MAX_UNPACKED_BYTES if name.startswith("models/") else LARGEST_CONFIG_BYTES
        if size > most:
            raise BundleError(limits.too_large(f"{path}: {name}", "the file", size, most, _AGAIN))


def check_keys(path: Path, name: str, data: Any) -> None:
    """Check the keys and numbers of one of a bundle's JSON files.

    Args:
        path: Bundle folder.
        name: Of the file, as in `KEYS`.
        data: What it holds.

    Raises:
        BundleError: If there is a key that this version does not know, or an absurd number.
    """
    where, keys = f"{path}: {name}", KEYS.get(name)
    if isinstance(data, dict) and keys is not None:
        _known(where, data, keys)
        target = data.get("target")
        if isinstance(target, dict):
            _known(f"{where}: target", target, _TARGET)
            for part, inner in _INNER.items():
                if isinstance(target.get(part), dict):
                    _known(f"{where}: target", target[part], inner)
    if name == "configs/comparators.json" and isinstance(data, dict):
        for entry in data.values():
            if isinstance(entry, dict):
                _known(where, entry, _ENTRY)
    if any(abs(number) > LARGEST_NUMBER for number in _numbers(data)):
        expected = f"numbers from -{LARGEST_NUMBER:g} to {LARGEST_NUMBER:g}"
        raise _wrong(where, "it holds a number that cannot be right", expected)


def _known(where: str, data: Mapping[str, Any], keys: Sequence[str]) -> None:
    unknown = sorted(set(data) - set(keys))
    if unknown:
        raise _wrong(
            where,
            "it holds keys that this version does not know",
            ", ".join(keys),
            ", ".join(f"{key:.40}" for key in unknown[:5]),
        )


def _numbers(data: Any) -> Iterator[float]:
    """Yield all numbers of what a JSON file held."""
    todo = [data]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, list):
            todo += one
        elif isinstance(one, int | float):
            yield one


def read_specs(path: Path, entries: Sequence[Mapping[str, Any]]) -> tuple[ModalitySpec, ...]:
    """Return the modalities of a bundle.

    Args:
        path: Bundle folder.
        entries: As `ModalitySpec.to_dict` described them.

    Raises:
        BundleError: If one has an unknown key, names a file outside the patient directory, or has
            a size that cannot be right.
        KeyError: If one lacks a key; likewise `TypeError` and `ValueError`.
    """
    where = f"{path}: configs/metadata.json"
    specs = tuple(ModalitySpec.from_dict(entry) for entry in entries)
    for spec, entry in zip(specs, entries, strict=True):
        at = f"{where}: modality {spec.name:.40}"
        _known(at, entry, (*spec.to_dict(), "dicom", "grid", "steps", "rules"))
        shared = spec.rules.shared if spec.rules is not None else ""
        for file in (spec.file, *filter(None, [shared])):
            check_place(at, file)
        sizes = all(type(n) is int and n >= 1 for n in spec.shape) and bool(spec.shape)
        if not sizes or 4 * math.prod(spec.shape) > limits.MAX_UNPACKED_BYTES:
            most = f"whole numbers, at most {limits.readable(limits.MAX_UNPACKED_BYTES)} in all"
            raise _wrong(at, "its size cannot be right", most)
        if not all(1e-3 <= mm <= 1000 for mm in spec.spacing_mm):
            raise _wrong(at, "its spacing cannot be right", "0.001 to 1000 mm")
    return specs


def check_place(where: str, file: str) -> None:
    """Check that a file that a bundle names is one inside the patient directory.

    Args:
        where: Who names it.
        file: Its name, by the rule of `cohort.yaml`.

    Raises:
        BundleError: If it is not.
    """
    try:
        plain_name(file)
    except ValueError as error:
        raise _wrong(where, str(error), "for example t1.nii.gz") from None


def check_temperature(where: str, temperature: float) -> float:
    """Return a temperature if it is one that a calibration can end with.

    Args:
        where: Which file.
        temperature: Of probabilities.

    Raises:
        BundleError: If it is not.
    """
    low, high = TEMPERATURES
    if not low <= temperature <= high:
        raise _wrong(where, "the temperature cannot be right", f"{low:g} to {high:g}")
    return temperature


def check_windows(path: Path, size: Sequence[Any], overlap: float) -> None:
    """Check how a segmentation's scans are looked at.

    Args:
        path: Bundle folder.
        size: Voxels of a window per axis.
        overlap: Share of a window that its neighbour sees too.

    Raises:
        BundleError: If it is more work than any scan is worth.
    """
    if not all(type(n) is int and 1 <= n <= 512 for n in size) or not 0 <= overlap <= _MOST_OVERLAP:
        expected = f"1 to 512 voxels and an overlap of 0 to {_MOST_OVERLAP}"
        raise _wrong(f"{path}: configs/inference.json", "the window cannot be right", expected)


def check_options(path: Path, entry: Any) -> None:
    """Check that no option of a network is a size beyond any network's.

    Args:
        path: Bundle folder.
        entry: Name and options, as `inference.json` has them.

    Raises:
        BundleError: If one is.
    """
    if any(isinstance(n, int) and abs(n) > _LARGEST_OPTION for n in _numbers(entry)):
        expected = f"sizes up to {_LARGEST_OPTION}"
        where = f"{path}: configs/inference.json"
        raise _wrong(where, "an option of a network cannot be right", expected)


@contextmanager
def within_weights(path: Path, *names: str) -> Iterator[None]:
    """Refuse networks that outgrow the files of their weights, while they are being made.

    Args:
        path: Bundle folder.
        names: The files.

    Raises:
        BundleError: If more parameters, buffers or parts are registered than the files can fill;
            twice as much is allowed, since networks may share and replace parts.
    """
    tensors, numbers = 0, 0
    for name in names:
        for shape in shapes_of(path / name).values():
            tensors += 1
            numbers += math.prod(shape)
    left = {"tensors": 2 * tensors + 1000, "numbers": 2 * numbers + 2**20, "parts": 20 * tensors}
    left["parts"] += 10_000

    def count(kind: str, many: int) -> None:
        left[kind] -= many
        if left[kind] < 0:
            raise _wrong(
                str(path),
                "the networks that it describes are larger than its weights",
                "sizes in configs/ that fit models/",
            )

    def tensor(_: nn.Module, __: str, value: Tensor | None) -> None:
        if value is not None:
            count("tensors", 1)
            count("numbers", value.numel())

    def part(_: nn.Module, __: str, ___: nn.Module | None) -> None:
        count("parts", 1)

    hooks: tuple[tuple[Callable[[Any], Any], Any], ...] = (
        (registration.register_module_parameter_registration_hook, tensor),
        (registration.register_module_buffer_registration_hook, tensor),
        (registration.register_module_module_registration_hook, part),
    )
    with ExitStack() as stack:
        for register, hook in hooks:
            stack.callback(register(hook).remove)
        yield


def shapes_of(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a safetensors file, from its header alone.

    Raises:
        ValueError: If the header is larger than any.
        SafetensorError: If it is no such file.
    """
    with file.open("rb") as stream:
        if int.from_bytes(stream.read(8), "little") > limits.MAX_HEADER_BYTES:
            raise ValueError("the header is larger than any")
    with safe_open(file, framework="pt") as stored:
        names = stored.keys()
        return {name: tuple(stored.get_slice(name).get_shape()) for name in names}


def absurd(tensor: Tensor, *, weight: bool) -> bool:
    """Return whether a tensor holds numbers that no training leads to.

    Args:
        tensor: Any; infinity in a buffer is a limit that was never reached.
        weight: Whether it is one that is trained.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    largest = tensor.abs().where(tensor.isfinite(), torch.zeros_like(tensor)).max()
    return bool(largest > (LARGEST_WEIGHT if weight else LARGEST_BUFFER))


def _wrong(where: str, what: str, expected: str = "", got: str = "") -> BundleError:
    """Return the error of a bundle that is not what training writes."""
    return BundleError(
        Problem(where, what, expected=expected or "what training writes", got=got, remedy=_AGAIN)
    )
