"""The keys that ComfyUI's LoRA loader reads, family by family, written beside every export.

These files have no metadata: alpha stands in them as a tensor beside each pair. A family or a layer whose keys ComfyUI
does not map gets no file rather than a wrong one: it would skip what it does not know and draw another picture.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.adapters import lora
from alignkit.adapters.exports import file_metadata, layer_weights
from alignkit.adapters.fingerprint import save_canonical

logger = logging.getLogger(__name__)
Layers = dict[str, tuple[Tensor, Tensor, float]]  # down [r, ...], up [out, r, ...] and alpha by module path


@dataclass(frozen=True, slots=True)
class Keys:
    """How a network's layers are called: `prefix` + module path + one of `ends` (down, up).

    known: the module paths that ComfyUI maps. rename: its own names of the layers, where it does not take diffusers'.
    """

    prefix: str
    known: str = ".+"
    ends: tuple[str, str] = (lora.DOWN, lora.UP)
    is_flat: bool = False  # dots become underscores
    rename: Callable[[Layers, nn.Module], Layers] = lambda layers, _: layers


def _kohya(prefix: str) -> Keys:
    return Keys(prefix, ends=(".lora_down.weight", ".lora_up.weight"), is_flat=True)


def _wan(layers: Layers, _: nn.Module) -> Layers:
    """Wan's own names."""
    new = {"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
    new |= {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
    return {_renamed(path, new): layer for path, layer in layers.items()}


def _lumina2(layers: Layers, net: nn.Module) -> Layers:
    """Lumina's own names; its three projections of attention are one there."""
    new = {"attn": "attention", "to_out.0": "out", "norm1.linear": "adaLN_modulation.1"}
    new |= {f"feed_forward.linear_{number}": f"feed_forward.w{number}" for number in (1, 2, 3)}
    parts = re.compile(r"(.*\.attn)\.to_[qkv]")
    stems = {found[1]: None for path in layers if (found := parts.fullmatch(path))}
    fused = {f"{stem}.qkv": _fused(layers, [f"{stem}.to_{name}" for name in "qkv"], net) for stem in stems}
    plain = {path: layer for path, layer in layers.items() if not parts.fullmatch(path)}
    return {_renamed(path, new): layer for path, layer in {**fused, **plain}.items()}


def _renamed(path: str, new: Mapping[str, str]) -> str:
    for old, name in new.items():
        path = re.sub(rf"(?<=\.){re.escape(old)}(?=\.|$)", name, path)
    return path


def _fused(layers: Layers, paths: list[str], net: nn.Module) -> tuple[Tensor, Tensor, float]:
    """The LoRA of layers stacked on each other out of theirs: downs stacked, ups block by block, scales in the ups."""
    present = [layers[path] for path in paths if path in layers]
    total, column = sum(len(down) for down, *_ in present), 0
    rows = []
    for path in paths:
        block = torch.zeros(int(net.get_submodule(path).out_features), total)
        if path in layers:
            down, up, alpha = layers[path]
            block[:, column : column + len(down)] = up * (alpha / len(down))
            column += len(down)
        rows.append(block)
    return torch.cat([down for down, *_ in present]), torch.cat(rows), float(total)


_ATTENTION = r"to_[qkv]|to_out\.0"
_JOINT = rf"({_ATTENTION}|add_[qkv]_proj|to_add_out)"
_FF = r"net\.(0\.proj|2)"
_SD3 = rf"transformer_blocks\.\d+\.(attn2?\.{_JOINT}|ff(_context)?\.{_FF}|norm1(_context)?\.linear)"
_FLUX = rf"{_SD3}|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"
_LUMINA2 = r"(layers|noise_refiner|context_refiner)\.\d+\.(attn\.({})|feed_forward\.linear_[123]|norm1\.linear)"

# By the class of the network. SANA is missing: ComfyUI itself does not run it.
NETWORKS: Mapping[str, Keys] = {
    "UNet2DConditionModel": _kohya("lora_unet_"),
    "SD3Transformer2DModel": Keys("transformer.", _SD3),
    "FluxTransformer2DModel": Keys("transformer.", _FLUX),
    "PixArtTransformer2DModel": Keys("transformer.", rf"transformer_blocks\.\d+\.(attn[12]\.({_ATTENTION})|ff\.{_FF})"),
    "QwenImageTransformer2DModel": Keys("diffusion_model.", r"transformer_blocks\..+"),
    "Lumina2Transformer2DModel": Keys("diffusion_model.", _LUMINA2.format(_ATTENTION), rename=_lumina2),
    "WanTransformer3DModel": Keys(
        "diffusion_model.", rf"blocks\.\d+\.(attn[12]\.({_ATTENTION})|ffn\.{_FF})", rename=_wan
    ),
}
_CLIP = {"text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}
_CLIP_LAYERS = r"(text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"


def export(
    parts: Mapping[str, Any], file: Path, *, adapter: str = lora.NAME, bases: Mapping[str, str] | None = None
) -> Path | None:
    """Write one adapter of `parts`, by the pipeline's name for them, as one file for ComfyUI's folder `models/loras`.

    `bases` are the fingerprints of the base weights for the file's header. None, without a file, where ComfyUI has no
    keys for a part or a layer; for a layer of a known family a warning too.
    """
    state: dict[str, Tensor] = {}
    for name, part in parts.items():
        keys = NETWORKS.get(type(part).__name__) or _tower(name, part)
        if keys is None:
            return None
        layers = layer_weights(part, adapter)
        unknown = [path for path in layers if not re.fullmatch(keys.known, path)]
        if unknown:
            logger.warning("no file for ComfyUI: it has no key for '%s' of %s", unknown[0], type(part).__name__)
            return None
        state |= _written(keys.rename(layers, part), keys)
    save_canonical(state, file, file_metadata(bases))
    return file


def _tower(name: str, part: nn.Module) -> Keys | None:
    """CLIP text encoders have the keys of kohya's scripts in all families."""
    if name not in _CLIP or not type(part).__name__.startswith("CLIPText"):
        return None
    keys = _kohya(_CLIP[name])
    return Keys(keys.prefix, _CLIP_LAYERS, keys.ends, keys.is_flat, _without_level)


def _without_level(layers: Layers, _: nn.Module) -> Layers:
    return {path.removeprefix("text_model."): layer for path, layer in layers.items()}


def _written(layers: Layers, keys: Keys) -> dict[str, Tensor]:
    return {key: tensor.contiguous() for path, layer in layers.items() for key, tensor in _entries(path, layer, keys)}


def _entries(path: str, layer: tuple[Tensor, Tensor, float], keys: Keys) -> Iterator[tuple[str, Tensor]]:
    down, up, alpha = layer
    stem = keys.prefix + (path.replace(".", "_") if keys.is_flat else path)
    yield from ((stem + keys.ends[0], down), (stem + keys.ends[1], up), (f"{stem}.alpha", torch.tensor(alpha)))
