"""FLUX.1: a rectified-flow transformer over 2 x 2 packed latents, with guidance distilled into an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alignkit.adapters.comfyui import JOINT_LAYERS, Keys
from alignkit.adapters.lora_files import Origin
from alignkit.generators.description import Inputs, LatentSize, blank, packed_inputs
from alignkit.generators.families.mixins import GUIDANCE, EmbeddedGuidance, flow_schedule, linear_sigmas
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.records import Conditioning


class Flux(EmbeddedGuidance, PipelineGenerator):
    """Adapter of `FluxPipeline` (dev and schnell). Latents are [B, 16, H/8, W/8]; `call_network` packs them.

    Times are logit-normal without the resolution's shift, which only sampling applies.
    """

    component = "transformer"
    prediction = "flow"
    guidance = 3.5
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    def __init__(self, pipeline: Any, name: str) -> None:
        super().__init__(pipeline, name)
        self.noise_schedule = flow_schedule(pipeline.scheduler.config)
        self._tokens = min(512, pipeline.tokenizer_2.model_max_length)

    @property
    def pixel_multiple(self) -> int:
        return 2 * self.spatial_ratio

    def sampling_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self._tokens}

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeddings, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, device=self.text_device, max_sequence_length=self._tokens
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def grid_arguments(self, steps: int, shape: Sequence[int]) -> dict[str, Any]:
        return linear_sigmas(self.pipeline.scheduler.config, steps, tokens=shape[-1] * shape[-2] // 4)

    def call_network(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        batch, channels, height, width = x_t.shape
        states = cond.tensors["encoder_hidden_states"]
        image_ids = self.pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, x_t.device, x_t.dtype)  # noqa: SLF001
        packed = net(
            hidden_states=pack(x_t),
            timestep=model_time,
            guidance=cond.control(GUIDANCE) if net.config.guidance_embeds else None,
            img_ids=image_ids,
            txt_ids=states.new_zeros(states.shape[1], 3),
            **cond.tensors,
        ).sample
        return unpack(packed, (channels, height, width))

    # --- description ---

    tokens = 512
    origin = Origin("FLUX.1", "FluxTransformer2DModel", r"\A(?!.*token_refiner).*single_(transformer_)?blocks")
    comfyui = Keys(
        "transformer.",
        rf"{JOINT_LAYERS}|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)",
    )

    @classmethod
    def network_inputs(cls, config: Any, size: LatentSize) -> Inputs:
        return {
            **packed_inputs(config, size, (cls.tokens, config.joint_attention_dim)),
            "pooled_projections": blank(size.B, config.pooled_projection_dim),
            "guidance": blank(size.B) if config.guidance_embeds else None,
            "img_ids": blank(size.H // 2 * (size.W // 2), 3),
            "txt_ids": blank(cls.tokens, 3),
        }


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> tokens [B, H/2 W/2, 4 C], each a 2 x 2 square, channel first."""
    squares = latents.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))  # [B, C, h, 2, w, 2]
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `pack` for latents of `shape` (C, H, W)."""
    channels, height, width = shape
    squares = tokens.unflatten(1, (height // 2, width // 2)).unflatten(-1, (channels, 2, 2))
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
