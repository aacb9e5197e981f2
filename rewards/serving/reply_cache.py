"""Replies of a served model, and a folder that stores them so that a restart sends nothing twice.

The format is the OpenAI chat completion: https://platform.openai.com/docs/api-reference/chat/object. Only what judges
read is stored: the text, the alternatives of its first token, how it ended, the tokens used. Neither a server nor a
stored file is trusted: types, lengths and numbers are checked. JSON alone, on the wire and on disk.
Left out: streaming, tool calls, several choices.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import stat
import threading
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import StorageError
from alignkit.escape import get_logger
from rewards.serving.bounded_json import parse_json

_LOG = get_logger(__name__)
_SPACES = " \t\n\r▁ĠĊ"  # how tokenizers write the white space before a word
_COMPLETE = ("stop", "eos_token", "stop_sequence")  # the last two: text-generation-inference
_CUT_OFF = "length"
_TEMPORARY_ENDS = ("abort", "error")  # of vLLM, SGLang: the server dropped the request
_MOST_CHARACTERS = 1 << 18  # of a text; 4096 tokens have some 16 thousand
_MOST_ALTERNATIVES = 128  # of a token; vLLM gives 20 unless it is started with more
_MOST_TOKEN_CHARACTERS = 1024
_MOST_TOKENS = 10**9  # of one request
_ROUNDING = 1e-3  # by how much a log-probability may exceed 0
_MOST_FILE_BYTES = 4 << 20  # more than any reply within the bounds above needs, each character escaped


class NoLogprobsError(ValueError):
    """A chat completion without any log-probabilities, though they were requested."""


class UnusableReplyError(ValueError):
    """A chat completion that ended for a reason that another attempt would not change, such as a content filter."""


@dataclass(frozen=True, slots=True)
class Reply:
    """`text` of a reply, log-probabilities of the alternatives of its first token, and tokens (read, written).

    is_cut_off: it ended at the limit of tokens (`finish_reason` length) and not by the model's decision.
    Raises ValueError for a value of a wrong type or out of bounds, wherever it comes from.
    """

    text: str
    first: tuple[tuple[str, float], ...] = ()
    tokens: tuple[int, int] = (0, 0)
    is_cut_off: bool = False

    def __post_init__(self) -> None:
        _require(isinstance(self.text, str) and len(self.text) <= _MOST_CHARACTERS, "the text")
        _require(len(self.first) <= _MOST_ALTERNATIVES, "the number of alternatives of a token")
        for token, value in self.first:
            _require(isinstance(token, str) and len(token) <= _MOST_TOKEN_CHARACTERS, "a token")
            _require(type(value) in (int, float) and math.isfinite(value) and value <= _ROUNDING, "a log-probability")
        _require(all(type(count) is int and 0 <= count <= _MOST_TOKENS for count in self.tokens), "a count of tokens")
        _require(isinstance(self.is_cut_off, bool), "is_cut_off")

    @classmethod
    def from_body(cls, body: str, *, needs_logprobs: bool = False) -> Reply:
        """Read a chat completion; ValueError saying what is wrong where it is none or not complete.

        NoLogprobsError where they are needed and the field is absent; an empty one is a reply without a token.
        UnusableReplyError where it ended for a reason that another attempt would not change.
        """
        completion = parse_json(body)
        choices = _member(completion, "choices", list)
        if not choices:
            raise ValueError("'choices' is empty")
        is_cut_off = _is_cut_off(_member(choices[0], "finish_reason", str))
        text = _member(_member(choices[0], "message", dict), "content", str)
        logprobs = choices[0].get("logprobs")
        if needs_logprobs and not (isinstance(logprobs, dict) and "content" in logprobs):
            raise NoLogprobsError("'logprobs' is missing")
        tokens = _token_count(completion, "prompt_tokens"), _token_count(completion, "completion_tokens")
        return cls(text, _first_token(logprobs), tokens, is_cut_off)

    @classmethod
    def from_record(cls, record: Any) -> Reply:
        """The reply of a `record` made by `asdict` and JSON; ValueError for another record."""
        if not isinstance(record, dict) or set(record) != {"text", "first", "tokens", "is_cut_off"}:
            raise ValueError("the record is not of a reply")
        first = tuple(_pair(entry) for entry in _member(record, "first", list))
        return cls(record["text"], first, _pair(record["tokens"]), record["is_cut_off"])

    def logprob(self, words: Collection[str]) -> float:
        """log P of the first token being one of `words`, whatever their case and the white space before them.

        Minus infinity where none of them is listed.
        """
        values = [value for token, value in self.first if token.strip(_SPACES).casefold() in words]
        if not values:
            return -math.inf
        return max(values) + math.log(sum(math.exp(value - max(values)) for value in values))

    def margin(self, one: Collection[str], other: Collection[str]) -> float:
        """log P(one) - log P(other), words in lower case; NaN where neither is listed.

        Servers list the likeliest tokens only. A side that is not listed gets the probability of the last listed token,
        so that the margin is then a lower bound of its size.
        """
        sides = [self.logprob(one), self.logprob(other)]
        if max(sides) == -math.inf:
            return math.nan
        least = min(value for _, value in self.first)
        return max(sides[0], least) - max(sides[1], least)


def _require(is_valid: bool, what: str) -> None:  # noqa: FBT001
    if not is_valid:
        raise ValueError(f"{what} is wrong or out of bounds")


def _is_cut_off(finish_reason: str) -> bool:
    """Whether the limit of tokens ended the reply; raises unless this or the model itself ended it."""
    if finish_reason in _TEMPORARY_ENDS:
        raise ValueError(f"finish_reason is {finish_reason}")
    if finish_reason not in (*_COMPLETE, _CUT_OFF):
        raise UnusableReplyError(f"a reply ended with finish_reason {finish_reason}")
    return finish_reason == _CUT_OFF


def _member(record: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    if isinstance(value, kind):
        return value
    raise ValueError(f"'{name}' is missing or of another type")


def _pair(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("a pair is missing")
    return value[0], value[1]


def _token_count(completion: Mapping[str, Any], name: str) -> Any:
    """Tokens; 0 from a server that does not count them."""
    usage = completion.get("usage")
    if usage is None:
        return 0
    _require(isinstance(usage, dict), "'usage'")
    return 0 if usage.get(name) is None else usage[name]


def _first_token(logprobs: Any) -> tuple[tuple[str, Any], ...]:
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if content is None or content == []:
        return ()
    _require(isinstance(content, list), "'logprobs'")
    alternatives = _member(content[0], "top_logprobs", list)
    return tuple((_member(entry, "token", str), _member(entry, "logprob", (int, float))) for entry in alternatives)


def content_key(request: Mapping[str, Any], identity: str = "") -> str:
    """Hash (64 hex digits) of all that determines a reply: the request (images included) and the model's weights."""
    return _sha256({"request": request, "identity": identity})


def _sha256(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class ReplyCache:
    """A folder with one JSON file per reply, `ab/abcd....json`, named by its content key.

    Files appear whole (written aside, then renamed), so a killed run keeps every reply received and several processes
    may share the folder. A file that is damaged or not of this cache is skipped, counted in `damaged`, and its request
    is sent again; the log names the first of them. Not synchronised with the disk: after a power cut the last requests
    may be sent again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.damaged = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> Reply | None:
        """The reply of `key`, or None where there is none that can be used."""
        path = self._path(key)
        try:
            status = path.stat()
            _require(stat.S_ISREG(status.st_mode) and status.st_size <= _MOST_FILE_BYTES, "the file")
            stored = parse_json(path.read_text(encoding="utf-8"))
            record = _member(stored, "reply", dict)
            _require(stored.get("sha256") == _sha256([key, record]), "the checksum")
            return Reply.from_record(record)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            self._skip(path, error)
        return None

    def put(self, key: str, reply: Reply) -> None:
        """Store `reply`; StorageError where the folder cannot be written."""
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
            advice = "make room on the disk or fix the folder, then run the same command again"
            raise StorageError(f"could not write '{path}': {error}; {advice}") from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def _skip(self, path: Path, error: Exception) -> None:
        with self._lock:
            self.damaged += 1
            level = logging.WARNING if self.damaged == 1 else logging.DEBUG
        reason = "cannot be read" if isinstance(error, OSError) else "is damaged"
        _LOG.log(level, "the cached reply '%s' %s (%s); its request is sent again", path, reason, error)
