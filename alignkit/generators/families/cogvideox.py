"""CogVideoX: a v-prediction transformer with zero terminal signal, on latents [B, T, C, H, W]."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.adapters.lora_files import Origin
from alignkit.diffusion.schedules import VPSchedule
from alignkit.generators.description import Inputs, LatentSize, video_inputs
from alignkit.generators.families.video import VideoGenerator
from alignkit.records import Conditioning


class CogVideoX(VideoGenerator):
    """Adapter of `CogVideoXPipeline` (2B, 5B and 1.5). The schedule is the scheduler's own: its signal-to-noise ratio
    is shifted and ends at zero.

    1.5 takes latent frames in pairs. An odd number is padded with a copy of the first frame, and the prediction is
    returned without it. The pipeline samples the padding too, so chains of such videos differ from the pipeline's.
    """

    def __init__(self, pipeline: Any, name: str) -> None:
        super().__init__(pipeline, name)
        self.prediction = pipeline.scheduler.config.prediction_type
        self.noise_schedule = VPSchedule(pipeline.scheduler.alphas_cumprod.float())
        self._tokens = min(226, pipeline.tokenizer.model_max_length)

    def initial_noise(self, shape: Sequence[int], source: torch.Generator) -> Tensor:
        channels, frames, *sides = shape
        return super().initial_noise((frames, channels, *sides), source).transpose(1, 2)

    def call_network(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        padding = -x_t.shape[2] % (net.config.patch_size_t or 1)
        frames = torch.cat([x_t[:, :, :1]] * padding + [x_t], dim=2).transpose(1, 2)
        rotary = None
        if net.config.use_rotary_positional_embeddings:
            height, width = (side * self.spatial_ratio for side in x_t.shape[-2:])
            rotary = self.pipeline._prepare_rotary_positional_embeddings(height, width, frames.shape[1], x_t.device)  # noqa: SLF001
        output = net(hidden_states=frames, timestep=model_time, image_rotary_emb=rotary, **cond.tensors).sample
        return output[:, padding:].transpose(1, 2)

    @property
    def temporal_ratio(self) -> int:
        return int(self.pipeline.vae.config.temporal_compression_ratio)

    def latent_prefix(self, needed: int, count: int) -> int:
        """The VAE decodes latent frames in groups, the rest of the division in the first; each is normalised alone."""
        size = self.pipeline.vae.num_latent_frames_batch_size
        rest = count % size
        return min(count, max(1, math.ceil((needed - rest) / size)) * size + rest)

    # --- description ---

    tokens = 226
    default_size = (480, 720, 49)
    latent_group = 2  # `num_latent_frames_batch_size` of the VAE
    origin = Origin(
        "CogVideoX", "CogVideoXTransformer3DModel", r"\A(?!.*(attn2|add_q_proj)).*transformer_blocks\.\d+\.attn1"
    )

    @classmethod
    def network_inputs(cls, config: Any, size: LatentSize) -> Inputs:
        return video_inputs(config, size, (cls.tokens, config.text_embed_dim), frames_first=True)

    @classmethod
    def vae_ratios(cls, vae: Mapping[str, Any]) -> tuple[int, int]:
        return super().vae_ratios(vae)[0], int(vae["temporal_compression_ratio"])
