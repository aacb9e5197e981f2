"""Clips move as they say, and every answer is checked against its scene by reading the question's text anew."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from alignkit.sandbox import questions
from alignkit.sandbox.captions import NUMBERS, parse
from alignkit.sandbox.clips import DIRECTIONS, at, covers, film, move
from alignkit.sandbox.gold import look, shows
from alignkit.sandbox.scenes import PALETTE, RELATIONS, SHAPES, Scene, Thing, render

COUNTS = {name: number for number, name in questions.COUNTS.items()}
SINGULAR = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross", "rings": "ring"}


def subjects(count, *, clips=False, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        about = questions.subject(rng)
        if clips:
            scene, motion = move(about.scene, rng)
            about = questions.Subject(scene, about.caption, about.is_shown, motion)
        yield about, questions.ask(about, rng, 10)


def named(scene, shape):
    return [thing for thing in scene.things if thing.shape == shape]


def truth(question, about):  # noqa: PLR0911 - one for each kind of question
    """The answer that the scene gives to the question's words."""
    scene, text = about.scene, question.text
    if match := re.fullmatch(r"Is there a (?:(\w+) )?(\w+)\?", text):
        color, shape = match.groups()
        return any(color in (None, thing.color) for thing in named(scene, shape))
    if match := re.fullmatch(r"Is the number of (\w+) (\w+)\?", text):
        return len(named(scene, SINGULAR[match[1]])) == COUNTS[match[2]]
    if match := re.fullmatch(r"Is the (\w+) moving(?: (\w+))?\?", text):
        moving = about.motion.direction if scene.things[about.motion.thing].shape == match[1] else None
        return moving is not None and match[2] in (None, moving)
    if match := re.fullmatch(r"Is the (\w+) (\w+(?: of)?) the (\w+)\?", text):
        (first,), (second,) = named(scene, match[1]), named(scene, match[3])
        ux, uy = RELATIONS[match[2]]
        return (first.x - second.x) * ux + (first.y - second.y) * uy > abs(
            (first.x - second.x) * uy + (first.y - second.y) * ux
        )
    if match := re.fullmatch(r"Is the (\w+) (\w+)\?", text):
        (thing,) = named(scene, match[1])
        return thing.color == match[2]
    if match := re.fullmatch(r"What color is the (\w+)\?", text):
        return named(scene, match[1])[0].color
    if match := re.fullmatch(r"How many (\w+) are there\?", text):
        return len(named(scene, SINGULAR[match[1]]))
    if re.fullmatch(r"Which way is the \w+ moving\?", text):
        return about.motion.direction
    assert text == "What does the picture show?"
    return Counter((thing.shape, thing.color) for thing in scene.things)


def meant(answer, kind):
    """An answer's words as `truth` puts them."""
    if kind in questions.YES_NO:
        return {"Yes": True, "No": False}[answer]
    if kind == "how_many":
        return COUNTS[answer]
    if kind != "what_shows":
        return answer
    found = Counter()
    for part in answer.split(" and "):
        number, color, shape = part.split()
        found[SINGULAR.get(shape, shape), color] += 1 if number == "a" else (NUMBERS | COUNTS)[number]
    return found


@pytest.mark.parametrize("clips", [False, True])
def test_answers_are_true(clips):
    asked = Counter()
    for about, found in subjects(300, clips=clips):
        for question in found:
            if question.kind != "caption":
                assert meant(question.answer, question.kind) == truth(question, about), (question, about)
            asked[question.kind] += 1
    kinds = {*questions.YES_NO, *questions.OPEN}
    assert set(asked) == (kinds - {"relation"} if clips else kinds - {"motion", "which_way"})


def test_captions_are_answered_as_the_verifier_answers():
    rng, agreed = np.random.default_rng(1), []
    for about, found in subjects(200):
        answers = [question.answer for question in found if question.kind == "caption"]
        seen = shows(look(render(about.scene, rng)), parse(about.caption))
        agreed += [(answer == "Yes") == seen for answer in answers]
    assert np.mean(agreed) > 0.98  # the verifier itself is right on 99.5% of renders


def test_yes_and_no_are_balanced_and_kinds_are_mixed():
    answers = Counter(
        (question.kind, question.answer)
        for clips in (False, True)
        for _, found in subjects(500, clips=clips, seed=2)
        for question in found
    )
    for kind in questions.YES_NO:
        share = answers[kind, "Yes"] / (answers[kind, "Yes"] + answers[kind, "No"])
        assert 0.35 < share < 0.65, (kind, share)


def test_wrong_colors_can_all_be_another_objects():
    rng, near = np.random.default_rng(6), Counter()
    for share in (0.0, 1.0):
        for about in (questions.subject(rng, share) for _ in range(300)):
            things = about.scene.things
            colors, is_mixed = {thing.color for thing in things}, len({thing.shape for thing in things}) > 1
            for question in questions.ask(about, rng, 10):
                named = set(question.text.rstrip("?").split()) & set(PALETTE)
                can_be_near = question.kind == "color" or (is_mixed and question.kind == "object")
                if named and can_be_near and len(colors) > 1 and question.answer == "No":
                    near[question.kind, share, named <= colors] += 1
    for kind in ("color", "object"):
        assert near[kind, 1.0, True] > 30
        assert near[kind, 1.0, False] == 0
        assert near[kind, 0.0, False] > near[kind, 0.0, True]  # any other colour, now and then the other object's


def test_questions_are_the_same_in_every_process():
    """Not the order of a set of words, which differs from one process to the next."""
    code = (
        "import numpy as np; from alignkit.sandbox import questions; rng = np.random.default_rng(7); "
        "print([questions.ask(questions.subject(rng, near), rng, 10) for near in (0, 1) for _ in range(40)])"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1]


def test_one_of_a_pair_shows_the_caption():
    rng, right = np.random.default_rng(3), []
    for _ in range(60):
        first, second, caption, question = questions.pair(rng)
        spec = parse(caption)
        assert f'"{caption}"' in question.text
        verdicts = {"first": shows(look(render(first, rng)), spec), "second": shows(look(render(second, rng)), spec)}
        right.append(verdicts.pop(question.answer) and not any(verdicts.values()))
    assert np.mean(right) > 0.95


def test_clips_move_one_object_the_stated_way():
    rng, still = np.random.default_rng(4), 0
    for about, _ in subjects(60, clips=True, seed=4):
        frames = film(about.scene, about.motion, rng)
        assert frames.shape == (8, 64, 64, 3)
        assert frames.min() >= 0
        assert frames.max() <= 1
        if about.motion.direction is None:
            still += 1
            assert (frames == frames[0]).all()
            continue
        mover = about.scene.things[about.motion.thing]
        last = at(about.scene, about.motion, 1.0).things[about.motion.thing]
        ux, uy = DIRECTIONS[about.motion.direction]
        assert (last.x - mover.x, last.y - mover.y) == pytest.approx(
            (ux * about.motion.pixels, uy * about.motion.pixels)
        )
        assert len(look(frames[0])) == len(look(frames[-1])) == len(about.scene.things)  # whole, and apart
    assert 2 <= still <= 25


def test_clips_are_functions_of_their_seed():
    def clip():
        rng = np.random.default_rng(5)
        return film(*move(questions.subject(rng).scene, rng), rng, frames=4)

    np.testing.assert_array_equal(clip(), clip())


def test_patches_know_what_covers_them():
    scene = Scene((Thing("square", "red", 20, 20, 14), Thing("circle", "blue", 52, 52, 8)), "black")
    labels = covers(scene)
    assert labels.shape == (8, 8)
    assert labels[2, 2] == 1
    assert labels[6, 6] == 2
    assert labels[0, 7] == labels[7, 0] == 0
    assert set(np.unique(labels)) == {0, 1, 2}
    assert len(SHAPES) == len(SINGULAR)


def test_a_caption_is_shown_where_all_its_phrases_are():
    rng = np.random.default_rng(3)
    for _ in range(300):
        about = questions.subject(rng)
        assert all(questions.phrases(about.caption, about.scene)) == about.is_shown
    things = (Thing("circle", "red", 16, 32, 8), Thing("ring", "blue", 48, 32, 8))
    scene = Scene(things, "black")
    assert questions.phrases("a circle right of a ring", scene) == [1, 0]
    assert questions.phrases("a blue circle and a blue ring", scene) == [0, 1]
    assert questions.phrases("two rings", scene) == [0]
