"""Supervised fine-tuning: the plain denoising error, of winners or of all pictures."""

from __future__ import annotations

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.trainers.sft import SFTConfig, winners


@pytest.mark.parametrize("family", ["unet", "flow"])
@pytest.mark.parametrize("candidates", ["winner", "all"])
def test_the_loss_is_the_denoising_error(make, batch_of, family, candidates):
    trainer = make(family, method="sft", candidates=candidates)
    batch = batch_of(trainer)
    with torch.no_grad():
        loss, health = trainer.method_loss(trainer.model, batch)
        errors = trainer.errors(trainer.model, batch)
    wanted = errors[torch.arange(3), batch["phi"].argmax(-1)] if candidates == "winner" else errors.mean(-1)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(health["error"], wanted.mean())


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
