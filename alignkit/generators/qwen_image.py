"""Qwen-Image: a flow transformer over 2 x 2 packed latents of a video VAE, each channel with its statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.generators.base import PipelineGenerator, flow_schedule
from alignkit.generators.flux import Flux, pack, unpack
from alignkit.records import Conditioning, Sampling


class QwenImage(PipelineGenerator):
    """Adapter of `QwenImagePipeline`. Prompts are kept at `tokens` places, so that rows of a cache have one shape; the
    network sees as many as the longest of a batch needs, as in the pipeline.

    `Sampling.guidance_scale` is the pipeline's `true_cfg_scale`. Left out: a distilled variant that embeds guidance.
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
        return {"negative_prompt": [" "] * len(prompts), **arguments}  # without one the pipeline guides nothing

    def sampling_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.tokens}

    def text_window(self, tokenizer: Any) -> tuple[str, int]:  # noqa: ARG002 - the template decides
        before, _, _ = self.pipeline.prompt_template_encode.partition("{}")
        return before, self.pipeline.prompt_template_encode_start_idx + self.tokens

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(self._texts(list(prompts)), self._texts([" "]))

    def _texts(self, texts: list[str]) -> dict[str, Tensor]:
        rows, mask = self.pipeline.encode_prompt(texts, device=self.device, max_sequence_length=self.tokens)
        if mask is None:  # all places are in use
            mask = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
        empty = self.tokens - rows.shape[1]
        rows, mask = torch.nn.functional.pad(rows, (0, 0, 0, empty)), torch.nn.functional.pad(mask, (0, empty))
        return {"encoder_hidden_states": rows, "encoder_hidden_states_mask": mask}

    def call(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
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
        raw = self._in_range(self._posterior_mode, (pixels * 2 - 1).unsqueeze(2)).squeeze(2)
        mean, std = self._statistics(raw)
        return ((raw - mean) / std).float()

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = self._statistics(latents)
        pixels = self._in_range(lambda raw: vae.decode(raw).sample, (latents * std + mean).unsqueeze(2)).squeeze(2)
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel [C, 1, 1]."""
        config = self.pipeline.vae.config
        mean, std = (like.new_tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
        return mean, std

    @property
    def spatial_ratio(self) -> int:
        return 2 ** len(self.pipeline.vae.config.temperal_downsample)

    @property
    def latent_channels(self) -> int:
        return self.pipeline.vae.config.z_dim
