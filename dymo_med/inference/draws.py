"""What other recoveries, as plausible, would have answered, and what measuring is worth."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dymo_med.backbones import EncodedVersions
from dymo_med.bundle import ModelBundle
from dymo_med.inference.answer import Answers
from dymo_med.inference.prediction_file import (
    CENTRAL,
    AcquirePart,
    DrawsPart,
    GainPart,
    entropy_bits,
    gain,
    summarise,
)
from dymo_med.references import Mixed, summary
from dymo_med.types import Fuse

DRAWS = 20
# Voxels (or cells) that are encoded at once.
_MOST_VOXELS = 8_000_000


def draw_answers(
    bundle: ModelBundle, answers: Answers, row: int, *, draws: int, seed: int
) -> tuple[DrawsPart | None, AcquirePart | None]:
    """Return what other recoveries, as plausible, would have answered, and what measuring is worth.

    The selection stays as it was made. A draw is encoded once, as if it had been observed, and
    then only fused: with all draws that were admitted, with all draws there are, and alone beside
    what was observed.

    Args:
        bundle: The model.
        answers: Of a batch.
        row: Which record of it; its draws do not depend on the others.
        draws: n.
        seed: Of the draws.

    Returns:
        None and None without draws, of an imputer that cannot draw, and where nothing was
        recovered.
    """
    trace = answers.own
    candidates = answers.recovery.candidates[row]
    if not draws or not bundle.imputer.probabilistic or not bool(candidates.any()):
        return None, None
    names, device = trace.names, candidates.device
    observed = trace.observed[row]
    with torch.inference_mode():
        fuse = _fuse_draws(bundle, answers, row, draws, seed)

        def ask(admitted: Tensor) -> Tensor:
            """Return `(A, n, K)` for `A` subsets of candidates `(A, M)`, beside the observed."""
            count = len(admitted)
            rows = torch.arange(draws, device=device).repeat(count)
            each = admitted.repeat_interleave(draws, 0)
            logits = fuse(rows, observed | each, each).logits
            return bundle.calibration.probabilities(logits.cpu()).view(count, draws, -1)

        admitted, weight = trace.admitted[row : row + 1], None
        if trace.mixture is not None:
            own = trace.mixture.rows == row
            admitted, weight = trace.mixture.admitted[own], trace.mixture.weight[own]
        each = ask(admitted)
        share = torch.ones(1) if weight is None else weight.cpu()
        mean = (share.double()[:, None, None] * each).sum(0).clamp(0, 1)
        everything = ask(candidates[None])[0]
        single = candidates.nonzero().squeeze(1)
        beside = ask(torch.nn.functional.one_hot(single, len(names)).bool())
    chosen = int(answers.probabilities[answers.method][row].argmax())
    alone = answers.probabilities["observed_only"][row].tolist()
    gains: list[GainPart] = [
        gain(
            names[m],
            "blanks" if bool(observed[m]) else "missing",
            "trusted" if bool(trace.admitted[row, m]) else "rejected",
            p,
            alone,
            chosen,
        )
        for m, p in zip(single.tolist(), beside.tolist(), strict=True)
    ]
    unknown = ~observed & ~candidates
    return (
        DrawsPart(
            n=draws,
            seed=seed,
            central=CENTRAL,
            own=summarise(mean.tolist(), chosen),
            trust_all=summarise(everything.tolist(), chosen),
        ),
        AcquirePart(
            draws=draws,
            bits=entropy_bits(alone),
            probability=alone[chosen],
            gains=tuple(sorted(gains, key=lambda g: -g.bits)),
            unknown=tuple(n for n, u in zip(names, unknown.tolist(), strict=True) if u),
        ),
    )


def _fuse_draws(bundle: ModelBundle, answers: Answers, row: int, draws: int, seed: int) -> Fuse:
    """Return a `Fuse` over n copies of one record, each with another draw of its recoveries."""
    whole, candidates = answers.network, answers.recovery.candidates[row]
    alone = answers.batch.rows(torch.tensor([row], device=candidates.device))
    drawn = bundle.imputer.recover(alone, draws=draws, seed=seed).draws or {}
    observed = whole.observed[row].expand(draws, -1, -1)
    recovered = observed.clone()
    for m, spec in enumerate(bundle.specs):
        if bool(candidates[m]):
            values = drawn[spec.name][:, 0]  # (n, *shape)
            chunk = max(1, _MOST_VOXELS // values[0].numel())
            parts = values.split(chunk)
            tokens = torch.cat([bundle.backbone.encode(spec.name, p).values for p in parts])
            recovered[:, bundle.backbone.token_modality == m] = tokens
    available = whole.observed_available[row].expand(draws, -1)
    network = EncodedVersions(bundle.backbone, observed, available, recovered)
    if not isinstance(answers.fuse, Mixed):
        return network
    features = answers.fuse.observed[row].expand(draws, -1)
    made = features.clone()
    layout = answers.fuse.reference.model.layout
    for m, spec in enumerate(bundle.specs):
        if bool(candidates[m]):
            own = torch.tensor(layout.owner) == m
            made[:, own] = summary(drawn[spec.name][:, 0], spec).double().cpu()
    return replace(answers.fuse, network=network, observed=features, recovered=made)
