"""A folder of tuned text encoders: `NAME/` as a pipeline's component, and `alignkit.json`, which says how to use them.

    {"kind": "text_encoder", "base_fingerprint": {NAME: "PRECISION:HASH"}, "space": "embedding", "members": ["."],
     "weights": [1.0], "window": {"steps": "last 60%", "null": true}}

NAME is the component's name in the pipeline, the fingerprint that of the encoder it was tuned from; the window is a
`TunedSteps`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.adapters import comfyui, exports, lora
from alignkit.adapters.fingerprint import base_of, is_other_base
from alignkit.diffusion.tuned_steps import TunedSteps
from alignkit.errors import ConfigError, DataError, MissingFileError, UnknownNameError, nearest
from alignkit.escape import get_logger
from alignkit.generators.components import load_network, require_finite, require_weights
from alignkit.generators.folders import ARTEFACT, read_json
from alignkit.storage import write_text

if TYPE_CHECKING:
    from alignkit.generators.pipeline import PipelineGenerator

logger = get_logger(__name__)
_KIND = "text_encoder"
_FIXED = {"kind": _KIND, "space": "embedding", "members": ["."], "weights": [1.0]}


@dataclass(frozen=True)
class TunedEncoders:
    """What `alignkit.json` says: by component name the fingerprint of the base encoder, and the steps of use."""

    bases: Mapping[str, str]
    window: TunedSteps


def write_artefact(folder: Path, encoders: TunedEncoders) -> Path:
    """Write `folder/alignkit.json`."""
    content = {**_FIXED, "base_fingerprint": dict(encoders.bases), "window": asdict(encoders.window)}
    write_text(folder / ARTEFACT, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return folder / ARTEFACT


def save_tuned(generator: PipelineGenerator, folder: Path) -> None:
    """Write the trained encoders of `generator` into `folder`, adapters merged, with the window of its conditioner.

    Where the encoders carry an adapter that the pipeline's LoRA loader knows, it is in `folder/lora` too, and in
    `folder/comfyui` if ComfyUI has its keys; such a file acts in all steps. Raises AdapterError if none is trained.
    """
    conditioner = generator.conditioner
    names = [part.name for part in conditioner.save(folder)]
    bases = {name: base_of(conditioner.base(name)) for name in names}
    write_artefact(folder, TunedEncoders(bases, conditioner.window or TunedSteps()))
    adapted = {name: part for name, part in generator.lora_encoders.items() if lora.lora_layers(part)}
    if adapted:
        exports.export_diffusers(adapted, folder / "lora", bases=bases)
        comfyui.export(adapted, folder / "comfyui" / f"{Path(generator.name).name}.safetensors", {}, bases=bases)


def read_artefact(folder: Path) -> TunedEncoders:
    """What `folder/alignkit.json` says.

    Raises MissingFileError where there is none, DataError naming the key of a value that cannot be used.
    """
    file = folder / ARTEFACT
    if not file.is_file():
        raise MissingFileError(f"'{folder}' holds no tuned text encoders: {ARTEFACT} is missing")
    content = read_json(file)
    for key, expected in _FIXED.items():
        if content.get(key) != expected:
            raise DataError(f"'{file}': {key} is {content.get(key)!r}; of tuned text encoders it is {expected!r}")
    bases, window = content.get("base_fingerprint"), content.get("window")
    if not isinstance(bases, dict) or not bases or not all(isinstance(base, str) for base in bases.values()):
        raise DataError(f"'{file}': base_fingerprint is {bases!r}; it holds a fingerprint for each text encoder")
    return TunedEncoders(bases, _window(window, file))


def _window(given: Any, file: Path) -> TunedSteps:
    expected = 'it is as {"steps": "last 60%", "null": true}'
    if not isinstance(given, dict) or set(given) != {"steps", "null"} or not isinstance(given["null"], bool):
        raise DataError(f"'{file}': window is {given!r}; {expected}")
    try:
        return TunedSteps(str(given["steps"]), given["null"])
    except ConfigError as error:
        raise DataError(f"'{file}': window is {given!r}: {error}") from error


def load_tuned(generator: PipelineGenerator, folder: Path) -> None:
    """Put the encoders of `folder` into `generator`, frozen; its own become the reference.

    Encoders that were tuned from other base weights are loaded with a warning. Raises MissingFileError, DataError for
    files that are damaged or hold NaN, UnknownNameError and AdapterError for encoders that are none of this model.
    """
    tuned, present = read_artefact(folder), generator.conditioner.encoders
    parts: dict[str, Any] = {}
    for name, base in tuned.bases.items():
        if name not in present:
            advice = f"this model has {list(present)}.{nearest(name, present)}"
            raise UnknownNameError(f"'{folder}' holds a text encoder '{name}'; {advice}")
        if not (folder / name).is_dir():
            raise MissingFileError(f"'{folder}' is incomplete: {name}/ is missing; copy it again")
        own: Any = present[name]
        if is_other_base(own, base):
            logger.warning("'%s' was tuned from another %s (%s) than that of '%s'", folder, name, base, generator.name)
        stored = require_weights(folder / name, "transformers")
        require_finite(stored)
        parts[name] = load_network(folder / name, type(own), stored, own.dtype)
    generator.conditioner.put(parts, tuned.window)
