"""Text encoders that are trained: prompts are encoded in the step, the reference sees the base model's conditioning."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from alignkit.errors import AdapterError, ConfigError
from alignkit.trainers.latents import conditioning
from alignkit.trainers.sft import SFTTrainer


@pytest.fixture
def learn(make):
    """Trainers whose text encoders learn."""
    return lambda family="unet", **given: make(family, train_text_encoder=True, **given)


@pytest.fixture
def stirred(learn):
    """The same, off the zero of LoRA's start in all parts."""

    def build(family="unet", **given):
        trainer = learn(family, **given)
        rng = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in trainer.generator.model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))
        return trainer

    return build


def text_gradients(trainer):
    named = trainer.generator.model.trained_encoders.named_parameters()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


@pytest.mark.parametrize("family", ["unet", "flow", "sdxl", "flux"])
@pytest.mark.parametrize("method", ["sft", "rankdpo"])
def test_training_moves_the_text_encoders(learn, family, method):
    trainer = learn(family, method=method)
    before = {name: p.clone() for name, p in trainer.generator.model.trained_encoders.named_parameters()}
    trainer.train()
    moved = {
        name
        for name, p in trainer.generator.model.trained_encoders.named_parameters()
        if not torch.equal(p, before[name])
    }
    assert moved
    assert all("lora_" in name for name in moved)


def test_the_step_encodes_the_rows_own_prompts(stirred, batch_of):
    """SFT's loss put together by hand: conditioning of the adapted encoder, null where a caption is dropped."""
    trainer = stirred(method="sft", caption_dropout=0.5, candidates="all")
    batch, generator = batch_of(trainer, 4), trainer.generator
    assert 0 < batch["dropped"].sum() < 4
    cond = generator.encode_prompts(
        ["" if off else text for text, off in zip(batch["prompt"], batch["dropped"], strict=True)]
    )
    expected = []
    for k in range(4):
        x0, noise, t = (batch[name][:, k] for name in ("latents", "noise", "t"))
        prediction = generator.predict(generator.add_noise(x0, noise, t), t, cond)
        expected.append((prediction - generator.target(x0, noise, t)).square().mean((1, 2, 3)))
    loss = trainer.method_loss(generator.model, batch).loss
    torch.testing.assert_close(loss, torch.stack(expected, -1).mean(-1))
    loss.mean().backward()
    assert text_gradients(trainer)


def test_the_reference_is_the_base_model_with_its_own_texts(make, stirred, batch_of):
    trainer, plain = stirred(), make("unet")
    batch = batch_of(trainer)
    ours = trainer.reference_errors(trainer.generator.model, batch)
    theirs = plain.reference_errors(plain.generator.model, batch_of(plain))
    assert torch.equal(ours, theirs)
    assert (trainer.errors(trainer.generator.model, batch) - ours).abs().max() > 1e-3


@pytest.mark.parametrize("bf16", [False, True])
def test_it_starts_at_the_reference(learn, batch_of, bf16):
    """Also under autocast: prompts are encoded in the step as they were for the cache."""
    trainer = learn(bf16=bf16)
    model, batch = trainer.generator.model, batch_of(trainer)
    with trainer.accelerator.autocast():
        assert torch.equal(trainer.errors(model, batch), trainer.reference_errors(model, batch))


def test_one_by_one_gives_the_same_gradients(stirred, batch_of):
    gradients = []
    for low_memory in (False, True):
        trainer = stirred(low_memory=low_memory)
        loss = trainer.method_loss(trainer.generator.model, batch_of(trainer)).loss
        loss.mean().backward()
        gradients.append(text_gradients(trainer))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_precomputed_references_are_the_same(learn, tmp_path):
    losses = []
    for precompute in (False, True):
        trainer = learn(precompute_reference=precompute, cache_dir=str(tmp_path / "cache"))
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(list((tmp_path / "cache").glob("latents-*/*.arrow"))) == 1


def test_checkpoints_and_exports_hold_all_parts(learn, load, tmp_path):
    trainer = learn(save_strategy="steps", save_steps=3)
    trainer.train()
    stored = load_file(tmp_path / "run-1" / "checkpoint-3" / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"net", "trained_encoders"}
    again = learn()
    again._load_from_checkpoint(str(tmp_path / "run-1" / "checkpoint-3"))
    ours, theirs = (t.generator.encode_prompts(["a ring"]).tensors for t in (again, trainer))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    trainer.export(tmp_path / "out")
    loaded = load("unet", adapter=tmp_path / "out").encode_prompts(["a ring"]).tensors
    assert all(torch.equal(value, theirs[name]) for name, value in loaded.items())


def test_an_adapter_with_text_encoders_is_trained_on(stirred, make, load, ranked_rows, batch_of, tmp_path):
    """Without the key too: it is part of the adapter. What is cached is what the base model makes of the prompts."""
    stirred().export(tmp_path / "first")
    plain = make("unet", method="sft")
    trainer = SFTTrainer(load("unet", adapter=tmp_path / "first"), plain.args, ranked_rows(4))
    ours, theirs = batch_of(trainer), batch_of(plain)
    assert torch.equal(ours["cond.encoder_hidden_states"], theirs["cond.encoder_hidden_states"])
    trainer.method_loss(trainer.generator.model, ours).loss.mean().backward()
    assert text_gradients(trainer)


def test_what_does_not_go_together(make, learn):
    with pytest.raises(ConfigError, match="no full_finetune, no fsdp"):
        learn(full_finetune=True)
    with pytest.raises(ConfigError, match="text_encoder_targets needs train_text_encoder"):
        make("unet", text_encoder_targets=["q_proj"])
    with pytest.raises(AdapterError, match="knows no text encoder"):
        learn("pixart")


def test_texts_stay_with_the_batch(learn, batch_of):
    """Repeated rows repeat what is cached; the prompts are encoded once each."""
    trainer = learn()
    texts, batch = conditioning(batch_of(trainer), trainer.null), batch_of(trainer)
    assert list(texts.repeat(2).texts) == batch["prompt"]
    assert torch.equal(texts.repeat(2).dropped, batch["dropped"])
    assert len(texts.repeat(2)) == 2 * len(batch["prompt"])
