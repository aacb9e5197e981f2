"""Rewards score the diagonal, row by row, whatever the batch, and carry gradients to the pixels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPModel

from alignkit.errors import MissingFileError
from alignkit.protocols import Reward
from alignkit.records import Prompt
from alignkit.resolve import resolve
from alignkit.sandbox import models
from rewards import REWARDS

TEXTS = ["a red circle", "two blue rings on a gray background", "a cross above a ring"]
PROMPTS = [Prompt.from_text(text) for text in TEXTS]
LEARNED = ["clip_score", "preference"]
MEASURED = ["saturation", "high_frequency", "sharpness", "jpeg_size", "motion", "flicker"]
BUILT = [*LEARNED, "gold", *MEASURED]


@pytest.fixture(scope="session")
def preference_folder(tmp_path_factory):
    from rewards.preference import PreferenceConfig, PreferenceModel

    folder = tmp_path_factory.mktemp("taste")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        answers = ("verdict", "neat", "bold")
        config = PreferenceConfig(
            len(models.clip_tokenizer()), size=16, channels=(16, 16, 32), layers=1, answers=answers
        )
        PreferenceModel(config).save_pretrained(folder)
    models.clip_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def build(clip_folder, preference_folder):
    options = {"clip_score": {"model": str(clip_folder)}, "preference": {"model": str(preference_folder)}}
    return lambda name: resolve(name, REWARDS, kind="reward")(**options.get(name, {}))


def pictures(count=3, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", BUILT)
def test_every_reward_declares_itself(name, build):
    reward = build(name)
    assert isinstance(reward, Reward)
    assert reward.modality in ("image", "video")
    low, high = reward.native_range
    assert low < high
    side = 64 if name == "gold" else 16
    media = pictures(size=side) if reward.modality == "image" else torch.stack([pictures(4, side, s) for s in range(3)])
    scores = reward(media, PROMPTS)
    assert scores.total.shape == (3,)
    assert torch.isfinite(scores.total).all()
    assert ((low <= scores.total) & (scores.total <= high)).all()
    assert all(isinstance(text, str) and text for text in (reward.name, reward.licence, reward.source))


def test_every_reward_of_the_table_is_tested():
    """Those that need weights or prompts of their own are built in files of theirs, which name their class."""
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    for name in set(REWARDS) - set(BUILT):
        module, _, attribute = REWARDS[name].partition(":")
        assert callable(resolve(name, REWARDS, kind="reward"))
        assert re.search(rf"from {re.escape(module)} import .*{attribute}", tests), f"no test builds '{name}'"


@pytest.mark.parametrize("name", LEARNED)
def test_scores_do_not_depend_on_the_batch(name, build):
    reward, media = build(name), pictures()
    together = reward(media, PROMPTS).total
    alone = torch.cat([reward(media[i : i + 1], PROMPTS[i : i + 1]).total for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    order = [2, 0, 1]
    torch.testing.assert_close(reward(media[order], [PROMPTS[i] for i in order]).total, together[order])


@pytest.mark.parametrize("name", LEARNED)
def test_scores_depend_on_prompt_and_picture(name, build):
    reward, media = build(name), pictures()
    own = reward(media, PROMPTS).total
    assert (own - reward(media, PROMPTS[::-1]).total).abs().max() > 1e-4
    assert (own - reward(media.flip(0), PROMPTS).total).abs().max() > 1e-6


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("size", [16, 24])
def test_gradients_reach_the_pixels(name, build, size):
    media = pictures(size=size).mul(0.8).add(0.1).requires_grad_()
    reward = build(name)
    assert reward.differentiable
    total = reward(media, PROMPTS).total
    (gradient,) = torch.autograd.grad(total[1], media)
    assert gradient[1].abs().sum() > 0
    assert gradient[0].abs().sum() == gradient[2].abs().sum() == 0  # the diagonal: nobody else's picture


def test_clip_score_is_the_scaled_cosine(build, clip_folder):
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = AutoTokenizer.from_pretrained(clip_folder)(TEXTS, padding="max_length", max_length=16, return_tensors="pt")
    media = pictures()
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
    with torch.no_grad():
        output = clip(pixel_values=(media - mean) / std, **tokens)
    cosine = (output.image_embeds * output.text_embeds).sum(-1)
    torch.testing.assert_close(build("clip_score")(media, PROMPTS).total, 100 * cosine, rtol=0, atol=0.02)


def test_clip_score_normalises_as_its_folder_says(clip_folder, tmp_path):
    import shutil

    from rewards.clip_score import ClipScore

    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    plain = ClipScore(str(folder))(pictures(), PROMPTS).total
    stored = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(stored))
    assert (plain - ClipScore(str(folder))(pictures(), PROMPTS).total).abs().max() > 1e-4


def test_preference_is_bradley_terry_ready(build):
    """Reloaded weights score as the saved ones did, and the name is the folder's: several heads stand side by side."""
    one, other = build("preference"), build("preference")
    assert torch.equal(one(pictures(), PROMPTS).total, other(pictures(), PROMPTS).total)
    assert one.name.startswith("taste")
    assert not one.comparable_across_prompts
    parts = one(pictures(), PROMPTS).parts
    assert list(parts) == ["neat", "bold"]
    assert all(part.shape == (3,) for part in parts.values())


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere", "alignkit/no/where"])
def test_a_missing_folder_is_named(name, model):
    with pytest.raises(MissingFileError, match=f"{name}: .*'{model}'"):
        resolve(name, REWARDS, kind="reward")(model=model)
