"""HPSv3 (arXiv 2508.03789): Qwen2-VL-7B with a head for the mean and deviation of an image's human preference.

Known bias: it prefers cluttered images, and direct optimisation exploits that. Not here: the original's LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.errors import MissingFileError
from alignkit.records import Prompt, Scores
from rewards.models.media import check_media
from rewards.models.templates import HPSV3
from rewards.models.token_head import HEAD, TokenHead, read_unwrapped

if TYPE_CHECKING:
    from torch import Tensor

PIXELS = 256 * 28 * 28  # all images are resized to this area
_GET = "hf download MizzenAI/HPSv3 HPSv3.safetensors --local-dir ..."


class HPSv3:
    """The mean mu of an image's preference; higher is better. Parts: `mu`, and `log_sigma` of its deviation.

    `weights`: HPSv3.safetensors of MizzenAI/HPSv3; `model`: folder or hub id of Qwen/Qwen2-VL-7B-Instruct, for its
    config, tokenizer and processor. `eight_bit` adds the part `eight_bit`: mu of the images as 8-bit files, without
    gradient. `dtype`: of the model (published: bfloat16); the head is at least float32.
    """

    name = "hpsv3"
    modality = "image"
    needs_prompt = True
    differentiable = True
    comparable_across_prompts = True
    native_range = (-float("inf"), float("inf"))
    licence = "MIT (weights); Apache-2.0 (Qwen2-VL-7B)"
    source = "https://arxiv.org/abs/2508.03789"
    get = _GET

    def __init__(
        self,
        weights: str,
        *,
        model: str = "Qwen/Qwen2-VL-7B-Instruct",
        device: str = "cpu",
        dtype: str = "bfloat16",
        pixels: int = PIXELS,
        eight_bit: bool = False,
        checkpointing: bool = False,
    ) -> None:
        from torch import nn

        if not Path(weights).is_file():
            raise MissingFileError(f"hpsv3: no file '{weights}'; get it with: {_GET}")
        state, self._eight_bit = read_unwrapped(Path(weights), owner=self.name), eight_bit
        # numbered as published; only the Linear layers hold weights, and Identity stands for dropout
        head = nn.Sequential(
            *(nn.Linear(_width(state), 1024), nn.ReLU(), nn.Identity()),
            *(nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)),
        )
        options = {"owner": self.name, "device": device, "dtype": dtype, "checkpointing": checkpointing}
        self._head = TokenHead(model, state, head, ["<|Reward|>"], bounds=(pixels, pixels), **options)

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        media = check_media(media, prompts, self)
        texts = [HPSV3.format(text_prompt=prompt.text) for prompt in prompts]
        mu, log_sigma = self._head(media, texts)[:, 0].unbind(1)
        parts = {"mu": mu, "log_sigma": log_sigma}
        if self._eight_bit:
            parts["eight_bit"] = self._head(media, texts, eight_bit=True)[:, 0, 0].detach()
        return Scores(mu, parts)


def _width(state: dict[str, Tensor]) -> int:
    """Width of the model's hidden states: 3584 as published."""
    return state[f"{HEAD}0.weight"].shape[1] if f"{HEAD}0.weight" in state else 3584
