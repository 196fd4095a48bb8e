"""Training of the plain references, and whether a bundle's answers should rest on one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dymo_med.backbones import EncodedVersions
from dymo_med.references import (
    REFERENCES,
    FittedReference,
    Reference,
    References,
    Training,
    features_of,
    layout_of,
    under,
)
from dymo_med.tasks import OverClasses
from dymo_med.training.calibration import fit_temperature
from dymo_med.training.loop import stream
from dymo_med.training.losses import within
from dymo_med.training.objectives import sampled_subsets
from dymo_med.training.selectors import hide
from dymo_med.types import Batch, ModalitySpec, Split

# Shares of the network that are tried.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_FOLDS = 5
# On fewer patients a difference is an accident.
_FEWEST = 10
# The reference that knows only what is missing.
_GAPS = "blanks_only"
# Times that modalities are hidden from each record, besides the record as it is.
_REPEATS = 3


@dataclass(frozen=True)
class Held:
    """Held-back labelled records with what asks the network about them.

    Attributes:
        batch: n records, on the CPU.
        features: Float64 `(n, P)`.
        fuse: Of the network, over the n records.
        temperature: Of the network.
    """

    batch: Batch
    features: Tensor
    fuse: EncodedVersions
    temperature: float


def train_references(
    specs: Sequence[ModalitySpec],
    classes: int,
    task: OverClasses,
    everybody: Batch,
    labelled: Mapping[Split, Batch],
    weights: Tensor,
    seed: int,
) -> References:
    """Fit every reference on training patients and calibrate it as the network is calibrated.

    Args:
        specs: Modalities in canonical order, fitted.
        classes: K.
        task: What is predicted.
        everybody: All training records, labelled or not, on the CPU.
        labelled: Of `train` records whose class is known, and of `calibration` labelled ones that
            temperatures are fitted on.
        weights: `(n,)` of those of `train` (`of_known_class`).
        seed: Of folds, draws and subsets.
    """
    layout = layout_of(specs)
    fitting, held_back = labelled["train"], labelled["calibration"]
    values = None
    if task.scale is not None and fitting.shares is not None:
        values = task.scale.value(fitting.shares.double())
    data = Training(
        features_of(fitting, specs),
        fitting.labels,
        values,
        weights.double(),
        fitting.patient_ids,
        features_of(everybody, specs),
        seed,
    )
    used = within(held_back.observed.available, sampled_subsets(len(specs), seed)).flatten(0, 1)
    rows = torch.arange(len(held_back)).repeat(len(used) // max(1, len(held_back)))
    features = under(features_of(held_back, specs)[rows], layout, used)
    models: dict[str, Reference] = {}
    fitted = {}
    for name, kind in REFERENCES.items():
        model = kind(layout, classes, task.scale)
        settings = model.fit(data, models)
        temperature = 1.0  # of a regression: another would move the answers themselves
        if task.calibrated:
            temperature = fit_temperature(
                model.logits(features),
                held_back.truth[rows],
                [held_back.patient_ids[i] for i in rows.tolist()],
            )
        fitted[name] = FittedReference(model, temperature, settings)
        models = {**models, name: model}
    return References(layout, fitted)


def weigh(references: References, held: Sequence[Held], task: OverClasses, seed: int) -> References:
    """Decide what part of a bundle's answers a reference is.

    The network, each reference, and mixtures of both answer for held-back patients as they are and
    with modalities hidden. It begins with equal shares of the network and of the last reference of
    the table that may have a part, the mean of the others: who has too few patients to tell shares
    apart does best not to choose among them. What is best for the patients of other folds takes
    its place, be it the network or a reference alone, if its log-loss (of a regression: mean
    absolute error) is lower by more than one standard error over patients. Of fewer than ten
    patients nothing is asked: the network answers alone.

    Args:
        references: Fitted.
        held: Validation and calibration records; none that prediction sets rest on.
        task: What is predicted.
        seed: Of what is hidden and of the folds.

    Returns:
        The same with weight, partner, reason and losses.
    """
    losses, patients = _losses(references, held, task, seed)  # (options, cases), (cases,)
    options = [("", 1.0), *((n, s) for n in references.fitted for s in SHARES if s < 1)]
    may = [not n or references.fitted[n].model.partner for n, _ in options]
    allowed = torch.tensor(may).nonzero().squeeze(1)
    order = {p: i for i, p in enumerate(sorted(set(patients)))}
    who = torch.tensor([order[p] for p in patients], dtype=torch.int64)
    n = len(order)
    if not n:
        return references
    cases = torch.bincount(who, minlength=n).double()
    each = torch.zeros(len(options), n, dtype=torch.float64).index_add_(1, who, losses) / cases
    mean = each.mean(1)
    key = task.error_name
    fold = torch.randperm(n, generator=stream(seed, "weigh")) % _FOLDS
    best_elsewhere = each[0].clone()
    for k in fold.unique().tolist():
        outside = (fold != k).nonzero().squeeze(1)
        best = each[allowed][:, outside].mean(1).argmin() if len(outside) else 0
        best_elsewhere[fold == k] = each[int(allowed[best]), fold == k]
    alone = {name: options.index((name, 0.0)) for name in references.fitted}
    better = tuple(name for name, i in alone.items() if _surely(each[0] - each[i]))
    found = {"network": float(mean[0]), **{name: float(mean[i]) for name, i in alone.items()}}
    if n < _FEWEST:
        why = f"The network alone: {n} held-back patients are too few to compare it."
        found["answer"] = found["network"]
        return replace(references, why=why, losses=found, patients=n)
    equal = options.index((references.plain, 0.5)) if references.plain else 0
    surely = _surely(each[equal] - best_elsewhere)
    partner, weight = options[int(allowed[mean[allowed].argmin()]) if surely else equal]
    answer = best_elsewhere if surely else each[equal]
    found["answer"] = float(answer.mean())
    losses_told = ", ".join(f"{name} {found[name]:.3f}" for name in ("network", *alone))
    if weight == 1:
        share, partner = "The network answers alone", ""
    elif weight == 0:
        share = f"{partner} answers alone"
    else:
        share = f"Answers are {weight:.0%} network and {1 - weight:.0%} {partner}"
    why = f"{share}: {key} {answer.mean():.3f} on {n} held-back patients ({losses_told})." + (
        " Equal shares were clearly worse." if surely else " No other shares were clearly better."
    )
    return replace(
        references,
        weight=weight,
        partner=partner,
        why=why,
        better=better,
        losses=found,
        patients=n,
    )


def warning_of(references: References) -> str:
    """Return what must be said loudly of references; empty if there is nothing.

    Args:
        references: Weighed.
    """
    if _GAPS in references.better:
        return (
            f"who has which modalities tells more than the network does: {_GAPS}, which looks at no"
            f" value, has {references.losses[_GAPS]:.3f} on {references.patients} held-back"
            f" patients, the network {references.losses['network']:.3f}. {references.why}"
        )
    if not references.better:
        return ""
    best = min(references.better, key=lambda name: references.losses[name])
    return (
        f"a plain reference ({best}) answers better than the network on"
        f" {references.patients} held-back patients: {references.losses[best]:.3f} against"
        f" {references.losses['network']:.3f}. {references.why}"
    )


def _surely(gain: Tensor) -> bool:
    """Return whether a mean over patients is above 0 by more than one standard error."""
    n = len(gain)
    if n < _FEWEST:
        return False
    return bool(gain.mean() > gain.std() / n**0.5)


def _losses(
    references: References, held: Sequence[Held], task: OverClasses, seed: int
) -> tuple[Tensor, list[str]]:
    """Return the loss of every option on every case, and the patient of each case."""
    parts: list[Tensor] = []
    patients: list[str] = []
    for number, one in enumerate(held):
        batch, n = one.batch, len(one.batch)
        masks = [batch.observed.available]
        for repeat in range(_REPEATS):
            generator = stream(seed, "hide from references", number, repeat)
            masks.append(hide(batch, generator).observed.available)
        used = torch.cat(masks)
        rows = torch.arange(n).repeat(len(masks))
        output = one.fuse(rows, used, torch.zeros_like(used))
        own = torch.softmax(output.logits.double().cpu() / one.temperature, dim=-1)
        features = under(one.features[rows], references.layout, used)
        answers = [own]
        for fitted in references.fitted.values():
            other = fitted.probabilities(features)
            answers += [s * own + (1 - s) * other for s in SHARES if s < 1]
        labels = batch.labels[rows]
        shares = None if batch.shares is None else batch.shares[rows]
        parts.append(torch.stack([task.error(p, labels, shares) for p in answers]))
        patients += list(batch.patient_ids) * len(masks)
    return torch.cat(parts, dim=1), patients
