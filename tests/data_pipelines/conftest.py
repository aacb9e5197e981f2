"""A fast deterministic generator, rewards whose order is known, and the stages run on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import moving_pairs
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from alignkit.records import Prompt, Sampling, Scores
from data_pipelines import synpic


@dataclass
class NoiseSource:
    """Each picture is one colour with noise, from its seed alone; `level` shifts its brightness."""

    name: str
    level: float = 0.0

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> Tensor:
        pictures = []
        for seed in seeds:
            rng = torch.Generator().manual_seed(seed)
            colour = torch.rand(3, 1, 1, generator=rng, dtype=torch.float64)
            noise = torch.rand(3, sampling.height, sampling.width, generator=rng, dtype=torch.float64)
            pictures.append((self.level + 0.5 * colour + 0.2 * noise).clamp(0, 1).float())
        return torch.stack(pictures)


@dataclass
class ChannelReward:
    """The mean of one colour channel."""

    channel: int
    name: str = "channel"

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        assert len(media) == len(prompts)
        return Scores(media[:, self.channel].double().mean(dim=(1, 2)))


SOURCES = {"dull": partial(NoiseSource, "dull"), "bright": partial(NoiseSource, "bright", 0.1)}
REWARDS = {"red": partial(ChannelReward, 0), "green": partial(ChannelReward, 1), "blue": partial(ChannelReward, 2)}
SCORE = synpic.ScoreConfig(rewards=tuple(REWARDS), batch_size=8)


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt.from_text(f"picture number {index}") for index in range(count)]


def generate_config(**changes: object) -> synpic.GenerateConfig:
    sampling = Sampling(steps=1, height=8, width=8)
    sources = (
        synpic.SourceConfig(name="dull", seeds_per_prompt=2, sampling=sampling),
        synpic.SourceConfig(name="bright", seeds_per_prompt=1, sampling=sampling),
    )
    return synpic.GenerateConfig(**{"sources": sources, "seed": 7, "part_size": 4, "batch_size": 4, **changes})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


@dataclass(frozen=True)
class World:
    """What the tests share; a fixture, for test files do not import one another."""

    sources = SOURCES
    rewards = REWARDS
    score = SCORE
    prompts: Callable[[int], list[Prompt]] = make_prompts
    config: Callable[..., synpic.GenerateConfig] = generate_config
    snapshot: Callable[[Path], dict[str, bytes]] = snapshot
    rows: Callable[[Path], list[dict[str, Any]]] = stored_rows

    def generate(self, folder: Path, count: int = 10, **changes: object) -> Path:
        synpic.generate_candidates(make_prompts(count), generate_config(**changes), folder, build_sources=SOURCES)
        return folder

    def scored(self, base: Path, count: int = 10) -> tuple[Path, Path]:
        candidates, scores = self.generate(base / "candidates", count), base / "scores"
        synpic.score_candidates(candidates, SCORE, scores, build_rewards=REWARDS)
        return candidates, scores

    def ranked(self, base: Path, count: int = 30) -> Path:
        synpic.rank_candidates(*self.scored(base, count), synpic.RankConfig(held_out=0.3), base / "ranked")
        return base / "ranked"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> World:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    return World()


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory):
    """Four pairs in two files, with videos and previews; no test changes it."""
    out = tmp_path_factory.mktemp("pairs")
    moving_pairs.write(out, 4, videos=True, previews=True)
    return out
