"""A diffusers folder as shapes: of its safetensors headers, or, where it holds configs alone, of networks on the meta
device. No weight is read or made.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, DataError, UnknownNameError, nearest
from alignkit.generators import read_model_index
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

    def denoiser_parameters(self) -> int:
        """How many of the denoiser's numbers are parameters; the rest are fixed positions."""
        return sum(parameter.numel() for parameter in self.blank_denoiser().parameters())

    def blank_denoiser(self) -> Any:
        """The denoiser on the meta device."""
        return blank("diffusers", self.denoiser_class, self.config)


def read_model(folder: Path) -> Model:
    """Read a diffusers folder, with weights or with configs alone.

    Raises MissingFileError for an incomplete folder, DataError for a truncated file, ConfigError without a denoiser,
    UnknownNameError for a class that the installed libraries lack.
    """
    weights = any(folder.glob("*/*.safetensors")) or not any(folder.glob("*/config.json"))
    index = read_model_index(str(folder), weights=weights)
    parts = {name: entry for name, entry in index.items() if (folder / name / "config.json").is_file()}
    configs = {name: json.loads((folder / name / "config.json").read_text(encoding="utf-8")) for name in parts}
    if weights:
        shapes = {name: _stored_shapes(folder / name) for name in parts}
    else:
        shapes = {name: _config_shapes(*entry, configs[name]) for name, entry in parts.items()}
    shapes = {name: tensors for name, tensors in shapes.items() if tensors}
    denoiser = next((name for name in ("transformer", "unet") if name in shapes), None)
    if denoiser is None:
        raise ConfigError(f"'{folder}' has neither a unet nor a transformer; its weights are in {sorted(shapes)}")
    kind = parts[denoiser][1]
    return Model(index["_class_name"], shapes, denoiser, kind, configs[denoiser], configs.get("vae", {}))


# --- from configs ---------------------------------------------------------------------------------------------------


def blank(library: str, name: str, config: Mapping[str, Any]) -> nn.Module:
    """A network of class `name` of diffusers or transformers, on the meta device: its shapes without its numbers."""
    import torch
    from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj

    try:
        kind = simple_get_class_obj(library, name)
    except AttributeError as error:
        raise UnknownNameError(f"{library} as installed has no class '{name}'; a newer one may") from error
    with torch.device("meta"):
        if library == "diffusers":
            return kind.from_config(dict(config))
        return kind(kind.config_class.from_dict(dict(config)))


def _config_shapes(library: str, name: str, config: Mapping[str, Any]) -> Shapes:
    """Shapes of what `save_pretrained` would store: parameters, once where they are shared, and persistent buffers."""
    net = blank(library, name, config)
    stored = net.state_dict().keys()
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if name in stored}


# --- from headers ---------------------------------------------------------------------------------------------------


def _stored_shapes(folder: Path) -> Shapes:
    files = sorted(folder.glob("*.safetensors"))
    plain = [path for path in files if ".fp16." not in path.name]
    return {name: shape for path in plain or files for name, shape in read_header(path).items()}


def read_header(path: Path) -> Shapes:
    """Tensor shapes of a safetensors file. Raises DataError naming the file when it is truncated or none."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise DataError(f"'{path}' is truncated or no safetensors file ({size} bytes); copy it again")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    wanted = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if wanted != size:
        raise DataError(f"'{path}' has {size} bytes, its header promises {wanted}; copy it again")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}
