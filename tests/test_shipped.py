"""What comes with the package, by name, from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkit import load_generator
from alignkit.commands.specs import GeneratorSpec, RewardSpec, build_reward
from alignkit.errors import DataError, UnknownNameError
from alignkit.shipped import WEIGHTS, configs, model_path, shipped_file


def test_shipped_configs_are_found_where_there_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo.yaml", "prompts/general.jsonl", "models/sdxl"):
        assert shipped_file(Path("configs", name)) == configs() / name
        assert (configs() / name).exists()
    for name in ("configs/absent.yaml", "demo.yaml", "configs/../demo.yaml", str(tmp_path / "x")):
        assert shipped_file(Path(name)) == Path(name)


def test_a_file_of_the_user_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/demo.yaml").write_text("out: mine\n", encoding="utf-8")
    assert shipped_file(Path("configs/demo.yaml")) == Path("configs/demo.yaml")


def test_models_of_the_sandbox_have_names():
    assert model_path("sandbox:unet") == str(WEIGHTS / "unet")
    assert model_path("sandbox:unet/clean_adapter") == str(WEIGHTS / "unet" / "clean_adapter")
    assert model_path("models/sd3") == "models/sd3"
    with pytest.raises(UnknownNameError, match=r"no model 'unett'\. Did you mean 'unet'\?"):
        GeneratorSpec(model="sandbox:unett")
    with pytest.raises(DataError, match="no path below"):
        model_path("sandbox:../../config.py")


def test_identities_and_rewards_see_the_weights(tmp_path, monkeypatch):
    """The fingerprint of the folder is in the identity, and the reward loads it."""
    monkeypatch.chdir(tmp_path)
    named, local = GeneratorSpec(model="sandbox:unet"), GeneratorSpec(model=str(WEIGHTS / "unet"))
    assert not named.is_own
    assert named.absent == []
    assert named.identity.split()[-1] == local.identity.split()[-1]
    options = {"model": "sandbox:clip"}
    clip = RewardSpec(reward="clip_score", options=options)
    assert (
        clip.identity.split()[-1]
        == RewardSpec(reward="clip_score", options={"model": str(WEIGHTS / "clip")}).identity.split()[-1]
    )
    assert build_reward("clip_score", options).name == "clip_score"


def test_a_generator_is_loaded_by_its_name_and_remembers_it(tmp_path, monkeypatch):
    """The PEFT config of an adapter names the base as the user did."""
    monkeypatch.chdir(tmp_path)
    generator = load_generator("sandbox:unet", adapter="sandbox:unet/clean_adapter")
    assert generator.name == "unet"
    assert generator.pipeline.name_or_path == "sandbox:unet"
    generator.save_adapter(Path("saved"))
    text = Path("saved/peft/adapter_config.json").read_text(encoding="utf-8")
    assert '"base_model_name_or_path": "sandbox:unet"' in text
