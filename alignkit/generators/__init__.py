"""Generators: the family is chosen by the class of the pipeline, never by the model's name.

A new family is one file with a class and one line in `GENERATORS` (module `table`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.adapters.mixture import is_mixture
from alignkit.escape import get_logger
from alignkit.generators.folders import component_names, read_index, read_model_index
from alignkit.generators.lookup import family_of, local_folder
from alignkit.generators.table import GENERATORS
from alignkit.shipped import model_path

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from alignkit.generators.pipeline import PipelineGenerator

__all__ = ["GENERATORS", "load_generator", "wrap"]

logger = get_logger(__name__)


def load_generator(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    encoder: str | Path | None = None,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    quantize: str | None = None,
    family: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> PipelineGenerator:
    """Load a diffusers folder, hub id or `sandbox:NAME`, with an optional LoRA (folder or file), as a generator.

    `adapter` may also be the folder of a mixture of weights (`alignkit soup`), `encoder` is one of tuned text encoders
    (`generators.tuned_encoders`), which act in the steps that it names. `dtype` defaults to float32, `device` to
    cuda if there is one, else cpu; `quantize` (`int8`, `nf4`) quantises the network's frozen weights; `options` are the
    family's own keywords (Wan's `expert`). `family` names a family of your own, `package.module:attribute`, for a
    pipeline class that is not in `GENERATORS`. A component that the model was saved without, or an optional one whose
    folder is missing (SD3's T5), is left out, the latter with a warning. Where a component has weights of a variant
    only (`*.fp16.safetensors`), those are loaded, with a warning. A safety checker is never loaded: images that it
    blacked out would be ranked.

    Raises MissingFileError for missing files, DataError for weights that are damaged, not finite or do not fill the
    networks, UnknownNameError for a pipeline class without a family, AdapterError for an adapter that does not fit,
    ConfigError for an unknown option or a quantiser that is not installed.
    """
    import torch

    named = model_path(str(model))
    written = read_index(named)
    chosen = family_of(written["_class_name"], str(model), options or {}, family)
    folder = local_folder(named, chosen)
    index = read_model_index(folder, optional=chosen.optional_parts, unused=chosen.unused_parts)
    _report_left_out(str(model), written, index, chosen)
    pipeline = _load_pipeline(folder, index, chosen, dtype or torch.float32, quantize)
    pipeline.register_to_config(_name_or_path=str(model))  # what cards and adapters name as their base
    pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for part in ("unet", "vae"):  # convolutions are faster so, on tensor cores and CPUs alike
        module = None if quantize and part == chosen.component else pipeline.components.get(part)
        if module is not None and all(weight.dim() < 5 for weight in module.parameters()):
            module.to(memory_format=torch.channels_last)
    generator = chosen(pipeline, name or Path(named).name, **dict(options or {}))
    if encoder is not None:
        from alignkit.generators.tuned_encoders import load_tuned

        load_tuned(generator, Path(encoder))
    if adapter is not None:
        path = Path(model_path(str(adapter)))
        if is_mixture(path):
            from alignkit.generators.mixtures import load_weights

            load_weights(generator, path)
        else:
            generator.load_adapter(path)
    return generator


def _report_left_out(
    model: str, written: Mapping[str, Any], index: Mapping[str, Any], family: type[PipelineGenerator]
) -> None:
    """Warn of components that the index names and that are not loaded."""
    for name in component_names(index):
        if written[name] == index[name]:
            continue
        if name == "safety_checker":
            logger.warning(
                "the safety checker of '%s' is not loaded: images that it blacks out cannot be ranked", model
            )
        elif name not in family.unused_parts:
            logger.warning("%s of '%s' is missing; the model is loaded without it", name, model)


def _load_pipeline(
    folder: str, index: Mapping[str, Any], family: type[PipelineGenerator], dtype: torch.dtype, quantize: str | None
) -> Any:
    """The diffusers pipeline of `folder`, each network loaded with its checks and the rest by diffusers."""
    from alignkit.generators.components import assemble, load_networks
    from alignkit.generators.quantize import quantizers

    denoisers = [part for part in ("unet", "transformer", "transformer_2") if index.get(part, [None])[0]]
    configs = quantizers(quantize, denoisers, dtype) if quantize else {}
    networks, variants = load_networks(Path(folder), index, dtype, configs)
    if variants:
        names = ", ".join(f"{name} ({variant})" for name, variant in variants.items())
        logger.warning("'%s' has no other weights than variants of %s; they are loaded", folder, names)
    return assemble(folder, index, family.unused_parts, networks)


def wrap(pipeline: DiffusionPipeline, name: str | None = None, **options: Any) -> PipelineGenerator:
    """A generator of a loaded diffusers pipeline, which it shares: device and dtype stay as they are.

    The pipeline's text encoders are frozen and put into evaluation mode, its progress bar is switched off. `name`
    defaults to the last part of the path that the pipeline was loaded from, else to its class; `options` are the
    family's own keywords (Wan's `expert`). Raises UnknownNameError for a pipeline class without a family, ConfigError
    for an unknown option.
    """
    class_name = type(pipeline).__name__
    family = family_of(class_name, name or class_name, options, None)
    origin = str(pipeline.config.get("_name_or_path") or class_name)
    return family(pipeline, name or Path(origin).name, **options)
