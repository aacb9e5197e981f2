"""Noise schedules as data, on one canonical time axis: t in [0, 1], t = 0 the image, t = 1 pure noise.

    x_t = alpha(t) x0 + sigma(t) eps

No sampling here: images are drawn by the vanilla pipeline's scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """alpha, sigma and the training density of a model family."""

    def coefficients(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each of t's shape and at least float32."""
        ...

    def model_time(self, t_B: Tensor) -> Tensor:
        """The time value the network is called with."""
        ...

    def sample_t(self, n: int, generator: torch.Generator) -> Tensor:
        """n canonical times from the family's training density."""
        ...


@dataclass(frozen=True)
class VPSchedule:
    """Discrete variance-preserving diffusion (DDPM): t = (k + 1) / T stands for step k of T."""

    alphas_cumprod: Tensor  # [T], falling from about 1 to about 0

    def index(self, t_B: Tensor) -> Tensor:
        """Integer steps k of canonical times; t below 1/T counts as the first step."""
        count = len(self.alphas_cumprod)
        return (t_B * count).round().long().clamp(1, count) - 1

    def coefficients(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.alphas_cumprod.to(t_B.device)[self.index(t_B)]
        return kept.sqrt(), (1 - kept).sqrt()

    def model_time(self, t_B: Tensor) -> Tensor:
        return self.index(t_B)

    def sample_t(self, n: int, generator: torch.Generator) -> Tensor:
        """Uniform over the T steps, as in DDPM and Diffusion-DPO."""
        count = len(self.alphas_cumprod)
        return (torch.randint(count, (n,), generator=generator) + 1).float() / count


@dataclass(frozen=True)
class FlowSchedule:
    """Rectified flow: x_t = (1 - t) x0 + t eps, with SD3's logit-normal(0, 1) density and resolution shift.

    Times are drawn again until they lie within [low, high], the range of an expert.
    """

    shift: float = 1.0
    scale: float = 1000.0  # network time units at t = 1
    low: float = 0.0
    high: float = 1.0

    def coefficients(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t_B, t_B

    def model_time(self, t_B: Tensor) -> Tensor:
        return t_B * self.scale

    def sample_t(self, n: int, generator: torch.Generator) -> Tensor:
        kept = torch.empty(0)
        while len(kept) < n:
            u = torch.randn(n, generator=generator).sigmoid()
            t = self.shift * u / (1 + (self.shift - 1) * u)
            kept = torch.cat([kept, t[(self.low <= t) & (t <= self.high)]])
        return kept[:n]


def expand(values_B: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, ...] with as many axes as `like`."""
    return values_B.reshape(-1, *([1] * (like.dim() - 1)))
