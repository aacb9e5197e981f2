"""configs/models: the published configurations, proven by their parameter counts, and sized up by the doctor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from alignkit import cli
from alignkit.commands.doctor import memory
from alignkit.commands.doctor.main import DoctorJob, setup_of
from alignkit.commands.doctor.model_shapes import read_model

ROOT = Path(__file__).parent.parent.parent / "configs" / "models"
# Millions of parameters of the denoiser, as the makers or the project's table of backbones give them.
DENOISERS = {
    "sd15": 859.5,
    "sdxl": 2567,
    "sd35_medium": 2243,
    "flux1_dev": 11901,
    "pixart_sigma": 611,
    "sana_600m": 592,
    "sana_1600m": 1604,
    "lumina2": 2610,
    "qwen_image": 20430,
    "dreamlite": 390,
    "wan21_1_3b": 1419,
    "wan21_14b": 14288,
    "anyflow_wan_1_3b": 1422,
    "ltx_video": 1923,
    "cogvideox_2b": 1694,
    "hunyuan_video": 12821,
}
# And of what stands beside it.
OTHERS = {
    "CLIP-L": 123.1,
    "CLIP-G": 694.7,
    "T5-XXL encoder": 4762.3,
    "UMT5-XXL encoder": 5680.9,
    "Gemma-2-2B": 2614.3,
    "Qwen2.5-VL-7B": 8292.2,
}
BESIDE = {
    ("sdxl", "text_encoder"): "CLIP-L",
    ("sdxl", "text_encoder_2"): "CLIP-G",
    ("sd35_medium", "text_encoder_3"): "T5-XXL encoder",
    ("wan21_1_3b", "text_encoder"): "UMT5-XXL encoder",
    ("sana_600m", "text_encoder"): "Gemma-2-2B",
    ("qwen_image", "text_encoder"): "Qwen2.5-VL-7B",
}


def test_every_folder_has_its_count():
    assert {path.name for path in ROOT.iterdir()} == set(DENOISERS)


@pytest.mark.parametrize("name", list(DENOISERS))
def test_it_is_read_and_its_denoiser_has_the_published_size(name, capsys):
    assert cli.main(["doctor", "--model", str(ROOT / name), "--dry-run"]) == 0
    assert f"size up {ROOT / name}" in capsys.readouterr().out
    model = read_model(ROOT / name)
    assert model.denoiser_parameters() / 1e6 == pytest.approx(DENOISERS[name], rel=0.002)
    for (folder, part), other in BESIDE.items():
        if folder == name:
            assert model.stored(part) / 1e6 == pytest.approx(OTHERS[other], rel=0.001)


@pytest.mark.parametrize(
    ("name", "latent"),
    [
        ("sdxl", (1, 128, 128)),
        ("wan21_1_3b", (21, 60, 104)),
        ("ltx_video", (21, 16, 22)),
        ("cogvideox_2b", (13, 60, 90)),
    ],
)
def test_latents_of_the_default_size(name, latent):
    """As the pipelines make them: 4k+1 frames of Wan and CogVideoX, 8k+1 of LTX-Video, which divides sides by 32."""
    model = read_model(ROOT / name)
    setup = setup_of(DoctorJob(), model)
    frames = (setup.frames - 1) // model.vae_frames + 1
    assert (frames, setup.height // model.vae_ratio, setup.width // model.vae_ratio) == latent


@pytest.mark.parametrize("name", list(DENOISERS))
def test_one_small_step_of_each(name):
    """Every family's `network_inputs` are right: its published network, cut to a block a kind, takes them."""
    model = read_model(ROOT / name)
    depths = {
        key: 1 for key in ("num_layers", "num_single_layers", "transformer_layers_per_block") if key in model.config
    }
    model = replace(model, config={**model.config, **depths})
    frames = 9 if model.family.modality == "video" else 1
    setup = setup_of(DoctorJob(resolution=256, num_frames=frames, dtype="bfloat16", bf16=True), model)
    counts = memory.operations(model, setup)
    # Without gradients of frozen weights a backward costs about a forward; attention's twice, the text's way nothing.
    assert 0.3 < counts["backward, with what is checkpointed"] / counts["forward"] < 2.5
    assert memory.parts(model, setup)["activations"] > 0
