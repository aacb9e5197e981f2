"""What `scoring.py` measures: each reward, a batch for it, and the bare model's forward on the same batch.

The bare forward gets pixels (or patches) and tokens that are ready, and is the reward's own network, so that what is
left is what the reward adds: checks, resizing, tokenising, reading the score out. `CASES` is the table. Not here: the
measures without a network (`rewards.pixel_statistics`, `rewards.motion`), for they have no bare model; detectors and
text readers (`geneval`, `text_rendering`), whose networks come from elsewhere; served models.
"""
# ruff: noqa: SLF001 - the bare model is a private part of its reward

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import random_weights as weights
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel

from alignkit.protocols import Reward
from alignkit.records import Prompt, texts
from rewards import clip_flant5 as flant5
from rewards.aesthetic import WIDTHS, Aesthetic
from rewards.clip_score import ClipScore
from rewards.hps import Hps
from rewards.hpsv3 import PIXELS, HPSv3
from rewards.image_reward import TOKENS, ImageReward
from rewards.models.clip import ClipReward
from rewards.models.media import precise
from rewards.models.templates import HPSV3, VIDEO_REWARD
from rewards.models.vision_language import VisionLanguage
from rewards.mps import Cross, Mps
from rewards.pick_score import PickScore
from rewards.preference import PreferenceReward
from rewards.video_reward import VideoReward
from rewards.vqa_score import QUESTION, VqaScore
from rewards.yes_no import YesNo

SANDBOX = Path(__file__).parent.parent / "alignkit/sandbox/weights/careful"
QUESTIONS = [
    'Does this match the description "{prompt}"? Answer with yes or no.',
    'Is every thing in "{prompt}" to be seen? Answer with yes or no.',
    "Is the picture sharp and free of artefacts? Answer with yes or no.",
    "Are all colours as the description says? Answer with yes or no.",
]


@dataclass(frozen=True)
class Case:
    """A reward, a batch of media for it with prompts, and the bare model's forward on the same batch.

    `full`: for several questions, the bare forwards one by one, each with a vision pass of its own.
    """

    reward: Reward
    media: Tensor
    prompts: Sequence[Prompt]
    bare: Callable[[], Any]
    full: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Bench:
    """What is measured: a place for random weights, and the command's options."""

    work: Path
    options: argparse.Namespace

    @property
    def given(self) -> dict[str, str]:
        """Where a reward runs."""
        return {"device": self.options.device, "dtype": self.options.dtype}

    @property
    def size(self) -> weights.Size:
        """How large random weights are."""
        return weights.TINY if self.options.tiny else weights.MODERATE

    def media(self, *, frames: int = 0, side: int = 0) -> Tensor:
        """Random images, or clips of so many frames."""
        side = side or self.options.size
        shape = (self.options.batch, *([frames] if frames else []), 3, side, side)
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(self.options.device)

    def prompts(self) -> list[Prompt]:
        """A prompt of its own for every image, for equal ones are read once."""
        words = weights.TEXTS
        return [Prompt.from_text(f"{words[i % len(words)]}, no. {i}") for i in range(self.options.batch)]

    def places(
        self, build: Callable[[Path, weights.Size], Path], option: str = "processor"
    ) -> tuple[str, dict[str, str]]:
        """The weights, random ones where none are given, and the reward's `option` that says where its tokenizer is."""
        if self.options.model:
            return self.options.model, {option: self.options.processor} if self.options.processor else {}
        folder = str(build(self.work, self.size))
        return folder, {option: folder}


def on_clip(bench: Bench, reward: ClipReward, after: Callable[[Any, Any], Any] | None = None) -> Case:
    """The case of a reward on CLIP: its bare forward sees ready pixels and reads ready tokens."""
    media, prompts, clip = bench.media(), bench.prompts(), reward.clip
    pixels = clip.preparation(media).to(clip.model.dtype)
    window = clip.model.config.text_config.max_position_embeddings
    tokens = clip.tokenizer(
        texts(prompts), padding="max_length", max_length=window, truncation=True, return_tensors="pt"
    )
    ids = tokens.input_ids.to(media.device)

    def bare() -> Any:
        seen = clip.model.get_image_features(pixels)
        said = clip.model.get_text_features(ids) if reward.needs_prompt else None
        return after(seen, said) if after else None

    return Case(reward, media, prompts, bare)


def clip_score(bench: Bench) -> Case:
    """CLIP score."""
    model, processor = bench.places(weights.clip)
    return on_clip(bench, ClipScore(model, **processor, **bench.given))


def pick_score(bench: Bench) -> Case:
    """PickScore."""
    model, processor = bench.places(weights.clip)
    return on_clip(bench, PickScore(model, **processor, **bench.given))


def hps(bench: Bench) -> Case:
    """HPSv2."""
    model, processor = bench.places(weights.clip)
    return on_clip(bench, Hps(model, **processor, **bench.given))


def aesthetic(bench: Bench) -> Case:
    """The aesthetic score with its head; with `--model` it needs the published head as well."""
    model, processor = bench.places(weights.clip)
    head = bench.options.head or str(bench.work / "head.pth")
    if not bench.options.head:
        widths = zip((0, 2, 4, 6, 7), (256, *WIDTHS), WIDTHS, strict=False)
        layers = {f"layers.{place}": torch.nn.Linear(wide, narrow) for place, wide, narrow in widths}
        torch.save({f"{n}.{k}": v for n, layer in layers.items() for k, v in layer.state_dict().items()}, head)
    reward = Aesthetic(model, head=head, **processor, **bench.given)
    return on_clip(bench, reward, lambda seen, _: reward._head["layers"](precise(seen.pooler_output)))


def mps_reward(bench: Bench) -> Mps:
    """MPS with the given weights or random ones."""
    model, processor = bench.places(weights.clip)
    if not bench.options.model:
        clip, model = CLIPModel.from_pretrained(model), str(bench.work / "mps.safetensors")
        tensors = {f"model.{name}": value.contiguous() for name, value in clip.state_dict().items()}
        cross = Cross(4, 256, 256, 64, 1024).state_dict()
        save_file(tensors | {f"cross_model.{name}": value for name, value in cross.items()}, model)
    return Mps(model, **processor, **bench.given)


def mps(bench: Bench) -> Case:
    """MPS: the bare forward includes the cross model."""
    reward = mps_reward(bench)
    clip, cross = reward.clip.model, reward._cross["cross_model"]

    def after(seen: Any, said: Any) -> Tensor:
        read = clip.text_projection(said.last_hidden_state)
        relevant = torch.ones(read.shape[:2], dtype=torch.bool, device=read.device)
        return cross(clip.visual_projection(seen.last_hidden_state), read, relevant)

    return on_clip(bench, reward, after)


def image_reward(bench: Bench) -> Case:
    """ImageReward: the bare forward is BLIP's and the head's."""
    model, tokenizer = bench.places(weights.image_reward, "tokenizer")
    reward = ImageReward(model, **tokenizer, **bench.given)
    media, prompts, network = bench.media(), bench.prompts(), reward._model
    pixels = reward._prepare(media).to(*reward._place)
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    tokens = reward._tokenizer(texts(prompts), **options).to(media.device)

    def bare() -> Tensor:
        return network["mlp"]["layers"](network["blip"](pixels, tokens.input_ids, tokens.attention_mask)[:, 0])

    return Case(reward, media, prompts, bare)


def clip_flant5(bench: Bench) -> Case:
    """CLIP-FlanT5: the bare forward is that of its tower (but for the layer that is not read), projector and T5."""
    model, tokenizer = bench.places(weights.clip_flant5, "tokenizer")
    reward = flant5.ClipFlanT5(model, **tokenizer, **bench.given)
    media, prompts, t5 = bench.media(), bench.prompts(), reward._t5
    pixels = reward._prepare(media).to(*reward._place)
    asked = [flant5.AFTER.format(question=reward._question.format(text)) for text in texts(prompts)]
    before, after = reward._before.expand(len(media), -1), reward._tokens(asked)
    answer = t5.prepare_decoder_input_ids_from_labels(reward._answer.expand(len(media), -1))
    places = (reward._tower.config.image_size // reward._tower.config.patch_size) ** 2
    mask = torch.cat([after.attention_mask.new_ones(len(media), before.shape[1] + places), after.attention_mask], 1)

    def bare() -> Any:
        seen = reward._projector(reward._tower(pixels).last_hidden_state[:, 1:])
        states = torch.cat([t5.shared(before), seen, t5.shared(after.input_ids)], dim=1)
        return t5(inputs_embeds=states, attention_mask=mask, decoder_input_ids=answer, use_cache=False)

    return Case(reward, media, prompts, bare)


def on_reader(reader: VisionLanguage, media: Tensor, asked: Sequence[Sequence[str]]) -> tuple[Callable[[], Any], ...]:
    """Forwards of the bare network on media with their questions: one vision pass, and a vision pass a question.

    Patches, grids and ids are ready; rows are as long as the longest.
    """
    kind = "video" if media.dim() == 5 else "image"
    network, (patches, grids) = reader.network, reader.patches[kind](media)
    seen = reader.see(media)
    rows = [[reader.tokens(seen, text) for text in own] for own in asked]
    longest = max(len(row) for own in rows for row in own)
    ids = torch.tensor([[row + row[-1:] * (longest - len(row)) for row in own] for own in rows], device=media.device)
    config = network.config
    types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    plain = {"position_ids": torch.arange(longest, device=media.device)} if reader.plain_positions else {}
    names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}[kind]
    encode = network.get_video_features if kind == "video" else network.get_image_features
    patches = patches.to(network.dtype)

    def run(ids: Tensor, types: Tensor, **given: Any) -> Any:
        places = {name: value.expand(3, len(ids), -1) for name, value in plain.items()}
        return network(input_ids=ids, mm_token_type_ids=types, use_cache=False, **places, **given)

    def shared() -> Any:
        count = ids.shape[1]
        if count == 1:
            return run(ids[:, 0], types[:, 0], **dict(zip(names, (patches, grids), strict=True)))
        features = [one for one in encode(patches, grids, return_dict=True).pooler_output for _ in range(count)]
        given = {names[1]: grids.repeat_interleave(count, 0)}
        given["mm_encoder_outputs"] = {kind: SimpleNamespace(pooler_output=features, deepstack_features=None)}
        return run(ids.flatten(0, 1), types.flatten(0, 1), **given)

    def full() -> Any:
        given = dict(zip(names, (patches, grids), strict=True))
        return [run(ids[:, i], types[:, i], **given) for i in range(ids.shape[1])]

    return shared, full


def vqa_score(bench: Bench) -> Case:
    """VQAScore of a Qwen2-VL."""
    reward = VqaScore(bench.places(weights.qwen2_vl)[0], **bench.given)
    media, prompts = bench.media(), bench.prompts()
    asked = [[QUESTION.replace("{prompt}", text)] for text in texts(prompts)]
    return Case(reward, media, prompts, on_reader(reward._critic._reader, media, asked)[0])


def yes_no(bench: Bench) -> Case:
    """Four questions on an image: the bare model looks once, and `full` once for each question."""
    reward = YesNo(bench.places(weights.qwen2_vl)[0], questions=QUESTIONS, **bench.given)
    media, prompts = bench.media(), bench.prompts()
    asked = [[question.replace("{prompt}", text) for question in QUESTIONS] for text in texts(prompts)]
    return Case(reward, media, prompts, *on_reader(reward._critic._reader, media, asked))


def hpsv3(bench: Bench) -> Case:
    """HPSv3 at its own size of images."""
    model, base = bench.places(weights.hpsv3, "model")
    file = model if bench.options.model else f"{model}/HPSv3.safetensors"
    pixels = bench.size.vlm_side**2 if bench.options.tiny else PIXELS
    reward = HPSv3(file, **base, pixels=pixels, **bench.given)
    media, prompts = bench.media(), bench.prompts()
    asked = [[HPSV3.format(text_prompt=text)] for text in texts(prompts)]
    return Case(reward, media, prompts, on_reader(reward._head._reader, media, asked)[0])


def video_reward(bench: Bench) -> Case:
    """VideoReward: clips of eight frames, all of which are looked at."""
    model, base = bench.places(weights.video_reward, "model")
    reward = VideoReward(model, **base, rate=2.0, fps=2.0, **bench.given)
    media, prompts = bench.media(frames=8), bench.prompts()
    asked = [[VIDEO_REWARD.format(text_prompt=text)] for text in texts(prompts)]
    return Case(reward, media, prompts, on_reader(reward._head._reader, media, asked)[0])


def preference(bench: Bench) -> Case:
    """A preference head: by default the sandbox's own, on images of its size."""
    reward = PreferenceReward(bench.options.model or str(SANDBOX), device=bench.options.device)
    model, prompts = reward._model, bench.prompts()
    media = bench.media(side=model.config.size)
    options = {"padding": "max_length", "truncation": True, "max_length": model.config.tokens, "return_tensors": "pt"}
    ids = reward._tokenizer(texts(prompts), **options).input_ids.to(media.device)
    return Case(reward, media, prompts, lambda: model(media, ids))


CASES: dict[str, Callable[[Bench], Case]] = {
    "clip_score": clip_score,
    "pick_score": pick_score,
    "hps": hps,
    "aesthetic": aesthetic,
    "mps": mps,
    "image_reward": image_reward,
    "clip_flant5": clip_flant5,
    "vqa_score": vqa_score,
    "yes_no": yes_no,
    "hpsv3": hpsv3,
    "video_reward": video_reward,
    "preference": preference,
}
