"""Text that a user, a model or a dataset wrote, made harmless for the place where it is shown: one function a place.

A prompt may hold Markdown that loads an image from a tracker, HTML, or codes that rewrite a terminal. Everything that
goes into a page, a card, a table or a message passes through here once. Shown is the text itself, character by
character; control characters and those that reorder text become U+FFFD.
"""

from __future__ import annotations

import html
import re

# C0 and C1 controls less tab and newline, line separators, bidirectional overrides, lone surrogates.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
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
    """Text for a terminal, with its lines."""
    return _INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", text)


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
