"""Conditioning that changes during a chain: tuned text encoders or a mixture in some steps, the base in the others.

`Switched` is that conditioning for a chain of our own. `sample` is the vanilla pipeline's call under the same switch.
Pipelines encode prompts once, before their loop, and put the results together in ways of their own (with the null
condition, with templates, cut to a length), so the switch is at the network: whatever tensors it is called with in the
first step that differ between tuned and base are the text, and in the tuned steps they are replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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

_NETWORKS = ("unet", "transformer")  # and transformer_2
Inputs = list[Any]  # of one call of a network: the leaves of its arguments


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
    """The conditioning of a chain of `count` steps: the tuned one in the steps of `conditioner.window`."""
    tuned = conditioner(prompts).to(device)
    if conditioner.window is None or not conditioner.is_switched:
        return tuned
    base = conditioner(prompts, reference=True).to(device)
    return Switched(with_null(tuned, base, conditioner.window), base, conditioner.window.on(count))


def with_null(tuned: Conditioning, base: Conditioning, window: TunedSteps) -> Conditioning:
    """`tuned` with the null condition that `window` names."""
    return tuned if window.null else replace(tuned, null=base.null)


# --- the steps of a pipeline's chain --------------------------------------------------------------------------------


@dataclass
class Clock:
    """The number of the present step, and how many steps the chain has.

    order: calls of the scheduler's `step` that make one step: 2 for Heun. extra: further calls of the first step, such
    as one of PNDM. calls: so far.
    """

    total: int = 0
    order: int = 1
    extra: int = 0
    calls: int = 0

    @property
    def index(self) -> int:
        """First 0."""
        return max(0, self.calls - self.extra) // self.order


@contextmanager
def counted_steps(pipeline: Any, on_step: Callable[[], None] = lambda: None) -> Iterator[Clock]:
    """Count the steps of the chains that the pipeline runs within it.

    A chain begins with the scheduler's `set_timesteps`. `on_step` is called before each call of the scheduler's `step`;
    the last of a step's calls ends that step. A call of a pipeline is one chain, and some families call theirs once for
    each prompt.
    """
    scheduler, clock = pipeline.scheduler, Clock()
    step, set_timesteps = scheduler.step, scheduler.set_timesteps

    @functools.wraps(step)  # pipelines ask both for the names of their parameters
    def counted(*given: Any, **named: Any) -> Any:
        on_step()
        clock.calls += 1
        return step(*given, **named)

    @functools.wraps(set_timesteps)
    def begun(*given: Any, **named: Any) -> Any:
        result = set_timesteps(*given, **named)
        calls, clock.order, clock.calls = len(scheduler.timesteps), scheduler.order, 0
        clock.total = scheduler.num_inference_steps or -(-calls // clock.order)
        clock.extra = max(0, calls - clock.total * clock.order)  # as the pipelines count their warm-up
        return result

    with replaced(scheduler, step=counted, set_timesteps=begun):
        yield clock


@contextmanager
def replaced(owner: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """Within it `owner` has these methods; one may stand within another."""
    own = vars(owner)
    before = {name: own[name] for name in methods if name in own}
    own.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del own[name]
        own.update(before)


# --- the pipeline's call --------------------------------------------------------------------------------------------


def sample(
    pipeline: Any,
    conditioner: Conditioner,
    prompts: list[str] | str,
    sources: Sequence[torch.Generator],
    arguments: Mapping[str, Any],
) -> Any:
    """The pipeline's output for `prompts`; what is tuned in `conditioner` acts in the steps of its window.

    With a window the network's first step is computed once more, as tuned, to learn its text inputs, and again for
    empty prompts where the null condition stays the base's. Raises ConfigError for a pipeline that changes its text
    inputs during the chain.
    """

    def call(texts: list[str] | str) -> Any:
        fresh = [torch.Generator("cpu").manual_seed(source.initial_seed()) for source in sources]
        own = texts if isinstance(texts, str) else [*texts]  # some pipelines write their template into it
        return pipeline(prompt=own, generator=fresh, output_type="pt", **arguments)

    window = conditioner.window
    if window is None or not conditioner.is_switched:
        return call(prompts)
    tuned = _first_step(pipeline, functools.partial(call, prompts))
    with conditioner.as_reference():
        empty = "" if isinstance(prompts, str) else [""] * len(prompts)
        blank = [] if window.null else _first_step(pipeline, functools.partial(call, empty))
        with counted_steps(pipeline) as clock:
            switch = _Switch(type(pipeline).__name__, tuned, blank, len(sources), clock, window)
            with _hooked(pipeline, switch):
                return call(prompts)


class _FirstStepEndedError(Exception):
    """Ends a chain that only its first step is wanted of."""


def _first_step(pipeline: Any, call: Callable[[], Any]) -> list[Inputs]:
    """The inputs of the networks' calls in the first step."""
    calls: list[Inputs] = []

    def record(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append(tree_flatten((given, named))[0])

    def end() -> None:
        raise _FirstStepEndedError

    try:
        with counted_steps(pipeline, end), _hooked(pipeline, record):
            call()
    except _FirstStepEndedError:
        return calls
    raise ConfigError(f"a {type(pipeline).__name__} never calls its scheduler's step, so its steps cannot be counted")


@contextmanager
def _hooked(pipeline: Any, hook: Callable[..., Any]) -> Iterator[None]:
    """Within it `hook` is a pre-hook of the pipeline's denoisers."""
    nets = [part for name, part in pipeline.components.items() if name.startswith(_NETWORKS) and part is not None]
    with ExitStack() as removed:
        for net in nets:
            removed.callback(net.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@dataclass(frozen=True)
class _Text:
    """A text input of the base, and what takes its place."""

    base: Tensor
    tuned: Tensor

    def is_in(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dtype == self.base.dtype and torch.equal(leaf, self.base)


class _Switch:
    """Pre-hook of the networks that replaces their text inputs in the tuned steps of one chain.

    name: of the pipeline. tuned: of `_first_step`, as tuned. blank: the same of the base with empty prompts, where the
    null condition stays the base's (else empty): rows that an empty prompt gives too are that condition. count: of
    prompts.
    """

    def __init__(
        self, name: str, tuned: list[Inputs], blank: list[Inputs], count: int, clock: Clock, window: TunedSteps
    ) -> None:
        self._name, self._tuned, self._blank, self._count = name, tuned, blank, count
        self._clock, self._window = clock, window
        self._texts: list[_Text] = []
        self._calls = 0  # of the first step
        self._has_call_without_text = False  # in the first step, so that others may have none either

    def __call__(self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        leaves, form = tree_flatten((given, named))
        if self._clock.calls == 0:
            self._learn(leaves)
        if self._clock.index not in self._window.on(self._clock.total):
            return None
        texts = {place: text.tuned for place, leaf in enumerate(leaves) for text in self._texts if text.is_in(leaf)}
        if not texts and not self._has_call_without_text:
            raise ConfigError(
                f"a {self._name} changes its text inputs during the chain (in step {self._clock.index}), so tuned text "
                "encoders and mixtures of embeddings cannot be used in some of its steps alone; use them in all"
            )
        return tree_unflatten([texts.get(place, leaf) for place, leaf in enumerate(leaves)], form)

    def _learn(self, leaves: Inputs) -> None:
        blank = self._blank[self._calls] if self._blank else [None] * len(leaves)
        both = [*zip(leaves, self._tuned[self._calls], blank, strict=True)]
        texts = [
            _Text(base, self._with_null(base, tuned, empty))
            for base, tuned, empty in both
            if isinstance(base, Tensor) and not torch.equal(base, tuned)
        ]
        self._texts += texts
        self._has_call_without_text |= not texts
        self._calls += 1

    def _with_null(self, base: Tensor, tuned: Tensor, empty: Tensor | None) -> Tensor:
        """`tuned`, with the rows of `base` that are of empty prompts."""
        if empty is None:
            return tuned
        if empty.shape == base.shape:
            is_null = (base == empty).flatten(1).all(1)
            return torch.where(is_null.view(-1, *[1] * (base.dim() - 1)), base, tuned)
        if len(base) == len(empty) > self._count:
            raise ConfigError(
                f"a {self._name} pads prompts and the null condition to one length, so the null condition cannot stay "
                "the base's: let it be tuned too (tuned_null or null: true), or use the tuned encoders in all steps"
            )
        return tuned  # prompts alone, of their own lengths
