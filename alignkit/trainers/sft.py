"""Supervised fine-tuning: the plain denoising objective, on winners or on any captioned images or videos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import ConfigError
from alignkit.records import LossOutput
from alignkit.trainers.config import OfflineConfig
from alignkit.trainers.offline import OfflineTrainer


@dataclass
class SFTConfig(OfflineConfig):
    """`candidates` chooses which candidates of a ranked row are trained on."""

    candidates: str = field(default="winner", metadata={"help": "winner (highest phi) or all."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates not in ("winner", "all"):
            raise ConfigError(f"candidates is '{self.candidates}'; use winner or all")


class SFTTrainer(OfflineTrainer):
    """Mean squared error of the native target (eps, v or velocity; see `error_space`); loss [P]."""

    args: SFTConfig

    def method_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> LossOutput:
        if self.args.candidates == "winner":
            batch = winners(batch)
        error_PK = self.errors(model, batch)
        return LossOutput(error_PK.mean(-1), {"error": error_PK.mean().detach()})


def winners(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The batch with each row's best candidate alone (K = 1)."""
    best_P = batch["phi"].argmax(-1)
    rows = torch.arange(len(best_P), device=best_P.device)
    per_candidate = {name: batch[name][rows, best_P].unsqueeze(1) for name in ("latents", "noise", "t", "phi")}
    return {**batch, **per_candidate}
