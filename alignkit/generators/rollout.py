"""The denoising chain with gradients: what the vanilla pipeline draws, as a function of network and conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignkit.records import Conditioning, Sampling

if TYPE_CHECKING:
    from alignkit.generators.pipeline import PipelineGenerator


def denoise(
    generator: PipelineGenerator,
    cond: Conditioning,
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    model: nn.Module | None = None,
    checkpointed: bool = True,
) -> Tensor:
    """Latents [B, C, ...] of B prompts and seeds, with gradients to `model` and `cond`; `generator.decode` shows them.

    The pipeline's own picture for the same seeds, steps and guidance where its scheduler is an Euler or DDIM scheduler
    (`alignkit.diffusion.solvers`), in float32. `model` is the (wrapped) module that a trainer trains, default the
    generator's. `checkpointed` keeps one step's activations alone, for one forward more. `sampling.extra` is not read.
    """
    model = model or generator.model
    if sampling.negative_prompt:
        cond = replace(cond, null=generator.negative(sampling.negative_prompt))
    shape = generator.latent_shape(sampling.height, sampling.width, sampling.num_frames)
    grid = generator.grid(sampling.steps, shape)
    sources = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = torch.cat([generator.initial_noise(shape, source) for source in sources]).to(generator.device)
    x_t = grid.start * noise

    def predict(x: Tensor, index: int) -> Tensor:
        return generator.guided(model, x, grid.times(index, x), cond, sampling.guidance_scale).float()

    for index in range(len(grid)):
        repeats = checkpointed and torch.is_grad_enabled()
        prediction = checkpoint(predict, x_t, index, use_reentrant=False) if repeats else predict(x_t, index)
        x_t = generator.advance(grid, index, prediction, x_t, sources)
    return x_t
