"""Files with the keys that ComfyUI's LoRA loader reads, beside every export; a family says its own keys.

These files have no metadata: alpha stands in them as a tensor beside each pair. A family or a layer whose keys ComfyUI
does not map gets no file rather than a wrong one: it would skip what it does not know and draw another image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.adapters import lora
from alignkit.adapters.exports import file_metadata, layer_weights
from alignkit.adapters.fingerprint import save_canonical
from alignkit.escape import get_logger

logger = get_logger(__name__)
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


def kohya_keys(prefix: str) -> Keys:
    """The keys of kohya's scripts."""
    return Keys(prefix, ends=(".lora_down.weight", ".lora_up.weight"), is_flat=True)


def _shortened(before: str) -> Callable[[Layers, nn.Module], Layers]:
    """Module paths without `before`."""
    return lambda layers, _: {path.removeprefix(before): layer for path, layer in layers.items()}


def renamed(layers: Layers, new: Mapping[str, str]) -> Layers:
    """`layers` with parts of their paths under other names."""
    result = {}
    for path, layer in layers.items():
        for old, name in new.items():
            path = re.sub(rf"(?<=\.){re.escape(old)}(?=\.|$)", name, path)  # noqa: PLW2901
        result[path] = layer
    return result


def fused(layers: Layers, paths: list[str], net: nn.Module) -> tuple[Tensor, Tensor, float]:
    """One LoRA for the layers `paths` stacked on each other: downs stacked, ups block by block, scales in the ups."""
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


# Layers that ComfyUI maps in several families, as ends of module paths.
ATTENTION = r"to_[qkv]|to_out\.0"
FEED_FORWARD = r"net\.(0\.proj|2)"
_JOINT = rf"({ATTENTION}|add_[qkv]_proj|to_add_out)"
JOINT_LAYERS = rf"transformer_blocks\.\d+\.(attn2?\.{_JOINT}|ff(_context)?\.{FEED_FORWARD}|norm1(_context)?\.linear)"
_CLIP_LAYERS = r"(text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
_CLIP = {
    name: replace(kohya_keys(prefix), known=_CLIP_LAYERS, rename=_shortened("text_model."))
    for name, prefix in {"text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}.items()
}
# Other encoders, by their class in transformers: "text_encoders.", ComfyUI's name of the encoder, and the path in it,
# which is transformers' own for T5 and `model.layers...` for language models.
_T5_LAYERS = r"encoder\.block\.\d+\.layer\.[01]\.(SelfAttention\.[qkvo]|DenseReluDense\.w[io](_[01])?)"
_DECODER_LAYERS = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
_ENCODERS = {
    "T5EncoderModel": Keys("text_encoders.t5xxl.transformer.", _T5_LAYERS),
    "UMT5EncoderModel": Keys("text_encoders.umt5xxl.transformer.", _T5_LAYERS),
    "Gemma2Model": Keys("text_encoders.gemma2_2b.transformer.model.", _DECODER_LAYERS),
    "Qwen2_5_VLForConditionalGeneration": Keys(
        "text_encoders.qwen25_7b.transformer.model.",
        rf"model\.language_model\.{_DECODER_LAYERS}",
        rename=_shortened("model.language_model."),
    ),
}


def export(
    parts: Mapping[str, Any],
    file: Path,
    keys: Mapping[str, Keys | None],
    *,
    adapter: str = lora.NAME,
    bases: Mapping[str, str] | None = None,
) -> Path | None:
    """Write one adapter of `parts`, by the pipeline's name for them, as one file for ComfyUI's folder `models/loras`.

    `keys` are the family's own for its network; text encoders have the same in all families.
    `bases` are the fingerprints of the base weights for the file's header. None, without a file, where ComfyUI has no
    keys for a part or a layer; for a text encoder and for a layer of a known family a warning too.
    """
    state: dict[str, Tensor] = {}
    for name, part in parts.items():
        class_name = type(part).__name__
        encoders = _CLIP.get(name) if class_name.startswith("CLIPText") else _ENCODERS.get(class_name)
        own = keys.get(name) or encoders
        if own is None:
            if name.startswith("text_encoder"):
                logger.warning("no file for ComfyUI: its keys of %s, a %s, are not known", name, class_name)
            return None
        layers = layer_weights(part, adapter)
        unknown = [path for path in layers if not re.fullmatch(own.known, path)]
        if unknown:
            logger.warning("no file for ComfyUI: it has no key for '%s' of %s", unknown[0], class_name)
            return None
        state |= _written(own.rename(layers, part), own)
    save_canonical(state, file, file_metadata(bases))
    return file


def _written(layers: Layers, keys: Keys) -> dict[str, Tensor]:
    return {key: tensor.contiguous() for path, layer in layers.items() for key, tensor in _entries(path, layer, keys)}


def _entries(path: str, layer: tuple[Tensor, Tensor, float], keys: Keys) -> Iterator[tuple[str, Tensor]]:
    down, up, alpha = layer
    stem = keys.prefix + (path.replace(".", "_") if keys.is_flat else path)
    yield from ((stem + keys.ends[0], down), (stem + keys.ends[1], up), (f"{stem}.alpha", torch.tensor(alpha)))
