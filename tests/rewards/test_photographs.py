"""The tensor path against the PIL path on real photographs: how far pixels differ, in levels of 255, and scores."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_clips
import tiny_vlm
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from alignkit.records import Prompt
from rewards.clip_score import ClipScore
from rewards.media import CLIP_MEAN, CLIP_STD, Preparation, quantised
from rewards.patches import Patches
from rewards.photographs import CAPTIONS, photographs
from rewards.vlm import VlmCritic

PHOTOGRAPHS = photographs()
SPREAD = torch.tensor(CLIP_STD).reshape(3, 1, 1) * 255  # normalised values to levels of 255


def picture(name):
    return Image.fromarray((PHOTOGRAPHS[name].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def levels(prepared, wanted):
    """Mean and largest difference [.., 3, H, W] in levels of 255."""
    off = ((prepared - torch.as_tensor(np.asarray(wanted))) * SPREAD).abs()
    return off.mean().item(), off.max().item()


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_cropped_as_clip_crops(name):
    wanted = CLIPImageProcessorPil()(picture(name), return_tensors="np")["pixel_values"]
    mean, largest = levels(Preparation(224)(PHOTOGRAPHS[name][None]), wanted)
    assert mean < 0.4
    assert largest < 8  # a few pixels at hard edges, where PIL also clips between its two passes


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_padded_as_hpsv2_pads(name):
    photograph = picture(name)
    scale = 224 / max(photograph.size)
    small = photograph.resize([round(side * scale) for side in photograph.size], Image.Resampling.BICUBIC)
    square = Image.new("RGB", (224, 224))
    square.paste(small, tuple((224 - side) // 2 for side in small.size))
    values = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1) / 255
    wanted = (values - torch.tensor(CLIP_MEAN).reshape(3, 1, 1)) / torch.tensor(CLIP_STD).reshape(3, 1, 1)
    mean, largest = levels(Preparation(224, "pad")(PHOTOGRAPHS[name][None]), wanted[None])
    assert mean < 0.4
    assert largest < 8


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_cut_into_patches_as_qwen_cuts(name):
    out = Qwen2VLImageProcessorPil()(images=[picture(name)], return_tensors="pt")
    patches, grids = Patches()(PHOTOGRAPHS[name][None])
    assert torch.equal(grids, out["image_grid_thw"])
    spread = SPREAD.reshape(1, 3, 1)
    off = ((patches - out["pixel_values"]).reshape(len(patches), 3, -1) * spread).abs()
    assert off.mean() < 0.4
    assert off.max() < 8


def test_scores_of_float_and_stored_pixels_are_close(tmp_path):
    """Between 8-bit values, as a decoder leaves them: three quarters of the size."""
    tiny_clips.clip().save_pretrained(tmp_path / "clip")
    tiny_clips.tokenizer().save_pretrained(tmp_path / "clip")
    clip = ClipScore(str(tmp_path / "clip"))
    critic = VlmCritic(str(tiny_vlm.save("qwen2_5_vl", tmp_path / "vlm")))
    floats, stored = [], []
    for name, photograph in PHOTOGRAPHS.items():
        media = torch.nn.functional.interpolate(photograph[None], scale_factor=0.75, mode="bicubic", antialias=True)
        media, prompts = media.clamp(0, 1), [Prompt.from_text(CAPTIONS[name])]
        question = [f"Is this {CAPTIONS[name]}?"]
        for values, pixels in ((floats, media), (stored, quantised(media))):
            values.append([clip(pixels, prompts).total.item(), critic.margins(pixels, question).item()])
        assert (media != quantised(media)).any()
    floats, stored = torch.tensor(floats), torch.tensor(stored)
    assert (floats - stored).abs().max(0).values.tolist() == pytest.approx([0, 0], abs=0.05)
    assert (floats - stored).abs().max() > 0
    assert (floats.std(0) > (floats - stored).abs().max(0).values).all()  # 8 bits change less than pictures do
