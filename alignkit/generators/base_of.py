"""The base side of a comparison without a second model in memory: the policy with its adapter switched off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.records import Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.generators.pipeline import PipelineGenerator


@dataclass(frozen=True, slots=True)
class BaseOf:
    """A policy with its adapter switched off, as an `ImageSource` of its own."""

    name: str
    policy: PipelineGenerator

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> Tensor:
        """Pixels [B, 3, H, W] (or [B, F, 3, H, W]) in [0, 1] of the base model."""
        with self.policy.reference():
            return self.policy.generate(prompts, seeds, sampling)
