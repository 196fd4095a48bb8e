"""Kinds of modality: all that depends on whether a modality is an image, a table or a sequence."""

from __future__ import annotations

from dymo_med.modalities.base import Modality, Whose
from dymo_med.modalities.image import Image
from dymo_med.modalities.table import Table
from dymo_med.modalities.tokens import TokenSequence
from dymo_med.registry import Registry
from dymo_med.types import ModalitySpec

MODALITIES: Registry[Modality] = Registry(
    "modality kind", {"image": Image, "table": Table, "tokens": TokenSequence}
)


def modality(spec: ModalitySpec) -> Modality:
    """Return the object that reads, encodes and writes the modality `spec` describes.

    Raises:
        ConfigError: If its kind is not known.
    """
    return MODALITIES[spec.kind](spec)


__all__ = ["MODALITIES", "Modality", "Whose", "modality"]
