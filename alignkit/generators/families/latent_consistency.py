"""LCM: Stable Diffusion's U-Net distilled to a few steps, with the guidance scale as an input of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.diffusion.conversions import split
from alignkit.diffusion.solvers import Grid
from alignkit.errors import ConfigError
from alignkit.generators.families.mixins import GUIDANCE, EmbeddedGuidance
from alignkit.generators.families.stable_diffusion import StableDiffusion
from alignkit.generators.grids import training_step_grid
from alignkit.records import Conditioning


class LatentConsistency(EmbeddedGuidance, StableDiffusion):
    """Adapter of `LatentConsistencyModelPipeline`; chains follow its multistep consistency sampling, with fresh noise.

    A preference loss on its eps error trains it as it trains any eps model. No paper reports what that does to few-step
    quality; check validation images.
    """

    guidance = 8.5
    own_steps = True

    def call_network(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        # The pipeline counts guidance from 1, as Imagen does, where the model's paper counts from 0.
        scale = cond.control(GUIDANCE).float().cpu() - 1
        embedding = self.pipeline.get_guidance_scale_embedding(scale, net.config.time_cond_proj_dim)
        return net(x_t, model_time, timestep_cond=embedding.to(x_t), **cond.tensors).sample

    def grid(self, steps: int, shape: Sequence[int]) -> Grid:  # noqa: ARG002 - one grid for all sizes
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(steps)
        steps_N = scheduler.timesteps.long().cpu()
        return training_step_grid(scheduler, steps_N, torch.cat([steps_N[1:], steps_N.new_full((1,), -1)]))

    def step(
        self, grid: Grid, index: int, prediction: Tensor, x_t: Tensor, sources: Sequence[torch.Generator]
    ) -> Tensor:
        """A consistency step (Luo et al. 2023, algorithm 3): the clean latent, then fresh noise except at the end.

        Raises ConfigError without one generator per row.
        """
        alpha, sigma, alpha_next, sigma_next = grid.step(index)
        config = self.pipeline.scheduler.config
        time = (grid.t[index] * config.num_train_timesteps - 1) * config.timestep_scaling
        skip = 0.25 / (time**2 + 0.25)  # c_skip, sigma_data = 0.5
        clean, _ = split(self.prediction, prediction, x_t, alpha, sigma)
        clean = skip * x_t + time / (time**2 + 0.25).sqrt() * clean
        if grid.t_next[index] == 0:
            return clean
        if len(sources) != len(x_t):
            raise ConfigError(f"LCM draws fresh noise in each step: give {len(x_t)} sources, not {len(sources)}")
        noise = torch.cat([self.initial_noise(x_t.shape[1:], source) for source in sources]).to(x_t)
        return alpha_next * clean + sigma_next * noise
