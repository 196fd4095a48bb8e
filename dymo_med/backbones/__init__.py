"""Networks that answer for any subset of modalities: classifiers, and a segmentation network."""

from __future__ import annotations

from dymo_med.backbones.base import FusionBackbone
from dymo_med.backbones.bottleneck import CyclicFusion
from dymo_med.backbones.dense import DenseVersions, Readout, Windows, dense_versions
from dymo_med.backbones.ensemble import Ensemble, as_one
from dymo_med.backbones.shared_unet import SharedUNet
from dymo_med.backbones.transformer import FusionTransformer
from dymo_med.backbones.versions import (
    EncodedVersions,
    encode_draw,
    encode_observed,
    encode_versions,
)
from dymo_med.registry import Registry

BACKBONES: Registry[FusionBackbone] = Registry(
    "backbone", {"transformer": FusionTransformer, "cyclic": CyclicFusion}
)
SEGMENTERS: Registry[SharedUNet] = Registry("backbone", {"shared_unet": SharedUNet})

__all__ = [
    "BACKBONES",
    "SEGMENTERS",
    "CyclicFusion",
    "DenseVersions",
    "EncodedVersions",
    "Ensemble",
    "FusionBackbone",
    "FusionTransformer",
    "Readout",
    "SharedUNet",
    "Windows",
    "as_one",
    "dense_versions",
    "encode_draw",
    "encode_observed",
    "encode_versions",
]
