"""The VAE side of a generator: pixels in [0, 1] to normalised latents and back, latent statistics and ratios.

Results are float32 at least; a float64 VAE gives float64. Families override the parts in which their VAE differs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.generators.decoding import Decoding, decode_checkpointed


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or in float64 if it is in float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Codec:
    """Base of `PipelineGenerator`: encodes and decodes with the pipeline's VAE."""

    pipeline: Any
    name: str
    latent_group: ClassVar[int]  # see `FamilyDescription`
    _has_overflowed = False

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, C, h, w] of pixels [B, 3, H, W] in [0, 1], normalised as the network expects them.

        The latent is the mode of the VAE's posterior.
        """
        return at_least_float32(self._normalised(self._in_range(self._posterior_mode, pixels * 2 - 1)))

    def decode(self, latents: Tensor, decoding: Decoding | None = None) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] of normalised latents, differentiable.

        With `decoding` the activations are recomputed in the backward pass; pixels and gradients stay the same. Raises
        ConfigError if this VAE cannot do what it asks.
        """

        def coder(vae: Any, raw: Tensor) -> Tensor:
            if decoding is None:
                return self._decode(vae, raw)
            first = None if decoding.frames is None else self._latents_of(decoding, raw.shape[2])
            return decode_checkpointed(vae, raw, self._decode, decoding, first)

        pixels = self._in_range(coder, self._denormalised(latents))
        return (at_least_float32(pixels) / 2 + 0.5).clamp(0, 1)

    def _latents_of(self, decoding: Decoding, count: int) -> int:  # noqa: ARG002 - for video
        """How many of the first of `count` latent frames are decoded for the frames of `decoding`."""
        raise ConfigError(f"frames is {decoding.frames}, and generator '{self.name}' makes images; leave it out")

    def _normalised(self, raw: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        return (raw - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def _denormalised(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def _decode(self, vae: Any, raw: Tensor) -> Tensor:
        return vae.decode(raw).sample

    def _posterior_mode(self, vae: Any, pixels: Tensor) -> Tensor:
        return vae.encode(pixels).latent_dist.mode()

    def _in_range(self, coder: Callable[[Any, Tensor], Tensor], values: Tensor) -> Tensor:
        """`coder(vae, values)` in the VAE's dtype; in float32 after an overflow of the VAE in float16 (SDXL's does).

        The float32 VAE is a copy for this call: the pipeline decodes its own samples in its own way, and a backward
        pass needs the weights of its forward pass.
        """
        vae = self.pipeline.vae
        if not self._has_overflowed:
            result = coder(vae, values.to(vae.dtype))
            if vae.dtype != torch.float16 or result.isfinite().all():
                return result
            warnings.warn(f"the VAE of '{self.name}' overflows in float16; it now runs in float32", stacklevel=3)
            self._has_overflowed = True
        return coder(copy.deepcopy(vae).float(), values.float())

    @property
    def spatial_ratio(self) -> int:
        """Pixels per latent position along one side."""
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    @property
    def temporal_ratio(self) -> int:
        """r: one latent frame per r frames of a video after the first. 1 for images."""
        return 1

    @property
    def frame_step(self) -> int:
        """r g: the model makes videos of 1 + r g k frames; see `generators.frames`."""
        return self.temporal_ratio * self.latent_group

    @property
    def latent_channels(self) -> int:
        """C of a latent."""
        return self.pipeline.vae.config.latent_channels

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:  # noqa: ARG002 - for video
        """[C, h, w] of an image of `height` x `width` pixels."""
        ratio = self.spatial_ratio
        return (self.latent_channels, height // ratio, width // ratio)
