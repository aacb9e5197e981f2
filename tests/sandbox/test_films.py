"""The world of the sandbox's clips: grammar, films, faults and their verifier."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest

from alignkit.errors import ConfigError, DataError
from alignkit.sandbox import film_captions, film_gold, film_models, films
from alignkit.sandbox.clips import DIRECTIONS
from alignkit.sandbox.film_captions import SPLITS, parse, prompts, random_spec, specs, word
from alignkit.sandbox.film_videos import videos
from alignkit.sandbox.films import FRAMES, SEGMENTS, Actor, Film, FilmSpec
from alignkit.segments import owners


def still(shape, color, x, y, radius=5.0):
    return Actor(shape, color, radius, np.full(FRAMES, x, np.float32), np.full(FRAMES, y, np.float32))


# --- grammar --------------------------------------------------------------------------------------------------------


def test_every_wording_has_its_meaning():
    rng, texts = np.random.default_rng(0), set()
    for spec in specs():
        for _ in range(4):
            text = word(spec, rng)
            assert parse(text) == spec
            texts.add(text)
    assert len(specs()) == len(set(specs())) == 1155
    assert len(texts) > 3 * len(specs())


@pytest.mark.parametrize(
    "text",
    [
        "a red ring",
        "a purple ring moves left slowly",
        "a red ring moves left slowly and a blue cross moves up slowly",
        "a red ring moves left slowly and a red square stands still and a blue cross stands still",
    ],
)
def test_a_text_outside_the_grammar_is_named(text):
    with pytest.raises(DataError, match=text.split()[1]):
        parse(text)


def test_every_word_is_a_token_and_captions_fit():
    tokenizer, rng = film_models.tokenizer(), np.random.default_rng(1)
    texts = [word(random_spec(rng), rng) for _ in range(300)]
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    assert lengths == [len(text.split()) + 1 for text in texts]
    assert max(lengths) == film_captions.TOKENS
    assert tokenizer.unk_token_id not in itertools.chain(*tokenizer(texts).input_ids)


def category_of(text):
    spec = parse(text)
    return f"{['one', 'two'][len(spec.kinds) - 1]}_{'moving' if spec.direction else 'still'}"


def test_prompts_differ_and_know_their_category():
    asked = prompts(600, seed=3)
    assert len({prompt.text for prompt in asked}) == 600
    assert prompts(30, seed=3) == asked[:30]
    for part in (asked[:300], asked[300:]):  # no category runs out of prompts
        counts = collections.Counter(prompt.metadata["category"] for prompt in part)
        for category, share in zip(film_captions.CATEGORIES, (4 / 9, 1 / 18, 4 / 9, 1 / 18), strict=True):
            assert abs(counts[category] / 300 - share) < 0.08
    assert all(prompt.metadata["category"] == category_of(prompt.text) for prompt in asked)


def test_splits_have_no_meaning_in_common():
    """Each split has meanings of every category, and its prompts have the categories of all prompts."""
    meanings = {split: {spec for spec in specs() if film_captions.split_of(spec) == split} for split in SPLITS}
    assert sum(map(len, meanings.values())) == len(specs())
    for split, own in meanings.items():
        assert abs(len(own) / len(specs()) - 0.5) < 0.05
        asked = prompts(500, seed=23, split=split)
        assert len(asked) == 500
        assert {parse(prompt.text) for prompt in asked} <= own
        assert {parse(video.caption) for video in videos(200, seed=29, split=split)} <= own
        counts = collections.Counter(prompt.metadata["category"] for prompt in asked)
        assert min(counts["one_moving"], counts["two_moving"]) > 180
        assert min(counts["one_still"], counts["two_still"]) > 12
    with pytest.raises(ConfigError, match="split is 'test'; use training or held_out"):
        prompts(1, seed=0, split="test")
    with pytest.raises(ConfigError, match="split is 'test'"):
        videos(1, seed=0, split="test")


# --- films ----------------------------------------------------------------------------------------------------------


def test_segments_are_those_of_the_latent_frames():
    """The first latent frame belongs to the first segment, each other one is a segment of its own."""
    assert owners(SEGMENTS, range(FRAMES), 4) == (0, *range(8))


def test_films_follow_their_spec():
    rng = np.random.default_rng(2)
    for _ in range(200):
        spec = random_spec(rng)
        film = films.compose(spec, rng)
        assert [(actor.shape, actor.color) for actor in film.actors] == list(spec.kinds)
        for index, actor in enumerate(film.actors):
            ends = actor.x[-1] - actor.x[0], actor.y[-1] - actor.y[0]
            ux, uy = DIRECTIONS[spec.direction] if spec.direction and index == 0 else (0, 0)
            low, high = films.SPEEDS[spec.speed] if ux or uy else (0, 0)
            assert low - 1e-3 <= ends[0] * ux + ends[1] * uy <= high + 1e-3
            assert abs(ends[0] * uy) + abs(ends[1] * ux) < 1e-3
            places = np.stack([actor.x, actor.y])
            assert (places >= actor.radius).all()
            assert (places <= films.SIZE - actor.radius).all()
        assert not any(films.touch(a, b) for a, b in itertools.combinations(film.actors, 2))


def test_a_part_of_a_film_is_that_part_of_the_whole():
    rng = np.random.default_rng(3)
    film = films.glitch(films.crowd(5, rng), 2, rng)
    whole = films.render(film, np.random.default_rng(1))
    assert np.array_equal(whole[7:16], films.render(film, np.random.default_rng(1), 7, 16))
    assert np.ptp(whole[:, 0, 0], axis=0).max() == 0  # nothing flickers


def test_faults_are_local_and_as_many_as_asked():
    rng = np.random.default_rng(4)
    counts = []
    for _ in range(200):
        film = films.compose(random_spec(rng), rng)
        clean, faulty = (films.render(seen, np.random.default_rng(1)) for seen in (film, films.glitch(film, 1.0, rng)))
        differs = (clean != faulty).any((1, 2, 3))
        edges = np.flatnonzero(np.diff(np.r_[0, differs, 0]))
        lengths = edges[1::2] - edges[::2]
        assert all(films.FAULT_FRAMES[0] <= length <= films.FAULT_FRAMES[1] for length in lengths)
        counts.append(len(lengths))
    assert 0.7 < np.mean(counts) < 1.1
    assert 0.2 < np.mean(np.array(counts) == 0) < 0.6


def test_cells_name_the_object_at_a_place():
    moving = Actor("square", "red", 6.0, np.linspace(6, 26, FRAMES).astype(np.float32), np.full(FRAMES, 12, np.float32))
    cells = films.cells(Film((moving, still("ring", "blue", 12, 28, 4))))
    assert cells.shape == (9, 4, 4)
    assert cells[0, 1, 0] == cells[-1, 1, 3] == 1
    assert (cells[:, 3, 1] == 2).all()
    assert (cells[:, 0, 3] == 0).all()


# --- gold -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", film_captions.CATEGORIES)
def test_gold_is_right_on_rendered_clips(category):
    rng = np.random.default_rng([5, len(category)])
    for _ in range(25):
        spec = random_spec(rng, float(category.startswith("two")), float(category.endswith("still")))
        film, light = films.compose(spec, rng), int(rng.integers(99))
        clean, faulty = (
            films.render(seen, np.random.default_rng(light)) for seen in (film, films.glitch(film, 2, rng))
        )
        reading = film_gold.read(clean, spec)
        assert reading.is_right
        assert reading.scores.min() > 0.75
        assert not film_gold.read(clean, films.contradict(spec, rng)).is_right
        differs = (clean != faulty).any((1, 2, 3))
        reading = film_gold.read(faulty, spec)
        assert np.array_equal(reading.is_faulty, differs)
        bad = [differs[start:end].sum() >= 2 for start, end in SEGMENTS]
        assert np.array_equal(~reading.segment_is_right, bad)


def test_undecided_frames_follow_and_single_ones_do_not_count():
    right = np.array([0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0], bool)
    wrong = np.array([0, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 1], bool)
    assert film_gold._lasting(right, wrong).nonzero()[0].tolist() == [5, 6]
    assert not film_gold._lasting(np.zeros(9, bool), np.zeros(9, bool)).any()
    assert film_gold._lasting(np.zeros(9, bool), np.ones(9, bool)).all()


def test_scores_fall_with_the_damage():
    spec, rng = FilmSpec((("square", "red"),)), np.random.default_rng(6)
    film = Film((still("square", "red", 16, 16, 6),))
    frames = films.render(film, rng)
    half = frames.copy()
    half[:, :, 16:] = half[:, :1, :1]
    gone = np.broadcast_to(frames[:, :1, :1], frames.shape)
    ring = films.render(Film((still("ring", "red", 16, 16, 6),)), rng)
    means = [film_gold.read(clip, spec).scores.mean() for clip in (frames, half, ring, gone)]
    assert means[0] > 0.85 > means[1] > 0.5
    assert means[0] > means[2] > means[3] == 0
    two = films.render(Film((*film.actors, still("cross", "blue", 6, 6))), rng)
    reading = film_gold.read(two, spec)
    assert reading.is_faulty.all()
    assert 0.4 < reading.scores.mean() < 0.5  # half of what is seen is wanted


def test_motion_is_that_of_the_wanted_object():
    rng = np.random.default_rng(7)
    spec = parse("a red ring moves left slowly and a blue cross stands still")
    frames = films.render(films.compose(spec, rng), rng)
    reading = film_gold.read(frames, spec)
    assert 5 <= reading.pixels <= 8.1
    turned = film_gold.read(frames[::-1], spec)
    assert (turned.has_direction, turned.rests_are_still, turned.is_right) == (False, True, False)
    faster = film_gold.read(frames, parse("a red ring moves left quickly and a blue cross stands still"))
    assert (faster.has_direction, faster.has_speed) == (True, False)
    other = film_gold.read(frames, parse("a red ring stands still and a blue cross moves left slowly"))
    assert (other.has_direction, other.rests_are_still) == (False, False)
    empty = film_gold.read(np.zeros_like(frames), spec)
    assert (empty.pixels, empty.has_direction, empty.scores.max()) == (0, False, 0)


def test_motion_does_not_depend_on_the_shape():
    """An object of another shape than the caption's moves as well; the clip is no less wrong."""
    rng = np.random.default_rng(9)
    film = films.compose(parse("a red square moves left quickly"), rng)
    reading = film_gold.read(films.render(film, rng), parse("a red ring moves left quickly"))
    assert reading.is_faulty.all()
    assert not reading.is_right
    assert (reading.has_direction, reading.has_speed) == (True, True)
    assert reading.pixels > film_gold.FAST
