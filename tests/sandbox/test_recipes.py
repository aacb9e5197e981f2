"""The recipes of the sandbox's weights, shortened to a step or two: they run, save what loads, and continue."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel

from alignkit import cli
from alignkit.commands.sandbox import NEEDS, SandboxJob, _trainer
from alignkit.generators import load_generator, wrap
from alignkit.records import Sampling
from alignkit.sandbox import flow, generators, recipes
from alignkit.sandbox.scenes import POLICY_NOISE
from alignkit.trainers.checkpoint import find_checkpoint
from rewards.preference import PreferenceConfig, PreferenceModel

SHORT = recipes.Recipe(steps=2, batch=2, learning_rate=1e-3, seed=1, warmup=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    recipes.train_vae(folder / "vae", folder / "work" / "vae", stages=(SHORT, SHORT))
    return folder


def test_the_autoencoder_scales_its_latents(models):
    stored = load_file(models / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    vae = AutoencoderKL.from_pretrained(models / "vae")
    assert vae.config.scaling_factor != AutoencoderKL().config.scaling_factor


def test_clip(tmp_path):
    recipes.train_clip(tmp_path / "clip", tmp_path / "work", SHORT)
    assert CLIPModel.from_pretrained(tmp_path / "clip").dtype == torch.float16


def test_a_head_starts_from_the_reader(tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.HEADS, "careful", SHORT)
    reader, head = tmp_path / "reader", tmp_path / "careful"
    recipes.train_reader(PreferenceModel, PreferenceConfig, reader, tmp_path / "work" / "r", stages=(SHORT,))
    recipes.train_head("careful", PreferenceModel, reader, head, tmp_path / "work" / "h")
    before, after = (load_file(folder / "model.safetensors") for folder in (reader, head))
    moved = [(before[name].float() - after[name].float()).abs().max() for name in before]
    assert 0 < max(moved) < 0.01  # two steps away, so it started there


def test_the_policy_and_the_adapter_that_undoes_it(models, tmp_path):
    recipe = generators.GeneratorRecipe("new unet", 4, 1, 2, 1e-3, 201, error_space="native")
    train = functools.partial(generators.train_generator, models_dir=models)
    train("unet_clean", out=models / "unet_clean", work=tmp_path / "clean", recipe=recipe)
    last = replace(recipe, start="unet_clean", noise=POLICY_NOISE, adapter=True, learning_rate=20.0, steps=2)
    train("unet", out=models / "unet", work=tmp_path / "unet", recipe=last)
    clean, policy = (load_generator(models / name).net.state_dict() for name in ("unet_clean", "unet"))
    back = load_generator(models / "unet", adapter=models / "unet" / "clean_adapter")
    back.merge_adapter()
    restored = back.net.state_dict()
    moved = max((policy[name] - clean[name]).abs().max() for name in clean)
    assert moved > 0.05
    assert max((restored[name] - clean[name]).abs().max() for name in clean) < 0.02 * moved
    assert DiffusionPipeline.from_pretrained(models / "unet", dtype=torch.float32)


def test_the_flow_generator_trains_its_text_encoders_and_the_policy_does_not(models, tmp_path):
    flow.train_flow(models, models / "flow_clean", tmp_path / "clean", SHORT, scenes=4)
    recipe = replace(generators.RECIPES["flow"], scenes=4, steps=1, batch=2)
    generators.train_generator("flow", models, models / "flow", tmp_path / "flow", recipe)
    towers = [load_file(models / name / "text_encoder" / "model.safetensors") for name in ("flow_clean", "flow")]
    assert all(torch.equal(towers[0][name], tensor) for name, tensor in towers[1].items())
    torch.manual_seed(SHORT.seed)
    untrained = generators.build_flow(AutoencoderKL.from_pretrained(models / "vae")).text_encoder.half().state_dict()
    trained = {name: tensor for name, tensor in untrained.items() if tensor.is_floating_point()}
    assert all((towers[0][name] - tensor).abs().max() > 0 for name, tensor in trained.items() if "proj" in name)
    generator = load_generator(models / "flow", adapter=models / "flow" / "clean_adapter")
    sampling = Sampling(steps=1, guidance_scale=2.5, height=64, width=64)
    assert generator.generate(["a red circle"], [1], sampling).isfinite().all()


def test_the_classifier_reads_the_image_tokens_of_the_middle_block(models, tmp_path, monkeypatch):
    """Its loss is added, and reaches both text encoders and the first half of the transformer, nothing later."""
    generator = wrap(generators.build_flow(AutoencoderKL.from_pretrained(models / "vae")))
    objective = flow.FlowObjective(generator)
    scenes = flow.Scenes(2, seed=1)
    items = flow.Noised(scenes, scenes.encoded(generator, tmp_path / "scenes.safetensors"), 2)
    batch = flow.collate([items[0], items[1]])
    whole = objective(**batch)["loss"]
    named = torch.nn.functional.cross_entropy(objective.places(objective._tokens).mT, batch["labels"])
    monkeypatch.setattr(flow, "PLACES", 0.0)
    torch.testing.assert_close(whole - objective(**batch)["loss"], 0.3 * named)
    objective.places(objective._tokens).square().mean().backward()
    blocks = generator.net.transformer_blocks
    reached = [any(weight.grad is not None for weight in block.parameters()) for block in blocks]
    assert reached == [index <= len(blocks) // 2 for index in range(len(blocks))]
    assert all(tower.text_projection.weight.grad is not None for tower in objective.towers)


def test_items_depend_on_their_index_alone(models, tmp_path):
    generator = wrap(generators.build_flow(AutoencoderKL.from_pretrained(models / "vae")))
    scenes = flow.Scenes(3, seed=2)
    encoded = scenes.encoded(generator, tmp_path / "scenes.safetensors")
    first, again = (flow.Noised(scenes, encoded, 5)[3] for _ in range(2))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first if name != "prompt")
    assert first["prompt"] == again["prompt"]
    shown = [scenes.caption(index) for index in range(3)]
    assert first["prompt"] in ("", *shown)
    assert set(first["labels"].unique().tolist()) <= set(range(flow.KINDS))


def test_a_torn_checkpoint_is_not_continued(tmp_path, monkeypatch):
    """Trainer takes the newest folder, whole or not."""
    work = tmp_path / "work"
    (work / "checkpoint-1").mkdir(parents=True)
    (work / "checkpoint-1" / "trainer_state.json").write_text("{", encoding="utf-8")
    with pytest.warns(UserWarning, match="is refused"):
        recipes.train_clip(tmp_path / "clip", work, SHORT)
    assert find_checkpoint(work) is not None


def test_the_command_keeps_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "CLIP", SHORT)
    monkeypatch.setattr(recipes.train_clip, "__defaults__", (SHORT,))
    words = ["sandbox", "train", "clip", "--work", str(tmp_path / "work"), "--out"]
    mine = tmp_path / "mine" / "clip"
    mine.mkdir(parents=True)
    assert cli.main([*words, str(tmp_path / "mine")]) == 2
    assert "stays as it is" in capsys.readouterr().err
    assert cli.main([*words, str(tmp_path / "one")]) == 0
    assert cli.main([*words, str(tmp_path / "two")]) == 0  # trained already: copied
    files = [(tmp_path / name / "clip" / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert not list(mine.iterdir())


RECIPES = {
    "vae": "recipes.train_vae",
    "reader": "recipes.train_reader",
    "careful": "recipes.train_head",
    "showy": "recipes.train_head",
    "unet_third": "generators.train_generator",
    "unet": "generators.train_generator",
    "flow_clean": "flow.train_flow",
    "flow": "generators.train_generator",
    "vlm": "interviews.train_vlm",
    "vlm_corrections": "corrections.train_corrections",
    "film_vae": "film_vae.train_vae",
    "film_clean": "film.train_clean",
    "film": "film.train_policy",
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_name_starts_its_own_recipe(name, tmp_path, monkeypatch):
    called = []
    for path in {*RECIPES.values()}:
        monkeypatch.setattr(f"alignkit.sandbox.{path}", lambda *given, path=path: called.append((path, given)))
    out, work = tmp_path / "out", tmp_path / "work"
    for needed in NEEDS[name]:
        (out / needed).mkdir(parents=True)
    result = work / name / "result"
    result.mkdir(parents=True)
    _trainer(SandboxJob(name=name, out=out, work=work), result)()
    ((path, given),) = called
    assert path == RECIPES[name]
    assert given[-2:] == (result, work / name)
    if path.startswith("generators") or name in ("careful", "showy"):
        assert given[0] == name
    if name == "vlm_corrections":
        assert given[1] == {needed: out / needed for needed in ("vlm", "unet", "flow")}
