"""What became of each modality, in words and codes that every standard repeats.

One table for all outputs. The codes are of a private scheme: no published one knows what was
recovered, trusted or refused (`docs/reference/outputs.md`).
"""

from __future__ import annotations

from dataclasses import dataclass

from dymo_med.inference.prediction_file import PredictionFile
from dymo_med.inference.segmentation_file import SegmentationFile

SCHEME = "99DYMO"
SYSTEM = "urn:dymo-med:codes"

# code: meaning (at most 64 characters, as a DICOM code's meaning may have)
STATES = {
    "observed": "Measured",
    "observed-completed-trusted": "Measured; recovered cells were used",
    "observed-completed-rejected": "Measured; recovered cells were not used",
    "recovered-trusted": "Missing; its synthetic recovery was used",
    "recovered-rejected": "Missing; its synthetic recovery was not used",
    "absent": "Missing; nothing was recovered",
}
TERMS = {
    "predicted-class": "Predicted class",
    "class": "Class of the prediction",
    "target": "What is predicted",
    "prediction-set-member": "Member of the prediction set",
    "in-prediction-set": "In the prediction set",
    "status": "Status of the answer",
    "reason": "Reason of the status",
    "modality-state": "State of the modality",
    "quality": "Quality gate",
    "refused": "Refused by the quality gate and treated as missing",
    "value": "Predicted value",
    "value-low": "Lower end of the interval of the predicted value",
    "value-high": "Upper end of the interval of the predicted value",
    "coverage": "Share of patients whose true answer lies within",
    "probability-measured": "Probability by measurements alone",
    "outline-measured": "Volume by measurements alone",
    "region": "Region that was outlined",
}
STATUS = {
    "answered": "Answered",
    "caution": "Answered with caution",
    "abstained": "Abstained: the model cannot tell",
}
QUALITY = {
    "pass": "Nothing found",
    "warn": "Something found; used with a warning",
    "refuse": "Refused and treated as missing",
}
REASONS = {
    "no_class_ruled_out": "No class can be ruled out",
    "too_few_calibrated": "Too few calibration patients to rule out a class",
    "measurements_differ": "Measurements alone would say another class",
    "draws_differ": "The answer changes with equally plausible recoveries",
    "refused": "A modality was refused by the quality gate",
    "quality": "The quality gate found something",
    "outside_training": "Values far outside the range of training patients",
    "few_held_back": "Few held-back patients had these modalities",
    "borrowed": "Figures of a smaller combination of modalities were used",
}


@dataclass(frozen=True)
class State:
    """What became of one modality.

    Attributes:
        name: The modality.
        code: Key of `STATES`.
        refused: Whether a file was there that the quality gate refused.
    """

    name: str
    code: str
    refused: bool

    @property
    def meaning(self) -> str:
        """The state in words."""
        return STATES[self.code]

    @property
    def synthetic_used(self) -> bool:
        """Whether the answer rests on something that was made up."""
        return self.code.endswith("-trusted")


def states(file: PredictionFile | SegmentationFile) -> list[State]:
    """Return every modality of the model with what became of it, measured ones first."""
    found = []
    for name in dict.fromkeys((*file.observed, *file.recovered, *file.absent)):
        kind = "observed" if name in file.observed else "absent"
        if name in file.trusted or name in file.rejected:
            kind = "observed-completed" if name in file.observed else "recovered"
            kind += "-trusted" if name in file.trusted else "-rejected"
        found.append(State(name, kind, name in file.refused))
    return found
