"""One batch's denoising chains, and what is required of their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.diffusion.solvers import Grid
from alignkit.diffusion.steps import Steps
from alignkit.errors import ConfigError, NumericsError
from alignkit.generators.rollout import ByStep


@dataclass(frozen=True)
class Chains:
    """One batch's chains: the denoiser as it is wrapped, conditioning, grid, the rows' seeds and start [P, C, ...]."""

    model: Any
    cond: ByStep
    grid: Grid
    seeds: list[int]
    x: Tensor


def require_trained(latents: Tensor, steps: Steps, step: int) -> None:
    """ConfigError if the ends `latents` of chains with gradients, in training step `step`, reach no trained weight.

    All of `steps` then belong to another network than the trained one, such as the other expert of Wan 2.2.
    """
    if torch.is_grad_enabled() and not latents.requires_grad:
        active = "all" if steps.active is None else sorted(steps.active)
        raise ConfigError(
            f"gradient_steps: at training step {step} the denoising steps with gradients ({active}) call no trained "
            "weight. Of a model with two experts choose steps of the trained one: the first ones for the option expert "
            "'transformer', the last ones for 'transformer_2'; or train the other expert"
        )


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
