"""Images, 2D and 3D: find the scan, put it on the modality's grid, encode, decode, write."""

from __future__ import annotations

import gzip
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, Field, field_validator, model_validator
from torch import Tensor, nn

from dymo_med.blocks import ConvDecoder, Encoder, PatchDecoder
from dymo_med.config import Strict
from dymo_med.encoders import IMAGE_ENCODERS, encoder
from dymo_med.errors import PatientDataError, Problem, RefusedError
from dymo_med.files import write_bytes
from dymo_med.modalities.base import Modality, Whose, the_one
from dymo_med.modalities.descriptors import NAMES, describe, fit_norms
from dymo_med.modalities.made_up import SYNTHETIC, refuse_made_up
from dymo_med.types import FieldOfView, ModalitySpec, ModalityValue, SeriesRule, Source

if TYPE_CHECKING:
    from monai.transforms import Compose

    from dymo_med.modalities.alignment import Reference

VOLUMES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
EXTENSIONS = (*VOLUMES, ".dcm", *PICTURES)
# A volume that shows this many times more or less than the grid gets a warning.
UNLIKE = 8


def plain_name(file: str) -> str:
    """Return `file` if it is a plain name inside the patient directory.

    Raises:
        ValueError: If it is absolute or leaves the directory.
    """
    path = PurePosixPath(file)
    inside = not path.is_absolute() and ".." not in path.parts and "\\" not in file
    inside = inside and not re.match(r"[A-Za-z]:", file) and "\0" not in file
    if not file.strip() or not inside or path.as_posix() == ".":
        raise ValueError("file must be a relative name inside the patient directory")
    return file


class SeriesEntry(Strict):
    """Which DICOM series of a folder an image modality is; every rule given must hold.

    Attributes:
        modality: The Modality tag, `MR`, `CT` or another.
        description: Regular expression, searched for in the SeriesDescription, capitals or not.
        slices: Fewest and most slices.
        absent: `error`, or `missing` where no series that fits means that none was made.
    """

    modality: Annotated[str, Field(pattern="^[A-Za-z]{2,16}$")] | None = None
    description: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    slices: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    absent: Literal["error", "missing"] = "error"

    @field_validator("description")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"description is no regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _says_something(self) -> SeriesEntry:
        if not (self.modality or self.description or self.slices):
            raise ValueError("dicom needs modality, description or slices")
        if self.slices is not None and self.slices[0] > self.slices[1]:
            raise ValueError("slices must be [fewest, most]")
        return self

    def rule(self) -> SeriesRule:
        """Return the rules."""
        return SeriesRule(self.modality or "", self.description or "", self.slices, self.absent)


def file_in(folder: Path, file: str) -> str:
    """Return the name of a file in a patient directory: `{record}` is the folder's own name.

    Example:
        >>> file_in(Path("patients/p01"), "{record}_t1.nii.gz")
        'p01_t1.nii.gz'
    """
    name = folder.name if folder.name not in ("", "..") else folder.resolve().name
    return file.replace("{record}", name)


class ImageEntry(Strict):
    """An image modality in `cohort.yaml`.

    Attributes:
        kind: `image`.
        dims: 2 or 3.
        file: File name inside the patient directory, where `{record}` stands for the directory's
            own name; another known extension or a DICOM folder of the same stem is found too.
        size: Voxels per axis of the grid: rows and columns (2D), X, Y, Z in RAS+ (3D).
        spacing_mm: Voxel size of the grid. Without it a 2D image is fitted into `size`.
        intensity: `zscore` over voxels other than 0, `percentile` (1 % to 99 % become 0 to 1,
            clipped) or `none`.
        channels: 1 (grey) or, in 2D, 3 (colour).
        dicom: Which series is meant where `file` is a folder with DICOM series.
        grid: In 3D, `shared`, `reference` or `own`: see `ModalitySpec.grid`.
    """

    kind: Literal["image"]
    dims: Literal[2, 3]
    file: str
    size: list[Annotated[int, Field(ge=8, le=512)]]
    spacing_mm: list[Annotated[float, Field(gt=0, le=1000)]] | None = None
    intensity: Literal["zscore", "percentile", "none"] = "zscore"
    channels: Literal[1, 3] = 1
    dicom: SeriesEntry | None = None
    grid: Literal["shared", "reference", "own"] = "shared"

    @model_validator(mode="after")
    def _fits(self) -> ImageEntry:
        plain_name(self.file)
        if len(self.size) != self.dims:
            raise ValueError(f"size must have {self.dims} numbers, got {len(self.size)}")
        if self.spacing_mm is not None and len(self.spacing_mm) != self.dims:
            raise ValueError(
                f"spacing_mm must have {self.dims} numbers, got {len(self.spacing_mm)}"
            )
        if self.dims == 3 and self.spacing_mm is None:
            raise ValueError("spacing_mm is required when dims is 3")
        if self.dims == 3 and self.channels != 1:
            raise ValueError("channels must be 1 when dims is 3")
        if self.dims == 2 and self.grid != "shared":
            raise ValueError("grid is for dims 3")
        return self


def same_grid(first: ModalitySpec, second: ModalitySpec) -> bool:
    """Return whether two modalities are volumes of the same size and spacing."""
    shapes = first.shape[1:], second.shape[1:]
    return len(shapes[0]) == 3 and shapes[0] == shapes[1] and first.spacing_mm == second.spacing_mm


def _is_called(name: str, stem: str) -> bool:
    """Return whether a scan's name has a stem, in which `*` stands for anything (BIDS)."""
    parts = [re.escape(part) for part in stem.split("*")]
    return _stem(name) != name and re.fullmatch(".*".join(parts), _stem(name)) is not None


def _stem(name: str) -> str:
    """Return a file name without its known extension."""
    for extension in EXTENSIONS:
        if name.lower().endswith(extension):
            return name[: -len(extension)]
    return name


def files_sha256(files: Sequence[Path]) -> str:
    """Return the hash of a file's bytes, or of all files' hashes, sorted, for several."""
    hashes = []
    for file in files:
        with file.open("rb") as stream:
            hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


class Image(Modality):
    """A 2D or 3D image on a fixed grid.

    The likelihood is a Gaussian of standard deviation 0.5 per voxel. Sutter et al. (Generalized
    Multimodal ELBO, ICLR 2021) use a Laplace distribution of scale 0.75, whose median ignores what
    most voxels do not show: trained with it, recovered scans lost their lesions (measured on the
    simulated cohort: error of a recovered FLAIR against the mean image's, 1.06 after 176 steps
    with Laplace, 0.90 with Gaussian).
    """

    Entry = ImageEntry
    standard_deviation = 0.5

    @classmethod
    def spec_from_entry(cls, name: str, entry: BaseModel) -> ModalitySpec:
        """Return the spec of a validated `cohort.yaml` entry."""
        entry = cast("ImageEntry", entry)
        return ModalitySpec(
            name=name,
            kind="image",
            file=entry.file,
            shape=(entry.channels, *entry.size),
            spacing_mm=tuple(entry.spacing_mm or ()),
            intensity=entry.intensity,
            dicom=entry.dicom.rule() if entry.dicom else None,
            grid=entry.grid,
        )

    @cached_property
    def _transforms(self) -> Compose:
        from dymo_med.modalities.transforms import pipeline

        return pipeline(self.spec)

    def _find(self, folder: Path, where: str) -> Path | None:
        """Return the scan's file or folder: the declared name, else one of the same stem."""
        exact = folder / file_in(folder, self.spec.file)
        if exact.exists():
            return exact
        stem = _stem(exact.name)
        if not exact.parent.is_dir():
            return None
        found = sorted(
            p
            for p in exact.parent.iterdir()
            if p.name == stem or (p.is_file() and p.name != stem and _is_called(p.name, stem))
        )
        ambiguous = Problem(
            f"{where}: {self.spec.name}",
            "several files could be this scan",
            expected=f"{exact.name} or one other",
            remedy="Keep the one that belongs to this visit",
        )
        return the_one(found, exact, stem, where, ambiguous)

    def read(
        self,
        folder: Path,
        where: str,
        missing_values: Sequence[str] = (),
        whose: Whose | None = None,
    ) -> ModalityValue | None:
        """Read the scan and put it on a grid of its own. See `Modality.read`."""
        return self.read_beside({}, folder, where, missing_values)

    def read_beside(
        self,
        others: Mapping[ModalitySpec, ModalityValue],
        folder: Path,
        where: str,
        missing_values: Sequence[str] = (),
        whose: Whose | None = None,
    ) -> ModalityValue | None:
        """Read the scan and put it on the grid that it shares. See `Modality.read_beside`."""
        path = self._find(folder, where)
        if path is None:
            return None
        refuse_made_up(path, where, self.spec.name)
        from dymo_med.modalities.scan import ScanAbsent, ScanError
        from dymo_med.modalities.transforms import read_scan

        try:
            scan = read_scan(self._transforms, path, self._reference(others))
            digest = files_sha256(scan.files)
        except ScanAbsent:
            return None
        except ScanError as error:
            problem = Problem(
                f"{where}: {path.name}", error.what, error.expected, error.got, error.remedy
            )
            if error.refused:
                raise RefusedError(problem, checks=(error.refused,)) from error
            raise PatientDataError(problem) from error
        except OSError as error:
            raise PatientDataError(
                Problem(
                    f"{where}: {path.name}",
                    "the file cannot be opened",
                    got=type(error).__name__,
                    remedy="Check its permissions",
                )
            ) from error
        image, facts = scan.image, scan.facts
        if image.min() == image.max():
            raise RefusedError(
                Problem(
                    f"{where}: {path.name}",
                    "nothing of the scan is left on the grid of this modality",
                    expected=f"something within {self._extent()} around the centre of the scan"
                    " or of the one whose grid it shares",
                    got=", ".join(f"{name} {fact}" for name, fact in facts.shown().items()),
                    remedy="Check the voxel size in its header",
                ),
                checks=("off_grid",),
            )
        remarks = (*facts.warnings, self._coverage(scan.field), self._far(scan.field, others))
        affine = None
        if len(self.spec.shape) == 4:
            affine = tuple(tuple(float(x) for x in row) for row in image.affine.tolist())
        return ModalityValue(
            values=image.as_tensor().float().contiguous(),
            source=Source(
                file=path.relative_to(folder).as_posix(),
                sha256=digest,
                affine=affine,
                facts=facts.shown(),
            ),
            warnings=tuple(f"{path.name}: {text}" for text in remarks if text),
            field_of_view=scan.field if len(self.spec.shape) == 4 else None,
            identifiers=scan.identifiers,
            native=facts.native,
            descriptors=facts.descriptors,
            fingerprint=facts.fingerprint,
        )

    def _extent(self) -> str:
        """Return the grid's field of view for people."""
        size, spacing_mm = self.spec.shape[1:], self.spec.spacing_mm
        if not spacing_mm:
            return " x ".join(str(n) for n in size)
        sides = zip(size, spacing_mm, strict=True)
        return " x ".join(f"{n * s:.4g}" for n, s in sides) + " mm"

    def _reference(self, others: Mapping[ModalitySpec, ModalityValue]) -> Reference | None:
        """Return the scan whose grid this one shares: the first that was read for that grid."""
        from dymo_med.modalities.alignment import Reference

        for spec, value in others.items():
            shares = "own" not in (spec.grid, self.spec.grid) and same_grid(spec, self.spec)
            if shares and value.field_of_view is not None and value.source.affine is not None:
                return Reference(spec.name, value.field_of_view, value.source.affine)
        return None

    def _far(self, field: FieldOfView | None, others: Mapping[ModalitySpec, ModalityValue]) -> str:
        """Return a warning if a volume on a grid of its own lies far from the first volume."""
        from dymo_med.modalities.alignment import far_warning

        if len(self.spec.shape) != 4 or field is None or self._reference(others) is not None:
            return ""
        for spec, value in others.items():
            if value.field_of_view is not None:
                return far_warning(field, spec.name, value.field_of_view)
        return ""

    def _coverage(self, field: FieldOfView | None) -> str:
        """Return a warning if a volume shows far less, or far more, than the grid."""
        if len(self.spec.shape) != 4 or field is None:
            return ""
        spacing_mm = np.sqrt((np.asarray(field.affine)[:3, :3] ** 2).sum(0)).tolist()
        stated = [n * s for n, s in zip(field.size, spacing_mm, strict=True)]
        grid = [n * s for n, s in zip(self.spec.shape[1:], self.spec.spacing_mm, strict=True)]
        share = math.prod(stated) / math.prod(grid)
        if 1 / UNLIKE <= share <= UNLIKE:
            return ""
        sides = " x ".join(f"{side:.3g}" for side in stated)
        return (
            f"It shows {sides} mm, and the model looks at {self._extent()}; check that it is the"
            " right scan and that its header states the right voxel size."
        )

    def write(
        self,
        folder: Path,
        values: Tensor,
        observed_fields: Tensor | None,
        affine: Sequence[Sequence[float]] | None,
    ) -> Path:
        """Write a recovered image: NIfTI for 3D, PNG for 2D, named and marked as synthetic.

        Voxels are in the grid's normalised intensities. A PNG is stretched to 0..255 and, when
        it is narrower than the mark, enlarged by a whole factor. See `Modality.write`.
        """
        array = values.detach().to("cpu", torch.float32).numpy()
        if len(self.spec.shape) == 4:
            return self._write_volume(folder, array[0], affine)
        return self._write_picture(folder, array)

    def _write_volume(
        self, folder: Path, array: np.ndarray, affine: Sequence[Sequence[float]] | None
    ) -> Path:
        import nibabel

        if affine is None:
            grid = np.diag([*self.spec.spacing_mm, 1.0])
            grid[:3, 3] = -np.asarray(self.spec.spacing_mm) * (np.asarray(array.shape) - 1) / 2
        else:
            grid = np.asarray(affine, dtype=float)
        image = nibabel.Nifti1Image(array, grid)
        image.set_sform(grid, code="aligned")  # some programs look at one, some at the other
        image.set_qform(grid, code="aligned")
        image.header["descrip"] = SYNTHETIC.encode()
        image.header.set_xyzt_units("mm")
        content = gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)
        return write_bytes(folder / f"{self.spec.name}_synthetic.nii.gz", content)

    def _write_picture(self, folder: Path, array: np.ndarray) -> Path:
        import io

        from PIL import Image as Picture
        from PIL import ImageDraw, ImageFont
        from PIL.PngImagePlugin import PngInfo

        low, high = (
            (0.0, 1.0) if self.spec.intensity == "percentile" else (array.min(), array.max())
        )
        grey = np.clip((array - low) / max(float(high - low), 1e-6), 0, 1) * 255
        pixels = np.moveaxis(grey.round().astype(np.uint8), 0, -1)
        picture = Picture.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        font = ImageFont.load_default(size=10)
        mark = "SYNTHETIC"
        left, top, right, bottom = font.getbbox(mark, stroke_width=1)
        factor = max(
            math.ceil((right - left + 2) / picture.width), math.ceil(2 * bottom / picture.height)
        )
        if factor > 1:
            size = (picture.width * factor, picture.height * factor)
            picture = picture.resize(size, Picture.Resampling.NEAREST)
        white, black = (255, 0) if picture.mode == "L" else ((255,) * 3, (0,) * 3)
        ImageDraw.Draw(picture).text(
            (1 - left, 1 - top), mark, fill=white, font=font, stroke_width=1, stroke_fill=black
        )
        text = PngInfo()
        text.add_text("Description", SYNTHETIC)
        stream = io.BytesIO()
        picture.save(stream, format="PNG", pnginfo=text)
        return write_bytes(folder / f"{self.spec.name}_synthetic.png", stream.getvalue())

    def picture(self, values: Tensor) -> Tensor:
        """Return the image itself."""
        return values

    def fit(
        self,
        values: Tensor,
        observed_fields: Tensor | None,
        descriptors: Tensor | None = None,
    ) -> ModalitySpec:
        """Return the spec with the norms of its scans' descriptors. See `Modality.fit`.

        Intensities themselves are normalised scan by scan.
        """
        on_grid = self._described(values)
        stored = on_grid if descriptors is None else descriptors
        return replace(self.spec, descriptors=fit_norms(stored, on_grid))

    def describe(self, values: Tensor) -> Tensor:
        """Return the descriptors that scans of these values would have as stored, `(B, P)`.

        Args:
            values: `(B, *shape)`, on the grid, where tails are shorter than in a scan's own voxels.
        """
        found = self._described(values)
        if self.spec.descriptors is None:
            return found
        adapt = found.new_tensor(self.spec.descriptors.adapt)
        return found @ adapt[:, :-1].T + adapt[:, -1]

    def _described(self, values: Tensor) -> Tensor:
        """Return the descriptors of values on the grid, `(B, P)`."""
        relative = self.spec.intensity != "none"
        scans = values.detach().float().cpu().numpy()
        rows = [describe(scan, relative=relative) for scan in scans]
        found = torch.stack(rows) if rows else torch.zeros(0, len(NAMES))
        return found.to(values.device)

    def encoder(self, dim: int, options: Mapping[str, Any]) -> Encoder:
        """Return the encoders that a recipe names, their tokens side by side.

        Args:
            dim: Token width D.
            options: `image_encoders` (entries of `IMAGE_ENCODERS`, `strided` alone), and what
                these know of sizes.
        """
        names = options.get("image_encoders", ("strided",))
        return encoder(IMAGE_ENCODERS, names, self.spec, dim, options)

    def decoder(self, latent: int, options: Mapping[str, int]) -> nn.Module:
        """Return a convolutional decoder to the image.

        Args:
            latent: Length of the latent vector.
            options: `width` (channels at the finest level, 16; four times that for patches); with
                a latent map also `map` (its channels) and `stride` (voxels per cell along each
                axis).
        """
        width, channels = options.get("width", 16), options.get("map", 0)
        if channels:
            return PatchDecoder(self.spec.shape, latent, 4 * width, channels, options["stride"])
        return ConvDecoder(self.spec.shape, latent, width)

    def log_likelihood(
        self, parameters: Tensor, values: Tensor, observed_fields: Tensor | None
    ) -> Tensor:
        """Return the Gaussian log density summed over voxels, `(B,)`.

        Args:
            parameters: Locations `(B, *shape)`.
            values: `(B, *shape)`.
            observed_fields: Not used; images have no cells.
        """
        standard = (values - parameters) / self.standard_deviation
        constant = math.log(self.standard_deviation * math.sqrt(2 * math.pi))
        per_voxel = -standard.square() / 2 - constant
        return per_voxel.flatten(1).sum(1)

    def mean(self, parameters: Tensor) -> Tensor:
        """Return the locations, which are the mean."""
        return parameters

    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """Return the locations: what varies from draw to draw is what they were decoded from.

        The likelihood's noise is independent from voxel to voxel. On a picture it would be grain
        that no scanner makes and no network was trained on.
        """
        return parameters
