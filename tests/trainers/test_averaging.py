"""The averaged reference: its equation, its errors, exact resumes, and what it does not go with."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from alignkit.errors import CheckpointMismatchError, ConfigError
from alignkit.trainers.averaging import FILE

DECAY = 0.75


@pytest.fixture
def run(make, tmp_path):
    """Builds a trainer with an averaged reference in one folder, a row a step, with a checkpoint every 2 steps."""

    def build(folder="run", **changes):
        defaults = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2, "reference_ema": DECAY}
        settings = {**defaults, "loss": "linear_dpo", "max_steps": 4, **changes}
        return make("flow", **settings, output_dir=str(tmp_path / folder))

    return build


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer._trainable().items()}


@pytest.mark.parametrize("full", [False, True])
def test_the_average_follows_its_equation(run, full):
    """average_n = decay average_(n-1) + (1 - decay) weight_n from the weights of every step, and no frozen copy."""
    trainer = run(full_finetune=full, save_strategy="no")
    assert not trainer.generator.model._frozen
    expected = weights(trainer)

    class Watch(torch.nn.Module):
        def __call__(self, *_, **__):
            for name, weight in weights(trainer).items():
                expected[name] = DECAY * expected[name] + (1 - DECAY) * weight

    watch, update = Watch(), trainer._average.on_optimizer_step
    trainer._average.on_optimizer_step = lambda *a, **k: (update(*a, **k), watch())[0]
    trainer.train()
    found = trainer._average.averages
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(found[name], value) for name, value in weights(trainer).items())


def test_the_reference_is_the_policy_with_averaged_weights(run, batch_of, stir):
    """At first the policy itself; after the policy moved, what it was; weights and gradients are untouched."""
    trainer = run()
    batch = batch_of(trainer, 2)
    with torch.no_grad():
        before = trainer.errors(trainer.model, batch)
        assert torch.equal(trainer.reference_errors(trainer.model, batch), before)
        stir(trainer)
        moved, here = trainer.errors(trainer.model, batch), weights(trainer)
        assert not torch.equal(moved, before)
        assert torch.equal(trainer.reference_errors(trainer.model, batch), before)
        assert torch.equal(trainer.errors(trainer.model, batch), moved)
    assert all(torch.equal(value, here[name]) for name, value in weights(trainer).items())


@pytest.mark.parametrize("full", [False, True])
def test_autocast_keeps_no_cast_of_the_average(run, batch_of, stir, full):
    """Autocast caches casts by parameter: those of the reference pass must not serve the policy."""
    trainer = run(full_finetune=full)
    trainer._average.averages  # noqa: B018 - begins here
    stir(trainer)
    batch = batch_of(trainer, 2)
    with torch.autocast("cpu", torch.bfloat16):
        alone = trainer.errors(trainer.model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        trainer.reference_errors(trainer.model, batch)
        after = trainer.errors(trainer.model, batch)
    assert torch.equal(after, alone)
    trained = list(trainer._trainable().values())
    one, other = (torch.autograd.grad(e.sum(), trained, allow_unused=True) for e in (alone, after))
    assert any(g is not None and g.abs().max() > 0 for g in other)
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("full", [False, True])
def test_a_resumed_run_has_the_average_of_the_unbroken_one(run, full):
    """Bit for bit, and the policy too, whose weights depend on the average."""
    unbroken = run("unbroken", full_finetune=full)
    unbroken.train()
    run(max_steps=2, full_finetune=full).train()
    resumed = run(full_finetune=full)
    resumed.train(resume_from_checkpoint=True)
    for one, other in ((unbroken._average.averages, resumed._average.averages), (weights(unbroken), weights(resumed))):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    stored = load_file(f"{resumed.args.output_dir}/checkpoint-4/{FILE}")
    assert all(torch.equal(value, stored[name]) for name, value in resumed._average.averages.items())


@pytest.mark.parametrize(
    ("before", "after", "advice"), [(DECAY, None, "set reference_ema"), (None, DECAY, "leave refe")]
)
def test_a_resume_with_another_kind_of_reference_is_refused(run, before, after, advice):
    run(max_steps=2, reference_ema=before).train()
    with pytest.raises(CheckpointMismatchError, match=rf"checkpoint-2' was trained with .* reference; {advice}"):
        run(reference_ema=after).train(resume_from_checkpoint=True)


def test_an_export_holds_the_policy_alone(run, tmp_path):
    trainer = run(save_strategy="no", max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    plain = run("plain", save_strategy="no", max_steps=2, reference_ema=None)
    plain.train()
    plain.save_model(str(tmp_path / "out_plain"))
    names = [{p.relative_to(tmp_path / out) for p in (tmp_path / out).rglob("*")} for out in ("out", "out_plain")]
    assert names[0] == names[1]
    file = "pytorch_lora_weights.safetensors"
    assert load_file(tmp_path / "out" / file).keys() == load_file(tmp_path / "out_plain" / file).keys()


@pytest.mark.parametrize(
    "options", [{"precompute_reference": True}, {"lora_dropout": 0.1}, {"reference_ema": 1.0}, {"reference_ema": -0.1}]
)
def test_what_it_does_not_go_with(run, options):
    with pytest.raises(ConfigError, match="reference_ema"):
        run(**options)


def test_a_peft_config_with_dropout_is_refused(run):
    from peft import LoraConfig

    with pytest.raises(ConfigError, match="a LoRA without dropout"):
        run(parts={"peft_config": LoraConfig(r=2, lora_dropout=0.1)})
