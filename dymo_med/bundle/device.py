"""Where networks compute."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from dymo_med.errors import ConfigError, Problem, out_of_memory


def resolve_device(name: str) -> torch.device:
    """Return the device called `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ConfigError: If it is none of these, or CUDA is asked for and absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", name)
    if name != "cpu" and cuda is None:
        raise ConfigError(
            Problem(
                "--device",
                "unknown device",
                expected="auto, cpu or cuda, with a number behind a colon if there are several",
                remedy="Name one of these",
            )
        )
    if name != "cpu" and not torch.cuda.is_available():
        raise ConfigError(
            Problem(
                "--device",
                "this machine offers no CUDA device",
                expected="a device that is there",
                remedy="Use --device cpu",
            )
        )
    count = torch.cuda.device_count() if cuda else 0
    if cuda and int(cuda[1] or 0) >= count:
        raise ConfigError(
            Problem(
                "--device",
                "this machine has no CUDA device of that number",
                expected=f"a number below {count}",
                got=name,
                remedy="Count devices from 0, or use --device cuda or cpu",
            )
        )
    return torch.device(name)


def placed(path: Path, device: torch.device, *networks: nn.Module) -> None:
    """Move networks to a device, ready to answer.

    Args:
        path: The bundle that they are from.
        device: Where to.
        *networks: Networks.

    Raises:
        ConfigError: If its memory does not hold them: no fault of the bundle's.
    """
    try:
        for network in networks:
            network.to(device).eval().requires_grad_(False)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise too_large(path) from error


def too_large(path: Path) -> ConfigError:
    """Return what to raise where memory does not hold a bundle's networks."""
    return ConfigError(
        Problem(
            str(path),
            "memory does not hold the bundle's networks",
            expected="a device that has room for them",
            remedy="Stop what else uses the device, or use --device cpu",
        )
    )
