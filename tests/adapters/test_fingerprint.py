"""Fingerprints of base weights, and files that are equal for equal contents."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from alignkit.adapters import exports, lora
from alignkit.adapters.fingerprint import BASE_KEY, base_of, fingerprint, is_other_base, save_canonical

FILES = (lora.DIFFUSERS_FILE, "peft/adapter_model.safetensors", "peft/adapter_config.json", "comfyui/unet.safetensors")


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Conv2d(2, 3, 3), nn.BatchNorm1d(3)).to(dtype)


def test_equal_weights_have_equal_fingerprints():
    """Adapters, their state, the memory layout and the order of the tensors do not count."""
    expected = fingerprint(network())
    other = network()
    other[1].to(memory_format=torch.channels_last)
    lora.inject(other, rank=2, targets=["0"])
    lora.activate(other, {})
    assert fingerprint(other) == expected
    turned = nn.ModuleDict({name: network()[int(name)] for name in ("2", "0", "1")})
    assert fingerprint(turned) == expected


@pytest.mark.parametrize("name", ["0.weight", "1.bias", "2.running_mean"])
def test_any_changed_number_shows(name):
    net = network()
    before = fingerprint(net)
    tensor = net.state_dict()[name]
    tensor.view(-1)[-1] += 1e-6 + abs(tensor.view(-1)[-1]) * 1e-6
    assert fingerprint(net) != before


def test_a_sum_that_stays_is_no_disguise():
    net = network()
    before = fingerprint(net)
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight.flip(0))
    assert fingerprint(net) != before


def test_precisions_are_compared_in_the_lower_one():
    """A base trained in bf16 is recognised in float32; one in float32 cannot be checked against bf16 weights."""
    full, half = network(), network(torch.bfloat16)
    assert base_of(full).startswith("float32:")
    assert base_of(half).startswith("bfloat16:")
    assert fingerprint(full) != fingerprint(half)
    assert is_other_base(full, base_of(half)) is False
    assert is_other_base(half, base_of(full)) is None
    assert is_other_base(full, "") is None
    with torch.no_grad():
        full[0].weight[0, 0] += 0.1
    assert is_other_base(full, base_of(half)) is True
    assert is_other_base(half, base_of(full)) is None


def test_quantised_weights_have_a_fingerprint_but_are_no_base_to_compare():
    torchao = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(nn.Linear(32, 32))
    plain = base_of(net)
    torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
    assert base_of(net) == "quantized"
    assert len(fingerprint(net)) == 16
    assert is_other_base(net, plain) is None


def test_equal_contents_give_equal_files(tmp_path):
    """The library writes metadata in random order."""
    state = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    metadata = {"format": "pt", "name": "é", "z": "1", "a": "2", "k": "3"}
    contents = set()
    for number in range(10):
        turned = dict(sorted(state.items(), reverse=bool(number % 2)))
        save_canonical(turned, tmp_path / "x.safetensors", metadata)
        contents.add((tmp_path / "x.safetensors").read_bytes())
    assert len(contents) == 1
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == metadata


def stir(generator):
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in generator.net.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))


@pytest.fixture
def tuned(load):
    generator = load("unet")
    generator.add_lora(rank=2, alpha=5.0, targets=None, dropout=0.0)
    stir(generator)
    return generator


def test_every_export_holds_the_fingerprint_and_equal_weights_give_equal_files(tuned, load, tmp_path):
    base = base_of(load("unet").net)
    tuned.save_adapter(tmp_path / "one")
    again = load("unet")
    again.load_adapter(tmp_path / "one")
    tuned.save_adapter(tmp_path / "two")
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for name, part in zip(FILES, ("unet", "", None, "unet"), strict=True):
        if part is not None:
            with safe_open(tmp_path / "one" / name, framework="pt") as opened:
                assert json.loads(opened.metadata()[BASE_KEY]) == {part: base}


@pytest.mark.parametrize("layout", [".", "peft", "comfyui/unet.safetensors"])
def test_another_base_is_reported(tuned, load, tmp_path, caplog, layout):
    """The own base loads silently; a changed one loads with a warning that names both."""
    tuned.save_adapter(tmp_path)
    other = load("unet")
    other.load_adapter(tmp_path / layout)
    assert not caplog.records
    changed = load("unet")
    with torch.no_grad():
        changed.net.conv_out.bias[0] += 1e-3
    with caplog.at_level(logging.WARNING):
        changed.load_adapter(tmp_path / layout)
    message = caplog.text
    assert "was trained on another base" in message
    assert base_of(other.net) in message
    assert base_of(changed.net) in message
    assert lora.adapter_names(changed.net) == ["default"]


def test_a_file_without_a_fingerprint_loads_silently(tuned, load, tmp_path, caplog):
    exports.export_diffusers({"unet": tuned.net}, tmp_path)
    changed = load("unet")
    with torch.no_grad():
        changed.net.conv_out.bias[0] += 1e-3
    changed.load_adapter(tmp_path)
    assert not caplog.records
