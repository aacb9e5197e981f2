"""Losses as functions of tensors; `LOSSES` is the table that the config key `loss` chooses from."""

from alignkit.losses.dense import dense_dpo, dense_sft
from alignkit.losses.preference import (
    diffusion_dpo,
    lair,
    linear_dpo,
    loser_scale,
    plackett_luce,
    rank_dpo,
    winner_sft,
)

LOSSES = {
    "rank_dpo": "alignkit.losses.preference:rank_dpo",
    "diffusion_dpo": "alignkit.losses.preference:diffusion_dpo",
    "linear_dpo": "alignkit.losses.preference:linear_dpo",
    "plackett_luce": "alignkit.losses.preference:plackett_luce",
    "lair": "alignkit.losses.preference:lair",
    "winner_sft": "alignkit.losses.preference:winner_sft",
    "dense_dpo": "alignkit.losses.dense:dense_dpo",
    "dense_sft": "alignkit.losses.dense:dense_sft",
}
DENSE = frozenset({"dense_dpo", "dense_sft"})  # take errors and labels of each latent frame of two clips
RANKED = {name: place for name, place in LOSSES.items() if name not in DENSE}  # take errors of ranked candidates
# Take each row's best and worst candidate, in this order, and no phi.
PAIRS = frozenset({"diffusion_dpo", "linear_dpo"})
LISTS = frozenset({"plackett_luce", "lair"})  # compare no pairs, so winner protection has no loser to scale

__all__ = [
    "DENSE",
    "LISTS",
    "LOSSES",
    "PAIRS",
    "RANKED",
    "dense_dpo",
    "dense_sft",
    "diffusion_dpo",
    "lair",
    "linear_dpo",
    "loser_scale",
    "plackett_luce",
    "rank_dpo",
    "winner_sft",
]
