"""Trainers: `AlignTrainer` on `transformers.Trainer`, and one thin file per method; `METHODS` is their table.

A new method is one file and one line here: see docs/add_a_method.md. Importing this module loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Method:
    """Where a training method lives and what data it takes.

    `config` and `trainer` are "module:attribute" of its config and trainer classes. `data` is the kind of its data:
    "ranked" (rows of K ranked candidates), "dense" (pairs with labels per segment), "aspects" (prompts with questions),
    "prompts" (prompts alone) or "captions" (prompts, or rows of a prompt and its image or video). `summary` is the line
    of the command's help.
    """

    config: str
    trainer: str
    data: str
    summary: str


METHODS = {
    "rankdpo": Method(
        "alignkit.trainers.rankdpo:RankDPOConfig",
        "alignkit.trainers.rankdpo:RankDPOTrainer",
        "ranked",
        "Align a generator with ranked candidates; run again, it continues from a checkpoint.",
    ),
    "sft": Method(
        "alignkit.trainers.sft:SFTConfig",
        "alignkit.trainers.sft:SFTTrainer",
        "ranked",
        "Train a generator with the plain denoising objective, on winners or on all candidates.",
    ),
    "densedpo": Method(
        "alignkit.trainers.densedpo:DenseDPOConfig",
        "alignkit.trainers.densedpo:DenseDPOTrainer",
        "dense",
        "Align a video generator with pairs of clips whose segments are labelled (DenseDPO, Flow-DPO, SFT on winners).",
    ),
    "reward_flow": Method(
        "alignkit.trainers.reward_flow:RewardConfig",
        "alignkit.trainers.reward_flow:RewardTrainer",
        "prompts",
        "Raise differentiable rewards by their gradients through the denoising chain (ReFL, DRaFT, AlignProp, DRTune).",
    ),
    "drf": Method(
        "alignkit.trainers.drf:DRFConfig",
        "alignkit.trainers.drf:DRFTrainer",
        "aspects",
        "Raise a vision-language model's answers to each prompt's questions by their gradients (Diffusion-DRF).",
    ),
    "textcraftor": Method(
        "alignkit.trainers.textcraftor:TextCraftorConfig",
        "alignkit.trainers.textcraftor:TextCraftorTrainer",
        "captions",
        "Train text encoders, the denoiser frozen, by the gradients of rewards of the images (TextCraftor).",
    ),
}
