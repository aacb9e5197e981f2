"""Which pairs are worth looking at: the biggest gains, the biggest losses, and some chosen at random.

Deliberately not here: cherry-picking; the rule below is all there is, and the captions state it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from alignkit.evaluation.results import Evaluation, Pairs
from alignkit.evaluation.statistics import Floats
from alignkit.media import clip_preview, decode_clip
from alignkit.records import Prompt


@dataclass(frozen=True, slots=True)
class Shown:
    """One pair to show: encoded bytes of both sides and (base, tuned) of every reward, the lead first.

    `fps` is the frame rate of videos, None for images.
    """

    prompt: Prompt
    seed: int
    base: bytes
    tuned: bytes
    scores: Mapping[str, tuple[float, float]]
    fps: float | None = None

    def previews(self) -> dict[str, bytes]:
        """What a page shows of "base" and "tuned": an image as it is stored, a video as an animated WebP."""
        sides = {"base": self.base, "tuned": self.tuned}
        if self.fps is None:
            return sides
        frames = {side: decode_clip(data, f"{side} video of seed {self.seed}") for side, data in sides.items()}
        return {side: clip_preview(clip, self.fps) for side, clip in frames.items()}


def lead_reward(evaluation: Evaluation) -> str:
    """The reward pairs are ordered by: gold where there is one, else the first."""
    return (evaluation.gold or evaluation.results[0]).reward


def choose(pairs: Pairs, lead: str, count: int, *, seed: int = 0) -> dict[str, list[int]]:
    """Rows of at most `count` gains, losses and random pairs, one a prompt within each group.

    Gains are the largest tuned - base of `lead` above zero, losses the smallest below; equal ones (gold is often
    right or wrong) are ordered by the mean gain of the other rewards in units of their spread. Random pairs are drawn
    from the rest with `seed`.
    """
    gain_N, other_N = pairs.gain(lead), _other_gain(pairs, lead)
    order = [int(row) for row in np.lexsort((other_N, gain_N)) if np.isfinite(gain_N[row])]
    gains = _one_a_prompt(pairs, (row for row in reversed(order) if gain_N[row] > 0), count)
    losses = _one_a_prompt(pairs, (row for row in order if gain_N[row] < 0), count)
    rest = np.random.default_rng(seed).permutation(sorted({*range(len(gain_N))} - {*gains, *losses}))
    return {"gains": gains, "losses": losses, "random": _one_a_prompt(pairs, (int(row) for row in rest), count)}


def load(pairs: Pairs, rows: Iterable[int], evaluation: Evaluation) -> list[Shown]:
    """The chosen rows with their images or videos."""
    rows, lead = list(rows), lead_reward(evaluation)
    base, tuned = pairs.media("base", rows), pairs.media("tuned", rows)
    fps = evaluation.sampling.fps if pairs.modality == "video" else None
    rewards = sorted(pairs.base, key=lambda reward: reward != lead)
    return [
        Shown(
            pairs.prompts[row],
            pairs.seeds[row],
            base[row],
            tuned[row],
            {name: (float(pairs.base[name][row]), float(pairs.tuned[name][row])) for name in rewards},
            fps,
        )
        for row in rows
    ]


def _other_gain(pairs: Pairs, lead: str) -> Floats:
    gains = [np.nan_to_num(pairs.gain(name), posinf=0, neginf=0) for name in pairs.base if name != lead]
    scaled = [gain / gain.std() for gain in gains if gain.std() > 0]
    return np.mean(scaled, axis=0) if scaled else np.zeros(len(pairs.prompts))


def _one_a_prompt(pairs: Pairs, rows: Iterable[int], count: int) -> list[int]:
    chosen: dict[str, int] = {}
    for row in rows:
        if len(chosen) == count:
            break
        chosen.setdefault(pairs.prompts[row].id, row)
    return list(chosen.values())
