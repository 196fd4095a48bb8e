"""The two rules that look at nothing: discard every recovery, or trust every one."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from dymo_med.selection.base import Selector, require_something
from dymo_med.selection.greedy import make_trace
from dymo_med.types import Fuse, ModalityMask, SelectionTrace, SubsetStatistics


@final
class ObservedOnly(Selector):
    """Discard every recovery."""

    name = "observed_only"
    decides_by = "rule"
    admits = "nothing"

    def select(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, statistics: SubsetStatistics
    ) -> SelectionTrace:
        """See `Selector.select`."""
        return _fixed(fuse, observed, candidates, torch.zeros_like(candidates), self.name)


@final
class TrustAll(Selector):
    """Admit every recovery."""

    name = "trust_all"
    decides_by = "rule"
    admits = "everything"

    def select(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, statistics: SubsetStatistics
    ) -> SelectionTrace:
        """See `Selector.select`."""
        return _fixed(fuse, observed, candidates, candidates.clone(), self.name)


def _fixed(
    fuse: Fuse, observed: ModalityMask, candidates: Tensor, admitted: Tensor, name: str
) -> SelectionTrace:
    """Return the trace of a rule that looks at nothing: no steps."""
    require_something(observed)
    rows = torch.arange(len(candidates), device=candidates.device)
    output = fuse(rows, observed.available | admitted, admitted)
    return make_trace(name, observed, candidates, admitted, [], 0.0, output)
