"""Short trainings on tiny pipelines."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "lora_rank": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,  # what is exact here is exact in float32
    "disable_tqdm": True,
    "save_strategy": "no",
    "caption_dropout": 0.25,
}


@pytest.fixture(scope="session")
def worker() -> dict[str, Any]:
    """The names of worker.py, the same code that the kill and two-process tests run as a program."""
    return runpy.run_path(str(Path(__file__).parent / "worker.py"))


@pytest.fixture
def make(load: Any, ranked_rows: Any, tmp_path: Path) -> Callable[..., Any]:
    """Builds a RankDPOTrainer over 4 ranked rows (or `method="sft"`) in a folder of its own, from config keys."""
    from alignkit.trainers.rankdpo import RankDPOConfig, RankDPOTrainer
    from alignkit.trainers.sft import SFTConfig, SFTTrainer

    count = 0

    def build(
        family: str = "flow", *, method: str = "rankdpo", rows: Any = None, parts: Any = None, **given: Any
    ) -> Any:
        nonlocal count
        count += 1
        config, trainer = {"rankdpo": (RankDPOConfig, RankDPOTrainer), "sft": (SFTConfig, SFTTrainer)}[method]
        settings = SETTINGS | {"output_dir": str(tmp_path / f"run-{count}")} | given
        if method == "rankdpo":
            settings = {"beta": 100.0} | settings
        return trainer(load(family), config(**settings), ranked_rows(4) if rows is None else rows, **(parts or {}))

    return build


@pytest.fixture
def batch_of() -> Callable[..., dict[str, Tensor]]:
    """Collates the first rows of a trainer; floating values in float64 if asked."""
    from alignkit.trainers.latents import collate

    def collect(trainer: Any, count: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        batch = collate([trainer.train_dataset[i] for i in range(count)])
        is_floating = {key for key, value in batch.items() if torch.is_tensor(value) and value.is_floating_point()}
        return {key: value.to(dtype) if key in is_floating else value for key, value in batch.items()}

    return collect


@pytest.fixture
def stir() -> Callable[..., None]:
    """Moves a trainer off the zero of LoRA initialisation, so that policy and reference differ."""

    def change(trainer: Any) -> None:
        rng = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in trainer.generator.net.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
                    parameter.add_(0.1 * noise.to(parameter.dtype))

    return change
