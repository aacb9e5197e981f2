"""From a model's name to its family and its folder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, MissingFileError, UnknownNameError
from alignkit.generators.table import GENERATORS
from alignkit.resolve import resolve

if TYPE_CHECKING:
    from alignkit.generators.pipeline import PipelineGenerator


def local_folder(model: str, family: type[PipelineGenerator]) -> str:
    """The folder of a model; a hub id is downloaded, less the components that are never loaded."""
    if Path(model).exists():
        return model
    from diffusers import DiffusionPipeline

    try:
        return str(DiffusionPipeline.download(model, **dict.fromkeys(family.unused_parts)))
    except (OSError, ValueError) as error:
        advice = f"download it yourself: hf download {model} --local-dir FOLDER, and give FOLDER"
        raise MissingFileError(f"'{model}' cannot be downloaded: {error}; {advice}") from error


def family_of(class_name: str, model: str, options: Mapping[str, Any], named: str | None) -> type[PipelineGenerator]:
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
