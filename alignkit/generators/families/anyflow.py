"""AnyFlow on Wan: a flow map, whose network is told two times and predicts the mean velocity between them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from alignkit.adapters.lora_files import Origin
from alignkit.generators.description import Inputs, LatentSize, blank, video_inputs
from alignkit.generators.families.wan import WanVideo
from alignkit.records import Conditioning

TARGET_TIME = "target_time"  # among the conditioning's tensors, [B], canonical


class AnyFlow(WanVideo):
    """Adapter of `AnyFlowPipeline` (bidirectional), x_s = x_t + (s - t) U(x_t, t, s); latents [B, T, C, H, W] inside.

    Trained at s = t, where U is the velocity of plain flow matching; chains tell the step's end. What happens to
    few-step quality when the diagonal alone is trained no source tells: watch validation clips. Left out: the causal
    FAR version.
    """

    def guided(
        self, model: nn.Module, x_t: Tensor, times: tuple[Tensor, Tensor], cond: Conditioning, scale: float
    ) -> Tensor:
        end = times[1]
        told = Conditioning({**cond.tensors, TARGET_TIME: end}, {**cond.null, TARGET_TIME: end[:1]})
        return super().guided(model, x_t, times, told, scale)

    def call(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        tensors = dict(cond.tensors)
        end = tensors.pop(TARGET_TIME, None)
        end = model_time if end is None else self.noise_schedule.model_time(end.float())
        frames = x_t.shape[2]
        start, end = (time[:, None].expand(-1, frames) for time in (model_time, end))
        told = replace(cond, tensors=tensors).tensors
        return net(hidden_states=x_t.transpose(1, 2), timestep=start, r_timestep=end, **told).sample.transpose(1, 2)

    # --- description ---

    origin = Origin("AnyFlow", "AnyFlowTransformer3DModel")

    @classmethod
    def network_inputs(cls, config: Any, size: LatentSize) -> Inputs:
        return {
            **video_inputs(config, size, (cls.tokens, config.text_dim), frames_first=True),
            "timestep": blank(size.B, size.T),
            "r_timestep": blank(size.B, size.T),
        }
