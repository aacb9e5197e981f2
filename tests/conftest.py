"""Tiny untrained pipelines of all families and ranked data made of rendered scenes, shared by all folders."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    import datasets

    from alignkit.generators.pipeline import PipelineGenerator


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a push uploads, in place of the hub."""
    from types import SimpleNamespace

    from transformers import trainer as library

    pushed: list[dict[str, Any]] = []

    class Hub:
        def create_repo(self, name: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=f"someone/{name}")

        def upload_folder(self, **given: Any) -> Any:
            pushed.append(given)
            return SimpleNamespace(done=lambda: True)

    monkeypatch.setattr(library, "hf_api", Hub)
    return pushed


@pytest.fixture(scope="session", autouse=True)
def light_collections() -> None:
    """Trainer collects garbage at each end of a training; what the libraries hold is none, and a third of a second."""
    import gc

    import tiny_families  # noqa: F401 - imports all of them

    import alignkit.trainers.rankdpo  # noqa: F401

    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave nothing in the user's cache of datasets."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


class Folders(dict[str, "Path"]):
    """Saved pipelines by family, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __missing__(self, family: str) -> Path:
        import tiny_families

        tiny_families.build(family).save_pretrained(self.root / family)
        self[family] = self.root / family
        return self[family]


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An ordinary diffusers folder of each family of `tiny_families`."""
    return Folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIPModel with its tokenizer."""
    import tiny_families
    import torch

    from alignkit.sandbox import models

    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tiny_families.clip().save_pretrained(folder)
    models.clip_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def load(model_folders: dict[str, Path]) -> Callable[..., PipelineGenerator]:
    """Loads a fresh generator of a family, which tests may change."""
    import tiny_families

    from alignkit.generators import load_generator

    def loaded(family: str, **options: Any) -> PipelineGenerator:
        told = tiny_families.FAMILIES[family].options
        return load_generator(model_folders[family], device="cpu", options=told, **options)

    return loaded


def _png(seed: int) -> bytes:
    from PIL import Image

    from alignkit.sandbox.captions import parse
    from alignkit.sandbox.scenes import compose, render

    rng = np.random.default_rng(seed)
    picture = render(compose(parse("a red circle above a blue square"), rng), rng)
    buffer = io.BytesIO()
    Image.fromarray((picture[::4, ::4] * 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def ranked_rows() -> Callable[..., datasets.Dataset]:
    """Makes a ranked dataset of so many rows of rendered scenes: K = 4, labels with ties in some rows."""
    import datasets

    from alignkit.records import Prompt

    captions = ("a red circle", "two blue rings", "a cross above a ring", "a green square and a cyan circle")

    def make(count: int, phi: Sequence[Sequence[float]] = ((0.9, 0.1, 0.4, 0.6), (0.0, 1.0, 0.5, 0.5))) -> Any:
        features = datasets.Features(
            {
                "prompt_id": datasets.Value("string"),
                "prompt": datasets.Value("string"),
                "images": datasets.List(datasets.Image()),
                "phi": datasets.List(datasets.Value("float64")),
            }
        )
        prompts = [Prompt.from_text(f"{captions[i % 4]} on a gray background", number=i) for i in range(count)]
        rows = [
            {
                "prompt_id": f"{prompt.id}{i}",
                "prompt": prompt.text,
                "images": [{"bytes": _png(10 * i + k), "path": None} for k in range(len(phi[0]))],
                "phi": list(phi[i % len(phi)]),
            }
            for i, prompt in enumerate(prompts)
        ]
        return datasets.Dataset.from_list(rows, features=features)

    return make
