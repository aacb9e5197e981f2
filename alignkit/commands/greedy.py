"""The choice of a greedy soup: candidates draw images, a reward scores them, and the best candidate's weights result.

    WORK/0, WORK/1, ...       each member alone, by its place in the list
    WORK/0-2, ...             members in equal shares
    WORK/NAME/images          what the candidate drew, with scores
    WORK/NAME/finished.json   its mean score

A candidate's score is kept, so the command may be stopped and given again. A candidate itself is made when it is needed
and removed once it is scored. Deliberately not here: in which order candidates are tried (`adapters.merging`) and how
members are mixed (`alignkit.generators.soups`).
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from alignkit.adapters.mixture import BASE, is_mixture
from alignkit.claims import claim
from alignkit.commands.specs import GeneratorSpec, PromptsConfig, RewardBuilders, RewardSpec, build_generator
from alignkit.commands.verb import finished, mark_finished
from alignkit.errors import ConfigError, NumericsError
from alignkit.evaluation.paired import EvaluateConfig, score_alone
from alignkit.locks import locked
from alignkit.protocols import Reward
from alignkit.provenance import comparable, content
from alignkit.records import Prompt

REWARD = "reward"  # its name in the candidates' files
Write = Callable[[Sequence[float], Path], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class GreedyConfig:
    """How the candidates of a greedy soup are scored.

    prompts: where prompts come from; the share that is not held out is used (all of them with held_out: 0), because a
        result is judged on prompts that did not choose it.
    reward: its mean over prompts and seeds is the score of a candidate.
    evaluate: how images are generated.
    dtype: the precision of the base meanwhile.
    work: where candidates' images and scores are kept (default: beside the result, NAME-greedy).
    """

    prompts: PromptsConfig
    reward: RewardSpec
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    work: Path | None = None

    def asked(self) -> list[Prompt]:
        """The prompts that candidates are scored on. Raises what their source raises, ConfigError if there are none."""
        found = self.prompts.split()[0]
        if not found:
            raise ConfigError(f"greedy: all prompts of {self.prompts} are held out; lower prompts.held_out")
        return found


@dataclass(frozen=True, slots=True)
class Candidates:
    """The candidates of one greedy soup.

    work: the folder of their images and scores. write: makes the mixture of weights [members] in a new folder. how:
    what else a mixture depends on, as YAML-ready values.
    """

    config: GreedyConfig
    base: GeneratorSpec
    members: Sequence[str]
    work: Path
    write: Write
    how: Mapping[str, Any]

    def choose(self) -> list[float]:
        """The weights of the best one. Raises ConfigError where that is the base alone, and as `score` does."""
        from alignkit.adapters.merging import greedy_weights

        prompts, reward = self.config.asked(), functools.cache(self._reward)
        count = len(self.members)
        with tqdm(total=2 * count - 1, unit="candidate") as bar:

            def score(weights: Sequence[float]) -> float:
                bar.set_postfix_str(self.name(weights))
                value = self.score(weights, prompts, reward)
                bar.update()
                bar.write(f"{value:.6g}  {self.names(weights)}")
                return value

            chosen = greedy_weights(count, score)
        if all(self.members[number] == BASE for number in used(chosen)):
            raise ConfigError(
                f"no member raises the score above that of the base alone; the scores are in '{self.work}'. Leave out "
                "`base` to get the best of the members"
            )
        return chosen

    def score(self, weights: Sequence[float], prompts: Sequence[Prompt], reward: Callable[[], Reward]) -> float:
        """The mean score of a candidate; one that is finished is read back and loads nothing.

        Raises ResumeError over a folder of other members, prompts or settings, NumericsError for scores that are not
        finite.
        """
        folder = self.work / self.name(weights)
        inputs = {f"member {number}": content(self.members[number]) for number in used(weights)}
        inputs |= {"base": self.base.identity, REWARD: self.config.reward.identity}
        with locked(folder):
            claim(folder, {"inputs": inputs, "config": {"mixture": self.how, "greedy": comparable(self.config)}})
            note = finished(folder)
            if note is not None:
                return float(note["score"])
            spec = self._spec(weights, folder / "mixture")
            source, rewards = build_generator(self.name(weights), spec), {REWARD: reward()}
            drawn = score_alone(source, prompts, self.config.evaluate, folder, rewards=rewards, inputs=inputs)
            shutil.rmtree(folder / "mixture", ignore_errors=True)
            value = self._mean(drawn[REWARD], weights, folder)
            mark_finished(folder, {"score": value, "members": [self.members[number] for number in used(weights)]})
            return value

    def _spec(self, weights: Sequence[float], mixture: Path) -> GeneratorSpec:
        """The base with the candidate, which is made where it is missing."""
        if all(self.members[number] == BASE for number in used(weights)):
            return self.base
        if not is_mixture(mixture):  # its record is written last
            shutil.rmtree(mixture, ignore_errors=True)
            self.write(weights, mixture)
        return replace(self.base, adapter=mixture)

    def _reward(self) -> Reward:
        return RewardBuilders({REWARD: self.config.reward})[REWARD]()

    def _mean(self, scores: Any, weights: Sequence[float], folder: Path) -> float:
        bad = int((~np.isfinite(scores)).sum())
        if bad:
            raise NumericsError(
                f"reward '{self.config.reward.reward}' is NaN or infinite on {bad} of {len(scores)} images of "
                f"{self.names(weights)}, in '{folder}': its mean says nothing. Correct the reward, and give another "
                "greedy.work or remove that folder"
            )
        return float(np.mean(scores))

    def name(self, weights: Sequence[float]) -> str:
        """Of a candidate's folder."""
        return "-".join(map(str, used(weights)))

    def names(self, weights: Sequence[float]) -> str:
        """A candidate's members."""
        return " + ".join(self.members[number] for number in used(weights))


def used(weights: Sequence[float]) -> list[int]:
    """The places of the members with a weight."""
    return [number for number, weight in enumerate(weights) if weight != 0]
