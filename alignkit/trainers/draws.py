"""The random part of an item: time, noise and caption dropout.

Every draw is keyed by (noise seed, prompt id, epoch): no result depends on batch size, order or worker count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.seeds import derive_seed


@dataclass(frozen=True)
class Draws:
    """The random part of one prompt's item."""

    t: Tensor  # [K], canonical times
    noise: Tensor  # [K, C, H, W] or [K, C, T, H, W]
    dropped: bool


@dataclass(frozen=True)
class DrawPlan:
    """How an item's draws are made; `share_*` give all K candidates of a prompt one time / one noise.

    Times follow the family's density, scaled to [t_min, 1].
    """

    sample_t: Callable[[int, torch.Generator], Tensor]
    noise_seed: int
    caption_dropout: float
    share_noise: bool = True
    share_timestep: bool = True
    t_min: float = 0.0

    def draw(self, prompt_id: str, epoch: int, shape: Sequence[int]) -> Draws:
        """Draws of one item with latents of `shape` [K, C, H, W] or [K, C, T, H, W]."""
        source = torch.Generator().manual_seed(derive_seed("draw", self.noise_seed, prompt_id, epoch))
        count = shape[0]
        t = self.sample_t(1 if self.share_timestep else count, source).expand(count)
        t = self.t_min + (1 - self.t_min) * t
        noise = torch.randn((1 if self.share_noise else count, *shape[1:]), generator=source).expand(*shape)
        dropped = bool(torch.rand((), generator=source) < self.caption_dropout)
        return Draws(t, noise, dropped)
