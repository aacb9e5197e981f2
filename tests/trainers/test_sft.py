"""Supervised fine-tuning: the plain denoising error, of winners or of all pictures."""

from __future__ import annotations

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.trainers.native_error import MAX_WEIGHT
from alignkit.trainers.sft import SFTConfig, winners


@pytest.mark.parametrize("family", ["unet", "flow"])
@pytest.mark.parametrize("candidates", ["winner", "all"])
def test_the_loss_is_the_denoising_error(make, batch_of, family, candidates):
    trainer = make(family, method="sft", candidates=candidates)
    batch = batch_of(trainer)
    with torch.no_grad():
        output = trainer.method_loss(trainer.model, batch)
        errors = trainer.errors(trainer.model, batch)
    wanted = errors[torch.arange(3), batch["phi"].argmax(-1)] if candidates == "winner" else errors.mean(-1)
    torch.testing.assert_close(output.loss, wanted)
    torch.testing.assert_close(output.metrics["error"], wanted.mean())


def test_winners_keep_their_own_draws(make, batch_of):
    trainer = make("flow", method="sft")
    batch = batch_of(trainer)
    batch["noise"] = torch.randn_like(batch["noise"])
    chosen = winners(batch)
    best = batch["phi"].argmax(-1)
    for name in ("latents", "noise", "t", "phi"):
        assert torch.equal(chosen[name][:, 0], batch[name][torch.arange(3), best])
    assert chosen["cond.pooled_projections"] is batch["cond.pooled_projections"]


def test_it_learns_a_picture(make, ranked_rows):
    """Full tuning on one row, no dropout: the error falls."""
    options = {"full_finetune": True, "candidates": "all", "caption_dropout": 0.0, "max_steps": 25}
    trainer = make("flow", method="sft", rows=ranked_rows(1), per_device_train_batch_size=1, **options)
    trainer.train()
    errors = [entry["health/error"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(errors[-5:]) < 0.9 * sum(errors[:5])
    assert trainer.generator.model._frozen == ()  # nothing to refer to, so no copy is kept


def test_rows_without_labels_train(make, ranked_rows):
    trainer = make("unet", method="sft", rows=ranked_rows(2).remove_columns(["phi", "prompt_id"]), candidates="all")
    trainer.train()
    assert trainer.state.global_step == 3


def test_candidates_is_checked(tmp_path):
    with pytest.raises(ConfigError, match="candidates is 'best'; use winner or all"):
        SFTConfig(output_dir=str(tmp_path), use_cpu=True, candidates="best")


def test_velocity_space_is_the_v_networks_error(make, batch_of):
    """|v_hat - v|^2 for v = alpha eps - sigma x0, with v_hat from the eps network's own x0 and eps."""
    trainer = make("unet", method="sft", candidates="all", error_space="velocity")
    native = make("unet", method="sft", candidates="all")
    batch = batch_of(trainer)
    batch["t"] = torch.tensor([0.1, 0.3, 0.6]).unsqueeze(1).expand(batch["t"].shape)
    alpha, sigma = (c[..., None] for c in trainer.generator.noise_schedule.coefficients(batch["t"]))
    with torch.no_grad():
        loss = trainer.method_loss(trainer.model, batch).loss
        off = native.residuals(native.model, batch).flatten(2)  # eps_hat - eps
    x0_off = -sigma / alpha * off  # of x0_hat = (x_t - sigma eps_hat) / alpha
    torch.testing.assert_close(loss, (alpha * off - sigma * x0_off).square().mean((-1, -2)))


def test_velocity_weights_are_held_and_flows_have_none(make, batch_of):
    plain, weighted = (make("unet", method="sft", candidates="all", error_space=s) for s in ("native", "velocity"))
    batch = batch_of(plain)
    batch["t"] = torch.ones_like(batch["t"])  # next to pure noise
    with torch.no_grad():
        torch.testing.assert_close(
            weighted.method_loss(weighted.model, batch).loss, MAX_WEIGHT * plain.method_loss(plain.model, batch).loss
        )
    plain, weighted = (make("flow", method="sft", error_space=s) for s in ("native", "velocity"))
    batch = batch_of(plain)
    with torch.no_grad():
        assert torch.equal(weighted.method_loss(weighted.model, batch).loss, plain.method_loss(plain.model, batch).loss)


def test_error_space_is_checked(tmp_path):
    with pytest.raises(ConfigError, match="error_space is 'x0'; use native or velocity"):
        SFTConfig(output_dir=str(tmp_path), use_cpu=True, error_space="x0")


@pytest.mark.parametrize(("fast", "wanted"), [(True, True), (False, False)])
def test_bf16_is_used_where_it_is_fast(tmp_path, monkeypatch, fast, wanted):
    from alignkit.trainers import config

    monkeypatch.setattr(config, "fast_bf16", lambda **_: fast)
    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True).bf16 is wanted
    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=not fast).bf16 is not wanted
    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True, fp16=True).bf16 is False
