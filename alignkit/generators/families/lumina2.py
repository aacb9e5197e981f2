"""Lumina-Image 2.0: a flow transformer with reversed time and velocity: 0 is noise, 1 the image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from alignkit.adapters.comfyui import ATTENTION, Keys, Layers, fused, renamed
from alignkit.adapters.lora_files import Origin
from alignkit.generators.description import Inputs, LatentSize, blank_mask, image_inputs
from alignkit.generators.families.mixins import flow_schedule, keep_norm, linear_sigmas
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.records import Conditioning


def _comfyui_layers(layers: Layers, net: nn.Module) -> Layers:
    """Lumina's own names; its three projections of attention are one there."""
    new = {"attn": "attention", "to_out.0": "out", "norm1.linear": "adaLN_modulation.1"}
    new |= {f"feed_forward.linear_{number}": f"feed_forward.w{number}" for number in (1, 2, 3)}
    parts = re.compile(r"(.*\.attn)\.to_[qkv]")
    stems = {match[1]: None for path in layers if (match := parts.fullmatch(path))}
    qkv = {f"{stem}.qkv": fused(layers, [f"{stem}.to_{name}" for name in "qkv"], net) for stem in stems}
    others = {path: layer for path, layer in layers.items() if not parts.fullmatch(path)}
    return renamed({**qkv, **others}, new)


class Lumina2(PipelineGenerator):
    """Adapter of `Lumina2Pipeline`. Prompts carry the pipeline's system prompt; the null prompt does not, as in the
    pipeline.

    Times are logit-normal without the resolution's shift, which only sampling applies.
    """

    component = "transformer"
    prediction = "flow"

    def __init__(self, pipeline: Any, name: str) -> None:
        super().__init__(pipeline, name)
        self.noise_schedule = flow_schedule(pipeline.scheduler.config)
        self._tokens = min(256, pipeline.tokenizer.model_max_length)

    def sampling_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self._tokens}

    def text_window(self, tokenizer: Any) -> tuple[str, int]:
        return f"{self.pipeline.system_prompt} <Prompt Start> ", super().text_window(tokenizer)[1]

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        rows, mask, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.text_device, max_sequence_length=self._tokens
        )
        return {"encoder_hidden_states": rows, "encoder_attention_mask": mask}

    def encode_negative(self, text: str) -> dict[str, Tensor]:
        *_, rows, mask = self.pipeline.encode_prompt(
            [""], negative_prompt=[text], device=self.text_device, max_sequence_length=self._tokens
        )
        return {"encoder_hidden_states": rows, "encoder_attention_mask": mask}

    def grid_arguments(self, steps: int, shape: Sequence[int]) -> dict[str, Any]:
        # The pipeline passes the number of channels as the number of tokens; the chain repeats that.
        return linear_sigmas(self.pipeline.scheduler.config, steps, tokens=shape[0])

    def guide(self, cond_pred: Tensor, uncond_pred: Tensor, scale: float) -> Tensor:
        """Guidance that keeps the conditional prediction's norm along each latent row, as the pipeline does."""
        return keep_norm(super().guide(cond_pred, uncond_pred, scale), cond_pred)

    def call_network(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        velocity = net(
            hidden_states=x_t,
            timestep=1 - model_time,
            encoder_hidden_states=cond.tensors["encoder_hidden_states"],
            encoder_attention_mask=cond.tensors["encoder_attention_mask"].long(),  # it counts tokens with it
        ).sample
        return -velocity

    # --- description ---

    tokens = 256
    origin = Origin("Lumina-Image 2.0", "Lumina2Transformer2DModel", r"\A(?!.*attention\.to_).*(noise|context)_refiner")
    comfyui = Keys(
        "diffusion_model.",
        rf"(layers|noise_refiner|context_refiner)\.\d+\.(attn\.({ATTENTION})|feed_forward\.linear_[123]|norm1\.linear)",
        rename=_comfyui_layers,
    )

    @classmethod
    def network_inputs(cls, config: Any, size: LatentSize) -> Inputs:
        states = image_inputs(config, size, (cls.tokens, config.cap_feat_dim))
        return {**states, "encoder_attention_mask": blank_mask(size.B, cls.tokens)}
