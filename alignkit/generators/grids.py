"""Reads the steps of a chain from a diffusers scheduler.

DDIM and Euler schedulers give their own steps. Every other scheduler gives the steps of the DDIM or Euler scheduler
with its config: multistep solvers (DPM++, UniPC, PNDM) are replaced by the first-order step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor

from alignkit.diffusion.solvers import Grid
from alignkit.errors import ConfigError

_FIRST_ORDER = (
    *("DDIMScheduler", "CogVideoXDDIMScheduler", "EulerDiscreteScheduler"),
    *("FlowMatchEulerDiscreteScheduler", "FlowMapEulerDiscreteScheduler"),
)


def scheduler_grid(scheduler: Any, kind: str, arguments: Mapping[str, Any]) -> Grid:
    """The grid of a diffusers scheduler after `set_timesteps(**arguments)`; `scheduler` itself is not changed.

    `kind` is the native prediction type. Raises ConfigError for steps that fall between the network's training steps
    (linspace or Karras spacing).
    """
    own = _first_order(scheduler, kind)
    own.set_timesteps(**arguments)
    if kind == "flow":
        sigmas = torch.as_tensor(own.sigmas, dtype=torch.float32, device="cpu")
        now, then = sigmas[:-1], sigmas[1:]
        return Grid(now, then, 1 - now, now, 1 - then, then)
    return _euler_grid(own) if type(own).__name__ == "EulerDiscreteScheduler" else _ddim_grid(own)


def _first_order(scheduler: Any, kind: str) -> Any:
    library: Any = diffusers
    if type(scheduler).__name__ in _FIRST_ORDER:
        return type(scheduler).from_config(scheduler.config)
    if kind == "flow":
        shift = scheduler.config.get("flow_shift") or scheduler.config.get("shift") or 1.0
        return library.FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=shift)
    is_cog = type(scheduler).__name__.startswith("CogVideoX")
    substitute = library.CogVideoXDDIMScheduler if is_cog else library.DDIMScheduler
    return substitute.from_config(scheduler.config, clip_sample=False)


def _ddim_grid(scheduler: Any) -> Grid:
    """The steps of a DDIM scheduler after `set_timesteps`: each ends T // N training steps below its start."""
    if scheduler.config.clip_sample or scheduler.config.get("thresholding"):
        raise ConfigError(
            "the scheduler clips samples (clip_sample, thresholding), which a chain cannot follow; no latent model "
            "is trained so. Set both to false in the scheduler's config"
        )
    steps = torch.as_tensor(scheduler.timesteps, device="cpu").long()
    count = scheduler.config.num_train_timesteps
    return training_step_grid(scheduler, steps, steps - count // len(steps))


def training_step_grid(scheduler: Any, steps_N: Tensor, next_N: Tensor) -> Grid:
    """A VP grid of integer training steps. A `next_N` below 0 is the end, with the scheduler's final alpha."""
    products = scheduler.alphas_cumprod.float().cpu()
    now = products[steps_N]
    then = torch.where(next_N >= 0, products[next_N.clamp(min=0)], scheduler.final_alpha_cumprod)
    count = len(products)
    coefficients = (now.sqrt(), (1 - now).sqrt(), then.sqrt(), (1 - then).sqrt())
    return Grid((steps_N + 1) / count, (next_N + 1).clamp(min=0) / count, *coefficients)


def _euler_grid(scheduler: Any) -> Grid:
    sigmas = torch.as_tensor(scheduler.sigmas, dtype=torch.float32, device="cpu")
    times = torch.as_tensor(scheduler.timesteps, dtype=torch.float32, device="cpu")
    if not torch.equal(times, times.round()):
        raise ConfigError(
            "the scheduler's steps fall between the network's training steps; use timestep_spacing leading or "
            "trailing, without Karras, exponential or beta sigmas"
        )
    alphas = 1 / (1 + sigmas**2).sqrt()  # x of k-diffusion is x_t / alpha
    sigmas = sigmas * alphas
    t = (torch.cat([times, times.new_full((1,), -1)]) + 1) / scheduler.config.num_train_timesteps
    start = float(scheduler.init_noise_sigma) * float(alphas[0])
    return Grid(t[:-1], t[1:], alphas[:-1], sigmas[:-1], alphas[1:], sigmas[1:], start)
