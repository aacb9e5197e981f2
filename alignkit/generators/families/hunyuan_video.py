"""HunyuanVideo: a dual-stream flow transformer with guidance distilled into an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor

from alignkit.adapters.lora_files import Origin
from alignkit.generators.description import Inputs, LatentSize, blank, blank_mask, video_inputs
from alignkit.generators.families.flux import Flux
from alignkit.generators.families.mixins import GUIDANCE, EmbeddedGuidance, flow_schedule
from alignkit.generators.families.video import VideoGenerator
from alignkit.records import Conditioning


class HunyuanVideo(EmbeddedGuidance, VideoGenerator):
    """Adapter of `HunyuanVideoPipeline`; prompts are put into its template. Not supported: true_cfg_scale."""

    prediction = "flow"
    guidance = 6.0
    lora_targets = Flux.lora_targets

    def __init__(self, pipeline: Any, name: str) -> None:
        super().__init__(pipeline, name)
        self._tokens = 256
        self.noise_schedule = flow_schedule(pipeline.scheduler.config, scale=1000.0)

    def text_window(self, tokenizer: Any) -> tuple[str, int]:
        if tokenizer is self.pipeline.tokenizer_2:
            return "", 77
        before, _, _ = DEFAULT_PROMPT_TEMPLATE["template"].partition("{}")
        return before, DEFAULT_PROMPT_TEMPLATE["crop_start"] + self._tokens

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        states, pooled, mask = self.pipeline.encode_prompt(
            prompts, device=self.text_device, max_sequence_length=self._tokens
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask, "pooled_projections": pooled}

    def grid_arguments(self, steps: int, shape: Sequence[int]) -> dict[str, Any]:  # noqa: ARG002
        return {"sigmas": np.linspace(1.0, 0.0, steps + 1)[:-1]}

    def call_network(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        guidance = cond.control(GUIDANCE) * 1000.0 if net.config.guidance_embeds else None
        return net(hidden_states=x_t, timestep=model_time, guidance=guidance, **cond.tensors).sample

    @property
    def spatial_ratio(self) -> int:
        return self.pipeline.vae.config.spatial_compression_ratio

    @property
    def temporal_ratio(self) -> int:
        return self.pipeline.vae.config.temporal_compression_ratio

    # --- description ---

    tokens = 256
    default_size = (720, 1280, 129)
    origin = Origin("HunyuanVideo", "HunyuanVideoTransformer3DModel", "token_refiner")

    @classmethod
    def network_inputs(cls, config: Any, size: LatentSize) -> Inputs:
        return {
            **video_inputs(config, size, (cls.tokens, config.text_embed_dim)),
            "encoder_attention_mask": blank_mask(size.B, cls.tokens),
            "pooled_projections": blank(size.B, config.pooled_projection_dim),
            "guidance": blank(size.B) if config.guidance_embeds else None,
        }

    @classmethod
    def vae_ratios(cls, vae: Mapping[str, Any]) -> tuple[int, int]:
        return super().vae_ratios(vae)[0], int(vae["temporal_compression_ratio"])
