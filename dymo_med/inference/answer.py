"""What every method says of a batch, from one recovery and one encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dymo_med.backbones import EncodedVersions
from dymo_med.bundle import ModelBundle
from dymo_med.data.batch import collate
from dymo_med.drawn import DRAWS, recovered
from dymo_med.inference.explain import Explanation, Subject, explain
from dymo_med.novelty import Novelty, Unusual, assess
from dymo_med.references import Mixed, features_of, layout_of
from dymo_med.selection import Integrated, WithDraws
from dymo_med.types import Batch, Fuse, PatientRecord, Recovery, SelectionTrace

# Always answered side by side: discard, trust everything, the published rule.
COMPARED = ("observed_only", "trust_all", "dymo")


@dataclass(frozen=True)
class Answers:
    """What every method says of a batch, from one recovery and one encoding.

    Attributes:
        batch: B records, on the bundle's device.
        recovery: What was proposed for what they lack.
        method: The bundle's default selector.
        traces: Selection by method: `COMPARED`, the bundle's default, and what else was asked for.
        probabilities: Calibrated, float64 `(B, K)` on the CPU, by method.
        fuse: Over the B records, for further questions: the network, or the network and the
            reference that has a part in the bundle's answers.
        network: The network alone, over the same records.
        drawn: The mean over draws of the recoveries, over the same records, where a selector asked
            for it and it costs next to nothing.
        novelty: What is usual among the bundle's patients; None where it does not know.
    """

    batch: Batch
    recovery: Recovery
    method: str
    traces: Mapping[str, SelectionTrace]
    probabilities: Mapping[str, Tensor]
    fuse: Fuse
    network: EncodedVersions
    drawn: Fuse | None = None
    novelty: Novelty | None = None

    @property
    def own(self) -> SelectionTrace:
        """The trace of the bundle's default selector."""
        return self.traces[self.method]

    @cached_property
    def unusual(self) -> Sequence[Unusual]:
        """How unlike training patients each record is; empty where the bundle cannot say.

        Found when it is asked for: an evaluation also answers for whole records and by other
        bundles, of whom nobody asks.
        """
        if self.novelty is None:
            return ()
        specs = self.network.backbone.specs
        return assess(self.novelty, features_of(self.batch, specs), layout_of(specs).owner)


def answer(
    bundle: ModelBundle,
    records: Sequence[PatientRecord],
    *,
    seed: int = 0,
    methods: Sequence[str] = (),
) -> Answers:
    """Answer for several records at once, with every method.

    Args:
        bundle: The model.
        records: B records, each with at least one modality.
        seed: Seed of whatever is random in the imputer.
        methods: Selectors to ask besides `COMPARED` and the bundle's default.

    Returns:
        The answers; a record's own do not depend on its neighbours.

    Raises:
        PatientDataError: If a record has nothing observed.
    """
    with torch.inference_mode():
        batch = collate(records, bundle.specs).to(bundle.device)
        asked = tuple(dict.fromkeys((*COMPARED, *methods, bundle.choice.name)))
        found = recovered(
            bundle.imputer,
            bundle.backbone,
            bundle.references,
            batch,
            bundle.calibration.temperature,
            draws=DRAWS if any(bundle.selectors[name].integrates for name in asked) else 0,
            seed=seed,
        )
        traces = {
            name: bundle.selectors[name].select(
                found.fuse, batch.observed, found.recovery.candidates, bundle.statistics
            )
            for name in asked
        }
        probabilities = {
            name: bundle.calibration.probabilities(trace.output.logits.cpu())
            for name, trace in traces.items()
        }
    return Answers(
        batch,
        found.recovery,
        bundle.choice.name,
        traces,
        probabilities,
        found.single,
        found.network,
        found.fuse.drawn if isinstance(found.fuse, WithDraws) else None,
        bundle.novelty,
    )


def explain_record(bundle: ModelBundle, answers: Answers, row: int, *, seed: int) -> Explanation:
    """Explain the answer of the bundle's own selector for one record.

    Args:
        bundle: The model.
        answers: Of a batch.
        row: Which record of it.
        seed: Seed of sampled orders, where there are too many modalities to list all subsets.
    """
    subject = Subject(
        bundle.backbone,
        answers.batch,
        answers.recovery,
        answers.own,
        row,
        calibration=bundle.calibration,
        base_rates=bundle.base_rates,
        mixed=answers.fuse if isinstance(answers.fuse, Mixed) else None,
        draws=answers.drawn.parts
        if bundle.selector.integrates and isinstance(answers.drawn, Integrated)
        else (),
    )
    fields = answers.batch.observed_fields
    observed = {
        name: fields[name][row].clone() if name in fields else None
        for name in answers.batch.observed.of(row)
    }
    return explain(subject, observed, seed=seed)
