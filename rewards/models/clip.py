"""CLIP for all rewards that use it: loading, preparing images, encoding images and prompts, sharing a vision tower.

Weights are a transformers folder or hub id, or one file in open_clip's or transformers' names. Everything is frozen;
gradients reach the pixels. Not here: scores (each reward's own file), and open_clip's clean-up of Unicode and HTML in
prompts, which transformers' tokenizer does not do.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from alignkit.errors import DataError, MissingFileError
from alignkit.protocols import Reward
from alignkit.records import Prompt, Scores, texts
from rewards.models.clip_layouts import config_of, transformers_names
from rewards.models.media import CLIP_MEAN, CLIP_STD, Preparation, check_media, precise
from rewards.models.weights import load_whole, read_state, torch_dtype

LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_ROUND = 64  # a vocabulary may be padded to the next multiple
_CACHED = 8  # batches of prompts; with all tokens (MPS) about 0.3 MiB a prompt


class Features(NamedTuple):
    """Token states [B, N, width] of a tower before its projection, and the pooled ones [B, width]."""

    tokens: Tensor
    pooled: Tensor


class Vision:
    """The vision tower: media [B, 3, H, W] in [0, 1] and their preparation -> Features."""

    def __init__(self, tower: nn.Module) -> None:
        self.tower = tower

    def __call__(self, media: Tensor, preparation: Preparation) -> Features:
        weight = self.tower.embeddings.class_embedding
        output = self.tower(preparation(media.to(weight.device)).to(weight.dtype))
        return Features(output.last_hidden_state, output.pooler_output)

    def equals(self, other: Vision) -> bool:
        """Whether both have the same architecture and equal weights, on one device in one precision."""
        mine, theirs = self.tower, other.tower
        if mine is theirs:
            return True
        if _shape(mine) != _shape(theirs):
            return False
        pairs = zip(mine.parameters(), theirs.parameters(), strict=True)
        return all(a.device == b.device and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def _shape(tower: nn.Module) -> tuple[Any, ...]:
    """The architecture of a tower."""
    c = tower.config
    sizes = c.image_size, c.patch_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers
    return *sizes, c.num_attention_heads, c.hidden_act, c.layer_norm_eps


class SharedVision(Vision):
    """A tower of several rewards that encodes each media tensor once per preparation.

    The last features are kept for the same tensor object (a weak reference) at the same version; after an in-place
    edit, or with another gradient mode, checkpoint, autocast or preparation, they are computed again. They are dropped
    as soon as a gradient has passed through them, since that frees their graph; until then several scores may use it,
    and their sum is back-propagated at once. Scores that share a graph but are back-propagated one by one need
    `retain_graph`, as usual in torch. Not noticed: edits through `.data` or numpy. Not kept: features of inference
    tensors, which have no version.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__(tower)
        self._media: weakref.ref[Tensor] | None = None
        self._features: dict[tuple[Any, ...], Features] = {}

    def __call__(self, media: Tensor, preparation: Preparation) -> Features:
        if media.is_inference():
            return super().__call__(media, preparation)
        key = _state(media, preparation)
        if self._media is None or self._media() is not media or any(known[:-1] != key[:-1] for known in self._features):
            self._media, self._features = weakref.ref(media, self._forget), {}
        if key not in self._features:
            features = super().__call__(media, preparation)
            if features.tokens.requires_grad:
                features.tokens.register_hook(self._forget)
            self._features[key] = features
        return self._features[key]

    def _forget(self, _: object) -> None:
        self._features = {}


def _state(media: Tensor, preparation: Preparation) -> tuple[Any, ...]:
    """All that the features of one tensor depend on; the preparation is last.

    Square images are resized equally by every fit; at the tower's size they are not resized.
    """
    if media.shape[-1] == media.shape[-2]:
        preparation = replace(preparation, fit="crop", fill=(0.0, 0.0, 0.0), pad_first=False)
        if media.shape[-1] == preparation.size:
            preparation = replace(preparation, resample="bicubic", passes="pil")
    kind = media.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    tracked = torch.is_grad_enabled() and media.requires_grad
    version = media._version  # noqa: SLF001 - the one counter of in-place edits
    # A checkpoint's forward and its recomputation each save tensors in their own way, and must each run the tower.
    saving = torch._C._autograd._top_saved_tensors_default_hooks(True) if tracked else None  # noqa: SLF001
    return version, tracked, saving, torch.is_inference_mode_enabled(), autocast, preparation


class Clip:
    """A frozen CLIP with its tokenizer and its preparation of images.

    model: folder or hub id of a transformers CLIPModel, or a file of weights (.safetensors, .pt, .bin, .pth).
    processor: folder or hub id of the tokenizer and preprocessor_config.json; "" for the model's own.
    activation: for a weights file, which does not store it; open_clip's LAION models have gelu, OpenAI's quick_gelu.
    get: how to get the weights, for the error if they are missing.
    tensors: the weights themselves, if the reward has read a file that holds more than a CLIP.
    Raises MissingFileError (with how to get them) for missing weights or tokenizers, DataError for missing or
    unexpected keys and for a tokenizer of another vocabulary, ConfigError for an unknown dtype.
    """

    def __init__(
        self,
        model: str,
        *,
        name: str,
        processor: str = "",
        device: str = "cpu",
        dtype: str = "float32",
        activation: str = "gelu",
        get: str = "",
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        processor, get = processor or model, get or f"`hf download {model} --local-dir FOLDER` fetches a hub model"
        if tensors is None and Path(model).is_file():
            tensors = read_state(model, owner=name, advice=get)
        if tensors is None:
            clip = _from_folder(model, name, torch_dtype(dtype), get)
            self.tokenizer = _tokenizer(processor, name)
        else:
            self.tokenizer = _tokenizer(processor, name)
            clip = _from_tensors(tensors, model, name, torch_dtype(dtype), self.tokenizer, activation)
        vocabulary = clip.config.text_config.vocab_size
        words = len(self.tokenizer)
        if vocabulary not in (words, math.ceil(words / _ROUND) * _ROUND):
            raise DataError(
                f"{name}: the tokenizer '{processor}' has {words} tokens and the weights '{model}' {vocabulary}; give "
                "`processor` the folder that belongs to these weights"
            )
        self.model = clip.to(device).eval().requires_grad_(False)
        self.preparation = preparation_of(processor, clip.config.vision_config.image_size, name)
        self.vision: Vision = Vision(self.model.vision_model)
        self._cached_read = functools.lru_cache(_CACHED)(self._read)

    @property
    def scale(self) -> float:
        """exp(logit_scale), about 100 in published weights."""
        return float(self.model.logit_scale.double().exp())

    def see(self, media: Tensor) -> Features:
        """Features of media [B, 3, H, W] in [0, 1] from the vision tower, with the graph to the pixels."""
        return self.vision(media, self.preparation)

    def embed_media(self, media: Tensor) -> Tensor:
        """Projected, normalised image embeddings [B, D], at least float32."""
        return _normalised(self.model.visual_projection(self.see(media).pooled))

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Projected, normalised prompt embeddings [B, D] without gradient, at least float32."""
        return _normalised(self.read(prompts)[0])

    def read(self, prompts: Sequence[str], *, tokens: bool = False) -> tuple[Tensor, ...]:
        """Projected states of prompts without gradient: the pooled [B, D] and, with `tokens`, all [B, L, D].

        Prompts are padded or truncated to the whole window (the end-of-text token is kept), without attention mask, as
        published: the tower is causal, so padding cannot change the states before it. Equal prompts are encoded once.
        The cache holds whole batches, so that states of a batch do not depend on earlier calls, not even by rounding.
        """
        distinct = tuple(dict.fromkeys(prompts))
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.model.device)
        return tuple(states[rows] for states in self._cached_read(distinct, tokens))

    def _read(self, prompts: tuple[str, ...], tokens: bool) -> tuple[Tensor, ...]:  # noqa: FBT001 - part of the cache's key
        window = self.model.config.text_config.max_position_embeddings
        with torch.inference_mode(mode=False), torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            ids = self.tokenizer(
                list(prompts), padding="max_length", truncation=True, max_length=window, return_tensors="pt"
            ).input_ids
            output = self.model.text_model(input_ids=ids.to(self.model.device))
            states = (output.pooler_output, output.last_hidden_state) if tokens else (output.pooler_output,)
            return tuple(map(self.model.text_projection, states))


def _normalised(states: Tensor) -> Tensor:
    return functional.normalize(precise(states), dim=-1)


class ClipReward:
    """Base class of rewards on one CLIP: checks, call and common attributes.

    A subclass sets `name` and `clip`, and may override `_score`: totals [B] of images [B, 3, H, W] and their texts.
    """

    name: str
    modality = "image"
    needs_prompt = True
    differentiable = True
    comparable_across_prompts = False
    native_range: tuple[float, float]
    licence: str
    source: str
    clip: Clip

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores of media [B, 3, H, W] in [0, 1] with their own prompts. Raises DataError as `check_media` does."""
        return Scores(self._score(check_media(media, prompts, self), texts(prompts)))

    def _score(self, media: Tensor, prompts: list[str]) -> Tensor:
        """The cosine of every image with its own prompt, [B]."""
        return (self.clip.embed_media(media) * self.clip.embed_prompts(prompts)).sum(-1)


def share_vision(rewards: Iterable[Reward]) -> int:
    """Let those of `rewards` that use CLIP with equal vision weights share one tower.

    Returns the number of towers. All weights are compared, which costs a pass over them; copies are freed. PickScore,
    HPSv2 and MPS are each fine-tuned, so published weights are equal only if a tower was frozen or a model is used
    twice (CLIP score and the aesthetic score on one CLIP ViT-L/14).
    """
    groups: list[list[ClipReward]] = []
    for reward in rewards:
        if isinstance(reward, ClipReward):
            equal = (group for group in groups if group[0].clip.vision.equals(reward.clip.vision))
            group = next(equal, None)
            if group is None:
                groups.append(group := [])
            group.append(reward)
    for group in (group for group in groups if len(group) > 1):
        shared = SharedVision(group[0].clip.vision.tower)
        for member in group:
            member.clip.vision, member.clip.model.vision_model = shared, shared.tower
    return len(groups)


def preparation_of(processor: str, side: int, name: str) -> Preparation:
    """The preparation in preprocessor_config.json of a folder or hub id; CLIP's default if there is no such file.

    `side`: image size of the vision tower. Raises DataError for settings that no CLIP has (another size, no rescaling).
    """
    try:
        stored, _ = CLIPImageProcessorPil.get_image_processor_dict(processor)
    except OSError:
        stored = {}
    size, crop = stored.get("size", side), stored.get("crop_size", side)
    size = size if isinstance(size, dict) else {"shortest_edge": size}
    crops = stored.get("do_center_crop", True)
    cropped = tuple(crop.values()) if isinstance(crop, dict) else (crop, crop)
    resample = _RESAMPLE.get(stored.get("resample", 3))
    steps = [stored.get(f"do_{step}", True) for step in ("resize", "rescale", "normalize")]
    fit = ""
    if size == {"height": side, "width": side} and (not crops or cropped == (side, side)):
        fit = "stretch"
    elif size == {"shortest_edge": side} and crops and cropped == (side, side):
        fit = "crop"
    if not (fit and resample and all(steps)):
        raise DataError(
            f"{name}: preprocessor_config.json of '{processor}' has size {size}, "
            f"crop {crop if crops else 'none'}, resample {stored.get('resample')}; known are CLIP's forms at the "
            f"tower's {side} pixels"
        )
    mean, std = (tuple(stored.get(f"image_{kind}", own)) for kind, own in (("mean", CLIP_MEAN), ("std", CLIP_STD)))
    return Preparation(side, fit, resample, mean, std)


def _tokenizer(processor: str, name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(processor)
    except (OSError, ValueError) as error:
        raise MissingFileError(
            f"{name}: no tokenizer in '{processor}'; `hf download {LAION_H} --include '*.json' 'merges.txt' "
            f"--local-dir FOLDER` and give `processor` that folder: {error}"
        ) from error


def _from_folder(model: str, name: str, dtype: torch.dtype, get: str) -> Any:
    try:
        return load_whole(CLIPModel, model, name, dtype=dtype)
    except OSError as error:
        raise MissingFileError(
            f"{name}: '{model}' is no CLIP folder or weights file here and no hub id at hand; {get}: {error}"
        ) from error


def _from_tensors(
    tensors: dict[str, Tensor], path: str, name: str, dtype: torch.dtype, words: Any, activation: str
) -> Any:
    named = transformers_names(tensors)
    special = {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    config = config_of(named, name=name, path=path, special=special, activation=activation)
    return load_whole(CLIPModel, path, name, config=config, state_dict=named, dtype=dtype)
