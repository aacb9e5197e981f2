"""The page of `alignkit annotate` in Chromium: keys, buttons, clips in step, undo, resuming, two annotators.

Tests wait for states of the page, never for time.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import moving_pairs
import numpy as np
import pytest
from chromium import PATIENCE, launched, needs_chromium

from alignkit.media import decode_image
from data_pipelines.annotation import Annotators, Pairs, Server
from data_pipelines.dense.votes import read_votes

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser():
    with launched() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two pairs of four segments."""
    out = tmp_path_factory.mktemp("pairs")
    moving_pairs.write(out, 2, videos=True)
    return Pairs(out)


@pytest.fixture
def running(pairs, tmp_path):
    with Server(Annotators(pairs, tmp_path), 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def visit(browser, running) -> Iterator[Callable[..., Any]]:
    """Opens the page in a fresh browser and starts as an annotator; at the end nothing was wrong or from elsewhere."""
    contexts, faults, own = [], [], (running.url, "data:")

    def opened(name: str | None = "anna", **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("request", lambda asked: faults.append(asked.url) if not asked.url.startswith(own) else None)
        page.goto(running.url)
        if name is not None:
            page.wait_for_selector("body[data-screen=start]")
            page.keyboard.type(name)  # the field has the focus
            page.keyboard.press("Enter")
        return page

    opened.faults = faults
    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def at(page: Any, pair: int, segment: int) -> None:
    """Wait until this segment plays."""
    page.wait_for_selector(f"body[data-screen=work][data-ready=true][data-pair='{pair}'][data-segment='{segment}']")


def choices(page: Any) -> list[str | None]:
    return [button.get_attribute("data-choice") for button in page.query_selector_all("#segments button")]


def test_a_dataset_is_labelled_with_the_keyboard_alone(visit, running, pairs, tmp_path):
    """Each key moves on to the next segment without a vote; a reload goes on there, and the end says so."""
    page = visit()
    at(page, 0, 0)
    assert page.inner_text("#prompt") == pairs.rows[0].prompt
    assert page.inner_text("#place") == "Pair 1 of 2"
    assert page.inner_text("#remaining") == "8 segments left"
    for segment, key in enumerate(["a", "ArrowRight", "t"]):
        at(page, 0, segment)
        page.keyboard.press(key)
    at(page, 0, 3)
    assert choices(page) == ["left", "right", "tie", None]
    assert page.inner_text("#remaining") == "5 segments left"
    page.reload()
    at(page, 0, 3)
    assert choices(page) == ["left", "right", "tie", None]
    page.keyboard.press("Space")
    for segment, key in enumerate(["ArrowLeft", "B", "b", "T"]):
        at(page, 1, segment)
        page.keyboard.press(key)
    page.wait_for_selector("body[data-screen=done]")
    assert page.inner_text("#facts").split() == ["segments", "8", "ties", "38%"]
    sides = ["left", "right", "tie", "tie", "left", "right", "right", "tie"]
    votes = read_votes(tmp_path, "anna")
    for row, given in zip(pairs.rows, (sides[:4], sides[4:]), strict=True):
        left = 1 - 2 * running.annotators.copy("anna", row, "left")  # the label of the clip on the left
        labels = [vote.label for vote in votes if vote.pair == row.id]
        assert labels == [{"left": left, "right": -left, "tie": 0}[choice] for choice in given]
    page.reload()
    page.wait_for_selector("body[data-screen=done]")


def test_going_to_and_fro(visit):
    """Numbers, next and previous pair, the list of keys, buttons, and undo across pairs and from the end."""
    page = visit()
    at(page, 0, 0)
    page.keyboard.press("3")
    at(page, 0, 2)
    page.keyboard.press("9")  # there is none
    page.keyboard.press("n")
    at(page, 1, 0)
    page.keyboard.press("n")
    at(page, 0, 0)
    page.keyboard.press("p")
    at(page, 1, 0)
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("a")  # not while the list is shown
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog:not([open])", state="attached")
    page.click("#segments button:nth-child(4)")
    at(page, 1, 3)
    page.click("#right")
    at(page, 1, 0)
    page.keyboard.press("Space")  # the button has lost the focus, so this is a tie
    at(page, 1, 1)
    assert choices(page) == ["tie", None, None, "right"]
    page.keyboard.press("p")
    at(page, 0, 0)
    page.keyboard.press("u")
    at(page, 1, 0)
    page.click("#undo")
    at(page, 1, 3)
    assert choices(page) == [None] * 4
    page.keyboard.press("u")
    page.wait_for_selector("#message:has-text('There is no vote to take back')")
    page.focus("#tie")
    page.keyboard.press("Space")  # presses the button that has the focus, once
    at(page, 1, 0)
    assert choices(page) == [None, None, None, "tie"]


def pixels(page: Any) -> list[np.ndarray]:
    """[H, W, 3] of both canvases."""
    urls = page.evaluate("() => [...document.querySelectorAll('canvas')].map(canvas => canvas.toDataURL())")
    return [decode_image(base64.b64decode(url.partition(",")[2]), "canvas") for url in urls]


def test_both_clips_show_the_same_frame(visit, running, pairs):
    """Exactly the stored pixels; a segment repeats, the whole clip does where it is asked for."""
    page = visit()
    at(page, 0, 0)
    page.keyboard.press("2")
    at(page, 0, 1)
    page.keyboard.press("k")
    page.wait_for_selector("#pause[aria-pressed=true]")
    row, seen = pairs.rows[0], []
    frames = [pairs.clips(0)[running.annotators.copy("anna", row, side)] for side in ("left", "right")]
    for _ in range(5):
        page.keyboard.press(".")
        shown = [int(canvas.get_attribute("data-frame")) for canvas in page.query_selector_all("canvas")]
        assert shown[0] == shown[1]
        seen.append(shown[0])
        for clip, drawn in zip(frames, pixels(page), strict=True):
            assert (drawn == clip[shown[0]]).all()
    assert seen == [4 + (seen[0] + step) % 4 for step in range(5)]
    page.keyboard.press("w")
    page.wait_for_selector("#whole[aria-pressed=true]")
    for _ in range(16):
        page.keyboard.press(",")
        seen.append(int(page.get_attribute("canvas", "data-frame")))
    assert seen[5:] == [(seen[4] - step) % 16 for step in range(1, 17)]
    page.keyboard.press("k")
    for segment in (3, 1):  # it plays on, through the whole clip
        frames_of = range(4 * segment, 4 * segment + 4)
        page.wait_for_selector(", ".join(f".left canvas[data-frame='{frame}']" for frame in frames_of))


def test_a_key_pressed_once_too_often_votes_on_no_other_pair(visit, tmp_path):
    page = visit()
    at(page, 0, 0)
    page.evaluate("() => [...'aaaaa'].forEach(key => document.dispatchEvent(new KeyboardEvent('keydown', {key})))")
    at(page, 1, 0)
    page.keyboard.press("n")
    at(page, 0, 0)
    assert len(read_votes(tmp_path)) == 4


def test_two_annotators_see_their_agreement(visit):
    """Each sees own votes alone; a name that began before is offered."""
    first = visit("anna")
    for segment in range(4):
        at(first, 0, segment)
        first.keyboard.press("t" if segment % 2 else "a")
    at(first, 1, 0)
    assert first.is_hidden("#alpha")
    second = visit("ben")
    at(second, 0, 0)
    assert choices(second) == [None] * 4
    same = first_side(first) == first_side(second)
    for segment in range(4):
        at(second, 0, segment)
        second.keyboard.press("t" if segment % 2 else "a" if same else "b")
    second.wait_for_selector("#alpha:has-text('agreement α 1.00, 2 annotators')")
    third = visit(None)
    third.wait_for_selector("body[data-screen=start]")
    third.click("#known button:has-text('ben')")
    at(third, 1, 0)


def first_side(page: Any) -> bytes:
    """The clip on the left of the first pair, as it is fetched."""
    script = "async () => { state.at = 0; const [left] = await bytesOf(0); return [...new Uint8Array(left)].join() }"
    return page.evaluate(script)


def test_looking_again_when_all_is_labelled(visit, running, pairs):
    for row in pairs.rows:
        for segment in range(4):
            running.annotators.vote("anna", row, segment, "tie")
    page = visit()
    page.wait_for_selector("body[data-screen=done]")
    page.keyboard.press("Enter")  # the button has the focus
    at(page, 0, 0)
    page.keyboard.press("a")
    at(page, 0, 1)
    assert choices(page) == ["left", "tie", "tie", "tie"]
    page.keyboard.press("n")
    at(page, 1, 0)
    page.keyboard.press("n")
    page.wait_for_selector("body[data-screen=done]")
    page.keyboard.press("u")
    at(page, 0, 0)
    assert choices(page) == ["tie"] * 4


def test_a_program_that_ended(visit, running):
    """The vote does not count and the page says so."""
    page = visit()
    at(page, 0, 0)
    page.route("**/api/vote", lambda route: route.abort())
    page.keyboard.press("a")
    page.wait_for_selector("#message:has-text('start it again')")
    at(page, 0, 0)
    assert choices(page) == [None] * 4
    page.unroute("**/api/vote")
    page.keyboard.press("a")
    at(page, 0, 1)
    assert page.is_hidden("#message")
    assert all("Failed to load resource" in fault for fault in visit.faults)
    visit.faults.clear()


def test_a_prompt_is_text(visit, running, pairs, monkeypatch):
    text = "<img src=x onerror=alert(1)> & a \u202ecat"
    monkeypatch.setattr(pairs, "rows", [replace(pairs.rows[0], prompt=text), pairs.rows[1]])
    page = visit()
    at(page, 0, 0)
    assert page.inner_text("#prompt") == text.replace("\u202e", r"\u202e")


CONTRAST = """() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = item => {
    const color = parse(getComputedStyle(item).backgroundColor);
    return color.length === 3 || color[3] > 0 ? color : ground(item.parentElement);
  };
  const has_text = item => [...item.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  return [...document.querySelectorAll("main:not([hidden]) *")]
    .filter(item => has_text(item) && item.checkVisibility())
    .map(item => {
      const [dark, bright] = [parse(getComputedStyle(item).color), ground(item)].map(light).sort((a, b) => a - b);
      return [(bright + 0.05) / (dark + 0.05), item.outerHTML];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_and_fits(scheme, visit, running, pairs):
    """A contrast of 4.5 (WCAG AA) for all text, and no scrolling while one annotates, at 900 x 640 too."""
    for segment, choice in enumerate(("left", "right", "tie")):
        running.annotators.vote("anna", pairs.rows[0], segment, choice)
    page = visit(color_scheme=scheme, viewport={"width": 900, "height": 640}, reduced_motion="reduce")
    at(page, 0, 3)
    for segment in range(4):
        page.keyboard.press(str(segment + 1))
        at(page, 0, segment)
        found = page.evaluate(CONTRAST)
        assert len(found) > 20
        assert [item for item in found if item[0] < 4.5] == []
    size = "() => [document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
    assert page.evaluate(size) == [900, 640]
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 22, 26)") == (scheme == "dark")
