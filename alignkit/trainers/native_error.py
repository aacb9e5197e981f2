"""The plain denoising error of given latents: prediction minus native target, for every method that trains on data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.diffusion.schedules import expand
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.trainers.latents import conditioning

MAX_WEIGHT = 20.0
DRAWN = ("latents", "noise", "t")  # batch keys with one entry a candidate, which a call of the model needs


def residuals(
    generator: PipelineGenerator,
    model: nn.Module,
    batch: Mapping[str, Any],
    null: Mapping[str, Tensor],
    error_space: str = "native",
) -> Tensor:
    """Prediction minus native target, [P, K, C, H, W] or [P, K, C, T, H, W], in one call of `model`.

    `batch` holds collated items of `LatentDataset`, `null` is the null condition.
    """
    shape = batch["latents"].shape[:2]
    cond = conditioning(batch, null).repeat(shape[1])
    x0, noise, t = (batch[name].flatten(0, 1) for name in DRAWN)
    return residual(generator, model, x0, noise, t, cond, error_space=error_space).unflatten(0, shape)


def residual(
    generator: PipelineGenerator,
    model: nn.Module,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    cond: Any,
    *,
    error_space: str = "native",
) -> Tensor:
    """The same [B, C, ...] of latents, unit noise, times [B] and conditioning.

    The network may run in bf16; the residual is float32 at least.

    With `error_space="velocity"` an eps network's residual is divided by alpha(t), which makes it that of v = alpha eps
    - sigma x0 (Salimans & Ho, arXiv 2202.00512, section 4): the plain eps error gives high noise, where layout is
    decided, almost no weight. The squared weight is at most MAX_WEIGHT; next to pure noise it would pass 200.
    """
    x_t = generator.add_noise(x0, noise, t)
    target = generator.target(x0, noise, t)
    prediction = model(x_t, t, cond.with_controls(generator.training_controls(t)))
    error = prediction.to(torch.promote_types(prediction.dtype, torch.float32)) - target
    if error_space == "velocity" and generator.prediction == "epsilon":
        alpha, _ = generator.noise_schedule.coefficients(t)
        error = error * expand(alpha.reciprocal().clamp(max=MAX_WEIGHT**0.5), error)
    return error


def mean_square(residual_PK: Tensor, per: str) -> Tensor:
    """[P, K] of a residual [P, K, ...], or with `per` "frame" [P, K, T] (an image has T = 1)."""
    if per == "item":
        return residual_PK.flatten(2).square().mean(-1)
    frames = residual_PK if residual_PK.dim() == 6 else residual_PK.unsqueeze(3)
    return frames.square().mean((2, 4, 5))
