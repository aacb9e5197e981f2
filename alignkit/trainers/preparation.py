"""From what a user has to a generator with trainable weights: loading or wrapping, LoRA injection, full fine-tuning."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignkit.adapters import lora
from alignkit.errors import ConfigError
from alignkit.generators import load_generator, wrap
from alignkit.generators.pipeline import PipelineGenerator

if TYPE_CHECKING:
    from peft import LoraConfig

    from alignkit.trainers.config import AlignConfig


def as_generator(model: Any, device: torch.device) -> PipelineGenerator:
    """A generator of a diffusers folder, a hub id, a loaded diffusers pipeline, or the generator itself."""
    if isinstance(model, str | Path):
        return load_generator(model, device=str(device))
    return model if isinstance(model, PipelineGenerator) else wrap(model)


def prepare(
    generator: PipelineGenerator, args: AlignConfig, peft_config: LoraConfig | None, *, needs_reference: bool
) -> None:
    """Make the weights that `args` chooses trainable, in float32; `needs_reference` keeps a copy in full fine-tuning.

    A generator that carries an adapter keeps it. Raises ConfigError for settings that exclude each other.
    """
    _require_consistent(generator, args, peft_config)
    if args.full_finetune:
        generator.net.float().requires_grad_(True)  # half-precision weights lose small AdamW steps
        if needs_reference:
            generator.model.freeze_copy()
    elif not lora.trainable_adapters(generator.net):
        torch.manual_seed(args.seed)
        if peft_config is None:
            generator.add_lora(args.lora_rank, args.lora_alpha, args.lora_targets, args.lora_dropout)
        else:
            add_configured_lora(generator, peft_config)
    if args.train_text_encoder and not generator.model.trained_encoders:
        torch.manual_seed(args.seed)
        rank, alpha, dropout = args.lora_rank, args.lora_alpha, args.lora_dropout
        if peft_config is not None:
            rank, alpha, dropout = peft_config.r, peft_config.lora_alpha, peft_config.lora_dropout
        generator.add_text_lora(rank, alpha, args.text_encoder_targets, dropout)
    if args.process_index == 0:
        print("\n".join(trained_lines(generator)), file=sys.stderr)
    if args.fsdp and generator.model.trained_encoders:
        raise ConfigError("the adapter trains text encoders, which fsdp does not shard here; train without fsdp")


def trained_lines(generator: PipelineGenerator) -> list[str]:
    """What is trained, a line each: the share that every trainable adapter covers, or all parameters."""
    lines: list[str] = []
    for part, net in generator.adapted.items():
        names = sorted(lora.trainable_adapters(net))
        lines += [f"LoRA '{name}' on {part}: {lora.coverage(net, name)}" for name in names]
    count = sum(parameter.numel() for parameter in generator.net.parameters())
    return lines or [f"all {count:,} parameters of {generator.component} are trained"]


def add_configured_lora(generator: PipelineGenerator, peft_config: LoraConfig) -> None:
    """Put the LoRA of a PEFT config on the denoiser; without target modules it goes on the family's attention.

    Raises AdapterError for a kind of LoRA that no export can hold, DoRA for instance.
    """
    config = copy.deepcopy(peft_config)
    config.target_modules = config.target_modules or list(generator.lora_targets)
    lora.inject_config(generator.net, config)


def lora_settings(peft_config: LoraConfig) -> dict[str, Any]:
    """What the model card reports of a PEFT config; without target modules they are the family's attention."""
    targets, values = peft_config.target_modules, vars(peft_config)
    settings = {name: values[name] for name in ("r", "lora_alpha", "lora_dropout", "init_lora_weights", "use_rslora")}
    return settings | {"target_modules": sorted(targets) if isinstance(targets, set | list) else targets}


def _require_consistent(generator: PipelineGenerator, args: AlignConfig, peft_config: LoraConfig | None) -> None:
    if generator.is_quantized and (args.full_finetune or args.save_merged):
        raise ConfigError("a quantised model is trained with a LoRA: no full_finetune, no save_merged")
    if args.full_finetune and generator.adapted:
        raise ConfigError("full_finetune on a model with an adapter: merge the adapter first, or train a LoRA")
    if args.full_finetune and peft_config is not None:
        raise ConfigError("peft_config and full_finetune exclude each other; give one")
    if generator.component in generator.adapted and peft_config is not None:
        raise ConfigError("the model carries an adapter, so peft_config has no use; merge the adapter or leave it out")
