"""Lumina-Image 2.0: a flow transformer with reversed time and velocity: 0 is noise, 1 the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alignkit.generators.families.mixins import flow_schedule, keep_norm, linear_sigmas
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.records import Conditioning


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
