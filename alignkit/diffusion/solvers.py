"""One deterministic solver for chains that need gradients: DDIM, which is Euler's method on the probability-flow ODE.

    x_s = alpha_s x0_hat + sigma_s eps_hat          (Song et al. 2021, eq. 12 with eta = 0)

For rectified flow this is Euler's step x + (s - t) u; for the k-diffusion form x / sqrt(1 + sigma^2) it is Euler's step
in sigma. Where the steps lie is read from the pipeline's scheduler. Not here: multistep solvers (DPM++, UniPC, PNDM),
for which the first-order step stands in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.diffusion.conversions import split
from alignkit.errors import ConfigError


@dataclass(frozen=True)
class Grid:
    """N steps, each field [N]: canonical times t of the network's calls and t_next after them, alpha, sigma at both."""

    t: Tensor
    t_next: Tensor
    alpha: Tensor
    sigma: Tensor
    alpha_next: Tensor
    sigma_next: Tensor
    start: float = 1.0  # what unit noise is multiplied with

    def __len__(self) -> int:
        return len(self.t)

    def times(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(t, t_next) of one step for every row of `like` [B, ...], each [B]."""
        now, then = (values[index].to(like).expand(len(like)) for values in (self.t, self.t_next))
        return now, then

    def step(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(alpha, sigma, alpha_next, sigma_next) of one step, scalars."""
        return self.alpha[index], self.sigma[index], self.alpha_next[index], self.sigma_next[index]


def ddim_step(kind: str, prediction: Tensor, x_t: Tensor, grid: Grid, index: int) -> Tensor:
    """x after step `index` from a native prediction of this `kind` (one of conversions.TARGETS)."""
    alpha, sigma, alpha_next, sigma_next = grid.step(index)
    x0, eps = split(kind, prediction, x_t, alpha, sigma)
    return alpha_next * x0 + sigma_next * eps


def grid(scheduler: Any, kind: str, arguments: Mapping[str, Any]) -> Grid:
    """The grid of a diffusers scheduler after `set_timesteps(**arguments)`; the scheduler itself is left alone.

    DDIM and Euler schedulers give their own steps, others those of the DDIM or Euler scheduler with their config.
    Raises ConfigError for a grid that falls between the network's steps (linspace or Karras spacing).
    """
    own = _first_order(scheduler, kind)
    own.set_timesteps(**arguments)
    if kind == "flow":
        sigmas = torch.as_tensor(own.sigmas, dtype=torch.float32, device="cpu")
        now, then = sigmas[:-1], sigmas[1:]
        return Grid(now, then, 1 - now, now, 1 - then, then)
    return _euler_grid(own) if type(own).__name__ == "EulerDiscreteScheduler" else ddim_grid(own)


def _first_order(scheduler: Any, prediction: str) -> Any:
    import diffusers

    library: Any = diffusers
    if type(scheduler).__name__ in (
        *("DDIMScheduler", "CogVideoXDDIMScheduler", "EulerDiscreteScheduler"),
        *("FlowMatchEulerDiscreteScheduler", "FlowMapEulerDiscreteScheduler"),
    ):
        return type(scheduler).from_config(scheduler.config)
    if prediction == "flow":
        shift = scheduler.config.get("flow_shift") or scheduler.config.get("shift") or 1.0
        return library.FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=shift)
    is_cog = type(scheduler).__name__.startswith("CogVideoX")
    kind = library.CogVideoXDDIMScheduler if is_cog else library.DDIMScheduler
    return kind.from_config(scheduler.config, clip_sample=False)


def ddim_grid(scheduler: Any) -> Grid:
    """The steps of a DDIM scheduler after `set_timesteps`: each ends T // N training steps below its beginning."""
    if scheduler.config.clip_sample or scheduler.config.get("thresholding"):
        raise ConfigError("the scheduler clips samples (clip_sample, thresholding); no latent model is trained so")
    steps = torch.as_tensor(scheduler.timesteps, device="cpu").long()
    count = scheduler.config.num_train_timesteps
    after = steps - count // len(steps)
    return from_steps(scheduler, steps, after)


def from_steps(scheduler: Any, steps_N: Tensor, after_N: Tensor) -> Grid:
    """A VP grid of integer training steps; one below 0 is the end, with the scheduler's final alpha."""
    kept = scheduler.alphas_cumprod.float().cpu()
    now, then = kept[steps_N], torch.where(after_N >= 0, kept[after_N.clamp(min=0)], scheduler.final_alpha_cumprod)
    count = len(kept)
    coefficients = (now.sqrt(), (1 - now).sqrt(), then.sqrt(), (1 - then).sqrt())
    return Grid((steps_N + 1) / count, (after_N + 1).clamp(min=0) / count, *coefficients)


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
