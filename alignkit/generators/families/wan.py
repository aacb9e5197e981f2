"""Wan 2.1 and 2.2: a flow transformer on the latents of a causal video VAE, normalised per channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.adapters.comfyui import ATTENTION, FEED_FORWARD, Keys, Layers, renamed
from alignkit.adapters.lora_files import Origin
from alignkit.errors import ConfigError
from alignkit.generators.description import Inputs, LatentSize, video_inputs
from alignkit.generators.families.mixins import ChannelStatistics, flow_schedule
from alignkit.generators.families.video import VideoGenerator
from alignkit.records import Conditioning


def _comfyui_layers(layers: Layers, _: nn.Module) -> Layers:
    """Wan's own names."""
    new = {"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
    return renamed(layers, {**new, "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"})


class WanVideo(ChannelStatistics, VideoGenerator):
    """Base of `Wan` and `AnyFlow`: UMT5 states, padded with zeros, and Wan's VAE."""

    prediction = "flow"

    def __init__(self, pipeline: Any, name: str) -> None:
        super().__init__(pipeline, name)
        self.noise_schedule = flow_schedule(pipeline.scheduler.config, scale=1000.0)
        self._tokens = min(512, pipeline.tokenizer.model_max_length)

    @property
    def spatial_ratio(self) -> int:
        return self.pipeline.vae.config.scale_factor_spatial

    @property
    def temporal_ratio(self) -> int:
        return self.pipeline.vae.config.scale_factor_temporal

    @property
    def latent_channels(self) -> int:
        return self.pipeline.vae.config.z_dim

    def latent_prefix(self, needed: int, count: int) -> int:  # noqa: ARG002 - one latent frame after the other
        return needed

    # --- description ---

    tokens = 512
    default_size = (480, 832, 81)

    @classmethod
    def network_inputs(cls, config: Any, size: LatentSize) -> Inputs:
        return video_inputs(config, size, (cls.tokens, config.text_dim))

    @classmethod
    def vae_ratios(cls, vae: Mapping[str, Any]) -> tuple[int, int]:
        """Configs of Wan's first VAE do not hold the ratios that follow from its downsamplings."""
        halved = vae.get("temperal_downsample") or (False, True, True)
        sides, frames = vae.get("scale_factor_spatial"), vae.get("scale_factor_temporal")
        return int(sides or 2 ** len(halved)), int(frames or 2 ** sum(halved))


class Wan(WanVideo):
    """Adapter of `WanPipeline`: 2.1, 2.2 TI2V-5B (a time for each token) and 2.2 A14B (two experts).

    Of two experts one is trained, `expert` "transformer" (times from the boundary up) or "transformer_2" (below), on
    times of its own range; the other is frozen and serves its range in chains and samples. An adapter belongs to
    its expert: the vanilla pipeline loads the second's with `load_into_transformer_2=True`. Leave `t_min` at 0
    with the second. Not supported: guidance_scale_2.
    """

    def __init__(self, pipeline: Any, name: str, expert: str = "transformer") -> None:
        if pipeline.components.get(expert) is None:
            raise ConfigError(f"'{name}' has no {expert}; Wan 2.1 and 2.2 TI2V have one network, transformer")
        self.component = expert
        super().__init__(pipeline, name)
        ratio = pipeline.config.boundary_ratio
        self._boundary = 0.0 if ratio is None or pipeline.transformer_2 is None else ratio
        own_range = {"low": self._boundary} if expert == "transformer" else {"high": self._boundary}
        self.noise_schedule = replace(self.noise_schedule, **own_range)

    def _is_mine(self, t: Tensor) -> Tensor:
        return (t >= self._boundary) == (self.component == "transformer")

    @property
    def lora_loading(self) -> dict[str, Any]:
        return {"load_into_transformer_2": True} if self.component == "transformer_2" else {}

    @property
    def adapter_prefix(self) -> str:
        return "transformer"  # whichever expert

    def call_network(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        mine = self._is_mine(model_time / self.noise_schedule.model_time(torch.ones(())))
        if mine.all():
            return self._call_expert(net, x_t, model_time, cond)
        other = self.pipeline.transformer_2 if self.component == "transformer" else self.pipeline.transformer
        other_pred = self._call_expert(other, x_t.to(other.dtype), model_time, cond).to(x_t)
        if not mine.any():
            return other_pred
        return torch.where(mine.reshape(-1, 1, 1, 1, 1), self._call_expert(net, x_t, model_time, cond), other_pred)

    def _call_expert(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        if self.pipeline.config.expand_timesteps:
            _, high, wide = net.config.patch_size
            tokens = x_t.shape[2] * (x_t.shape[3] // high) * (x_t.shape[4] // wide)
            model_time = model_time[:, None].expand(-1, tokens)
        return net(hidden_states=x_t, timestep=model_time, **cond.tensors).sample

    # --- description ---

    origin = Origin("Wan", "WanTransformer3DModel")
    comfyui = Keys(
        "diffusion_model.",
        rf"blocks\.\d+\.(attn[12]\.({ATTENTION})|ffn\.{FEED_FORWARD})",
        rename=_comfyui_layers,
    )
