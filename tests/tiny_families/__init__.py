"""Tiny random pipelines of every family, from the real classes; `FAMILIES` is what the conformance suite runs over.

A new family: one builder and one line in `images` or `videos`.
"""

from __future__ import annotations

from typing import Any

import torch

from tiny_families.images import IMAGES
from tiny_families.parts import Family, clip, kl_codec
from tiny_families.videos import VIDEOS

__all__ = ["FAMILIES", "IMAGES", "VIDEOS", "Family", "build", "clip", "kl_codec"]

FAMILIES = {**IMAGES, **VIDEOS}


def build(name: str) -> Any:
    """The pipeline of a family, with something in every weight: zero-initialised layers would hide mistakes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = FAMILIES[name].build()
        with torch.no_grad():
            parts = (pipeline.components.get(part) for part in ("unet", "transformer", "transformer_2"))
            for parameter in (parameter for part in parts if part for parameter in part.parameters()):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return pipeline
