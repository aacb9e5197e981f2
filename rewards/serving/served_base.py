"""Base of judges and rewards behind a server: a client, media as message parts, counts of abstentions by reason."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from alignkit.resolve import construct
from rewards.serving.chat_client import ChatClient, Report
from rewards.serving.messages import ClipForm, media_parts

if TYPE_CHECKING:
    from torch import Tensor


class ServedBase:
    """Base of judges and rewards whose model is served.

    modality: "image", or "video", of which up to `frames` frames are sent (`clips`: see `media_parts`).
    client: options of `ChatClient` (cache, concurrency, timeout, api_key_env ...); ConfigError for unknown ones.
    """

    name: str

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        modality: str = "image",
        frames: int = 8,
        clips: ClipForm = "frames",
        **client: Any,
    ) -> None:
        self.modality, self._frames, self._clips = modality, frames, clips
        options = {"base_url": base_url, "model": model, **client}
        self.client: ChatClient = construct(ChatClient, options, what=self.name)
        self._abstentions: Counter[str] = Counter()

    def report(self) -> Report:
        """Cost so far, and abstentions by reason."""
        return self.client.report(+self._abstentions)

    def _media_parts(self, media: Tensor) -> list[dict[str, Any]]:
        """Message parts of one image or video."""
        return media_parts(media, frames=self._frames, clips=self._clips)
