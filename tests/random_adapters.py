"""Random adapter weights for tests: a fresh LoRA changes nothing, for one of its factors is zero."""

from __future__ import annotations

import torch
from torch import nn


def stir(module: nn.Module, size: float = 0.3) -> None:
    """Fill all LoRA weights of `module` with the same random numbers each time."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=rng))


def shake(module: nn.Module, seed: int, size: float = 0.3, only: str = "") -> None:
    """Add random numbers to the weights of `module`, or put them in the place of those whose names contain `only`.

    A fresh LoRA has random weights of its own, from the global generator; so they are replaced.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if only in name:
                kept = 0 if only else parameter
                parameter.copy_(kept + size * torch.randn(parameter.shape, generator=rng))
