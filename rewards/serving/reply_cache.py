"""What a served model answered, and the folder that keeps answers so that a restart asks nothing twice.

The format is the OpenAI chat completion: https://platform.openai.com/docs/api-reference/chat/object. Only what judges
read is kept: the text, the alternatives of its first token, the tokens used. JSON alone, on the wire and on disk.
Left out: streaming, tool calls, several choices.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import StorageError

_LOG = logging.getLogger(__name__)
_MARKS = " \t\n\r▁ĠĊ"  # how tokenizers write the white space before a word


class NoLogprobsError(ValueError):
    """A chat completion without any log-probabilities, though they were asked for."""


@dataclass(frozen=True, slots=True)
class Reply:
    """`text` of an answer, log-probabilities of what its first token might have been, and tokens (read, written)."""

    text: str
    first: tuple[tuple[str, float], ...] = ()
    tokens: tuple[int, int] = (0, 0)

    @classmethod
    def from_body(cls, body: str, *, needs_logprobs: bool = False) -> Reply:
        """Read a chat completion; ValueError saying what is wrong with one that is none.

        NoLogprobsError where they are needed and the field is absent; an empty one is an answer without a token.
        """
        answer = json.loads(body)
        choices = _member(answer, "choices", list)
        if not choices:
            raise ValueError("'choices' is empty")
        text = _member(_member(choices[0], "message", dict), "content", str)
        logprobs = choices[0].get("logprobs")
        if needs_logprobs and not (isinstance(logprobs, dict) and "content" in logprobs):
            raise NoLogprobsError("'logprobs' is missing")
        return cls(text, _first_token(logprobs), (_used(answer, "prompt"), _used(answer, "completion")))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Reply:
        """The reply that `asdict` and JSON made `record` of."""
        return cls(record["text"], tuple((token, value) for token, value in record["first"]), tuple(record["tokens"]))

    def logprob(self, words: Collection[str]) -> float:
        """log P of the first token being one of `words`, whatever their case and the white space before them.

        Minus infinity where none of them is listed.
        """
        found = [value for token, value in self.first if token.strip(_MARKS).casefold() in words]
        return max(found) + math.log(sum(math.exp(v - max(found)) for v in found)) if found else -math.inf

    def margin(self, one: Collection[str], other: Collection[str]) -> float:
        """log P(one) - log P(other), words in lower case; NaN where neither is listed.

        Servers list the likeliest tokens only, so a side that is not among them counts as the last of them: the margin
        is then a lower bound of its size.
        """
        sides = [self.logprob(one), self.logprob(other)]
        if max(sides) == -math.inf:
            return math.nan
        least = min(value for _, value in self.first)
        return max(sides[0], least) - max(sides[1], least)


def _member(record: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    if isinstance(value, kind):
        return value
    raise ValueError(f"'{name}' is missing or of another type")


def _used(answer: Mapping[str, Any], side: str) -> int:
    """Tokens, 0 from a server that does not count them."""
    usage = answer.get("usage")
    count = usage.get(f"{side}_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else 0


def _first_token(logprobs: Any) -> tuple[tuple[str, float], ...]:
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not content:
        return ()
    listed = _member(content[0], "top_logprobs", list)
    alternatives = tuple(
        (_member(entry, "token", str), float(_member(entry, "logprob", (int, float)))) for entry in listed
    )
    if any(math.isnan(value) for _, value in alternatives):
        raise ValueError("a log-probability is NaN")
    return alternatives


def content_key(request: Mapping[str, Any], identity: str = "") -> str:
    """64 hex digits of everything that decides an answer: the request (pictures included) and whose weights answer."""
    return _sha256({"request": request, "identity": identity})


def _sha256(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class ReplyCache:
    """A folder with one JSON file a reply, `ab/abcd....json`, named by its content key.

    Files appear whole (written aside, then renamed), so a killed run keeps all it was told and several processes may
    share the folder. A file that was damaged later is named in the log and asked for again. Not synchronised with the
    disk: after a power cut the last replies may be asked again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def get(self, key: str) -> Reply | None:
        """The reply of `key`, or None where there is none that can be read."""
        path = self._path(key)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["sha256"] == _sha256([key, stored["reply"]]):
                return Reply.from_record(stored["reply"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            _LOG.warning("the cached reply '%s' cannot be read (%s); it is asked for again", path, error)
            return None
        except (ValueError, KeyError, TypeError):
            pass
        _LOG.warning("the cached reply '%s' is damaged; it is asked for again", path)
        return None

    def put(self, key: str, reply: Reply) -> None:
        """Keep `reply`; StorageError where the folder cannot be written."""
        path, record = self._path(key), asdict(reply)
        aside = path.with_name(f".{key}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = {"reply": record, "sha256": _sha256([key, record])}
            aside.write_text(json.dumps(stored), encoding="utf-8")
            aside.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise StorageError(f"the reply cache '{self.folder}' cannot be written: {error}") from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
