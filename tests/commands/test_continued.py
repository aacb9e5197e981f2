"""`alignkit train` given again: corrected, longer, from another place, or with its result gone."""

from __future__ import annotations

import shutil

import datasets
import pytest
import torch
from safetensors.torch import load

from alignkit import cli


@pytest.fixture
def train(tmp_path, monkeypatch, model_folders, ranked_rows):
    """Runs `alignkit train rankdpo` in a folder with a model and 4 pairs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folders["unet"], tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [
        {"prompt": row["prompt"], "chosen": row["images"][0], "rejected": row["images"][1]} for row in ranked_rows(4)
    ]
    kinds = {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    pairs = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    pairs.to_parquet(tmp_path / "data" / "train-0.parquet")
    datasets.disable_progress_bars()

    def run(model="model", out="out", **changes):
        keys = {"max_steps": 2, "save_steps": 2, "learning_rate": 0.01, "beta": 10, "lora_rank": 2, "bf16": "false"}
        keys |= {"model": model, "data": "data", "output_dir": out, "held_out": 0, "use_cpu": "true"}
        keys |= {"per_device_train_batch_size": 2, "disable_tqdm": "true", **changes}
        return cli.main(["train", "rankdpo", *(f"--{key}={value}" for key, value in keys.items())])

    return run


def steps(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_corrected_moved_and_longer_training_goes_on(train, tmp_path, capsys):
    assert train(lora_targets='["nowhere"]') == 2
    assert "none of the LoRA targets" in capsys.readouterr().err
    assert train(learning_rate="1e30", max_steps=6) == 2
    assert "Lower learning_rate" in capsys.readouterr().err
    assert train() == 0, capsys.readouterr().err
    assert train(learning_rate=0.02) == 2
    assert "train.learning_rate: 0.01 -> 0.02" in capsys.readouterr().err

    (tmp_path / "out").rename(tmp_path / "moved")
    written = (tmp_path / "moved" / "adapter" / "pytorch_lora_weights.safetensors").stat().st_mtime_ns
    assert train(model=tmp_path / "model", out="moved") == 0, capsys.readouterr().err
    adapter = tmp_path / "moved" / "adapter" / "pytorch_lora_weights.safetensors"
    assert adapter.stat().st_mtime_ns == written  # finished: nothing was done

    first = load(adapter.read_bytes())
    assert train(out="moved", max_steps=4) == 0
    assert "was to be trained for 2 steps, now for 4" in capsys.readouterr().err
    assert steps(tmp_path / "moved") == ["checkpoint-2", "checkpoint-4"]
    longer = load(adapter.read_bytes())
    assert any(not torch.equal(first[name], longer[name]) for name in first)
    assert train(out="moved", max_steps=3) == 2
    assert "checkpoint-4' is at step 4, past the last step 3: raise max_steps" in capsys.readouterr().err

    shutil.rmtree(tmp_path / "moved" / "adapter")
    assert train(out="moved", max_steps=4, per_device_train_batch_size=1) == 2
    assert "with 2 rows a step" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="still 2 rows a step"):
        assert train(out="moved", max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=2) == 0
    again = load(adapter.read_bytes())
    assert all(torch.equal(again[name], longer[name]) for name in longer)


def test_a_finished_training_without_checkpoints_is_not_begun_anew(train, tmp_path, capsys):
    assert train(save_strategy="no", max_steps=1) == 0, capsys.readouterr().err
    assert train(save_strategy="no", max_steps=2) == 2
    assert "no checkpoint is left to go on from" in capsys.readouterr().err
    assert (tmp_path / "out" / "adapter").is_dir()


def test_a_folder_that_cannot_be_written_is_named(train, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert train() == 2
    assert "out" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "a file"
