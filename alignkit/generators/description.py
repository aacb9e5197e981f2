"""What a family says of itself without a loaded pipeline: the doctor and the LoRA files read it from the class.

Here are the defaults and the inputs that several networks share; each family overrides what differs in its own file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from alignkit.adapters.comfyui import Keys
from alignkit.adapters.lora_files import Origin

Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LatentSize:
    """A batch of B latents of T latent frames and H x W places."""

    B: int
    T: int
    H: int
    W: int


class FamilyDescription:
    """Facts of a family that need no weights.

    tokens: places of a prompt as the family's pipeline pads it.
    origin: how files of its LoRAs are recognised and what they are called in messages.
    comfyui: the keys of its LoRAs in ComfyUI; None where ComfyUI has none.
    default_size: (height, width, frames) that the pipeline generates by default; None: the network's sample size.
    latent_group: latent frames after the first that the VAE decodes together; a video has 1 + r g k frames.
    own_steps: whether its chains follow a few-step sampling of their own instead of `diffusion.solvers`.
    """

    tokens: int = 77
    origin: ClassVar[Origin]
    comfyui: ClassVar[Keys | None] = None
    default_size: ClassVar[tuple[int, int, int] | None] = None
    latent_group: ClassVar[int] = 1
    own_steps: ClassVar[bool] = False

    @classmethod
    def network_inputs(cls, config: Any, size: LatentSize) -> Inputs:
        """Keywords of one call of the network with `config`, uninitialised tensors on the default device.

        The shapes are those of `call` at `size`; on the meta device they cost no memory. `call` itself needs a loaded
        pipeline and reads values of masks, which a meta tensor does not have.
        """
        raise NotImplementedError

    @classmethod
    def vae_ratios(cls, vae: Mapping[str, Any]) -> tuple[int, int]:
        """Pixels a side of a latent place, and frames of a latent frame after the first, from the VAE's config."""
        blocks = vae.get("block_out_channels")
        return (2 ** (len(blocks) - 1) if blocks else 8), 1


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor on the default device."""
    return torch.empty(shape, dtype=dtype)


def blank_mask(*shape: int) -> Tensor:
    """An uninitialised mask of integers."""
    return blank(*shape, dtype=torch.long)


def image_inputs(config: Any, size: LatentSize, text: tuple[int, int], name: str = "hidden_states") -> Inputs:
    """Latents [B, C, H, W] called `name`, times [B], and text states [B, *text]."""
    latents = blank(size.B, config.in_channels, size.H, size.W)
    return {name: latents, "timestep": blank(size.B), "encoder_hidden_states": blank(size.B, *text)}


def packed_inputs(config: Any, size: LatentSize, text: tuple[int, int]) -> Inputs:
    """As `image_inputs`, with latents as tokens [B, H/2 W/2, 4 C]."""
    packed = blank(size.B, size.H // 2 * (size.W // 2), config.in_channels)
    return {**image_inputs(config, size, text), "hidden_states": packed}


def video_inputs(config: Any, size: LatentSize, text: tuple[int, int], *, frames_first: bool = False) -> Inputs:
    """As `image_inputs`, with latents [B, C, T, H, W], or [B, T, C, H, W] with `frames_first`."""
    axes = (size.T, config.in_channels) if frames_first else (config.in_channels, size.T)
    return {**image_inputs(config, size, text), "hidden_states": blank(size.B, *axes, size.H, size.W)}
