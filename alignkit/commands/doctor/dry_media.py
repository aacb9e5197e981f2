"""The stages after a denoising chain, without their numbers: decoding with gradients, and a critic of the result.

Both run forward and backward on the meta device by the code of the training: the family's own decoding with its
checkpoints, and the network of a vision-language model between the patches of `rewards` and the states that answer.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from alignkit.commands.doctor.critic_plan import CriticPlan
from alignkit.commands.doctor.dry_step import Ledger, fused_attention
from alignkit.commands.doctor.model_shapes import Model, blank
from alignkit.errors import ConfigError, MissingFileError
from alignkit.generators.decoding import CACHE, Decoding
from alignkit.generators.pipeline import PipelineGenerator
from rewards.models.patches import read_patches, sample_frames
from rewards.models.vision_language import freeze

QUESTION_TOKENS = 64  # of a question in its turn of the conversation, less those of the media
FEW = (4, 5)  # latent frames that are decoded; each further one adds what the last of them does


@dataclass(frozen=True, slots=True)
class Decoded:
    """Bytes at the peak of decoding with gradients, and what of it is kept while the result is scored."""

    peak: int
    kept: int


# --- decoding -------------------------------------------------------------------------------------------------------


@functools.cache
def decoding_stage(model: Model, size: tuple[int, int, int], dtype: str, decoding: Decoding) -> Decoded:
    """Of one image or video of `size` (height, width, frames): what decoding with gradients takes and keeps.

    A VAE that decodes one latent frame at a time is run on a few of them.
    """
    generator = _codec(model, dtype)
    channels, *axes = generator.latent_shape(*size)
    count = axes[0] if len(axes) == 3 else 1
    chosen = decoding.frames
    if len(axes) == 3 and chosen is not None:
        count = generator._latents_of(decoding, count)  # noqa: SLF001 - what decode itself asks
    if not has_cache(model) or count <= max(FEW):
        return _decode(generator, (channels, *axes), decoding)
    whole = replace(decoding, frames=None)
    few, more = (_decode(generator, (channels, number, *axes[1:]), whole) for number in FEW)
    further = count - FEW[0]
    return Decoded(few.peak + further * (more.peak - few.peak), few.kept + further * (more.kept - few.kept))


@functools.cache
def has_cache(model: Model) -> bool:
    """Whether the VAE decodes one latent frame after the other, with a cache between them."""
    return CACHE in inspect.signature(_codec(model, "float32").pipeline.vae.decoder.forward).parameters


@functools.cache
def has_tiles(model: Model) -> bool:
    """Whether the VAE can decode in spatial tiles."""
    return "use_tiling" in vars(_codec(model, "float32").pipeline.vae)


@functools.cache
def latent_numbers(model: Model, size: tuple[int, int, int]) -> int:
    """How many numbers a latent of `size` (height, width, frames) is."""
    return math.prod(_codec(model, "float32").latent_shape(*size))


def _codec(model: Model, dtype: str) -> PipelineGenerator:
    """The family's codec on the meta device; float16 counts as bfloat16, which never overflows."""
    vae = blank("diffusers", model.vae["_class_name"], model.vae)
    return codec(model, nn.Module.to(vae, torch.float32 if dtype == "float32" else torch.bfloat16))


def codec(model: Model, vae: nn.Module) -> PipelineGenerator:
    """The model's family with a frozen VAE and no other part: it can encode, decode and give the shapes of latents."""
    generator: PipelineGenerator = object.__new__(model.family)
    generator.pipeline, generator.name = SimpleNamespace(vae=vae.eval().requires_grad_(False)), model.pipeline
    return generator


def _decode(generator: PipelineGenerator, shape: tuple[int, ...], decoding: Decoding) -> Decoded:
    vae = generator.pipeline.vae
    with torch.device("meta"):
        latents = torch.empty(1, *shape, requires_grad=True)
        with Ledger([latents, *vae.parameters(), *vae.buffers()]) as ledger, fused_attention():
            pixels = generator.decode(latents, decoding)
            kept = ledger.live
            pixels.backward(torch.empty_like(pixels))
    return Decoded(ledger.peak, kept)


# --- a critic -------------------------------------------------------------------------------------------------------


def critic_numbers(critic: CriticPlan) -> int:
    """How many numbers its weights are."""
    network = _network(critic.folder, critic.dtype, checkpointing=critic.checkpointing)
    return sum(parameter.numel() for parameter in network.parameters())


@functools.cache
def critic_stage(critic: CriticPlan, pixels: tuple[int, ...], tokens: int = QUESTION_TOKENS) -> int:
    """Peak bytes of answers to all questions and their gradient, of media [B, 3, H, W] or [B, F, 3, H, W].

    `tokens`: of each question. Raises what `read_patches` raises for the folder's processor.
    """
    network = _network(critic.folder, critic.dtype, checkpointing=critic.checkpointing)
    media = torch.empty(pixels, device="meta", requires_grad=True)
    with Ledger([media, *network.parameters(), *network.buffers()]) as ledger, fused_attention():
        features = _see(network.model, critic, media)
        _answers(network.model, features, critic.questions, tokens).sum().backward()
    return ledger.peak


@functools.cache
def _network(folder: Path, dtype: str, *, checkpointing: bool) -> Any:
    """The critic on the meta device, frozen as `VlmCritic` freezes it."""
    if not (folder / "config.json").is_file():
        raise MissingFileError(
            f"critic: no '{folder / 'config.json'}'; give a local folder (a hub id is downloaded first: hf download "
            f"{folder} --local-dir FOLDER), or one of configs/critics"
        )
    config = AutoConfig.from_pretrained(folder)
    if not config.model_type.startswith(("qwen2_vl", "qwen2_5_vl")):
        raise ConfigError(f"critic: '{folder}' is a {config.model_type}; the doctor counts Qwen2-VL and Qwen2.5-VL")
    config.text_config.attention_dropout = 0.0
    with torch.device("meta"):
        network = AutoModelForImageTextToText.from_config(config, dtype=vars(torch)[dtype])
    return freeze(network, "meta", checkpointing=checkpointing)


def _see(network: Any, critic: CriticPlan, media: Tensor) -> Tensor:
    """Features [B, N, D] of media by patches and vision tower; the tower reads the values of its grid on the CPU."""
    is_video = media.dim() == 5
    cut = read_patches(str(critic.folder), network.config, video=is_video)
    cut = replace(cut, max_pixels=critic.max_pixels or cut.max_pixels)
    if is_video and critic.frames is not None:
        media = sample_frames(media, min(critic.frames, media.shape[1]))
    patches, _ = cut(media)
    height, width = cut.size(*media.shape[-2:], media.shape[1] if is_video else 0)
    rows, columns = height // cut.patch, width // cut.patch
    places = len(patches) // (len(media) * rows * columns)
    grids = torch.tensor([[places, rows, columns]] * len(media))
    encode = network.get_video_features if is_video else network.get_image_features
    features = encode(patches, grids, return_dict=True, **_positions(len(patches), cut.merge)).pooler_output
    return torch.stack(list(features))


def _positions(count: int, merge: int) -> Mapping[str, Tensor]:
    """What the tower would derive from the grids: positions, and two windows for many, whose memory is the same."""
    return {
        "position_ids": torch.empty(count, 2, dtype=torch.long, device="meta"),
        "window_index": torch.arange(count // merge**2),
        "cu_window_seqlens": torch.tensor([0, count // 2, count]),
    }


def _answers(network: Any, features: Tensor, questions: int, tokens: int) -> Tensor:
    """States [B * questions, D] at the last token, of a row for each question with the features of its medium."""
    rows = len(features) * questions
    texts = torch.empty(rows, features.shape[1] + tokens, features.shape[2], dtype=features.dtype, device="meta")
    is_media = torch.empty(*texts.shape[:2], 1, dtype=torch.bool, device="meta").expand_as(texts)
    states = texts.masked_scatter(is_media, features.repeat_interleave(questions, 0))
    positions = torch.empty(3, *texts.shape[:2], dtype=torch.long, device="meta")
    output = network.language_model(inputs_embeds=states, position_ids=positions, use_cache=False)
    return output.last_hidden_state[:, -1].float()
