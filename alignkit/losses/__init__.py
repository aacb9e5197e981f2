"""Losses as functions of tensors; `LOSSES` is the table that the config key `loss` chooses from."""

from alignkit.losses.preference import diffusion_dpo, loser_scale, plackett_luce, rank_dpo

LOSSES = {
    "rank_dpo": "alignkit.losses.preference:rank_dpo",
    "diffusion_dpo": "alignkit.losses.preference:diffusion_dpo",
    "plackett_luce": "alignkit.losses.preference:plackett_luce",
}

__all__ = ["LOSSES", "diffusion_dpo", "loser_scale", "plackett_luce", "rank_dpo"]
