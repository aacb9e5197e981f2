"""Hostile texts, as a Markdown parser, an HTML parser and a terminal read them: the text itself, and nothing active."""

from __future__ import annotations

import html
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from alignkit.escape import to_code, to_fence, to_html, to_markdown, to_terminal

HOSTILE = [
    "![t](http://tracker/x.png)",
    "[x](javascript:alert(1)) [r][ref] ![][ref]",
    "[ref]: http://tracker",
    "<img src=http://e onerror=alert(1)> <!-- c --> </code></table>",
    "`code` and ``` fence\n```\n# out\n~~~",
    "a | b || c \\| d \\",
    "**b** _i_ __u__ ~~s~~ $x$ #tag @user",
    "# heading #",
    "- item",
    "+ item",
    "12. item",
    "3) item",
    "> quote",
    "---",
    "&lt;b&gt; &amp; &#60;",
    "<http://auto.link> http://auto.link www.auto.link mailto:a@b.c WWW.X",
    "two\nlines\tand  spaces",
    "quotes \" and ' end",
]
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_the_text_and_nothing_else(text: str) -> None:
    line = " ".join(text.split())
    for page in (to_markdown(text), f"## {to_markdown(text)}", f"| {to_markdown(text)} | b |\n|---|---|"):
        tokens = MARKDOWN.parse(page)
        shown = next(token for token in tokens if token.type == "inline")
        assert [(child.type, child.content) for child in shown.children or []] == [("text", line)]
        assert {token.type.rpartition("_")[0] or token.type for token in tokens} <= {
            *("paragraph", "heading", "inline", "table", "thead", "tr", "th"),
        }
    assert "http://" not in to_markdown(text)  # which some viewers make a link of
    assert "www." not in to_markdown(text).lower()


@pytest.mark.parametrize("text", HOSTILE)
def test_code_stays_code(text: str) -> None:
    (paragraph,) = (token for token in MARKDOWN.parse(f"x {to_code(text)} y") if token.type == "inline")
    children = paragraph.children or []
    assert [child.type for child in children] == ["text", "code_inline", "text"]
    assert children[1].content.strip() == " ".join(text.split())
    (block,) = MARKDOWN.parse(to_fence(text, "yaml"))
    assert (block.type, block.info, block.content) == ("fence", "yaml", f"{text}\n")


class Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[object] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.found.append(data)


@pytest.mark.parametrize("text", HOSTILE)
def test_html_shows_the_text_in_elements_and_attributes(text: str) -> None:
    parser = Texts()
    parser.feed(f'<p title="{to_html(text)}">{to_html(text)}</p>')
    parser.close()
    assert parser.found == [("p", [("title", text)]), text]


def test_control_characters_do_nothing_anywhere() -> None:
    text = "a\x1b[2J\r\x9b1m\x00\u202eb\u2066c\ud800d\u2028e\ttab\nline \N{FAMILY}\u200d\N{BOY}"
    shown = "a\ufffd[2J\ufffd\ufffd1m\ufffd\ufffdb\ufffdc\ufffdd\ufffde\ttab\nline \N{FAMILY}\u200d\N{BOY}"
    assert to_terminal(text) == shown
    assert html.unescape(to_html(text)) == shown
    for escape in (to_markdown, to_code, lambda value: to_fence(value, "")):
        assert not set(escape(text)) & set("\x1b\r\x9b\x00\u202e\u2066\ud800\u2028")
