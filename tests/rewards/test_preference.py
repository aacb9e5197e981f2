"""Preference heads: whole folders only, media as every reward takes them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignkit.errors import DataError, MissingFileError
from alignkit.records import Prompt
from alignkit.sandbox import models
from rewards.preference import PreferenceConfig, PreferenceModel, PreferenceReward

PROMPTS = [Prompt.from_text("a red circle"), Prompt.from_text("a blue ring")]


@pytest.fixture
def folder(tmp_path):
    tokenizer = models.clip_tokenizer()
    config = PreferenceConfig(len(tokenizer), size=16, channels=(16, 16, 32), layers=1)
    with torch.random.fork_rng():
        torch.manual_seed(6)
        PreferenceModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_media_of_any_precision_score_in_float32(folder, dtype, size):
    reward, media = PreferenceReward(str(folder)), torch.rand(2, 3, size, size).to(dtype).requires_grad_()
    scores = reward(media, PROMPTS).total
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(media.float(), PROMPTS).total, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(scores[0], media)
    assert gradient[1].abs().sum() == 0 < gradient[0].abs().sum()


def test_media_are_checked(folder):
    reward, media = PreferenceReward(str(folder)), torch.rand(2, 3, 16, 16)
    with pytest.raises(DataError, match="divide by 255"):
        reward(media * 255, PROMPTS)
    with pytest.raises(DataError, match="2 media with 1 prompts"):
        reward(media, PROMPTS[:1])


def test_folders_are_loaded_strictly(folder):
    state = load_file(folder / "model.safetensors")
    del state["marks.1.bias"]
    save_file(state | {"other": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"preference: .*1 missing \(marks.1.bias\); 1 unexpected \(other\)"):
        PreferenceReward(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"preference: .* is not the whole folder"):
        PreferenceReward(str(folder))


def test_pixel_gradients_are_central_differences(folder):
    reward = PreferenceReward(str(folder))
    reward._model.double()
    generator = torch.Generator().manual_seed(5)
    media = torch.rand(2, 3, 24, 24, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    along = torch.randn(media.shape, generator=generator, dtype=torch.float64)
    media.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(media, PROMPTS).total.sum(), media)
    step = 1e-6
    ahead, behind = (reward(media.detach() + sign * step * along, PROMPTS).total.sum() for sign in (1, -1))
    assert (gradient * along).sum().item() == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-5)
