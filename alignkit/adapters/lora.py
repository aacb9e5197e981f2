"""LoRA through PEFT on a bare diffusers network: inject, switch off (= the reference policy), export, load.

Exports carry PEFT's own metadata (rank, alpha, targets): without it diffusers guesses alpha = rank and draws another
picture. Nothing matching is an error here; diffusers would only warn.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from alignkit.errors import AdapterError, MissingFileError

if TYPE_CHECKING:
    from torch import Tensor

NAME = "default"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # where diffusers looks for rank and alpha


def lora_layers(net: nn.Module) -> list[BaseTunerLayer]:
    """The layers that carry an adapter."""
    return [module for module in net.modules() if isinstance(module, BaseTunerLayer)]


def inject(net: Any, *, rank: int, targets: Sequence[str], alpha: float | None = None, dropout: float = 0.0) -> None:
    """Freeze `net` and put a LoRA of `rank` on every layer whose name ends in one of `targets`.

    alpha defaults to rank (scale 1), the start is gaussian / zero, so the first forward is the base model's.
    Raises AdapterError when no layer matches.
    """
    net.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
    _add(net, config)


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
    net.requires_grad_(False)
    _add(net, copy.deepcopy(other.peft_config[NAME]))


def adapter_state(net: nn.Module) -> dict[str, Tensor]:
    """LoRA weights under PEFT names (`….lora_A.weight`), contiguous copies on the CPU."""
    state = get_peft_model_state_dict(net, adapter_name=NAME)
    return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}


def _config(net: Any) -> dict[str, Any]:
    """PEFT's LoraConfig as plain JSON values (sets become sorted lists)."""
    values = net.peft_config[NAME].to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    return {key: value for key, value in plain.items() if not isinstance(value, dict) or value}


def export_diffusers(net: Any, folder: Path, *, component: str) -> Path:
    """`pytorch_lora_weights.safetensors` for the vanilla pipeline's `load_lora_weights(folder)`."""
    state = {f"{component}.{key}": value for key, value in adapter_state(net).items()}
    if not state:
        raise AdapterError(f"{type(net).__name__} carries no LoRA weights to export")
    metadata = {f"{component}.{key}": value for key, value in _config(net).items()}
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", METADATA_KEY: json.dumps(metadata, sort_keys=True)}
    save_file(state, folder / DIFFUSERS_FILE, metadata=header)
    return folder / DIFFUSERS_FILE


def export_peft(net: Any, folder: Path, *, base_model: str) -> Path:
    """A PEFT folder: adapter_config.json and adapter_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"base_model.model.{key}": value for key, value in adapter_state(net).items()}
    save_file(state, folder / PEFT_FILE, metadata={"format": "pt"})
    config = {**_config(net), "base_model_name_or_path": base_model, "peft_type": "LORA", "inference_mode": True}
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str), encoding="utf-8")
    return folder


def _read(folder: Path, component: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights under PEFT names, LoraConfig values) from either layout."""
    diffusers_file, peft_file = folder / DIFFUSERS_FILE, folder / PEFT_FILE
    if diffusers_file.is_file():
        prefix = f"{component}."
        with safe_open(diffusers_file, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get(METADATA_KEY, "{}"))
        state = {k.removeprefix(prefix): v for k, v in load_file(diffusers_file).items() if k.startswith(prefix)}
        if not state:
            raise AdapterError(f"{diffusers_file} holds no '{prefix}*' weights: it belongs to another model family")
        return state, {k.removeprefix(prefix): v for k, v in metadata.items()}
    if peft_file.is_file():
        state = {k.removeprefix("base_model.model."): v for k, v in load_file(peft_file).items()}
        return state, json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    raise MissingFileError(f"no adapter in '{folder}': expected {DIFFUSERS_FILE} or {PEFT_FILE}")


def load(net: Any, folder: Path, *, component: str) -> None:
    """Inject the adapter stored in `folder` (diffusers or PEFT layout); every stored weight must find its layer."""
    state, stored = _read(folder, component)
    ranks = {key.split(".lora_")[0]: value.shape[0] for key, value in state.items() if "lora_A" in key}
    if not ranks:
        raise AdapterError(
            f"adapter in '{folder}' holds no '*.lora_A.weight'; only the diffusers and PEFT layouts load"
        )
    known = {field.name for field in fields(LoraConfig) if field.init}
    guess = {"r": max(ranks.values()), "lora_alpha": max(ranks.values()), "target_modules": sorted(ranks)}
    net.requires_grad_(False)
    _add(net, LoraConfig(**{**guess, **{key: value for key, value in stored.items() if key in known}}))
    expected = set(adapter_state(net))
    if expected != set(state):
        missing, extra = sorted(expected - set(state))[:2], sorted(set(state) - expected)[:2]
        raise AdapterError(f"adapter in '{folder}' does not fit this model: without weights {missing}, unknown {extra}")
    misfits = [key for key, value in adapter_state(net).items() if value.shape != state[key].shape]
    if misfits:
        raise AdapterError(f"adapter in '{folder}' does not fit this model: '{misfits[0]}' has another shape")
    set_peft_model_state_dict(net, state, adapter_name=NAME)


def merge(net: Any) -> None:
    """Fold the adapter into the weights and remove it; a net without one stays as it is."""
    if not lora_layers(net):
        return
    if isinstance(net, PeftAdapterMixin):
        net.fuse_lora()
        net.unload_lora()
        return
    for layer in lora_layers(net):
        layer.merge()
    recurse_remove_peft_layers(net)
    del net.peft_config


def negate(net: Any) -> None:
    """Turn the adapter's sign: on a network that it was merged into, it then gives back the network before."""
    for layer in lora_layers(net):
        layer.lora_B[NAME].weight.data.neg_()
