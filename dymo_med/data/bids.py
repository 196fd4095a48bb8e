"""BIDS datasets as cohorts: participants, sessions, and where a modality's scan is.

Brain Imaging Data Structure 1.10 (bids-specification.readthedocs.io): `sub-LABEL/[ses-LABEL/]anat/
sub-LABEL[_ses-LABEL][_KEY-VALUE…]_SUFFIX.nii.gz`, `participants.tsv`, `n/a` for blank. A record is
a session, or the subject where there are no sessions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from dymo_med.config import Strict

PARTICIPANTS = "participants.tsv"
DESCRIPTION = "dataset_description.json"
BLANK = "n/a"
SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
SESSION = re.compile(r"ses-[A-Za-z0-9]+")

# Entities in the order in which they stand in a file's name.
_ENTITIES = (
    *("task", "tracksys", "acq", "nuc", "voi", "ce", "trc", "stain", "rec", "dir", "run", "mod"),
    *("echo", "flip", "inv", "mt", "part", "proc", "hemi", "space", "split", "recording"),
    *("chunk", "seg", "res", "den", "label", "desc"),
)


class ScanName(Strict):
    """What a modality's entry says of its scan's name, in place of `file`.

    Attributes:
        suffix: The last part of the name: `T1w`, `FLAIR`.
        datatype: The folder: `anat`.
        entities: Parts that the name must have besides: `{acq: mprage}`.
    """

    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9]+$")]
    datatype: Annotated[str, Field(pattern=r"^[a-z]+$")] = "anat"
    entities: dict[str, str] = Field(default_factory=dict)

    @field_validator("entities", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        unknown = [str(key) for key in value if key not in _ENTITIES]
        if unknown:
            raise ValueError(f"no entities of BIDS: {', '.join(unknown)}")
        # YAML reads run: 1 as a number.
        words = {k: str(v) if type(v) is int else v for k, v in value.items()}
        if not all(isinstance(v, str) and re.fullmatch("[A-Za-z0-9]+", v) for v in words.values()):
            raise ValueError("labels of entities are letters and digits; quote 01")
        return words

    @property
    def file(self) -> str:
        """The name inside the folder of a subject or session, `*` for what is not said."""
        order = {name: place for place, name in enumerate(_ENTITIES)}
        parts = sorted(self.entities.items(), key=lambda part: order[part[0]])
        middle = "".join(f"_{key}-{value}_*" for key, value in parts)
        # sub-01_acq-a_T1w and sub-01_acq-a_run-2_T1w both have acq-a: what stands between is open.
        name = f"sub-*{middle}_{self.suffix}.nii.gz".replace("_*_", "_*")
        return f"{self.datatype}/{name}"


def scan_keys(part: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a modality's entry in two: the keys of `ScanName`, and the others."""
    own = {k: v for k, v in part.items() if k in ScanName.model_fields}
    return own, {k: v for k, v in part.items() if k not in own}


def sessions(subject: Path) -> list[Path]:
    """Return the session folders of a subject, or the subject's own if there is none."""
    try:
        found = sorted(p for p in subject.iterdir() if SESSION.fullmatch(p.name) and p.is_dir())
    except OSError:
        return [subject]
    return found or [subject]


def ids(folder: Path) -> tuple[str, str]:
    """Return record and patient id of a subject's or session's folder: `sub-01_ses-a`, `sub-01`.

    A folder that is neither is called by its own name.
    """
    here, above = folder.resolve().name, folder.resolve().parent.name
    if SESSION.fullmatch(here) and SUBJECT.fullmatch(above):
        return f"{above}_{here}", above
    return here, here
