"""AnyFlow on Wan: a flow map. Its network takes two times and predicts the mean velocity between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from alignkit.adapters.lora_files import Origin
from alignkit.generators.codec import at_least_float32
from alignkit.generators.description import Inputs, LatentSize, blank, video_inputs
from alignkit.generators.families.wan import WanVideo
from alignkit.generators.pipeline import Predictor
from alignkit.records import Conditioning

TARGET_TIME = "target_time"  # a control of the conditioning, [B], canonical


class AnyFlow(WanVideo):
    """Adapter of `AnyFlowPipeline` (bidirectional), x_s = x_t + (s - t) U(x_t, t, s); latents [B, T, C, H, W] inside.

    Only s = t is trained, where U is the velocity of plain flow matching; a chain passes the end of its step. No paper
    reports what that does to few-step quality; check validation videos. Not supported: the causal FAR version.
    """

    own_steps = True

    def guided(
        self,
        model: Predictor,
        x_t: Tensor,
        times: tuple[Tensor, Tensor],
        cond: Conditioning,
        scale: float,
        **options: bool,
    ) -> Tensor:
        """The guided mean velocity between the two times."""
        cond = cond.with_controls({TARGET_TIME: times[1]})
        return super().guided(model, x_t, times, cond, scale, **options)

    def training_controls(self, t: Tensor) -> Mapping[str, Tensor]:
        """The target time of training, s = t."""
        return {TARGET_TIME: t}

    def call_network(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        end = self.noise_schedule.model_time(at_least_float32(cond.control(TARGET_TIME)))
        frames = x_t.shape[2]
        start, end = (time[:, None].expand(-1, frames) for time in (model_time, end))
        velocity = net(hidden_states=x_t.transpose(1, 2), timestep=start, r_timestep=end, **cond.tensors).sample
        return velocity.transpose(1, 2)

    # --- description ---

    origin = Origin("AnyFlow", "AnyFlowTransformer3DModel")

    @classmethod
    def network_inputs(cls, config: Any, size: LatentSize) -> Inputs:
        return {
            **video_inputs(config, size, (cls.tokens, config.text_dim), frames_first=True),
            "timestep": blank(size.B, size.T),
            "r_timestep": blank(size.B, size.T),
        }
