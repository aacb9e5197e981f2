"""A diffusers folder as shapes of networks on the meta device, from its weight files or, without any, from its configs.

The files are read as at loading, so that what the doctor sizes up can be loaded; only their numbers are not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, UnknownNameError, nearest
from alignkit.generators.folders import component_names, read_index, read_json, read_model_index
from alignkit.generators.table import GENERATORS, families
from alignkit.resolve import resolve

if TYPE_CHECKING:
    from torch import nn

    from alignkit.generators.pipeline import PipelineGenerator

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Model:
    """Tensor shapes by component, the denoiser's class, and the configs of denoiser and VAE."""

    pipeline: str
    shapes: Mapping[str, Shapes]
    denoiser: str
    denoiser_class: str
    config: Mapping[str, Any]
    vae: Mapping[str, Any]

    @property
    def family(self) -> type[PipelineGenerator]:
        """The family of the pipeline, else of the denoiser's class. Raises UnknownNameError where there is none."""
        if self.pipeline in GENERATORS:
            return resolve(self.pipeline, GENERATORS, kind="generator")  # type: ignore[no-any-return]
        for family in families():
            if family.origin.network == self.denoiser_class:
                return family
        raise UnknownNameError(
            f"doctor does not know the inputs of a {self.denoiser_class}: no family of "
            f"alignkit.generators.GENERATORS has it.{nearest(self.pipeline, GENERATORS)} See docs/add_a_generator.md"
        )

    @property
    def vae_ratio(self) -> int:
        """Pixels a side of a latent place."""
        return self.family.vae_ratios(self.vae)[0]

    @property
    def vae_frames(self) -> int:
        """Frames of a latent frame after the first; 1 for images."""
        return self.family.vae_ratios(self.vae)[1]

    def stored(self, component: str) -> int:
        """How many numbers a component's files hold."""
        return sum(math.prod(shape) for shape in self.shapes[component].values())

    @property
    def default_encoders(self) -> tuple[str, ...]:
        """The encoders that a method on text encoders trains by default: those of the LoRA loader, or all."""
        from alignkit.generators.components import component_class

        loadable = vars(component_class("diffusers", self.pipeline)).get("_lora_loadable_modules", ())
        encoders = [name for name in self.shapes if name.startswith("text_encoder")]
        return tuple(name for name in encoders if name in loadable) or tuple(encoders)

    def denoiser_parameters(self) -> int:
        """How many of the denoiser's numbers are parameters; the rest are fixed positions."""
        return sum(parameter.numel() for parameter in self.blank_denoiser().parameters())

    def blank_denoiser(self) -> Any:
        """The denoiser on the meta device."""
        return blank("diffusers", self.denoiser_class, self.config)


def read_model(folder: Path) -> Model:
    """Read a diffusers folder, with weights or with configs alone.

    With weights, networks and pipeline are loaded as for a training, on the meta device. Raises MissingFileError
    for an incomplete folder, DataError for a file that is damaged or whose weights do not fill the network, ConfigError
    without a denoiser, UnknownNameError for a class that the installed libraries lack.
    """
    from alignkit.generators.components import assemble, component_class, is_network, load_shapes

    written = read_index(str(folder))
    family = (
        resolve(written["_class_name"], GENERATORS, kind="generator") if written["_class_name"] in GENERATORS else None
    )
    optional, unused = (family.optional_parts, family.unused_parts) if family else ((), ())
    weights = any(folder.glob("*/*.safetensors")) or any(folder.glob("*/*.bin"))
    weights = weights or not any(folder.glob("*/config.json"))
    index = read_model_index(str(folder), weights=weights, optional=optional, unused=unused)
    parts = {name: index[name] for name in component_names(index) if (folder / name / "config.json").is_file()}
    parts = {name: entry for name, entry in parts.items() if entry[0] and is_network(component_class(*entry))}
    configs = {name: read_json(folder / name / "config.json") for name in parts}
    if weights:
        networks = {name: load_shapes(folder / name, *entry) for name, entry in parts.items()}
    else:
        networks = {name: blank(*entry, configs[name]) for name, entry in parts.items()}
    shapes = {name: stored_shapes(network) for name, network in networks.items()}
    denoiser = next((name for name in ("transformer", "unet") if name in shapes), None)
    if denoiser is None:
        raise ConfigError(f"'{folder}' has neither a unet nor a transformer; its weights are in {sorted(shapes)}")
    if weights:
        assemble(str(folder), index, unused, networks)
    kind = parts[denoiser][1]
    return Model(index["_class_name"], shapes, denoiser, kind, configs[denoiser], configs.get("vae", {}))


def blank(library: str, name: str, config: Mapping[str, Any]) -> nn.Module:
    """A network of class `name` of diffusers or transformers, on the meta device: its shapes without its numbers."""
    import torch

    from alignkit.generators.components import component_class

    kind = component_class(library, name)
    with torch.device("meta"):
        if library == "diffusers":
            return kind.from_config(dict(config))  # type: ignore[no-any-return]
        return kind(kind.config_class.from_dict(dict(config)))  # type: ignore[no-any-return]


def stored_shapes(net: nn.Module) -> Shapes:
    """Shapes of what `save_pretrained` would store: parameters, once where they are shared, and persistent buffers."""
    stored = net.state_dict().keys()
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if name in stored}
