"""A folder as a user has one: their own module with a generator and rewards, prompts, a config a verb."""

from __future__ import annotations

import sys

import pytest
import yaml
from two_processes import server

# A user's own module: a painter of noise, and a reward that likes red.
MINE = """\
import torch
from alignkit.records import Scores


class Painter:
    name = "painter"

    def generate(self, prompts, seeds, sampling):
        shape = (3, sampling.height, sampling.width)
        return torch.stack([torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class Red:
    name, modality, needs_prompt, differentiable = "red", "image", False, True
    comparable_across_prompts, native_range, licence, source = True, (0.0, 1.0), "Apache-2.0", "here"

    def __call__(self, media, prompts):
        return Scores(media[:, 0].mean((1, 2)))


class RedVideo(Red):
    modality = "video"

    def __call__(self, media, prompts):
        return Scores(media[:, :, 0].mean((1, 2, 3)))


class Dark(Red):
    name = "dark"

    def __call__(self, media, prompts):
        return Scores(1 - media.mean((1, 2, 3)))
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a user's module, prompts and one config a verb."""
    (tmp_path / "mine_for_commands.py").write_text(MINE, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\n", encoding="utf-8")
    generate = {
        "out": "candidates",
        "prompts": {"file": "prompts.txt"},
        "generators": {"painter": {"model": "mine_for_commands:Painter"}},
        "generate": {"sources": [{"name": "painter", "seeds_per_prompt": 3, "sampling": {"height": 8, "width": 8}}]},
    }
    rewards = {"red": {"reward": "mine_for_commands:Red"}}
    score = {"candidates": "candidates", "out": "scores", "rewards": rewards, "score": {"rewards": ["red"]}}
    for name, config in (("generate", generate), ("score", score)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("mine_for_commands", None)


@pytest.fixture
def quick_workers(monkeypatch):
    """A ladder's workers are forked from a process that has imported everything, in place of new ones."""
    started = server()
    monkeypatch.setattr("alignkit.commands.ladder.multiprocessing.get_context", lambda _: started)
