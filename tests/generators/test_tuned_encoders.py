"""Folders of tuned text encoders: T5, UMT5 and CLIP written and read back; as members of mixtures; what is refused."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from random_adapters import shake
from safetensors.torch import load_file
from tiny_families import FAMILIES

from alignkit import cli
from alignkit.diffusion.tuned_steps import ALL_STEPS, TunedSteps
from alignkit.errors import AdapterError, ConfigError, DataError
from alignkit.generators.members import Base, read_member, require_one_base
from alignkit.generators.soups import make_mixture, make_soup
from alignkit.generators.tuned_encoders import save_tuned
from alignkit.records import Sampling

PROMPTS = ["a red circle", "two blue rings on a gray background"]
LAST_HALF = TunedSteps(0.5, 1.0)


def tune(generator, names, window=LAST_HALF, *, full=True, seed=1):
    """Random changes of the encoders `names`, of all weights or by a LoRA."""
    conditioner = generator.conditioner
    if full:
        conditioner.unfreeze(names)
    else:
        conditioner.add_lora(2, encoders=names)
    for name in names:
        shake(conditioner.encoders[name], seed, 0.1, only="" if full else "lora_")
    conditioner.window = window
    return generator


@torch.no_grad()
def encoded(generator):
    cond = generator.encode_prompts(PROMPTS)
    return {**cond.tensors, **{f"null {name}": value for name, value in cond.null.items()}}


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("family", "name"), [("flow", "text_encoder_3"), ("wan", "text_encoder")])
def test_encoders_without_a_lora_loader_are_read_back(family, name, full, load, tmp_path, warnings):
    """T5 of SD3 and UMT5 of Wan. Their LoRA is in the merged folder and in ComfyUI's file alone, which is said."""
    generator, folder = tune(load(family), [name], full=full), tmp_path / "out"
    save_tuned(generator, folder)
    assert files(folder) == [*([] if full else [f"comfyui/{family}.safetensors"]), f"{name}/model.safetensors"]
    said = [line for line in warnings() if "no file in" in line]
    assert len(said) == (not full)
    assert all(f"holds {name}: the LoRA loader of a " in line for line in said)
    again, plain = load(family, encoder=folder), encoded(load(family))
    assert again.conditioner.window == LAST_HALF
    found = encoded(again)
    for key, value in encoded(generator).items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)
    assert any((found[key] - value).abs().max() > 1e-2 for key, value in plain.items())
    told = FAMILIES[family]
    sampling = Sampling(steps=2, guidance_scale=2.0, height=told.side, width=told.side, num_frames=told.frames or 1)
    images = [one.generate(PROMPTS, [1, 2], sampling) for one in (again, load(family))]
    assert not torch.equal(*images)


def test_a_lora_on_encoders_that_were_tuned_before_is_no_file(load, tmp_path, warnings):
    """Such a file would be for the encoder that was given, and its header would name the model's own."""
    save_tuned(tune(load("unet"), ["text_encoder"]), tmp_path / "first")
    generator = tune(load("unet", encoder=tmp_path / "first"), ["text_encoder"], full=False, seed=2)
    save_tuned(generator, tmp_path / "second")
    assert files(tmp_path / "second") == ["text_encoder/model.safetensors"]
    assert "its LoRA is a change of the encoder that was given" in warnings()[-1]
    for key, value in encoded(load("unet", encoder=tmp_path / "second")).items():
        torch.testing.assert_close(value, encoded(generator)[key], rtol=1e-3, atol=1e-4)
    save_tuned(tune(load("unet"), ["text_encoder"], full=False), tmp_path / "fresh")
    assert len(files(tmp_path / "fresh")) == 3


def test_an_encoder_without_keys_for_comfyui_is_named(load, tmp_path, warnings, monkeypatch):
    monkeypatch.setattr("alignkit.adapters.comfyui._CLIP", {})
    save_tuned(tune(load("unet"), ["text_encoder"], full=False), tmp_path / "out")
    assert "no file for ComfyUI: its keys of text_encoder, a CLIPTextModel, are not known" in warnings()[-1]
    assert not (tmp_path / "out" / "comfyui").exists()


@pytest.mark.parametrize(
    ("family", "name", "prefix", "own"),
    [
        ("flow", "text_encoder_3", "text_encoders.t5xxl.transformer.", ""),
        ("flux", "text_encoder_2", "text_encoders.t5xxl.transformer.", ""),
        ("pixart", "text_encoder", "text_encoders.t5xxl.transformer.", ""),
        ("wan", "text_encoder", "text_encoders.umt5xxl.transformer.", ""),
        ("lumina2", "text_encoder", "text_encoders.gemma2_2b.transformer.model.", ""),
        ("qwen_image", "text_encoder", "text_encoders.qwen25_7b.transformer.model.", "model.language_model."),
    ],
)
def test_comfyui_reads_the_other_encoders(family, name, prefix, own, load, tmp_path):
    """By its generic keys: what its loader adds to the weights of these names gives the merged encoder."""
    generator, folder = tune(load(family), [name], full=False), tmp_path / "out"
    save_tuned(generator, folder)
    merged = load(family, encoder=folder).conditioner.encoders[name].state_dict()
    state, plain = load_file(folder / "comfyui" / f"{family}.safetensors"), load(family).conditioner.encoders[name]
    layers = {key.removesuffix(".alpha") for key in state if key.endswith(".alpha")}
    assert len(state) == 3 * len(layers) > 0
    changed = plain.state_dict()
    for layer in layers:
        assert layer.startswith(prefix)
        up, down, alpha = (state[layer + end] for end in (".lora_B.weight", ".lora_A.weight", ".alpha"))
        change = up @ down * (alpha / len(down))
        assert change.abs().max() > 0
        changed[own + layer.removeprefix(prefix) + ".weight"] += change
    assert changed.keys() == merged.keys()
    for key, value in merged.items():
        torch.testing.assert_close(changed[key], value, rtol=1e-4, atol=1e-5)


def test_sana_has_no_file_for_comfyui(load, tmp_path, warnings):
    """ComfyUI does not run it."""
    save_tuned(tune(load("sana"), ["text_encoder"], full=False), tmp_path / "out")
    assert files(tmp_path / "out") == ["text_encoder/model.safetensors"]
    assert "no file in 'lora' or 'comfyui' of" in warnings()[-1]
    assert "and ComfyUI's keys for such a model are not known" in warnings()[-1]


# --- as members of mixtures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "text_encoder"])
def test_encoders_of_another_base_are_not_mixed(place, load, model_folders, tmp_path, capsys):
    stranger = load("unet")
    shake(stranger.conditioner.encoders["text_encoder"], 7, 0.1)
    save_tuned(tune(stranger, ["text_encoder"]), tmp_path / "other")
    words = ["soup", "--members", str(tmp_path / "other" / place), "--weights", "1", "--out", str(tmp_path / "mix")]
    words += ["--base", str(model_folders["unet"])]
    for space in ("weights", "embedding"):
        assert cli.main([*words, "--space", space]) == 2
        said = capsys.readouterr().err
        assert "was trained on another base: the fingerprint of its text_encoder was" in said
    assert not (tmp_path / "mix").exists()


def test_the_window_of_a_member_is_read(load, model_folders, tmp_path, warnings):
    save_tuned(tune(load("unet"), ["text_encoder"]), tmp_path / "out")
    base = Base.open(str(model_folders["unet"]))
    member = read_member(str(tmp_path / "out"), base)
    assert (member.window, list(member.bases)) == (LAST_HALF, ["text_encoder"])
    assert require_one_base([member], base) == member.bases
    make_mixture(base, [member], [1.0], tmp_path / "same", space="embedding", window=LAST_HALF)
    assert not warnings()
    make_mixture(base, [member], [1.0], tmp_path / "all", space="embedding")
    assert "was trained for the steps [0.5, 1), this mixture acts in all steps" in warnings()[-1]
    make_soup(base, [member], [1.0], tmp_path / "soup")
    assert len(warnings()) == 2
    assert read_member(str(tmp_path / "soup"), base).window is None
    with pytest.raises(AdapterError, match="is a mixture that acts while sampling; give the members of it"):
        read_member(str(tmp_path / "same"), base)
    record = tmp_path / "out" / "alignkit.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "window": None}))
    with pytest.raises(DataError, match="was changed after it was written"):
        read_member(str(tmp_path / "out"), base)


def test_windows_in_words():
    assert str(ALL_STEPS) == "all steps"
    assert str(TunedSteps(10, 25, null=False)) == "the steps [10, 25) without the null condition"


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_soup_does_not_replace_tuned_encoders(load, model_folders, tmp_path):
    save_tuned(tune(load("unet"), ["text_encoder"]), tmp_path / "out")
    base = Base.open(str(model_folders["unet"]))
    make_soup(base, [read_member(str(tmp_path / "out"), base)], [1.0], tmp_path / "soup")
    with pytest.raises(AdapterError, match="has a text_encoder, and so has `encoder`, which it would replace"):
        load("unet", encoder=tmp_path / "out", adapter=tmp_path / "soup")


def test_a_window_without_a_step_is_refused_before_images_are_drawn(load, tmp_path):
    save_tuned(tune(load("unet"), ["text_encoder"], TunedSteps(4, 6)), tmp_path / "out")
    generator = load("unet", encoder=tmp_path / "out")
    generator.require_sampling(Sampling(steps=6, height=16, width=16))
    with pytest.raises(ConfigError, match=r"the window \[4, 6\) holds none of the 3 steps"):
        generator.require_sampling(Sampling(steps=3, height=16, width=16))
