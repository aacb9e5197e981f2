"""Diffusion-DRF: reward gradients of a vision-language model's answers to questions about each prompt.

Wang et al. 2026, arXiv 2601.04153. The critic is the reward `yes_no` or `explanation`, by default under the name
`critic`; it reads the questions of each prompt. Which steps carried gradients in the paper is not known; the abstract
says the final ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from alignkit.aspects import questions_of
from alignkit.diffusion.steps import Steps
from alignkit.errors import ConfigError, DataError
from alignkit.generators.rollout import StepHook, keyed_sources
from alignkit.generators.state_gradients import LargestGradients, StateGradients
from alignkit.generators.windows import rollout_windows
from alignkit.records import Prompt
from alignkit.trainers.aspect_windows import ByWindow, Window, used, windows_of
from alignkit.trainers.chains import Chains, require_trained
from alignkit.trainers.data import EpochData, PromptData
from alignkit.trainers.reward_flow import RewardConfig, RewardTrainer
from alignkit.trainers.velocity_penalty import both
from alignkit.trainers.weighted_rewards import WeightedRewards


@dataclass
class DRFConfig(RewardConfig):
    """As `RewardConfig`, with the critic as the only reward and gradients through the last three steps."""

    reward_weights: dict[str, float] | None = field(
        default_factory=lambda: {"critic": 1.0},
        metadata={"help": "Weights of the critic and of other rewards, by their names under `rewards`."},
    )
    estimator: str = field(default="draft-3", metadata={"help": "As in the method for any reward."})
    aspect_steps: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Steps with gradients of an aspect's questions, by its name, as in gradient_steps; other questions "
            "use gradient_steps."
        },
    )

    @property
    def windows(self) -> list[Window]:
        """The sets of steps, those of `gradient` first."""
        return windows_of(self.aspect_steps or {}, self.gradient.steps)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aspect_steps and self.gradient.noise_samples:
            raise ConfigError("aspect_steps and noise_samples exclude each other: keep one")
        for window in self.windows:
            replace(self.gradient, steps=window.steps).draw(self.sampling.steps)


class DRFTrainer(RewardTrainer):
    """Trains on prompts with questions (rows with the columns prompt and questions); loss [P].

    With `aspect_steps` the gradient is the sum over the distinct sets of steps, each with its own questions. The cost
    is one backward pass for each set, through reward, decoder and its steps, and its steps forward once more; with
    coupling 0 the denoiser's passes are shared (`generators.windows`). The velocity penalty uses the steps of
    `gradient_steps`. `health/state_gradient/NN` is the largest norm over the sets.

    Raises DataError naming a prompt without questions, ConfigError for an aspect that no question has.
    """

    args: DRFConfig
    _windows: tuple[Window, ...] = ()

    @override
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        args = self.args
        if len(args.windows) > 1:
            own = self._rewards.rewards
            self._windows = tuple(used(args.windows, self.prompts, own, penalised=args.kl_weight > 0))
            proxies = {name: ByWindow(reward, self._windows) for name, reward in own.items()}
            weights = {name: (args.reward_weights or {})[name] for name in args.trained_rewards}
            self._by_window = WeightedRewards(proxies, weights, args.reward_targets or {})
            self._by_window.logged, self._by_window.scores = self._rewards.logged, self._rewards.scores

    @property
    @override
    def _recomputes_rewards(self) -> bool:
        return bool(self._windows) or super()._recomputes_rewards

    @override
    def prepare_data(self, rows: Any, args: Any) -> EpochData | None:
        data = super().prepare_data(rows, args)
        for prompt in data.prompts if isinstance(data, PromptData) else ():
            if not questions_of(prompt):
                raise DataError(
                    f"prompt '{prompt.text}' has no questions; give each row a column `questions`, a list of texts or "
                    "of mappings with a text"
                )
        return data

    @override
    def scored(
        self, chains: Chains, steps: Steps, prompts: list[Prompt]
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, dict[str, Tensor]]]:
        if not (self._windows and torch.is_grad_enabled()):
            return super().scored(chains, steps, prompts)
        grid, count = chains.grid, len(self.generator.grid(self.args.sampling_steps, self._latent_shape))
        key = self.args.noise_seed, self.state.global_step
        plans = [replace(self._estimator, steps=window.steps).draw(count, *key) for window in self._windows]
        gradients = [StateGradients(len(grid), self.args.state_gradient_cap) for _ in plans]
        self._gradients = LargestGradients(gradients)
        penalty = self.penalty(chains, steps)
        hooks: list[StepHook] = [both(gradients[0], penalty), *gradients[1:]]
        options = {"sources": keyed_sources(chains.seeds), **self.options(chains)}
        windows = [plan.steps for plan in plans]
        ends = rollout_windows(self.generator, chains.cond, chains.x, grid, windows, hooks, **options)
        for window, latents in zip(windows, ends, strict=True):
            require_trained(latents, window, self.state.global_step)
        with self._own_precision():
            media = torch.stack([self.decoded(latents) for latents in ends], 1)
            scored = self._by_window(media, prompts)
        return ends[0], None if penalty is None else penalty.mean(), scored
