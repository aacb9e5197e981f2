"""Diffusion-DRF: reward gradients of a vision-language model's answers to questions about each prompt.

Wang et al. 2026, arXiv 2601.04153. The critic is the reward `yes_no`, by default under the name `critic`; it reads the
questions of each prompt. Which steps carried gradients in the paper is not known; the abstract says the final ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from alignkit.errors import DataError
from alignkit.trainers.data import EpochData, PromptData
from alignkit.trainers.reward_flow import RewardConfig, RewardTrainer


@dataclass
class DRFConfig(RewardConfig):
    """As `RewardConfig`, with the critic as the only reward and gradients through the last three steps."""

    reward_weights: dict[str, float] | None = field(
        default_factory=lambda: {"critic": 1.0},
        metadata={"help": "Weights of the critic and of other rewards, by their names under `rewards`."},
    )
    gradient_steps: str | None = field(
        default="last 3", metadata={"help": "As in the method for any reward; null: those of `estimator`."}
    )


class DRFTrainer(RewardTrainer):
    """Trains on prompts with questions (rows with the columns prompt and questions); loss [P].

    Raises DataError naming a prompt without questions.
    """

    args: DRFConfig

    @override
    def prepare_data(self, rows: Any, args: Any) -> EpochData | None:
        data = super().prepare_data(rows, args)
        for prompt in data.prompts if isinstance(data, PromptData) else ():
            if not prompt.metadata.get("questions"):
                raise DataError(
                    f"prompt '{prompt.text}' has no questions; give each row a column `questions`, a list of texts or "
                    "of mappings with a text"
                )
        return data
