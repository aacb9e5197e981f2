"""Pairs of clips that share the structure of one real video: records that generators, labellers and stages share.

A pair is made as StructuralDPO and DenseDPO make it (arXiv 2506.03517, eq. 6 and algorithm 2): the latents of a real
video are noised twice with independent noise and denoised from there with the caption. The stage
`data_pipelines.dense` reads the videos and stores the pairs; `alignkit.generators.pairs` computes them. A labeller says
which clip of a pair is better in each segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from alignkit.records import Prompt, Sampling, Verdict
from alignkit.segments import Segments

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

EtaMeaning = Literal["sigma", "step_index"]


@dataclass(frozen=True, slots=True)
class RealVideo:
    """A captioned video that a function makes: `id` is its name, `read()` gives the bytes of its file."""

    id: str
    caption: str
    read: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class PairRequest:
    """All that the two copies depend on beside the weights, the sampling and the real clip.

    etas: where each copy starts, in [0, 1]. 0: it is the real clip; 1: a full generation, which needs no clip.
    meaning: "sigma", eta is the noise level sigma of the start; "step_index", the last int(eta N) of N steps are taken,
        which diffusers calls `strength`.
    seeds: of each copy's noise.
    """

    prompt: str
    seeds: tuple[int, int]
    etas: tuple[float, float]
    meaning: EtaMeaning = "sigma"


@dataclass(frozen=True, slots=True)
class Pair:
    """Normalised latents [2, C, T, h, w], float32 at least, and the sigma at which each copy's chain started."""

    latents: Tensor
    sigma_starts: tuple[float, float]


@dataclass(frozen=True, slots=True)
class ShownPair:
    """A pair as a labeller sees it: both clips as uint8 [2, F, H, W, 3] at `fps`, and [start, end) of each segment."""

    prompt: Prompt
    clips: np.ndarray
    fps: float
    segments: Segments


@runtime_checkable
class Labeller(Protocol):
    """What says which clip of a pair is better in each segment: a judge, a reward."""

    def label(self, pairs: Sequence[ShownPair]) -> list[list[Verdict]]:
        """For each pair one verdict a segment; 1: the first clip is better.

        Raises DataError for a pair that it cannot judge, ServerError where a server cannot be used.
        """
        ...


@runtime_checkable
class ClipDecoder(Protocol):
    """A video generator's VAE as it shows latents."""

    codec: str  # fingerprint of the VAE's weights, PRECISION:HASH

    def decode(self, latents: Tensor) -> np.ndarray:
        """The clips uint8 [B, F, H, W, 3] of latents [B, C, T, h, w]."""
        ...


@runtime_checkable
class PairMaker(ClipDecoder, Protocol):
    """A video generator with settings of sampling, as the stage uses it."""

    name: str
    sampling: Sampling
    weights: str  # fingerprint of all weights that the latents depend on beside the VAE's: denoiser, adapters, encoders
    schedule: str  # fingerprint of the noise schedule's steps

    def make(self, request: PairRequest, clip: np.ndarray | None) -> Pair:
        """The pair of one request; `clip` is uint8 [F, H, W, 3], None where both copies are full generations.

        Equal arguments give equal latents on the same machine and thread count, whatever was made before.
        """
        ...
