"""Sequences of feature vectors: what a frozen network made of a text, a recording, a video.

Files hold numbers, one feature vector per step. Raw text, sound and video are not read: the
networks that turn them into features are the user's choice, and so is their licence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dymo_med.blocks import Encoder, StepDecoder, StepEncoder
from dymo_med.config import Strict
from dymo_med.errors import PatientDataError, Problem
from dymo_med.files import write_bytes
from dymo_med.modalities.base import Modality, Whose, the_one
from dymo_med.modalities.image import plain_name
from dymo_med.modalities.made_up import SYNTHETIC, refuse_made_up
from dymo_med.types import ModalitySpec, ModalityValue, Source, Steps

EXTENSIONS = (".npy", ".safetensors", ".csv")
# No recording worth its features is larger; a damaged header may claim anything.
_MOST_BYTES = 1_000_000_000
_MOST_STEPS = 1_000_000
# A picture of more features than this shows averages of neighbouring ones.
_ROWS = 48
_FLOATS = {"F16", "BF16", "F32", "F64"}  # as safetensors calls them


class TokensEntry(Strict):
    """A sequence modality in `cohort.yaml`.

    Attributes:
        kind: `tokens`.
        file: File inside the patient directory; another known extension of the same stem is
            found too.
        length: L, steps that every sequence is brought to.
        features: C, numbers per step.
        pooling: `neighbours` averages neighbouring steps; `interleaved` the steps j, j + L,
            j + 2 L, ..., as the published code of CyIN does.
        standardise: Whether networks see features with zero mean and unit spread over training
            records.
    """

    kind: Literal["tokens"]
    file: str
    length: Annotated[int, Field(ge=1, le=10_000)]
    features: Annotated[int, Field(ge=1, le=100_000)]
    pooling: Literal["neighbours", "interleaved"] = "neighbours"
    standardise: bool = True

    @model_validator(mode="after")
    def _fits(self) -> TokensEntry:
        plain_name(self.file)
        if not self.file.lower().endswith(EXTENSIONS):
            raise ValueError(f"file must end in {', '.join(EXTENSIONS)}")
        return self


class SequenceError(Exception):
    """A file does not hold a sequence; what a `Problem` says, without its place."""

    def __init__(self, what: str, expected: str = "", got: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what, self.expected, self.got, self.remedy = what, expected, got, remedy


class TokenSequence(Modality):
    """A sequence of feature vectors, averaged over time to a fixed number of steps.

    With `neighbours`, position j of L averages the steps from floor(j n / L) to
    ceil((j + 1) n / L) of n; a sequence of fewer than L steps repeats neighbours. With
    `interleaved`, copies of the last step are appended until n is a multiple of L, and position j
    averages the steps j, j + L, j + 2 L, ...: the order of the published code's reshape, which
    mixes moments far apart. It is there to reproduce published figures.

    The likelihood is a Gaussian of unit standard deviation per feature, in standardised units.

    References:
        CyIN, NeurIPS 2025 (published code, snapshot da04a3d8: AlignNets).
    """

    Entry = TokensEntry

    @classmethod
    def spec_from_entry(cls, name: str, entry: BaseModel) -> ModalitySpec:
        """Return the spec of a validated `cohort.yaml` entry."""
        entry = cast("TokensEntry", entry)
        return ModalitySpec(
            name=name,
            kind="tokens",
            file=entry.file,
            shape=(entry.length, entry.features),
            steps=Steps(entry.pooling, entry.standardise),
        )

    @property
    def _steps(self) -> Steps:
        return self.spec.steps or Steps()

    # -- files ---------------------------------------------------------------------------------

    def _find(self, folder: Path, where: str) -> Path | None:
        """Return the sequence's file: the declared name, else one of the same stem."""
        declared = folder / self.spec.file
        names = [declared, *(declared.with_suffix(extension) for extension in EXTENSIONS)]
        found = list(dict.fromkeys(path for path in names if path.exists()))
        ambiguous = Problem(
            f"{where}: {self.spec.name}",
            "several files could be this sequence",
            expected=f"{self.spec.file} or one other",
            remedy="Keep the one that belongs to this visit",
        )
        return the_one(found, declared, declared.stem, where, ambiguous)

    def read(
        self,
        folder: Path,
        where: str,
        missing_values: Sequence[str] = (),
        whose: Whose | None = None,
    ) -> ModalityValue | None:
        """Read the sequence and bring it to L steps. See `Modality.read`."""
        path = self._find(folder, where)
        if path is None:
            return None
        at = f"{where}: {path.name}"
        refuse_made_up(path, where, self.spec.name)
        try:
            steps = self._load(path)
            with path.open("rb") as stream:
                digest = sha256(stream.read()).hexdigest()
        except SequenceError as error:
            problem = Problem(at, error.what, error.expected, error.got, error.remedy)
            raise PatientDataError(problem) from error
        except OSError as error:
            raise PatientDataError(
                Problem(
                    at,
                    "the file cannot be opened",
                    got=type(error).__name__,
                    remedy="Check its permissions",
                )
            ) from error
        wrong = ~steps.isfinite()
        if bool(wrong.any()):
            raise PatientDataError(
                Problem(
                    at,
                    "the sequence holds values that are not finite",
                    expected="numbers within the range of float32",
                    got=f"{int(wrong.any(1).sum())} of {len(steps)} steps with one",
                    remedy="Remove these steps, or the file if the modality is missing",
                )
            )
        warnings: tuple[str, ...] = ()
        if not bool(steps.any()):
            warnings = (
                f"{path.name}: every feature is 0. If the modality was not measured, remove the"
                " file: 0 counts as a measurement.",
            )
        return ModalityValue(
            values=self.align(steps).contiguous(),
            source=Source(
                file=path.relative_to(folder).as_posix(),
                sha256=digest,
                facts={"steps": str(len(steps)), "features": str(steps.shape[1])},
            ),
            warnings=warnings,
        )

    def align(self, steps: Tensor) -> Tensor:
        """Return n steps `(n, C)` averaged to `(L, C)`."""
        length = self.spec.shape[0]
        if self._steps.pooling == "neighbours":
            return F.adaptive_avg_pool1d(steps.T[None], length)[0].T
        lacking = -len(steps) % length
        padded = torch.cat([steps, steps[-1:].expand(lacking, -1)])
        return padded.view(-1, length, steps.shape[1]).mean(0)

    def _load(self, path: Path) -> Tensor:
        """Return the steps `(n, C)` of a file, float32."""
        readers = {".npy": self._load_npy, ".safetensors": self._load_safetensors}
        if path.suffix.lower() != ".npy" and path.stat().st_size > _MOST_BYTES:
            # The header of a NumPy file says its size before anything is read.
            raise SequenceError(
                "the file is too large",
                f"at most {_MOST_BYTES // 10**6} MB",
                remedy="Average the features over time first",
            )
        return readers.get(path.suffix.lower(), self._load_csv)(path)

    def _check(self, shape: Sequence[int], item_bytes: int) -> None:
        """Refuse a header's shape before memory is asked for.

        Raises:
            SequenceError: If it is not that of a sequence with this modality's features.
        """
        features = self.spec.shape[1]
        expected = f"n steps of {features} features (n x {features})"
        got = " x ".join(str(n) for n in shape) or "a single number"
        if len(shape) != 2 or shape[1] != features:
            raise SequenceError(
                "the array has the wrong shape",
                expected,
                got,
                "Save one row per step, or correct features in cohort.yaml",
            )
        if shape[0] < 1:
            raise SequenceError(
                "the sequence is empty",
                "at least one step",
                got,
                "Remove the file if the modality is missing",
            )
        if shape[0] > _MOST_STEPS or shape[0] * features * item_bytes > _MOST_BYTES:
            raise SequenceError(
                "the sequence is too long",
                f"at most {_MOST_STEPS} steps and {_MOST_BYTES // 10**6} MB",
                got,
                "Average the features over time first",
            )

    def _load_npy(self, path: Path) -> Tensor:
        """Return what a NumPy file holds."""
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        no_array = SequenceError(
            "the file is not a NumPy array",
            "what numpy.save writes",
            remedy="Save it again with numpy.save",
        )
        with path.open("rb") as stream:
            try:
                version = np.lib.format.read_magic(stream)
                if version not in read_header:
                    raise no_array
                shape, fortran, dtype = read_header[version](stream)
            except (ValueError, EOFError, SyntaxError, TypeError, RecursionError):
                raise no_array from None
            if dtype.hasobject:
                raise SequenceError(
                    "the array holds Python objects, which are not loaded",
                    "numbers",
                    remedy="Save it as numpy.asarray(features, dtype='float32')",
                )
            if dtype.kind not in "fiu" or dtype.itemsize > 8:
                raise SequenceError(
                    "the array does not hold real numbers",
                    "float32, float16 or another type of at most 8 bytes",
                    str(dtype)[:40],
                    "Save it as numpy.asarray(features, dtype='float32')",
                )
            self._check(shape, dtype.itemsize)
            size = math.prod(shape) * dtype.itemsize
            if path.stat().st_size - stream.tell() != size:
                raise SequenceError(
                    "the file is cut off or longer than its header says",
                    f"{size} bytes of numbers",
                    remedy="Copy it again",
                )
            values = np.frombuffer(stream.read(size), dtype=dtype)
        steps = values.reshape(shape, order="F" if fortran else "C")
        with np.errstate(over="ignore"):
            return torch.from_numpy(np.array(steps, dtype=np.float32, order="C"))

    def _load_safetensors(self, path: Path) -> Tensor:
        """Return the one tensor of a safetensors file, or the one of this modality's name."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                name = names[0] if len(names) == 1 else self.spec.name
                if name not in names:
                    raise SequenceError(
                        "the file does not say which tensor is the sequence",
                        f"one tensor, or one called {self.spec.name}",
                        f"{len(names)} tensors",
                        "Save the sequence alone, or under that name",
                    )
                part = file.get_slice(name)
                if part.get_dtype() not in _FLOATS:
                    raise SequenceError(
                        "the tensor does not hold floating-point numbers",
                        "F32 or F16",
                        part.get_dtype(),
                        "Save it as float32",
                    )
                self._check(part.get_shape(), 8)
                tensor: Tensor = file.get_tensor(name)
                return tensor.float()
        except SafetensorError:
            raise SequenceError(
                "the file is not a safetensors file, or cut off",
                "what safetensors writes",
                remedy="Save it again",
            ) from None

    def _load_csv(self, path: Path) -> Tensor:
        """Return the numbers of a CSV file, one row per step."""
        try:
            lines = path.read_bytes().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise SequenceError(
                "the file cannot be read as text", "UTF-8 text", remedy="Save it as CSV in UTF-8"
            ) from None
        lines = [line for line in lines if line.strip()]
        columns = len(lines[0].split(",")) if lines else self.spec.shape[1]
        # Checked on the first line, before the rest is turned into numbers.
        self._check((len(lines), columns), 8)
        if columns > 1 and [cell.strip() for cell in lines[0].split(",")] == [
            str(i) for i in range(columns)
        ]:
            raise SequenceError(
                "the first line counts 0, 1, 2, ... and looks like a header",
                "numbers only, one row per step",
                remedy="Save the features without a header",
            )
        wrong = next((i for i, line in enumerate(lines) if line.count(",") != columns - 1), None)
        if wrong is None:
            try:
                numbers = np.loadtxt(lines, delimiter=",", ndmin=2, comments=None)
                return torch.from_numpy(numbers).float()
            except ValueError as error:  # its text holds the value
                place = re.search(r"at row (\d+)", str(error))
                wrong = int(place[1]) if place else 0
        raise SequenceError(
            f"row {wrong + 1} does not hold one number per feature",
            f"{columns} numbers separated by commas in every row, without a header",
            remedy="Correct the row; remove a header",
        )

    def write(
        self,
        folder: Path,
        values: Tensor,
        observed_fields: Tensor | None,
        affine: Sequence[Sequence[float]] | None,
    ) -> Path:
        """Write `<name>_synthetic.safetensors`, marked in its header. See `Modality.write`."""
        from safetensors.torch import save

        tensor = values.detach().to("cpu", torch.float32).contiguous()
        content = save({self.spec.name: tensor}, metadata={"description": SYNTHETIC})
        return write_bytes(folder / f"{self.spec.name}_synthetic.safetensors", content)

    def picture(self, values: Tensor) -> Tensor:
        """Return a heat map `(1, rows, L)`: features down, time to the right, standardised.

        More than 48 features are averaged over neighbouring ones, in absolute value so that
        signs do not cancel.
        """
        standard = (values - self.center(values)) / self.spread(values)
        rows = min(_ROWS, self.spec.shape[1])
        if rows < self.spec.shape[1]:
            standard = F.adaptive_avg_pool1d(standard.abs()[None], rows)[0]
        return standard.T[None]

    # -- networks ------------------------------------------------------------------------------

    def center(self, like: Tensor) -> Tensor:
        """Return the mean of each feature `(C,)`, 0 where none was fitted."""
        if not self._steps.mean:
            return like.new_zeros(self.spec.shape[1])
        return like.new_tensor(self._steps.mean)

    def spread(self, like: Tensor) -> Tensor:
        """Return the standard deviation of each feature `(C,)`, 1 where none was fitted."""
        if not self._steps.std:
            return like.new_ones(self.spec.shape[1])
        return like.new_tensor(self._steps.std)

    def fit(
        self,
        values: Tensor,
        observed_fields: Tensor | None,
        descriptors: Tensor | None = None,
    ) -> ModalitySpec:
        """Return the spec with each feature's mean and spread over records and steps.

        The spread of a feature with a single distinct value is 1.

        Args:
            values: `(n, L, C)`, rows of training records that have this sequence.
            observed_fields: Not used.
            descriptors: Not used.
        """
        if not self._steps.standardise or not len(values):
            return self.spec
        means, spreads = [], []
        for part in values.split(64, dim=2):  # in double precision without doubling everything
            flat = part.double().flatten(0, 1)
            mean, std = flat.mean(0), flat.std(0, correction=0)
            single = std <= 1e-6 * mean.abs().clamp_min(1)
            means.append(mean)
            spreads.append(torch.where(single, 1.0, std))
        fitted = replace(
            self._steps,
            mean=tuple(torch.cat(means).float().tolist()),
            std=tuple(torch.cat(spreads).float().tolist()),
        )
        return replace(self.spec, steps=fitted)

    def encoder(self, dim: int, options: Mapping[str, Any]) -> Encoder:
        """Return an encoder to one token per step, or per so many neighbouring ones.

        Args:
            dim: Token width D.
            options: `steps` (tokens; one per step without it or for 0).
        """
        length = self.spec.shape[0]
        wanted = options.get("steps", 0) or length
        return StepEncoder(self.spec.shape, self._steps, dim, min(wanted, length))

    def decoder(self, latent: int, options: Mapping[str, int]) -> nn.Module:
        """Return a decoder to the means of all features, standardised, `(B, L, C)`.

        Args:
            latent: Length of the latent vector.
            options: `hidden` (width of each step's hidden state, 64).
        """
        return StepDecoder(self.spec.shape, latent, options.get("hidden", 64))

    def log_likelihood(
        self, parameters: Tensor, values: Tensor, observed_fields: Tensor | None
    ) -> Tensor:
        """Return the Gaussian log density summed over steps and features, `(B,)`.

        Args:
            parameters: Means `(B, L, C)`, standardised.
            values: `(B, L, C)`, as read.
            observed_fields: Not used; sequences have no cells.
        """
        standard = (values - self.center(values)) / self.spread(values)
        per_value = -(standard - parameters).square() / 2 - math.log(math.sqrt(2 * math.pi))
        return per_value.flatten(1).sum(1)

    def mean(self, parameters: Tensor) -> Tensor:
        """Return the likelihood's mean in the units of the file, `(B, L, C)`."""
        return parameters * self.spread(parameters) + self.center(parameters)

    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean: what varies from draw to draw is what it was decoded from.

        The likelihood's noise is independent from feature to feature; no network makes such.
        """
        return self.mean(parameters)
