"""LoRA files for other programs: diffusers' layout, PEFT's folder and, through `comfyui`, ComfyUI's file.

They carry PEFT's own metadata (rank, alpha, targets), without which diffusers assumes alpha = rank and generates other
images, and the fingerprint of the base weights. Equal weights give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from torch import nn

from alignkit.adapters import lora
from alignkit.adapters.fingerprint import BASE_KEY, save_canonical
from alignkit.errors import AdapterError
from alignkit.storage import write_text

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY = "lora_adapter_metadata"  # where diffusers looks for rank and alpha


def layer_weights(net: nn.Module, name: str = lora.NAME) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Down [r, ...], up [out, r, ...] and alpha by module path; the adapter's own scale is alpha / r, also for rsLoRA.

    The weight that `activate` gives does not count. Raises AdapterError for more than a plain LoRA.
    """
    state = lora.adapter_state(net, name)
    layers = {}
    for key in list(state):
        if key.endswith(lora.DOWN):
            path = key.removesuffix(lora.DOWN)
            down, up = state.pop(path + lora.DOWN), state.pop(path + lora.UP)
            layer: Any = net.get_submodule(path)
            layers[path] = (down, up, lora.own_scale(layer, name) * len(down))
    if state:
        raise AdapterError(
            f"adapter '{name}' of {type(net).__name__} is more than a plain LoRA: '{min(state)}'; train it again as a "
            "plain LoRA, or merge it into the base"
        )
    return layers


def _plain(config: LoraConfig, net: Any) -> dict[str, Any]:
    """PEFT's LoraConfig as plain JSON values (sets become sorted lists), with the network's class where PEFT has it."""
    values = config.to_dict()
    values["auto_mapping"] = {"base_model_class": type(net).__name__, "parent_library": type(net).__module__}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    return {key: value for key, value in plain.items() if not isinstance(value, dict) or value}


def file_metadata(bases: Mapping[str, str] | None, **metadata: str) -> dict[str, str]:
    """The header of an exported file, with the fingerprints of the base (`fingerprint.base_of`) by component."""
    base = {BASE_KEY: json.dumps(dict(bases), sort_keys=True)} if bases else {}
    return {"format": "pt", **base, **metadata}


def export_diffusers(
    parts: Mapping[str, Any], folder: Path, *, name: str = lora.NAME, bases: Mapping[str, str] | None = None
) -> Path:
    """`pytorch_lora_weights.safetensors` for the vanilla pipeline's `load_lora_weights(folder)`.

    `parts` are the modules that carry the adapter `name`, by the pipeline's name for them; `bases` the fingerprints of
    their base weights. CLIP's keys are those of published files, which all versions of transformers know. Equal weights
    give equal bytes.
    """
    states = {component: lora.adapter_state(part, name) for component, part in parts.items()}
    configs = {component: part.peft_config[name] for component, part in parts.items()}
    return write_diffusers(parts, states, configs, folder, bases)


def write_diffusers(
    parts: Mapping[str, Any],
    states: Mapping[str, Mapping[str, Tensor]],
    configs: Mapping[str, LoraConfig],
    folder: Path,
    bases: Mapping[str, str] | None,
) -> Path:
    """`export_diffusers` of the given weights, under PEFT names, and configs; `parts` need not carry an adapter."""
    state: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for component, part in parts.items():
        level = lora.TEXT_LEVEL if lora.lost_level(part) else ""
        state |= {f"{component}.{level}{key}": value for key, value in states[component].items()}
        metadata |= {f"{component}.{key}": value for key, value in _plain(configs[component], part).items()}
    if not state:
        raise AdapterError("the model has no LoRA weights to export; train or load an adapter first")
    header = file_metadata(bases, **{METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    save_canonical(state, folder / lora.DIFFUSERS_FILE, header)
    return folder / lora.DIFFUSERS_FILE


def export_peft(net: Any, folder: Path, *, base_model: str, name: str = lora.NAME, base: str | None = None) -> Path:
    """A PEFT folder: adapter_config.json and adapter_model.safetensors; `base` is the fingerprint of the base."""
    state = {f"{lora.PEFT_PREFIX}{key}": value for key, value in lora.adapter_state(net, name).items()}
    save_canonical(state, folder / lora.PEFT_FILE, file_metadata({"": base} if base else None))
    config = {
        **_plain(net.peft_config[name], net),
        "base_model_name_or_path": base_model,
        "peft_type": "LORA",
        "inference_mode": True,
    }
    write_text(folder / lora.PEFT_CONFIG, json.dumps(config, indent=2, sort_keys=True, default=str))
    return folder
