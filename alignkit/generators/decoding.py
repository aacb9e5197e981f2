"""Decoding with gradients in bounded memory: one activation checkpoint for each call of the VAE's decoder.

A causal video VAE (Wan, Qwen-Image) calls its decoder once for each latent frame. Between the calls a list holds the
last frames of the input of every convolution, and every call changes this list. A plain activation checkpoint around
such a call fails: when the backward pass repeats the call, the list is ahead of it. Here the list is an input and a
result of the call and belongs to one decode, as in https://github.com/huggingface/diffusers/pull/14771. The decoder
gets the same tensors in the same calls as from the plain VAE, so pixels and gradients are equal to the last bit.

Kept for the backward pass: the activations of one call, the list of each call, and the pixels. VAEs without such a list
get one activation checkpoint for the whole batch, or one for each row, spatial tile or temporal tile that the VAE
decodes on its own (`vae.enable_slicing()`, `vae.enable_tiling()`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from alignkit.errors import ConfigError

CACHE = "feat_cache"  # the argument of the decoders that keep such a list


@dataclass(frozen=True)
class Decoding:
    """How `PipelineGenerator.decode` bounds the memory of its backward pass.

    Args:
        frames: of a video: the first so many frames, or the indices of frames, in any order; all by default. Latent
            frames after the last of them are left out where the family's decoder is causal.
        segment: latent frames per outer activation checkpoint, of a VAE with a feature cache. With segments of s of T
            latent frames T / s + s caches are kept instead of T, at the cost of one more forward pass. It helps only
            where the caches outweigh the activations of one call. 1: no outer ones.
        cache_on_cpu: keep the feature caches between the calls, or between the segments, in the memory of the CPU.
        tiles: decode in the VAE's own spatial tiles, as after `vae.enable_tiling()`, with the memory of one tile. Tiles
            are blended where they overlap, so the pixels differ slightly. Latents that are not larger than a tile are
            decoded whole.

    Raises ConfigError for a segment below 1.
    """

    frames: int | Sequence[int] | None = None
    segment: int = 1
    cache_on_cpu: bool = False
    tiles: bool = False

    def __post_init__(self) -> None:
        if self.segment < 1:
            raise ConfigError(f"segment is {self.segment}; a segment has one latent frame or more")

    def indices(self, count: int) -> list[int]:
        """The chosen frames of a video of `count` frames. Raises ConfigError if it does not have them."""
        if self.frames is None:
            return list(range(count))
        chosen = list(range(self.frames)) if isinstance(self.frames, int) else list(self.frames)
        if not chosen or min(chosen) < 0 or max(chosen) >= count:
            raise ConfigError(f"frames is {self.frames}; the video has {count} frames, with indices 0 to {count - 1}")
        return chosen


def decode_checkpointed(
    vae: Any, raw: Tensor, decode: Callable[[Any, Tensor], Tensor], decoding: Decoding, first: int | None = None
) -> Tensor:
    """`decode(vae, raw)` with activation checkpointing. `vae` is not changed, and must not be before the backward pass.

    Args:
        vae: an autoencoder of diffusers, frozen or not, in any dtype, also under autocast.
        raw: latents [B, C, h, w] or [B, C, T, h, w] as the VAE takes them.
        decode: calls the `decode` method of the VAE that it gets.
        decoding: segment length and place of the caches; its frames are the caller's.
        first: decode only so many latent frames.

    Raises ConfigError if segments or caches are asked of a VAE without a feature cache, segments of one that tiles, or
    tiles of one that has none.
    """
    if decoding.tiles:
        if "use_tiling" not in vars(vae):
            raise ConfigError(f"tiles: {type(vae).__name__} does not decode in tiles; leave it out")
        vae = _with_parts(vae, use_tiling=True)
    is_cached = CACHE in inspect.signature(vae.decoder.forward).parameters
    if not is_cached and (decoding.segment > 1 or decoding.cache_on_cpu):
        raise ConfigError(
            f"segment and cache_on_cpu are for VAEs with a feature cache, and {type(vae).__name__} has none; leave "
            "both out, or use vae.enable_slicing() or vae.enable_tiling() to save memory"
        )
    if is_cached and not vae.use_tiling:
        rows = raw.split(1) if vae.use_slicing else [raw]
        return torch.cat([_decode_in_time(vae, row, decode, decoding, first) for row in rows])
    if decoding.segment > 1:
        raise ConfigError(f"segment is {decoding.segment}, and this VAE decodes in tiles; use one of the two")
    decoder = _CheckpointedDecoder(vae.decoder, cache_on_cpu=decoding.cache_on_cpu)
    return decode(_with_parts(vae, decoder=decoder), raw if first is None else raw[:, :, :first])


def _decode_in_time(
    vae: Any, raw: Tensor, decode: Callable[[Any, Tensor], Tensor], decoding: Decoding, first: int | None
) -> Tensor:
    # On all latent frames, as in the plain VAE: with fewer it may round in another way.
    latents = vae.post_quant_conv(raw)[:, :, :first]
    parts = partial(_with_parts, vae, post_quant_conv=nn.Identity())
    if decoding.segment == 1:
        return decode(parts(decoder=_CheckpointedDecoder(vae.decoder, cache_on_cpu=decoding.cache_on_cpu)), latents)

    def decode_segment(segment: Tensor, *start: Any) -> tuple[Any, ...]:
        decoder = _CheckpointedDecoder(vae.decoder, start=start)
        pixels = decode(parts(decoder=decoder), segment)
        return (pixels, *decoder.cache)

    cache: list[Any] = []
    pixels = []
    for segment in latents.split(decoding.segment, dim=2):
        with _saving(on_cpu=decoding.cache_on_cpu):
            frames, *cache = checkpoint(decode_segment, segment, *cache, use_reentrant=False)
        pixels.append(frames)
    return torch.cat(pixels, dim=2)


def _with_parts(vae: Any, **parts: Any) -> Any:
    """A view of `vae` that shares its weights, with other `parts` and a state of its own."""
    view = copy.copy(vae)
    vars(view).update(parts)  # found before the children of the module, which stay as they are
    return view


def _saving(*, on_cpu: bool) -> AbstractContextManager[Any]:
    return save_on_cpu() if on_cpu else nullcontext()


class _CheckpointedDecoder(nn.Module):
    """A VAE's decoder with an activation checkpoint per call; `start` is the feature cache after the frames before."""

    def __init__(self, decoder: nn.Module, *, cache_on_cpu: bool = False, start: Sequence[Any] = ()) -> None:
        super().__init__()
        self.decoder = decoder  # a child, because Qwen-Image's VAE counts the convolutions in it
        self.cache_on_cpu = cache_on_cpu
        self.start = start
        self.cache: list[Any] = []

    def forward(
        self,
        *inputs: Any,
        feat_cache: list[Any] | None = None,
        feat_idx: list[int] | None = None,  # noqa: ARG002 - each call counts from 0
        **options: Any,
    ) -> Any:
        if feat_cache is None:
            return checkpoint(self.decoder, *inputs, use_reentrant=False, **options)
        if self.start:
            feat_cache[:], self.start = self.start, ()
            options |= dict.fromkeys(options.keys() & {"first_chunk"}, False)

        def call(*values: Any) -> tuple[Any, ...]:
            # The tensors are arguments, not variables of this scope, so that hooks on saved tensors can move them.
            cache = list(values[count:])
            return (self.decoder(*values[:count], feat_cache=cache, feat_idx=[0], **options), *cache)

        count = len(inputs)
        with _saving(on_cpu=self.cache_on_cpu):
            result, *self.cache = checkpoint(call, *inputs, *feat_cache, use_reentrant=False)
        feat_cache[:] = self.cache
        return result
