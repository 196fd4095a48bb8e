"""The nouns of the package: frozen dataclasses and protocols, checked once at construction.

Letters in shapes, everywhere: B patients (records), M modalities, K classes, D embedding size,
N tokens, T selection steps, S subsets, F table columns, C image channels, R rows of a request.

Polarity, everywhere: True = available.
"""

from dymo_med.types.answer import Attribution, Prediction, Value, WeightedSubset
from dymo_med.types.batch import Batch, LatentTokens, ModalityMask, Recovery, Tokens, subset_id
from dymo_med.types.cohort import SPLITS, Cohort, Split, Subgroup
from dymo_med.types.performance import (
    DrawCheck,
    DrawRow,
    Interval,
    Performance,
    PerformanceRow,
    Use,
    UseRow,
)
from dymo_med.types.record import (
    CohortRecord,
    FieldOfView,
    GateFinding,
    GateResult,
    GateState,
    ModalityValue,
    Native,
    Norms,
    PatientRecord,
    Source,
)
from dymo_med.types.scores import Scores
from dymo_med.types.selection import (
    Choice,
    Fuse,
    FusionOutput,
    Mixture,
    SelectionStep,
    SelectionTrace,
    SubsetStatistics,
)
from dymo_med.types.spec import (
    CellRules,
    Column,
    DescriptorNorms,
    FileRules,
    Logarithm,
    ModalitySpec,
    RulesT,
    SeriesRule,
    Steps,
)
from dymo_med.types.task import MaskSpec, Scale, Target, Task

__all__ = [
    "SPLITS",
    "Attribution",
    "Batch",
    "CellRules",
    "Choice",
    "Cohort",
    "CohortRecord",
    "Column",
    "DescriptorNorms",
    "DrawCheck",
    "DrawRow",
    "FieldOfView",
    "FileRules",
    "Fuse",
    "FusionOutput",
    "GateFinding",
    "GateResult",
    "GateState",
    "Interval",
    "LatentTokens",
    "Logarithm",
    "MaskSpec",
    "Mixture",
    "ModalityMask",
    "ModalitySpec",
    "ModalityValue",
    "Native",
    "Norms",
    "PatientRecord",
    "Performance",
    "PerformanceRow",
    "Prediction",
    "Recovery",
    "RulesT",
    "Scale",
    "Scores",
    "SelectionStep",
    "SelectionTrace",
    "SeriesRule",
    "Source",
    "Split",
    "Steps",
    "Subgroup",
    "SubsetStatistics",
    "Target",
    "Task",
    "Tokens",
    "Use",
    "UseRow",
    "Value",
    "WeightedSubset",
    "subset_id",
]
