"""Conditioning that changes during a chain: tuned text encoders in some steps, the base encoders in the others.

`Switched` is that conditioning for a chain of our own. `sample` is the vanilla pipeline's call under the same switch.
Pipelines take one embedding for all steps, each in its own arguments, so the switch is at the network: whatever tensors
it is called with that differ between both sets of encoders are the text, and in the tuned steps they are replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from alignkit.errors import ConfigError
from alignkit.records import Conditioning

if TYPE_CHECKING:
    from alignkit.diffusion.tuned_steps import TunedSteps
    from alignkit.generators.conditioner import Conditioner

_NETWORKS = ("unet", "transformer", "transformer_2")


@dataclass(frozen=True)
class Switched:
    """The conditioning of each step of a chain, called with the step's index: `tuned` at `steps`, else `base`."""

    tuned: Conditioning
    base: Conditioning
    steps: Collection[int]

    def __call__(self, index: int) -> Conditioning:
        return self.tuned if index in self.steps else self.base


def by_step(
    conditioner: Conditioner, prompts: Sequence[str], count: int, device: torch.device
) -> Conditioning | Switched:
    """The conditioning of a chain of `count` steps: by the tuned encoders in the steps of `conditioner.window`."""
    tuned = conditioner(prompts).to(device)
    if conditioner.window is None or not conditioner.is_switched:
        return tuned
    base = conditioner(prompts, reference=True).to(device)
    return Switched(with_null(tuned, base, conditioner.window), base, conditioner.window.on(count))


def with_null(tuned: Conditioning, base: Conditioning, window: TunedSteps) -> Conditioning:
    """`tuned` with the null condition that `window` names."""
    return tuned if window.null else replace(tuned, null=base.null)


def sample(
    pipeline: Any,
    conditioner: Conditioner,
    prompts: list[str] | str,
    sources: Sequence[torch.Generator],
    arguments: Mapping[str, Any],
) -> Any:
    """The pipeline's output for `prompts`; the tuned encoders act in the steps of `conditioner.window`.

    With a window the network's first step is computed once more, by the tuned encoders, to learn its text inputs.
    Raises ConfigError for a pipeline that changes its text inputs during the chain.
    """

    def call(texts: list[str] | str) -> Any:
        fresh = [torch.Generator("cpu").manual_seed(source.initial_seed()) for source in sources]
        return pipeline(prompt=texts, generator=fresh, output_type="pt", **arguments)

    window = conditioner.window
    if window is None or not conditioner.is_switched:
        return call(prompts)
    tuned = _first_step(pipeline, functools.partial(call, prompts))
    with conditioner.as_reference():
        empty = "" if isinstance(prompts, str) else [""] * len(prompts)
        blank = [] if window.null else _first_step(pipeline, functools.partial(call, empty))
        switch = _Switch(pipeline, tuned, blank, window.on)
        with _observed(pipeline, switch.on_call, switch.on_step):
            return call(prompts)


class _FirstStepError(Exception):
    """Ends a pipeline after the network's calls of the first step."""


def _first_step(pipeline: Any, call: Callable[[], Any]) -> list[list[Any]]:
    """What the networks are called with in the first step: the leaves of the arguments of each call."""
    calls: list[list[Any]] = []

    def on_call(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append(tree_flatten((given, named))[0])

    def on_step() -> None:
        raise _FirstStepError

    with suppress(_FirstStepError), _observed(pipeline, on_call, on_step):
        call()
    return calls


@contextmanager
def _observed(pipeline: Any, on_call: Callable[..., Any], on_step: Callable[[], None]) -> Iterator[None]:
    """Within it `on_call` is a pre-hook of the denoisers, and `on_step` is called before each step of the scheduler."""
    scheduler, nets = pipeline.scheduler, [pipeline.components.get(name) for name in _NETWORKS]
    step = scheduler.step

    @functools.wraps(step)  # pipelines read its signature
    def counted(*given: Any, **named: Any) -> Any:
        on_step()
        return step(*given, **named)

    handles = [net.register_forward_pre_hook(on_call, with_kwargs=True) for net in nets if net is not None]
    scheduler.step = counted
    try:
        yield
    finally:
        del scheduler.step
        for handle in handles:
            handle.remove()


class _Switch:
    """Replaces the text inputs of the networks in the tuned steps of one chain.

    tuned, blank: of `_first_step` with the tuned encoders, and of the base encoders with empty prompts where the null
        condition stays that of the base encoders (else empty). Rows that an empty prompt gives too are that condition.
    """

    def __init__(
        self,
        pipeline: Any,
        tuned: list[list[Any]],
        blank: list[list[Any]],
        window: Callable[[int], range],
    ) -> None:
        self._pipeline, self._tuned, self._blank, self._window = pipeline, tuned, blank, window
        self._index = self._calls = self._replaced = 0
        self._steps = range(0)
        self._pairs: list[tuple[Tensor, Tensor]] = []  # a text input by the base encoders, and what takes its place

    def on_call(self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Pre-hook of a network."""
        leaves, form = tree_flatten((given, named))
        if self._index == 0:
            self._learn(leaves)
        if self._index not in self._steps:
            return None
        return tree_unflatten([self._in_place_of(leaf) for leaf in leaves], form)

    def on_step(self) -> None:
        """Called after the networks' calls of each step."""
        if self._index in self._steps and self._pairs and not self._replaced:
            raise ConfigError(
                f"a {type(self._pipeline).__name__} changes its text inputs during the chain, so tuned text encoders "
                "cannot be used in some of its steps alone; use them in all"
            )
        self._index, self._replaced = self._index + 1, 0

    def _learn(self, leaves: list[Any]) -> None:
        self._steps = self._window(len(self._pipeline.scheduler.timesteps))
        blank = self._blank[self._calls] if self._blank else [None] * len(leaves)
        for base, tuned, empty in zip(leaves, self._tuned[self._calls], blank, strict=True):
            if not isinstance(base, Tensor) or torch.equal(base, tuned):
                continue
            replacement = tuned
            if isinstance(empty, Tensor) and empty.shape == base.shape:  # else they have the prompts' own lengths
                is_null = (base == empty).flatten(1).all(1)
                replacement = torch.where(is_null.view(-1, *[1] * (base.dim() - 1)), base, tuned)
            self._pairs.append((base, replacement))
        self._calls += 1

    def _in_place_of(self, leaf: Any) -> Any:
        for base, tuned in self._pairs:
            if isinstance(leaf, Tensor) and leaf.dtype == base.dtype and torch.equal(leaf, base):
                self._replaced += 1
                return tuned
        return leaf
