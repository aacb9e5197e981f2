"""A diffusers folder as files: its index, and the files that hold each component's weights. Nothing is loaded.

Whatever a file of the folder names must lie in the folder, and a component's class must be one of the installed
libraries: code that comes with a model is never run.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import DataError, MissingFileError

# Components without weights, by name. Whether a component is checked at loading is decided by its class.
_WEIGHTLESS = (
    "scheduler",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "feature_extractor",
    "image_processor",
    "processor",
)
_LIBRARIES = ("diffusers", "transformers")
_PREFERRED = "fp16"  # of several variants, where no other file is there
_LARGEST_JSON = 100_000_000  # bytes, as the header of a safetensors file


@dataclass(frozen=True, slots=True)
class Weights:
    """The files of one component; `variant` as in `model.fp16.safetensors`, `is_safe`: safetensors, else .bin."""

    files: tuple[Path, ...]
    variant: str | None
    is_safe: bool


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DataError naming `path` where it is damaged, no object or larger than 100 MB."""
    if path.stat().st_size > _LARGEST_JSON:
        raise DataError(f"'{path}' is larger than {_LARGEST_JSON:,} bytes, too large for a config; copy it again")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"'{path}' is no valid JSON: {error}; copy it again") from error
    if not isinstance(values, dict):
        raise DataError(f"'{path}' holds a {type(values).__name__}, not a JSON object; copy it again")
    return values


def read_index(model: str) -> dict[str, Any]:
    """`model_index.json` of a folder or hub id as it is written.

    Raises MissingFileError where there is none, DataError for a damaged one, for a component whose name is a path, and
    for a class that is neither of diffusers nor of transformers.
    """
    if Path(model).exists():
        where = Path(model) / "model_index.json"
        if not where.is_file():
            raise MissingFileError(f"'{model}' is no diffusers folder: model_index.json is missing")
        index = read_json(where)
    else:
        index, where = _hub_index(model), Path(model, "model_index.json")
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        advice = "a folder must name a pipeline class of diffusers; a pipeline's own code is never run"
        raise DataError(f"'{where}': _class_name is {kind!r}; {advice}")
    for name in component_names(index):
        _require_known(name, index[name], where)
    return index


def _hub_index(model: str) -> dict[str, Any]:
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise MissingFileError(f"no model folder '{model}'; give a diffusers folder or a hub id such as org/name")
    from diffusers import DiffusionPipeline

    try:
        return dict(DiffusionPipeline.load_config(model))
    except OSError as error:
        raise MissingFileError(
            f"'{model}' is no folder here and cannot be read from the hub: check the name and the network "
            f"(HF_HUB_OFFLINE); a gated model needs its licence accepted and `hf auth login` ({error})"
        ) from error


def component_names(index: Mapping[str, Any]) -> list[str]:
    """The names of all components of an index, also of those that were left out."""
    return [name for name, entry in index.items() if isinstance(entry, list) and not name.startswith("_")]


def _require_known(name: str, entry: list[Any], where: Path) -> None:
    if not name.isidentifier():
        raise DataError(f"'{where}': a component is called '{name}'; a name has letters, digits and _ only, no path")
    if entry == [None, None]:
        return
    if len(entry) != 2 or not all(isinstance(word, str) and word.isidentifier() for word in entry):
        raise DataError(f"'{where}': component {name} is {entry}, not [library, class]; copy the file again")
    library = entry[0]
    if library not in _LIBRARIES and importlib.util.find_spec(f"diffusers.pipelines.{library}") is None:
        raise DataError(
            f"'{where}': component {name} is a {entry[1]} of '{library}'; only classes of diffusers and transformers "
            "are loaded, code that comes with a model is never run"
        )
    if re.match("Auto[A-Z]", entry[1]):
        raise DataError(
            f"'{where}': component {name} is an {entry[1]}, which takes its class from a config of the folder; name "
            "the class itself"
        )


def read_model_index(
    model: str, *, weights: bool = True, optional: Collection[str] = (), unused: Collection[str] = ()
) -> dict[str, Any]:
    """`model_index.json` of a folder, with every component checked for its files.

    Without `weights`, configs are enough. A component of `optional` whose folder is missing becomes [None, None], the
    entry of a component that was left out; so does one of `unused`. Raises MissingFileError naming all that is missing,
    DataError for damaged JSON and for files that are named outside of the folder.
    """
    index, folder = read_index(model), Path(model)
    for name in component_names(index):
        if name in unused or (name in optional and not _has_files(folder / name)):
            index[name] = [None, None]
    missing = [
        problem
        for name in component_names(index)
        for problem in _missing(folder / name, index[name][0], weights=weights and name not in _WEIGHTLESS)
    ]
    if missing:
        raise MissingFileError(f"model folder '{model}' is incomplete, missing: {', '.join(missing)}; copy it again")
    return index


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _missing(folder: Path, library: str | None, *, weights: bool) -> list[str]:
    """Files that the component in `folder` should have and has not."""
    if library is None:
        return []
    if not _has_files(folder):
        return [f"{folder.name}/"]
    for config in sorted(folder.glob("*config.json")):
        read_json(config)
    if folder.name in _WEIGHTLESS:
        return []
    missing = [] if (folder / "config.json").is_file() else [f"{folder.name}/config.json"]
    if not weights:
        return missing
    stored = find_weights(folder, library)
    if stored is None:
        return [*missing, f"{folder.name}/*.safetensors"]
    return missing + [f"{folder.name}/{file.name}" for file in stored.files if not file.is_file()]


# --- weights --------------------------------------------------------------------------------------------------------


def find_weights(folder: Path, library: str) -> Weights | None:
    """The files that the library would load, or None: all weights before those of a variant, safetensors before .bin.

    Of several variants it is fp16, else the first by name. Raises DataError for an index of shards that is damaged or
    names a file outside of `folder`.
    """
    stems = ("diffusion_pytorch_model",) * 2 if library == "diffusers" else ("model", "pytorch_model")
    kinds = [f"{stems[0]}.safetensors", f"{stems[1]}.bin"]
    for file in kinds:
        if stored := _stored(folder, file, None):
            return stored
    for file in kinds:
        variants = _variants(folder, file)
        if variants:
            return _stored(folder, file, _PREFERRED if _PREFERRED in variants else min(variants))
    return None


def _variants(folder: Path, file: str) -> set[str]:
    stem, suffix = (re.escape(part) for part in file.rsplit(".", 1))
    single = re.compile(rf"{stem}\.(\w+)\.{suffix}")
    sharded = re.compile(rf"{stem}\.{suffix}\.index\.(\w+)\.json")
    matches = [pattern.fullmatch(path.name) for path in folder.iterdir() for pattern in (single, sharded)]
    return {match[1] for match in matches if match}


def _stored(folder: Path, file: str, variant: str | None) -> Weights | None:
    """The single file, or the shards that its index names."""
    stem, suffix = file.rsplit(".", 1)
    word = f".{variant}" if variant else ""
    is_safe = suffix == "safetensors"
    index, single = folder / f"{file}.index{word}.json", folder / f"{stem}{word}.{suffix}"
    if index.is_file():
        return Weights(tuple(folder / name for name in _shards(index)), variant, is_safe)
    return Weights((single,), variant, is_safe) if single.is_file() else None


def _shards(index: Path) -> list[str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise DataError(f"'{index}' has no weight_map; copy it again")
    for name in names.values():
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
            raise DataError(f"'{index}' names the file {name!r}; a shard must lie beside its index")
    return sorted(set(names.values()))
