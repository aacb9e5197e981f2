"""The shipped weights: small enough, loadable by everybody's loaders, and as good as the pages say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from alignkit.generators import load_generator
from alignkit.records import Prompt, Sampling, texts
from alignkit.resolve import resolve
from alignkit.sandbox import film_captions, film_gold, film_vae, films, questions
from alignkit.sandbox.captions import parse, prompts
from alignkit.sandbox.clips import FPS, film, move
from alignkit.sandbox.film_captions import random_spec
from alignkit.sandbox.gold import GoldReward
from alignkit.sandbox.scenes import compose, contradict, render
from alignkit.sandbox.vlm import CUTTING
from alignkit.sandbox.vlm_accuracy import accuracy
from alignkit.seeds import derive_seed
from rewards import REWARDS
from rewards.models.patches import Patches
from rewards.models.vlm import Readout, VlmCritic

WEIGHTS = Path(__file__).parents[2] / "alignkit" / "sandbox" / "weights"
EASY = {"single_object": 1.0, "two_object": 0.0, "counting": 0.0, "colors": 1.0, "position": 0.0, "color_attr": 0.0}
LEAST = dict.fromkeys((*questions.YES_NO, *questions.OPEN), 0.8) | {"what_shows": 0.6, "pair": 0.7}
PROXIES = {"clip": "clip_score", "careful": "preference", "showy": "preference", "vlm": "vqa_score"}


def test_they_fit_into_a_repository():
    files, sizes = [path for path in WEIGHTS.rglob("*") if path.is_file()], Counter()
    for path in files:
        sizes[path.relative_to(WEIGHTS).parts[0].split("_")[0]] += path.stat().st_size
    assert sizes.pop("vlm") < 12 * 2**20
    assert sizes.pop("film") < 10 * 2**20
    assert sizes.total() < 30 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}
    assert not [path for path in files if b"/tmp/" in path.read_bytes() and path.suffix == ".json"]


@pytest.mark.parametrize("name", ["unet", "flow"])
def test_generators_are_ordinary_diffusers_folders(name):
    pipeline = DiffusionPipeline.from_pretrained(WEIGHTS / name, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = {"max_sequence_length": 1} if name == "flow" else {}
    image = pipeline("a red circle", height=64, width=64, num_inference_steps=2, **options).images[0]
    assert image.size == (64, 64)


def _gold(count, adapter=None, name="unet"):
    asked = prompts(count, seed=5, weights=EASY)
    generator = load_generator(WEIGHTS / name, adapter=adapter)
    seeds = [derive_seed("test", prompt.id) for prompt in asked]
    sampling = Sampling(steps=8, guidance_scale=2.5, height=64, width=64)
    return float(GoldReward()(generator.generate(texts(asked), seeds, sampling), asked).total.mean())


@pytest.mark.parametrize("name", ["unet", "flow"])
def test_the_policy_generates_easy_prompts_correctly(name):
    assert _gold(40, name=name) > 0.5


@pytest.mark.parametrize("name", ["unet", "flow"])
def test_the_clean_adapter_loads_in_the_vanilla_pipeline_and_generates_better_still(name):
    pipeline = DiffusionPipeline.from_pretrained(WEIGHTS / name, dtype=torch.float32)
    pipeline.load_lora_weights(WEIGHTS / name / "clean_adapter")
    assert pipeline.get_list_adapters()
    assert _gold(24, adapter=WEIGHTS / name / "clean_adapter", name=name) > 0.6


@pytest.mark.parametrize(("name", "least"), [("clip", 0.55), ("careful", 0.85), ("showy", 0.85), ("vlm", 0.85)])
def test_proxies_prefer_the_picture_that_shows_the_caption(name, least):
    rng = np.random.default_rng(11)
    reward = resolve(PROXIES[name], REWARDS, kind="reward")(model=str(WEIGHTS / name))
    asked = [Prompt.from_text(text) for text in ("a red circle", "three blue rings", "a cross and a square") * 8]
    specs = [parse(prompt.text) for prompt in asked]
    sides = [
        [render(compose(make(spec), rng), rng) for spec in specs] for make in (_same, lambda s: contradict(s, rng))
    ]
    right, wrong = (torch.from_numpy(np.stack(side)).permute(0, 3, 1, 2) for side in sides)
    assert (reward(right, asked).total > reward(wrong, asked).total).float().mean() > least


def _same(spec):
    return spec


def test_the_autoencoder_of_clips_keeps_what_they_show():
    vae = AutoencoderKLWan.from_pretrained(WEIGHTS / "film" / "vae", dtype=torch.float32)
    rng = np.random.default_rng(3)
    specs = [random_spec(rng) for _ in range(8)]
    for spec in specs:
        pixels = film_vae.to_tensor(films.render(films.compose(spec, rng), rng))
        with torch.no_grad():
            latents = vae.encode(pixels[None].transpose(1, 2) * 2 - 1).latent_dist.mode()
            decoded = ((vae.decode(latents).sample[0] + 1) / 2).clamp(0, 1).transpose(0, 1)
        assert float((decoded - pixels).square().mean()) < 1e-3  # 30 dB
        assert film_gold.read(decoded.permute(0, 2, 3, 1).numpy(), spec).is_right


def test_the_video_generator_shows_captions_with_faults_in_parts_of_clips():
    """Most segments are right, some are not; `clean_adapter` has fewer faults."""
    asked = film_captions.prompts(6, seed=3)
    sampling = Sampling(steps=8, guidance_scale=3.0, height=films.SIZE, width=films.SIZE, num_frames=films.FRAMES)
    shares = []
    for adapter in (None, WEIGHTS / "film" / "clean_adapter"):
        generator = load_generator(WEIGHTS / "film", adapter=adapter, device="cpu")
        clips = generator.generate([prompt.text for prompt in asked], range(6), sampling)
        shares.append(float(film_gold.FilmGoldReward()(clips, asked).parts["segments"].mean()))
    assert 0.4 < shares[0] < 0.97
    assert shares[1] > shares[0]


def test_the_vision_language_model_answers_every_kind_of_question():
    folder = WEIGHTS / "vlm"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    found = accuracy(model, AutoTokenizer.from_pretrained(folder), Patches(**CUTTING), subjects=150, seed=31)
    assert set(found) == {*questions.YES_NO, *questions.OPEN, "pair"}
    assert 3e6 < model.num_parameters() < 8e6
    missed = {kind: share for kind, (share, _) in found.items() if share < LEAST[kind]}
    assert not missed


def test_its_critic_sees_which_way_things_move():
    """The way a clip takes into the reward, with its rate, and not the one that training took."""
    rng = np.random.default_rng(5)
    critic = VlmCritic(str(WEIGHTS / "vlm"), readout=Readout(("Yes",), ("No",)), owner="test", rate=float(FPS))
    clips, asked = [], []
    while len(clips) < 24:
        about = questions.subject(rng)
        scene, motion = move(about.scene, rng)
        shape = scene.things[motion.thing].shape
        if motion.direction and sum(thing.shape == shape for thing in scene.things) == 1:
            clips.append(torch.from_numpy(film(scene, motion, rng)).permute(0, 3, 1, 2))
            opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}[motion.direction]
            asked.append([f"Is the {shape} moving {way}?" for way in (motion.direction, opposite)])
    true, false = critic.margins(torch.stack(clips), asked).T
    assert (true > false).float().mean() > 0.9


@pytest.mark.parametrize(("adapter", "least", "most"), [(None, 0.0, 0.75), ("vlm_corrections", 0.9, 1.0)])
def test_with_its_corrections_it_counts_all_objects(adapter, least, most):
    """In the words that `number_of_all` uses; the model without corrections does not know them."""
    folder = adapter and str(WEIGHTS / adapter)
    critic = VlmCritic(str(WEIGHTS / "vlm"), readout=Readout(("Yes",), ("No",)), owner="test", adapter=folder)
    rng = np.random.default_rng(17)
    scenes = [questions.subject(rng).scene for _ in range(60)]
    asked = [questions.number_of_all(len(scene.things), rng) for scene in scenes]
    images = torch.stack([torch.from_numpy(render(scene, rng)).permute(2, 0, 1) for scene in scenes])
    yes = critic.margins(images, [[question.text] for question in asked])[:, 0] > 0
    right = torch.tensor([question.answer == "Yes" for question in asked]) == yes
    assert least < right.float().mean() <= most
