"""Hostile texts, as a Markdown parser, an HTML parser and a terminal read them: the text itself, and nothing active."""

from __future__ import annotations

import errno
import html
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from markdown_it import MarkdownIt
from tqdm import tqdm

from alignkit import cli
from alignkit.errors import ConfigError, DataError, MissingFileError
from alignkit.escape import get_logger, to_code, to_fence, to_html, to_line, to_markdown, to_terminal
from alignkit.evaluation.judged import Judged, judged_lines
from alignkit.evaluation.statistics import Interval
from alignkit.evaluation.terminal import before_after
from alignkit.records import Sampling

PACKAGES = ("alignkit", "rewards", "data_pipelines")

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
    shown = r"a\x1b[2J\r\x9b1m\x00\u202eb\u2066c\ud800d\u2028e" + "\ttab\nline \N{FAMILY}\u200d\N{BOY}"
    assert to_terminal(text) == shown
    assert to_line(text) == shown.replace("\t", r"\t").replace("\n", r"\n")
    assert html.unescape(to_html(text)) == shown
    for escape in (to_markdown, to_code, lambda value: to_fence(value, "")):
        assert not set(escape(text)) & set("\x1b\r\x9b\x00\u202e\u2066\ud800\u2028")


EVIL = "x\x1b[2J\r\u202e\x9b1m\nalignkit: done"
LINE = r"x\x1b[2J\r\u202e\x9b1m\nalignkit: done"  # all of it, on the line where it was named


def test_log_records_show_names_on_their_line(caplog):
    numbers = (3, 2.5, None, [EVIL])
    get_logger("alignkit.some.module").warning(
        "'%s' %s %s: %d of %.1f, %s, %s", EVIL, Path(EVIL), DataError(EVIL), *numbers
    )
    assert caplog.messages == [f"'{LINE}' {LINE} {LINE}: 3 of 2.5, None, ['{LINE}']"]


def fail(error):
    def raise_it(_):
        raise error

    return raise_it


@pytest.mark.parametrize("error", [DataError(EVIL), MissingFileError(EVIL), OSError(errno.ENOSPC, EVIL, EVIL)])
def test_errors_show_names_on_their_line(monkeypatch, capsys, error):
    monkeypatch.setattr(cli, "_dispatch", fail(error))
    assert cli.main(["run"]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("alignkit: ")
    assert LINE in told


def test_messages_of_several_lines_keep_them(monkeypatch, capsys):
    error = ConfigError("2 problems:", f"  {EVIL}", "  other")
    assert str(error) == f"2 problems:\n  {EVIL}\n  other"
    monkeypatch.setattr(cli, "_dispatch", fail(error))
    assert cli.main(["run"]) == 2
    assert capsys.readouterr().err == f"alignkit: 2 problems:\n  {LINE}\n  other\n"


def test_all_other_output_is_escaped(monkeypatch, capsys):
    """Prints, warnings and records of other packages; progress bars go on moving in their line."""

    def show(_):
        print(EVIL)
        print(EVIL, file=sys.stderr)
        for _ in tqdm(range(2), desc=to_line(EVIL), mininterval=0):
            pass

    monkeypatch.setattr(cli, "_dispatch", show)
    assert cli.main(["run"]) == 0
    told = capsys.readouterr()
    assert told.out == r"x\x1b[2J\r\u202e\x9b1m" + "\nalignkit: done\n"
    assert told.err.startswith("x\\x1b[2J\r\\u202e\\x9b1m\nalignkit: done\n\r")
    assert f"\r{LINE}: 100%" in told.err
    assert set(told.err) & set("\x1b\u202e\x9b") == set()


def test_results_name_rewards_and_judges_on_their_line():
    gain = Interval(0.0, 0.0, 0.0)
    paired = SimpleNamespace(base=gain, tuned=gain, gain=gain, win_rate=gain)
    result = SimpleNamespace(reward=EVIL[:9], overall=paired, is_gold=False)
    evaluation = SimpleNamespace(
        results=[result], sampling=Sampling(), prompts=1, seeds_per_prompt=1, confidence=0.9, gold=None
    )
    assert any(line.startswith(r"x\x1b[2J\r\u202e") for line in before_after(evaluation).splitlines())
    (line,) = judged_lines({EVIL: Judged(EVIL, 1, 0, 0, 1.0, None, None)})
    assert line.startswith(f"judge {LINE}: tuned wins")


def test_every_module_takes_the_logger_that_escapes():
    root = Path(__file__).parent.parent
    texts = {path: path.read_text(encoding="utf-8") for part in PACKAGES for path in (root / part).rglob("*.py")}
    assert [path for path, text in texts.items() if "getLogger(__name__)" in text] == []
    assert sum("get_logger(__name__)" in text for text in texts.values()) > 10
