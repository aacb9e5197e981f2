"""Questions about clips: they cover the caption, right clips satisfy them, and the sandbox's VLM can answer them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from alignkit.aspects import Rules
from alignkit.errors import DataError
from alignkit.records import Prompt
from alignkit.sandbox import film_captions, films
from alignkit.sandbox.captions import _plural
from alignkit.sandbox.film_aspects import FilmWriter
from data_pipelines.aspects import problems_of
from rewards.yes_no import YesNo

RULES = Rules(("alignment",), 16)
VLM = Path(__file__).parents[2] / "alignkit" / "sandbox" / "weights" / "vlm"
WRITER = "alignkit.sandbox.film_aspects:FilmWriter"


def true_of(spec, text):
    """Whether yes is the right answer about a clip of `spec`."""
    if match := re.match(r"Is there a (?:(\w+) )?(\w+)\?", text):
        return any(shape == match[2] and match[1] in (None, color) for shape, color in spec.kinds)
    if match := re.match(r"Is the number of (\w+) one\?", text):
        return sum(_plural(shape) == match[1] for shape, _ in spec.kinds) == 1
    if match := re.match(r"Is the (\w+) moving(?: (\w+))?\?", text):
        is_mover = spec.direction is not None and spec.kinds[0][0] == match[1]
        return is_mover and match[2] in (None, spec.direction)
    match = re.match(r"Is the (\w+) (\w+)\?", text)
    return (match[1], match[2]) in spec.kinds


def is_good(spec, draft):
    return all(true_of(spec, q.text) if q.text else not true_of(spec, q.negated) for q in draft.questions)


def test_right_clips_satisfy_all_questions_and_wrong_ones_do_not():
    """Of two clips that differ in the speed alone no question tells."""
    rng, told = np.random.default_rng(1), 0
    prompts = film_captions.prompts(80, seed=4)
    drafts = FilmWriter().write(prompts, RULES, [()] * len(prompts))
    for prompt, draft in zip(prompts, drafts, strict=True):
        assert problems_of(draft, RULES) == []
        spec = film_captions.parse(prompt.text)
        assert is_good(spec, draft)
        wrong = films.contradict(spec, rng)
        if (wrong.kinds, wrong.direction) != (spec.kinds, spec.direction):
            assert not is_good(wrong, draft), (prompt.text, wrong)
            told += 1
    assert told > 50


def test_the_vlm_prefers_the_clip_that_shows_the_caption():
    critic = YesNo(str(VLM), modality="video", writer=WRITER, frames=8, rate=8 * 8 / films.FRAMES)
    rng, higher = np.random.default_rng(2), []
    for prompt in film_captions.prompts(16, seed=5):
        spec = film_captions.parse(prompt.text)
        sides = [films.render(films.compose(own, rng), rng) for own in (spec, films.contradict(spec, rng))]
        with torch.no_grad():
            right, wrong = critic(torch.from_numpy(np.stack(sides)).permute(0, 1, 4, 2, 3), [prompt, prompt]).total
        higher.append(bool(right > wrong))
    assert np.mean(higher) > 0.7


def test_the_writer_is_for_prompts_without_questions():
    critic = YesNo(str(VLM), modality="video", writer=WRITER)
    own = Prompt("a", "a red ring stands still", {"questions": ["Is there a ring?"]})
    clip = torch.rand(1, 4, 3, 32, 32)
    with torch.no_grad():
        assert set(critic(clip, [own]).parts) == {"question_1"}
        assert "still_ring" in critic(clip, [Prompt.from_text(own.text)]).parts
        with pytest.raises(DataError, match="prompt 'a dog': "):
            critic(clip, [Prompt.from_text("a dog")])
