"""How sampling settings are stored: those of images as they always were, those of videos with their frame rate."""

from __future__ import annotations

import json

import pytest

from alignkit.errors import ConfigError
from alignkit.records import Sampling

IMAGE = (
    '{"extra": {}, "guidance_scale": 5.0, "height": 512, "negative_prompt": "", "num_frames": 1, "steps": 30, '
    '"width": 512}'
)


def test_settings_of_images_are_stored_without_a_frame_rate():
    assert Sampling().to_json() == Sampling(fps=24.0).to_json() == IMAGE


def test_settings_of_videos_are_stored_with_it():
    assert json.loads(Sampling(num_frames=5).to_json()) == json.loads(IMAGE) | {"num_frames": 5, "fps": 8.0}
    assert Sampling(**Sampling(num_frames=5, fps=6.0).plain()) == Sampling(num_frames=5, fps=6.0)


@pytest.mark.parametrize("fps", [0.0, -1.0, float("inf"), float("nan")])
def test_a_frame_rate_must_be_positive(fps):
    with pytest.raises(ConfigError, match=r"sampling: fps is .*; it must be positive"):
        Sampling(fps=fps)
