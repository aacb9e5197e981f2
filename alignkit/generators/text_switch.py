"""The vanilla pipeline with other text inputs of its network in some steps.

Pipelines encode prompts once, before their loop, and put the results together in ways of their own (with the null
condition, with templates, cut to a length). What the network gets is therefore learnt from its calls in the first step:
once with the other encoders, once in the chain itself. Inputs that differ between the two are those of text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from alignkit.errors import AdapterError
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.records import Sampling

_DENOISERS = ("unet", "transformer")
Call = list[Any]  # the inputs of one call of a network, flat


@dataclass
class Clock:
    """The number of the present step, and how many steps the chain has."""

    index: int = 0
    total: int = 0


class _FirstStepEndedError(Exception):
    """Ends a chain that only its first step is wanted of."""


@contextmanager
def counted_steps(pipeline: Any, *, only_first: bool = False) -> Iterator[Clock]:
    """Count the calls of the scheduler's `step`, of which every pipeline makes one a step.

    `total` is the scheduler's number of timesteps, from the first call of `set_timesteps` on.
    """
    scheduler, clock = pipeline.scheduler, Clock()
    step, set_timesteps = scheduler.step, scheduler.set_timesteps

    @functools.wraps(step)  # pipelines ask both for the names of their parameters
    def counted(*arguments: Any, **named: Any) -> Any:
        if only_first:
            raise _FirstStepEndedError
        clock.index += 1
        return step(*arguments, **named)

    @functools.wraps(set_timesteps)
    def known(*arguments: Any, **named: Any) -> Any:
        result = set_timesteps(*arguments, **named)
        clock.total = len(scheduler.timesteps)
        return result

    scheduler.step, scheduler.set_timesteps = counted, known
    try:
        yield clock
    finally:
        del scheduler.step, scheduler.set_timesteps


def texts_of_first_step(
    generator: PipelineGenerator, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling
) -> list[Call]:
    """The inputs of the network's calls in the first step of `generate`; costs that step."""
    calls: list[Call] = []

    def record(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append(tree_flatten((arguments, named))[0])

    with counted_steps(generator.pipeline, only_first=True), _hooked(generator, record):
        try:
            generator.generate(prompts, seeds, sampling)
        except _FirstStepEndedError:
            return calls
    raise AdapterError(f"'{generator.name}' never calls its scheduler, so its steps cannot be counted")


@contextmanager
def switched_texts(
    generator: PipelineGenerator, inside: Sequence[Call], window: Callable[[int], range]
) -> Iterator[None]:
    """Within it `generate`, with the same prompts and seeds, gets the text inputs of `inside` in the window's steps.

    `window(total)` are the steps among all. Raises AdapterError where the pipeline calls its network in a later step
    with texts that its first step did not have.
    """
    outside: list[Call] = []
    places: list[list[int]] = []  # of text, by call of the first step

    def switch(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        leaves, layout = tree_flatten((arguments, named))
        if clock.index == 0 and len(outside) < len(inside):
            other = inside[len(outside)]
            if len(leaves) != len(other):
                raise AdapterError(
                    "the mixture's embeddings have another form than the base's; they cannot be switched"
                )
            places.append([place for place, leaf in enumerate(leaves) if _differs(leaf, other[place])])
            outside.append(leaves)
        if clock.index not in window(clock.total):
            return None
        for before, after, text in zip(outside, inside, places, strict=False):
            if len(before) == len(leaves) and not any(_differs(leaves[place], before[place]) for place in text):
                texts = {place: after[place] for place in text}
                return tree_unflatten([texts.get(place, leaf) for place, leaf in enumerate(leaves)], layout)
        raise AdapterError(
            f"'{generator.name}' calls its network in step {clock.index} with texts that its first step did not have, "
            "so embeddings cannot be switched there; leave out what adds such calls, or the window"
        )

    with counted_steps(generator.pipeline) as clock, _hooked(generator, switch):
        yield


@contextmanager
def _hooked(generator: PipelineGenerator, hook: Callable[..., Any]) -> Iterator[None]:
    parts = [part for name, part in generator.pipeline.components.items() if name.startswith(_DENOISERS) and part]
    with ExitStack() as removed:
        for part in parts:
            removed.callback(part.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _differs(one: Any, other: Any) -> bool:
    if one is other or not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return one.shape != other.shape or not torch.equal(one, other)
