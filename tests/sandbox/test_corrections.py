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
from alignkit.sandbox.questions import Subject
from alignkit.sandbox.scenes import SIZE, Scene, Thing, compose, render
from alignkit.sandbox.vlm import CUTTING, save, tokenizer, vlm
from rewards.models.patches import Patches
from rewards.yes_no import YesNo

CAPTION = "a red circle"


def drawn(*things):
    return render(Scene(things, "black"), np.random.default_rng(0))


def test_the_scene_is_what_is_there_and_not_what_the_caption_says():
    image = drawn(Thing("ring", "blue", 16, 20, 8.0), Thing("cross", "green", 46, 40, 9.0))
    scene = corrections.scene_of(image, CAPTION)
    assert sorted((thing.shape, thing.color) for thing in scene.things) == [("cross", "green"), ("ring", "blue")]
    for thing, (x, y) in zip(sorted(scene.things, key=lambda thing: thing.x), [(16, 20), (46, 40)], strict=True):
        assert (thing.x, thing.y) == pytest.approx((x, y), abs=1.5)
        assert 4 < thing.radius < 12


def test_images_without_certain_answers_are_left_out():
    assert corrections.scene_of(np.zeros((SIZE, SIZE, 3), np.float32), CAPTION) is None
    noise = np.random.default_rng(0).random((SIZE, SIZE, 3)).astype(np.float32)
    assert corrections.scene_of(noise, CAPTION) is None
    bar = drawn()
    bar[30:34, 4:60] = (1, 0, 0)  # no known shape
    assert corrections.scene_of(bar, CAPTION) is None


def test_whether_an_image_shows_its_caption_is_never_asked():
    image, rng = torch.rand(3, SIZE, SIZE), np.random.default_rng(0)
    subjects = [Subject(compose(parse(text), rng), text, is_shown=False) for text in (CAPTION, "two blue rings")]
    rows = corrections.Corrections(60, 1, [(image, subject) for subject in subjects])
    kinds = {question.kind for index in range(0, 60, 2) for question in rows[index]["questions"]}
    assert {"object", "color", "count"} <= kinds
    assert "caption" not in kinds
    assert all(rows[index]["media"][0] is image for index in range(0, 60, 2))
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
