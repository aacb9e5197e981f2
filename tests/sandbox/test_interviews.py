"""The vision-language model's interviews: one token a word, many questions answered as if each stood alone."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from alignkit.sandbox import interviews
from alignkit.sandbox.recipes import Recipe
from alignkit.sandbox.vlm import CUTTING, SPECIAL, tokenizer, vlm
from rewards.patches import Patches

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
    rows = interviews.Interviews(4, seed=999, count=10)
    batch = collate([rows[index] for index in range(4)])
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    first = objective(**batch)["loss"].item()
    for _ in range(50):
        optimizer.zero_grad()
        loss = objective(**batch)["loss"]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first
    share = [right for right, _ in interviews.accuracy(pupil, words, PATCHES, subjects=4).values()]
    assert sum(share) / len(share) > 0.6  # the same rows, by heart
    with torch.no_grad():
        pupil.lm_head.weight.zero_()
    assert not any(right for right, _ in interviews.accuracy(pupil, words, PATCHES, subjects=4).values())


def test_patches_are_named_in_the_order_of_the_tower(model, words):
    """Rows: a pair of pictures, a labelled picture, a clip, another labelled one; only the labelled are named."""
    objective = interviews.Answering(model, words)
    width = objective.names.in_features
    labels = torch.full((4, 8, 8), -1)
    labels[1], labels[3] = (torch.randint(0, 36, (8, 8), generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    grids = torch.tensor([[1, 8, 8], [1, 8, 8], [1, 8, 8], [2, 8, 8], [1, 8, 8]])
    hidden = torch.zeros(6 * 64, width)
    for row, start in ((1, 2 * 64), (3, 5 * 64)):
        for y in range(8):
            for x in range(8):  # squares of two by two come together
                place = ((y // 2) * 4 + x // 2) * 4 + (y % 2) * 2 + x % 2
                hidden[start + place, labels[row, y, x]] = 50.0
    with torch.no_grad():
        objective.names.weight.copy_(torch.eye(36, width))
        objective.names.bias.zero_()
        assert objective._naming(hidden, grids, labels) < 1e-3
        assert objective._naming(hidden.flip(0), grids, labels) > 1
        words = model.get_input_embeddings().weight
        words.zero_()
        for place, ids in enumerate((objective._shapes, objective._colors)):
            words[ids] = torch.eye(len(ids), words.shape[1]).roll(20 * place, 1)
        merged = torch.zeros(6 * 16, words.shape[1])
        for row, start in ((1, 2 * 16), (3, 5 * 16)):
            for square in range(16):
                y, x = 2 * (square // 4), 2 * (square % 4)
                kind = int(labels[row, y : y + 2, x : x + 2].max()) - 1
                merged[start + square, kind // 7] = merged[start + square, 20 + kind % 7] = 50.0
        assert objective._speaking(merged, grids, labels) < 1e-3
        assert objective._speaking(merged.flip(0), grids, labels) > 1


def test_recipe_saves_what_loads_without_a_processor(tmp_path, words):
    short = Recipe(steps=2, batch=2, learning_rate=1e-3, seed=1, warmup=1)
    interviews.train_vlm(PATCHES, tmp_path / "vlm", tmp_path / "work", (short, short, short))
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
