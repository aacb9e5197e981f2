"""`compile` of a generator: what is compiled, that samples stay, and the refusals."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from alignkit.commands.specs import GeneratorSpec, build_generator, load_policy
from alignkit.errors import ConfigError
from alignkit.generators.members import Base, read_member
from alignkit.generators.soups import make_mixture
from alignkit.records import Sampling

SAMPLING = Sampling(steps=2, guidance_scale=3.0, height=16, width=16)


@pytest.fixture
def compiled(monkeypatch):
    """The names of the classes that are compiled, by a backend that is fast and needs no C++ compiler."""
    found, original = [], nn.Module.compile

    def by_light_backend(module, **options):
        found.append(type(module).__name__)
        original(module, backend="aot_eager", **options)

    monkeypatch.setattr(nn.Module, "compile", by_light_backend)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize(("family", "kinds"), [("unet", {"UNet2DConditionModel"}), ("flow", {"SD3Transformer2DModel"})])
def test_compiled_samples_are_those_of_the_plain_network(family, kinds, model_folders, compiled):
    spec = GeneratorSpec(model=str(model_folders[family]))
    faster = GeneratorSpec(model=spec.model, compile=True)
    images = [build_generator("one", one).generate(["a ring"], [1], SAMPLING) for one in (spec, faster)]
    assert set(compiled) == kinds
    torch.testing.assert_close(*images, atol=1e-4, rtol=0)
    assert spec.identity == faster.identity  # what was drawn by the one may be finished by the other


@pytest.mark.parametrize(
    ("family", "kinds"), [("film", 6 * ["WanTransformerBlock"]), ("wan_high", 2 * ["WanTransformer3DModel"])]
)
def test_blocks_are_compiled_where_most_weights_are_and_both_experts(family, kinds, model_folders, compiled):
    """The sandbox's `film` has six large blocks, the two tiny experts one small block each."""
    build_generator(
        "one", GeneratorSpec(model="sandbox:film" if family == "film" else str(model_folders[family]), compile=True)
    )
    assert compiled == kinds


def test_a_policy_is_not_compiled(model_folders, compiled):
    load_policy("one", GeneratorSpec(model=str(model_folders["unet"]), compile=True))
    assert not compiled


def test_refusals(model_folders, monkeypatch):
    spec = GeneratorSpec(model=str(model_folders["unet"]), compile=True)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"compile: true needs a C\+\+ compiler on a CPU: install g\+\+, or remove"):
        build_generator("one", spec)
    with pytest.raises(ConfigError, match="your own builder: its adapter, encoder, dtype, quantize, compile, family"):
        GeneratorSpec(model="mine:Painter", compile=True)


def test_a_mixture_that_acts_while_sampling_stays_plain(load, model_folders, tmp_path, compiled, caplog):
    load("unet").pipeline.text_encoder.save_pretrained(tmp_path / "tuned" / "text_encoder")
    model = str(model_folders["unet"])
    base = Base.open(model)
    make_mixture(base, [read_member(str(tmp_path / "tuned"), base)], [1.0], tmp_path / "mix", space="embedding")
    build_generator("one", GeneratorSpec(model=model, adapter=tmp_path / "mix", compile=True))
    assert "mix' acts while it samples, so 'one' is sampled without `compile`" in caplog.text
    assert not compiled
