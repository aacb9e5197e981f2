"""A frozen critic's own answers on reference images or clips, each computed once and cached.

They are the targets of reference-guided rewards: a generated image should make the critic say what a real one does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.errors import DataError, MissingFileError
from alignkit.escape import get_logger
from alignkit.media import decode_clip, decode_image, to_pixels
from alignkit.records import Prompt
from alignkit.storage import read_json, write_json
from rewards.models.vlm import VlmCritic

_LOG = get_logger(__name__)


class OwnAnswers:
    """Answers by greedy decoding on the medium in `prompt.metadata[column]`.

    Args:
        critic: the frozen model.
        column: holds an image or clip as `datasets` has it: {bytes, path}, bytes, a path, or an opened PIL image.
        modality: "image" or "video"; a clip is brought to the critic's rate.
        limit: the most tokens of an answer.
        frames: how many of the first frames of a clip are read; None: all.
        folder: where answers are kept between runs, one JSON file each, named by the content of model, medium, question
            and these settings; several processes may share it. None: in memory only.
    """

    def __init__(
        self,
        critic: VlmCritic,
        *,
        column: str,
        modality: str,
        limit: int,
        frames: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self.column = column
        self._critic, self._modality, self._limit, self._frames, self._folder = critic, modality, limit, frames, folder
        self._known: dict[str, str] = {}

    def of(self, prompt: Prompt, questions: Sequence[str]) -> list[str]:
        """One answer a question; those that are not known yet are written in one call, with one vision pass.

        Raises DataError naming the prompt where its medium cannot be decoded, or where the model says nothing.
        """
        where = f"prompt '{prompt.text}', column {self.column}"
        medium = prompt.metadata[self.column]
        settings = [self._critic.content, self._modality, self._limit, self._frames, _digest(medium)]
        keys = [hashlib.sha256(json.dumps([*settings, question]).encode()).hexdigest() for question in questions]
        missing = [place for place, key in enumerate(keys) if not self._is_known(key)]
        if missing:
            if self._modality == "video":
                pixels = to_pixels(decode_clip(medium, where, count=self._frames, fps=self._critic.rate))[None]
            else:
                pixels = to_pixels(decode_image(medium, where))[None]
            asked = [(0, questions[place]) for place in missing]
            for place, answer in zip(missing, self._critic.write(pixels, asked, limit=self._limit), strict=True):
                if not answer:
                    raise DataError(f"{where}: the critic ends its turn at once on '{questions[place]}'; ask otherwise")
                self._known[keys[place]] = answer
                if path := self._path(keys[place]):
                    write_json(path, {"key": keys[place], "question": questions[place], "answer": answer})
        return [self._known[key] for key in keys]

    def _is_known(self, key: str) -> bool:
        """Whether the answer of `key` is in memory, after reading it from the folder."""
        path = self._path(key)
        if key in self._known or path is None:
            return key in self._known
        try:
            stored = read_json(path)
            is_whole = stored["key"] == key and isinstance(stored["answer"], str) and bool(stored["answer"])
        except MissingFileError:
            return False
        except (DataError, KeyError, TypeError):
            is_whole = False
        if is_whole:
            self._known[key] = stored["answer"]
        else:
            _LOG.warning("the cached answer '%s' is damaged and is written again", path)
        return is_whole

    def _path(self, key: str) -> Path | None:
        return self._folder / key[:2] / f"{key}.json" if self._folder else None


def _digest(medium: Any) -> str:
    """SHA-256 of a medium's encoded bytes, or of the pixels of an opened image."""
    if isinstance(medium, Mapping):
        medium = medium.get("bytes") or medium.get("path")
    if isinstance(medium, str | Path) and Path(medium).is_file():
        medium = Path(medium).read_bytes()
    if isinstance(medium, bytes):
        return hashlib.sha256(medium).hexdigest()
    if isinstance(medium, str | Path):  # no file: decoding it says so
        return str(medium)
    return hashlib.sha256(f"{medium.mode} {medium.size}".encode() + medium.tobytes()).hexdigest()
