"""Soups as files, by the verb and read by vanilla diffusers: LoRAs, denoisers, CLIP and T5 encoders; bad members."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
import transformers
from peft import LoraConfig
from random_adapters import shake
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES

from alignkit import cli
from alignkit.adapters import lora
from alignkit.adapters.fingerprint import base_of
from alignkit.adapters.mixture import read_mixture
from alignkit.records import Sampling

PROMPTS, SEEDS = ["a red circle", "two blue rings on a gray background"], (5, 6)
CLOSE = 1e-4  # largest pixel difference, float32


def draw(generator, family, steps=2):
    side = FAMILIES[family].side
    return generator.generate(PROMPTS, SEEDS, Sampling(steps=steps, guidance_scale=3.0, height=side, width=side))


def soup(*words):
    return cli.main(["soup", *map(str, words)])


@pytest.fixture
def refused(capsys, model_folders, tmp_path):
    """The message of a soup that is refused; nothing is left behind."""

    def run(family, *words, members=(), weights=()):
        out = tmp_path / "refused"
        told = ["--members", *members, "--weights", *weights] if members else []
        assert soup(*told, "--base", model_folders[family], "--out", out, *words) == 2
        assert not (out / "alignkit.json").exists()
        return capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def adapters(load, tmp_path_factory):
    """Two adapters of a family with different ranks, alphas, layers and, in the second, rsLoRA."""
    made = {}

    def make(family):
        if family not in made:
            folders = [tmp_path_factory.mktemp(f"{family}{number}") for number in (1, 2)]
            for number, folder in enumerate(folders):
                generator = load(family)
                targets = list(generator.lora_targets) if number else ["to_q", "to_out.0"]
                config = LoraConfig(r=2 + number, lora_alpha=3.0, use_rslora=bool(number), target_modules=targets)
                lora.inject_config(generator.net, config)
                if family == "unet" and number:
                    generator.add_text_lora(2, 5.0, None, 0.0)
                shake(generator.model, number, only="lora_")
                generator.save_adapter(folder)
            made[family] = folders
        return made[family]

    return make


def both_active(load, family, folders, weights):
    generator = load(family)
    for number, folder in enumerate(folders):
        generator.load_adapter(folder, f"member{number}")
    generator.set_adapters({f"member{number}": weight for number, weight in enumerate(weights)})
    return generator


# --- LoRAs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["unet", "flow"])
def test_one_file_in_vanilla_diffusers_is_the_mixture_in_memory(family, load, adapters, model_folders, tmp_path):
    folders, out = adapters(family), tmp_path / "mix"
    assert soup("--members", *folders, "--weights", 0.7, 0.3, "--base", model_folders[family], "--out", out) == 0
    vanilla, base = load(family), draw(load(family), family)
    vanilla.pipeline.load_lora_weights(out)
    expected = draw(both_active(load, family, folders, (0.7, 0.3)), family)
    assert (draw(vanilla, family) - expected).abs().max() <= CLOSE
    assert (draw(load(family, adapter=out), family) - expected).abs().max() <= CLOSE
    assert (expected - base).abs().max() > 20 * CLOSE
    mixture = read_mixture(out)
    assert mixture.base_fingerprint["unet" if family == "unet" else "transformer"] == base_of(load(family).net)
    assert (mixture.weights, mixture.space) == ((0.7, 0.3), "weights")
    with safe_open(out / lora.DIFFUSERS_FILE, "pt") as opened:
        assert json.loads(opened.metadata()["base_fingerprint"]) == mixture.base_fingerprint
        key = next(key for key in opened.keys() if key.endswith("to_q.lora_A.weight"))  # noqa: SIM118 - it is no mapping
        assert opened.get_slice(key).get_shape()[0] == 2 + 3


def test_full_weights_written_from_loras_are_the_mixture_too(load, adapters, model_folders, tmp_path):
    """As a whole pipeline, whose denoiser and text encoder carry the changes; and one member's end point by `base`."""
    folders, base = adapters("unet"), model_folders["unet"]
    told = ("--members", *folders, "--weights", 0.7, 0.3, "--output", "model")
    assert soup(*told, "--base", base, "--out", tmp_path / "mix") == 0
    whole = load("unet")
    whole.pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "mix")
    from alignkit.generators import wrap

    expected = draw(both_active(load, "unet", folders, (0.7, 0.3)), "unet")
    assert (draw(wrap(whole.pipeline), "unet") - expected).abs().max() <= CLOSE
    told = ("--members", folders[0], "base", "--weights", 1, 0, "--output", "components")
    assert soup(*told, "--base", base, "--out", tmp_path / "end") == 0
    expected = draw(load("unet", adapter=folders[0]), "unet")
    assert (draw(load("unet", adapter=tmp_path / "end"), "unet") - expected).abs().max() <= CLOSE


def test_files_of_kohya_and_peft_are_members_too(adapters, model_folders, tmp_path):
    """The same adapter, rsLoRA with a text encoder, in three layouts gives the same file."""
    folder, states = adapters("unet")[1], []
    kohya = next((folder / "comfyui").glob("*.safetensors"))
    for name, member in (("diffusers", folder), ("peft", folder / "peft"), ("kohya", kohya)):
        told = ("--members", member, "base", "--weights", 0.5, 0.5, "--base", model_folders["unet"])
        assert soup(*told, "--out", tmp_path / name) == 0
        states.append(load_file(tmp_path / name / lora.DIFFUSERS_FILE))
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        assert all(torch.allclose(other[key], value, atol=1e-6) for key, value in states[0].items())


def test_a_cut_rank_and_ties(adapters, model_folders, tmp_path, capsys):
    folders, base = adapters("flow"), model_folders["flow"]
    told = ("--members", *folders, "--weights", 0.7, 0.3, "--base", base)
    assert soup(*told, "--out", tmp_path / "cut", "--rank", 2) == 0
    assert "relative error 0." in capsys.readouterr().out
    assert soup(*told, "--out", tmp_path / "ties", "--rank", 4, "--method", "ties", "--density", 0.5) == 0
    mixture = read_mixture(tmp_path / "ties")
    assert (mixture.method, mixture.density) == ("ties", 0.5)
    assert 0 < mixture.rank_error < 1


# --- full weights ---------------------------------------------------------------------------------------------------


def tuned_encoders(pipeline, folder, seed, names, **saving):
    for name in names:
        encoder = pipeline.components[name]
        shake(encoder, seed)
        encoder.save_pretrained(folder / name, **saving)
    return folder


@pytest.mark.parametrize(
    ("family", "names"), [("flow", ["text_encoder", "text_encoder_3"]), ("unet", ["text_encoder"])]
)
def test_encoders_clip_and_t5(family, names, load, model_folders, tmp_path):
    """The first in shards, the second with the level `text_model.` that other versions of transformers have or lack."""
    one = tuned_encoders(load(family).pipeline, tmp_path / "one", 1, names, max_shard_size="20KB")
    two = tuned_encoders(load(family).pipeline, tmp_path / "two", 2, names)
    assert len(list((one / names[0]).glob("*.safetensors"))) > 1
    state = load_file(two / "text_encoder" / "model.safetensors")
    renamed = {
        key.removeprefix("text_model.") if key.startswith("text_model.") else f"text_model.{key}": value
        for key, value in state.items()
    }
    save_file(renamed, two / "text_encoder" / "model.safetensors", {"format": "pt"})
    base = model_folders[family]
    assert soup("--members", one, two, "--weights", 0.25, 0.75, "--base", base, "--out", tmp_path / "mix") == 0
    for name in names:
        kind = type(load(family).pipeline.components[name])
        mixed, first = (kind.from_pretrained(folder / name).state_dict() for folder in (tmp_path / "mix", one))
        again = load(family).pipeline.components[name]
        shake(again, 2)
        second = again.state_dict()
        assert all(torch.allclose(mixed[key], 0.25 * first[key] + 0.75 * second[key], atol=1e-6) for key in mixed)
    loaded = load(family, adapter=tmp_path / "mix")
    assert torch.equal(loaded.pipeline.components[names[-1]].state_dict()[key := min(mixed)], mixed[key])


def test_a_strength_of_a_denoiser(load, model_folders, tmp_path):
    tuned = load("flow")
    shake(tuned.net, 1, 0.05)
    tuned.net.save_pretrained(tmp_path / "transformer")
    told = ("--members", tmp_path / "transformer", "--weights", 0.4, "--method", "wise_ft")
    assert soup(*told, "--base", model_folders["flow"], "--out", tmp_path / "mix") == 0
    mixed = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "mix" / "transformer").state_dict()
    states = [load("flow").net.state_dict(), tuned.net.state_dict()]
    assert all(torch.allclose(mixed[key], torch.lerp(states[0][key], states[1][key], 0.4), atol=1e-6) for key in mixed)


def test_a_share_of_the_base_is_a_smaller_strength_in_every_method(load, model_folders, tmp_path):
    one = tuned_encoders(load("unet").pipeline, tmp_path / "one", 1, ["text_encoder"])
    before, after = (load_file(f / "text_encoder" / "model.safetensors") for f in (model_folders["unet"], one))
    halves = {
        "linear": ("base", one, "--weights", 0.5, 0.5),
        "dare": (one, "base", "--weights", 0.5, 0.5, "--method", "dare"),
        "ties": ("base", one, "--weights", 0.5, 0.5, "--method", "ties"),
        "alone": (one, "--weights", 0.5, "--method", "ties", "--any_sum", "true"),
    }
    for name, told in halves.items():
        out = tmp_path / name
        assert soup("--members", *told, "--base", model_folders["unet"], "--out", out) == 0
        mixed = load_file(out / "text_encoder" / "model.safetensors")
        assert all(torch.allclose(mixed[key], (before[key] + after[key]) / 2, atol=1e-6) for key in mixed), name


def test_a_weight_under_two_names(model_folders, tmp_path, capsys):
    """A base whose T5 file holds its embedding twice; its own soup is a member again, unequal copies are refused."""
    base, part = tmp_path / "base", "text_encoder_3"
    shutil.copytree(model_folders["flow"], base)
    file = base / part / "model.safetensors"
    state = load_file(file)
    twin = {"shared.weight", "encoder.embed_tokens.weight"}
    (stored,) = twin & state.keys()
    save_file({**state, **{name: state[stored].clone() for name in twin}}, file, {"format": "pt"})
    shutil.copytree(base / part, tmp_path / "one" / part)
    told = ("--weights", 0.5, 0.5, "--base", base)
    assert soup("--members", tmp_path / "one", "base", *told, "--out", tmp_path / "mix") == 0
    assert soup("--members", tmp_path / "mix", "base", *told, "--out", tmp_path / "again") == 0
    assert twin < load_file(tmp_path / "again" / part / "model.safetensors").keys()
    changed = {**load_file(file), "shared.weight": 2 * state[stored]}
    save_file(changed, tmp_path / "one" / part / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert soup("--members", tmp_path / "one", "base", *told, "--out", tmp_path / "no") == 2
    assert "must be equal, they are one weight" in capsys.readouterr().err


def test_the_config_says_the_precision_of_the_result(load, model_folders, tmp_path):
    """A half-precision base with a float32 member; transformers would load the result in half precision."""
    one = tuned_encoders(load("unet").pipeline, tmp_path / "one", 1, ["text_encoder"])
    shutil.copytree(model_folders["unet"], tmp_path / "base")
    load("unet").pipeline.text_encoder.half().save_pretrained(tmp_path / "base" / "text_encoder")
    assert soup("--members", one, "--weights", 1, "--base", tmp_path / "base", "--out", tmp_path / "mix") == 0
    mixed = load_file(tmp_path / "mix" / "text_encoder" / "model.safetensors")
    assert {value.dtype for value in mixed.values()} == {torch.float32}
    assert transformers.CLIPTextModel.from_pretrained(tmp_path / "mix" / "text_encoder").dtype == torch.float32


# --- what is refused ------------------------------------------------------------------------------------------------


def test_bad_members_are_refused_by_name(refused, adapters, load, model_folders, tmp_path):
    one, two = adapters("flow")
    assert "sum to 1.4, not to 1" in refused("flow", members=[one, two], weights=[0.7, 0.7])
    assert "2 members and 1 weights" in refused("flow", members=[one, two], weights=[1])
    assert "another model family" in refused("unet", members=[one, "base"], weights=[0.5, 0.5])
    assert "does not exist" in refused("flow", members=["nowhere", one], weights=[0.5, 0.5])
    assert "nothing to mix" in refused("flow", members=["base"], weights=[1])
    assert "give the rank" in refused("flow", "--method", "ties", members=[one, two], weights=[0.5, 0.5])
    (tmp_path / "empty").mkdir()
    assert "has neither a LoRA" in refused("flow", members=[tmp_path / "empty"], weights=[1])
    state = load_file(one / lora.DIFFUSERS_FILE)
    with safe_open(one / lora.DIFFUSERS_FILE, "pt") as opened:
        header = opened.metadata()
    key = min(state)
    for name, change, metadata, message in (
        ("nan", {key: state[key] * float("nan")}, header, "holds NaN or infinite values"),
        ("dora", {key.split(".lora_")[0] + ".lora_magnitude_vector": torch.ones(3)}, header, "DoRA"),
        (
            "bias",
            {},
            {**header, "lora_adapter_metadata": '{"transformer.lora_bias": true}'},
            "lora_bias is more than a",
        ),
        ("other", {}, {**header, "base_fingerprint": '{"transformer": "float32:0123456789abcdef"}'}, "another base"),
    ):
        save_file({**state, **change}, tmp_path / f"{name}.safetensors", metadata)
        assert message in refused("flow", members=[tmp_path / f"{name}.safetensors"], weights=[1]), name
    kohya = next((one / "comfyui").glob("*.safetensors"))
    alphas = {name: value for name, value in load_file(kohya).items() if name.endswith(".alpha")}
    for name, value in (("nan", float("nan")), ("inf", float("inf"))):
        broken = {**load_file(kohya), (first := min(alphas)): torch.full_like(alphas[first], value)}
        save_file(broken, tmp_path / f"alpha-{name}.safetensors", {"format": "pt"})
        said = refused("flow", members=[tmp_path / f"alpha-{name}.safetensors", two], weights=[0.5, 0.5])
        assert f"is {name}, not a finite number" in said
    strange = {"transformer.nowhere.to_q" + end: torch.ones(2, 2) for end in (lora.DOWN, lora.UP)}
    save_file(strange, tmp_path / "strange.safetensors", {"format": "pt"})
    assert "has no layer 'nowhere.to_q'" in refused("flow", members=[tmp_path / "strange.safetensors"], weights=[1])


def test_bad_encoders_are_refused_by_name(refused, load, model_folders, tmp_path):
    encoder = load("flow").pipeline.text_encoder
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(model_folders["flow"] / part, tmp_path / "other" / part)
    words = json.loads((tmp_path / "other/tokenizer/tokenizer.json").read_text(encoding="utf-8"))
    words["model"]["vocab"]["strange"] = 99
    (tmp_path / "other/tokenizer/tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    assert "tokenizer" in refused("flow", members=[tmp_path / "other"], weights=[1])
    config = transformers.CLIPTextConfig(**{**encoder.config.to_dict(), "intermediate_size": 16})
    transformers.CLIPTextModelWithProjection(config).save_pretrained(tmp_path / "shape" / "text_encoder")
    assert "has the shape [16], not [32]" in refused("flow", members=[tmp_path / "shape"], weights=[1])
    assert "is a CLIPTextModel" in refused("flow", members=[model_folders["unet"] / "text_encoder"], weights=[1])
    state = {f"strange.{key}": value for key, value in encoder.state_dict().items()}
    encoder.save_pretrained(tmp_path / "keys" / "text_encoder")
    save_file(state, tmp_path / "keys" / "text_encoder" / "model.safetensors", {"format": "pt"})
    assert "does not fit the text_encoder of" in (said := refused("flow", members=[tmp_path / "keys"], weights=[1]))
    assert "it lacks '" in said
    encoder.save_pretrained(tmp_path / "unnamed")
    assert "2 components of that class" in refused("flow", members=[tmp_path / "unnamed"], weights=[1])


def test_a_member_with_nan_weights_leaves_nothing_behind(refused, load, model_folders, tmp_path):
    """In all spaces, by the file's name; a command that failed can be given again."""
    pipeline, bad = load("flow").pipeline, tmp_path / "bad" / "text_encoder"
    pipeline.text_encoder.save_pretrained(bad)
    state = load_file(bad / "model.safetensors")
    save_file({**state, (key := max(state)): state[key] * float("nan")}, bad / "model.safetensors", {"format": "pt"})
    for words in (("--output", "model"), ("--space", "embedding")):
        said = refused("flow", *words, members=[bad.parent, "base"], weights=[0.5, 0.5])
        assert "text_encoder/model.safetensors' has NaN or infinite weights in 1 tensors" in said
        assert not (tmp_path / "refused").exists()


def test_a_soup_that_fails_or_is_killed_can_be_made_again(adapters, model_folders, tmp_path, monkeypatch):
    one, _ = adapters("flow")
    told = ("--members", one, "base", "--weights", 0.5, 0.5, "--output", "model", "--base", model_folders["flow"])
    with monkeypatch.context() as broken:
        broken.setattr("alignkit.generators.soups._write_component", lambda *_: load_file("nowhere"))
        with pytest.raises(FileNotFoundError):
            soup(*told, "--traceback", "--out", tmp_path / "mix")
    assert not (tmp_path / "mix").exists()
    (tmp_path / "mix" / ".partial" / "vae").mkdir(parents=True)
    assert soup(*told, "--out", tmp_path / "mix") == 0
    assert not (tmp_path / "mix" / ".partial").exists()
    assert (tmp_path / "mix" / "model_index.json").is_file()


def test_nothing_is_overwritten_and_a_dry_run_writes_nothing(refused, adapters, model_folders, tmp_path, capsys):
    one, _ = adapters("flow")
    told = ("--members", one, "base", "--weights", 0.5, 0.5, "--base", model_folders["flow"])
    assert soup(*told, "--out", tmp_path / "dry", "--dry-run") == 0
    assert "0.5 base by linear" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    assert soup(*told, "--out", tmp_path / "mine") == 2
    assert "never overwrites" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    full = tmp_path / "full" / "transformer"
    shutil.copytree(model_folders["flow"] / "transformer", full)
    assert "no adapter holds" in refused("flow", "--output", "adapter", members=[full], weights=[1])
    assert "full weights are written" in refused("flow", "--rank", 3, members=[full], weights=[1])
