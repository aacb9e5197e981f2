"""Mixtures in memory against the same mixtures written and loaded again: all spaces, windows, and back to the base."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_adapters import shake
from tiny_families import FAMILIES

from alignkit.adapters import exports
from alignkit.adapters.mixture import BASE
from alignkit.commands.specs import GeneratorSpec, build_generator
from alignkit.diffusion.tuned_steps import ALL_STEPS, TunedSteps
from alignkit.errors import AdapterError, ConfigError
from alignkit.generators.live import LiveMix, Recipe
from alignkit.generators.members import Base, read_member
from alignkit.generators.soups import make_mixture, make_soup
from alignkit.generators.tuned_encoders import save_tuned
from alignkit.records import Sampling

CLOSE = 1e-4  # largest pixel difference, float32
FAMILY = "unet"
JOB = (
    ["a red circle"],
    (5,),
    Sampling(steps=4, guidance_scale=3.0, height=FAMILIES[FAMILY].side, width=FAMILIES[FAMILY].side),
)


@pytest.fixture(scope="module")
def folders(load, tmp_path_factory):
    """Two LoRAs, one with a text encoder, and the text encoder and the U-Net of two other trainings."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("one", "two", "encoder", "net")}
    for number, name in enumerate(("one", "two")):
        generator = load(FAMILY)
        generator.add_lora(2 + number, 5.0, None, 0.0)
        if number:
            generator.add_text_lora(2, 3.0, None, 0.0)
        shake(generator.model, number, 0.1, only="lora_")  # with larger weights rounding grows along the chain
        generator.save_adapter(made[name])
    generator = load(FAMILY)
    for name, encoder in generator.conditioner.encoders.items():
        shake(encoder, 2, 0.1)
        encoder.save_pretrained(made["encoder"] / name)
    shake(generator.net, 3, 0.05)
    generator.net.save_pretrained(made["net"] / "unet")
    return made


@pytest.fixture(scope="module")
def base(model_folders):
    return Base.open(str(model_folders[FAMILY]))


@pytest.fixture(scope="module")
def live(load, folders, base):
    return LiveMix(load(FAMILY), base, {name: read_member(str(folder), base) for name, folder in folders.items()})


MIXTURES = [
    Recipe(space="weights", weights={"one": 0.7, "two": 0.3}),
    Recipe(space="weights", weights={"one": 1.4, BASE: -0.4}),
    Recipe(space="weights", weights={"encoder": 0.6, "net": 0.4}),
    Recipe(space="weights", weights={"net": 0.5, "two": 0.3, BASE: 0.2}),
    Recipe(space="embedding", weights={"encoder": 0.6, BASE: 0.4}),
    Recipe(space="embedding", weights={"encoder": 1.0}, window=TunedSteps(0.5, 1.0)),
    Recipe(space="prediction", weights={"one": 0.5, "net": 0.3, BASE: 0.2}),
    Recipe(space="prediction", weights={"one": 1.0}, window=TunedSteps(0.0, 0.5)),
]


def test_images_are_those_of_the_written_mixtures(live, folders, base, model_folders, tmp_path):
    """One after the other on the same loaded base, which stays what it was."""
    plain = build_generator("base", GeneratorSpec(model=str(model_folders[FAMILY]))).generate(*JOB)
    nothing = Recipe(space="weights", weights={BASE: 1.0})
    for number, recipe in enumerate(MIXTURES):
        out = tmp_path / str(number)
        given = {name: weight for name, weight in recipe.weights.items() if weight}
        members = [read_member(str(folders.get(name, name)), base) for name in given]
        if recipe.space == "weights":
            make_soup(base, members, list(given.values()), out)
        else:
            make_mixture(base, members, list(given.values()), out, space=recipe.space, window=recipe.window)
        written = build_generator("mix", GeneratorSpec(model=str(model_folders[FAMILY]), adapter=out)).generate(*JOB)
        assert (live.generate(recipe, *JOB) - written).abs().max() <= CLOSE, recipe
        assert (written - plain).abs().max() > 20 * CLOSE, recipe
        assert torch.equal(live.generate(nothing, *JOB), live.generate(replace(nothing, space=recipe.space), *JOB))
        assert (live.generate(nothing, *JOB) - plain).abs().max() <= CLOSE, recipe


def test_an_encoder_whose_files_have_other_names_than_the_network(load, model_folders, tmp_path):
    """Qwen2.5-VL of Qwen-Image: whole in memory, and a LoRA of it written as a component."""
    base, told = Base.open(str(model_folders["qwen_image"])), FAMILIES["qwen_image"]
    job = (["a red circle"], (5,), Sampling(steps=2, guidance_scale=3.0, height=told.side, width=told.side))
    tuned = load("qwen_image")
    tuned.conditioner.add_lora(2)
    shake(tuned.conditioner.encoders["text_encoder"], 1, 0.3, only="lora_")
    expected = tuned.generate(*job)
    save_tuned(tuned, tmp_path / "whole")
    exports.export_peft(tuned.conditioner.encoders["text_encoder"], tmp_path / "lora" / "text_encoder", base_model="")
    assert (load("qwen_image").generate(*job) - expected).abs().max() > 20 * CLOSE
    whole = read_member(str(tmp_path / "whole"), base)
    found = LiveMix(load("qwen_image"), base, {"one": whole})
    assert (found.generate(Recipe(space="weights", weights={"one": 1.0}), *job) - expected).abs().max() <= CLOSE
    make_soup(base, [read_member(str(tmp_path / "lora"), base)], [1.0], tmp_path / "mix", output="components")
    written = load("qwen_image", adapter=tmp_path / "mix")
    assert (written.generate(*job) - expected).abs().max() <= CLOSE


@pytest.mark.parametrize(
    ("recipe", "kind", "message"),
    [
        (Recipe(space="weights", weights={"one": 0.7, "two": 0.4}), ConfigError, "sum to 1.1, not to 1"),
        (Recipe(space="weights", weights={"one": float("nan")}), ConfigError, "a weight is nan"),
        (Recipe(space="weights", weights={"one": 1.0}, window=TunedSteps(0.5, 1)), ConfigError, "a window is for"),
        (Recipe(space="embedding", weights={"one": 1.0}), AdapterError, "a mixture of embeddings takes"),
        (Recipe(space="prediction", weights={"encoder": 1.0}), AdapterError, "a mixture of predictions takes"),
        (Recipe(space="embedding", weights={"encoder": 1.0}, window=TunedSteps(0, 0.1)), ConfigError, "none of the 4"),
    ],
)
def test_what_no_mixture_has_is_refused(live, recipe, kind, message):
    with pytest.raises(kind, match=message):
        live.generate(recipe, *JOB)
    assert live.generator.conditioner.window is None


def test_a_member_of_a_component_that_is_not_loaded(load, base, folders):
    generator = load(FAMILY)
    generator.pipeline.register_modules(text_encoder=None)
    with pytest.raises(AdapterError, match=r"member 'encoder' has a text_encoder, which .* was loaded without"):
        LiveMix(generator, base, {"encoder": read_member(str(folders["encoder"]), base)})


def test_all_steps_are_the_default():
    assert Recipe(space="embedding", weights={}).window == ALL_STEPS
