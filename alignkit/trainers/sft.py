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

MAX_WEIGHT = 20.0


@dataclass
class SFTConfig(AlignConfig):
    """`candidates` chooses which pictures of a ranked row are learnt from."""

    candidates: str = field(default="winner", metadata={"help": "winner (highest phi) or all."})
    error_space: str = field(
        default="native",
        metadata={"help": "native, or velocity: weigh an eps network's errors as a v network's, for layouts' sake."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates not in ("winner", "all"):
            raise ConfigError(f"candidates is '{self.candidates}'; use winner or all")
        if self.error_space not in ("native", "velocity"):
            raise ConfigError(f"error_space is '{self.error_space}'; use native or velocity")


class SFTTrainer(AlignTrainer):
    """Mean squared error of the native target (eps, v or velocity); loss [P].

    With `error_space="velocity"` an eps network's squared error is divided by alpha(t)^2, which makes it that of
    v = alpha eps - sigma x0 (Salimans & Ho, arXiv 2202.00512, section 4): the plain eps error hardly weighs high noise,
    where layouts are decided. The weight is held at MAX_WEIGHT, as next to pure noise it grows past 200.
    """

    args: SFTConfig

    def method_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self.args.candidates == "winner":
            batch = winners(batch)
        error_PK = self.errors(model, batch)
        if self.args.error_space == "velocity" and self.generator.prediction == "epsilon":
            alpha_PK, _ = self.generator.noise_schedule.coefficients(batch["t"])
            error_PK = error_PK * alpha_PK.square().reciprocal().clamp(max=MAX_WEIGHT)
        return error_PK.mean(-1), {"error": error_PK.mean()}


def winners(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The batch with each row's best candidate alone (K = 1)."""
    best_P = batch["phi"].argmax(-1)
    rows = torch.arange(len(best_P), device=best_P.device)
    per_candidate = {name: batch[name][rows, best_P].unsqueeze(1) for name in ("latents", "noise", "t", "phi")}
    return {**batch, **per_candidate}
