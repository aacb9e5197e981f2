"""Generators: a pipeline's own class chooses its adapter, never its name.

A new family is one file with a class and one line in `GENERATORS` (module `table`).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, DataError, MissingFileError, UnknownNameError
from alignkit.generators.table import GENERATORS
from alignkit.resolve import resolve

if TYPE_CHECKING:
    import torch

    from alignkit.generators.pipeline import PipelineGenerator

_WEIGHTLESS = (
    "scheduler",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "feature_extractor",
    "image_processor",
    "processor",
)


def read_model_index(model: str, *, weights: bool = True) -> dict[str, Any]:
    """`model_index.json` of a folder or hub id, with every component of a local folder checked for its files.

    Without `weights`, configs are enough.
    """
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
        components = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{index} is no valid JSON: {error}") from error
    missing = [
        problem for name, entry in components.items() for problem in _missing(Path(model), name, entry, weights=weights)
    ]
    if missing:
        raise MissingFileError(f"model folder '{model}' is incomplete, missing: {', '.join(missing)}; copy it again")
    return dict(components)


def _missing(model: Path, name: str, entry: Any, *, weights: bool) -> list[str]:
    """Files that component `name` should have and has not."""
    if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
        return []
    folder = model / name
    if not folder.is_dir() or not any(folder.iterdir()):
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


def wrap(pipeline: Any, name: str | None = None) -> PipelineGenerator:
    """A generator of a loaded diffusers `pipeline`, which stays on its device and keeps its dtype.

    Raises UnknownNameError for a class that has no entry in GENERATORS.
    """
    class_name = type(pipeline).__name__
    if class_name not in GENERATORS:
        raise UnknownNameError(
            f"'{class_name}' is no pipeline class with an adapter. Known: {', '.join(GENERATORS)}. "
            "To add one see docs/add_a_generator.md"
        )
    family = resolve(class_name, GENERATORS, kind="generator")
    return family(pipeline, name or Path(str(pipeline.name_or_path)).name or class_name)


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
    """Load a diffusers folder or hub id, with an optional LoRA (folder or file), as a Generator.

    `dtype` defaults to float32, `device` to cuda where there is one, else cpu; `quantize` (`int8`, `nf4`) puts the
    network's frozen weights in fewer bits; `options` are the adapter's own keywords (Wan's `expert`). `family` names
    the adapter where the pipeline's class is not in `GENERATORS`: `package.module:attribute` of the user's own. Raises
    MissingFileError for missing files, UnknownNameError for a pipeline class without an adapter, AdapterError for an
    adapter that does not fit, ConfigError for an option that none takes or a quantiser that is not installed.
    """
    import torch
    from diffusers import DiffusionPipeline

    from alignkit.generators.quantize import quantization

    index = read_model_index(str(model))
    class_name = index["_class_name"]
    if family is None and class_name not in GENERATORS:
        raise UnknownNameError(
            f"'{model}' is a {class_name}, a pipeline class without an adapter. Known: {', '.join(GENERATORS)}. "
            "To add one see docs/add_a_generator.md"
        )
    adapter_class = resolve(family or class_name, GENERATORS, kind="generator family")
    options = dict(options or {})
    if unknown := set(options) - (set(inspect.signature(adapter_class).parameters) - {"pipeline", "name"}):
        raise ConfigError(f"a {class_name} takes no {sorted(unknown)} among its options")
    absent = dict.fromkeys(adapter_class.unused_parts)
    dtype = dtype or torch.float32
    if quantize:
        networks = [part for part in ("unet", "transformer", "transformer_2") if index.get(part, [None])[0]]
        absent["quantization_config"] = quantization(quantize, networks, dtype)
    pipeline = DiffusionPipeline.from_pretrained(str(model), dtype=dtype, **absent)
    pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for part in ("unet", "vae"):  # convolutions run faster so, on tensor cores and CPUs alike
        module = None if quantize and part == adapter_class.component else pipeline.components.get(part)
        if module is not None and all(weight.dim() < 5 for weight in module.parameters()):
            module.to(memory_format=torch.channels_last)
    generator = adapter_class(pipeline, name or Path(model).name, **options)
    if adapter is not None:
        generator.load_adapter(Path(adapter))
    return generator
