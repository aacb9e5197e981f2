"""What text-to-video families share: clips [B, F, 3, H, W], latents [B, C, T, H, W], the rule F = 1 + r (T - 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.records import Sampling


class VideoGenerator(PipelineGenerator):
    """Base of the video families; the VAE's own axis order is [B, 3, F, H, W]."""

    modality = "video"
    component = "transformer"

    def call_arguments(self, prompts: Sequence[str], sampling: Sampling) -> dict[str, Any]:
        self.latent_frames(sampling.num_frames)  # the pipelines round another number, with a line in the log
        return {"num_frames": sampling.num_frames, **super().call_arguments(prompts, sampling)}

    def sampling_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self._tokens}

    def texts(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self.encoded(prompts)[0]}

    def encoded(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """What the pipeline's `encode_prompt` gives for `prompts` alone, T5's states first."""
        told = {"do_classifier_free_guidance": False, "max_sequence_length": self._tokens}
        return self.pipeline.encode_prompt(prompts, device=self.device, **told)

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, C, T, h, w] of clips [B, F, 3, H, W] in [0, 1]."""
        self.latent_frames(pixels.shape[1])
        return super().encode(pixels.transpose(1, 2))

    def decode(self, latents: Tensor) -> Tensor:
        """Clips [B, F, 3, H, W] in [0, 1] of latents."""
        return super().decode(latents).transpose(1, 2)

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """[C, T, h, w] of a clip of that size."""
        channels, *sides = super().latent_shape(height, width)
        return (channels, self.latent_frames(frames), *sides)

    def latent_frames(self, frames: int) -> int:
        """T of a clip of F frames. Raises ConfigError unless F = 1 + r k."""
        if frames % self.temporal_ratio != 1 % self.temporal_ratio:
            raise ConfigError(
                f"{frames} frames do not fit '{self.name}': it takes 1 + {self.temporal_ratio} k, "
                f"e.g. {frames // self.temporal_ratio * self.temporal_ratio + 1}"
            )
        return (frames - 1) // self.temporal_ratio + 1
