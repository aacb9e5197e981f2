r"""Text that a user, a model or a dataset wrote, made harmless for the place where it is shown: one function a place.

A prompt may hold Markdown that loads an image from a tracker, HTML, or codes that rewrite a terminal. Everything that
goes into a page, a card, a table or a message passes through here once. Shown is the text itself, character by
character; control characters and those that reorder text are shown as escapes of Python (`\x1b`, `\u202e`).

What reaches a terminal has three ways, each with its place here: the messages of errors and the titles of progress
bars (`to_line`), log records (`get_logger`), and all other output of the program (`EscapedStream`).
"""

from __future__ import annotations

import html
import io
import logging
import re
from pathlib import Path
from typing import TextIO

# C0 and C1 controls less tab and newline, line separators, bidirectional overrides, lone surrogates.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BARS = re.compile(r"(\r|\x1b\[A|\x1b\[[\d;]*m)")  # how progress bars and libraries move in lines, and colours
_MARKED = str.maketrans(
    {
        **{mark: f"\\{mark}" for mark in "\\`*_[]#!|~$@"},
        "<": "&lt;",
        ">": "&gt;",
        "&": "&amp;",
        "\N{NO-BREAK SPACE}": " ",
    }
)
_LINKS = re.compile(r"(?i)(?::(?=//)|(?<=mailto):|(?<=xmpp):|(?<=www)\.)")  # what becomes a link without brackets
_FIRST = re.compile(r"^(\d*)([-+.)])")  # what would begin a list or a rule


def to_terminal(text: str) -> str:
    """Text for a terminal, with its lines and tabs."""
    return _INVISIBLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def to_line(text: str) -> str:
    """Text for a part of one line in a terminal: its line breaks and tabs are shown as escapes, too."""
    return to_terminal(text).replace("\n", "\\n").replace("\t", "\\t")


def get_logger(name: str) -> logging.Logger:
    """`logging.getLogger`; texts, paths and errors among the arguments of its records go through `to_line`."""
    logger = logging.getLogger(name)
    logger.addFilter(_escape_arguments)
    return logger


def _escape_arguments(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        kinds = str | Path | Exception
        record.args = tuple(to_line(str(value)) if isinstance(value, kinds) else value for value in record.args)
    return True


class EscapedStream(io.TextIOBase):
    """`stream`, to which text is written through `to_terminal`; `has_bars`: progress bars and colours stay active."""

    def __init__(self, stream: TextIO, *, has_bars: bool = False) -> None:
        self._stream, self._has_bars = stream, has_bars

    def write(self, text: str, /) -> int:
        """Write `text`; returns its length."""
        pieces = _BARS.split(text) if self._has_bars else [text]  # what matches stands at odd places
        self._stream.write("".join(p if place % 2 else to_terminal(p) for place, p in enumerate(pieces)))
        return len(text)

    def flush(self) -> None:
        """Flush `stream`."""
        self._stream.flush()

    def fileno(self) -> int:
        """The descriptor of `stream`."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Whether `stream` is a terminal."""
        return self._stream.isatty()

    def writable(self) -> bool:
        """True."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of `stream`."""
        return self._stream.encoding


def to_html(text: str) -> str:
    """Text for an HTML element or a quoted attribute."""
    return html.escape(to_terminal(text), quote=True)


def to_markdown(text: str) -> str:
    """Text for one line of Markdown or a cell of a table: no markup, link, image, formula or HTML in it is active."""
    line = _line(text).translate(_MARKED)
    return _FIRST.sub(r"\1\\\2", _LINKS.sub(lambda match: f"\\{match[0]}", line))


def to_code(text: str) -> str:
    """Text as a Markdown code span, whatever backticks are in it. Not for cells of a table, which split at `|`."""
    line = _line(text)
    fence = "`" * (_longest_run(line) + 1)
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"{fence}{line}{fence}"


def to_fence(text: str, language: str) -> str:
    """Lines as a fenced Markdown block, which no line of them can end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{to_terminal(text)}\n{fence}"


def _line(text: str) -> str:
    return to_terminal(" ".join(text.split()))


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
