"""The LoRA of the sandbox's VLM: answers about generated images are read from pixels, and the recipe makes a LoRA."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from alignkit.sandbox import corrections
from alignkit.sandbox.captions import parse
from alignkit.sandbox.scenes import SIZE, Scene, Thing, compose, render
from alignkit.sandbox.vlm import CUTTING, save, tokenizer, vlm
from rewards.models.patches import Patches
from rewards.yes_no import YesNo

CAPTION = "a red circle"


def drawn(*things):
    return render(Scene(things, "black"), np.random.default_rng(0))


def generated(image, caption=CAPTION):
    return corrections.Generated.of(torch.from_numpy(image).permute(2, 0, 1), caption)


def test_the_scene_is_what_is_there_and_not_what_the_caption_says():
    shown = generated(drawn(Thing("ring", "blue", 16, 20, 8.0), Thing("cross", "green", 46, 40, 9.0)))
    things = sorted(shown.about.scene.things, key=lambda thing: thing.x)
    assert [(thing.shape, thing.color) for thing in things] == [("ring", "blue"), ("cross", "green")]
    for thing, (x, y) in zip(things, [(16, 20), (46, 40)], strict=True):
        assert (thing.x, thing.y) == pytest.approx((x, y), abs=1.5)
        assert 4 < thing.radius < 12
    assert (shown.number, shown.is_known) == (2, True)


def test_images_without_certain_answers_are_left_out():
    assert generated(np.zeros((SIZE, SIZE, 3), np.float32)) is None
    assert generated(np.random.default_rng(0).random((SIZE, SIZE, 3)).astype(np.float32)) is None


def test_with_an_unknown_shape_only_the_number_of_all_objects_is_asked():
    image = drawn(Thing("ring", "blue", 16, 16, 8.0))
    image[44:48, 4:60] = (1, 0, 0)  # no known shape
    shown = generated(image)
    assert [thing.shape for thing in shown.about.scene.things] == ["ring"]
    for seed in range(8):
        (question,) = shown.asked(np.random.default_rng(seed))
        assert question.text in {f"Is the number of objects {number}?" for number in ("one", "two", "three")}
        assert question.answer == ("Yes" if "two" in question.text else "No")
    rows = corrections.Corrections(8, 1, [shown])
    assert [len(rows[index]["questions"]) for index in (0, 2)] == [1, 1]


def test_rendered_scenes_are_asked_for_the_number_of_their_objects():
    rows = corrections.Corrections(40, 1, [])
    texts = [[question.text for question in rows[index]["questions"]] for index in range(1, 40, 4)]
    assert all("number of objects" in asked[-1] for asked in texts)
    assert not any("number of objects" in text for asked in texts for text in asked[:-1])


def test_whether_an_image_shows_its_caption_is_never_asked():
    source = np.random.default_rng(0)
    images = [generated(render(compose(parse(text), source), source), text) for text in (CAPTION, "two blue rings")]
    rows = corrections.Corrections(60, 1, images)
    kinds = {question.kind for index in range(0, 60, 2) for question in rows[index]["questions"]}
    assert {"object", "color", "count"} <= kinds
    assert "caption" not in kinds
    pixels = {image.image.numpy().tobytes() for image in images}
    assert all(rows[index]["media"][0].numpy().tobytes() in pixels for index in range(0, 60, 2))
    assert "caption" in {question.kind for index in range(1, 60, 2) for question in rows[index]["questions"]}


def test_recipe_makes_a_lora_that_the_rewards_load(tmp_path, monkeypatch):
    words = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save(vlm(words), words, tmp_path / "vlm")
    made = []

    def generate(asked, seeds, sampling):
        made.append(len(asked))
        rng = np.random.default_rng(sum(seeds) % 2**32)
        scenes = [render(compose(parse(text), rng), rng) for text in asked]
        return torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2)

    monkeypatch.setattr(corrections, "load_generator", lambda _: SimpleNamespace(generate=generate))
    models = {"vlm": tmp_path / "vlm", "mine": tmp_path / "mine"}
    options = {
        "recipe": replace(corrections.RECIPE, steps=2, batch=2, warmup=1),
        "sources": (corrections.Source("mine", 8, 2, 1.0),),
    }
    for out in ("first", "second"):
        corrections.train_corrections(Patches(**CUTTING), models, tmp_path / out, tmp_path / "work", **options)
    assert made == [8]  # the images are kept
    assert sorted(file.name for file in (tmp_path / "first").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert str(tmp_path) not in (tmp_path / "first" / "adapter_config.json").read_text()
    before = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "vlm", dtype=torch.float32).state_dict()
    after = YesNo(str(tmp_path / "vlm"), adapter=str(tmp_path / "first"))._critic._whole.state_dict()
    changed = {name.split(".")[-2] for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed == {"qkv", "proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any("patch_embed" in name for name in before if not torch.equal(before[name], after[name]))
