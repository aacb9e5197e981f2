"""What the page of `alignkit studio` asks for: an image of a mixture beside the base's, scores, the export."""

from __future__ import annotations

import functools
import math
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from alignkit.adapters.merging import CLOSE
from alignkit.adapters.mixture import BASE
from alignkit.commands.frontier import read_frontier
from alignkit.commands.specs import RewardBuilders, load_policy, require_names
from alignkit.commands.studio.job import StudioJob
from alignkit.diffusion.tuned_steps import ALL_STEPS, TunedSteps
from alignkit.errors import AlignKitError, ConfigError
from alignkit.generators.live import LiveMix, Recipe, Space
from alignkit.generators.members import Base, read_member, require_one_base
from alignkit.generators.soups import make_mixture, make_soup, require_new
from alignkit.generators.switching import counted_steps
from alignkit.locks import locked
from alignkit.media import checked_pixels, quantise, to_pixels
from alignkit.paths import require_plain_names
from alignkit.protocols import as_scores, require_independent, require_modality
from alignkit.records import Prompt

if TYPE_CHECKING:
    from alignkit.evaluation.frontier import Frontier
    from alignkit.protocols import Reward

Tell = Callable[[float, str], None]  # how far the work is, in [0, 1], and what is done
_KEPT = 8  # images of the base


def _is_number(value: Any) -> bool:
    """An emptied field of the page is None."""
    return isinstance(value, int | float) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class Side:
    """An image [H, W, 3] (a video: [F, H, W, 3]), uint8, and its score by each reward: NaN with a reason in `notes`."""

    image: np.ndarray
    scores: Mapping[str, float]
    notes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Shot:
    """The base's side and the mixture's, of one prompt and seed."""

    recipe: Recipe
    prompt: str
    seed: int
    base: Side
    mix: Side


class Session:
    """The loaded base, members and rewards of a studio. One image or export at a time, whatever thread asks."""

    def __init__(self, job: StudioJob, live: LiveMix, rewards: Mapping[str, Reward], frontier: Frontier | None) -> None:
        self.job, self.live, self.rewards, self.frontier = job, live, rewards, frontier
        self._working = threading.Lock()
        self._base = functools.lru_cache(_KEPT)(self._base_side)
        self._tell: Tell = lambda *_: None

    @classmethod
    def open(cls, job: StudioJob, say: Callable[[str], None]) -> Session:
        """Load all of `job`; `say` reports each part. Raises what wrong models, members and rewards raise."""
        base = Base.open(job.base.model, job.base.family)
        members = {name: read_member(path, base) for name, path in job.members.items()}
        frontier = None
        if job.frontier is not None:
            say(f"reading the frontier in {job.frontier}")
            frontier = read_frontier(job.frontier)
            require_names(list(frontier.members), job.members, kind="member", key=f"the frontier in {job.frontier}")
        say(f"checking that {', '.join(members)} were trained from {base.model}")
        require_one_base(list(members.values()), base)
        say(f"loading {base.model}")
        generator = load_policy("base", job.base)
        generator.require_sampling(job.sampling)
        live = LiveMix(generator, base, members)
        if job.rewards:
            say(f"loading the rewards {', '.join(job.rewards)}")
        rewards = {name: builder() for name, builder in RewardBuilders(job.rewards).items()}
        require_independent(rewards)
        require_modality(rewards, "video" if job.sampling.num_frames > 1 else "image")
        return cls(job, live, rewards, frontier)

    def recipe(self, space: Space, weights: Mapping[str, Any], steps: Sequence[Any], *, rest: bool) -> Recipe:
        """The mixture of what the page holds; with `rest` the base has what is missing to 1, else nothing.

        `steps` are the first of the window, and the first after it; weights are mixed in all. Raises ConfigError.
        """
        given = {}
        for name, weight in weights.items():
            if not _is_number(weight):
                raise ConfigError(f"the weight of {name} is {weight}; give a number")
            given[name] = float(weight)
        if rest:
            given[BASE] = round(1 - math.fsum(given.values()), 9)
        elif abs(math.fsum(given.values()) - 1) > CLOSE:
            total = math.fsum(given.values())
            raise ConfigError(f"the weights sum to {total:g}, not to 1; correct them, or let the base have the rest")
        if not all(map(_is_number, steps)):
            raise ConfigError(f"the window is {list(steps)}; give two numbers of steps")
        count = self.job.sampling.steps
        window = ALL_STEPS if space == "weights" else TunedSteps(steps[0] / count, steps[1] / count)
        recipe = Recipe(space=space, weights=given, window=window)
        self.live.require(recipe, self.job.sampling)
        return recipe

    def shot(self, recipe: Recipe, prompt: str, seed: Any, tell: Tell) -> Shot:
        """The image of `recipe` and the base's, with their scores. Raises ConfigError for an empty prompt or no seed.

        Raises what the generator raises; what a reward raises is a note.
        """
        known = Prompt.from_text(prompt)
        if not known.text:
            raise ConfigError("the prompt is empty; write what the image shows")
        if not _is_number(seed) or seed != int(seed) or not 0 <= seed < 2**63:
            raise ConfigError(f"the seed is {seed}; give a whole number from 0 on")
        with self._working:
            self._tell = tell
            base = self._base(known.text, int(seed))
            mix = self._side("mixture", recipe, known, int(seed)) if recipe.used else base
        return Shot(recipe, known.text, int(seed), base, mix)

    def _base_side(self, text: str, seed: int) -> Side:
        nothing = Recipe(space="weights", weights={BASE: 1.0})
        return self._side("base", nothing, Prompt.from_text(text), seed)

    @torch.no_grad()
    def _side(self, label: str, recipe: Recipe, prompt: Prompt, seed: int) -> Side:
        self._tell(0.0, f"{label}: loading")

        def stepped() -> None:
            done = f"{label}: step {clock.index + 1} of {clock.total}"
            self._tell((clock.index + 1) / max(1, clock.total), done)

        try:
            with counted_steps(self.live.generator.pipeline, stepped) as clock:
                pixels = self.live.generate(recipe, [prompt.text], [seed], self.job.sampling)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                "the accelerator's memory is full; sample smaller images, or with fewer members"
            ) from error
        stored = quantise(checked_pixels(pixels, 1, f"the {label}"))
        scores, notes = {}, {}
        for name, reward in self.rewards.items():
            self._tell(1.0, f"{label}: {name}")
            try:
                scores[name] = self._score(name, reward, to_pixels(stored).to(pixels.device), prompt)
            except AlignKitError as error:
                scores[name], notes[name] = math.nan, str(error)
        return Side(stored[0], scores, notes)

    def _score(self, name: str, reward: Reward, media: Tensor, prompt: Prompt) -> float:
        return float(as_scores(reward(media, [prompt]), name, 1).total.double().item())

    def command(self, recipe: Recipe, out: Path) -> str:
        """The command that makes the same mixture."""
        used = {name: weight for name, weight in recipe.weights.items() if weight != 0}
        words = ["alignkit", "soup", "--members", *(self.job.members.get(name, name) for name in used)]
        words += ["--weights", *map(repr, used.values()), "--base", self.job.base.model, "--space", recipe.space]
        words += ["--window", *map(repr, recipe.window.bounds)] if recipe.window.bounds else []
        words += ["--family", self.job.base.family] if self.job.base.family else []
        return shlex.join([*words, "--out", str(out)])

    def export(self, recipe: Recipe, name: str) -> tuple[Path, str]:
        """Write the mixture into the new folder OUT/`name`; returns it, and the command that makes the same.

        Raises ConfigError for a name that is no plain one, StorageError where the folder holds something, AdapterError
        for the base alone.
        """
        require_plain_names([name], "export")
        out = self.job.out / name
        used = {member: weight for member, weight in recipe.weights.items() if weight != 0}
        parts = (self.live.base, [self.live.members[member] for member in used], list(used.values()), out)
        if not recipe.used:
            raise ConfigError("all weights but the base's are 0, so there is nothing to export")
        require_new(out)
        with self._working, locked(out):
            if recipe.space == "weights":
                make_soup(*parts)
            else:
                make_mixture(*parts, space=recipe.space, window=recipe.window)
        return out, self.command(recipe, out)
