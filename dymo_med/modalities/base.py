"""What every kind of modality knows how to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dymo_med.blocks import Encoder
from dymo_med.errors import PatientDataError, Problem
from dymo_med.types import ModalitySpec, ModalityValue


def refuse_unknown(declared: Path, stem: str, where: str) -> None:
    """Refuse a file that is named like a modality's but cannot be taken for it.

    A file that is there must never count as missing: one in a format that is not read, one whose
    name differs in capitals, a link to nothing. Sidecars (`.json`, `.txt`) beside a scan and
    hidden files are not data.

    Args:
        declared: Where the modality's file would be.
        stem: Its name without extension; it may have dots of its own.
        where: Who this is, for the message.

    Raises:
        PatientDataError: If there is one.
    """
    if not declared.parent.is_dir():
        return
    tables = (".csv", ".tsv", ".json", ".parquet")
    sidecars = {".json", ".txt"} - ({".json"} if declared.suffix in tables else set())
    found = sorted(
        path
        for path in declared.parent.iterdir()
        if f"{path.name}.".lower().startswith(f"{stem}.".lower())
        and path.suffix.lower() not in sidecars
    )
    if not found:
        return
    what = "the file is named like this modality but its format is not read"
    remedy = "Convert it, or rename it if it is something else"
    if not found[0].exists():
        what, remedy = "the link leads nowhere", "Put the file in its place, or remove the link"
    elif not found[0].name.startswith(stem) or found[0].name.lower() == declared.name.lower():
        what = "the name differs from this modality's in capital letters"
        remedy = "Rename it"
    raise PatientDataError(
        Problem(f"{where}: {found[0].name}", what, expected=declared.name, remedy=remedy)
    )


def the_one(
    found: Sequence[Path], declared: Path, stem: str, where: str, ambiguous: Problem
) -> Path | None:
    """Return the one file found for a modality, or None if there is none.

    Args:
        found: Files that could be it.
        declared: Where it would be by its declared name.
        stem: That name without extension.
        where: Who this is, for messages.
        ambiguous: What to say of several; `got` is filled in here.

    Raises:
        PatientDataError: If there are several, or something that must not count as missing.
    """
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise PatientDataError(replace(ambiguous, got=names, remedy="Keep one of them"))
    if not found:
        refuse_unknown(declared, stem, where)
    return found[0] if found else None


@dataclass(frozen=True)
class Whose:
    """Which record a reader looks for, where a file may hold those of others.

    Attributes:
        record_id: Id of the record.
        patient_id: Id of the patient; None = not known.
        root: Folder of the cohort; None = there is none.
    """

    record_id: str = ""
    patient_id: str | None = None
    root: Path | None = None


class Modality(ABC):
    """All that depends on a modality's kind: read, fit, encode, decode, likelihood, write.

    A new kind is one subclass in one file and one line in `dymo_med.modalities.MODALITIES`.

    Args:
        spec: The modality this object handles.
    """

    Entry: ClassVar[type[BaseModel]]
    """Pydantic model of the modality's entry in `cohort.yaml`."""

    def __init__(self, spec: ModalitySpec) -> None:
        self.spec = spec

    @classmethod
    @abstractmethod
    def spec_from_entry(cls, name: str, entry: BaseModel) -> ModalitySpec:
        """Return the spec of a validated `cohort.yaml` entry."""

    # -- files ---------------------------------------------------------------------------------

    @abstractmethod
    def read(
        self,
        folder: Path,
        where: str,
        missing_values: Sequence[str] = (),
        whose: Whose | None = None,
    ) -> ModalityValue | None:
        """Read and preprocess this modality from a patient directory.

        Args:
            folder: The patient directory.
            where: Who this is, for error messages ("Patient p017").
            missing_values: Strings that mean "blank" in tables, besides the empty cell.
            whose: Which record this is, for files that hold rows of several.

        Returns:
            None if the modality is missing: no file, or a table row whose cells are all blank.

        Raises:
            PatientDataError: If a file is there but unreadable, ambiguous, of the wrong
                dimension, or holds a value it must not hold.
        """

    def read_beside(
        self,
        others: Mapping[ModalitySpec, ModalityValue],
        folder: Path,
        where: str,
        missing_values: Sequence[str] = (),
        whose: Whose | None = None,
    ) -> ModalityValue | None:
        """Read this modality of a record of which others were read before.

        Args:
            others: What was read, in the order in which it was.
            folder: As for `read`, and so are the others.
            where: See there.
            missing_values: See there.
            whose: See there.

        Raises:
            PatientDataError: As for `read`; also if it does not go together with the others.
        """
        return self.read(folder, where, missing_values, whose)

    @abstractmethod
    def write(
        self,
        folder: Path,
        values: Tensor,
        observed_fields: Tensor | None,
        affine: Sequence[Sequence[float]] | None,
    ) -> Path:
        """Write recovered values where nobody can mistake them for measured ones.

        Args:
            folder: Existing folder to write into.
            values: `(*spec.shape)`.
            observed_fields: Bool `(F,)` for a completed table, True = measured; None = nothing
                was measured.
            affine: 4 x 4 voxel-to-world matrix in mm of the grid, for 3D images; None if no
                observed scan gives one.

        Returns:
            The file written: its name and content say that it is synthetic.
        """

    def picture(self, values: Tensor) -> Tensor | None:
        """Return values as a picture for the report, `(C, rows, columns)` or a volume, or None.

        Args:
            values: `(*spec.shape)`.
        """
        return None

    # -- networks ------------------------------------------------------------------------------

    @abstractmethod
    def fit(
        self,
        values: Tensor,
        observed_fields: Tensor | None,
        descriptors: Tensor | None = None,
    ) -> ModalitySpec:
        """Return the spec with constants fitted on training patients only.

        Args:
            values: `(n, *shape)`, rows of training records that have this modality.
            observed_fields: Bool `(n, F)` for tables.
            descriptors: `(n, P)` for images, of the scans as stored; None = of the values.
        """

    def describe(self, values: Tensor) -> Tensor | None:
        """Return what descriptors scans of these values would have, `(B, P)`; None without any.

        Args:
            values: `(B, *shape)`.
        """
        return None

    @abstractmethod
    def encoder(self, dim: int, options: Mapping[str, Any]) -> Encoder:
        """Return a network `(values (B, *shape), observed_fields (B, F) | None) -> Tokens`.

        Args:
            dim: Token width D.
            options: Sizes by name from the recipe (unknown ones are ignored by a kind that has
                no use for them).
        """

    @abstractmethod
    def decoder(self, latent: int, options: Mapping[str, int]) -> nn.Module:
        """Return a network from latents to likelihood parameters `(B, P)` or `(B, *shape)`.

        It is called with a latent vector `(B, latent)` and, if `options` has `map` channels, a
        latent map `(B, map, *grid)`.
        """

    @abstractmethod
    def log_likelihood(
        self, parameters: Tensor, values: Tensor, observed_fields: Tensor | None
    ) -> Tensor:
        """Return log p(values | parameters) per patient, `(B,)`, over observed cells only."""

    @abstractmethod
    def mean(self, parameters: Tensor) -> Tensor:
        """Return the likelihood's mean (mode for categories) as `values` `(B, *shape)`."""

    @abstractmethod
    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """Return one random draw of what is recovered, as `values` `(B, *shape)`.

        Args:
            parameters: As for `mean`.
            generator: CPU generator.
        """
