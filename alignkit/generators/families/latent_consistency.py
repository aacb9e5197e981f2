"""LCM: Stable Diffusion's U-Net distilled to a few steps, with the guidance scale as an input of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.diffusion import solvers
from alignkit.diffusion.conversions import split
from alignkit.generators.families.mixins import EmbeddedGuidance
from alignkit.generators.families.stable_diffusion import StableDiffusion
from alignkit.records import Conditioning


class LatentConsistency(EmbeddedGuidance, StableDiffusion):
    """Adapter of `LatentConsistencyModelPipeline`; chains are its own multistep consistency sampling, noise and all.

    A preference loss on its eps error moves it as it moves any eps model; whether few-step quality survives is not
    promised by any source: watch validation pictures.
    """

    guidance = 8.5

    def call(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        scale, tensors = self.told_guidance(x_t, cond)
        # The pipeline counts guidance from 1, as Imagen does, where the model's paper counts from 0.
        told = self.pipeline.get_guidance_scale_embedding(scale.float().cpu() - 1, net.config.time_cond_proj_dim)
        return net(x_t, model_time, timestep_cond=told.to(x_t), **tensors).sample

    def grid(self, steps: int, shape: Sequence[int]) -> solvers.Grid:  # noqa: ARG002 - one grid for all sizes
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(steps)
        begins = scheduler.timesteps.long().cpu()
        return solvers.from_steps(scheduler, begins, torch.cat([begins[1:], begins.new_full((1,), -1)]))

    def advance(
        self, grid: solvers.Grid, index: int, prediction: Tensor, x_t: Tensor, sources: Sequence[torch.Generator]
    ) -> Tensor:
        """A consistency step (Luo et al. 2023, algorithm 3): the clean latent, then fresh noise but for the last."""
        alpha, sigma, alpha_next, sigma_next = grid.step(index)
        config = self.pipeline.scheduler.config
        time = (grid.t[index] * config.num_train_timesteps - 1) * config.timestep_scaling
        kept = 0.25 / (time**2 + 0.25)  # c_skip, sigma_data = 0.5
        clean, _ = split(self.prediction, prediction, x_t, alpha, sigma)
        clean = kept * x_t + time / (time**2 + 0.25).sqrt() * clean
        if index == len(grid) - 1:
            return clean
        noise = torch.cat([self.initial_noise(x_t.shape[1:], source) for source in sources]).to(x_t)
        return alpha_next * clean + sigma_next * noise
