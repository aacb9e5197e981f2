"""Qwen-Image: a flow transformer over 2 x 2 packed latents of a video VAE, each channel with its statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from alignkit.adapters.comfyui import Keys
from alignkit.adapters.lora_files import Origin
from alignkit.generators.decoding import Decoding
from alignkit.generators.description import Inputs, LatentSize, packed_inputs
from alignkit.generators.families.flux import Flux, pack, unpack
from alignkit.generators.families.mixins import ChannelStatistics, flow_schedule, keep_norm, linear_sigmas
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.records import Conditioning, Sampling


class QwenImage(ChannelStatistics, PipelineGenerator):
    """Adapter of `QwenImagePipeline`. Prompts are padded to `tokens` tokens, so that rows of a cache have one shape;
    the network gets as many as the longest prompt of a batch needs, as in the pipeline.

    `Sampling.guidance_scale` is the pipeline's `true_cfg_scale`. Not supported: distilled variants that embed
    guidance.
    """

    component = "transformer"
    prediction = "flow"
    tokens = 512
    lora_targets = Flux.lora_targets

    def __init__(self, pipeline: Any, name: str) -> None:
        super().__init__(pipeline, name)
        self.noise_schedule = flow_schedule(pipeline.scheduler.config)

    def call_arguments(self, prompts: Sequence[str], sampling: Sampling) -> dict[str, Any]:
        arguments = super().call_arguments(prompts, sampling)
        arguments["true_cfg_scale"] = arguments.pop("guidance_scale")
        return {"negative_prompt": [" "] * len(prompts), **arguments}  # without one the pipeline does not guide

    def sampling_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.tokens}

    def text_window(self, tokenizer: Any) -> tuple[str, int]:  # noqa: ARG002 - the template decides
        before, _, _ = self.pipeline.prompt_template_encode.partition("{}")
        return before, self.pipeline.prompt_template_encode_start_idx + self.tokens

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        rows, mask = self.pipeline.encode_prompt(prompts, device=self.text_device, max_sequence_length=self.tokens)
        if mask is None:  # no padding
            mask = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
        empty = self.tokens - rows.shape[1]
        rows, mask = pad(rows, (0, 0, 0, empty)), pad(mask, (0, empty))
        return {"encoder_hidden_states": rows, "encoder_hidden_states_mask": mask}

    def encode_negative(self, text: str) -> dict[str, Tensor]:
        return self.encode_texts([text or " "])

    def grid_arguments(self, steps: int, shape: Sequence[int]) -> dict[str, Any]:
        return linear_sigmas(self.pipeline.scheduler.config, steps, tokens=shape[-1] * shape[-2] // 4)

    def guide(self, cond_pred: Tensor, uncond_pred: Tensor, scale: float) -> Tensor:
        """Guidance that keeps the conditional prediction's norm, token by token, as the pipeline does."""
        guided = pack(super().guide(cond_pred, uncond_pred, scale))
        return unpack(keep_norm(guided, pack(cond_pred)), cond_pred.shape[1:])

    def call_network(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        batch, channels, height, width = x_t.shape
        mask = cond.tensors["encoder_hidden_states_mask"].long()
        longest = int(mask.sum(1).max())
        mask = mask[:, :longest]
        packed = net(
            hidden_states=pack(x_t),
            timestep=model_time,
            encoder_hidden_states=cond.tensors["encoder_hidden_states"][:, :longest],
            encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
        ).sample
        return unpack(packed, (channels, height, width))

    # --- codec ---

    def encode(self, pixels: Tensor) -> Tensor:
        return super().encode(pixels.unsqueeze(2)).squeeze(2)

    def decode(self, latents: Tensor, decoding: Decoding | None = None) -> Tensor:
        return super().decode(latents.unsqueeze(2), decoding).squeeze(2)

    @property
    def spatial_ratio(self) -> int:
        return 2 ** len(self.pipeline.vae.config.temperal_downsample)

    @property
    def latent_channels(self) -> int:
        return self.pipeline.vae.config.z_dim

    # --- description ---

    origin = Origin("Qwen-Image", "QwenImageTransformer2DModel", r"\A(?!.*token_refiner).*(img|txt)_(mlp|mod)")
    comfyui = Keys("diffusion_model.", r"transformer_blocks\..+")

    @classmethod
    def network_inputs(cls, config: Any, size: LatentSize) -> Inputs:
        states = packed_inputs(config, size, (cls.tokens, config.joint_attention_dim))
        return {**states, "img_shapes": [[(1, size.H // 2, size.W // 2)]] * size.B}

    @classmethod
    def vae_ratios(cls, vae: Mapping[str, Any]) -> tuple[int, int]:
        return 2 ** len(vae["temperal_downsample"]), 1
