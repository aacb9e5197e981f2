"""The sections that every job with a policy has: prompts, generators, rewards; base of the kinds of data in `data`.

No slots: a class of a run's config inherits from one of these and from `RunJob`, and slots would not combine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkit.commands.specs import GeneratorSpec, PromptsConfig, RewardSpec, require_names
from alignkit.commands.training_data import PromptShares, TrainingData
from alignkit.errors import ConfigError
from alignkit.records import Prompt


@dataclass(frozen=True, kw_only=True)
class PolicyJob:
    """A generator that is aligned on prompts alone, and the rewards that score the result; base of the other jobs.

    out: the folder of the run; run again, it continues.
    prompts: where prompts come from; the held-out share is kept for validation and evaluation.
    generators: the generators by a name of your choice.
    rewards: all rewards by a name of your choice; the evaluation uses every one of them.
    policy: which generator is aligned.
    gold: the held-out reward that measures the result; it must not be used before.
    """

    out: Path
    prompts: PromptsConfig
    generators: Mapping[str, GeneratorSpec]
    rewards: Mapping[str, RewardSpec]
    policy: str
    gold: str | None = None

    def __post_init__(self) -> None:
        require_names([self.policy], self.generators, kind="generator", key="policy")
        self.check_judges("gold", [])

    def check_judges(self, key: str, names: Sequence[str]) -> None:
        """Names in `key` must be rewards, and none of them gold."""
        require_names([*names, *([self.gold] if self.gold else [])], self.rewards, kind="reward", key=key)
        if self.gold in names:
            raise ConfigError(
                f"gold is '{self.gold}', which is also in {key}; gold must not be used before the evaluation"
            )

    @property
    def trains_on_prompts(self) -> bool:
        """Whether training needs prompts. Where it does not, held_out: 0 gives all of them to the evaluation."""
        return True

    @property
    def aligned(self) -> GeneratorSpec:
        """The generator that is aligned."""
        return self.generators[self.policy]

    @property
    def held_out_advice(self) -> str:
        """Empty where training has held-out rows without `validation`; else how to get them, the end of a sentence."""
        return ", whose prompts the held-out loss uses too"

    def share_prompts(self, shown: int) -> PromptShares:
        """The prompts by use, the first `shown` held-out ones for validation. Raises ConfigError for an empty share."""
        train, held_out = self.split_prompts()
        shares = PromptShares(train=train, validation=held_out[:shown], evaluation=held_out[shown:])
        if not shares.evaluation or (not train and self.trains_on_prompts):
            amounts = f"{len(train)} for training, {shown} for validation, {len(shares.evaluation)} for evaluation"
            raise ConfigError(f"{self.prompts} give {amounts}; give more prompts or change prompts.held_out")
        return shares

    def split_prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """Training prompts, and prompts for validation and evaluation."""
        has_split = self.trains_on_prompts or self.prompts.held_out
        return self.prompts.split() if has_split else ([], self.prompts.read())

    def data_plan(self) -> list[str]:
        """Lines of a dry run about the training data."""
        return [f"data: the training share of {self.prompts}"]

    def make_data(self, shares: PromptShares) -> TrainingData:
        """The training data, made where it has to be."""
        return TrainingData(kind="prompts", prompts=(shares.train, shares.validation))

    def prepared(self, shares: PromptShares) -> PromptShares:
        """The prompts with what rewards read beside the text (questions), after `make_data`."""
        return shares
