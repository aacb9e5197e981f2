"""Short trainings on tiny pipelines."""

from __future__ import annotations

import io
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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
    from alignkit.trainers.data import collate

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


@pytest.fixture(scope="session")
def random_png() -> Callable[..., bytes]:
    """Encodes noise of a width and height."""
    from PIL import Image

    def encode(width: int, height: int, seed: int = 0) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    return encode


@pytest.fixture
def mixed(ranked_rows: Any, random_png: Any) -> Callable[..., Any]:
    """Ranked rows of K = 4 whose pictures have the given (width, height), one size a row."""
    import datasets

    def make(*sizes: tuple[int, int]) -> Any:
        items = ranked_rows(len(sizes)).cast_column("images", datasets.List(datasets.Image(decode=False))).to_list()
        for row, (item, size) in enumerate(zip(items, sizes, strict=True)):
            item["images"] = [{"bytes": random_png(*size, 10 * row + k), "path": None} for k in range(4)]
        return datasets.Dataset.from_list(items, features=ranked_rows(1).features)

    return make
