"""Supervised fine-tuning: the plain denoising objective, on winners or on any captioned pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import ConfigError
from alignkit.trainers.base import AlignTrainer
from alignkit.trainers.config import AlignConfig


@dataclass
class SFTConfig(AlignConfig):
    """`candidates` chooses which pictures of a ranked row are learnt from."""

    candidates: str = field(default="winner", metadata={"help": "winner (highest phi) or all."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates not in ("winner", "all"):
            raise ConfigError(f"candidates is '{self.candidates}'; use winner or all")


class SFTTrainer(AlignTrainer):
    """Mean squared error of the native target (eps, v or velocity; see `error_space`); loss [P]."""

    args: SFTConfig

    def method_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self.args.candidates == "winner":
            batch = winners(batch)
        error_PK = self.errors(model, batch)
        return error_PK.mean(-1), {"error": error_PK.mean()}


def winners(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The batch with each row's best candidate alone (K = 1)."""
    best_P = batch["phi"].argmax(-1)
    rows = torch.arange(len(best_P), device=best_P.device)
    per_candidate = {name: batch[name][rows, best_P].unsqueeze(1) for name in ("latents", "noise", "t", "phi")}
    return {**batch, **per_candidate}
