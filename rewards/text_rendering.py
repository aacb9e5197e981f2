"""Text rendering: how much of the quoted text of a prompt can be read on the image.

The score is that of Flow-GRPO (arXiv 2505.05470): white space and case are ignored; 1 if the quoted text occurs in the
recognised text, else 1 - min(d, n) / n with d the edit distance between the two and n the length of the quoted text.
For several quoted texts the score is the mean (Flow-GRPO uses the first). Left out: penalties for additional text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alignkit.errors import DataError, MissingFileError
from alignkit.media import quantise
from alignkit.records import Prompt, Scores
from alignkit.resolve import resolve
from rewards.models.media import check_media, scores_beside

if TYPE_CHECKING:
    from torch import Tensor

Recogniser = Callable[[NDArray[np.uint8]], str]  # an image [H, W, 3] (RGB) -> all text on it, in reading order
RECOGNISERS = {"rapidocr": "rewards.text_rendering:RapidOcr"}
_QUOTED = re.compile(r"“([^”]+)”|\"([^\"]+)\"")


class RapidOcr:
    """PP-OCRv4 (Chinese and English) of the package rapidocr-onnxruntime, which includes the weights; CPU.

    Raises MissingFileError if the package is not installed. `options` go to its `RapidOCR`.
    """

    def __init__(self, **options: Any) -> None:
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise MissingFileError(
                f"text_rendering: recogniser 'rapidocr' cannot be imported ({error}); pip install "
                "rapidocr-onnxruntime, or name your own: recogniser: 'package.module:attribute'"
            ) from error
        self._read = RapidOCR(**options)

    def __call__(self, image: NDArray[np.uint8]) -> str:
        lines, _ = self._read(np.ascontiguousarray(image[..., ::-1]))  # BGR, as in OpenCV
        return " ".join(text for _, text, _ in lines or ())


class TextRendering:
    """Share of the quoted text that `recogniser` reads on the image, in [0, 1]; part `exact` is 1 if it reads all.

    recogniser: `rapidocr`, or 'package.module:attribute', built with `options`: a callable from an image
    [H, W, 3] (uint8, RGB) to the text on it. It is called with one 8-bit image at a time; not differentiable. Raises
    DataError for a prompt without “...” or "...".
    """

    name = "text_rendering"
    modality = "image"
    needs_prompt = True
    differentiable = False
    comparable_across_prompts = True
    native_range = (0.0, 1.0)
    licence = "Apache-2.0; the recogniser's (rapidocr: Apache-2.0)"
    source = "https://arxiv.org/abs/2505.05470"

    def __init__(self, recogniser: str = "rapidocr", options: Mapping[str, Any] | None = None) -> None:
        self._recognise: Recogniser = resolve(recogniser, RECOGNISERS, kind="recogniser")(**(options or {}))

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        images = quantise(check_media(media, prompts, self))
        expected = [quoted(prompt.text) for prompt in prompts]
        read = [self._recognise(image) for image in images]
        each = [[likeness(text, own) for text in texts] for texts, own in zip(expected, read, strict=True)]
        total = scores_beside(media, [sum(scores) / len(scores) for scores in each])
        return Scores(total, {"exact": (total == 1).to(total.dtype)})

    def example(self, photograph: Tensor, prompt: Prompt) -> tuple[Tensor, Prompt]:
        """The photograph with its name in black on a white band at its top, and a prompt that quotes the name."""
        import torch
        from PIL import Image, ImageDraw, ImageFont

        name = str(prompt.metadata["name"])
        image = Image.fromarray(photograph.mul(255).round().byte().permute(1, 2, 0).numpy())
        canvas = ImageDraw.Draw(image)
        canvas.rectangle((0, 0, image.width, 48), fill="white")
        canvas.text((12, 4), name, font=ImageFont.load_default(32), fill="black")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        return pixels, Prompt.from_text(f"{prompt.text}, and the word “{name}”", **prompt.metadata)


def quoted(text: str) -> list[str]:
    """The texts in “...” or "..." in a prompt, in order. Raises DataError if there is none."""
    texts = [curly or straight for curly, straight in _QUOTED.findall(text) if _folded(curly or straight)]
    if not texts:
        raise DataError(f'text_rendering: the prompt "{text}" quotes no text; put what is to be read in “...”')
    return texts


def likeness(expected: str, read: str) -> float:
    """1 if `expected` occurs in `read`, else 1 - min(d, n) / n; both without white space and case."""
    expected, read = _folded(expected), _folded(read)
    return 1.0 if expected in read else 1 - min(edit_distance(expected, read), len(expected)) / len(expected)


def _folded(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def edit_distance(first: str, second: str) -> int:
    """Fewest insertions, deletions and substitutions of a character that turn one text into the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
