"""Images and videos as parts of a chat message: PNG data URLs, which lose nothing but the rounding to 8 bits.

Parts have the form of the OpenAI chat API (`image_url`), or vLLM's `video_url` with the frames as one list, which
reaches a model's video path: https://docs.vllm.ai/en/latest/features/multimodal_inputs.html. Not here: files, sound.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from alignkit.errors import ConfigError
from alignkit.media import encode_image, quantise

if TYPE_CHECKING:
    from torch import Tensor

ClipForm = Literal["frames", "video"]


def text_part(text: str) -> dict[str, Any]:
    """A part that is text."""
    return {"type": "text", "text": text}


def media_parts(media: Tensor, *, frames: int = 8, clips: ClipForm = "frames") -> list[dict[str, Any]]:
    """Parts of one image [3, H, W] or video [F, 3, H, W] in [0, 1]; at most `frames` frames, evenly from the first on.

    clips: `frames` sends each as an image of its own, which every server takes; `video` sends them as one video, of
    which the server does not know the frame rate (vLLM assumes one a second; its --media-io-kwargs sets another).
    Raises ConfigError for another form, or fewer than one frame.
    """
    if clips not in ("frames", "video") or frames < 1:
        raise ConfigError(f"clips must be 'frames' or 'video' and frames at least 1, got {clips!r} and {frames}")
    if media.dim() == 3:
        return [_part("image_url", f"data:image/png;base64,{_png(media)}")]
    count = min(frames, len(media))
    encoded = [_png(media[i * len(media) // count]) for i in range(count)]
    if clips == "video":  # the server decodes each frame by its own header, so PNG data may have the type of JPEG
        return [_part("video_url", f"data:video/jpeg;base64,{','.join(encoded)}")]
    return [_part("image_url", f"data:image/png;base64,{frame}") for frame in encoded]


def _part(kind: str, url: str) -> dict[str, Any]:
    return {"type": kind, kind: {"url": url}}


def _png(pixels: Tensor) -> str:
    return base64.b64encode(encode_image(quantise(pixels))).decode()


def user(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a single question."""
    return [{"role": "user", "content": list(parts)}]
