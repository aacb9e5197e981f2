"""The prompts in configs/prompts: readable, balanced over their categories, each one once, short and in ASCII."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from data_pipelines.prompts import read_prompts, split_of

FOLDER = Path(__file__).parent.parent / "configs" / "prompts"
FILES = {"general.jsonl": (400, 14), "video.jsonl": (100, 10)}  # prompts, categories


@pytest.mark.parametrize("name", FILES)
def test_prompts_are_read_as_they_are_written(name, caplog):
    count, _ = FILES[name]
    prompts = read_prompts(FOLDER / name)
    assert len(prompts) == len({prompt.id for prompt in prompts}) == count
    assert caplog.text == ""  # no duplicate was dropped
    assert [set(prompt.metadata) for prompt in prompts] == [{"category"}] * count
    assert len((FOLDER / name).read_text(encoding="utf-8").splitlines()) == count


@pytest.mark.parametrize("name", FILES)
def test_categories_are_balanced_and_both_sides_of_the_split_have_prompts(name):
    count, categories = FILES[name]
    prompts = read_prompts(FOLDER / name)
    sizes = Counter(prompt.metadata["category"] for prompt in prompts)
    assert len(sizes) == categories
    assert max(sizes.values()) - min(sizes.values()) <= 1
    held_out = [prompt for prompt in prompts if split_of(prompt.id) == "heldout"]
    assert 0.05 * count <= len(held_out) <= 0.15 * count


@pytest.mark.parametrize("name", FILES)
def test_prompts_are_plain_and_short(name):
    for prompt in read_prompts(FOLDER / name):
        assert prompt.text.isascii()
        assert prompt.text.isprintable()
        assert prompt.text == " ".join(prompt.text.split())
        assert 3 <= len(prompt.text.split()) <= 60
        assert prompt.text[0].isupper()


def test_no_two_prompts_are_nearly_equal():
    """They differ in more than articles, punctuation and the order of words."""
    texts = [prompt.text for name in FILES for prompt in read_prompts(FOLDER / name)]
    words = [frozenset(re.findall(r"[a-z0-9']+", text.casefold())) - {"a", "an", "the"} for text in texts]
    near = [
        (texts[i], texts[j])
        for i in range(len(texts))
        for j in range(i)
        if len(words[i] & words[j]) > 0.5 * len(words[i] | words[j])
    ]
    assert near == []


def test_prompts_of_text_rendering_quote_their_text():
    prompts = read_prompts(FOLDER / "general.jsonl")
    rendered = [prompt.text for prompt in prompts if prompt.metadata["category"] == "text_rendering"]
    unquoted = [text for text in rendered if len(re.findall(r'"[^"]+"', text)) != 1]
    assert unquoted == []


def test_prompts_for_video_describe_the_camera():
    view = re.compile(r"camera|shot|filmed|drone|seen from|view|close-up|macro|push-in")
    assert [prompt.text for prompt in read_prompts(FOLDER / "video.jsonl") if not view.search(prompt.text)] == []
