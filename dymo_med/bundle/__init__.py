"""A trained model on disk: JSON and safetensors, checksums, a model card; nothing is unpickled.

BUNDLE/configs/metadata.json      who, what, versions, modalities, provenance
BUNDLE/configs/inference.json     imputer, backbone, default selector, temperature, base rates
BUNDLE/configs/selectors.json     every selector as fitted; why which one is the default
BUNDLE/configs/calibration.json   how many patients probabilities rest on; how often they were right
BUNDLE/configs/conformal.json     bounds that prediction sets go by
BUNDLE/configs/performance.json   how good it is, by what patients have
BUNDLE/configs/quality.json       what modalities of training records were like
BUNDLE/configs/comparators.json   options, temperature, figures of comparators, if there are any
BUNDLE/models/imputer.safetensors, backbone.safetensors, statistics.safetensors
BUNDLE/models/comparators.safetensors  if there are any
BUNDLE/configs/novelty.json, models/novelty.safetensors  what is usual among its patients
BUNDLE/configs/references.json, models/references.safetensors  plain references, as arrays
BUNDLE/docs/README.md             model card
BUNDLE/checksums.json             SHA-256 of every file above
"""

from dymo_med.bundle.device import placed, resolve_device
from dymo_med.bundle.folder import (
    SCHEMA_VERSION,
    UNREADABLE,
    check_version,
    checksums_of,
    hashed_id,
    identity,
    misfit,
    read_part,
    require_task,
    task_of,
    verified,
)
from dymo_med.bundle.model import ModelBundle
from dymo_med.bundle.reader import load_bundle, load_norms
from dymo_med.bundle.tables import TABLES, read_recipe, restored, selector_entries, table_entry
from dymo_med.bundle.tensors import STATISTICS, load_statistics, load_weights, on_cpu
from dymo_med.bundle.writer import metadata_of, save_bundle

__all__ = [
    "SCHEMA_VERSION",
    "STATISTICS",
    "TABLES",
    "UNREADABLE",
    "ModelBundle",
    "check_version",
    "checksums_of",
    "hashed_id",
    "identity",
    "load_bundle",
    "load_norms",
    "load_statistics",
    "load_weights",
    "metadata_of",
    "misfit",
    "on_cpu",
    "placed",
    "read_part",
    "read_recipe",
    "require_task",
    "resolve_device",
    "restored",
    "save_bundle",
    "selector_entries",
    "table_entry",
    "task_of",
    "verified",
]
