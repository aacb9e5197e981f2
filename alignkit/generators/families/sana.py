"""SANA: a linear-attention flow transformer on latents of DC-AE, a deterministic autoencoder with spatial ratio 32."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from alignkit.adapters.lora_files import Origin
from alignkit.generators.description import Inputs, LatentSize, blank_mask, image_inputs
from alignkit.generators.families.mixins import flow_schedule
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.records import Conditioning


class Sana(PipelineGenerator):
    """Adapter of `SanaPipeline`. Prompts carry the pipeline's own instruction to Gemma, in training as in sampling.

    Images have the requested size: the pipeline's resolution binning is off.
    """

    component = "transformer"
    prediction = "flow"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipeline: Any, name: str) -> None:
        super().__init__(pipeline, name)
        self.noise_schedule = flow_schedule(pipeline.scheduler.config, scale=1000.0)
        self._tokens = min(300, pipeline.tokenizer.model_max_length)
        arguments = inspect.signature(type(pipeline).__call__).parameters
        self._instruction = arguments["complex_human_instruction"].default

    def sampling_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self._tokens, "use_resolution_binning": False}

    def text_window(self, tokenizer: Any) -> tuple[str, int]:
        before = "\n".join(self._instruction)
        return before, len(tokenizer(before, verbose=False).input_ids) + self._tokens - 2  # as the pipeline has it

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        return self._encode(prompts, self._instruction)

    def encode_negative(self, text: str) -> dict[str, Tensor]:
        return self._encode([text], None)  # as in the pipeline, without the instruction

    def _encode(self, prompts: list[str], instruction: list[str] | None) -> dict[str, Tensor]:
        embeddings, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.text_device,
            max_sequence_length=self._tokens,
            complex_human_instruction=instruction,
        )
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def call_network(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        return net(x_t, timestep=model_time * net.config.timestep_scale, **cond.tensors).sample

    def _posterior_mode(self, vae: Any, pixels: Tensor) -> Tensor:
        return vae.encode(pixels).latent

    @property
    def spatial_ratio(self) -> int:
        return 2 ** (len(self.pipeline.vae.config.encoder_block_out_channels) - 1)

    # --- description ---

    tokens = 300
    origin = Origin("SANA", "SanaTransformer2DModel")  # ComfyUI does not run it

    @classmethod
    def network_inputs(cls, config: Any, size: LatentSize) -> Inputs:
        states = image_inputs(config, size, (cls.tokens, config.caption_channels))
        return {**states, "encoder_attention_mask": blank_mask(size.B, cls.tokens)}

    @classmethod
    def vae_ratios(cls, vae: Mapping[str, Any]) -> tuple[int, int]:
        return super().vae_ratios({"block_out_channels": vae.get("encoder_block_out_channels")})
