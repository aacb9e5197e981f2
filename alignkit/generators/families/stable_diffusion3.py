"""SD3 / SD3.5: a joint-attention transformer that predicts the rectified-flow velocity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from alignkit.adapters.comfyui import JOINT_LAYERS, Keys
from alignkit.adapters.lora_files import Origin
from alignkit.diffusion.schedules import FlowSchedule
from alignkit.generators.description import Inputs, LatentSize, blank, image_inputs
from alignkit.generators.families.mixins import resolution_shift
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.records import Conditioning


class StableDiffusion3(PipelineGenerator):
    """Adapter of `StableDiffusion3Pipeline`; LoRA goes on both streams of every joint block.

    Without T5 (`text_encoder_3`) the pipeline puts zeros in place of its states, and so does training.
    """

    component = "transformer"
    optional_parts = ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor")
    prediction = "flow"
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    def __init__(self, pipeline: Any, name: str) -> None:
        super().__init__(pipeline, name)
        self.noise_schedule = FlowSchedule(pipeline.scheduler.config.shift)
        # The pipeline pads T5 to 256 tokens by default; a tokenizer may have a lower limit.
        tokenizer = pipeline.tokenizer_3
        self._tokens = 256 if tokenizer is None else min(256, tokenizer.model_max_length)

    def sampling_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self._tokens}

    def text_window(self, tokenizer: Any) -> tuple[str, int]:
        if tokenizer is not self.pipeline.tokenizer_3:  # `max_sequence_length` is of T5 alone
            return "", tokenizer.model_max_length
        return super().text_window(tokenizer)

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            do_classifier_free_guidance=False,
            device=self.text_device,
            max_sequence_length=self._tokens,
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def grid_arguments(self, steps: int, shape: Sequence[int]) -> dict[str, Any]:
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return {"num_inference_steps": steps}
        tokens = shape[-1] * shape[-2] // self.net.config.patch_size**2
        return {"num_inference_steps": steps, "mu": resolution_shift(config, tokens)}

    def call_network(self, net: nn.Module, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        return net(hidden_states=x_t, timestep=model_time, **cond.tensors).sample

    # --- description ---

    tokens = 77 + 256  # CLIP's and T5's
    origin = Origin("Stable Diffusion 3", "SD3Transformer2DModel", "joint_blocks")
    comfyui = Keys("transformer.", JOINT_LAYERS)

    @classmethod
    def network_inputs(cls, config: Any, size: LatentSize) -> Inputs:
        states = image_inputs(config, size, (cls.tokens, config.joint_attention_dim))
        return {**states, "pooled_projections": blank(size.B, config.pooled_projection_dim)}
