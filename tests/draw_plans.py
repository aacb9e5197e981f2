"""A plan of the draws of a training, with uniform times."""

from __future__ import annotations

import torch

from alignkit.trainers.draws import DrawPlan


def plan(**changes):
    def sample_t(n, generator):
        return torch.rand(n, generator=generator)

    return DrawPlan(**{"sample_t": sample_t, "noise_seed": 0, "caption_dropout": 0.5, **changes})
