"""Mixtures that act at sampling time, as image sources: of embeddings and of predictions, in a window of steps.

    embedding     sum_i w_i T_i(p): the pipeline's own `encode_prompt`, once with each member's text encoders
    prediction    sum_i w_i eps_i(x_t, t, c): the network, once with each member's weights (Diffusion Blend, 2505.18547)

The base has the rest of the weights to 1, as in mixtures of weights: one member at 0.5 acts with half its strength.
Outside of the window the base acts. The chain stays the vanilla pipeline's, with its scheduler. Embeddings are switched
as those of tuned text encoders are (`alignkit.generators.switching`). Guidance is linear, so predictions may be mixed
before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from typing_extensions import override

from alignkit.adapters import lora, lora_files
from alignkit.adapters.fingerprint import base_of, is_other_base
from alignkit.adapters.merging import CLOSE
from alignkit.adapters.mixture import BASE, Mixture, read_mixture
from alignkit.errors import AdapterError
from alignkit.escape import get_logger
from alignkit.generators.components import component_class, load_network, require_finite, require_weights
from alignkit.generators.members import MIXABLE, Base, Member, read_member
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.generators.switching import counted_steps, replaced
from alignkit.generators.table import origins
from alignkit.records import Sampling

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Variant:
    """A member on a loaded generator: its weight, its adapter's name, and the modules that it has of its own."""

    weight: float
    adapter: str = ""
    modules: Mapping[str, nn.Module] | None = None

    def module(self, component: str, own: nn.Module) -> nn.Module:
        """What stands in the place of the pipeline's component."""
        return (self.modules or {}).get(component, own)


def load_mixture(generator: PipelineGenerator, folder: Path, family: str | None = None) -> MixedGenerator:
    """The image source of the embedding or prediction mixture in `folder` on a freshly loaded base.

    Logs a warning where the base's weights are not those that the members were trained from. Raises DataError for a
    folder that is no sound mixture, AdapterError for a mixture of weights and for members that do not fit.
    """
    mixture = read_mixture(folder)
    kinds = {"embedding": EmbeddingMixture, "prediction": PredictionMixture}
    if mixture.space not in kinds:
        raise AdapterError(f"'{folder}' is a mixture of {mixture.space}; load it as an adapter")
    base = Base.open(str(generator.pipeline.name_or_path), family)
    variants = []
    for number, (record, weight) in enumerate(zip(mixture.members, mixture.weights, strict=True)):
        member = read_member(record.name if record.name == BASE else str(folder / record.place), base)
        variants.append(put_member(generator, member, weight, number))
    warn_of_base(generator, mixture, folder)
    return kinds[mixture.space](generator, mixture, variants)


def load_weights(generator: PipelineGenerator, folder: Path) -> None:
    """Put the result of a soup, an adapter or whole components, on a freshly loaded generator.

    Raises DataError for a folder that is no sound mixture, AdapterError for one that acts at sampling time, and for one
    with a text encoder that the generator has tuned already.
    """
    mixture = read_mixture(folder)
    if mixture.space != "weights":
        raise AdapterError(
            f"'{folder}' is a mixture of {mixture.space}s, which acts while sampling and has no weights of its own; "
            "make one with space: weights"
        )
    if (folder / lora.DIFFUSERS_FILE).is_file():
        generator.load_adapter(folder)
        return
    own = generator.pipeline.components
    for component in [name for name in own if name.startswith(MIXABLE) and (folder / name).is_dir()]:
        if own[component] is None:
            raise AdapterError(f"'{folder}' has a {component}, which '{generator.name}' was loaded without")
        if component in generator.conditioner.trained:
            raise AdapterError(
                f"'{folder}' has a {component}, and so has `encoder`, which it would replace: leave out one of "
                "them, or mix both by `alignkit soup`"
            )
    warn_of_base(generator, mixture, folder)
    for component in [name for name in own if name.startswith(MIXABLE) and (folder / name).is_dir()]:
        module = _loaded(folder / component, own[component])
        if component in generator.conditioner.encoders:
            generator.conditioner.encoders[component] = module
        if component == generator.component:
            generator.put_net(module)
        generator.pipeline.register_modules(**{component: module})


def warn_of_base(generator: PipelineGenerator, mixture: Mixture, folder: Path) -> None:
    """Warn of components of the generator whose weights are not those that the mixture's members were trained from."""
    for component, whole in mixture.base_fingerprint.items():
        part = generator.pipeline.components.get(component)
        if part is not None and is_other_base(part, whole):
            logger.warning(
                "'%s' was made for another base: the fingerprint of its %s was %s, that of this model is %s",
                *(folder, component, whole, base_of(part)),
            )


def put_member(generator: PipelineGenerator, member: Member, weight: float, number: int) -> Variant:
    """Load a member beside the base: its LoRAs as the adapter `member{number}`, switched off, and its own components.

    Raises AdapterError for what does not fit the generator.
    """
    name = f"member{number}" if member.loras else ""
    own = generator.pipeline.components
    for component, stored in member.loras.items():
        part, where = own[component], f"member '{member.name}'"
        made_for = lambda: lora_files.origin_of(member.loras, origins())  # noqa: E731
        lora.load(part, stored.weights, stored.config, where=where, origin=made_for, name=name, trainable=False)
        lora.activate(part, {})
    modules = {component: _loaded(folder, own[component]) for component, folder in member.weights.items()}
    return Variant(weight, name, modules)


def _loaded(folder: Path, own: Any) -> nn.Module:
    """The network in `folder` with the class, precision and device of the pipeline's own, frozen."""
    library = type(own).__module__.partition(".")[0]
    stored = require_weights(folder, library)
    require_finite(stored)
    module = load_network(folder, component_class(library, type(own).__name__), stored, own.dtype)
    return module.to(own.device).requires_grad_(False).eval()


class MixedGenerator:
    """An image source that mixes members of one base; `generator` is that base, which must not be used otherwise."""

    def __init__(self, generator: PipelineGenerator, mixture: Mixture, variants: Sequence[Variant]) -> None:
        self.generator, self.mixture, self.name = generator, mixture, generator.name
        rest = 1 - math.fsum(variant.weight for variant in variants)
        self._variants = [variant for variant in variants if variant.weight != 0]
        if abs(rest) > CLOSE:
            self._variants.append(Variant(rest))
        self._weights = [variant.weight for variant in self._variants]

    def require_sampling(self, sampling: Sampling) -> None:
        """ConfigError for settings that the base does not take, and for a window that holds none of the steps."""
        self.generator.require_sampling(sampling)
        self.steps(sampling.steps)

    def steps(self, count: int) -> range:
        """The steps of a chain of `count` in which the mixture acts."""
        return self.mixture.window.on(count)

    @contextmanager
    def acting(self, now: Callable[[], bool]) -> Iterator[None]:  # noqa: ARG002 - for mixtures of predictions
        """Within it the base's network is the mixture's wherever `now()`."""
        yield

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> Tensor:
        """As the base's `generate`; with a window, embeddings cost one more step of the network."""
        clocks = counted_steps(self.generator.pipeline)
        with clocks as clock, self.acting(lambda: clock.index in self.steps(clock.total)):
            return self.generator.generate(prompts, seeds, sampling)


class EmbeddingMixture(MixedGenerator):
    """sum_i w_i T_i(p) in the window's steps, T_base(p) in the others: the base's conditioner, mixed."""

    def __init__(self, generator: PipelineGenerator, mixture: Mixture, variants: Sequence[Variant]) -> None:
        super().__init__(generator, mixture, variants)
        self._encode = generator.pipeline.encode_prompt
        generator.conditioner.mix(self._mixed_encode, mixture.window)

    def _mixed_encode(self, *arguments: Any, **named: Any) -> Any:
        results = []
        for variant in self._variants:
            # Some pipelines write their template into the list of prompts, so each member gets a list of its own.
            positional, keywords = tree_map(lambda leaf: leaf, (arguments, named))
            with self._encoders_of(variant):
                results.append(self._encode(*positional, **keywords))
        return mixed(results, self._weights)

    @contextmanager
    def _encoders_of(self, variant: Variant) -> Iterator[None]:
        pipeline = self.generator.pipeline
        before = {name: pipeline.components[name] for name in variant.modules or ()}
        adapted = [part for part in self.generator.conditioner.encoders.values() if lora.lora_layers(part)]
        pipeline.register_modules(**(variant.modules or {}))
        try:
            for part in adapted:
                lora.activate(part, {variant.adapter: 1.0} if variant.adapter in lora.adapter_names(part) else {})
            yield
        finally:
            pipeline.register_modules(**before)
            for part in adapted:
                lora.activate(part, {})


class PredictionMixture(MixedGenerator):
    """sum_i w_i eps_i(x_t, t, c) in the window's steps, eps_base in the others; a step calls every member's network."""

    @override
    @contextmanager
    def acting(self, now: Callable[[], bool]) -> Iterator[None]:
        own = {name: part for name, part in self.generator.pipeline.components.items() if isinstance(part, nn.Module)}
        with ExitStack() as mixing:
            for name in self.mixture.base_fingerprint:
                mixing.enter_context(self._mixed_network(name, own[name], now))
            yield

    @contextmanager
    def _mixed_network(self, component: str, net: Any, now: Callable[[], bool]) -> Iterator[None]:
        """Within it `net(...)` is the mixture of the members' networks wherever `now()`."""
        layers, forward = lora.lora_layers(net), net.forward

        def member(variant: Variant, *arguments: Any, **named: Any) -> Any:
            module = variant.module(component, net)
            for layer in layers:  # as `lora.activate`, without a walk over all modules in every call
                vars(layer)["_active_adapter"] = [variant.adapter] if variant.adapter in layer.scaling else []
            return forward(*arguments, **named) if module is net else module(*arguments, **named)

        def mixed_forward(*arguments: Any, **named: Any) -> Any:
            if not now():
                return member(Variant(1.0), *arguments, **named)
            outputs = [member(variant, *arguments, **named) for variant in self._variants]
            first = mixed([output[0] for output in outputs], self._weights)
            return (first, *outputs[0][1:]) if isinstance(outputs[0], tuple) else type(outputs[0])(first)

        with replaced(net, forward=mixed_forward):
            yield


def mixed(values: Sequence[Any], weights: Sequence[float]) -> Any:
    """sum_i w_i values_i of tensors, in nested lists and tuples; what is equal in all (masks, positions) stays.

    `weights` sum to 1. Raises AdapterError for tensors of different shapes, and for integers that differ: other tokens.
    """
    first = values[0]
    if isinstance(first, list | tuple):
        if len({len(value) for value in values}) > 1:
            raise AdapterError("the members' text encoders give different numbers of tensors; they cannot be mixed")
        return type(first)([mixed(parts, weights) for parts in zip(*values, strict=True)])
    if not isinstance(first, Tensor) or all(value is first for value in values):
        return first
    shapes = [list(value.shape) for value in values]
    if any(shape != shapes[0] for shape in shapes):
        raise AdapterError(f"the members give tensors of different shapes, {shapes}; they cannot be mixed")
    if len(values) > 1 and all(torch.equal(value, first) for value in values[1:]):
        return first
    if not first.is_floating_point():
        raise AdapterError("the members' text encoders read other tokens of the same prompt; they cannot be mixed")
    wide = torch.promote_types(first.dtype, torch.float32)
    total = sum(weight * value.to(wide) for weight, value in zip(weights, values, strict=True))
    return torch.as_tensor(total).to(first.dtype)
