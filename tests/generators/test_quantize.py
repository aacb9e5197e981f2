"""A frozen base in 8 bits under a LoRA, where torchao is installed; the refusals everywhere."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import load_file

from alignkit.adapters import lora
from alignkit.errors import AdapterError, ConfigError, UnknownNameError
from alignkit.generators import load_generator, quantize
from alignkit.records import Sampling

FAMILIES = ("unet", "flow", "pixart")
SAMPLING = Sampling(steps=2, guidance_scale=3.0, height=16, width=16)


@pytest.fixture
def int8(load):
    pytest.importorskip("torchao")
    return lambda family, **options: load(family, quantize="int8", **options)


def prediction(generator):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, *generator.latent_shape(16, 16), generator=rng)
    with torch.no_grad():
        return generator.predict(x, torch.tensor([0.3, 0.8]), generator.encode_prompts(["a ring", "a cross"]))


def base_weights(net):
    """What is frozen, as numbers."""
    return {
        name: (tensor.dequantize() if type(tensor.data) is not torch.Tensor else tensor).detach().clone()
        for name, tensor in net.named_parameters()
        if "lora_" not in name
    }


# --- without the packages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_package_is_named(load, monkeypatch, name, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == package else found(wanted))
    with pytest.raises(ConfigError, match=f"quantize: {name} needs the package {package}: pip install {package}"):
        load("unet", quantize=name)


def test_4_bits_need_a_gpu(load, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="quantize: nf4 needs a CUDA device; int8 runs everywhere"):
        load("unet", quantize="nf4")


def test_an_unknown_name_is_refused(load):
    with pytest.raises(UnknownNameError, match=r"unknown quantize 'int7'.* 'int8'"):
        load("unet", quantize="int7")
    assert set(quantize.QUANTIZERS) == {"int8", "nf4"}


@pytest.fixture
def as_if_quantized(load):
    """A generator that says so of itself, for what is refused before any weight is looked at."""
    generator = load("unet")
    generator.net.register_to_config(quantization_config={"quant_method": "torchao"})
    return generator


def test_nothing_is_merged_into_a_quantized_base(as_if_quantized, tmp_path):
    as_if_quantized.add_lora(2, None, None, 0.0)
    for refused in (as_if_quantized.merge_adapter, lambda: as_if_quantized.save_merged(tmp_path)):
        with pytest.raises(AdapterError, match="quantised, so nothing can be merged into it: load the model without"):
            refused()


@pytest.mark.parametrize("key", ["full_finetune", "save_merged"])
def test_its_weights_are_not_trained(as_if_quantized, ranked_rows, tmp_path, key):
    from alignkit.trainers.sft import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, **{key: True})
    with pytest.raises(ConfigError, match="a quantised model is trained with a LoRA: no full_finetune, no save_merged"):
        SFTTrainer(as_if_quantized, args, ranked_rows(2))


# --- with torchao ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_network_is_in_8_bits(load, int8, family):
    quantized, plain = int8(family), load(family)
    assert quantized.is_quantized
    assert not plain.is_quantized
    kinds = {name: type(parameter.data) for name, parameter in quantized.net.named_parameters()}
    assert any(kind is not torch.Tensor for name, kind in kinds.items() if name.endswith("to_q.weight"))
    assert all(type(parameter.data) is torch.Tensor for parameter in quantized.pipeline.text_encoder.parameters())
    difference = (prediction(quantized) - prediction(plain)).abs().max()
    assert 0 < difference < 0.1 * prediction(plain).abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precompute", [False, True])
def test_a_lora_trains_on_it(int8, ranked_rows, tmp_path, family, precompute):
    """The base stays as it is, the reference is the base exactly, and the export is an ordinary LoRA."""
    from alignkit.trainers.rankdpo import RankDPOConfig, RankDPOTrainer

    generator, base = int8(family), int8(family)
    before = base_weights(base.net)
    args = RankDPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_steps=3,
        lora_rank=2,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        save_strategy="no",
        precompute_reference=precompute,
        disable_tqdm=True,
    )
    RankDPOTrainer(generator, args, ranked_rows(4)).train()
    after = {name.replace(".base_layer", ""): value for name, value in base_weights(generator.net).items()}
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert not torch.equal(prediction(generator), prediction(base))
    with generator.reference():
        assert torch.equal(prediction(generator), prediction(base))
    generator.save_adapter(tmp_path / "adapter")
    exported = load_file(tmp_path / "adapter" / lora.DIFFUSERS_FILE)
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    assert torch.equal(prediction(int8(family, adapter=tmp_path / "adapter")), prediction(generator))


def test_the_export_loads_on_the_plain_model(load, int8, tmp_path):
    generator = int8("unet")
    generator.add_lora(2, 3.0, None, 0.0)
    with torch.no_grad():
        for name, parameter in generator.net.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    generator.save_adapter(tmp_path)
    plain = load("unet")
    plain.pipeline.load_lora_weights(tmp_path)
    drawn = [model.generate(["a ring"], [5], SAMPLING) for model in (generator, plain, load("unet"))]
    assert (drawn[0] - drawn[1]).abs().mean() < 0.5 * (drawn[1] - drawn[2]).abs().mean()


@pytest.mark.gpu
def test_4_bits_on_a_gpu(model_folders, tmp_path):
    """nf4: a step's gradients are the LoRA's, the reference is the base, the export an ordinary LoRA."""
    pytest.importorskip("bitsandbytes")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    generator = load_generator(model_folders["flow"], quantize="nf4", device="cuda")
    cond = generator.encode_prompts(["a ring"])
    x, t = torch.randn(1, *generator.latent_shape(16, 16), device="cuda"), torch.tensor([0.5], device="cuda")
    base = generator.predict(x, t, cond).detach()
    generator.add_lora(2, None, None, 0.0)
    generator.predict(x, t, cond).sum().backward()
    assert all("lora_" in name for name, p in generator.net.named_parameters() if p.grad is not None)
    with generator.reference():
        assert torch.equal(generator.predict(x, t, cond), base)
    generator.save_adapter(tmp_path)
