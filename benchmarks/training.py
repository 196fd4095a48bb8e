"""How fast a training step of the fusion backbone is: ours against the plain formulation.

    python benchmarks/training.py [--device cuda] [--batch 256] [--repeats 3]

Five 28 x 28 colour images per patient, all observed; ten classes; five random subsets of them per
batch; token width 128. A step is forward and backward; the optimiser's part is the same for both.

- *ours*: `FusionObjective`: each modality is encoded once, the subsets are fused in one call in
  which unavailable tokens are left out and the last block computes the class token alone.
- *plain*: for each subset the whole network runs, encoders included; unavailable tokens are
  masked, and every token goes through every block.

Both draw the same subsets and have the same loss, which is checked.
"""

import argparse
import platform
from collections.abc import Callable
from typing import Any

import torch
from selection import CLASSES, clock, make_batch, masked_fuse
from torch import Tensor
from torch.nn import functional as F

from dymo_med.backbones import BACKBONES
from dymo_med.config import BackboneTraining
from dymo_med.training.loop import MicroBatch
from dymo_med.training.losses import distinct_subsets, prototype_loss
from dymo_med.training.objectives import FusionObjective
from dymo_med.types import Batch, ModalitySpec

MODALITIES = 5
DRAWS = 10


def plain_loss(
    objective: FusionObjective, batch: Batch, settings: BackboneTraining, seed: int
) -> Tensor:
    """The loss of one step, subset by subset."""
    backbone: Any = objective.backbone
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for subset in distinct_subsets(MODALITIES, settings.subsets, generator):
        tokens = torch.cat([backbone.encode(n, v).values for n, v in batch.values.items()], 1)
        available = subset.to(tokens.device)[backbone.token_modality].expand(len(batch), -1)
        output = masked_fuse(backbone, tokens, available)
        prototypes = prototype_loss(
            output.embedding,
            batch.labels,
            objective.prototypes,
            objective.known,
            backbone.distance,
            settings.prototype_temperature,
        )
        cross_entropy = F.cross_entropy(output.logits, batch.labels, reduction="none")
        losses.append((cross_entropy + settings.prototype_weight * prototypes).mean())
    return torch.stack(losses).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    specs = [
        ModalitySpec(f"m{i}", "image", f"m{i}.png", (3, 28, 28), (), "none")
        for i in range(MODALITIES)
    ]
    torch.manual_seed(0)
    entry = BACKBONES["transformer"]
    backbone = entry(specs, CLASSES, entry.Options(dim=128, width=32))
    batch = make_batch(specs, arguments.batch, 1).to(device)
    weights = torch.ones(len(batch), device=device)
    settings = BackboneTraining(subsets=5)
    objective = FusionObjective(backbone, CLASSES, settings, batch, weights, device, seed=0).to(
        device
    )

    def our_loss(seed: int) -> Tensor:
        loss: Tensor = objective(MicroBatch(batch, weights, torch.Generator().manual_seed(seed)))
        return loss

    # An epoch gives prototypes; from then on their loss counts.
    objective.begin_epoch(0)
    with torch.no_grad():
        our_loss(0)
    objective.end_epoch()
    objective.begin_epoch(settings.prototype_epoch)
    for seed in range(3):
        with torch.no_grad():
            torch.testing.assert_close(
                our_loss(seed), plain_loss(objective, batch, settings, seed), atol=1e-3, rtol=1e-3
            )

    def steps(loss_of: Callable[[int], Tensor]) -> None:
        # The same draws of subsets for both: how many modalities they hold matters.
        for seed in range(DRAWS):
            objective.zero_grad()
            loss = loss_of(seed)
            # As in training: on the CPU, gradients are added in a fixed order.
            torch.use_deterministic_algorithms(device.type == "cpu")
            loss.backward()
            torch.use_deterministic_algorithms(False)

    losses = {"ours": our_loss, "plain": lambda seed: plain_loss(objective, batch, settings, seed)}
    seconds = {
        what: clock(lambda loss_of=loss_of: steps(loss_of), device, arguments.repeats) / DRAWS
        for what, loss_of in losses.items()
    }
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"{name}, {arguments.threads} threads, torch {torch.__version__}")
    print(
        f"M = {MODALITIES}, B = {len(batch)}, {settings.subsets} subsets; best of"
        f" {arguments.repeats} times {DRAWS} steps"
    )
    print("| training step | ms | patients/s | against ours |\n|---|---|---|---|")
    for what, s in seconds.items():
        ratio = s / seconds["ours"]
        print(f"| {what} | {1000 * s:.0f} | {len(batch) / s:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
