"""Networks that answer for any subset of modalities: classifiers, and a segmentation network."""

from __future__ import annotations

from dymo_med.backbones.base import FusionBackbone
from dymo_med.backbones.shared_unet import SharedUNet
from dymo_med.backbones.transformer import FusionTransformer
from dymo_med.backbones.versions import EncodedVersions, encode_observed, encode_versions
from dymo_med.registry import Registry

BACKBONES: Registry[FusionBackbone] = Registry("backbone", {"transformer": FusionTransformer})

__all__ = [
    "BACKBONES",
    "EncodedVersions",
    "FusionBackbone",
    "FusionTransformer",
    "SharedUNet",
    "encode_observed",
    "encode_versions",
]
