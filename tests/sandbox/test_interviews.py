"""The vision-language model's interviews: one token a word, many questions answered as if each stood alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from alignkit.sandbox import interviews, questions
from alignkit.sandbox.clips import DIRECTIONS, Motion
from alignkit.sandbox.scenes import RELATIONS, Scene, Thing
from alignkit.sandbox.vlm import CUTTING, SPECIAL, tokenizer, vlm
from alignkit.sandbox.vlm_accuracy import accuracy
from rewards.models.patches import Patches

PATCHES = Patches(**CUTTING)


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@pytest.fixture(scope="module")
def model(words):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vlm(words).eval()


def test_every_word_of_the_interviews_is_one_token(words):
    rows = interviews.Interviews(150, seed=1, count=10)
    for row in (rows[index] for index in range(150)):
        for question in row["questions"]:
            for text in (question.text, question.answer):
                pieces = text.replace('"', " ").replace("?", " ").replace(".", " ").split()
                tokens = words.tokenize(text)
                assert [token.strip("Ġ") for token in tokens if token.strip('Ġ"?.')] == pieces
    assert words.decode(words("Ein Käse, 42 €?").input_ids) == "Ein Käse, 42 €?"  # any other text is bytes
    assert all(len(words(name).input_ids) == 1 for name in SPECIAL)


def test_many_questions_at_one_look_are_each_asked_alone(model, words):
    collate = interviews.Interview(words, model, PATCHES)
    rows = interviews.Interviews(30, seed=7, count=4)
    kinds = set()
    for row in (rows[index] for index in range(30)):
        is_clip, is_pair = row["media"][0].dim() == 4, len(row["media"]) == 2
        if (is_clip, is_pair) in kinds:
            continue
        kinds.add((is_clip, is_pair))
        batch = collate([row])
        with torch.no_grad():
            seen = model.model.visual(batch["patches"], grid_thw=batch["grids"]).pooler_output
            states = interviews.read(model, seen, batch["ids"], batch["groups"], batch["positions"])
            packed = model.lm_head(states[-1])
        keep = (batch["groups"][0] == 0) | (batch["groups"][0] == len(row["questions"]))
        ids = batch["ids"][:, keep]
        types = (ids == model.config.image_token_id) + 2 * (ids == model.config.video_token_id)
        seconds = torch.tensor([row["interval"] / 4])
        media = (
            {
                "pixel_values_videos": batch["patches"],
                "video_grid_thw": batch["grids"],
                "second_per_grid_ts": seconds,
            }
            if is_clip
            else {"pixel_values": batch["patches"], "image_grid_thw": batch["grids"]}
        )
        with torch.no_grad():
            alone = model(input_ids=ids, mm_token_type_ids=types.int(), attention_mask=torch.ones_like(ids), **media)
        torch.testing.assert_close(packed[0, keep], alone.logits[0], rtol=0, atol=1e-5)
    assert kinds == {(False, False), (True, False), (False, True)}


def test_answers_are_learnt_and_counted_right(words):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pupil = vlm(words)
    collate, objective = interviews.Interview(words, pupil, PATCHES), interviews.Answering(pupil, words)
    rows = interviews.Interviews(2, seed=999, count=10)
    batch = collate([rows[index] for index in range(2)])
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    first = objective(**batch)["loss"].item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = objective(**batch)["loss"]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first
    share = [right for right, _ in accuracy(pupil, words, PATCHES, subjects=2).values()]
    assert sum(share) / len(share) > 0.6  # the same rows, by heart
    with torch.no_grad():
        pupil.lm_head.weight.zero_()
    assert not any(right for right, _ in accuracy(pupil, words, PATCHES, subjects=2).values())


def test_facts_stand_in_the_order_of_the_patches(model, words):
    """Half red, half blue: what a row of patches shows is what its facts say, on pictures and on clips."""
    halves = torch.zeros(8, 8, 3, dtype=torch.long)
    halves[:, :3, 0], halves[5:, :, 0] = 1, 2
    picture = torch.zeros(3, 64, 64)
    picture[0, :, :24] = 0.5
    picture[:, 40:] = 1.0
    clip = picture.repeat(4, 1, 1, 1)
    clip[2:] = picture.flip(1)
    rows = [
        {
            "media": [picture, picture.flip(1)],
            "facts": [halves[None], halves.flip(0)[None]],
            "meant": [{}, {}],
            "shown": [[], []],
        },
        {"media": [clip], "meant": [{}], "shown": [[]], "facts": [torch.stack([halves, halves.flip(0)])]},
    ]
    batch = interviews.Interview(words, model, PATCHES)([{"questions": [], "interval": 1, **row} for row in rows])
    red, green = batch["patches"].unflatten(1, (3, -1)).mean(-1)[:, :2].T
    seen = torch.where(green > 0, 2, torch.where(red > -0.5, 1, 0))
    assert torch.equal(seen, batch["facts"][:, 0])
    assert batch["facts"].shape == (4 * 64, len(interviews.FACTS))


def test_facts_tell_object_side_and_way():
    things = (Thing("square", "red", 16, 20, 10), Thing("circle", "blue", 48, 20, 8))
    scene = Scene(things, "black")
    told = interviews.facts(scene)
    square, circle = (interviews.CLASSES[kind] for kind in (("square", "red"), ("circle", "blue")))
    sides = [list(RELATIONS).index(name) for name in ("left of", "right of")]
    assert told[2, 2].tolist() == [square, sides[0], -100]
    assert told[2, 6].tolist() == [circle, sides[1], -100]
    assert told[7, 0].tolist() == [0, -100, -100]
    told = interviews.facts(scene, Motion(1, "down", 10.0))
    assert told[2, 6].tolist() == [circle, -100, list(DIRECTIONS).index("down")]
    assert told[2, 2].tolist() == [square, -100, len(DIRECTIONS)]  # stands still
    three = Scene((*things, Thing("ring", "green", 32, 52, 8)), "black")
    assert (interviews.facts(three)[..., 1:] == -100).all()  # of which of the two?


def test_nouns_of_captions_are_marked_for_each_picture(model, words):
    """A pair: the first picture lacks what the second noun says, the second one shows all."""
    row = {
        "media": [torch.zeros(3, 64, 64)] * 2,
        "facts": [torch.full((1, 8, 8, 3), -100)] * 2,
        "meant": [
            {"circle": {"color": 3}},
            {"circle": {"color": 4}, "rings": {"count": 2}},
        ],
        "shown": [[1, 0], [1, 1]],
        "questions": [
            questions.Question("pair", questions.BETTER.format("a photo of a circle and two rings"), "second"),
            questions.Question("object", "Is there a circle?", "Yes"),  # no caption: nothing is marked
        ],
        "interval": 1,
    }
    batch = interviews.Interview(words, model, PATCHES)([row])
    spoken = [words.decode([token]).strip() for token in batch["ids"][0]]
    marked = [{spoken[place]: int(line[place]) for place in (line >= 0).nonzero()} for line in batch["shown"][:, 0]]
    assert marked == [{"circle": 1, "rings": 0}, {"circle": 1, "rings": 1}]
    assert ((batch["shown"] >= 0).sum((1, 2))).tolist() == [2, 2]
    meant = batch["meant"].unflatten(0, (interviews.MEDIA, -1))[:, :, 0]
    circles = batch["ids"][0] == words.convert_tokens_to_ids("Ġcircle")
    assert circles.sum() == 2  # in either question
    assert (meant[:, list(questions.HEADS).index("color")][:, circles] == torch.tensor([[3], [4]])).all()
    assert (meant[0, list(questions.HEADS).index("count")] == -100).all()
    assert (meant[1, list(questions.HEADS).index("count")] >= 0).sum() == 1


def test_the_last_word_of_a_question_is_marked_where_it_is_judged(model, words):
    """Of "Is the circle red?" the colour, of "Is there a circle?" the shape; of numbers and sides nothing."""
    asked = (("color", "Is the circle red?", "No"), ("object", "Is there a red ring?", "Yes"))
    asked += (("count", "Is the number of rings two?", "Yes"), ("relation", "Is the ring above the circle?", "No"))
    row = {
        "media": [torch.zeros(3, 64, 64)],
        "facts": [torch.full((1, 8, 8, 3), -100)],
        "meant": [{}],
        "shown": [[1]],
        "questions": [questions.Question(*each) for each in asked],
        "interval": 1,
    }
    judged = interviews.STAGES[-1].judged
    for kinds, wanted in ((judged, [("red", 0), ("ring", 1)]), (("caption", "pair"), [])):
        batch = interviews.Interview(words, model, PATCHES, kinds)([row])
        spoken = [words.decode([token]).strip() for token in batch["ids"][0]]
        line = batch["shown"][0, 0]
        assert [(spoken[place], int(line[place])) for place in (line >= 0).nonzero()] == wanted
        assert (batch["shown"][1] == -100).all()


def test_what_patches_hand_on_is_measured_in_words(model, words):
    objective = interviews.Answering(model, words)
    kinds = torch.randint(0, 36, (16, 4), generator=torch.Generator().manual_seed(1))
    kinds[3] = 0  # ground only: says nothing
    with torch.no_grad():
        spoken = model.get_input_embeddings().weight
        spoken.zero_()
        for place, ids in enumerate((objective._shapes, objective._colors)):
            spoken[ids] = torch.eye(len(ids), spoken.shape[1]).roll(20 * place, 1)
        merged = torch.zeros(16, spoken.shape[1])
        for row, kind in enumerate(kinds.amax(1).tolist()):
            if kind:
                merged[row, (kind - 1) // 7] = merged[row, 20 + (kind - 1) % 7] = 50.0
        assert objective._naming(merged, kinds.flatten()) < 1e-3
        assert objective._naming(merged.flip(0), kinds.flatten()) > 1


def test_recipe_saves_what_loads_without_a_processor(tmp_path, words):
    short = interviews.Stage(steps=2, batch=2, learning_rate=1e-3, seed=1, warmup=1)
    interviews.train_vlm(PATCHES, tmp_path / "vlm", tmp_path / "work", (replace(short, count=0), short))
    model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "vlm", output_loading_info=True, dtype=torch.float32
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.config.image_token_id == words.convert_tokens_to_ids("<|image_pad|>")
    stored = AutoTokenizer.from_pretrained(tmp_path / "vlm")
    text = 'Does this figure show "a red ring"? Please answer Yes or No.'
    assert stored(text).input_ids == words(text).input_ids
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a ring?"}]}]
    said = stored.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    vision = "<|vision_start|><|image_pad|><|vision_end|>"
    assert said == f"{interviews.OPENING}{vision}Is there a ring?{interviews.CLOSING}"
    cut = json.loads((tmp_path / "vlm/preprocessor_config.json").read_text())
    assert (cut["patch_size"], cut["merge_size"], cut["size"]["longest_edge"]) == (8, 2, 4096)
