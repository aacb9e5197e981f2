"""Text rendering: quotes, distances, and real reading: digits by templates, letters by rapidocr where it is."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from alignkit.errors import DataError, MissingFileError, UnknownNameError
from alignkit.records import Prompt
from rewards.text_rendering import TextRendering, edit_distance, likeness, quoted

PITCH, HEIGHT = 24, 36


def written(text, size=24, width=None):
    """Black characters on white, one every PITCH pixels: [1, 3, HEIGHT, W]."""
    image = Image.new("RGB", (width or PITCH * len(text), HEIGHT), "white")
    for place, character in enumerate(text):
        ImageDraw.Draw(image).text((PITCH * place + 4, 4), character, "black", ImageFont.load_default(size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


class DigitReader:
    """Reads what `written` writes: the nearest template of each cell, nothing where the cell is empty."""

    def __init__(self, digits="0123456789"):
        self.templates = {digit: written(digit)[0, 0].numpy() for digit in digits}

    def __call__(self, picture):
        assert picture.dtype == np.uint8
        cells = picture[..., 0].reshape(HEIGHT, -1, PITCH).transpose(1, 0, 2) / 255
        return " ".join(self.nearest(cell) for cell in cells if cell.min() < 0.5)

    def nearest(self, cell):
        return min(self.templates, key=lambda digit: np.abs(self.templates[digit] - cell).sum())


@pytest.fixture
def reward(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_reader", SimpleNamespace(DigitReader=DigitReader))
    return TextRendering("my_reader:DigitReader")


def asked(text):
    return Prompt.from_text(f'a door with the number "{text}" on it')


@pytest.mark.parametrize(
    ("drawn", "wanted", "score"),
    [
        ("2026", "2026", 1),
        ("20 26", "2026", 1),  # white space does not count
        ("920261", "2026", 1),  # nor what stands beside
        ("2025", "2026", 3 / 4),
        ("226", "2026", 3 / 4),
        ("3333", "2026", 0),
        ("    ", "2026", 0),
        ("1111111111", "26", 0),  # never below 0
    ],
)
def test_digits_are_read_and_scored(reward, drawn, wanted, score):
    scores = reward(written(drawn), [asked(wanted)])
    assert scores.total.tolist() == pytest.approx([score])
    assert scores.parts["exact"].tolist() == [score == 1]
    assert reward(0.9 * written(drawn) + 0.1 * torch.rand(3, HEIGHT, 1), [asked(wanted)]).total == scores.total


def test_a_row_is_its_own_and_several_texts_are_averaged(reward):
    media = torch.cat([written("1234"), written("5678")])
    assert reward(media, [asked("1234"), asked("1234")]).total.tolist() == [1, 0]
    assert reward(media, [Prompt.from_text("“12” and “55”"), asked("5678")]).total.tolist() == [0.5, 1]
    assert not reward.differentiable


def test_half_precision_pictures_score_in_float32(reward):
    scores = reward(written("2026").bfloat16(), [asked("2025")])
    assert scores.total.dtype == scores.parts["exact"].dtype == torch.float32
    assert scores.total.item() == pytest.approx(3 / 4)


def test_readers_take_options(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_reader", SimpleNamespace(DigitReader=DigitReader))
    only_ones = TextRendering("my_reader:DigitReader", {"digits": "1"})
    assert only_ones(written("77"), [asked("11")]).total.item() == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('a sign "Open late"', ["Open late"]),
        ("a sign “Open” over a “sale” poster", ["Open", "sale"]),
        ('"A" and “B” and "C"', ["A", "B", "C"]),
        ("it's 5 o'clock: “it's”", ["it's"]),
    ],
)
def test_what_is_quoted(text, found):
    assert quoted(text) == found


@pytest.mark.parametrize("text", ["a cat", 'an empty "" sign', 'a blank " " sign', 'a lone " mark'])
def test_a_prompt_without_quoted_text_is_refused(reward, text):
    with pytest.raises(DataError, match="quotes no text"):
        reward(written("1"), [Prompt.from_text(text)])


def test_edit_distance_is_the_recursion():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 6))) for _ in range(2))
        assert edit_distance(a, b) == edit_distance(b, a) == slow(a, b)
    assert likeness("Straße ①", "STRASSE1") == 1  # case and compatibility forms are folded


def test_missing_readers_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(MissingFileError, match="pip install rapidocr-onnxruntime"):
        TextRendering()
    with pytest.raises(UnknownNameError, match="Did you mean 'rapidocr'"):
        TextRendering("rapid_ocr")


@pytest.mark.skipif(importlib.util.find_spec("rapidocr_onnxruntime") is None, reason="rapidocr-onnxruntime is absent")
def test_rapidocr_reads_letters():
    image = Image.new("RGB", (360, 140), "white")
    for y, line in ((10, "HELLO WORLD"), (80, "SALE 2026")):
        ImageDraw.Draw(image).text((10, y), line, "darkred", ImageFont.load_default(36))
    media = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    reward, prompts = TextRendering(), ['"Hello World" and “sale 2026”', '"HELPO"']
    scores = [reward(media, [Prompt.from_text(text)]).total.item() for text in prompts]
    assert scores[0] == 1
    assert scores[1] < 1
    assert reward(torch.ones(1, 3, 64, 64), [Prompt.from_text('"HELLO"')]).total.item() == 0
