"""One record of a segmentation: look at each scan once, recover, select, outline on its own grid.

One patient, a cohort and the calibration of a bundle all take this step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dymo_med.backbones import DenseVersions, dense_versions
from dymo_med.bundle_segmentation import SegmentationBundle
from dymo_med.data.batch import collate
from dymo_med.data.masks import Grid, decided, network_grid, own_grid, to_grid
from dymo_med.selection import Selector
from dymo_med.selection.fixed import ObservedOnly
from dymo_med.types import Batch, PatientRecord, Recovery, SelectionTrace, SubsetStatistics

DISCARD = "observed_only"
# Without an imputer there is nothing to judge.
_NOTHING = SubsetStatistics("cosine", *(torch.zeros(0) for _ in range(6)))


@dataclass(frozen=True)
class Segmented:
    """What every method finds in one record, from one look at each scan.

    Attributes:
        record: The record.
        batch: The record alone, on the bundle's device.
        recovery: What was proposed for the scans it lacks; None where nothing could be.
        traces: Selection by method.
        versions: Logits of any set of its scans.
        seen: The network's grid in this patient.
        own: The grid of the patient's reference scan.
    """

    record: PatientRecord
    batch: Batch
    recovery: Recovery | None
    traces: Mapping[str, SelectionTrace]
    versions: DenseVersions
    seen: Grid
    own: Grid

    def probabilities(self, method: str) -> Tensor:
        """Return a method's probabilities on the network's grid, `(R, *seen.shape)`."""
        trace = self.traces[method]
        row = torch.zeros(1, dtype=torch.int64, device=trace.used.device)
        return torch.sigmoid(self.versions.logits(row, trace.used, trace.admitted)[0])


def segment_record(
    bundle: SegmentationBundle,
    record: PatientRecord,
    *,
    methods: Sequence[str] = (),
    flips: bool = False,
    seed: int = 0,
    seen: Segmented | None = None,
) -> Segmented:
    """Segment one record with several methods.

    Args:
        bundle: The model.
        record: With one scan at least.
        methods: Selectors to ask besides discarding everything and the bundle's default.
        flips: Average over all mirrorings of the scans.
        seed: Of whatever is random in the imputer.
        seen: The same record with these scans or more, segmented with the same `flips`; its
            scans are not looked at again.

    Raises:
        PatientDataError: If nothing was observed, or scans lie on different grids.
    """
    asked = dict.fromkeys((DISCARD, bundle.selector, *methods))
    with torch.inference_mode():
        batch = collate([record], bundle.specs).to(bundle.device)
        trust, recovery = bundle.trust, None
        candidates = torch.zeros_like(batch.observed.available)
        if trust is not None and not bool(batch.observed.available.all()):
            recovery = trust.imputer.recover(batch, seed=seed)
            candidates = recovery.candidates
        looked = dense_versions(
            bundle.network,
            batch,
            replace(bundle.windows, flips=flips),
            recovery,
            None if trust is None else trust.readout,
            None if seen is None else seen.versions,
        )
        statistics = _NOTHING if trust is None else trust.statistics
        # Those of the bundle, with the options it was made with.
        known: dict[str, Selector] = {
            DISCARD: ObservedOnly(),
            **({} if trust is None else trust.selectors),
        }
        traces = {
            name: known[name].select(looked, batch.observed, candidates, statistics)
            for name in asked
        }
    return Segmented(
        record,
        batch,
        recovery,
        traces,
        looked,
        network_grid(record),
        own_grid(record, bundle.specs),
    )


def finish(bundle: SegmentationBundle, segmented: Segmented, method: str) -> tuple[Tensor, Tensor]:
    """Return a method's probabilities and regions on the patient's own grid.

    Args:
        bundle: The model.
        segmented: One record.
        method: One of its traces.

    Returns:
        Float `(R, *own.shape)` and bool of the same shape, inner regions within outer ones.
    """
    with torch.inference_mode():
        there = to_grid(segmented.probabilities(method), segmented.seen, segmented.own)
        return there, decided(there, bundle.mask)
