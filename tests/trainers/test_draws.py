"""Draws of timestep, noise and caption dropout: keyed, shared as configured, and of the right distribution."""

from __future__ import annotations

import pytest
import torch
from draw_plans import plan


@pytest.mark.parametrize("share_noise", [True, False])
@pytest.mark.parametrize("share_timestep", [True, False])
def test_what_candidates_share(share_noise, share_timestep):
    draws = plan(share_noise=share_noise, share_timestep=share_timestep).draw("id", 0, (4, 2, 3, 3))
    assert draws.noise.shape == (4, 2, 3, 3)
    assert len({value.item() for value in draws.t}) == (1 if share_timestep else 4)
    assert len({value.sum().item() for value in draws.noise}) == (1 if share_noise else 4)


def test_draws_are_keyed():
    """The same for the same key; others for another prompt, epoch or noise seed."""
    keys = [("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1)]
    drawn = [plan(noise_seed=seed).draw(name, epoch, (1, 8)).noise for name, epoch, seed in keys]
    assert len({tuple(noise.flatten().tolist()) for noise in drawn}) == 4
    torch.manual_seed(3)
    assert torch.equal(drawn[0], plan().draw("a", 0, (1, 8)).noise)


def test_noise_is_normal_and_dropout_has_its_share():
    draws = [plan(caption_dropout=0.2).draw(str(i), 0, (1, 4, 4, 4)) for i in range(2000)]
    noise = torch.stack([draw.noise for draw in draws])
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert sum(draw.dropped for draw in draws) / 2000 == pytest.approx(0.2, abs=0.045)
    assert not any(plan(caption_dropout=0.0).draw(str(i), 0, (1, 2)).dropped for i in range(50))
    assert all(plan(caption_dropout=1.0).draw(str(i), 0, (1, 2)).dropped for i in range(50))


def test_low_times_are_left_out():
    """Uniform times become uniform on [t_min, 1]; the noise stays what it was."""
    all_times, high = plan(), plan(t_min=0.6)
    for name in map(str, range(50)):
        before, after = all_times.draw(name, 0, (2, 3)), high.draw(name, 0, (2, 3))
        torch.testing.assert_close(after.t, 0.6 + 0.4 * before.t)
        assert torch.equal(before.noise, after.noise)
