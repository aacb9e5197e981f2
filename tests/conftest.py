"""Tiny untrained pipelines of both families and ranked data made of rendered scenes, shared by all folders."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    import datasets
    from torch import nn

    from alignkit.generators.base import PipelineGenerator

SIZE = 16  # pixels a side; 8 x 8 x 4 latents
FAMILIES = ("unet", "flow")


def _tiny_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        scaling_factor=0.7,
    )


def _tiny_clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    from alignkit.sandbox import models

    tokenizer = models.clip_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": models.TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": SIZE,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).eval()


def _tiny_text_encoder(*, pooled: bool) -> Any:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    config = _tiny_clip().config.text_config
    config.projection_dim = 32
    return (CLIPTextModelWithProjection if pooled else CLIPTextModel)(config).eval()


def _tiny_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        block_out_channels=(16,),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def _tiny_transformer() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=16,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
    )


def _tiny_t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    from alignkit.sandbox import models

    size = len(models.t5_tokenizer())
    config = T5Config(vocab_size=size, d_model=64, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    return T5EncoderModel(config).eval()


def _randomise(net: nn.Module) -> None:
    """Zero-initialised layers would hide mistakes: every weight gets something."""
    import torch

    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


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
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave nothing in the user's cache of datasets."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An ordinary diffusers folder of each family, put together by the sandbox's own builders from tiny parts."""
    import torch

    from alignkit.sandbox import generators, models

    root = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(models, "unet", _tiny_unet)
        patch.setattr(models, "transformer", _tiny_transformer)
        patch.setattr(models, "t5", _tiny_t5)
        patch.setattr(models, "text_encoder", _tiny_text_encoder)
        builders = {"unet": generators.build_unet, "flow": generators.build_flow}
        for name, build in builders.items():
            pipeline = build(_tiny_vae())
            _randomise(pipeline.unet if name == "unet" else pipeline.transformer)
            if name == "flow":
                pipeline.vae.register_to_config(shift_factor=0.1)
            pipeline.save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIPModel with its tokenizer."""
    import torch

    from alignkit.sandbox import models

    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        _tiny_clip().save_pretrained(folder)
    models.clip_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def load(model_folders: dict[str, Path]) -> Callable[..., PipelineGenerator]:
    """Loads a fresh generator of a family, which tests may change."""
    from alignkit.generators import load_generator

    return lambda family, **options: load_generator(model_folders[family], device="cpu", **options)


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
