"""Names of keys that users know from TRL and diffusers, and names that alignkit had before, become its own.

One name stands for one thing: `out`, `held_out`, `num_frames`, `seed` (fixes random numbers), `seeds_per_prompt` (how
many images or videos a prompt) and `training_seeds` (of a ladder). Deliberately not here: which keys a section has
(its dataclass) and the types of values (`config`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from alignkit.yaml_tree import Located, parse_yaml

# Of trl.ModelConfig and trl.DPOConfig, transformers.TrainingArguments, diffusers' pipelines and training scripts.
ALIASES = {
    "model_name_or_path": "model",
    "pretrained_model_name_or_path": "model",
    "torch_dtype": "dtype",
    "use_peft": "full_finetune",
    "lora_r": "lora_rank",
    "rank": "lora_rank",
    "lora_target_modules": "lora_targets",
    "load_in_4bit": "quantize",
    "load_in_8bit": "quantize",
    "output_dir": "out",
    "max_train_steps": "max_steps",
    "train_batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "beta_dpo": "beta",
    "loss_type": "loss",
    "num_inference_steps": "steps",
    "num_images_per_prompt": "seeds_per_prompt",
    "num_videos_per_prompt": "seeds_per_prompt",
    "frame_rate": "fps",
}
# Values that read otherwise under the alias; None leaves the key at its default.
VALUES: dict[str, dict[Any, Any]] = {
    "use_peft": {True: False, False: True},
    "load_in_4bit": {True: "nf4", False: None},
    "load_in_8bit": {True: "int8", False: None},
}
RENAMED = {
    "seeds": ("seeds_per_prompt", "training_seeds"),
    "run_seed": ("seed",),
    "frames": ("num_frames",),
    "batch_size": ("per_device_train_batch_size",),
}
_PEFT_CONFIG = "pass a LoraConfig of peft to the trainer from Python (`peft_config`)"
# Keys of trl.ModelConfig that have no counterpart here.
REFUSED = {
    "model_revision": "fetch it with `hf download MODEL --revision REVISION --local-dir FOLDER`; the model is FOLDER",
    "trust_remote_code": "code of a model's repository is never run; leave it out",
    "attn_implementation": "diffusers chooses the attention; leave it out",
    "lora_target_parameters": _PEFT_CONFIG,
    "lora_modules_to_save": _PEFT_CONFIG,
    "lora_task_type": "there is one task; leave it out",
    "use_rslora": _PEFT_CONFIG,
    "use_dora": _PEFT_CONFIG,
    "bnb_4bit_quant_type": "quantize: nf4 is the only one of 4 bits; leave it out",
    "use_bnb_nested_quant": "quantize: nf4 is not nested; leave it out",
    "bnb_4bit_quant_storage": "quantize: nf4 chooses it; leave it out",
}


def with_own_names(
    tree: Mapping[str, Located], known: Collection[str], problems: list[str], section: str = ""
) -> dict[str, Located]:
    """`tree` with every alias of a key in `known` replaced by that key.

    An alias beside its own key is appended to `problems`; so is a value that an alias cannot have.
    """
    own = {name: given for name, given in tree.items() if name in known or ALIASES.get(name) not in known}
    for name, given in tree.items():
        if name in own:
            continue
        key = ALIASES[name]
        translated = given if name not in VALUES else _translated(name, given, problems)
        if translated is None:
            continue
        if key in own:
            problems.append(f"{given.where}: '{section}{name}' is the same key as '{section}{key}'; keep one")
        own[key] = translated
    return own


def _translated(name: str, given: Located, problems: list[str]) -> Located | None:
    """The value that `name: given` means under its own key; None where it means the default."""
    read = parse_yaml(given.value, given.where, problems, lines=False) if given.text else given
    if not isinstance(read.value, bool):
        problems.append(f"{given.where}: {name} must be true or false, not {read.value!r}")
        return None
    value = VALUES[name][read.value]
    return None if value is None else replace(read, value=value)


def advice(name: str, known: Collection[str]) -> str:
    """` ...`: what to write instead of a key that is called otherwise here or that TRL has; empty for others."""
    renamed = [key for key in RENAMED.get(name, ()) if key in known]
    if renamed:
        return f" It is called '{renamed[0]}' here; rename it."
    return f" {REFUSED[name][0].upper()}{REFUSED[name][1:]}." if name in REFUSED else ""
