"""The sandbox's world: grammar, scenes, gold verifier, tokenizers and datasets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alignkit.errors import DataError
from alignkit.protocols import Reward
from alignkit.records import Prompt
from alignkit.sandbox import models
from alignkit.sandbox.captions import NUMBERS, bodies, captions, parse, prompts, random_caption
from alignkit.sandbox.gold import FAULTS, GoldReward, fault, look, shows
from alignkit.sandbox.raters import ASPECTS, TASTES, Comparisons, Readings, features, marks
from alignkit.sandbox.scenes import (
    BACKGROUNDS,
    CATEGORIES,
    PALETTE,
    RELATIONS,
    SHAPES,
    SIZE,
    Scene,
    Thing,
    _obeys,
    compose,
    contradict,
    render,
)
from alignkit.sandbox.worlds import Captioned, centres
from alignkit.seeds import derive_seed


def specs(category, count, seed=0):
    rng = np.random.default_rng(derive_seed("test", category, seed))
    pool = bodies(category)
    return [(parse(pool[int(rng.integers(len(pool)))]), rng) for _ in range(count)]


def say(spec):
    """A body in the words of the grammar, written anew here."""
    shape, color = spec.kinds[0]
    if spec.category == "counting":
        word = {value: name for name, value in NUMBERS.items()}[len(spec.kinds)]
        return f"{word} {f'{color} ' if color else ''}{shape}{'es' if shape == 'cross' else 's'}"
    return f" {spec.relation or 'and'} ".join(
        f"a {color} {shape}" if color else f"a {shape}" for shape, color in spec.kinds
    )


# --- grammar --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_body_means_what_it_says(category):
    """parse, then say it again in the plainest words: the whole grammar comes back."""
    for body in bodies(category):
        spec = parse(body)
        assert spec.category == category
        assert say(spec) == body


@pytest.mark.parametrize("category", CATEGORIES)
def test_prefix_and_ground_change_the_ground_alone(category):
    body = bodies(category)[-1]
    for caption in captions(category)[-len(captions(category)) // len(bodies(category)) :]:
        spec = parse(caption)
        assert spec.kinds == parse(body).kinds
        assert spec.background is None or caption.endswith(f"on a {spec.background} background")


def test_captions_are_distinct_and_each_parses():
    every = [caption for category in CATEGORIES for caption in captions(category)]
    assert len(set(every)) == len(every)
    rng = np.random.default_rng(0)
    for caption in rng.choice(every, 500):
        assert str(caption).startswith(("a ", *("two ", "three ", "four ")))
        parse(str(caption))


@pytest.mark.parametrize("text", ["", "a dog", "five circles", "a red", "a circle beside a ring", "Two circles"])
def test_other_texts_are_refused(text):
    with pytest.raises(DataError, match="is no sandbox caption"):
        parse(text)


def test_prompts_are_distinct_seeded_and_balanced():
    drawn = prompts(240, seed=3)
    assert [p.id for p in drawn] == [p.id for p in prompts(240, seed=3)]
    assert [p.id for p in drawn] != [p.id for p in prompts(240, seed=4)]
    assert len({p.id for p in drawn}) == 240
    counts = {category: sum(p.metadata["category"] == category for p in drawn) for category in CATEGORIES}
    assert min(counts.values()) > 20
    assert all(parse(p.text).category == p.metadata["category"] for p in drawn)


# --- scenes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", CATEGORIES)
def test_scenes_show_their_spec(category):
    for spec, rng in specs(category, 40):
        scene = compose(spec, rng)
        assert tuple(thing.shape for thing in scene.things) == tuple(shape for shape, _ in spec.kinds)
        for thing, (_, color) in zip(scene.things, spec.kinds, strict=True):
            assert color in (None, thing.color)
            assert thing.radius + 1 < thing.x < SIZE - thing.radius - 1
        if spec.relation:
            first, second = scene.things
            assert _obeys(first.x - second.x, first.y - second.y, spec.relation, margin=1.4)


def test_contradiction_always_contradicts():
    for category in CATEGORIES:
        for spec, rng in specs(category, 60):
            assert contradict(spec, rng) != spec


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", PALETTE)
def test_gold_recognises_every_object_on_every_ground(shape, color):
    rng = np.random.default_rng(0)
    for ground in BACKGROUNDS:
        picture = render(Scene((Thing(shape, color, 30.3, 33.7, 8.2),), ground), rng)
        (seen,) = look(picture)
        assert (seen.shape, seen.color) == (shape, color)
        assert seen.x == pytest.approx(30.3, abs=0.7)
        assert seen.y == pytest.approx(33.7, abs=1.7)  # a triangle's pixels lie below its centre


@pytest.mark.parametrize("category", CATEGORIES)
def test_gold_is_right_on_rendered_scenes(category):
    """200 of each: at least 99.5% of true scenes accepted and of contradicting ones rejected."""
    accepted = rejected = 0
    for spec, rng in specs(category, 200):
        accepted += shows(look(render(compose(spec, rng), rng)), spec)
        rejected += not shows(look(render(compose(contradict(spec, rng), rng), rng)), spec)
    assert accepted >= 199
    assert rejected >= 199


def test_gold_sees_nothing_in_an_empty_picture_or_noise():
    assert look(np.zeros((SIZE, SIZE, 3), np.float32)) == []
    noise = np.random.default_rng(0).random((SIZE, SIZE, 3)).astype(np.float32)
    assert not shows(look(noise), parse("a circle"))


@pytest.mark.parametrize(
    ("drawn", "asked", "expected"),
    [
        ("two circles", "a circle", "too many objects"),
        ("a circle", "two circles", "too few objects"),
        ("a circle", "a cross", "another shape"),
        ("a red circle and a blue cross", "a blue circle and a red cross", "colour of the other object"),
        ("a red circle and a red cross", "a red circle and a blue cross", "colour of the other object"),
        ("a red circle and a green cross", "a red circle and a blue cross", "another colour"),
        ("two red circles", "two blue circles", "another colour"),
        ("a circle above a cross", "a circle below a cross", "another position"),
        ("a circle above a cross", "a circle and a cross", None),
    ],
)
def test_gold_names_the_fault(drawn, asked, expected):
    rng = np.random.default_rng(0)
    picture = render(compose(parse(drawn), rng), rng)
    assert fault(look(picture), parse(asked)) == expected
    assert expected is None or expected in FAULTS


def test_gold_reward_scores_row_by_row():
    rng = np.random.default_rng(0)
    texts = ["two red circles", "a blue cross left of a ring"]
    pictures = torch.stack([torch.from_numpy(render(compose(parse(t), rng), rng)).permute(2, 0, 1) for t in texts])
    gold = GoldReward()
    assert isinstance(gold, Reward)
    asked = [Prompt.from_text(text) for text in texts]
    assert gold(pictures, asked).total.tolist() == [1.0, 1.0]
    assert gold(pictures, asked[::-1]).total.tolist() == [0.0, 0.0]
    with pytest.raises(DataError, match="no sandbox caption"):
        gold(pictures[:1], [Prompt.from_text("a dog")])
    with pytest.raises(DataError, match=r"3, 64, 64\], 1 prompts"):
        gold(pictures, asked[:1])
    with pytest.raises(DataError, match="a pixel is NaN"):
        gold(pictures * torch.nan, asked)


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_have_opposites(relation):
    ux, uy = RELATIONS[relation]
    assert _obeys(10 * ux, 10 * uy, relation, margin=1.4)
    assert not _obeys(-10 * ux, -10 * uy, relation, margin=1.4)
    assert not _obeys(10.0, 10.0, relation, margin=1.4)


# --- tokenizers -----------------------------------------------------------------------------------------------------


def test_one_token_a_word():
    clip, t5 = models.clip_tokenizer(), models.t5_tokenizer()
    for word in models.WORDS:
        assert len(clip.tokenize(word)) == 1
        assert len(t5.tokenize(word)) == 1
    assert len({clip(word).input_ids[1] for word in models.WORDS}) == len(models.WORDS)


def test_the_longest_caption_fits():
    longest = max((caption for category in CATEGORIES for caption in captions(category)), key=lambda c: c.count(" "))
    words = set(longest.split())
    assert words <= set(models.WORDS)
    assert len(models.clip_tokenizer()(longest).input_ids) <= models.TOKENS
    ids = models.t5_tokenizer()(longest).input_ids
    assert len(ids) <= models.TOKENS
    assert models.t5_tokenizer().unk_token_id not in ids


# --- datasets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: Captioned(9, seed),
        lambda seed: Readings(9, seed, models.TOKENS),
        lambda seed: Comparisons(9, seed, TASTES["showy"]),
    ],
)
def test_items_depend_on_seed_and_index_alone(make):
    def same(one, other):
        return all(
            torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
            for key, value in one.items()
        )

    forward, backward = make(5), make(5)
    items = [forward[i] for i in range(4)]
    again = [backward[i] for i in reversed(range(4))][::-1]
    assert all(same(a, b) for a, b in zip(items, again, strict=True))
    assert not same(items[0], items[1])
    assert not same(items[0], make(6)[0])


def test_noise_is_the_share_of_wrong_pictures():
    gold = GoldReward()

    def accuracy(noise):
        items = [Captioned(150, 1, dict.fromkeys(CATEGORIES, noise))[i] for i in range(150)]
        pictures = torch.stack([item["pixels"] for item in items])
        return gold(pictures, [Prompt.from_text(item["prompt"]) for item in items]).total.mean().item()

    assert accuracy(0.0) > 0.985
    assert accuracy(1.0) < 0.015
    assert accuracy(0.5) == pytest.approx(0.5, abs=0.15)


def test_centres_say_what_gold_sees():
    """Label and place of every object: the patch under its centre carries its shape and colour."""
    rng, colors = np.random.default_rng(2), list(PALETTE)
    for _ in range(20):
        scene = compose(parse(random_caption(rng)), rng)
        labels = centres(scene)
        found = [label - 1 for label in labels.tolist() if label]
        marked = {(SHAPES[label // len(colors)], colors[label % len(colors)]) for label in found}
        seen = look(render(scene, rng))
        assert marked == {(thing.shape, thing.color) for thing in seen}
        assert int((labels > 0).sum()) == len(seen)


def test_training_captions_cover_the_categories():
    rng = np.random.default_rng(0)
    found = {parse(random_caption(rng)).category for _ in range(200)}
    assert found == set(CATEGORIES)
    weights = dict.fromkeys(CATEGORIES, 0.0) | {"position": 2.0, "counting": 1.0}
    drawn = [parse(random_caption(rng, weights)).category for _ in range(300)]
    assert set(drawn) == {"position", "counting"}
    assert 160 < drawn.count("position") < 240


# --- raters ---------------------------------------------------------------------------------------------------------


def test_raters_see_the_scene():
    rng = np.random.default_rng(0)
    spec = parse("a red circle and a blue ring")
    right = compose(spec, rng)
    assert [features(spec, right, 1.0)[k] for k in ("count", "shapes", "colors", "relation")] == [1.0] * 4
    swapped = compose(parse("a blue circle and a red ring"), rng)
    assert features(spec, swapped, 1.0)["colors"] == 0.0
    one = compose(parse("a circle"), rng)
    assert features(spec, one, 1.0)["count"] == 0.0
    assert features(spec, one, 1.0)["shapes"] == 0.5


def test_tastes_differ():
    """On the same pairs, the careful rater goes by what the caption says more often than the showy one does."""
    agreement = {}
    for name, taste in TASTES.items():
        pairs = [pair["answers"] for pair in map(Comparisons(250, 5, taste).__getitem__, range(250))]
        told = [(answers[0], sum(answers[1:5])) for answers in pairs if sum(answers[1:5]) != 0]
        agreement[name] = np.mean([verdict == np.sign(faithful) for verdict, faithful in told])
    assert agreement["careful"] > agreement["showy"] + 0.05
    assert agreement["showy"] > 0.55


@pytest.mark.parametrize(
    ("text", "shown", "wrong"),
    [
        ("a photo of a red circle and a blue ring", "a blue circle and a red ring", ["red", "blue"]),
        ("a circle left of a ring", "a circle right of a ring", ["left"]),
        ("three green crosses", "two green crosses", ["three"]),
        ("a square and a cross", "a square and a circle", ["cross"]),
        ("a white ring on a navy background", "a white ring on a brown background", ["navy"]),
        ("a cyan triangle above a square", "a cyan triangle above a square", []),
    ],
)
def test_marks_name_the_words_that_are_not_shown(text, shown, wrong):
    text = text.replace("cyan ", "")  # positions carry no colours
    scene = compose(parse(shown.replace("cyan ", "")), np.random.default_rng(3))
    marked = dict(zip(text.split(), marks(text, scene), strict=True))
    assert [word for word, mark in marked.items() if mark == 0.0] == wrong
    assert {word for word, mark in marked.items() if mark == -1.0} <= {"a", "photo", "of", "and", "on", "background"}


def test_readings_are_aligned_with_tokens():
    tokenizer = models.clip_tokenizer()
    for item in (Readings(30, 4, models.TOKENS)[index] for index in range(30)):
        words = item["prompt"].split()
        assert len(tokenizer(item["prompt"]).input_ids) == len(words) + 2
        said = [word for word, mark in zip(words, item["marks"][1:], strict=False) if mark >= 0]
        assert set(said) >= {word for word in words if word in SHAPES}
        assert (item["marks"][1 + len(words) :] == -1).all()
        assert len(item["answers"]) == 1 + len(ASPECTS)
        assert (item["answers"][0] == 1.0) == (item["answers"][1:-1] == 1.0).all()
