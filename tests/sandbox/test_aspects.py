"""The grammar's questions: every fact is covered, and every question has a form that the VLM was trained on."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from alignkit.aspects import Rules
from alignkit.errors import ConfigError
from alignkit.records import Prompt
from alignkit.sandbox import questions
from alignkit.sandbox.aspects import GrammarWriter
from alignkit.sandbox.captions import _plural, captions, parse
from alignkit.sandbox.scenes import CATEGORIES, PALETTE, RELATIONS, SHAPES, compose, contradict
from data_pipelines.aspects import problems_of

RULES = Rules(("alignment",), 16)
KNOWN = {
    **dict.fromkeys(SHAPES, "SHAPE"),
    **dict.fromkeys(map(_plural, SHAPES), "SHAPES"),
    **dict.fromkeys(PALETTE, "COLOR"),
    **dict.fromkeys(RELATIONS, "RELATION"),
    **dict.fromkeys(questions.COUNTS.values(), "COUNT"),
}


def form(text):
    """A question with the names of classes in place of words; the caption that it quotes is left out."""
    pattern = rf"\b({'|'.join(sorted(KNOWN, key=len, reverse=True))})\b"
    return re.sub(pattern, lambda match: KNOWN[match[0]], re.sub('"[^"]*"', "CAPTION", text))


@pytest.fixture(scope="module")
def trained():
    """The forms of all questions that the VLM's training draws."""
    rng = np.random.default_rng(0)
    asked = [question for _ in range(200) for question in questions.ask(questions.subject(rng), rng, 6)]
    return {form(question.text) for question in asked if question.kind in questions.YES_NO}


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_caption_is_covered_in_known_forms(category, trained):
    sample = np.random.default_rng(1).permutation(captions(category))[:40]
    prompts = [Prompt.from_text(str(text)) for text in sample]
    for writer in (GrammarWriter(), GrammarWriter(whole=True, twins=True)):
        for draft in writer.write(prompts, RULES, [()] * len(prompts)):
            assert problems_of(draft, RULES) == []
            assert {"object", "extra"} <= {fact.kind for fact in draft.facts}
            asked = [text for question in draft.questions for text in question.asked("")]
            assert {form(text) for text in asked} <= trained


def true_of(scene, text):
    """Whether yes is the right answer to a question of the grammar's forms about a scene."""
    things = [(thing.shape, thing.color) for thing in scene.things]
    if match := re.match(r"Is there a (?:(\w+) )?(\w+)\?", text):
        return any(shape == match[2] and match[1] in (None, color) for shape, color in things)
    if match := re.match(r"Is the number of (\w+) (\w+)\?", text):
        counted = [shape for shape, _ in things if match[1] in (_plural(shape), "objects")]
        return questions.COUNTS.get(len(counted)) == match[2]
    if match := re.match(r"Is the (\w+) (left of|right of|above|below) the (\w+)\?", text):
        named = {thing.shape: thing for thing in scene.things}
        is_there = match[1] in named and match[3] in named
        return is_there and questions.stands(named[match[1]], named[match[3]], match[2])
    match = re.match(r"Is the (\w+) (\w+)\?", text)
    return (match[1], match[2]) in things


def is_good(scene, draft):
    return all(
        (not question.text or true_of(scene, question.text))
        and (not question.negated or not true_of(scene, question.negated))
        for question in draft.questions
    )


@pytest.mark.parametrize("options", [{}, {"twins": True}, {"number_of_all": True}])
def test_right_scenes_satisfy_all_questions_and_wrong_ones_do_not(options):
    """Also a scene with one object too many, of a shape that the caption names or of another one."""
    rng, checked = np.random.default_rng(2), 0
    writer = GrammarWriter(**options)
    for category in CATEGORIES:
        for text in rng.permutation(captions(category))[:15]:
            spec = parse(str(text))
            (draft,) = writer.write([Prompt.from_text(str(text))], RULES, [()])
            assert is_good(compose(spec, rng), draft), text
            assert not is_good(compose(contradict(spec, rng), rng), draft), text
            scene, (more,) = compose(spec, rng), compose(parse("a ring"), rng).things
            assert not is_good(replace(scene, things=(*scene.things, more)), draft), text
            checked += 1
    assert checked == 90


def test_a_text_outside_the_grammar_says_what_else_to_use():
    (draft,) = GrammarWriter().write([Prompt.from_text("a dog")], RULES, [()])
    (problem,) = problems_of(draft, RULES)
    assert "'a dog' is no sandbox caption" in problem
    assert "set `writer` to 'served'" in problem
    with pytest.raises(ConfigError, match="extra_weight is 0"):
        GrammarWriter(extra_weight=0)
