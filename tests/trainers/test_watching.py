"""What RankDPO watches while it trains: drift of the winner's error, non-finite losses, the gradient's norm."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from alignkit.errors import NumericsError
from alignkit.trainers.drift import WINDOW
from alignkit.trainers.validation import save_grid


def drift(trainer, winner, margin, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="alignkit.trainers.drift"):
        for w, m in zip(winner, margin, strict=True):
            trainer.warn_of({"health/winner_error_delta": w, "health/margin": m})
    return [record.message for record in caplog.records if record.name == "alignkit.trainers.drift"]


def test_drift_warning(make, caplog):
    """Only where the winner's error rises above the reference while the margin grows; once a window."""
    trainer = make("flow")
    rising = [0.001 * i for i in range(2 * WINDOW)]
    falling = [-value for value in rising]
    (message,) = drift(trainer, rising, rising, caplog)
    assert "winner's error against the reference rises" in message
    assert "protect_winner" in message
    for winner, margin in ((falling, rising), (rising, falling), ([-1 + v for v in rising], rising)):
        trainer._drift.clear()
        assert not drift(trainer, winner, margin, caplog)


def broken(trainer, at, poison):
    """`method_loss` that returns poison(loss) in step `at`."""
    real = trainer.method_loss

    def loss(model, batch):
        output = real(model, batch)
        return replace(output, loss=poison(output.loss)) if trainer.state.global_step == at else output

    trainer.method_loss = loss
    return trainer


@pytest.mark.parametrize(
    ("poison", "said"),
    [
        (lambda loss: loss * math.nan, "loss is nan at step 2"),
        (lambda loss: loss + math.inf, "loss is inf at step 2"),
        (lambda loss: loss + (loss - loss.detach()).sqrt(), "gradient norm is (nan|inf) at step 2"),
    ],
)
def test_a_non_finite_loss_stops_before_the_step(make, poison, said):
    trainer = make("flow", max_steps=4, save_strategy="steps", save_steps=1)
    broken(trainer, 2, poison)
    with pytest.raises(NumericsError, match=said):
        trainer.train()
    assert trainer.state.global_step == 2
    from pathlib import Path

    from safetensors.torch import load_file

    from alignkit.trainers.checkpoint import find_checkpoint

    newest = find_checkpoint(Path(trainer.args.output_dir))
    assert newest.name == "checkpoint-2"
    saved = load_file(newest / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in trainer._trainable().items())


def test_gradients_are_clipped_and_their_norm_logged(make):
    """SGD with rate 1 moves the weights by the clipped gradient: exactly max_grad_norm when the norm is larger."""
    trainer = make("flow", max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=1e-3)
    before = torch.cat([p.detach().flatten().clone() for p in trainer._trainable().values()])
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in trainer._trainable().values()])
    assert trainer.state.log_history[0]["grad_norm"] > 1e-3
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_a_grid_of_clips_shows_frames_across(tmp_path):
    """A clip a row: its first and last frame and what lies between, equally far apart."""
    clips = torch.zeros(2, 9, 3, 4, 4)
    clips += torch.arange(9).reshape(1, 9, 1, 1, 1) / 10 + torch.tensor([0.0, 0.1]).reshape(2, 1, 1, 1, 1)
    save_grid(clips, tmp_path / "grid.png", columns=5)
    shown = np.asarray(Image.open(tmp_path / "grid.png"))
    assert shown.shape == (8, 20, 3)
    expected = np.array([[0.0, 0.2, 0.4, 0.6, 0.8], [0.1, 0.3, 0.5, 0.7, 0.9]])
    assert np.abs(shown[::4, ::4, 0] / 255 - expected).max() < 0.003
