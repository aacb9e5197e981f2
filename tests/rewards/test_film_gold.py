"""The verifier of the sandbox's clips as a reward; what it finds in clips is tested with the sandbox."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alignkit.errors import DataError
from alignkit.pairs import ShownPair
from alignkit.protocols import Reward
from alignkit.records import Prompt
from alignkit.sandbox import films
from alignkit.sandbox.film_captions import parse, prompts
from alignkit.sandbox.film_gold import FilmGoldReward
from rewards.labellers import RewardLabeller


def test_the_reward_judges_clips_and_names_bad_input():
    reward, rng = FilmGoldReward(), np.random.default_rng(8)
    assert isinstance(reward, Reward)
    asked = prompts(3, seed=1)
    shown = [films.render(films.compose(parse(prompt.text), rng), rng) for prompt in asked]
    media = torch.from_numpy(np.stack(shown)).permute(0, 1, 4, 2, 3)
    scores = reward(media, asked)
    assert scores.total.tolist() == [1, 1, 1]
    assert scores.parts["segments"].tolist() == scores.parts["frames"].tolist() == [1, 1, 1]
    flashing = media.clone()
    flashing[:, ::2] *= 0.8
    assert (reward(flashing, asked).parts["flicker"] > 1 + scores.parts["flicker"]).all()
    assert reward(media.flip(0), asked).total.sum() < 3
    with pytest.raises(DataError, match="film_gold"):
        reward(media[:, :17], asked)
    with pytest.raises(DataError, match="NaN"):
        reward(media * torch.nan, asked)
    with pytest.raises(DataError, match="no caption"):
        reward(media[:1], [Prompt.from_text("a dog")])


def test_a_labeller_names_the_clip_whose_segment_has_no_fault():
    """An object that is missing in some frames costs its segment, and no other; without a fault, a tie."""
    rng = np.random.default_rng(3)
    prompt = prompts(1, seed=4)[0]
    whole = films.render(films.compose(parse(prompt.text), rng), rng)
    faulty = whole.copy()
    faulty[9:13] = np.median(whole, axis=(0, 1, 2))
    segments = tuple(films.SEGMENTS)
    clips = (np.stack([whole, faulty]) * 255).round().astype(np.uint8)
    labeller = RewardLabeller(FilmGoldReward(), least_difference=0.05)
    (verdicts,) = labeller.label([ShownPair(prompt, clips, 8.0, segments)])
    struck = [number for number, (start, end) in enumerate(segments) if start < 13 and end > 9]
    assert [verdict.label for verdict in verdicts] == [int(number in struck) for number in range(len(segments))]
