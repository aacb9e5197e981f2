"""Captioned clips of the sandbox's world as real videos, for pairs of clips: `clips.source` of a config."""

from __future__ import annotations

import functools

import numpy as np

from alignkit.media import encode_clip
from alignkit.pairs import RealVideo
from alignkit.sandbox import films
from alignkit.sandbox.film_captions import Split, parse, require_split, spec_in, word
from alignkit.seeds import derive_seed


def videos(count: int, *, seed: int, split: Split | None = None) -> list[RealVideo]:
    """`count` correct clips of random meaning with their captions; number i is a function of (seed, split, i).

    `split` is the half of the meanings, see `film_captions.prompts`.
    """
    require_split(split)
    found = []
    for number in range(count):
        rng = np.random.default_rng(derive_seed("film-video", seed, number))
        caption = word(spec_in(split, rng), rng)
        found.append(RealVideo(f"film-{number:05d}", caption, functools.partial(_render, caption, seed, number)))
    return found


def _render(caption: str, seed: int, number: int) -> bytes:
    """The clip without loss."""
    rng = np.random.default_rng(derive_seed("film-pixels", seed, number))
    frames = films.render(films.compose(parse(caption), rng), rng)
    return encode_clip((frames * 255).round().astype(np.uint8), films.FPS)
