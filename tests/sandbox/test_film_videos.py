"""Real videos of the sandbox: equal for equal seeds, without loss, and right by the verifier."""

from __future__ import annotations

import numpy as np
import torch

from alignkit.media import decode_clip
from alignkit.records import Prompt
from alignkit.sandbox import films
from alignkit.sandbox.film_gold import FilmGoldReward
from alignkit.sandbox.film_videos import videos


def test_videos_show_their_captions():
    found = videos(6, seed=3)
    assert [video.id for video in found] == [f"film-{number:05d}" for number in range(6)]
    clips = np.stack([decode_clip(video.read(), video.id) for video in found])
    assert clips.shape == (6, films.FRAMES, films.SIZE, films.SIZE, 3)
    media = torch.from_numpy(clips).permute(0, 1, 4, 2, 3) / 255
    scores = FilmGoldReward()(media, [Prompt.from_text(video.caption) for video in found])
    assert scores.total.tolist() == [1.0] * 6


def test_a_video_depends_on_its_number_and_seed_alone():
    few, many, other = videos(2, seed=3), videos(4, seed=3), videos(2, seed=4)
    assert [video.caption for video in few] == [video.caption for video in many[:2]]
    assert few[1].read() == many[1].read()
    assert few[0].read() != other[0].read()
