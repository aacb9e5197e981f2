"""Switches the adapters of a module off for a while: the base model is the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from alignkit.adapters import lora


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Within it no adapter in `module` is active. Layers whose adapters are off already stay as they are."""
    layers = [layer for layer in lora.lora_layers(module) if not layer.disable_adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
