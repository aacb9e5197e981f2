"""Peak memory of a training, estimated from safetensors headers and configs: no weight is read, no device touched.

Weights, gradients and optimizer state are counted exactly; activations are estimated from the architecture, by counts a
token and channel (the form of Korthikanti et al., arXiv 2205.05198, eq. 2; without the attention matrix, which fused
attention never stores). Deliberately not here: sharding over several devices.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError, DataError

GIB = 2**30
# Elements that autograd keeps a token and channel, counted on SD 1.5, SDXL and SD3 at full size (fake tensors, fused
# attention): with a LoRA on the attention, and with all weights trained, where every layer's input is kept as well.
JOINT_BLOCK = {"lora": 12, "full": 21}  # SD3's
UNET_BLOCK = {"lora": 20, "full": 27}  # the transformer blocks of a U-Net, with cross-attention
RESNET = 14  # a U-Net's residual block
ADAM_BYTES = 4 + 4 + 8  # fp32 weight, gradient and two moments of a trained parameter
TEXT_TOKENS = 333  # joint-attention transformers: 77 of CLIP and 256 of T5


@dataclass(frozen=True, slots=True)
class Setup:
    """What decides the memory of a training; `weight_bytes` and `compute_bytes` are 4 for float32, 2 for 16 bits."""

    height: int
    width: int
    batch: int
    candidates: int
    lora_rank: int
    lora_targets: tuple[str, ...]
    full_finetune: bool
    needs_reference: bool
    weight_bytes: int
    compute_bytes: int
    gradient_checkpointing: bool = False
    low_memory: bool = False

    @property
    def images_in_graph(self) -> int:
        """Pictures whose activations are held at once."""
        return self.batch * (1 if self.low_memory else self.candidates)


@dataclass(frozen=True, slots=True)
class Model:
    """A diffusers folder as its headers tell it: tensor shapes by component, and the denoiser's config."""

    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    denoiser: str
    config: Mapping[str, Any]
    vae: Mapping[str, Any]

    @property
    def vae_ratio(self) -> int:
        """Pixels a side of a latent place: AutoencoderKL, DC-AE and Qwen's video VAE tell it each in their way."""
        for name, spare in (("block_out_channels", 1), ("encoder_block_out_channels", 1), ("temperal_downsample", 0)):
            if name in self.vae:
                return 2 ** (len(self.vae[name]) - spare)
        return 8

    @property
    def patch(self) -> int:
        """Latent places a side of a token; packed networks (FLUX, Qwen-Image) take 2 x 2 as channels."""
        channels = self.vae.get("latent_channels") or self.vae.get("z_dim") or 4
        packed = 2 if self.config.get("in_channels") == 4 * channels else 1
        return packed if packed > 1 else self.config.get("patch_size", 1)

    @property
    def width(self) -> int:
        """Channels of a transformer's tokens."""
        own = self.config.get("hidden_size")
        return own or self.config["num_attention_heads"] * self.config["attention_head_dim"]

    def parameters(self, component: str) -> int:
        """How many parameters a component has."""
        return sum(math.prod(shape) for shape in self.shapes[component].values())


def read_model(folder: Path) -> Model:
    """Read a complete diffusers folder. Raises DataError for a truncated file, ConfigError without a denoiser."""
    shapes = {path.name: _component_shapes(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    shapes = {name: tensors for name, tensors in shapes.items() if tensors}
    denoiser = next((name for name in ("transformer", "unet") if name in shapes), None)
    if denoiser is None:
        raise ConfigError(f"'{folder}' has neither a unet nor a transformer; its weights are in {sorted(shapes)}")
    return Model(shapes, denoiser, _config(folder / denoiser), _config(folder / "vae"))


def _config(component: Path) -> dict[str, Any]:
    path = component / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _component_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    files = sorted(folder.glob("*.safetensors"))
    plain = [path for path in files if ".fp16." not in path.name]
    return {name: shape for path in plain or files for name, shape in read_header(path).items()}


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
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


# --- the estimate ---------------------------------------------------------------------------------------------------


def parts(model: Model, setup: Setup) -> dict[str, float]:
    """Bytes of every part of the peak, by name."""
    denoiser = model.parameters(model.denoiser)
    others = sum(model.parameters(name) for name in model.shapes if name != model.denoiser)
    trained = denoiser if setup.full_finetune else lora_parameters(model, setup)
    copy = setup.full_finetune and setup.needs_reference
    return {
        "denoiser weights": 0 if setup.full_finetune else denoiser * setup.weight_bytes,
        "text encoders and VAE": others * setup.weight_bytes,
        "frozen reference copy": denoiser * 4 if copy else 0,
        "trained weights, gradients, AdamW": trained * ADAM_BYTES,
        "activations (estimate)": activations(model, setup),
    }


def total(model: Model, setup: Setup) -> float:
    """Bytes at the peak."""
    return sum(parts(model, setup).values())


def lora_parameters(model: Model, setup: Setup) -> int:
    """rank * (in + out) over the target layers."""
    suffixes = tuple(f"{target}.weight" for target in setup.lora_targets)
    shapes = [shape for name, shape in model.shapes[model.denoiser].items() if name.endswith(suffixes)]
    return sum(setup.lora_rank * (shape[0] + math.prod(shape[1:])) for shape in shapes)


def activations(model: Model, setup: Setup) -> float:
    """Bytes that one backward pass needs of the forward pass.

    With gradient checkpointing a block keeps its input (1 element a token and channel; 3 for a residual block, whose
    skip connection is kept too), and one block is whole.
    """
    blocks = list(_blocks(model, setup))
    if setup.gradient_checkpointing:
        elements = sum((3 if count == RESNET else 1) * size for count, size in blocks) + max(
            count * size for count, size in blocks
        )
    else:
        elements = sum(count * size for count, size in blocks)
    return float(elements * setup.images_in_graph * setup.compute_bytes)


def _blocks(model: Model, setup: Setup) -> Iterator[tuple[int, int]]:
    """(elements kept a token and channel, tokens x channels) of every block for one picture."""
    area = (setup.height // model.vae_ratio) * (setup.width // model.vae_ratio)
    mode = "full" if setup.full_finetune else "lora"
    if model.denoiser == "unet":
        yield from _unet_blocks(model.config, area, UNET_BLOCK[mode])
        return
    config = model.config
    tokens = area // model.patch**2 + TEXT_TOKENS
    depth = sum(config.get(name, 0) for name in ("num_layers", "num_single_layers", "num_refiner_layers"))
    yield from ((JOINT_BLOCK[mode], tokens * model.width) for _ in range(depth))


def _unet_blocks(config: Mapping[str, Any], area: int, block: int) -> Iterator[tuple[int, int]]:
    channels = config["block_out_channels"]
    depths = _per_level(config.get("transformer_layers_per_block", 1), len(channels))
    layers = _per_level(config.get("layers_per_block", 2), len(channels))
    kinds = config.get("down_block_types", ["CrossAttnDownBlock2D"] * len(channels))
    for level, (width, kind) in enumerate(zip(channels, kinds, strict=True)):
        size = area // 4**level * width
        # layers on the way down, one more on the way up; the middle counts as one of the last level
        count = 2 * layers[level] + 1 + (level == len(channels) - 1)
        for _ in range(count):
            yield RESNET, size
            if "Attn" in kind:
                yield from ((block, size) for _ in range(depths[level]))


def _per_level(value: Any, levels: int) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value] * levels


def variants(setup: Setup) -> dict[str, Setup]:
    """The setup as it is, and with what saves memory switched on."""
    checkpointed = replace(setup, gradient_checkpointing=True)
    choices = {
        "as asked": setup,
        "activation_checkpointing: true": checkpointed,
        "low_memory: true": replace(setup, low_memory=True),
        "both": replace(checkpointed, low_memory=True),
    }
    wanted = {name: choice for name, choice in choices.items() if setup.candidates > 1 or not choice.low_memory}
    return {name: choice for name, choice in wanted.items() if name == "as asked" or choice != setup}
