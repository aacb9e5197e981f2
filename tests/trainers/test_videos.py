"""Rows of clips for video models: a tiny Wan, whose codec takes 1 + 4 k frames and 4 x 4 pixels for one place."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from clips import encoded, frames

from alignkit.errors import ConfigError, DataError
from alignkit.media import decode_clip, to_pixels
from alignkit.trainers.rankdpo import RankDPOConfig, RankDPOTrainer
from alignkit.trainers.sft import SFTConfig, SFTTrainer


@pytest.fixture
def generator(load):
    return load("wan")


def rows(*clips, column="videos", **columns):
    prompts = [f"a clip number {number}" for number in range(len(clips))]
    return datasets.Dataset.from_dict({"prompt": prompts, column: list(clips), **columns})


@pytest.fixture
def make(generator, tmp_path):
    def build(data, *, config=SFTConfig, trainer=SFTTrainer, **given):
        options = {"max_steps": 2, "per_device_train_batch_size": 2, "lora_rank": 2, "use_cpu": True, "bf16": False}
        options |= {"disable_tqdm": True, "save_strategy": "no", "output_dir": str(tmp_path / "run")}
        return trainer(generator, config(**options | given), data)

    return build


# --- decoding -------------------------------------------------------------------------------------------------------


def test_a_clip_is_decoded_exactly(tmp_path):
    pictures = frames()
    file = tmp_path / "clip.mkv"
    file.write_bytes(encoded(pictures))
    expected = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    for clip in (file.read_bytes(), str(file), {"bytes": None, "path": str(file)}):
        assert torch.equal(to_pixels(decode_clip(clip, "here")), expected)
    assert torch.equal(to_pixels(decode_clip(str(file), "here", count=3)), expected[:3])


@pytest.mark.parametrize(("fps", "kept"), [(8, [0, 1, 2, 3, 4]), (4, [0, 2, 4]), (16, [0, 0, 1, 2, 2, 2, 3, 4, 4, 4])])
def test_frames_of_another_rate_are_the_nearest_in_time(fps, kept):
    """Halves round to the even one."""
    pictures = frames()
    assert np.array_equal(decode_clip(encoded(pictures), "here", fps=fps), pictures[kept])


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (b"", "row 1, candidate 0: the image or video is empty"),
        (encoded(frames())[:300], "row 1, candidate 0: the clip cannot be decoded"),
        (b"no clip at all", "row 1, candidate 0: the clip cannot be decoded .Invalid data"),
        (encoded(frames(2)), "row 1: a clip has 2 frames, num_frames asks for 5"),
        (encoded(frames(5, 4, 24)), "row 1: 24 x 4 pixels, below the 8 that the model needs"),
    ],
)
def test_a_clip_that_cannot_be_used_is_named(make, clip, message):
    with pytest.raises(DataError, match=message):
        make(rows(encoded(frames()), clip, column="video"), num_frames=5)


# --- rows -----------------------------------------------------------------------------------------------------------


def test_clips_are_encoded_each_at_its_own_size_and_length(make, generator):
    pictures = [frames(5), frames(8, seed=1), frames(9, 24, 16), frames(5, 17, 25)]
    dataset = make(rows(*map(encoded, pictures), column="video")).train_dataset
    assert dataset.latent_shapes == [(1, 4, 2, 4, 6), (1, 4, 2, 4, 6), (1, 4, 3, 6, 4), (1, 4, 2, 4, 6)]
    cut = [pictures[0], pictures[1][:5], pictures[2], pictures[3][:, :16, :24]]
    with torch.no_grad():
        for row, clip in enumerate(cut):
            pixels = torch.from_numpy(clip).permute(0, 3, 1, 2)[None] / 255
            torch.testing.assert_close(dataset[row]["latents"], generator.encode(pixels), rtol=0, atol=1e-6)


def test_number_of_frames_and_resolution(make):
    data = rows(encoded(frames(9, 40, 40)), encoded(frames(7, 40, 40)), column="video")
    assert make(data, num_frames=5, resolution=16).train_dataset.latent_shapes == [(1, 4, 2, 4, 4)] * 2
    assert make(data, fps=4).train_dataset.latent_shapes == [(1, 4, 2, 10, 10), (1, 4, 1, 10, 10)]
    with pytest.raises(ConfigError, match=r"num_frames is 6; 'wan' takes 1 \+ 4 k: 5 or 9"):
        make(data, num_frames=6)


def test_clips_of_a_row_share_the_shortest_length(make):
    pairs = [[encoded(frames(seed=row)), encoded(frames(9, seed=9 + row))] for row in range(2)]
    assert make(rows(*pairs)).train_dataset.latent_shapes == [(2, 4, 2, 4, 6)] * 2


def test_other_media_are_refused(make, load, ranked_rows, tmp_path):
    with pytest.raises(DataError, match=r"the data holds \['images'\], 'wan' makes videos"):
        make(ranked_rows(2))
    with pytest.raises(DataError, match=r"the data holds \['video'\], .* makes images"):
        SFTTrainer(
            load("flow"),
            SFTConfig(output_dir=str(tmp_path), use_cpu=True),
            rows(encoded(frames()), column="video"),
        )


# --- training -------------------------------------------------------------------------------------------------------


def test_captioned_clips_train(make):
    trainer = make(rows(encoded(frames()), encoded(frames(5, 24, 16)), encoded(frames(3)), column="video"), max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 3
    assert {"loss", "health/error"} <= trainer.state.log_history[0].keys()


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"protect_winner": 0.9}])
def test_ranked_clips_train(make, options):
    """Preference losses know nothing of frames: errors are means over all of a clip, and the start is log 2."""
    pairs = [[encoded(frames(seed=2 * row + k)) for k in range(2)] for row in range(2)]
    ranked = rows(*pairs, phi=[[1.0, 0.0], [0.0, 1.0]])
    told = {"loss": "diffusion_dpo", "beta": 100.0, **options}
    trainer = make(ranked, config=RankDPOConfig, trainer=RankDPOTrainer, **told)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_a_clip_that_changes_on_disk_is_encoded_anew(make, tmp_path):
    """A file counts with its size and time, not with its name alone."""
    file, cache = tmp_path / "clip.mkv", tmp_path / "cache"
    found = []
    for seed in (0, 1):
        file.write_bytes(encoded(frames(seed=seed)))
        data = rows({"bytes": None, "path": str(file)}, column="video")
        found.append(make(data, cache_dir=str(cache)).train_dataset[0]["latents"])
    assert not torch.equal(*found)
    assert len(list(cache.glob("latents-*/*.arrow"))) == 2


def test_the_card_of_a_second_expert_says_how_to_load_it(load, tmp_path):
    options = SFTConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1, save_strategy="no")
    trainer = SFTTrainer(load("wan_low"), options, rows(encoded(frames()), column="video"))
    trainer.export(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert 'load_lora_weights("path/to/this/folder", load_into_transformer_2=True)' in card
    assert "PeftModel.from_pretrained(pipe.transformer_2," in card
    assert "pipeline_tag: text-to-video" in card
