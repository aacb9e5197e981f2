"""The seams: what a generator, a reward, a critic and a judge must be able to do.

Structural types only; nothing here is inherited from by need, and importing this module loads no torch.
Shape letters: B batch, C/H/W latent or pixel channels and size, F frames, T latent frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from alignkit.errors import ConfigError
from alignkit.records import Conditioning, Prompt, Sampling, Scores

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@runtime_checkable
class ImageSource(Protocol):
    """The one ability Syn-Pic and evaluation need of a generator: generate images or videos."""

    name: str

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> Tensor:
        """Float pixels [B, 3, H, W], or [B, F, 3, H, W] of videos, in [0, 1].

        Row i depends on prompts[i], seeds[i] and sampling alone.
        """
        ...


@runtime_checkable
class Generator(ImageSource, Protocol):
    """All a trainer knows of a model: conditioner, codec and denoiser of a loaded diffusers pipeline.

    Canonical time: t in [0, 1], t = 1 is pure noise. Canonical latents: [B, C, H, W] or [B, C, T, H, W], whatever
    packing or sign the network uses inside. `model` is the one module a trainer trains; its `forward` is `predict`.
    """

    model: nn.Module

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of B prompts, differentiable where text encoders are trained."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> scaled latents (the mode of the posterior)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pixels [B, 3, H, W] in [0, 1], differentiable."""
        ...

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """Shape of one latent, without the batch axis."""
        ...

    def sample_t(self, n: int, generator: torch.Generator) -> Tensor:
        """n training times [n] from the family's own density, on its own grid."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) noise."""
        ...

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What `predict` should return: eps, v or the flow velocity, the family's native target."""
        ...

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The native prediction, in the canonical latent layout."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it, `predict` is the frozen base model (adapters off)."""
        ...

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter so that the vanilla pipeline's `load_lora_weights(folder)` gives the tuned picture."""
        ...


@runtime_checkable
class Reward(Protocol):
    """A picture judge. `comparable_across_prompts` says whether scores of different prompts share a scale.

    One whose rows depend on each other, or on earlier calls, says so as `Dependent`.
    """

    name: str
    modality: str  # "image" or "video"
    needs_prompt: bool
    differentiable: bool
    comparable_across_prompts: bool
    native_range: tuple[float, float]
    licence: str
    source: str

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores of media [B, 3, H, W] (or [B, F, 3, H, W]) in [0, 1] with their own prompts, row by row."""
        ...


@runtime_checkable
class ExampleMaker(Protocol):
    """A reward that cannot read plain photographs and captions, and makes an example for itself out of them."""

    def example(self, photograph: Tensor, prompt: Prompt) -> tuple[Tensor, Prompt]:
        """An image [3, H, W] in [0, 1] and its prompt; `prompt.metadata` has the photograph's `name`."""
        ...


@runtime_checkable
class Dependent(Protocol):
    """A reward whose score of a medium may hang on other media: of the same call, or of calls before."""

    def dependence(self) -> str:
        """Why it does and what to do instead, the end of a sentence; empty where each row stands for itself."""
        ...


def require_independent(rewards: Mapping[str, object]) -> None:
    """ConfigError naming the first reward of `rewards` whose scores would hang on how media are cut into calls."""
    for name, reward in rewards.items():
        reason = reward.dependence() if isinstance(reward, Dependent) else ""
        if reason:
            raise ConfigError(f"reward '{name}': {reason}")


def require_modality(rewards: Mapping[str, object], modality: str) -> None:
    """ConfigError naming the first reward of `rewards` that does not score media of `modality`, "image" or "video"."""
    for name, reward in rewards.items():
        if isinstance(reward, Reward) and reward.modality != modality:
            raise ConfigError(
                f"reward '{name}' scores {reward.modality}s, but here are {modality}s; leave it out, or name a "
                f"reward of modality {modality}"
            )


@runtime_checkable
class Reporting(Protocol):
    """Something that costs while it works: a served reward or judge."""

    def report(self) -> object:
        """What asking has cost so far; its text is one line."""
        ...


@runtime_checkable
class Obtainable(Protocol):
    """A learnt reward's class that says, as the end of a sentence, how to get its weights."""

    get: str


@runtime_checkable
class Critic(Protocol):
    """A generative VLM whose answers carry gradients."""

    def ask(self, media: Tensor, questions: Sequence[str] | Sequence[Sequence[str]]) -> Tensor:
        """Log-probabilities [B, Q] of the positive answer, differentiable to the pixels.

        Q questions for all media, or a list of Q for each medium.
        """
        ...


@runtime_checkable
class Judge(Protocol):
    """A served VLM that compares two media; +1 first is better, -1 second, 0 abstains."""

    def compare(self, first: Tensor, second: Tensor, prompts: Sequence[Prompt]) -> list[int]:
        """One verdict a pair."""
        ...
