"""Fitting selectors, and picking the default among them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dymo_med.backbones import FusionBackbone
from dymo_med.drawn import recovered
from dymo_med.imputers import Imputer
from dymo_med.references import References
from dymo_med.selection import SELECTORS, Cases, Selector, WithDraws, joined
from dymo_med.tasks import PLAIN, OverClasses
from dymo_med.training.loop import stream
from dymo_med.types import (
    Batch,
    Choice,
    Fuse,
    FusionOutput,
    ModalityMask,
    SubsetStatistics,
)

_LOG = logging.getLogger(__name__)
_CHUNK = 64
_FOLDS = 5
# On fewer patients a difference between selectors is an accident.
_FEWEST = 10
# Standard errors by which a selector has to be better: more where a guess is taken for a
# measurement, which harms if the gain was an accident. Averages over draws hardly can.
_SURE, _SURE_OF_DRAWS = 2.0, 1.0
# Times that modalities are hidden from each record, so that there are about this many cases.
_MOST_REPEATS, _ENOUGH_CASES = 5, 5000
# Share of repeats in which some cells of a table are blanked, and of its cells then.
_BLANKED, _BLANK_CELLS = 0.25, 0.3


def hide(batch: Batch, generator: torch.Generator) -> Batch:
    """Hide a random number of modalities of each record, at least one and never all.

    A record with one modality keeps it. Now and then some cells of a table are blanked too, so
    that filled-in blanks are met as well.

    Args:
        batch: n records.
        generator: CPU generator.
    """
    available = batch.observed.available
    n, m = available.shape
    count = available.sum(1)
    most = (count - 1).clamp_min(0)
    number = 1 + (torch.rand(n, generator=generator) * most).long()  # 1 .. count - 1
    number = torch.minimum(number, most)
    rank = torch.rand(n, m, generator=generator).masked_fill(~available, 2.0).argsort(1).argsort(1)
    left = available & (rank >= number[:, None])
    fields = {}
    for name, filled in batch.observed_fields.items():
        some = torch.rand(n, 1, generator=generator) < _BLANKED
        blank = some & (torch.rand(filled.shape, generator=generator) < _BLANK_CELLS)
        kept = filled & ~blank
        # A table without a cell would be a missing one: that is not what is blanked here.
        kept = torch.where(kept.any(1, keepdim=True), kept, filled)
        fields[name] = kept & left[:, batch.observed.names.index(name)][:, None]
    return replace(batch, observed=ModalityMask(batch.observed.names, left), observed_fields=fields)


def calibration_cases(
    imputer: Imputer,
    backbone: FusionBackbone,
    batch: Batch,
    weights: Tensor,
    temperature: float,
    seed: int,
    device: torch.device,
    references: References | None = None,
) -> tuple[Cases, list[str]]:
    """Return labelled records as they are and with modalities hidden, all of it recovered.

    Args:
        imputer: The bundle's own.
        backbone: In evaluation mode.
        batch: n labelled records to fit on, on the CPU.
        weights: `(n,)`, by which every patient counts the same.
        temperature: Of the probabilities.
        seed: Decides what is hidden.
        device: Where to compute.
        references: Of the bundle, where one of them may have a part in its answers.

    Returns:
        The cases, and the patient of each.
    """
    if len(batch) > _ENOUGH_CASES // 2:  # enough is enough: evenly spread records
        kept = torch.linspace(0, len(batch) - 1, _ENOUGH_CASES // 2).long()
        batch, weights = batch.rows(kept), weights[kept]
    n = len(batch)
    repeats = max(1, min(_MOST_REPEATS, _ENOUGH_CASES // max(n, 1)))
    parts: list[Fuse] = []
    masks, candidates = [], []
    for repeat in range(repeats + 1):
        hidden = batch if repeat == 0 else hide(batch, stream(seed, "hide", repeat))
        for start in range(0, n, _CHUNK):
            rows = torch.arange(start, min(start + _CHUNK, n))
            part = hidden.rows(rows).to(device)
            found = recovered(imputer, backbone, references, part, temperature, seed=seed)
            parts.append(found.fuse)
            masks.append(part.observed.available)
            candidates.append(found.recovery.candidates)
    fuse = joined(parts, [len(mask) for mask in masks])
    cases = Cases(
        remember(fuse, len(batch.observed.names), n * (repeats + 1)),
        ModalityMask(batch.observed.names, torch.cat(masks)),
        torch.cat(candidates),
        batch.labels.repeat(repeats + 1).to(device),
        # A patient's cases add up to 1, however many visits there are.
        (weights * (len(set(batch.patient_ids)) / weights.sum() / (repeats + 1)))
        .repeat(repeats + 1)
        .to(device),
        temperature,
        None if batch.shares is None else batch.shares.repeat(repeats + 1, 1).to(device),
        None if batch.followed is None else batch.followed.repeat(repeats + 1, 1).to(device),
        batch.patient_ids * (repeats + 1),
    )
    return cases, list(batch.patient_ids) * (repeats + 1)


def remember(fuse: Fuse, modalities: int, rows: int) -> Fuse:
    """Return a `Fuse` that computes no answer twice.

    Several selectors are fitted and compared on the same cases, and ask for the same subsets.

    Args:
        fuse: Over B patients; must not depend on how questions are batched.
        modalities: M.
        rows: B.

    Returns:
        The same, remembering; `fuse` itself where the table of answers would be too long.
    """
    if isinstance(fuse, WithDraws):
        return WithDraws(*(remember(f, modalities, rows) for f in (fuse.single, fuse.drawn)))
    if rows * 3**modalities > 20_000_000:
        return fuse
    return _Remembering(fuse, modalities, rows)


class _Remembering:
    """Looks an answer up by patient and by what each modality is: out, as observed, recovered."""

    def __init__(self, fuse: Fuse, modalities: int, rows: int) -> None:
        self._fuse = fuse
        self._digits = 3 ** torch.arange(modalities)
        self._place = torch.full((rows * 3**modalities,), -1, dtype=torch.int64)
        self._logits: Tensor | None = None
        self._embedding: Tensor | None = None

    def __call__(self, rows: Tensor, used: Tensor, admitted: Tensor) -> FusionOutput:
        digits = self._digits.to(rows.device)
        code = ((used.long() + (used & admitted).long()) * digits).sum(1)
        key = (rows * (3 ** len(digits)) + code).cpu()
        missing = (self._place[key] < 0).nonzero().squeeze(1)
        if len(missing):
            new, which = key[missing].unique(return_inverse=True)
            ask = torch.empty_like(new)
            ask[which] = missing  # any of the questions with the same key will do
            ask = ask.to(rows.device)
            output = self._fuse(rows[ask], used[ask], admitted[ask])
            known = 0 if self._logits is None else len(self._logits)
            self._place[new] = torch.arange(known, known + len(new))
            if self._logits is None or self._embedding is None:
                self._logits, self._embedding = output.logits, output.embedding
            else:
                self._logits = torch.cat([self._logits, output.logits])
                self._embedding = torch.cat([self._embedding, output.embedding])
        if self._logits is None or self._embedding is None:
            return self._fuse(rows, used, admitted)  # nobody was asked about
        place = self._place[key].to(rows.device)
        return FusionOutput(self._logits[place], self._embedding[place])


def fit_all(
    cases: Cases, statistics: SubsetStatistics, options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Selector]:
    """Return every selector of the table, fitted.

    Args:
        cases: Of patients to fit on.
        statistics: Of the backbone.
        options: Options by selector, where they are not the default ones.
    """
    selectors = {}
    for name, entry in SELECTORS.items():
        selectors[name] = entry(entry.Options(**options.get(name, {})))
        if entry.needs_fit:
            with _convergence_heard(name):
                selectors[name].fit(cases.of_known_class(), statistics)
    return selectors


@contextmanager
def _convergence_heard(name: str) -> Iterator[None]:
    """Say so if a selector's fit meanwhile does not converge; other warnings pass as they are."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for one in caught:
        if not issubclass(one.category, ConvergenceWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if any(issubclass(one.category, ConvergenceWarning) for one in caught):
        _LOG.warning(
            "Selector %s: its fit on calibration patients did not converge. Look at its figures on"
            " the bundle's card before you use it; more calibration patients help.",
            name,
        )


def held_out_logits(
    selector: Selector, cases: Cases, statistics: SubsetStatistics, patients: Sequence[str]
) -> Tensor:
    """Return a selector's logits `(B, K)`, from a fit on other patients where it needs one.

    Args:
        selector: Its class and options count, not what it was fitted to.
        cases: B cases.
        statistics: Of the backbone.
        patients: Whose case each is; all of a patient's are in one fold.
    """
    if not selector.needs_fit:
        return selector.select(
            cases.fuse, cases.observed, cases.candidates, statistics
        ).output.logits
    order = {p: i for i, p in enumerate(sorted(set(patients)))}
    fold = torch.tensor([order[p] % _FOLDS for p in patients], device=cases.labels.device)
    logits: Tensor | None = None
    for k in fold.unique().tolist():
        inside = (fold == k).nonzero().squeeze(1)
        outside = (fold != k).nonzero().squeeze(1)
        again = type(selector)(selector.options)
        others = cases.rows(outside).of_known_class()
        again.fit(others if len(others) else cases.of_known_class(), statistics)
        part = cases.rows(inside)
        found = again.select(part.fuse, part.observed, part.candidates, statistics).output.logits
        if logits is None:
            logits = found.new_zeros(len(cases), found.shape[1])
        logits = logits.index_copy(0, inside, found)
    assert logits is not None
    return logits


def held_out(
    selectors: Mapping[str, Selector],
    cases: Cases,
    statistics: SubsetStatistics,
    patients: Sequence[str],
) -> dict[str, Tensor]:
    """Return every selector's log-probabilities `(B, K)`, calibrated, float64 on the CPU.

    Fitted selectors answer for patients whom they were not fitted on.

    Args:
        selectors: By name.
        cases: Of patients to fit on.
        statistics: Of the backbone.
        patients: Whose case each is.
    """
    logits = {}
    for name, selector in selectors.items():
        with _convergence_heard(name):
            logits[name] = held_out_logits(selector, cases, statistics, patients)
    return {n: (z.double().cpu() / cases.temperature).log_softmax(-1) for n, z in logits.items()}


def choose(
    answers: Mapping[str, Tensor],
    cases: Cases,
    patients: Sequence[str],
    task: OverClasses = PLAIN,
) -> Choice:
    """Pick the default: the lowest log-loss on held-back patients, if that is no accident.

    A selector is eligible if, cross-fitted by patient, it is no less accurate than
    `observed_only`, and its log-loss is lower by more than two standard errors over patients (one
    of averages over draws, which hardly harm), of whom there must be ten. Nothing eligible:
    `observed_only`.

    Of a regression the mean absolute error takes the place of the log-loss, and of it and of
    survival nothing else is asked.

    Args:
        answers: What `held_out` returned.
        cases: The same cases.
        patients: Whose case each is.
        task: What is predicted.
    """
    labels, weights = cases.labels.cpu(), cases.weights.double().cpu()
    shares = None if cases.shares is None else cases.shares.cpu()
    order = {p: i for i, p in enumerate(sorted(set(patients)))}
    who = torch.tensor([order[p] for p in patients])
    n, total = len(order), weights.sum()
    standing = weights  # of those whose class is known
    if cases.followed is not None:
        standing = weights * cases.followed[:, 2].cpu() * (labels >= 0)
    among = standing.sum().clamp_min(1e-12)
    losses, right = {}, {}
    for name, p in answers.items():
        losses[name] = task.log_loss(p, labels, shares)
        right[name] = (p.argmax(-1) == labels).double()
    key, called, judged = task.error_key, task.error_name, losses
    if key != "log_loss":
        judged = {name: task.error(p.exp(), labels, shares) for name, p in answers.items()}
    classes_matter = task.classes_matter and shares is None
    base_loss, base_right = judged["observed_only"], right["observed_only"]
    results, eligible = {}, {}
    pays = ""
    for name in answers:
        results[name] = {
            "log_loss": float((weights * losses[name]).sum() / total),
            "accuracy": float((standing * right[name]).sum() / among),
            "spoilt": float((standing * base_right * (1 - right[name])).sum() / among),
            "rescued": float((standing * (1 - base_right) * right[name]).sum() / among),
        }
        results[name][key] = float((weights * judged[name]).sum() / total)
        gain = torch.zeros(n, dtype=torch.float64)
        gain.index_add_(0, who, weights * (base_loss - judged[name]))
        share = torch.zeros_like(gain).index_add_(0, who, weights)
        mean = gain.sum() / total
        # Standard error of a ratio of sums over patients.
        error = ((gain - mean * share).square().sum() * n / max(n - 1, 1)).sqrt() / total
        drawn = SELECTORS[name].integrates and isinstance(cases.fuse, WithDraws)
        sure = n >= _FEWEST and bool(mean > (_SURE_OF_DRAWS if drawn else _SURE) * error)
        if name == "average" and isinstance(cases.fuse, WithDraws):
            pays = _pays(float(mean), float(error), called)
        accurate = results[name]["accuracy"] >= results["observed_only"]["accuracy"]
        if sure and (accurate or not classes_matter):
            eligible[name] = results[name][key]
    base = results["observed_only"][key]
    if n < _FEWEST:
        why = f"Measurements alone: {n} held-back patients are too few to tell selectors apart."
        return Choice("observed_only", why, results, n)
    if not eligible:
        wanted = "both clearly better and no less accurate" if classes_matter else "clearly better"
        why = (
            f"Measurements alone ({called} {base:.3f} on {n} held-back patients): no selector was"
            f" {wanted}.{pays}"
        )
        return Choice("observed_only", why, results, n)
    best = min(eligible, key=lambda name: eligible[name])
    why = (
        f"Lowest {called} on {n} held-back patients ({eligible[best]:.3f}; measurements alone"
        f" {base:.3f}) among selectors clearly better than those"
        f"{' and no less accurate' if classes_matter else ''}.{pays}"
    )
    return Choice(best, why, results, n)


def _pays(gain: float, error: float, called: str) -> str:
    """Return whether recovering pays, as a sentence.

    Args:
        gain: Of averages over draws against measurements alone.
        error: Its standard error over patients.
        called: What is gained.
    """
    verdict = "pays" if gain > error else "harms" if gain < -error else "hardly matters"
    return (
        f" Recovering {verdict} here: averaged over draws the {called} changes by {-gain:+.3f}"
        f" (standard error {error:.3f})."
    )
