"""A folder of pairs of clips as `alignkit dense-pairs` writes it, of the sandbox's moving shapes, in a second.

The second copy of each pair has faults: in segment 1 its colours are exchanged, in segment 3 of every other pair the
object that moves vanishes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from alignkit.media import encode_clip
from alignkit.pairs import Pair
from alignkit.records import Sampling
from alignkit.sandbox.captions import parse, prompts
from alignkit.sandbox.clips import film, move
from alignkit.sandbox.scenes import SIZE, compose
from data_pipelines.dense import Clip, Clips, PairsConfig, make_pairs

FPS, SEGMENTS = 8, 4


def both(caption: str, number: int, frames: int) -> np.ndarray:
    """uint8 [2, F, 64, 64, 3] of the two copies of a pair."""
    rng = np.random.default_rng(number)
    scene, motion = move(compose(parse(caption), rng), rng)
    things = [replace(thing, radius=0.4) if n == motion.thing else thing for n, thing in enumerate(scene.things)]
    scenes = (scene, replace(scene, things=tuple(things)))
    good, hidden = (film(shown, motion, np.random.default_rng(1), frames) for shown in scenes)
    bad, length = good.copy(), frames // SEGMENTS
    bad[length : 2 * length] = good[length : 2 * length, ..., ::-1]
    if number % 2:
        bad[3 * length :] = hidden[3 * length :]
    return (np.stack([good, bad]) * 255).round().astype(np.uint8)


class Shapes:
    """A maker whose latents are the number of the pair and of the copy, which `decode` looks up."""

    name, weights, schedule, codec = "shapes", "0", "0", "float32:shapes"

    def __init__(self, pairs: dict[str, np.ndarray], sampling: Sampling) -> None:
        self.pairs, self.sampling = pairs, sampling

    def make(self, request, clip):
        number = list(self.pairs).index(request.prompt)
        return Pair(torch.tensor([2.0 * number, 2.0 * number + 1]).reshape(2, 1, 1, 1, 1), request.etas)

    def decode(self, latents):
        places = [divmod(int(row.item()), 2) for row in latents]
        return np.stack([list(self.pairs.values())[number][copy] for number, copy in places])


def write(out: Path, count: int = 2, *, frames: int = 16, **options: object) -> Shapes:
    """Pairs in segments of a quarter; `options` are keys of PairsConfig, such as `videos`."""
    chosen = prompts(count, seed=5, weights={"color_attr": 1.0, "position": 1.0, "single_object": 0, "counting": 0})
    pairs = {prompt.text: both(prompt.text, number, frames) for number, prompt in enumerate(chosen)}
    clips = [Clip(f"{number}.mkv", prompt, prompt.text, f"clip {number}") for number, prompt in enumerate(chosen)]
    config = PairsConfig(part_size=3, segment_seconds=frames / SEGMENTS / FPS, **options)
    sampling = Sampling(steps=2, num_frames=frames, fps=FPS, height=SIZE, width=SIZE)
    found = Clips(clips, [], lambda text, where: encode_clip(pairs[text][0], FPS))
    make_pairs(found, config, sampling, out, build_maker=lambda: Shapes(pairs, sampling))
    return Shapes(pairs, sampling)
