"""Shared by text-to-video families: videos [B, F, 3, H, W], latents [B, C, T, H, W], the rule F = 1 + r (T - 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alignkit.generators.decoding import Decoding
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.records import Sampling


class VideoGenerator(PipelineGenerator):
    """Base of the video families; the VAE's own axis order is [B, 3, F, H, W]."""

    modality = "video"
    component = "transformer"

    def call_arguments(self, prompts: Sequence[str], sampling: Sampling) -> dict[str, Any]:
        return {"num_frames": sampling.num_frames, **super().call_arguments(prompts, sampling)}

    def sampling_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self._tokens}

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self.encoded(prompts)[0]}

    def encoded(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """The results of the pipeline's `encode_prompt` for `prompts` without a negative prompt, T5's states first."""
        return self.pipeline.encode_prompt(
            prompts, device=self.text_device, do_classifier_free_guidance=False, max_sequence_length=self._tokens
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, C, T, h, w] of videos [B, F, 3, H, W] in [0, 1]."""
        self.latent_frames(pixels.shape[1])
        return super().encode(pixels.transpose(1, 2))

    def decode(self, latents: Tensor, decoding: Decoding | None = None) -> Tensor:
        """Videos [B, F, 3, H, W] in [0, 1] of latents [B, C, T, h, w], or the frames that `decoding` chooses."""
        video = super().decode(latents, decoding).transpose(1, 2)
        if decoding is None or decoding.frames is None:
            return video
        return video[:, decoding.indices(video.shape[1])]

    def _latents_of(self, decoding: Decoding, count: int) -> int:
        last = max(decoding.indices((count - 1) * self.temporal_ratio + 1))
        return self.latent_prefix(1 + math.ceil(last / self.temporal_ratio), count)

    def latent_prefix(self, needed: int, count: int) -> int:  # noqa: ARG002 - for causal decoders
        """How many of the first of `count` latent frames are decoded if the first `needed` are asked for.

        Their frames must be those of the whole video, to the last bit. All, unless the family's decoder is causal.
        """
        return count

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """[C, T, h, w] of a video of `frames` frames of `height` x `width` pixels."""
        channels, *sides = super().latent_shape(height, width)
        return (channels, self.latent_frames(frames), *sides)

    def latent_frames(self, frames: int) -> int:
        """T of a video of F frames. Raises ConfigError unless F = 1 + r g k."""
        self.require_frames(frames, "num_frames")
        return (frames - 1) // self.temporal_ratio + 1
