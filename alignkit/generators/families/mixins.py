"""Shared by several families: noise schedules, embedded guidance, per-channel latent normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignkit.diffusion.schedules import FlowSchedule
from alignkit.generators.pipeline import Predictor
from alignkit.records import Conditioning


def flow_schedule(config: Mapping[str, Any], scale: float = 1.0) -> FlowSchedule:
    """The schedule of a flow network whose times end at `scale`, from the config of its scheduler of any class.

    A shift that depends on the resolution is used in sampling alone, as in diffusers' training scripts.
    """
    shift = 1.0 if config.get("use_dynamic_shifting") else config.get("flow_shift") or config.get("shift") or 1.0
    return FlowSchedule(shift, scale=scale)


def resolution_shift(config: Mapping[str, Any], tokens: int) -> float:
    """mu for `tokens` tokens, linear between (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift)."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - few) / (many - few)


def linear_sigmas(config: Mapping[str, Any], steps: int, tokens: int) -> dict[str, Any]:
    """`set_timesteps` arguments of the pipelines that shift N sigmas equally spaced from 1 to 1 / N."""
    return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": resolution_shift(config, tokens)}


def keep_norm(guided: Tensor, cond_pred: Tensor) -> Tensor:
    """`guided` scaled to the norm of `cond_pred` along the last axis."""
    return guided * (cond_pred.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


class ChannelStatistics:
    """Mix-in of families whose latents are normalised per channel."""

    pipeline: Any

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent channels, each [C, 1, 1, 1]."""
        config = self.pipeline.vae.config
        mean, std = (like.new_tensor(config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
        return mean, std

    def _normalised(self, raw: Tensor) -> Tensor:
        mean, std = self.statistics(raw)
        return (raw - mean) / std

    def _denormalised(self, latents: Tensor) -> Tensor:
        mean, std = self.statistics(latents)
        return latents * std + mean


GUIDANCE = "guidance"  # a control of the conditioning, [B]


class EmbeddedGuidance:
    """Mix-in of families whose network takes the guidance scale as an input: one call per step, no unconditional one.

    `guidance` is the scale of training, the pipeline's default in sampling, as in the public LoRA scripts. Policy and
    reference get the same. A chain passes its own scale.
    """

    guidance: float

    def guided(
        self, model: Predictor, x_t: Tensor, times: tuple[Tensor, Tensor], cond: Conditioning, scale: float, **_: bool
    ) -> Tensor:
        """The prediction with `scale` as the network's guidance input."""
        scales = torch.full((len(x_t),), scale, device=x_t.device)
        return model(x_t, times[0], cond.with_controls({GUIDANCE: scales}))

    def training_controls(self, t: Tensor) -> Mapping[str, Tensor]:
        """The guidance scale of training [B] at times `t` [B], in float32."""
        return {GUIDANCE: torch.full((len(t),), self.guidance, device=t.device)}
