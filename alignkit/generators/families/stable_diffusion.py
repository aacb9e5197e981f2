"""SD 1.x / 2.x: a U-Net with eps or v prediction on a discrete VP schedule."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from alignkit.diffusion.schedules import VPSchedule
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.records import Conditioning


class StableDiffusion(PipelineGenerator):
    """Adapter of `StableDiffusionPipeline`; the prediction type comes from the scheduler's config."""

    component = "unet"

    def __init__(self, pipeline: Any, name: str) -> None:
        super().__init__(pipeline, name)
        self.prediction = pipeline.scheduler.config.prediction_type
        self.noise_schedule = VPSchedule(pipeline.scheduler.alphas_cumprod)

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeddings, _ = self.pipeline.encode_prompt(prompts, self.text_device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeddings}

    def call_network(self, net: nn.Module, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        return net(x_t, model_time, encoder_hidden_states=cond.tensors["encoder_hidden_states"]).sample
