"""Chains whose end has several gradients: one for each set of steps that carry it, all of equal value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignkit.diffusion.solvers import NO_NOISE, FreshNoise, Grid
from alignkit.diffusion.steps import Steps
from alignkit.generators.codec import at_least_float32
from alignkit.generators.pipeline import PipelineGenerator, Predictor
from alignkit.generators.rollout import ByStep, StepHook, at_step, rollout, take_step


def rollout_windows(
    generator: PipelineGenerator,
    cond: ByStep,
    x: Tensor,
    grid: Grid,
    windows: Sequence[Steps],
    hooks: Sequence[StepHook],
    *,
    scale: float,
    model: Predictor,
    sources: Callable[[int], Sequence[torch.Generator]],
    fresh: FreshNoise = NO_NOISE,
) -> list[Tensor]:
    """The state after all steps once for each of `windows`: the k-th has the gradient of `rollout(steps=windows[k])`.

    `windows` differ in their active steps alone. `hooks[k]` is `on_step` of the k-th. `sources` must draw equal noise
    for equal steps (`rollout.keyed_sources`). The other arguments are those of `rollout`.

    Cost, with n_k active steps in window k. Coupling above 0: the gradient of the state at a step depends on the later
    steps of its window, so nothing is shared: a chain forward, and for each further window the steps from its first
    active one on, forward, and n_k repeated steps with their backward passes, for every window. Coupling 0: the state's
    gradient passes the solver's linear step alone, so predictions are shared: one chain, and each step that any window
    has is repeated and differentiated once. Whatever reads the ends is differentiated once for each window.
    """
    options = {"scale": scale, "model": model, "fresh": fresh}
    if windows[0].coupling == 0:
        return _with_shared_predictions(generator, (cond, x, grid), windows, hooks, {**options, "sources": sources})
    states: list[Tensor] = []

    def keep(index: int, state: Tensor, prediction: Tensor) -> Tensor | None:
        states.append(state.detach())
        return hooks[0](index, state, prediction)

    ends = [rollout(generator, cond, x, grid, steps=windows[0], sources=sources, on_step=keep, **options)]
    for window, hook in zip(windows[1:], hooks[1:], strict=True):
        first = min(window.active, default=0) if window.active is not None else 0
        start = states[first - 1] if first else x
        later = window  # the same steps, by their indices on the grid that begins at step `first`
        if window.active is not None:
            later = replace(window, active=frozenset(index - first for index in window.active))
        ends.append(
            rollout(
                generator,
                lambda index, first=first: at_step(cond, index + first),
                start,
                grid[first:],
                steps=later,
                sources=lambda index, first=first: sources(index + first),
                on_step=lambda index, *rest, first=first, hook=hook: hook(index + first, *rest),
                **options,
            )
        )
    return ends


def _with_shared_predictions(
    generator: PipelineGenerator,
    chain: tuple[ByStep, Tensor, Grid],
    windows: Sequence[Steps],
    hooks: Sequence[StepHook],
    options: Mapping[str, Any],
) -> list[Tensor]:
    """One chain whose predictions carry gradients in the steps of any window; a state for each window follows it."""
    _, x, grid = chain
    ends = [at_least_float32(x)] * len(windows)
    exact = grid.to(ends[0].dtype, x.device)
    noise = {name: options[name] for name in ("sources", "fresh")}

    def follow(index: int, _: Tensor, prediction: Tensor) -> None:
        for place, (window, hook) in enumerate(zip(windows, hooks, strict=True)):
            own = prediction if window.carries(index) else prediction.detach()
            ends[place] = take_step(generator, exact, index, own, ends[place], **noise)
            hook(index, ends[place], own)

    union = None
    if all(window.active is not None for window in windows):
        union = frozenset[int]().union(*(window.active or () for window in windows))
    rollout(generator, *chain, steps=replace(windows[0], active=union), on_step=follow, **options)
    return ends
