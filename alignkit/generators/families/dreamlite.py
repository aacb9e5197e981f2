"""DreamLite: SnapGen's small U-Net with a flow objective. Beside the latent it takes a second one, empty for text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from alignkit.adapters.lora_files import Origin
from alignkit.generators.description import Inputs, LatentSize, blank, blank_mask, image_inputs
from alignkit.generators.families.mixins import flow_schedule, linear_sigmas
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.generators.switching import sample
from alignkit.records import Conditioning


class DreamLite(PipelineGenerator):
    """Adapter of `DreamLitePipeline`, text to image; the pipeline takes one prompt per call.

    Prompts are padded to `tokens` tokens, so that rows of a cache have one shape; the network gets as many as the
    longest prompt of a batch needs. Not supported: editing (and with it the multimodal processor), the mobile version's
    own pipeline.
    """

    component = "unet"
    unused_parts = ("processor",)  # for editing; it needs torchvision
    prediction = "flow"
    tokens = 200

    def __init__(self, pipeline: Any, name: str) -> None:
        super().__init__(pipeline, name)
        self.noise_schedule = flow_schedule(pipeline.scheduler.config, scale=1000.0)

    def sampling_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.tokens}

    def text_window(self, tokenizer: Any) -> tuple[str, int]:  # noqa: ARG002 - the template decides
        before, _, _ = self.pipeline.prompt_template_encode_generate.partition("{}")
        return f"{before}[Generate]: ", self.pipeline.prompt_template_encode_generate_start_idx + self.tokens

    def _run_pipeline(self, prompts: list[str], sources: list[torch.Generator], arguments: dict[str, Any]) -> Tensor:
        negatives = arguments.pop("negative_prompt", [None] * len(prompts))
        images = [
            sample(self.pipeline, self.conditioner, text, [source], {"negative_prompt": negative, **arguments})[0]
            for text, source, negative in zip(prompts, sources, negatives, strict=True)
        ]
        return torch.cat(images)

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        return self._encode([f"[Generate]: {prompt}" for prompt in prompts])

    def encode_negative(self, text: str) -> dict[str, Tensor]:
        return self._encode([text])  # as in the pipeline, without the task's name

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        encoder = self.pipeline.text_encoder
        rows, mask = self.pipeline.encode_prompt(
            "generate", texts, self.text_device, encoder.dtype, max_sequence_length=self.tokens
        )
        empty = self.tokens - rows.shape[1]
        return {"encoder_hidden_states": pad(rows, (0, 0, 0, empty)), "encoder_attention_mask": pad(mask, (0, empty))}

    def grid_arguments(self, steps: int, shape: Sequence[int]) -> dict[str, Any]:
        config = {"max_shift": 1.16, **self.pipeline.scheduler.config}
        return linear_sigmas(config, steps, tokens=shape[-1] * shape[-2] // 4)

    def call_network(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        mask = cond.tensors["encoder_attention_mask"].long()
        longest = int(mask.sum(1).max())
        height, width = (side * self.spatial_ratio for side in x_t.shape[-2:])
        output = net(
            torch.cat([x_t, torch.zeros_like(x_t)], dim=3),
            timestep=model_time.to(x_t),
            encoder_hidden_states=cond.tensors["encoder_hidden_states"][:, :longest],
            encoder_attention_mask=mask[:, :longest],
            added_cond_kwargs={"time_ids": x_t.new_tensor([width, height]).expand(len(x_t), 2)},
        ).sample
        return output[..., : x_t.shape[-1]]

    def _posterior_mode(self, vae: Any, pixels: Tensor) -> Tensor:
        return vae.encode(pixels).latents

    @property
    def spatial_ratio(self) -> int:
        return 2 ** (len(self.pipeline.vae.config.encoder_block_out_channels) - 1)

    # --- description ---

    origin = Origin("DreamLite", "DreamLiteUNetModel")

    @classmethod
    def network_inputs(cls, config: Any, size: LatentSize) -> Inputs:
        """The latent with an empty image beside it, and the image's width and height."""
        width = config.encoder_hid_dim or config.cross_attention_dim
        doubled = LatentSize(size.B, size.T, size.H, 2 * size.W)
        return {
            **image_inputs(config, doubled, (cls.tokens, width), "sample"),
            "encoder_attention_mask": blank_mask(size.B, cls.tokens),
            "added_cond_kwargs": {"time_ids": blank(size.B, 2)},
        }

    @classmethod
    def vae_ratios(cls, vae: Mapping[str, Any]) -> tuple[int, int]:
        return super().vae_ratios({"block_out_channels": vae.get("encoder_block_out_channels")})
