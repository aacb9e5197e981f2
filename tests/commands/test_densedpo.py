"""The method densedpo from the command line: rows as `dense-pairs` writes them, a run's plan, and the doctor."""

from __future__ import annotations

import math

import pytest
import torch
import yaml

from alignkit import cli
from alignkit.adapters.fingerprint import base_of
from alignkit.commands.doctor.main import DoctorJob, planned_model, setup_of
from alignkit.pairs import Pair
from alignkit.records import Prompt, Sampling
from alignkit.shipped import configs
from data_pipelines.dense.clips import Clip
from data_pipelines.dense.config import PairsConfig
from data_pipelines.dense.rows import pair_row, request_for, table_of

SAMPLING = Sampling(2, 1.0, 16, 16, num_frames=9, fps=4.0)


@pytest.fixture
def pairs(tmp_path, load):
    """A parquet file of three labelled pairs, as the stage makes their rows."""
    import pyarrow.parquet as pq

    codec, config = base_of(load("wan").pipeline.vae), PairsConfig(latents_dtype="bfloat16")
    rows = []
    for number in range(3):
        clip = Clip(f"{number}.mp4", Prompt.from_text(f"scene {number}"), number, "here")
        latents = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(number))
        row = pair_row(clip, request_for(clip, config), Pair(latents, (0.7, 0.7)), config, SAMPLING)
        rows.append(row | {"codec": codec, "generator": "wan", "source_sha256": "", "labels": [1, -1]})
    pq.write_table(table_of(rows, videos=False), tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


def test_pairs_of_the_stage_train(pairs, model_folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(model_folders["wan"]), "--data", str(pairs), "--out", "out", "--held_out", "0"]
    words += ["--max_steps", "1", "--lora_rank", "2", "--per_device_train_batch_size", "3", "--save_strategy", "no"]
    assert cli.main(["train", "densedpo", *words, "--disable_tqdm", "true", "--bf16", "false"]) == 0
    assert (tmp_path / "out" / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    text = (tmp_path / "out" / "trainer_state.json").read_text()
    (loss,) = [entry["loss"] for entry in yaml.safe_load(text)["log_history"] if "loss" in entry]
    assert loss == pytest.approx(math.log(2), abs=1e-6)


def test_a_run_takes_them_as_its_data(pairs, model_folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a ring\na cross\n", encoding="utf-8")
    keys = {
        "out": "run",
        "method": "densedpo",
        "data": {"path": str(pairs)},
        "prompts": {"file": "prompts.txt", "held_out": 0},
        "generators": {"wan": {"model": str(model_folders["wan"])}},
        "rewards": {"motion": {"reward": "motion"}},
        "policy": "wan",
        "train": {"loss": ["dense_dpo", "clip_sft"], "loss_weights": [1.0, 0.1]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    assert cli.main(["run", "--config", "run.yaml", "--dry-run"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "data: pairs of clips with labels of their segments in" in printed
    assert yaml.safe_load(printed)["train"]["beta"] == 500.0


@pytest.mark.parametrize("name", ["wan21_1_3b", "wan21_14b", "ltx_video", "hunyuan_video"])
def test_the_doctor_counts_two_clips_and_the_reference(name):
    folder = configs() / "models" / name
    setup = setup_of(DoctorJob(model=folder, method="densedpo", candidates=7), planned_model(folder))
    assert (setup.candidates, setup.needs_reference, setup.frames > 1) == (2, True, True)
