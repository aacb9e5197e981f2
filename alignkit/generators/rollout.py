"""The denoising chain as a function of network, conditioning and state.

`PipelineGenerator.generate` calls the vanilla pipeline. The chain here is used where gradients, another start, another
conditioning per step or a hook is needed. It is first order; see `alignkit.generators.grids`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignkit.diffusion.solvers import NO_NOISE, FreshNoise, Grid
from alignkit.diffusion.steps import Steps
from alignkit.generators.codec import at_least_float32
from alignkit.generators.pipeline import PipelineGenerator, Predictor
from alignkit.records import Conditioning, Sampling
from alignkit.seeds import derive_seed

# The conditioning of a chain: one for all steps, or called with the step's index on the grid.
ByStep = Conditioning | Callable[[int], Conditioning]
# Called as hook(index, x, prediction) with the state after the step; a returned tensor replaces the state.
StepHook = Callable[[int, Tensor, Tensor], Tensor | None]
# One generator per row: the same for all steps, or called with the step's index.
Sources = Sequence[torch.Generator] | Callable[[int], Sequence[torch.Generator]]


def keyed_sources(seeds: Sequence[int], *key: int | str) -> Callable[[int], list[torch.Generator]]:
    """Sources whose noise depends on the row's seed, `key` and the step alone, so a repeated step draws it again.

    A chain can then begin at a stored state, or be recomputed, without stored noise.
    """

    def sources(index: int) -> list[torch.Generator]:
        return [torch.Generator("cpu").manual_seed(derive_seed("step", seed, *key, index)) for seed in seeds]

    return sources


def at_step(cond: ByStep, index: int) -> Conditioning:
    """The conditioning of step `index`."""
    return cond if isinstance(cond, Conditioning) else cond(index)


def rollout(
    generator: PipelineGenerator,
    cond: ByStep,
    x: Tensor,
    grid: Grid,
    *,
    scale: float,
    model: Predictor | None = None,
    steps: Steps | Iterable[int] | None = None,
    sources: Sources = (),
    fresh: FreshNoise = NO_NOISE,
    on_step: StepHook | None = None,
    checkpointed: bool = True,
) -> Tensor:
    """The state [B, C, ...] after all steps of `grid`, from the state `x` [B, C, ...] before its first step.

    Args:
        generator: its family guides and steps; its weights are used only through `model`.
        cond: the conditioning [B, ...] of all steps, or a function of the step's index on `grid`, called once per step.
        x: `grid.start` times unit noise; or alpha[0] x0 + sigma[0] eps of `grid.from_sigma(eta)`; or a state that a
            hook saw after step i, with the grid `grid[i + 1:]`.
        grid: from `generator.grid(steps, shape)`.
        scale: guidance scale.
        model: called as model(x_t, t, cond); the module that a trainer wraps, `generator.model` by default.
        steps: which steps carry gradients, as indices on `grid` or as a `Steps` record with input coupling; all steps
            by default. Any other step runs without gradients: it adds nothing to the gradients of weights and
            conditioning, and the gradient of the state passes it through the solver's step with the prediction as a
            constant. See `alignkit.diffusion.steps` for the equation.
        sources: of noise, one generator per row, for steps that draw some: those of `fresh` and of LCM.
        fresh: new noise in each step, none by default. Not for families with `own_steps`.
        on_step: called once per step, outside the checkpointed region, as on_step(index, x, prediction): the guided
            prediction of the step and the state after it. A returned tensor replaces the state. Tensor hooks that are
            registered on x see, and may cap, the gradient of the state (`x.requires_grad` says whether it has one).
        checkpointed: keep the activations of one step at a time, at the cost of one more forward pass.

    The state stays in the dtype of `x`, float32 at least. Raises ConfigError for a step that is not on the grid.
    """
    predictor: Predictor = generator.model if model is None else model
    steps = Steps.of(steps, len(grid))
    x = at_least_float32(x)
    grid = grid.to(x.dtype, x.device)

    dtype = x.dtype

    def predict(state: Tensor, index: int, condition: Conditioning) -> Tensor:
        times = grid.times(index, state)
        prediction = generator.guided(predictor, state, times, condition, scale, grad_unconditional=steps.unconditional)
        return prediction.to(dtype)

    for index in range(len(grid)):
        condition = at_step(cond, index)
        with torch.set_grad_enabled(torch.is_grad_enabled() and steps.carries(index)):
            arguments = (steps.network_input(x), index, condition)
            repeats = checkpointed and torch.is_grad_enabled()
            prediction = checkpoint(predict, *arguments, use_reentrant=False) if repeats else predict(*arguments)
        x = take_step(generator, grid, index, prediction, x, sources=sources, fresh=fresh)
        replacement = on_step(index, x, prediction) if on_step else None
        x = x if replacement is None else replacement
    return x


def take_step(
    generator: PipelineGenerator,
    grid: Grid,
    index: int,
    prediction: Tensor,
    x: Tensor,
    *,
    sources: Sources,
    fresh: FreshNoise = NO_NOISE,
) -> Tensor:
    """The state after step `index` of `rollout`, from the state `x` before it and its guided prediction."""
    drawn = sources(index) if callable(sources) else sources
    if not fresh:
        return generator.step(grid, index, prediction, x, drawn)
    noise = torch.cat([generator.initial_noise(x.shape[1:], source) for source in drawn]).to(x)
    return fresh.step(generator.prediction, prediction, x, grid, index, noise)


def denoise(
    generator: PipelineGenerator,
    cond: ByStep,
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    model: Predictor | None = None,
    steps: Steps | Iterable[int] | None = None,
    checkpointed: bool = True,
) -> Tensor:
    """Latents [B, C, ...] of B prompts and seeds, differentiable; `generator.decode` gives their pixels.

    The pipeline's own result for the same seeds, steps and guidance if its scheduler is an Euler or DDIM scheduler, in
    float32 (in float64 for a float64 network). `model`, `steps` and `checkpointed` are those of `rollout`.
    `sampling.extra` is not read.
    """
    given = cond
    if sampling.negative_prompt:
        negative = generator.encode_negative(sampling.negative_prompt)
        given = lambda index: replace(at_step(cond, index), null=negative).to(generator.device)  # noqa: E731
    shape = generator.latent_shape(sampling.height, sampling.width, sampling.num_frames)
    grid = generator.grid(sampling.steps, shape)
    sources = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = torch.cat([generator.initial_noise(shape, source) for source in sources]).to(generator.device)
    x = grid.start * noise.to(torch.promote_types(generator.net.dtype, torch.float32))
    scale = sampling.guidance_scale
    return rollout(
        generator, given, x, grid, scale=scale, model=model, steps=steps, sources=sources, checkpointed=checkpointed
    )
