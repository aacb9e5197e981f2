"""One batch's denoising chains, and the limit on the growth of their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from alignkit.diffusion.solvers import Grid
from alignkit.errors import NumericsError
from alignkit.generators.rollout import ByStep


@dataclass(frozen=True)
class Chains:
    """One batch's chains: the denoiser as it is wrapped, conditioning, grid, the rows' seeds and start [P, C, ...]."""

    model: Any
    cond: ByStep
    grid: Grid
    seeds: list[int]
    x: Tensor


def require_bounded(growth: Mapping[int, float], limit: float, step: int) -> None:
    """NumericsError naming the denoising step, in training step `step`, if `StateGradients.growth` passes `limit`."""
    for index, ratio in sorted(growth.items(), reverse=True):
        if not ratio <= limit:
            raise NumericsError(
                f"the gradient of the state after denoising step {index} is {ratio:.3g} times that after the last "
                f"one, at training step {step}; weights and the last checkpoint are as they "
                "were before it. Set state_gradient_cap, take fewer steps or those nearer to the end "
                "(gradient_steps), lower coupling, or raise growth_limit"
            )
