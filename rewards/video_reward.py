"""VideoReward of VideoAlign (arXiv 2501.13918): Qwen2-VL-2B rates visual quality, motion quality and text alignment.

Loads the published folder (`checkpoint-*/model.pth`: the whole model with its LoRA in PEFT's names), and the same
merged, as model.pth or model.safetensors. Not here: the trainer's third layout, an adapter apart from the base model
(`adapter_model.safetensors` with `non_lora_state_dict.pth`), and its `multi_pts` sampling of frames.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, DataError, MissingFileError
from alignkit.records import Prompt, Scores
from rewards.models.media import check_media
from rewards.models.patches import sample_frames
from rewards.models.templates import VIDEO_REWARD
from rewards.models.token_head import HEAD, TokenHead, merge_adapters, read_unwrapped

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("VQ", "MQ", "TA")
TOKENS = tuple(f"<|{part}_reward|>" for part in PARTS)
LEAST_PIXELS = 128 * 28 * 28
LEAST_FRAMES, MOST_FRAMES = 4, 768
_GET = "hf download KwaiVGI/VideoReward --local-dir ..."


class VideoReward:
    """Sum of the parts visual quality (VQ), motion quality (MQ) and text alignment (TA), each in standard deviations.

    `weights`: folder of KwaiVGI/VideoReward (model_config.json, checkpoint-*); `model`: folder or hub id of
    Qwen/Qwen2-VL-2B-Instruct, for its config, tokenizer and processor. `rate`: frames per second of the clips as they
    are given. `fps` frames a second are used, or `frames` in all, of at most `max_frame_pixels` each; the defaults are
    the folder's. `normalise=False` gives the heads' raw outputs. `eight_bit` adds a part of that name: the total for
    clips as 8-bit files, without gradient.
    """

    name = "video_reward"
    modality = "video"
    needs_prompt = True
    differentiable = True
    comparable_across_prompts = True
    native_range = (-float("inf"), float("inf"))
    licence = "MIT (code), see KwaiVGI/VideoReward for the weights; Apache-2.0 (Qwen2-VL-2B)"
    source = "https://arxiv.org/abs/2501.13918"
    get = _GET

    def __init__(
        self,
        weights: str,
        *,
        rate: float,
        model: str = "Qwen/Qwen2-VL-2B-Instruct",
        device: str = "cpu",
        dtype: str = "bfloat16",
        fps: float | None = None,
        frames: int | None = None,
        max_frame_pixels: int | None = None,
        normalise: bool = True,
        eight_bit: bool = False,
        checkpointing: bool = False,
    ) -> None:
        from torch import nn

        if fps and frames:
            raise ConfigError("video_reward: give fps or frames, not both")
        config = _config(Path(weights))
        data, lora = config["data_config"], config.get("peft_lora_config") or {}
        state = read_unwrapped(_checkpoint(Path(weights)), owner=self.name)
        if any(".lora_" in name for name in state):
            state = merge_adapters(state, lora["lora_alpha"], rank_stabilised=bool(lora.get("use_rslora")))
        wide = state.get(f"{HEAD}weight")
        head = nn.Linear(*(1536, 1) if wide is None else wide.shape[::-1], bias=False)
        bounds = LEAST_PIXELS, max_frame_pixels or data["max_frame_pixels"]
        options = {
            "owner": self.name,
            "device": device,
            "dtype": dtype,
            "checkpointing": checkpointing,
            "rate": rate,
            "bounds": bounds,
        }
        self._head = TokenHead(model, state, head, TOKENS, **options)
        self._rate, self._frames = rate, frames or (None if fps else data.get("num_frames"))
        self._fps = fps or data["fps"]
        self._moments, self._eight_bit = _moments(config) if normalise else [(0.0, 1.0)] * 3, eight_bit

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        clips = check_media(media, prompts, self)
        clips = sample_frames(clips, self._count(clips.shape[1]))
        texts = [VIDEO_REWARD.format(text_prompt=prompt.text) for prompt in prompts]
        parts = self._parts(clips, texts)
        total = sum(parts.values())
        if self._eight_bit:
            parts["eight_bit"] = sum(self._parts(clips, texts, eight_bit=True).values()).detach()
        return Scores(total, parts)

    def _parts(self, clips: Tensor, texts: Sequence[str], *, eight_bit: bool = False) -> dict[str, Tensor]:
        outputs = self._head(clips, texts, eight_bit=eight_bit)
        # the head has one output for all tokens, or one for each token
        raw = outputs[..., 0] if outputs.shape[-1] == 1 else outputs.diagonal(dim1=1, dim2=2)
        return {
            part: (value - mean) / deviation
            for part, value, (mean, deviation) in zip(PARTS, raw.unbind(1), self._moments, strict=True)
        }

    def _count(self, frames: int) -> int:
        """How many of `frames` are used: an even number, as in the original."""
        count = self._frames or frames / self._rate * self._fps
        if not self._frames:
            count = min(max(count, LEAST_FRAMES), min(MOST_FRAMES, frames) // 2 * 2)
        return min(max(2, round(count / 2) * 2), frames)


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / "model_config.json"
    if not path.is_file():
        raise MissingFileError(f"video_reward: no '{path}'; get the folder with: {_GET}")
    config = json.loads(path.read_text(encoding="utf-8"))
    template = config["data_config"].get("prompt_template_type", "detailed_special")
    if template != "detailed_special":
        raise DataError(f"video_reward: '{path}' wants the template '{template}'; only 'detailed_special' is known")
    return config


def _checkpoint(folder: Path) -> Path:
    """The weights of the latest checkpoint in the folder, or those directly in it."""
    steps = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    places = [*reversed(steps), folder]
    files = [
        place / file for place in places for file in ("model.safetensors", "model.pth") if (place / file).is_file()
    ]
    if not files:
        apart = any((place / "adapter_model.safetensors").is_file() for place in places)
        advice = "its adapter is apart from the model; merge them first" if apart else f"get it with: {_GET}"
        raise MissingFileError(f"video_reward: no model.pth or model.safetensors in '{folder}'; {advice}")
    return files[0]


def _moments(config: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Mean and standard deviation of each part over the original's reference clips."""
    stored = config.get("inference_config")
    if not stored:
        raise DataError("video_reward: model_config.json has no inference_config; give normalise=False for raw heads")
    return [(stored[f"{part}_mean"], stored[f"{part}_std"]) for part in PARTS]
