"""LTX-Video: a flow transformer over packed latents of a VAE with 8 x 32 x 32 pixels per latent position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from alignkit.adapters.lora_files import Origin
from alignkit.generators.description import Inputs, LatentSize, blank, blank_mask
from alignkit.generators.families.mixins import ChannelStatistics, flow_schedule, linear_sigmas
from alignkit.generators.families.video import VideoGenerator
from alignkit.records import Conditioning


class LTXVideo(ChannelStatistics, VideoGenerator):
    """Adapter of `LTXPipeline`. Latents are [B, C, T, H, W]; `call_network` packs them.

    A decoder that takes a time gets 0, the pipeline's default. Positions are those of `frame_rate` frames per second,
    the pipeline's default. Not supported: guidance_rescale.
    """

    prediction = "flow"
    frame_rate = 25

    def __init__(self, pipeline: Any, name: str) -> None:
        super().__init__(pipeline, name)
        self.noise_schedule = flow_schedule(pipeline.scheduler.config, scale=1000.0)
        self._tokens = min(128, pipeline.tokenizer.model_max_length)

    def sampling_arguments(self) -> dict[str, Any]:
        return {**super().sampling_arguments(), "frame_rate": self.frame_rate}

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        states, mask, *_ = self.encoded(prompts)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def grid_arguments(self, steps: int, shape: Sequence[int]) -> dict[str, Any]:
        _, frames, height, width = shape
        return linear_sigmas(self.pipeline.scheduler.config, steps, tokens=frames * height * width)

    def call_network(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        frames, height, width = x_t.shape[2:]
        patches = (net.config.patch_size, net.config.patch_size_t)
        packed = net(
            hidden_states=self.pipeline._pack_latents(x_t, *patches),  # noqa: SLF001
            timestep=model_time,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self.temporal_ratio / self.frame_rate, self.spatial_ratio, self.spatial_ratio),
            **cond.tensors,
        ).sample
        return self.pipeline._unpack_latents(packed, frames, height, width, *patches)  # noqa: SLF001

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipeline.vae
        mean, std = (values.to(like)[:, None, None, None] for values in (vae.latents_mean, vae.latents_std))
        return mean, std / vae.config.scaling_factor

    def _decode(self, vae: Any, raw: Tensor) -> Tensor:
        time = raw.new_zeros(len(raw)) if vae.config.timestep_conditioning else None
        return vae.decode(raw, time).sample

    @property
    def spatial_ratio(self) -> int:
        return self.pipeline.vae.spatial_compression_ratio

    @property
    def temporal_ratio(self) -> int:
        return self.pipeline.vae.temporal_compression_ratio

    # --- description ---

    tokens = 128
    default_size = (512, 704, 161)
    origin = Origin("LTX-Video", "LTXVideoTransformer3DModel")

    @classmethod
    def network_inputs(cls, config: Any, size: LatentSize) -> Inputs:
        return {
            "hidden_states": blank(size.B, size.T * size.H * size.W, config.in_channels),
            "timestep": blank(size.B),
            "encoder_hidden_states": blank(size.B, cls.tokens, config.caption_channels),
            "encoder_attention_mask": blank_mask(size.B, cls.tokens),
            "num_frames": size.T,
            "height": size.H,
            "width": size.W,
        }

    @classmethod
    def vae_ratios(cls, vae: Mapping[str, Any]) -> tuple[int, int]:
        """Blocks of newer VAEs halve one axis alone; their configs say the ratios."""
        halved = 2 ** sum(vae["spatio_temporal_scaling"])
        sides = vae.get("spatial_compression_ratio") or vae["patch_size"] * halved
        frames = vae.get("temporal_compression_ratio") or vae.get("patch_size_t", 1) * halved
        return int(sides), int(frames)
