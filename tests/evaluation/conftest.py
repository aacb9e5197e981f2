"""A tiny world for evaluation: pictures that say which prompt, seed and model made them, and rewards that read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignkit.evaluation.paired import EvaluateConfig, evaluate
from alignkit.evaluation.results import Evaluation
from alignkit.records import Prompt, Sampling, Scores
from alignkit.seeds import derive_seed


def level(text: str, seed: int) -> int:
    """What the base draws: a grey level in 80..159, from prompt and seed alone."""
    return 80 + derive_seed(text, seed) % 80


@dataclass
class Source:
    """Uniform pictures of `level + shift(text, seed)`; counts what it drew and may die after some batches."""

    name: str
    shift: Callable[[str, int], int] = lambda text, seed: 0
    drawn: list[tuple[str, int]] = field(default_factory=list)
    dies_after: int | None = None

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> Tensor:
        if self.dies_after is not None and len(self.drawn) >= self.dies_after:
            raise KeyboardInterrupt
        self.drawn += zip(prompts, seeds, strict=True)
        levels = [level(text, seed) + self.shift(text, seed) for text, seed in zip(prompts, seeds, strict=True)]
        return torch.tensor(levels).reshape(-1, 1, 1, 1).expand(-1, 3, sampling.height, sampling.width) / 255


@dataclass
class Reader:
    """A reward: `read(grey level, prompt)` of every picture."""

    name: str
    read: Callable[[int, Prompt], float] = lambda grey, prompt: float(grey)
    modality: str = "image"
    needs_prompt: bool = True
    differentiable: bool = False
    comparable_across_prompts: bool = True
    native_range: tuple[float, float] = (0.0, 255.0)
    licence: str = "Apache-2.0"
    source: str = "tests"

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        greys = [round(255 * float(picture.mean())) for picture in media]
        return Scores(torch.tensor([self.read(grey, p) for grey, p in zip(greys, prompts, strict=True)]))


def bright(grey: int, prompt: Prompt) -> float:
    return float(grey >= 120)


PROMPTS = [Prompt.from_text(f"prompt {k}", category=("odd" if k % 2 else "even")) for k in range(8)]
CONFIG = EvaluateConfig(seeds_per_prompt=3, seed=5, batch_size=4, sampling=Sampling(2, 1.0, 8, 8))


def better_when_odd(text: str, seed: int) -> int:
    """Odd prompts get brighter, even ones darker, by an amount of their own."""
    size = 1 + derive_seed(seed) % 70
    return size if int(text[-1]) % 2 else -size


@dataclass(frozen=True)
class World:
    """What the tests of this folder draw from."""

    source: type[Source] = Source
    reader: type[Reader] = Reader
    config: EvaluateConfig = CONFIG
    prompts: Sequence[Prompt] = tuple(PROMPTS)
    level: Callable[[str, int], int] = level
    shift: Callable[[str, int], int] = better_when_odd

    def rewards(self) -> Mapping[str, Reader]:
        return {"grey": Reader("grey"), "gold": Reader("gold", bright)}

    def run(self, out: Path, *, prompts: Sequence[Prompt] | None = None) -> Evaluation:
        base, tuned = Source("base"), Source("tuned", better_when_odd)
        chosen = self.prompts if prompts is None else prompts
        return evaluate(base, tuned, chosen, self.config, out, rewards=self.rewards(), gold="gold")


@pytest.fixture(scope="session")
def world() -> World:
    return World()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    """A finished evaluation folder that no test changes."""
    out = tmp_path_factory.mktemp("evaluation")
    world.run(out)
    return out
