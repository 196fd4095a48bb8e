"""What other recoveries, as plausible, would have answered, and what measuring is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from dymo_med.backbones import EncodedVersions, Ensemble, FusionBackbone
from dymo_med.bundle import ModelBundle
from dymo_med.drawn import drawn
from dymo_med.inference.answer import Answers
from dymo_med.inference.prediction_file import (
    CENTRAL,
    AcquirePart,
    DrawsPart,
    GainPart,
    entropy_bits,
    gain,
    rubin,
    summarise,
)
from dymo_med.references import Mixed
from dymo_med.types import Fuse


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
        parts = _draws_of(bundle, answers, row, draws, seed)

        def ask(admitted: Tensor) -> Tensor:
            """Return `(A, n, K)` for `A` subsets of candidates `(A, M)`, beside the observed."""
            rows = torch.zeros(len(admitted), dtype=torch.int64, device=device)
            logits = [part(rows, observed | admitted, admitted).logits for part in parts]
            return bundle.calibration.probabilities(torch.stack(logits, 1).cpu())

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
        variance = rubin(
            mean[:, chosen].tolist(),
            _apart(bundle, parts, observed, admitted, share, chosen),
        )
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
            variance=variance,
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


def _draws_of(
    bundle: ModelBundle, answers: Answers, row: int, draws: int, seed: int
) -> tuple[Fuse, ...]:
    """Return what answers for one record from each of n draws, each over this record alone."""
    index = torch.tensor([row], device=answers.own.observed.device)
    whole, recovery = answers.network, answers.recovery
    network = EncodedVersions(
        bundle.backbone, whole.observed[index], whole.observed_available[index], None
    )
    single: Fuse = network
    if isinstance(answers.fuse, Mixed):
        features = answers.fuse.observed[[row]]
        single = replace(answers.fuse, network=network, observed=features, recovered=None)
    own = replace(
        recovery,
        values={n: v[index] for n, v in recovery.values.items()},
        observed=replace(recovery.observed, available=recovery.observed.available[index]),
        recovered=recovery.recovered[index],
        completed=recovery.completed[index],
        draws=None,
        latents=None,
        descriptors={n: d[index] for n, d in recovery.descriptors.items()},
    )
    alone = answers.batch.rows(index)
    return drawn(bundle.imputer, network, single, alone, own, draws=draws, seed=seed)


def _apart(
    bundle: ModelBundle,
    parts: Sequence[Fuse],
    observed: Tensor,
    admitted: Tensor,
    share: Tensor,
    chosen: int,
) -> list[float] | None:
    """Return the variance of the mean of several networks, for each draw; None of one network.

    Args:
        bundle: The model.
        parts: One per draw, over one record.
        observed: Bool `(M,)`.
        admitted: Bool `(A, M)`: the subsets that are averaged.
        share: `(A,)` their weights.
        chosen: Index of the answer's class.
    """
    if not isinstance(bundle.backbone, Ensemble):
        return None
    members = list(bundle.backbone.members)
    rows = torch.zeros(len(admitted), dtype=torch.int64, device=admitted.device)
    found = []
    for part in parts:
        network = part.network if isinstance(part, Mixed) else part
        assert isinstance(network, EncodedVersions) and network.recovered is not None
        each = []
        for member, seen, made in zip(
            members,
            network.observed.chunk(len(members), dim=2),
            network.recovered.chunk(len(members), dim=2),
            strict=True,
        ):
            one: Fuse = EncodedVersions(
                cast("FusionBackbone", member), seen, network.observed_available, made
            )
            one = replace(part, network=one) if isinstance(part, Mixed) else one
            logits = one(rows, observed | admitted, admitted).logits.cpu()
            p = bundle.calibration.probabilities(logits)[:, chosen]
            each.append((share.double() * p).sum())
        found.append(float(torch.stack(each).var()) / len(each))
    return found
