"""Weights and statistics of a bundle, checked against what configurations ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dymo_med.bundle.checks import absurd
from dymo_med.bundle.folder import AGAIN
from dymo_med.errors import BundleError, Problem
from dymo_med.types import SubsetStatistics

STATISTICS = ("subsets", "prototypes", "overall", "spread", "counts", "borrowed_from")


def load_weights(network: nn.Module, path: Path, name: str) -> None:
    """Put a file's weights into a network.

    Raises:
        BundleError: If names, shapes or types differ, or a weight is not a number.
    """
    stored, wanted = load_file(path / name), network.state_dict()
    weights = {key for key, _ in network.named_parameters()}
    wrong = []
    for key in sorted({*stored, *wanted}):
        theirs, ours = stored.get(key), wanted.get(key)
        if theirs is None or ours is None or _form(theirs) != _form(ours):
            wrong.append(f"{key} is {_form(theirs)} and not {_form(ours)}")
        # A buffer may hold infinity: a limit that was never reached.
        elif theirs.isnan().any() or (key in weights and not theirs.isfinite().all()):
            wrong.append(f"{key} holds NaN or infinity")
        elif absurd(theirs, weight=key in weights):
            wrong.append(f"{key} holds numbers that no training leads to")
    if wrong:
        raise _wrong_tensors(path, name, wrong)
    network.load_state_dict(stored)


def _form(tensor: Tensor | None) -> str:
    """Return a tensor's type and shape for people."""
    if tensor is None:
        return "absent"
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _wrong_tensors(path: Path, name: str, wrong: Sequence[str]) -> BundleError:
    """Return the error of a file whose tensors are not the right ones."""
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return BundleError(
        Problem(
            f"{path}: {name}",
            "the tensors are not those of this model",
            expected="the names, shapes and types that configs/inference.json asks for, all finite",
            got="; ".join(wrong[:3]) + more,
            remedy=AGAIN,
        )
    )


def load_statistics(
    path: Path,
    distance: Any,
    modalities: int,
    classes: int | None = None,
    others: Mapping[str, tuple[int | None, ...]] | None = None,
) -> tuple[SubsetStatistics, dict[str, Tensor]]:
    """Return the subset statistics of a bundle, and what else is in their file.

    Args:
        path: The bundle.
        distance: Of its embedding.
        modalities: M.
        classes: K; None = as many as the file has.
        others: Shape of each other float32 tensor that has to be there; None in the place of a
            size is K.

    Raises:
        BundleError: If their shapes or types do not belong together, or a number is not finite.
        ValueError: If the distance is unknown.
    """
    if distance not in ("cosine", "euclidean"):
        raise ValueError("the distance is not known")
    name = "models/statistics.safetensors"
    stored = load_file(path / name)
    overall = stored.get("overall", torch.empty(0, 0))
    classes = len(overall) if classes is None else classes
    count, dim = len(stored.get("subsets", ())), overall.shape[-1]
    forms = {
        "subsets": f"bool {(count, modalities)}",
        "prototypes": f"float32 {(count, classes, dim)}",
        "overall": f"float32 {(classes, dim)}",
        "spread": f"float32 {(count, classes)}",
        "counts": f"int64 {(count, classes)}",
        "borrowed_from": f"int64 {(count, classes)}",
    }
    for key, shape in (others or {}).items():
        forms[key] = f"float32 {tuple(classes if n is None else n for n in shape)}"
    wrong = [
        f"{key} is {_form(stored.get(key))} and not {forms.get(key, 'absent')}"
        for key in sorted({*stored, *forms})
        if _form(stored.get(key)) != forms.get(key, "absent")
    ]
    if not wrong:
        wrong += [f"{k} holds NaN or infinity" for k, v in stored.items() if not v.isfinite().all()]
        large = [k for k, v in stored.items() if absurd(v, weight=False)]
        wrong += [f"{k} holds numbers that no training leads to" for k in large]
        source = stored["borrowed_from"]
        # -1: of no subset at all, but of all together.
        if not count or bool(((source < -1) | (source >= count)).any()):
            wrong.append("borrowed_from leads nowhere")
    if wrong:
        raise _wrong_tensors(path, name, wrong)
    rest = {key: stored.pop(key) for key in others or {}}
    return SubsetStatistics(distance=distance, **stored), rest


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors ready to be written."""
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
