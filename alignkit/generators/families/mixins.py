"""Habits that several families share: clocks, guidance told to the network, and the statistics of latent channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alignkit.diffusion.schedules import FlowSchedule
from alignkit.records import Conditioning


def flow_schedule(config: Mapping[str, Any], scale: float = 1.0) -> FlowSchedule:
    """The clock of a flow network whose times end at `scale`, from its scheduler's config, whichever solver that is.

    A shift that follows the resolution is left to sampling, as in diffusers' training scripts.
    """
    shift = 1.0 if config.get("use_dynamic_shifting") else config.get("flow_shift") or config.get("shift") or 1.0
    return FlowSchedule(shift, scale=scale)


def resolution_shift(config: Mapping[str, Any], tokens: int) -> float:
    """mu of a picture of so many tokens: on the line from (base_image_seq_len, base_shift) to the largest picture's."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - few) / (many - few)


def linear_sigmas(config: Mapping[str, Any], steps: int, tokens: int) -> dict[str, Any]:
    """`set_timesteps` arguments of the pipelines that lay N sigmas from 1 to 1 / N and then shift them."""
    return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": resolution_shift(config, tokens)}


def keep_norm(guided: Tensor, told: Tensor) -> Tensor:
    """`guided` with the norm that `told` has along the last axis."""
    return guided * (told.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


class ChannelStatistics:
    """Mix-in of families whose latents are normalised channel by channel, as video VAEs have it."""

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


GUIDANCE = "guidance"  # among the conditioning's tensors, [B]


class EmbeddedGuidance:
    """Mix-in of families that take the guidance scale as an input: one call a step, no unconditional one.

    Trained with `guidance`, the scale that the pipeline samples with by default, as the public LoRA scripts do; policy
    and reference see the same. A chain tells the scale that it is asked for.
    """

    guidance: float

    def guided(
        self, model: nn.Module, x_t: Tensor, times: tuple[Tensor, Tensor], cond: Conditioning, scale: float
    ) -> Tensor:
        """One call that is told the scale."""
        told = torch.full((len(x_t),), scale, device=x_t.device)
        return model(x_t, times[0], replace(cond, tensors={**cond.tensors, GUIDANCE: told}))

    def told_guidance(self, x_t: Tensor, cond: Conditioning) -> tuple[Tensor, dict[str, Tensor]]:
        """The scale [B], and the conditioning's other tensors."""
        tensors = dict(cond.tensors)
        return tensors.pop(GUIDANCE, x_t.new_full((len(x_t),), self.guidance)), tensors
