"""LoRA through PEFT on a bare network or text encoder: inject, switch off (= the reference policy), export, load.

Exports carry PEFT's own metadata (rank, alpha, targets): without it diffusers guesses alpha = rank and draws another
picture. Nothing matching is an error here; diffusers would only warn. Deliberately not here: which files are read and
what they seem to be made for (`stored`), and ComfyUI's keys (`comfyui`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel

from alignkit.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

NAME = "default"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
TEXT_LEVEL = "text_model."  # a level above CLIP's encoder, which CLIPTextModel lost in version 5 of transformers
PEFT_PREFIX = "base_model.model."
METADATA_KEY = "lora_adapter_metadata"  # where diffusers looks for rank and alpha


def lora_layers(net: nn.Module) -> list[BaseTunerLayer]:
    """The layers that carry an adapter."""
    return [module for module in net.modules() if isinstance(module, BaseTunerLayer)]


def inject(net: Any, *, rank: int, targets: Sequence[str], alpha: float | None = None, dropout: float = 0.0) -> None:
    """Freeze `net` and put a LoRA of `rank` on every layer whose name ends in one of `targets`.

    alpha defaults to rank (scale 1), the start is gaussian / zero, so the first forward is the base model's.
    Raises AdapterError when no layer matches.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
    inject_config(net, config)


def inject_config(net: Any, config: LoraConfig) -> None:
    """Freeze `net` and put the LoRA that `config` describes on it; `config` itself stays as it is.

    Raises AdapterError when no layer matches.
    """
    net.requires_grad_(False)
    _add(net, copy.deepcopy(config))


def _add(net: Any, config: LoraConfig) -> None:
    try:
        if isinstance(net, PeftAdapterMixin):
            net.add_adapter(config, adapter_name=NAME)
        else:  # PixArt's network, for one
            inject_adapter_in_model(config, net, adapter_name=NAME)
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        raise AdapterError(
            f"none of the LoRA targets {config.target_modules} names a layer of {type(net).__name__}; "
            "give suffixes of module names, e.g. to_q, to_k, to_v, to_out.0"
        ) from error


def inject_like(net: Any, other: Any) -> None:
    """Put an adapter of the kind that `other` carries on `net`, with weights of its own."""
    inject_config(net, other.peft_config[NAME])


def adapter_state(net: nn.Module) -> dict[str, Tensor]:
    """LoRA weights under PEFT names (`….lora_A.weight`), contiguous copies on the CPU."""
    state = get_peft_model_state_dict(net, adapter_name=NAME, save_embedding_layers=False)
    return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}


def lost_level(part: nn.Module) -> bool:
    """Whether `part` is a CLIP text encoder without the level that published keys have."""
    return isinstance(part, CLIPTextModel) and "text_model" not in dict(part.named_children())


def layer_weights(net: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Down [r, ...], up [out, r, ...] and alpha (scale times r, whatever the config calls it) by module path.

    Raises AdapterError for more than that, DoRA's magnitudes for instance.
    """
    state = adapter_state(net)
    paths = [key.removesuffix(DOWN) for key in state if key.endswith(DOWN)]
    odd = set(state) - {path + part for path in paths for part in (DOWN, UP)}
    if odd:
        raise AdapterError(f"{type(net).__name__} carries more than a plain LoRA: '{min(odd)}'")
    scales = {path: net.get_submodule(path).scaling[NAME] for path in paths}
    return {p: (state[p + DOWN], state[p + UP], float(scales[p]) * len(state[p + DOWN])) for p in paths}


def _config(net: Any) -> dict[str, Any]:
    """PEFT's LoraConfig as plain JSON values (sets become sorted lists), with the network's class where PEFT has it."""
    values = net.peft_config[NAME].to_dict()
    values["auto_mapping"] = {"base_model_class": type(net).__name__, "parent_library": type(net).__module__}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    return {key: value for key, value in plain.items() if not isinstance(value, dict) or value}


def export_diffusers(parts: Mapping[str, Any], folder: Path) -> Path:
    """`pytorch_lora_weights.safetensors` for the vanilla pipeline's `load_lora_weights(folder)`.

    `parts` are the modules that carry an adapter, by the pipeline's name for them. CLIP's keys are those of published
    files, which all versions of transformers know.
    """
    state = {
        f"{name}.{TEXT_LEVEL if lost_level(part) else ''}{key}": value
        for name, part in parts.items()
        for key, value in adapter_state(part).items()
    }
    if not state:
        raise AdapterError("the model carries no LoRA weights to export")
    metadata = {f"{name}.{key}": value for name, part in parts.items() for key, value in _config(part).items()}
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", METADATA_KEY: json.dumps(metadata, sort_keys=True)}
    save_file(state, folder / DIFFUSERS_FILE, metadata=header)
    return folder / DIFFUSERS_FILE


def export_peft(net: Any, folder: Path, *, base_model: str) -> Path:
    """A PEFT folder: adapter_config.json and adapter_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"{PEFT_PREFIX}{key}": value for key, value in adapter_state(net).items()}
    save_file(state, folder / PEFT_FILE, metadata={"format": "pt"})
    config = {**_config(net), "base_model_name_or_path": base_model, "peft_type": "LORA", "inference_mode": True}
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str), encoding="utf-8")
    return folder


def load(net: Any, state: Mapping[str, Tensor], config: Mapping[str, Any], *, where: str, origin: str) -> None:
    """Inject the adapter of `state` (PEFT names) and `config` (LoraConfig values); every weight must find its layer.

    Errors name the file `where` and its `origin`, what it seems to be made for. A net that refuses stays as it was.
    """
    ranks = {key.removesuffix(DOWN): value.shape[0] for key, value in state.items() if key.endswith(DOWN)}
    if not ranks:
        raise AdapterError(f"{where} holds no '*{DOWN}'; only the diffusers, PEFT and kohya layouts load")
    known = {field.name for field in fields(LoraConfig) if field.init}
    rank = max(ranks.values())
    patterns = {path: value for path, value in ranks.items() if value != rank}
    guess = {"r": rank, "lora_alpha": rank, "rank_pattern": patterns, "target_modules": sorted(ranks)}
    net.requires_grad_(False)
    _add(net, LoraConfig(**{**guess, **{key: value for key, value in config.items() if key in known}}))
    problem = _misfit(adapter_state(net), state)
    if problem:
        remove(net)
        raise AdapterError(f"{where} does not fit this model: {problem}. It was made for {origin}")
    set_peft_model_state_dict(net, dict(state), adapter_name=NAME)


def _misfit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    if expected.keys() != state.keys():
        missing, extra = sorted(expected.keys() - state)[:2], sorted(state.keys() - expected)[:2]
        return f"without weights {missing}, unknown {extra}"
    for key, value in expected.items():
        if value.shape != state[key].shape:
            return f"'{key}' has another shape, {list(state[key].shape)} instead of {list(value.shape)}"
    return None


def remove(net: Any) -> None:
    """Take the adapter off; merged ones stay in the weights."""
    if isinstance(net, PeftAdapterMixin):
        net.unload_lora()
        return
    recurse_remove_peft_layers(net)
    del net.peft_config


def merge(net: Any) -> None:
    """Fold the adapter into the weights and remove it; a net without one stays as it is."""
    if not lora_layers(net):
        return
    if isinstance(net, PeftAdapterMixin):
        net.fuse_lora()
    else:
        for layer in lora_layers(net):
            layer.merge()
    remove(net)


def negate(net: Any) -> None:
    """Turn the adapter's sign: on a network that it was merged into, it then gives back the network before."""
    for layer in lora_layers(net):
        layer.lora_B[NAME].weight.data.neg_()
