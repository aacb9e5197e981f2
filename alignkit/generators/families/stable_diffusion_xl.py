"""SDXL: two CLIP text encoders, a pooled text vector, and the image's size as six numbers beside the time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignkit.generators.families.stable_diffusion import StableDiffusion
from alignkit.records import Conditioning


class StableDiffusionXL(StableDiffusion):
    """Adapter of `StableDiffusionXLPipeline`. The size embedding is that of an uncropped image of its own size.

    Not supported: other original sizes and crops (micro-conditioning), and the refiner's aesthetic score.
    """

    unused_parts = ()

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.text_device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeddings, "text_embeds": pooled}

    def encode_negative(self, text: str) -> dict[str, Tensor]:
        tensors = self.encode_texts([text])
        if text or not self.pipeline.config.force_zeros_for_empty_prompt:
            return tensors
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}  # as the pipeline does

    def call_network(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        height, width = (side * self.spatial_ratio for side in x_t.shape[-2:])
        size = x_t.new_tensor([height, width, 0, 0, height, width]).expand(len(x_t), 6)
        added = {"text_embeds": cond.tensors["text_embeds"], "time_ids": size}
        states = cond.tensors["encoder_hidden_states"]
        return net(x_t, model_time, encoder_hidden_states=states, added_cond_kwargs=added).sample
