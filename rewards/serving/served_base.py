"""What every judge and reward behind a server has: a client, a way to show media, a count of rows without an answer."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from alignkit.resolve import construct
from rewards.serving.chat_client import ChatClient, Report
from rewards.serving.messages import ClipForm, media_parts

if TYPE_CHECKING:
    from torch import Tensor


class Asking:
    """Base of what asks a served model.

    modality: "image", or "video" for clips of which up to `frames` frames are shown (`clips`: `media_parts`).
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
        """Cost so far, and rows without an answer by reason."""
        return self.client.report(+self._abstentions)

    def _shown(self, media: Tensor) -> list[dict[str, Any]]:
        """Message parts of one picture or clip."""
        return media_parts(media, frames=self._frames, clips=self._clips)
