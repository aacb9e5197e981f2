"""Trainers: `AlignTrainer` on `transformers.Trainer`, and one thin file per method. `METHODS` is the table of methods.

Importing this package loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Method:
    """A training method.

    config: `package.module:attribute` of its config, a subclass of `AlignConfig`.
    trainer: `package.module:attribute` of its trainer, a subclass of `AlignTrainer`.
    data: the kind of its training data: ranked, dense, aspects or prompts (`alignkit.commands.data.DATA`).
    summary: one line for `alignkit --help`.
    """

    config: str
    trainer: str
    data: str
    summary: str


METHODS = {
    "rankdpo": Method(
        config="alignkit.trainers.rankdpo:RankDPOConfig",
        trainer="alignkit.trainers.rankdpo:RankDPOTrainer",
        data="ranked",
        summary="align a generator with ranked candidates",
    ),
    "sft": Method(
        config="alignkit.trainers.sft:SFTConfig",
        trainer="alignkit.trainers.sft:SFTTrainer",
        data="ranked",
        summary="train a generator with the plain denoising objective",
    ),
}
