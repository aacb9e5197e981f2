"""Generators: the family is chosen by the class of the pipeline, never by the model's name.

A new family is one file with a class and one line in `GENERATORS` (module `table`).
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, DataError, MissingFileError, UnknownNameError
from alignkit.generators.table import GENERATORS
from alignkit.resolve import resolve
from alignkit.shipped import model_path

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from alignkit.generators.pipeline import PipelineGenerator

logger = logging.getLogger(__name__)
_WEIGHTLESS = (
    "scheduler",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "feature_extractor",
    "image_processor",
    "processor",
)


def read_model_index(model: str, *, weights: bool = True, optional: Collection[str] = ()) -> dict[str, Any]:
    """`model_index.json` of a folder or hub id, with every component of a local folder checked for its files.

    Without `weights`, configs are enough. A component of `optional` whose folder is missing becomes [None, None], the
    entry of a component that was left out. Raises MissingFileError naming all that is missing, DataError for an index
    that is no JSON.
    """
    components = _index(model)
    if not Path(model).exists():
        return components
    for name in optional:
        if name in components and not _has_files(Path(model) / name):
            components[name] = [None, None]
    missing = [
        problem for name, entry in components.items() for problem in _missing(Path(model), name, entry, weights=weights)
    ]
    if missing:
        raise MissingFileError(f"model folder '{model}' is incomplete, missing: {', '.join(missing)}; copy it again")
    return components


def _index(model: str) -> dict[str, Any]:
    """`model_index.json` as it is written."""
    if not Path(model).exists():
        if model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise MissingFileError(f"no model folder '{model}'; give a diffusers folder or a hub id such as org/name")
        from diffusers import DiffusionPipeline

        try:
            return dict(DiffusionPipeline.load_config(model))
        except OSError as error:
            raise MissingFileError(f"'{model}' is no folder here, and no model with that hub id: {error}") from error
    index = Path(model) / "model_index.json"
    if not index.is_file():
        raise MissingFileError(f"'{model}' is no diffusers folder: model_index.json is missing")
    try:
        return dict(json.loads(index.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"{index} is no valid JSON: {error}") from error


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _missing(model: Path, name: str, entry: Any, *, weights: bool) -> list[str]:
    """Files that component `name` should have and has not."""
    if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
        return []
    folder = model / name
    if not _has_files(folder):
        return [f"{name}/"]
    if name in _WEIGHTLESS:
        return []
    missing = [] if (folder / "config.json").is_file() else [f"{name}/config.json"]
    if not weights:
        return missing
    shards = {
        shard
        for index in folder.glob("*.safetensors.index.json")
        for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    }
    missing += [f"{name}/{shard}" for shard in sorted(shards) if not (folder / shard).is_file()]
    return missing if shards or any(folder.glob("*.safetensors")) else [*missing, f"{name}/*.safetensors"]


def load_generator(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    quantize: str | None = None,
    family: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> PipelineGenerator:
    """Load a diffusers folder, hub id or `sandbox:NAME`, with an optional LoRA (folder or file), as a generator.

    `dtype` defaults to float32, `device` to cuda if there is one, else cpu; `quantize` (`int8`, `nf4`) quantises the
    network's frozen weights; `options` are the family's own keywords (Wan's `expert`). `family` names a family of your
    own, `package.module:attribute`, for a pipeline class that is not in `GENERATORS`. A component that the model was
    saved without, or an optional one whose folder is missing (SD3's T5), is left out, the latter with a warning.

    Raises MissingFileError for missing files, UnknownNameError for a pipeline class without a family, AdapterError for
    an adapter that does not fit, ConfigError for an unknown option or a quantiser that is not installed.
    """
    import torch
    from diffusers import DiffusionPipeline

    from alignkit.generators.quantize import quantization

    folder = model_path(str(model))
    written = _index(folder)
    chosen = _family(written["_class_name"], str(model), options or {}, family)
    index = read_model_index(folder, optional=chosen.optional_parts)
    left_out = [part for part, entry in index.items() if isinstance(entry, list) and entry[0] is None]
    for part in left_out:
        if written[part] != index[part]:
            logger.warning("%s of '%s' is missing; the model is loaded without it", part, model)
    absent = dict.fromkeys([*chosen.unused_parts, *left_out])
    dtype = dtype or torch.float32
    if quantize:
        networks = [part for part in ("unet", "transformer", "transformer_2") if index.get(part, [None])[0]]
        absent["quantization_config"] = quantization(quantize, networks, dtype)
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **absent)
    pipeline.register_to_config(_name_or_path=str(model))  # what cards and adapters name as their base
    pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for part in ("unet", "vae"):  # convolutions are faster so, on tensor cores and CPUs alike
        module = None if quantize and part == chosen.component else pipeline.components.get(part)
        if module is not None and all(weight.dim() < 5 for weight in module.parameters()):
            module.to(memory_format=torch.channels_last)
    generator = chosen(pipeline, name or Path(folder).name, **dict(options or {}))
    if adapter is not None:
        generator.load_adapter(Path(model_path(str(adapter))))
    return generator


def wrap(pipeline: DiffusionPipeline, name: str | None = None, **options: Any) -> PipelineGenerator:
    """A generator of a loaded diffusers pipeline, which it shares: device and dtype stay as they are.

    The pipeline's text encoders are frozen and put into evaluation mode, its progress bar is switched off. `name`
    defaults to the last part of the path that the pipeline was loaded from, else to its class; `options` are the
    family's own keywords (Wan's `expert`). Raises UnknownNameError for a pipeline class without a family, ConfigError
    for an unknown option.
    """
    class_name = type(pipeline).__name__
    family = _family(class_name, name or class_name, options, None)
    origin = str(pipeline.config.get("_name_or_path") or class_name)
    return family(pipeline, name or Path(origin).name, **options)


def _family(class_name: str, model: str, options: Mapping[str, Any], named: str | None) -> type[PipelineGenerator]:
    """The family of a pipeline class, or the one that is `named`, after a check that it takes `options`."""
    if named is None and class_name not in GENERATORS:
        raise UnknownNameError(
            f"'{model}' is a {class_name}, a pipeline class without a family. Known: {', '.join(GENERATORS)}. "
            "To add one see docs/add_a_generator.md"
        )
    family: type[PipelineGenerator] = resolve(named or class_name, GENERATORS, kind="generator family")
    if unknown := set(options) - (set(inspect.signature(family).parameters) - {"pipeline", "name"}):
        raise ConfigError(f"a {class_name} takes no {sorted(unknown)} among its options")
    return family
