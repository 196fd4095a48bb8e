"""A batch recovered, encoded and ready to be asked: from best guesses, and from draws of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dymo_med.backbones import EncodedVersions, FusionBackbone, encode_draw, encode_versions
from dymo_med.imputers import Imputer
from dymo_med.references import Mixed, References, answering, recovered_features
from dymo_med.selection import Integrated, WithDraws
from dymo_med.types import Batch, Fuse, Recovery

DRAWS = 20


@dataclass(frozen=True)
class Recovered:
    """What answers for a batch.

    Attributes:
        recovery: What was proposed for what is missing.
        network: The network alone, over the B records.
        single: The bundle's answers from best guesses: the network, or it and a reference.
        fuse: The same, with draws where they cost next to nothing (`Imputer.closed_form`).
    """

    recovery: Recovery
    network: EncodedVersions
    single: Fuse
    fuse: Fuse


@torch.no_grad()
def recovered(
    imputer: Imputer,
    backbone: FusionBackbone,
    references: References | None,
    batch: Batch,
    temperature: float,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Recovered:
    """Recover a batch and encode it.

    Args:
        imputer: Fitted.
        backbone: In evaluation mode.
        references: Of the bundle, where one of them may have a part in its answers.
        batch: B records, on the device of both.
        temperature: Of the network.
        draws: How many draws are averaged over; 0 = best guesses only.
        seed: Of the draws.
    """
    recovery = imputer.recover(batch, seed=seed)
    network = encode_versions(backbone, batch, recovery)
    single = answering(network, references, batch, recovery, backbone.specs, temperature)
    parts: tuple[Fuse, ...] = ()
    if imputer.closed_form and draws:
        parts = drawn(imputer, network, single, batch, recovery, draws=draws, seed=seed)
    fuse = WithDraws(single, Integrated(parts, temperature)) if parts else single
    return Recovered(recovery, network, single, fuse)


def drawn(
    imputer: Imputer,
    network: EncodedVersions,
    single: Fuse,
    batch: Batch,
    recovery: Recovery,
    *,
    draws: int,
    seed: int,
) -> tuple[Fuse, ...]:
    """Return one `Fuse` for each draw, over the same records; none where nothing can be drawn.

    Args:
        imputer: What recovered.
        network: Over B records.
        single: What answers from the best guess: the network, or `Mixed` with a reference.
        batch: The records.
        recovery: Of these.
        draws: How many.
        seed: Of the draws.
    """
    specs = network.backbone.specs
    unseen = [s.name for s in specs if s.is_image and not network.backbone.sees_voxels(s.name)]
    found: list[Fuse] = []
    for one in imputer.draws(batch, recovery, draws, seed=seed, unseen=unseen):
        part = encode_draw(network, one)
        if isinstance(single, Mixed):
            made = recovered_features(single.observed, one, specs)
            found.append(replace(single, network=part, recovered=made))
        else:
            found.append(part)
    return tuple(found)
