"""Pairs of clips that share the structure of one real video: the records that generators and the stage share.

A pair is made as StructuralDPO and DenseDPO make it (arXiv 2506.03517, eq. 6 and algorithm 2): the latents of a real
video are noised twice with independent noise and denoised from there with the caption. The stage
`data_pipelines.dense` reads the videos and stores the pairs; `alignkit.generators.pairs` computes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

EtaMeaning = Literal["sigma", "step_index"]


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


@runtime_checkable
class PairMaker(Protocol):
    """A video generator with settings of sampling, as the stage uses it."""

    name: str
    codec: str  # fingerprint of the VAE's weights, PRECISION:HASH

    def make(self, request: PairRequest, clip: np.ndarray | None) -> Pair:
        """The pair of one request; `clip` is uint8 [F, H, W, 3], None where both copies are full generations.

        Equal arguments give equal latents on the same machine and thread count, whatever was made before.
        """
        ...

    def decode(self, latents: Tensor) -> np.ndarray:
        """The clips uint8 [B, F, H, W, 3] of latents [B, C, T, h, w]."""
        ...
