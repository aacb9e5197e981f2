"""LoRA files as others write them: diffusers' and PEFT's layouts, and the keys of kohya's scripts and ComfyUI.

A file that does not belong to the model at hand is an error that says what the file seems to be made for.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from alignkit.adapters import lora
from alignkit.adapters.exports import METADATA_KEY
from alignkit.adapters.fingerprint import BASE_KEY, base_of, is_other_base
from alignkit.errors import AdapterError, MissingFileError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

# What a file was made for, by the network's class (our own exports and PEFT's name it), ...
CLASSES = {
    "UNet2DConditionModel": "a U-Net (Stable Diffusion 1.x or 2.x, SDXL, LCM)",
    "SD3Transformer2DModel": "Stable Diffusion 3",
    "FluxTransformer2DModel": "FLUX.1",
    "PixArtTransformer2DModel": "PixArt",
    "SanaTransformer2DModel": "SANA",
    "Lumina2Transformer2DModel": "Lumina-Image 2.0",
    "QwenImageTransformer2DModel": "Qwen-Image",
    "ZImageTransformer2DModel": "Z-Image",
    "DreamLiteUNetModel": "DreamLite",
    "WanTransformer3DModel": "Wan",
    "AnyFlowTransformer3DModel": "AnyFlow",
    "CogVideoXTransformer3DModel": "CogVideoX",
    "LTXVideoTransformer3DModel": "LTX-Video",
    "HunyuanVideoTransformer3DModel": "HunyuanVideo",
}
# ... else by a key; the first that is found says it.
KEYS = {
    r"(down|up)_blocks|mid_block|(in|out)put_blocks|middle_block": CLASSES["UNet2DConditionModel"],
    r"token_refiner": CLASSES["HunyuanVideoTransformer3DModel"],
    r"single_transformer_blocks|single_blocks": CLASSES["FluxTransformer2DModel"],
    r"(img|txt)_(mlp|mod)": CLASSES["QwenImageTransformer2DModel"],
    r"(layers|_refiner)\.\d+\.attention\.to_": CLASSES["ZImageTransformer2DModel"],
    r"noise_refiner|context_refiner": CLASSES["Lumina2Transformer2DModel"],
    r"joint_blocks": CLASSES["SD3Transformer2DModel"],
    r"attn\.add_q_proj": "a transformer with joint attention (Stable Diffusion 3, FLUX.1, Qwen-Image)",
    r"transformer_blocks\.\d+\.attn2": "a transformer with cross-attention (PixArt, SANA, LTX-Video)",
    r"transformer_blocks\.\d+\.attn1": CLASSES["CogVideoXTransformer3DModel"],
    r"(^|\.)blocks\.\d+\.(attn[12]|self_attn|cross_attn)": "Wan or AnyFlow",
    r"text_encoder|lora_te": "a text encoder",
}
_ADVICE = "Use it with that model, or give an adapter that was trained on this one"
UNET_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}  # of the text they look at
KOHYA_PREFIXES = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
KOHYA_PREFIXES |= {"lora_te2_": "text_encoder_2"}
KOHYA_ENDS = {".lora_down.weight": lora.DOWN, ".lora_up.weight": lora.UP, ".alpha": ".alpha"}


@dataclass(frozen=True, slots=True)
class Stored:
    """One component's adapter as a file has it: weights under PEFT names and, where the file has them, LoraConfig
    values and the fingerprint of the base that it was trained on.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    base: str = ""


def load(
    path: Path, parts: Mapping[str, nn.Module], network: str, *, name: str = lora.NAME, trainable: bool = True
) -> None:
    """Put the adapter at `path` on `parts`, modules by the pipeline's name for them, as the adapter `name`.

    `path` is a folder of `save_adapter`, diffusers or PEFT, or a .safetensors file. Raises MissingFileError where there
    is none, AdapterError for one of another family or size, which changes nothing; `network` names the part that a
    family is known by. Logs a warning where the file was trained on other base weights: the shapes fit, so it loads.
    """
    file, found = read(path, parts, network)
    origin = origin_of(found)
    strange = sorted(found.keys() - parts)
    if strange and network not in found:
        raise AdapterError(
            f"'{file}' holds no '{network}.*' weights: it belongs to another model family, {origin}. {_ADVICE}"
        )
    if strange:
        raise AdapterError(f"'{file}' holds '{strange[0]}.*' weights, which this pipeline cannot take. {_ADVICE}")
    for component, stored in found.items():
        made_for, present = _class_of(stored), type(parts[component]).__name__
        if made_for not in ("", present):
            raise AdapterError(f"'{file}' does not fit this model's {present}: it was made for {origin}. {_ADVICE}")
    done: list[str] = []
    try:
        for component, stored in found.items():
            lora.load(
                parts[component],
                stored.weights,
                stored.config,
                where=f"'{file}'",
                origin=f"{origin}. {_ADVICE}",
                name=name,
                trainable=trainable,
            )
            done.append(component)
    except AdapterError:
        for component in done:
            lora.remove(parts[component], name)
        raise
    for component, stored in found.items():
        if is_other_base(parts[component], stored.base):
            logger.warning(
                "'%s' was trained on another base: the fingerprint of its %s was %s, that of this model is %s. It is "
                "loaded, but the result may differ from what was trained; load it on %s, or ignore this if it is meant "
                "for both",
                *(file, component, stored.base, base_of(parts[component])),
                stored.config.get("base_model_name_or_path") or "the model that it was trained on",
            )


def read(path: Path, parts: Mapping[str, nn.Module], network: str) -> tuple[Path, dict[str, Stored]]:
    """The file that was read, and what it holds for each part that it names."""
    file = path if path.is_file() else path / lora.DIFFUSERS_FILE
    if file.is_file():
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
        weights = _dotted(file, load_file(file), parts)
        weights = {re.sub(r"^diffusion_model\.", f"{network}.", key): value for key, value in weights.items()}
        found = _split(weights, json.loads(header.get(METADATA_KEY, "{}")), parts)
        bases = json.loads(header.get(BASE_KEY, "{}"))
        return file, {name: _with_alphas(stored, bases.get(name, "")) for name, stored in found.items()}
    folders = {name: path / name for name in parts if name != network} | {network: path}
    found = {name: _peft(folder) for name, folder in folders.items() if (folder / lora.PEFT_FILE).is_file()}
    if not found:
        raise MissingFileError(f"no adapter in '{path}': expected {lora.DIFFUSERS_FILE} or {lora.PEFT_FILE}")
    return path / lora.PEFT_FILE, found


def _peft(folder: Path) -> Stored:
    file = folder / lora.PEFT_FILE
    weights = load_file(file)
    with safe_open(file, framework="pt") as opened:
        bases = json.loads((opened.metadata() or {}).get(BASE_KEY, "{}"))
    config = json.loads((folder / lora.PEFT_CONFIG).read_text(encoding="utf-8"))
    return Stored(
        {key.removeprefix(lora.PEFT_PREFIX): value for key, value in weights.items()}, config, bases.get("", "")
    )


def _split(
    weights: Mapping[str, Tensor], metadata: Mapping[str, Any], parts: Mapping[str, nn.Module]
) -> dict[str, Stored]:
    """`unet.*`, `text_encoder.*`, ... apart."""
    found: dict[str, Stored] = {}
    for key, value in weights.items():
        name, _, path = key.partition(".")
        found.setdefault(name, Stored()).weights[_at_home(path, parts.get(name))] = value
    for key, value in metadata.items():
        name, _, option = key.partition(".")
        if name in found:
            found[name].config[option] = value
    return found


def _at_home(path: str, part: nn.Module | None) -> str:
    """`path` with or without the level above a CLIP encoder, as this version of transformers has it."""
    return path if part is None or not lora.lost_level(part) else path.removeprefix(lora.TEXT_LEVEL)


def _dotted(file: Path, weights: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """`part.path.lora_A.weight` for kohya's flat names, whose paths are the model's own; other keys as they are."""
    paths = {name: _flat_names(part) for name, part in parts.items()}
    dotted = {}
    for key, value in weights.items():
        stem, dot, end = key.partition(".")
        prefix = next((prefix for prefix in KOHYA_PREFIXES if stem.startswith(prefix)), None)
        if prefix is None:
            dotted[key] = value
            continue
        name, flat = KOHYA_PREFIXES[prefix], stem.removeprefix(prefix)
        if flat not in paths.get(name, {flat: flat}):
            raise AdapterError(
                f"'{file}' does not fit this model: '{stem}' names none of its layers. It was made for "
                f"{_by_keys(weights)}, or by a script with names of its own (diffusers' load_lora_weights knows some)"
            )
        dotted[f"{name}.{paths.get(name, {}).get(flat, flat)}{KOHYA_ENDS.get(dot + end, dot + end)}"] = value
    return dotted


def _flat_names(part: nn.Module) -> dict[str, str]:
    paths = [path for path, _ in part.named_modules()]
    flat = {path.replace(".", "_"): path for path in paths}
    return flat | ({f"text_model_{name}": path for name, path in flat.items()} if lora.lost_level(part) else {})


def _with_alphas(stored: Stored, base: str) -> Stored:
    """`.alpha` tensors, which some programs write instead of metadata, as LoraConfig values."""
    alphas = {key.removesuffix(".alpha"): float(v) for key, v in stored.weights.items() if key.endswith(".alpha")}
    weights = {key: value for key, value in stored.weights.items() if not key.endswith(".alpha")}
    return Stored(weights, {**stored.config, **({"alpha_pattern": alphas} if alphas else {})}, base)


# --- what it was made for -------------------------------------------------------------------------------------------


def origin_of(found: Mapping[str, Stored]) -> str:
    """What an adapter seems to be made for, in words."""
    named = [CLASSES[name] for stored in found.values() if (name := _class_of(stored)) in CLASSES]
    weights = {f"{name}.{key}": value for name, stored in found.items() for key, value in stored.weights.items()}
    guess = _by_keys(weights)
    return named[0] if named and named[0] != CLASSES["UNet2DConditionModel"] else guess


def _class_of(stored: Stored) -> str:
    return str((stored.config.get("auto_mapping") or {}).get("base_model_class", ""))


def _by_keys(weights: Mapping[str, Tensor]) -> str:
    guess = next((kind for key, kind in KEYS.items() if any(re.search(key, name) for name in weights)), "")
    if guess == CLASSES["UNet2DConditionModel"]:
        looks = [value.shape[1] for name, value in weights.items() if re.search(r"attn2.to_k.*(lora_A|down)", name)]
        return UNET_WIDTHS.get(looks[0], guess) if looks else guess
    return guess or "a model that its keys do not tell"
