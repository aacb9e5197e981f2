"""Lumina-Image 2.0: a flow transformer whose time and velocity run the other way: 0 is noise, 1 the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alignkit.generators.base import PipelineGenerator, flow_schedule
from alignkit.records import Conditioning


class Lumina2(PipelineGenerator):
    """Adapter of `Lumina2Pipeline`. Prompts carry the pipeline's system prompt, the null prompt does not, as there.

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

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        names = ("encoder_hidden_states", "encoder_attention_mask")
        rows, mask, *_ = self._texts(list(prompts))
        *_, null, null_mask = self._texts([""])
        return Conditioning(
            dict(zip(names, (rows, mask), strict=True)), dict(zip(names, (null, null_mask), strict=True))
        )

    def _texts(self, texts: list[str]) -> tuple[Tensor, ...]:
        """Embeddings and mask of `texts`, then those of the empty negative prompt."""
        return self.pipeline.encode_prompt(texts, device=self.device, max_sequence_length=self._tokens)

    def call(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        velocity = net(
            hidden_states=x_t,
            timestep=1 - model_time,
            encoder_hidden_states=cond.tensors["encoder_hidden_states"],
            encoder_attention_mask=cond.tensors["encoder_attention_mask"].long(),  # it counts tokens with it
        ).sample
        return -velocity
