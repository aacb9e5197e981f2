"""What `alignkit studio` is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from alignkit.adapters.mixture import BASE
from alignkit.commands.specs import GeneratorSpec, RewardSpec, require_names
from alignkit.diffusion.tuned_steps import TunedSteps
from alignkit.errors import ConfigError
from alignkit.records import Sampling

PORT = 8766


@dataclass(frozen=True, kw_only=True, slots=True)
class StudioJob:
    """Try mixtures of reward-tuned members on a page in the browser.

    base: the model that all members were trained from.
    members: by a name of your choice the result of a training: a LoRA, or a folder of text encoders or denoisers.
    weights: at the start, by the members' names; default: equal ones. The base has the rest to 1.
    space: what is mixed at the start: weights, embedding (of text encoders) or prediction (of denoisers).
    window: start and stop of the steps in which an embedding or prediction mixture acts at the start, as in `alignkit
        soup`.
    prompt: of the images at the start.
    seed: of the images at the start.
    sampling: how images are generated.
    rewards: what scores them, by a name of your choice.
    frontier: the folder of an `alignkit frontier` of the same members, by the same names.
    out: the folder that exported mixtures go into.
    port: of the page, on 127.0.0.1; 0 takes a free one.
    """

    base: GeneratorSpec
    members: Mapping[str, str]
    weights: Mapping[str, float] = field(default_factory=dict)
    space: Literal["weights", "embedding", "prediction"] = "weights"
    window: tuple[float, float] | None = None
    prompt: str
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    rewards: Mapping[str, RewardSpec] = field(default_factory=dict)
    frontier: Path | None = None
    out: Path
    port: int = PORT

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port is {self.port}; give a number below 65536, such as {PORT}")
        if self.base.is_own or self.base.adapter is not None or self.base.encoder is not None:
            raise ConfigError("base: give a diffusers model without adapter and encoder; those are members")
        if not self.members or BASE in self.members:
            raise ConfigError(f"members: {list(self.members)}; give at least one, by another name than '{BASE}'")
        require_names(list(self.weights), self.members, kind="member", key="weights")
        self.steps  # noqa: B018 - raises for a window without a step

    @property
    def steps(self) -> range:
        """The steps of the window at the start."""
        return TunedSteps.between(self.window).on(self.sampling.steps)

    @property
    def start(self) -> dict[str, float]:
        """The weight of each member at the start."""
        equal = round(1 / len(self.members), 2)
        return {name: float(self.weights.get(name, 0.0 if self.weights else equal)) for name in self.members}
