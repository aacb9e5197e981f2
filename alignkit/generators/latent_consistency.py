"""LCM: Stable Diffusion's U-Net distilled to a few steps, with the guidance scale as an input of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from alignkit.generators.stable_diffusion import StableDiffusion
from alignkit.records import Conditioning


class LatentConsistency(StableDiffusion):
    """Adapter of `LatentConsistencyModelPipeline`; trained with the guidance that it samples with by default.

    A preference loss on its eps error moves it as it moves any eps model; whether few-step quality survives is not
    promised by any source: watch validation pictures.
    """

    guidance = 8.5

    def call(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        # The pipeline counts guidance from 1, as Imagen does, where the model's paper counts from 0.
        scale = x_t.new_full((len(x_t),), self.guidance - 1)
        told = self.pipeline.get_guidance_scale_embedding(scale.cpu(), net.config.time_cond_proj_dim)
        states = cond.tensors["encoder_hidden_states"]
        return net(x_t, model_time, timestep_cond=told.to(x_t), encoder_hidden_states=states).sample
