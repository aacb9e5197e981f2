"""The text side: all encoders of a pipeline, frozen until trained, with a reference and plain components as files."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from two_processes import ended, start_script

from alignkit.adapters import lora
from alignkit.errors import AdapterError, ConfigError, UnknownNameError
from alignkit.records import Conditioning, Texts

WORKER = Path(__file__).with_name("conditioner_worker.py")
PROMPTS, loss_of = map(runpy.run_path(str(WORKER)).get, ("PROMPTS", "loss_of"))
# One pipeline for each kind of encoder: CLIP; CLIP and T5; UMT5; Gemma; Qwen.
KINDS = ("unet", "flow", "wan", "sana", "qwen_image")


def stir(module, size=0.3):
    """Random adapter weights, or changed weights where there is no adapter."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in module.parameters() if p.requires_grad):
            parameter.add_(size * torch.randn(parameter.shape, generator=rng))


def encode(conditioner, **options):
    with torch.no_grad():
        return conditioner(PROMPTS, **options)


def same(first, second):
    pairs = [(first.tensors, second.tensors), (first.null, second.null)]
    return all(torch.equal(value, other[name]) for one, other in pairs for name, value in one.items())


# --- records --------------------------------------------------------------------------------------------------------


def test_controls_stay_with_their_rows():
    """Dropping the text or taking the unconditional side changes no control."""
    rows, null, scale = torch.arange(12.0).reshape(3, 4), torch.full((1, 4), -1.0), torch.tensor([1.0, 2.0, 3.0])
    cond = Conditioning({"a": rows}, {"a": null}).with_controls({"guidance": scale})
    assert torch.equal(cond.drop(torch.tensor([True, False, True])).control("guidance"), scale)
    assert torch.equal(cond.unconditional().control("guidance"), scale)
    assert torch.equal(cond.unconditional().tensors["a"], null.expand(3, 4))
    assert torch.equal(cond.repeat(2).control("guidance"), scale[[0, 0, 1, 1, 2, 2]])
    assert torch.equal(cond.rows([2, 0]).control("guidance"), scale[[2, 0]])
    assert cond.map(torch.Tensor.double).control("guidance").dtype == torch.float64
    moved = cond.to("meta")
    assert {t.device.type for t in (moved.tensors["a"], moved.null["a"], moved.control("guidance"))} == {"meta"}
    assert cond.with_controls({"guidance": -scale}).control("guidance")[0] == -1
    with pytest.raises(ConfigError, match=r"no control 'target_time', only \['guidance'\]"):
        cond.control("target_time")


@pytest.mark.parametrize(("family", "name", "value"), [("flux", "guidance", 3.5), ("anyflow", "target_time", 0.4)])
def test_controls_of_training_are_explicit(load, family, name, value):
    generator, t = load(family), torch.tensor([0.4, 0.4])
    frames = (5,) if generator.modality == "video" else ()
    cond, x = generator.encode_prompts(PROMPTS), torch.zeros(2, *generator.latent_shape(16, 16, *frames))
    controls = generator.training_controls(t)
    assert controls.keys() == {name}
    torch.testing.assert_close(controls[name], torch.full((2,), value))
    with torch.no_grad():
        expected = generator.model(x, t, cond.with_controls(controls))
        assert torch.equal(generator.predict(x, t, cond), expected)
        other = cond.with_controls({name: controls[name] / 4})
        assert not torch.equal(generator.predict(x, t, other), expected)
        dropped = other.drop(torch.tensor([True, True]))
        assert torch.equal(generator.model(x, t, dropped), generator.model(x, t, other.unconditional()))
        with pytest.raises(ConfigError, match=f"no control '{name}'"):
            generator.model(x, t, cond)


# --- the module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_a_lora_on_every_encoder(load, model_folders, family, tmp_path):
    """Default targets exist for each; the reference is the base; the files load as components of the pipeline."""
    torch.manual_seed(0)  # of the adapters' start; merging rounds, by how much hangs on the values
    generator, base = load(family), encode(load(family).conditioner)
    conditioner = generator.conditioner
    assert same(encode(conditioner), base)
    assert not any(parameter.requires_grad for parameter in conditioner.parameters())
    with pytest.raises(AdapterError, match=r"no reference: .*add a LoRA"), conditioner.as_reference():
        pass
    with pytest.raises(AdapterError, match="nothing to save"):
        conditioner.save(tmp_path)
    conditioner.add_lora(rank=2)
    assert all(lora.lora_layers(encoder) for encoder in conditioner.encoders.values())
    assert {name.split(".lora_")[0] == name for name, p in conditioner.named_parameters() if p.requires_grad} == {False}
    assert same(encode(conditioner), base)
    stir(conditioner)
    tuned = encode(conditioner)
    assert not torch.equal(tuned.tensors["encoder_hidden_states"], base.tensors["encoder_hidden_states"])
    if base.null["encoder_hidden_states"].any():  # the tiny Gemma embeds an empty prompt as zeros
        assert not torch.equal(tuned.null["encoder_hidden_states"], base.null["encoder_hidden_states"])
    assert same(encode(conditioner, reference=True), base)
    with conditioner.as_reference():
        assert same(encode(conditioner, reference=True), base)  # nested
        assert same(encode(conditioner), base)
    with generator.reference():
        assert same(encode(conditioner), base)
    assert same(encode(conditioner), tuned)
    folders = conditioner.save(tmp_path)
    assert [folder.name for folder in folders] == list(conditioner.encoders)
    vanilla = load(family)
    parts = {folder.name: type(vanilla.pipeline.components[folder.name]) for folder in folders}
    vanilla.pipeline.register_modules(**{name: kind.from_pretrained(tmp_path / name) for name, kind in parts.items()})
    for name, tensor in encode(vanilla.conditioner).tensors.items():
        torch.testing.assert_close(tensor, tuned.tensors[name], rtol=1e-3, atol=1e-4)
    assert conditioner.trained.keys() == conditioner.encoders.keys()


def test_full_tuning_keeps_a_frozen_copy(load, tmp_path):
    generator = load("flow")
    conditioner, base = generator.conditioner, encode(generator.conditioner)
    names = set(conditioner.state_dict())
    conditioner.unfreeze(["text_encoder_2", "text_encoder_3"])
    assert set(conditioner.state_dict()) == names  # the copies are no part of the module
    stir(conditioner, 0.05)
    tuned = encode(conditioner)
    assert not same(tuned, base)
    assert same(encode(conditioner, reference=True), base)
    assert same(encode(conditioner), tuned)
    loss_of(conditioner(PROMPTS)).backward()
    with_gradient = {name.split(".")[1] for name, p in conditioner.named_parameters() if p.grad is not None}
    assert with_gradient == {"text_encoder_2", "text_encoder_3"}
    assert [folder.name for folder in conditioner.save(tmp_path)] == ["text_encoder_2", "text_encoder_3"]
    again = load("flow").pipeline.text_encoder_2.from_pretrained(tmp_path / "text_encoder_2").state_dict()
    assert all(
        torch.equal(value, again[name]) for name, value in generator.pipeline.text_encoder_2.state_dict().items()
    )
    with pytest.raises(AdapterError, match="'text_encoder_2' is trained already"):
        conditioner.add_lora(rank=2)
    with pytest.raises(UnknownNameError, match=r"no text encoder 'text_encoder_4'; the pipeline has"):
        conditioner.unfreeze(["text_encoder_4"])


def test_the_null_condition_is_trained_too(load):
    conditioner = load("unet").conditioner
    conditioner.add_lora(rank=2)
    stir(conditioner)
    conditioner(PROMPTS).null["encoder_hidden_states"].square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in conditioner.parameters())


@pytest.mark.parametrize("full", [False, True])
def test_the_reference_in_a_checkpoint(load, full):
    """The forward that the backward pass repeats uses the base encoders too."""
    generator, base = load("unet"), load("unet")
    generator.conditioner.unfreeze() if full else generator.conditioner.add_lora(rank=2)
    stir(generator.conditioner, 0.1)
    scale = torch.ones(()).requires_grad_()

    def loss(scale, source, **options):
        return (scale * source.conditioner(PROMPTS, **options).tensors["encoder_hidden_states"]).square().sum()

    (grad,) = torch.autograd.grad(checkpoint(loss, scale, generator, reference=True, use_reentrant=False), scale)
    (expected,) = torch.autograd.grad(loss(scale, base), scale)
    (policy,) = torch.autograd.grad(loss(scale, generator), scale)
    torch.testing.assert_close(grad, expected)
    assert (policy - expected).abs() > 1e-3


def test_an_adapter_that_no_loader_reads_is_not_lost(load, tmp_path):
    """T5's in an SD3 adapter: its encoder is saved instead."""
    generator = load("flow")
    generator.add_lora(2, None, None, 0.0)
    generator.conditioner.add_lora(rank=2, encoders=["text_encoder_3"])
    with pytest.raises(AdapterError, match=r"does not read an adapter of \['text_encoder_3'\]; save"):
        generator.save_adapter(tmp_path)
    stir(generator.conditioner)
    tuned = encode(generator.conditioner)
    generator.merge_adapter()
    assert not generator.adapted
    torch.testing.assert_close(
        encode(generator.conditioner).tensors["encoder_hidden_states"], tuned.tensors["encoder_hidden_states"]
    )


def test_texts_are_encoded_anew_and_the_reference_uses_the_cache(load):
    """Three rows per prompt; the dropped prompt gets the tuned encoder's own null condition."""
    generator = load("unet")
    cached = encode(generator.conditioner)
    generator.add_lora(2, None, None, 0.0)
    generator.add_text_lora(2, None, None, 0.0)
    stir(generator.model)
    dropped = torch.tensor([False, True])
    texts = Texts(PROMPTS, dropped, cached.drop(dropped)).repeat(3)
    x, t = torch.randn(6, *generator.latent_shape(16, 16)), torch.full((6,), 0.5)
    with torch.no_grad():
        expected = generator.model(x, t, encode(generator.conditioner).drop(dropped).repeat(3))
        assert torch.equal(generator.model(x, t, texts), expected)
        base = load("unet").model(x, t, cached.drop(dropped).repeat(3))
        assert torch.equal(generator.model(x, t, texts, reference=True), base)
        assert not torch.equal(expected, base)


def test_idle_parts_are_all_but_denoisers_and_trained_text_encoders(load):
    """One trained encoder keeps the others too; of Wan 2.2's two denoisers neither is idle."""
    generator = load("flow")
    pipeline = generator.pipeline
    encoders = {pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3}
    assert set(generator.idle_parts) == {pipeline.vae, *encoders}
    generator.conditioner.add_lora(2, encoders=["text_encoder"])
    assert generator.idle_parts == [pipeline.vae]
    wan = load("wan_high")
    assert set(wan.idle_parts) == {wan.pipeline.vae, wan.pipeline.text_encoder}


def test_generate_leaves_the_modes_as_they_were(load):
    from alignkit.records import Sampling

    generator = load("unet")
    assert not generator.conditioner.training
    generator.conditioner.train()
    generator.generate(PROMPTS[:1], [1], Sampling(steps=1, height=16, width=16))
    assert generator.pipeline.text_encoder.training


def test_two_processes_share_gradients(load, model_folders, tmp_path):
    """DDP and FSDP2 wrap the module: each process has its own prompt, all get the mean of the gradients."""
    arguments = [str(model_folders["unet"]), str(tmp_path / "store"), str(tmp_path)]
    outs = [tmp_path / "out-0.txt", tmp_path / "out-1.txt"]
    workers = [start_script(WORKER, [*arguments, rank], out) for rank, out in enumerate(outs)]
    assert [ended(worker) for worker in workers] == [0, 0], "".join(out.read_text() for out in outs)
    conditioner = load("unet").conditioner
    conditioner.unfreeze()
    (sum(loss_of(conditioner([prompt])) for prompt in PROMPTS) / 2).backward()
    expected = {name: p.grad for name, p in conditioner.named_parameters() if p.grad is not None}
    for kind in ("ddp", "fsdp"):
        for rank in (0, 1):
            grads = load_file(tmp_path / f"{kind}-{rank}.safetensors")
            assert grads.keys() == expected.keys()
            for name, grad in grads.items():
                torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
