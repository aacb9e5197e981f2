"""Small HTML builders: every text that reaches the page is escaped here, once.

Functions take plain text for anything a user or a model may have written and return HTML strings. Deliberately not
here: templates in files, scripts, anything fetched from a network.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from alignkit.escape import to_html
from alignkit.evaluation.style import CSS
from alignkit.evaluation.svg import compact
from alignkit.media import decode_image, encode_image, image_size

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
LARGEST_SIDE = 384  # pixels of an embedded image; larger ones are made smaller, the folder has them whole
LARGEST_FILE = 1 << 20  # bytes; a PNG may hold more text than pixels
PNG = b"\x89PNG\r\n\x1a\n"
TINY_SIDE = 128  # images up to this side are enlarged pixel by pixel


def document(title: str, body: str) -> str:
    """The whole page with its stylesheet inside."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="generator" content="alignkit">\n'
        f"<title>{to_html(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f'<body>\n<div class="wrap">\n{body}\n</div>\n</body>\n</html>'
    )


def section(anchor: str, title: str, lead: str, body: str) -> str:
    """A titled section; `lead` is plain text under the title."""
    intro = f'<p class="lead">{to_html(lead)}</p>' if lead else ""
    heading = f'<h2 id="{anchor}-title">{to_html(title)}</h2>'
    return f'<section id="{anchor}" aria-labelledby="{anchor}-title">{heading}{intro}{body}</section>\n'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, *, mark_first: bool = False) -> str:
    """A table that scrolls sideways on narrow screens. Cells are HTML; the first of a row is its header."""
    titles = "".join(f'<th scope="col">{to_html(name)}</th>' for name in head)
    lines = []
    for number, (first, *cells) in enumerate(rows):
        css = ' class="first"' if mark_first and number == 0 else ""
        lines.append(f'<tr{css}><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    label = to_html(caption)
    body = f"<thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody>"
    scroll = f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table>{body}</table></div>'
    return f'<figure>{scroll}<figcaption class="note">{to_html(caption)}</figcaption></figure>'


def panel(title: str, note: str, content: str) -> str:
    """A chart in its frame, with a title and what it shows in one line."""
    heading = f"<figcaption><b>{to_html(title)}</b><span>{to_html(note)}</span></figcaption>"
    return f'<figure class="panel">{heading}{content}</figure>'


def legend(entries: Mapping[str, str]) -> str:
    """tone -> what it stands for."""
    items = "".join(f'<li><i class="{tone}"></i>{to_html(name)}</li>' for tone, name in entries.items())
    return f'<ul class="legend">{items}</ul>'


def details(summary: str, body: str, *, is_open: bool = False) -> str:
    """A part that folds away."""
    state = " open" if is_open else ""
    return f'<details{state}><summary>{to_html(summary)}</summary><div class="inside">{body}</div></details>'


def missing(sentence: str) -> str:
    """What a run did not record."""
    return f'<p class="missing">{to_html(sentence)}</p>'


def picture(data: bytes, alt: str) -> str:
    """An embedded PNG or animated WebP; small images keep hard pixel edges.

    Still images larger than LARGEST_SIDE or LARGEST_FILE, or in another format, are encoded again, at most
    LARGEST_SIDE. Raises DataError naming `alt` for what cannot be decoded.
    """
    height, width = image_size(data, alt)
    side, kind = max(width, height), "webp" if data[8:12] == b"WEBP" else "png"  # a WebP is an animation
    if kind == "png" and (side > LARGEST_SIDE or len(data) > LARGEST_FILE or not data.startswith(PNG)):
        image = Image.fromarray(decode_image(data, alt))
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        width, height = image.size
        data = encode_image(np.asarray(image))
    css = ' class="tiny"' if side <= TINY_SIDE else ""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img{css} width="{width}" height="{height}" alt="{to_html(alt)}" src="{source}">'


def tree(value: Mapping[str, Any]) -> str:
    """Any nested dict as a definition list; lists of scalars stay on one line."""
    rows = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            rows.append(f'<dt class="branch">{to_html(str(key))}</dt><dd class="nested">{tree(item)}</dd>')
        else:
            rows.append(f"<dt>{to_html(str(key))}</dt><dd>{to_html(plain(item))}</dd>")
    return f'<dl class="tree">{"".join(rows)}</dl>'


def plain(value: Any) -> str:
    """A leaf of a config or of statistics as short text."""
    if value is None or value in ({}, []):
        return "\N{EN DASH}"
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else "n/a"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return str(value)


def change(before: float, after: float) -> str:
    """`0 → 1`, with whole numbers kept short."""
    first, second = (f"{value:g}" if float(value).is_integer() else compact(value) for value in (before, after))
    return f"{first} \N{RIGHTWARDS ARROW} {second}"


def warning(sentence: str) -> str:
    """Something the reader should not miss."""
    return f'<p class="warning" role="note"><b>Warning.</b> {to_html(sentence)}</p>'


def fine(sentence: str) -> str:
    """A check that passed."""
    return f'<p class="fine">{to_html(sentence)}</p>'
