"""TextCraftor: a text encoder is trained by rewards of the images that a frozen denoiser generates with its embedding.

Li et al. 2024, arXiv 2403.18978. Of the paper's 25 steps the last 5 carry gradients, and the last 15 use the tuned
embedding when images are generated; the others keep the original one. In training the authors' code uses the tuned
embedding in the steps with gradients alone. The embedding is computed once for each prompt: the steps share it as an
input of their graphs, so the encoders run backward once, whatever the number of steps and rewards.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from alignkit.adapters import lora
from alignkit.diffusion.conversions import split
from alignkit.diffusion.schedules import expand
from alignkit.diffusion.steps import Steps
from alignkit.diffusion.tuned_steps import TunedSteps, fixed_steps
from alignkit.errors import ConfigError
from alignkit.escape import get_logger
from alignkit.evaluation.card import write_card
from alignkit.generators.codec import at_least_float32
from alignkit.generators.rollout import ByStep
from alignkit.generators.switching import Switched, with_null
from alignkit.generators.tuned_encoders import save_tuned
from alignkit.records import Conditioning, LossOutput, Prompt, texts
from alignkit.trainers.chains import Chains
from alignkit.trainers.data_loss import PREFIX
from alignkit.trainers.native_error import DRAWN
from alignkit.trainers.reward_flow import RewardConfig, RewardTrainer
from alignkit.trainers.velocity_penalty import VelocityPenalty

logger = get_logger(__name__)
PROMPT = "prompt"
DIRECT = "direct"
HIGH_RATE = 1e-4  # AdamW on all weights of an encoder: measured to destroy it within 20 to 40 steps


@dataclass
class TextCraftorConfig(RewardConfig):
    """As `RewardConfig`; what is trained are text encoders, with the paper's settings as defaults."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate of AdamW; a LoRA needs more."})
    full_finetune: bool = field(
        default=True, metadata={"help": "Train all weights of the encoders, as in the paper; false: a LoRA."}
    )
    encoders: list[str] | None = field(
        default=None,
        metadata={
            "help": "Which text encoders are trained, by the pipeline's names (text_encoder, text_encoder_2); default: "
            "those that its LoRA loader knows (CLIP), else all."
        },
    )
    variant: str = field(
        default=PROMPT,
        metadata={
            "help": "prompt: sample chains for prompts; direct: predict the clean image from each row's noised image, "
            "in one call without guidance."
        },
    )
    gradient_steps: str | None = field(
        default="last 20%", metadata={"help": "Steps of the chain with gradients, as in the method for any reward."}
    )
    tuned_steps: str = field(
        default="last 60%",
        metadata={
            "help": "Steps that use the tuned embedding when images are generated: all, last K, first K or window A-B; "
            "the original encoders condition the others."
        },
    )
    as_sampled: bool = field(
        default=False,
        metadata={"help": "Use it in all of tuned_steps in training too; false: in the steps with gradients alone."},
    )
    tuned_null: bool = field(
        default=True,
        metadata={"help": "Whether these steps take the empty prompt's embedding from the tuned encoders too."},
    )
    sampling_steps: int = field(default=25, metadata={"help": "Denoising steps of a chain."})
    guidance_scale: float = field(default=7.5, metadata={"help": "Guidance scale of the chain; 1: no guidance."})

    @property
    def window(self) -> TunedSteps:
        """Where the tuned embedding is used."""
        return TunedSteps.of(self.tuned_steps, self.sampling_steps, null=self.tuned_null)

    @property
    @override
    def needs_media(self) -> bool:
        return self.variant == DIRECT

    @property
    @override
    def result_name(self) -> str:
        return "encoder"

    @property
    @override
    def trained_part(self) -> str:
        what = "all weights" if self.full_finetune else f"a LoRA of rank {self.lora_rank}"
        return f"{what} of {', '.join(self.encoders) if self.encoders else 'the text encoders'}"

    def __post_init__(self) -> None:
        if self.train_text_encoder or self.lora_dropout or self.fsdp:
            raise ConfigError(
                "this method trains text encoders, in evaluation mode and whole on each device: leave out "
                "train_text_encoder, lora_dropout and fsdp"
            )
        super().__post_init__()
        if self.variant not in (PROMPT, DIRECT):
            raise ConfigError(f"variant is '{self.variant}'; use {PROMPT} or {DIRECT}")
        if self.data_weight or (self.kl_weight and self.variant == DIRECT):
            raise ConfigError(
                "data_weight has no use here, and kl_weight none with variant: direct, which has no chain; leave it out"
            )
        used, trained = self.window.on(self.sampling_steps), self.gradient.steps
        outside = set(fixed_steps(trained, self.sampling_steps) or ()).difference(used)
        if outside:
            raise ConfigError(
                f"gradient_steps '{trained}' has steps {sorted(outside)}, which tuned_steps "
                f"'{self.tuned_steps}' has not: what they train would not be used. Widen tuned_steps"
            )


class TextCraftorTrainer(RewardTrainer):
    """Raises rewards by training text encoders; the denoiser is frozen; loss [P].

    The steps of a chain that carry gradients are conditioned by the trained encoders, the others by the original ones
    (all of `tuned_steps` by the trained ones with `as_sampled`, and in held-out losses). A reward on image and prompt,
    such as `clip_score`, is the paper's constraint against collapse: its own frozen text tower reads the prompt, so it
    acts through the image alone. The loss of `variant: direct` is minus the rewards of the clean image predicted from
    the row's noised image.

    The result is a folder of text encoders for the vanilla pipeline (`generators.tuned_encoders`).
    """

    args: TextCraftorConfig
    trains_encoders = True

    @override
    def trained_module(self) -> nn.Module:
        return self.generator.conditioner

    @override
    def make_trainable(self, args: Any) -> None:
        """Freeze the denoiser; tune the chosen encoders in float32, or put a LoRA on them.

        Encoders that were loaded as tuned (`load_generator(encoder=...)`) are trained further.
        """
        if self._peft_config is not None:
            raise ConfigError(
                "peft_config is for a denoiser's LoRA; for one of text encoders give full_finetune: false with "
                "lora_rank, lora_alpha and lora_targets"
            )
        generator, conditioner = self.generator, self.generator.conditioner
        chosen = args.encoders or list(generator.lora_encoders) or list(conditioner.encoders)
        generator.model.requires_grad_(False)
        if args.full_finetune:
            if generator.net.dtype.itemsize < torch.float32.itemsize:
                raise ConfigError(
                    "full_finetune keeps the encoders in float32, and the pipeline takes one precision: use dtype: "
                    "float32 (with bf16: true it computes in bf16), or full_finetune: false"
                )
            conditioner.unfreeze(chosen)
        else:
            torch.manual_seed(args.seed)
            conditioner.add_lora(args.lora_rank, args.lora_alpha, args.lora_targets, encoders=chosen)
        conditioner.window = args.window
        if args.activation_checkpointing:
            generator.model.activation_checkpointing_enable()
        if args.process_index == 0:
            self._report(chosen, args)

    def _report(self, chosen: list[str], args: TextCraftorConfig) -> None:
        if args.full_finetune and args.learning_rate >= HIGH_RATE:
            text = "learning_rate is %g: AdamW on all weights of a text encoder destroys it from %g on; try 1e-6"
            logger.warning(text, args.learning_rate, HIGH_RATE)
        for name in chosen:
            part = self.generator.conditioner.encoders[name]
            count = sum(parameter.numel() for parameter in part.parameters())
            covered = None if args.full_finetune else lora.coverage(part, lora.NAME)
            print(f"{name}: {covered or f'all {count:,} parameters are trained'}", file=sys.stderr)

    # --- the loss ---

    @override
    def method_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> LossOutput:
        if self.args.variant == PROMPT:
            return super().method_loss(model, batch)
        prompts: list[Prompt] = batch["prompts"]
        x0, noise, t = (batch[PREFIX + name].flatten(0, 1) for name in DRAWN)
        cond = self._tuned(model, texts(prompts)).with_controls(self.generator.training_controls(t))
        x_t = self.generator.add_noise(x0, noise, t)
        prediction = at_least_float32(self.generator.model(x_t, t, cond))
        alpha, sigma = (expand(value, x_t) for value in self.generator.noise_schedule.coefficients(t))
        predicted, _ = split(self.generator.prediction, prediction, x_t, alpha, sigma)
        reward_P, metrics = self._score(predicted, prompts)
        return LossOutput(-reward_P, metrics)

    def _tuned(self, model: nn.Module, prompts: list[str]) -> Conditioning:
        """The conditioning of the trained encoders, without dropout: as images are generated."""
        self.generator.conditioner.eval()
        return model(prompts).to(self.generator.device)  # type: ignore[no-any-return]

    @override
    def denoiser(self, model: nn.Module) -> Any:
        return self.generator.model

    @override
    def conditioning(self, model: nn.Module, prompts: list[str], steps: Steps, count: int) -> ByStep:
        tuned = self._tuned(model, prompts)  # first: it switches off the dropout of the base's encoders too
        with torch.no_grad():
            base = model(prompts, reference=True).to(self.generator.device)
        used = frozenset(self.args.window.on(count))
        if torch.is_grad_enabled():
            active = frozenset(range(count)) if steps.active is None else steps.active
            used = active | used if self.args.as_sampled else active
        return Switched(with_null(tuned, base, self.args.window), base, used)

    @override
    def penalty(self, chains: Chains, steps: Steps) -> VelocityPenalty | None:
        """Its reference is the denoiser with the original encoders' conditioning."""
        if not isinstance(chains.cond, Switched):
            return super().penalty(chains, steps)

        def reference(*inputs: Any, reference: bool) -> Tensor:  # noqa: ARG001 - the denoiser has no other
            return chains.model(*inputs)  # type: ignore[no-any-return]

        return super().penalty(replace(chains, model=reference, cond=chains.cond.base), steps)

    # --- the result ---

    @override
    def export(self, folder: Path) -> Path:
        """A folder of text encoders for the vanilla pipeline, with `alignkit.json`."""
        if self.args.should_save:
            save_tuned(self.generator, folder)
            write_card(self.card(), folder)
        return folder
