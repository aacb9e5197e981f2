"""A base with all members of a mixture loaded, so that every image may have other weights without loading a model.

    weights               LoRAs: the weight of each is a factor of its scale; whole components: the soup is computed
                          into a spare copy of the base's
    embedding, prediction as in `alignkit.generators.mixtures`, in a window of steps

Images are those of the mixture that `alignkit.generators.soups` writes with equal weights, but for rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alignkit.adapters import lora
from alignkit.adapters.merging import Merge, require_weights
from alignkit.adapters.mixture import BASE, MemberRecord, Mixture
from alignkit.diffusion.tuned_steps import ALL_STEPS, TunedSteps
from alignkit.errors import AdapterError, ConfigError
from alignkit.generators.components import is_computed
from alignkit.generators.members import Base, Member, plain_name
from alignkit.generators.mixtures import EmbeddingMixture, MixedGenerator, PredictionMixture, Variant, put_member
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.generators.soups import Mix, component_soup, require_space
from alignkit.records import Sampling

Space = Literal["weights", "embedding", "prediction"]
_KINDS: Mapping[str, type[MixedGenerator]] = {"embedding": EmbeddingMixture, "prediction": PredictionMixture}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A mixture: the space, weights by the members' names (`base` among them), and the steps in which it acts."""

    space: Space
    weights: Mapping[str, float]
    window: TunedSteps = ALL_STEPS

    @property
    def used(self) -> dict[str, float]:
        """The weights that are not 0, without that of the base."""
        return {name: weight for name, weight in self.weights.items() if weight != 0 and name != BASE}


class LiveMix:
    """An image source of changing mixtures; `generator` is the freshly loaded base, not to be used otherwise.

    A LoRA needs the memory of its own weights. A member with whole components needs that of the components from the
    first mixture of embeddings or predictions on, and all such members share one spare copy of each component.
    """

    def __init__(self, generator: PipelineGenerator, base: Base, members: Mapping[str, Member]) -> None:
        """Raises AdapterError for a member that does not fit `generator`."""
        self.generator, self.base = generator, base
        self.members = {**members, BASE: Member(name=BASE)}
        own = generator.pipeline.components
        for name, member in members.items():
            absent = [component for component in member.components if own.get(component) is None]
            if absent:
                raise AdapterError(f"member '{name}' has a {absent[0]}, which '{base.model}' was loaded without")
            if generator.is_quantized and generator.component in member.weights:
                raise AdapterError(f"member '{name}' has a whole {generator.component}: leave out quantize")
        whole = {component for member in members.values() for component in member.weights}
        self._spare: dict[str, nn.Module] = {component: copy.deepcopy(own[component]) for component in whole}
        self._filled: dict[str, Recipe] = {}
        self._variants: dict[str, Variant] = {BASE: Variant(1.0)}
        self._adapted = sorted({component for member in members.values() for component in member.loras})
        for name in members:
            if members[name].loras:
                self._variant(name)
        self._switch_off()

    def require(self, recipe: Recipe, sampling: Sampling) -> None:
        """ConfigError for weights or a window that no mixture has, AdapterError for members of another space."""
        require_weights(list(recipe.weights.values()), any_sum=False)
        if recipe.space != "weights":
            require_space([self.members[name] for name in recipe.used], recipe.space)
            recipe.window.on(sampling.steps)
        elif recipe.window != ALL_STEPS:
            raise ConfigError("a window is for embedding and prediction; mixed weights act in all steps")

    def generate(self, recipe: Recipe, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> Tensor:
        """Pixels [B, 3, H, W] (or [B, F, 3, H, W]) in [0, 1] of `recipe`; of the base where all other weights are 0.

        Raises what `require` and the generator raise.
        """
        self.require(recipe, sampling)
        if not recipe.used:
            return self.generator.generate(prompts, seeds, sampling)
        if recipe.space == "weights":
            with self._souped(recipe):
                return self.generator.generate(prompts, seeds, sampling)
        try:
            return self._mixed(recipe).generate(prompts, seeds, sampling)
        finally:
            self.generator.conditioner.unmix()
            self._switch_off()

    def _variant(self, name: str) -> Variant:
        if name not in self._variants:
            self._variants[name] = put_member(self.generator, self.members[name], 1.0, len(self._variants))
        return self._variants[name]

    def _mixed(self, recipe: Recipe) -> MixedGenerator:
        used = {**recipe.used, BASE: recipe.weights.get(BASE, 0.0)}
        changed = dict.fromkeys(component for name in used for component in self.members[name].components)
        record = Mixture(
            space=recipe.space,
            base=self.base.model,
            base_fingerprint=dict.fromkeys(changed, ""),  # of which the names alone are used
            members=tuple(MemberRecord(name=name) for name in used),
            weights=tuple(used.values()),
            window=recipe.window,
        )
        variants = [replace(self._variant(name), weight=weight) for name, weight in used.items()]
        return _KINDS[recipe.space](self.generator, record, variants)

    # --- weights ---

    @contextmanager
    def _souped(self, recipe: Recipe) -> Iterator[None]:
        """Within it the pipeline's components are those of the soup."""
        used, pipeline = recipe.used, self.generator.pipeline
        whole = dict.fromkeys(component for name in used for component in self.members[name].weights)
        before = {component: pipeline.components[component] for component in whole}
        for component in self._adapted:
            active = {
                self._variants[name].adapter: used[name] for name in used if component in self.members[name].loras
            }
            lora.activate(pipeline.components[component], active)
        try:
            pipeline.register_modules(**{component: self._soup(component, recipe) for component in whole})
            yield
        finally:
            pipeline.register_modules(**before)
            self._switch_off()

    @torch.no_grad()
    def _soup(self, component: str, recipe: Recipe) -> nn.Module:
        """The spare copy with the weights of the soup, LoRAs included."""
        spare = self._spare[component]
        if self._filled.get(component) != recipe:
            members = [self.members[name] for name in recipe.weights]
            mixed = component_soup(Mix(self.base, members, list(recipe.weights.values()), Merge()), component)
            places = {plain_name(name): name for name in mixed.names}
            state: dict[str, Any] = spare.state_dict()
            unknown = [name for name in state if plain_name(name) not in places and not is_computed(name)]
            if unknown:
                raise AdapterError(
                    f"the files of '{self.base.model}' have no weight '{unknown[0]}' of its {component}: they were "
                    "written by another version of the library. Load the base and save it again"
                )
            self._filled.pop(component, None)
            for name in [name for name in state if plain_name(name) in places]:
                state[name].copy_(mixed.weight(places[plain_name(name)]))
            self._filled[component] = recipe
        return spare

    def _switch_off(self) -> None:
        """All adapters off, each with weight 1 for the next mixture of predictions, which switches them by itself."""
        for component in self._adapted:
            part = self.generator.pipeline.components[component]
            lora.activate(part, dict.fromkeys(lora.adapter_names(part), 1.0))
            lora.activate(part, {})
