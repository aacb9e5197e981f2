"""Pairs of clips from a video generator: noised at eta, denoised from there by `rollout`, without gradients.

First order: for flow models with an Euler scheduler and `step_index` the latents are those of diffusers' video-to-video
pipeline with `strength` = eta, to rounding. Both copies of one eta are one batch of two, so a pair does not depend on
other pairs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from alignkit.adapters.fingerprint import base_of, fingerprint_of, weights_of
from alignkit.diffusion.solvers import Grid
from alignkit.errors import ConfigError, NumericsError
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.generators.rollout import rollout
from alignkit.media import quantise, to_pixels
from alignkit.pairs import EtaMeaning, Pair, PairRequest
from alignkit.records import Conditioning, Sampling


class RolloutPairs:
    """The `alignkit.pairs.PairMaker` of a video generator.

    Raises ConfigError for a generator of images, for `sampling.extra`, which only pipelines read, and for sizes and
    frames that the model does not take.
    """

    def __init__(self, generator: PipelineGenerator, sampling: Sampling) -> None:
        if generator.modality != "video":
            raise ConfigError(f"'{generator.name}' makes images; pairs of clips need a text-to-video model")
        if sampling.extra:
            raise ConfigError(f"sampling.extra: {', '.join(sampling.extra)}: pairs are not made by the pipeline's call")
        generator.require_sampling(sampling)
        generator.conditioner.eval()
        generator.model.eval()
        self.generator, self.sampling, self.name = generator, sampling, generator.name
        self.codec = base_of(generator.pipeline.vae)
        networks = [part for name, part in generator.pipeline.components.items() if name.startswith("transformer")]
        experts = [part for part in networks if part not in (None, generator.net)]  # the chain runs through them too
        self.weights = weights_of(generator.model, *generator.conditioner.encoders.values(), *experts)
        self._shape = generator.latent_shape(sampling.height, sampling.width, sampling.num_frames)
        grid = generator.grid(sampling.steps, self._shape)
        self.schedule = fingerprint_of([{"alpha": grid.alpha, "sigma": grid.sigma, "t": grid.t}])

    @torch.no_grad()
    def make(self, request: PairRequest, clip: np.ndarray | None) -> Pair:
        """See `alignkit.pairs.PairMaker`. Raises ConfigError where eta leaves no step, NumericsError for NaN."""
        generator = self.generator
        generator.warn_of_cuts([request.prompt])
        clean = None if clip is None else generator.encode(to_pixels(clip)[None].to(generator.device))
        cond = generator.encode_prompts([request.prompt])
        if self.sampling.negative_prompt:
            negative = generator.encode_negative(self.sampling.negative_prompt)
            cond = replace(cond, null=negative).to(generator.device)
        same = request.etas[0] == request.etas[1]
        made = [self._copies(request, copies, clean, cond) for copies in ([[0, 1]] if same else [[0], [1]])]
        latents = torch.cat([copies for copies, _ in made])
        if not torch.isfinite(latents).all():
            raise NumericsError(
                f"'{self.name}' makes NaN or infinite latents for '{request.prompt}'; run the model (or its VAE) in "
                "bfloat16 or float32"
            )
        return Pair(latents, (made[0][1], made[-1][1]))

    def _copies(
        self, request: PairRequest, copies: list[int], clean: Tensor | None, cond: Conditioning
    ) -> tuple[Tensor, float]:
        """The latents of these copies, which have one eta, and the sigma that they started at."""
        generator, eta = self.generator, request.etas[copies[0]]
        if clean is None and eta < 1:
            raise ConfigError(f"eta is {eta}: a copy that starts from a real clip needs one")
        if eta == 0 and clean is not None:
            return clean.repeat(len(copies), *[1] * (clean.dim() - 1)), 0.0
        sources = [torch.Generator("cpu").manual_seed(request.seeds[copy]) for copy in copies]
        noise = torch.cat([generator.initial_noise(self._shape, source) for source in sources]).to(generator.device)
        noise = noise.to(torch.promote_types(generator.net.dtype, torch.float32))
        grid = generator.grid(self.sampling.steps, self._shape)
        if eta < 1:
            grid = start_of(grid, eta, request.meaning)
        x = grid.start * noise
        if clean is not None and eta < 1:
            x = grid.alpha[0].to(noise) * clean + grid.sigma[0].to(noise) * noise
        scale = self.sampling.guidance_scale
        rows = cond.repeat(len(copies))
        return rollout(generator, rows, x, grid, scale=scale, sources=sources, checkpointed=False), float(grid.sigma[0])

    def decode(self, latents: Tensor) -> np.ndarray:
        """Clips uint8 [B, F, H, W, 3]; one at a time, because the VAE's activations are the peak of memory."""
        with torch.no_grad():
            clips = [self.generator.decode(row[None].to(self.generator.device)) for row in latents]
        return quantise(torch.cat(clips))


def start_of(grid: Grid, eta: float, meaning: EtaMeaning) -> Grid:
    """The steps of a chain that starts from a noised clip; noise it to alpha[0] x0 + sigma[0] eps.

    eta in (0, 1). "sigma": from sigma = eta on, see `Grid.starting_at`. "step_index": the last int(eta N) steps of N,
    as diffusers counts them. Raises ConfigError if no step is left.
    """
    if meaning == "sigma":
        return grid.starting_at(eta)
    count = int(len(grid) * eta)
    if count == 0:
        raise ConfigError(f"eta {eta} of {len(grid)} steps leaves no step; raise eta or the number of steps")
    return grid[len(grid) - count :]
