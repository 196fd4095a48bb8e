"""Whether draws of recoveries are what they claim: coverage, and the martingale of answers.

A recovery is a function of what was observed. So the mean answer over draws of it is the answer
without it, whatever the patient, if network and imputer are both right; where it drifts, one of
them is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dymo_med.backbones import FusionBackbone
from dymo_med.drawn import drawn, recovered
from dymo_med.imputers import Imputer
from dymo_med.modalities import modality
from dymo_med.references import References
from dymo_med.selection.draws import GROUPS, groups_of
from dymo_med.training.loop import stream
from dymo_med.training.selectors import hide
from dymo_med.types import Batch, DrawCheck, DrawRow, Interval, ModalityMask, ModalitySpec

# Fewer patients tell nothing.
_FEWEST = 10
# Draws, and records that are looked at, of an imputer whose draws cost a decoding each.
_DRAWS, _FEW_DRAWS, _MOST_RECORDS = 100, 10, 40
_CHUNK = 64


@torch.no_grad()
def check_draws(
    imputer: Imputer,
    backbone: FusionBackbone,
    references: References | None,
    batch: Batch,
    temperature: float,
    seed: int,
    device: torch.device,
) -> DrawCheck | None:
    """Return how draws do on held-back records with modalities hidden.

    Args:
        imputer: Fitted.
        backbone: In evaluation mode.
        references: Of the bundle, where one of them may have a part in its answers.
        batch: n records of patients on whom neither was fitted, on the CPU.
        temperature: Of the network.
        seed: Of draws, and of what is hidden.
        device: Where to compute.

    Returns:
        None of an imputer that cannot draw, and where there are too few patients.
    """
    if not imputer.probabilistic or len(set(batch.patient_ids)) < _FEWEST:
        return None
    number = _DRAWS if imputer.closed_form else _FEW_DRAWS
    if not imputer.closed_form:
        batch = batch.rows(torch.arange(min(len(batch), _MOST_RECORDS)))
    rows = [
        row
        for m, spec in enumerate(backbone.specs)
        if (row := _coverage(imputer, batch, m, spec, number, seed, device)) is not None
    ]
    rows += _martingale(
        imputer, backbone, references, batch, temperature, min(number, 50), seed, device
    )
    return DrawCheck(tuple(rows), number)


def _coverage(
    imputer: Imputer,
    batch: Batch,
    m: int,
    spec: ModalitySpec,
    number: int,
    seed: int,
    device: torch.device,
) -> DrawRow | None:
    """Return how much of a modality, hidden, lies in the central 90 % of its draws."""
    available = batch.observed.available
    rows = (available[:, m] & (available.sum(1) > 1)).nonzero().squeeze(1)
    inside: list[Tensor] = []
    for some in rows.split(_CHUNK):
        part = batch.rows(some).to(device)
        hidden = without(part, m)
        recovery = imputer.recover(hidden)
        if not bool(recovery.recovered[:, m].any()):
            return None
        truth, known = _numbers(spec, part.values[spec.name], part.descriptors.get(spec.name))
        if spec.name in part.observed_fields:
            known = known & part.observed_fields[spec.name]
        unseen = [s.name for s in imputer.specs if s.is_image]
        many = torch.stack(
            [
                _numbers(spec, one.values[spec.name], one.descriptors.get(spec.name))[0]
                for one in imputer.draws(hidden, recovery, number, seed=seed, unseen=unseen)
            ]
        )
        if not known.shape[1]:
            return None
        # Of exchangeable draws the truth has every rank equally often.
        tail = 0.05 * (number + 1)
        rank = (many < truth).sum(0)
        within = (rank >= tail) & (rank <= number - tail)
        # A whole rank at either end counts by its share, so that 90 % is expected of few draws.
        expected = (number + 1 - 2 * -(-tail // 1)) / (number + 1)
        each = (within & known).double().sum(1) / known.sum(1).clamp_min(1)
        each = each * (0.9 / expected)
        inside.append(each[known.any(1)].cpu())
    if not inside:
        return None
    people = [batch.patient_ids[i] for i in rows.tolist()]
    found = torch.cat(inside)
    return DrawRow("coverage", spec.name, len(set(people)), _interval(found))


def _martingale(
    imputer: Imputer,
    backbone: FusionBackbone,
    references: References | None,
    batch: Batch,
    temperature: float,
    number: int,
    seed: int,
    device: torch.device,
) -> list[DrawRow]:
    """Return by how much the mean answer over draws differs from the answer without."""
    hidden = hide(batch, stream(seed, "check draws"))
    apart, groups = [], []
    for some in torch.arange(len(hidden)).split(_CHUNK):
        part = hidden.rows(some).to(device)
        made = recovered(imputer, backbone, references, part, temperature, draws=0, seed=seed)
        candidates = made.recovery.candidates
        fuses = drawn(
            imputer, made.network, made.single, part, made.recovery, draws=number, seed=seed
        )
        if not fuses:
            continue
        rows = torch.arange(len(part), device=device)
        seen = part.observed.available
        ask = (rows, seen | candidates, candidates)
        each = [torch.softmax(f(*ask).logits.double() / temperature, -1) for f in fuses]
        alone = made.single(rows, seen, torch.zeros_like(seen)).logits.double() / temperature
        difference = (torch.stack(each).mean(0) - alone.softmax(-1))[:, -1]
        kept = candidates.any(1)
        apart.append(difference[kept].cpu())
        groups.append(groups_of(seen, candidates)[kept].cpu())
    if not apart:
        return []
    values, group = torch.cat(apart), torch.cat(groups)
    return [
        DrawRow("martingale", name, int((group == g).sum()), _interval(values[group == g]))
        for g, name in enumerate(GROUPS)
        if int((group == g).sum()) >= _FEWEST
    ]


def without(batch: Batch, m: int) -> Batch:
    """Return records without one modality.

    Args:
        batch: B records.
        m: Its position.
    """
    available = batch.observed.available.clone()
    available[:, m] = False
    name = batch.observed.names[m]
    fields = dict(batch.observed_fields)
    if name in fields:
        fields[name] = torch.zeros_like(fields[name])
    observed = ModalityMask(batch.observed.names, available)
    return replace(batch, observed=observed, observed_fields=fields)


def _numbers(
    spec: ModalitySpec, values: Tensor, descriptors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the numbers of a modality that are compared `(B, p)`, and which of them count.

    Of a table its continuous cells, of a scan what networks read of its descriptors, of a
    sequence the mean of each feature.
    """
    if spec.columns:
        kept = torch.tensor([c.type == "continuous" and c.known for c in spec.columns])
        kept = kept.to(values.device)
        return values.double(), kept.expand(values.shape)
    if spec.is_image:
        told = descriptors if descriptors is not None else modality(spec).describe(values)
        if told is None or spec.descriptors is None:
            return values.new_zeros(len(values), 0).double(), torch.zeros(len(values), 0).bool()
        center = torch.tensor(spec.descriptors.center, dtype=torch.float64, device=told.device)
        components = torch.tensor(
            spec.descriptors.components, dtype=torch.float64, device=told.device
        )
        found = (told.double() - center) @ components.T
    else:
        found = values.double().mean(1)
    return found, torch.ones_like(found, dtype=torch.bool)


def _interval(values: Tensor) -> Interval:
    """Return a mean with its 95 % interval over patients."""
    n = len(values)
    if n < _FEWEST:
        return Interval(None, None, None)
    mean, error = float(values.mean()), float(values.std()) / n**0.5
    return Interval(mean, mean - 1.96 * error, mean + 1.96 * error)


def warnings_of(check: DrawCheck | None, imputer: str) -> Sequence[str]:
    """Return a sentence for what is clearly amiss.

    Args:
        check: Of a bundle.
        imputer: Its name.
    """
    if check is None:
        return []
    return [
        f"imputer {imputer}: the truth of {row.part} lies in the central 90 % of its draws for"
        f" {row.value.value:.0%} only: its recoveries are surer than they should be"
        if row.check == "coverage"
        else f"imputer {imputer}, {row.part}: averaging over draws moves answers by"
        f" {row.value.value:+.3f} on average, which it should not"
        for row in check.failing
    ]
