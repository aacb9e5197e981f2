"""LoRA files as others write them: diffusers' and PEFT's layouts, and the keys of kohya's scripts and ComfyUI.

A file that does not belong to the model at hand is an error that says what the file seems to be made for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import nn

from alignkit.adapters import lora
from alignkit.adapters.exports import METADATA_KEY
from alignkit.adapters.fingerprint import BASE_KEY, base_of, is_other_base
from alignkit.errors import AdapterError, MissingFileError
from alignkit.escape import get_logger

if TYPE_CHECKING:
    from torch import Tensor

logger = get_logger(__name__)

# Keys that several families have; a family's own keys come first.
SHARED_KEYS = {
    r"attn\.add_q_proj": "a transformer with joint attention (Stable Diffusion 3, FLUX.1, Qwen-Image)",
    r"transformer_blocks\.\d+\.attn2": "a transformer with cross-attention (PixArt, SANA, LTX-Video)",
    r"(^|\.)blocks\.\d+\.(attn[12]|self_attn|cross_attn)": "Wan or AnyFlow",
    r"text_encoder|lora_te": "a text encoder",
}
_ADVICE = "Use it with that model, or give an adapter that was trained on this one"
KOHYA_PREFIXES = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
KOHYA_PREFIXES |= {"lora_te2_": "text_encoder_2"}
KOHYA_ENDS = {".lora_down.weight": lora.DOWN, ".lora_up.weight": lora.UP, ".alpha": ".alpha"}


@dataclass(frozen=True, slots=True)
class Origin:
    """How a family's LoRA files are recognised.

    label: what messages call the family.
    network: class name of its network, which exports with PEFT's metadata hold.
    keys: pattern that only its files match, searched in their keys one a line; "" where it has none of its own.
    text_widths: names of its versions by the width of the text states that cross-attention reads.
    """

    label: str
    network: str
    keys: str = ""
    text_widths: Mapping[int, str] = field(default_factory=dict)


Origins = Callable[[], Sequence[Origin]]  # of all families; called where a message needs one


@dataclass(frozen=True, slots=True)
class Stored:
    """One component's adapter as a file has it: weights under PEFT names and, where the file has them, LoraConfig
    values and the fingerprint of the base that it was trained on.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    base: str = ""


def load(
    path: Path,
    parts: Mapping[str, nn.Module],
    network: str,
    origins: Origins,
    *,
    name: str = lora.NAME,
    trainable: bool = True,
) -> None:
    """Put the adapter at `path` on `parts`, modules by the pipeline's name for them, as the adapter `name`.

    `path` is a folder of `save_adapter`, diffusers or PEFT, or a .safetensors file; `network` names the part that a
    family is known by, `origins` gives all families. Raises MissingFileError where there is no file, AdapterError for
    one of another family or size, which changes nothing. Logs a warning where the file was trained on other base
    weights: the shapes fit, so it loads.
    """
    file, found = read(path, parts, network, origins)
    require_parts(file, found, parts, network, origins)
    done: list[str] = []
    try:
        for component, stored in found.items():
            lora.load(
                parts[component],
                stored.weights,
                stored.config,
                where=f"'{file}'",
                origin=lambda: f"{origin_of(found, origins())}. {_ADVICE}",
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


def require_parts(
    file: Path, found: Mapping[str, Stored], parts: Mapping[str, nn.Module], network: str, origins: Origins
) -> None:
    """AdapterError where `found` holds weights for other parts than `parts`, or for other classes of network."""
    strange = sorted(found.keys() - parts)
    if strange and network not in found:
        raise AdapterError(
            f"'{file}' holds no '{network}.*' weights: it belongs to another model family, "
            f"{origin_of(found, origins())}. {_ADVICE}"
        )
    if strange:
        raise AdapterError(f"'{file}' holds '{strange[0]}.*' weights, which this pipeline cannot take. {_ADVICE}")
    for component, stored in found.items():
        made_for, present = _class_of(stored), type(parts[component]).__name__
        if made_for not in ("", present):
            origin = origin_of(found, origins())
            raise AdapterError(f"'{file}' does not fit this model's {present}: it was made for {origin}. {_ADVICE}")


def read(path: Path, parts: Mapping[str, nn.Module], network: str, origins: Origins) -> tuple[Path, dict[str, Stored]]:
    """The file that was read, and what it holds for each part that it names."""
    file = path if path.is_file() else path / lora.DIFFUSERS_FILE
    if file.is_file():
        stored, header = _tensors(file)
        weights = _dotted(file, stored, parts, origins)
        weights = {re.sub(r"^diffusion_model\.", f"{network}.", key): value for key, value in weights.items()}
        found = _split(weights, _json(header.get(METADATA_KEY, "{}"), f"the header of '{file}'"), parts)
        bases = _json(header.get(BASE_KEY, "{}"), f"the header of '{file}'")
        return file, {name: _with_alphas(stored, bases.get(name, "")) for name, stored in found.items()}
    folders = {name: path / name for name in parts if name != network} | {network: path}
    found = {name: _peft(folder) for name, folder in folders.items() if (folder / lora.PEFT_FILE).is_file()}
    if not found:
        raise MissingFileError(f"no adapter in '{path}': expected {lora.DIFFUSERS_FILE} or {lora.PEFT_FILE}")
    return path / lora.PEFT_FILE, found


def _peft(folder: Path) -> Stored:
    file, config_file = folder / lora.PEFT_FILE, folder / lora.PEFT_CONFIG
    if not config_file.is_file():
        raise MissingFileError(f"'{config_file}' is missing beside {lora.PEFT_FILE}; copy the adapter again")
    weights, header = _tensors(file)
    bases = _json(header.get(BASE_KEY, "{}"), f"the header of '{file}'")
    config = _json(config_file.read_text(encoding="utf-8", errors="replace"), f"'{config_file}'")
    return Stored(
        {key.removeprefix(lora.PEFT_PREFIX): value for key, value in weights.items()}, config, bases.get("", "")
    )


def _tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises AdapterError where it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
            return tensors, opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"'{file}' is truncated or no safetensors file ({error}); copy it again") from error


def _json(text: str, where: str) -> dict[str, Any]:
    """A JSON object. Raises AdapterError naming `where`."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where} is no valid JSON ({error}); copy the adapter again") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{where} holds a {type(values).__name__}, not a JSON object; copy the adapter again")
    return values


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


def _dotted(
    file: Path, weights: Mapping[str, Tensor], parts: Mapping[str, nn.Module], origins: Origins
) -> dict[str, Tensor]:
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
                f"{_by_keys(weights, origins())}, or by a script with names of its own (diffusers' load_lora_weights "
                "knows some)"
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


def origin_of(found: Mapping[str, Stored], origins: Sequence[Origin]) -> str:
    """What an adapter seems to be made for, in words."""
    classes = {_class_of(stored) for stored in found.values()}
    named = [origin for origin in origins if origin.network in classes and not origin.text_widths]
    if named:
        return named[0].label
    return _by_keys(
        {f"{name}.{key}": v for name, stored in found.items() for key, v in stored.weights.items()}, origins
    )


def _class_of(stored: Stored) -> str:
    return str((stored.config.get("auto_mapping") or {}).get("base_model_class", ""))


def _by_keys(weights: Mapping[str, Tensor], origins: Sequence[Origin]) -> str:
    names = "\n".join(sorted(weights))
    for origin in origins:
        if origin.keys and re.search(origin.keys, names, re.DOTALL):
            widths = [
                value.shape[1] for name, value in weights.items() if re.search(r"attn2.to_k.*(lora_A|down)", name)
            ]
            return origin.text_widths.get(widths[0], origin.label) if widths else origin.label
    shared = (label for keys, label in SHARED_KEYS.items() if re.search(keys, names, re.MULTILINE))
    return next(shared, "a model that its keys do not show")
