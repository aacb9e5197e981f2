"""`alignkit doctor`: the machine, and a planned training."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from alignkit import cli


def test_the_machine(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "torch" in said
    assert "cpu, " in said
    assert "torchvision" in said


def amounts(said, name):
    return [float(line.split()[-2]) for line in said.splitlines() if line.startswith(f"  {name}")]


def test_a_model_folder_and_a_method(model_folders, capsys):
    words = ["doctor", f"--model={model_folders['unet']}", "--method=rankdpo", "--resolution=512"]
    assert cli.main(words) == 0, capsys.readouterr().err
    plain = capsys.readouterr().out
    assert cli.main([*words, "--full_finetune=true", "--batch=8", "--precompute_reference=true"]) == 0
    full = capsys.readouterr().out
    assert "parameters of unet, a StableDiffusionPipeline" in plain
    assert all(f"  rank {rank} " in plain for rank in (8, 16, 32, 64, 128))
    assert "peak memory of rankdpo, 1 x 4 images a step" in plain
    for size in (24, 48, 80, 141):
        assert any(f"{size} GB GPU" in line and line.endswith("fits as asked") for line in plain.splitlines())
    assert amounts(full, "activations")[0] > 4 * amounts(plain, "activations")[0] > 0
    assert amounts(plain, "reference") == amounts(plain, "forward")
    assert amounts(full, "reference") == [0]


def test_what_is_no_parameter_is_told_apart(model_folders, capsys):
    assert cli.main(["doctor", f"--model={model_folders['flow']}", "--method=sft", "--resolution=16"]) == 0
    said = capsys.readouterr().out
    assert "0.0M fixed positions besides" in said
    assert "1 x 1 images a step" in said


def test_what_to_switch_on(monkeypatch, model_folders, capsys):
    """Cards just too small for the plain step, and far too small for any."""
    from alignkit.commands.doctor import memory

    words = ["doctor", f"--model={model_folders['unet']}", "--resolution=1024", "--dtype=bfloat16", "--bf16=true"]
    assert cli.main(words) == 0
    need = amounts(capsys.readouterr().out, "all")[-1]
    monkeypatch.setattr(memory, "CARDS", (need, 0.001))
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert f"{need} GB GPU" in said
    assert re.search(r"with (activation_checkpointing|low_memory): true: \d\.\d GB", said)
    assert "does not fit: lower batch" in said


def test_a_hub_id_is_told_how_to_be_downloaded_without_asking_the_network(monkeypatch, capsys):
    monkeypatch.setattr("socket.socket.connect", lambda *_: (_ for _ in ()).throw(AssertionError("network")))
    assert cli.main(["doctor", "--model", "stabilityai/some-model"]) == 2
    assert "hf download stabilityai/some-model --local-dir" in capsys.readouterr().err


def test_a_dry_run_asks_no_network_either(capsys):
    assert cli.main(["doctor", "--model", "stabilityai/some-model", "--dry-run"]) == 2
    assert "is no local folder" in capsys.readouterr().err


def test_a_model_folder_that_lacks_files(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]}', encoding="utf-8"
    )
    assert cli.main(["doctor", f"--model={tmp_path}"]) == 2
    assert "incomplete, missing: unet/" in capsys.readouterr().err


SCHEDULERS = [
    ({"_class_name": "DDPMScheduler"}, "5000, as the network predicts epsilon"),  # what a config without it means
    ({"_class_name": "DDPMScheduler", "prediction_type": "epsilon"}, "5000, as the network predicts epsilon"),
    ({"_class_name": "DDPMScheduler", "prediction_type": "v_prediction"}, "5000, as the network predicts v_prediction"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "500, as the network predicts flow"),
    (
        {"_class_name": "DPMSolver", "prediction_type": "flow_prediction"},
        "500, as the network predicts flow",
    ),
]


@pytest.mark.parametrize(("scheduler", "says"), SCHEDULERS)
def test_the_default_of_beta_and_why(model_folders, tmp_path, capsys, scheduler, says):
    shutil.copytree(model_folders["unet"], tmp_path / "model")
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    words = ["doctor", f"--model={tmp_path / 'model'}", "--resolution=16"]
    assert cli.main([*words, "--method=rankdpo"]) == 0, capsys.readouterr().err
    _, _, defaults = capsys.readouterr().out.partition("defaults that depend on the model\n")
    reason = "flow models 500 (published: 100 to 2000), others 5000 (Diffusion-DPO's SDXL)"
    assert defaults == f"  beta is not set: {says}; {reason}\n"
    assert cli.main([*words, "--method=sft"]) == 0
    assert "beta" not in capsys.readouterr().out
