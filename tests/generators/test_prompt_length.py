"""Prompts over the token limit: told once, with what is lost, and agreeing with what the network sees."""

from __future__ import annotations

import pytest
import torch
from tiny_families import FAMILIES

from alignkit.generators.prompt_length import count_tokens, lost_end, tokenizers_of, warn_of_cuts
from alignkit.records import Sampling
from alignkit.sandbox import models


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


def boundary(generator):
    """The longest prompt of letters that is not told of."""
    prompt = "a"
    tokenizers = tokenizers_of(generator.pipeline)
    while not warn_of_cuts(tokenizers, generator.text_window, generator.name, [f"{prompt} a"]):
        prompt += " a"
    return prompt


def same(generator, first, second):
    """Whether the longest text encoder sees the same of two prompts."""
    with torch.no_grad():
        one, other = (generator.encode_prompts([text]).tensors["encoder_hidden_states"] for text in (first, second))
    return torch.equal(one, other)


def test_what_is_told_of_is_what_the_network_does_not_see(load, family):
    """One word more than the boundary leaves something out; at the boundary the last word counts."""
    generator = load(family)
    fits = boundary(generator)
    assert not same(generator, fits, fits[:-1] + "b")
    assert same(generator, f"{fits} c d", f"{fits} d c")


def test_one_warning_for_many_prompts_and_calls(load, family, caplog):
    generator = load(family)
    long = "a " * 700
    side = FAMILIES[family].side
    for _ in range(2):
        generator.warn_of_cuts(["a red circle", f"{long} b c", f"{long} b c", f"{long} d"])
        generator.generate([f"{long} e"], [0], Sampling(2, 1.0, side, side))
    told = [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("2 of 3 prompts are longer than the ")
    assert f"of '{generator.name}' reads" in told[0]
    assert len(told[0]) < 600
    assert not [
        record
        for record in caplog.records
        if record.name.startswith("transformers.tokenization") or "truncated" in record.getMessage()
    ]


def test_short_prompts_say_nothing(load, family, caplog):
    generator = load(family)
    side = FAMILIES[family].side
    generator.generate(["a red circle"], [0], Sampling(2, 1.0, side, side))
    assert not [record for record in caplog.records if "tokens" in record.getMessage()]


def test_what_is_lost_is_shown():
    tokenizer = models.clip_tokenizer()
    assert lost_end(tokenizer, "a red circle above a blue square", 3) == "above a blue square"


@pytest.mark.parametrize("family", ["unet", "flow", "wan"])
def test_the_bound_by_words_hides_no_long_prompt(load, family):
    """Counts over the limit are those of the tokenizer, also after a call that truncates; others stay within it."""
    texts = [
        "a red circle",
        "a red circle above a blue square",
        "",
        "Ein  grüner\tKreis, rechts: x-y!",
        "a" * 40,
        "。日本",
    ]
    for tokenizer in tokenizers_of(load(family).pipeline).values():
        tokenizer(texts, truncation=True, padding="max_length", max_length=3)
        counts = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
        for room in (2, 5, 9):
            found = count_tokens(tokenizer, texts, room)
            assert [count > room for count in found] == [count > room for count in counts]
            assert all(ours == true for ours, true in zip(found, counts, strict=True) if true > room)
