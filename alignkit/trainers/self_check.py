"""The check before a first step: gradients with recomputed activations equal those of plain autograd.

A checkpoint runs a stage again in the backward pass. If the second run differs from the first (a cache that keeps
state, random numbers from a source of its own, kernels whose results vary), gradients are wrong without a message.
Dropout is no such case: torch restores its random numbers for the second run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

from alignkit.errors import ConfigError
from alignkit.generators.codec import at_least_float32
from alignkit.generators.decoding import Decoding
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.generators.rollout import rollout
from alignkit.protocols import Reward, as_scores
from alignkit.records import Prompt, Sampling
from alignkit.trainers.sharding import is_sharded

SIDE, FRAMES, STEPS = 128, 9, 2  # at most; 9 frames are a length of every causal VAE
TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2


@dataclass(frozen=True)
class SelfCheck:
    """Compares both gradients stage by stage, on a small image or clip of one prompt and the first steps of its chain.

    Args:
        generator: the policy, in the mode in which it is trained.
        sampling: that of the training; its size and length are cut.
        device: where the policy is.
        autocast: makes the precision of the denoiser; `own_precision` that of VAE and rewards.
        half: whether `autocast` computes in 16 bits.
        decoding: how the training decodes; its choice of frames is for the rewards alone, because the clip is cut.
    """

    generator: PipelineGenerator
    sampling: Sampling
    device: torch.device
    autocast: Callable[[], AbstractContextManager[None]]
    own_precision: Callable[[], AbstractContextManager[None]]
    half: bool
    decoding: Decoding

    def run(self, prompt: Prompt, rewards: Mapping[str, Reward]) -> None:
        """Check denoiser and VAE, and those of `rewards` that a training recomputes, at the training's own size.

        Random numbers of the training do not change. The denoiser is left out where FSDP shards it. Raises ConfigError
        naming the stage.
        """
        sampling = self._small()
        shape = self.generator.latent_shape(sampling.height, sampling.width, sampling.num_frames)
        noise = self.generator.initial_noise(shape, torch.Generator().manual_seed(0)).to(self.device)
        noise = at_least_float32(noise.to(torch.promote_types(noise.dtype, self.generator.net.dtype)))
        if not is_sharded(self.generator.net):
            gradients = functools.partial(self._denoiser, noise, prompt)
            self._compare("denoiser", gradients, half=self.half or self.generator.net.dtype.itemsize < 4)
        vae = self.generator.pipeline.vae
        self._compare("VAE", functools.partial(self._vae, noise), half=vae.dtype.itemsize < 4)
        for name, reward in rewards.items():
            gradients = functools.partial(self._reward, name, reward, prompt)
            self._compare(f"reward '{name}'", gradients, half=False)

    def _small(self) -> Sampling:
        """The largest size within the limits that the family takes; else the training's own."""
        given = self.sampling
        height, width = min(given.height, SIDE), min(given.width, SIDE)
        small = replace(given, height=height, width=width, num_frames=min(given.num_frames, FRAMES))
        try:
            self.generator.require_sampling(small)
        except ConfigError:
            return given
        return small

    def _denoiser(self, noise: Tensor, prompt: Prompt, *, checkpointed: bool) -> Sequence[Tensor]:
        """The gradients of the start of a chain and of its first and last trained weight."""
        generator, scale = self.generator, self.sampling.guidance_scale
        grid = generator.grid(self.sampling.steps, tuple(noise.shape[1:]))
        x = (noise * grid.start).requires_grad_(True)
        trained = [parameter for parameter in generator.model.parameters() if parameter.requires_grad]
        with torch.no_grad(), self.own_precision():
            cond = generator.encode_prompts([prompt.text])
        if not trained:  # the gradient goes through the text
            trained = [part.requires_grad_() for part in cond.tensors.values() if part.is_floating_point()]
        sources = [torch.Generator().manual_seed(0)]
        options = {"scale": scale, "sources": sources, "checkpointed": checkpointed}
        with self.autocast():
            latents = rollout(generator, cond, x, grid[:STEPS], **options)
        found = torch.autograd.grad(latents.square().sum(), [x, trained[0], trained[-1]], allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    def _vae(self, latents: Tensor, *, checkpointed: bool) -> Sequence[Tensor]:
        latents = latents.detach().requires_grad_(True)
        vae, decoding = self.generator.pipeline.vae, replace(self.decoding, frames=None)
        own = vars(vae).get("use_tiling")
        if decoding.tiles:  # of the plain decoding too, because tiles change pixels
            vae.use_tiling = True
        try:
            with self.own_precision():
                media = self.generator.decode(latents, decoding if checkpointed else None)
        finally:
            if decoding.tiles:
                vae.use_tiling = own
        return torch.autograd.grad(media.float().square().sum(), [latents])

    def _reward(self, name: str, reward: Reward, prompt: Prompt, *, checkpointed: bool) -> Sequence[Tensor]:
        given = self.sampling
        frames = [] if self.generator.modality == "image" else [len(self.decoding.indices(given.num_frames))]
        media = torch.rand(1, *frames, 3, given.height, given.width, generator=torch.Generator().manual_seed(0))
        media = media.to(self.device).requires_grad_(True)

        def score(pixels: Tensor) -> Tensor:
            return as_scores(reward(pixels, [prompt]), name, 1).total

        with self.own_precision():
            score_B = checkpoint(score, media, use_reentrant=False) if checkpointed else score(media)
        return torch.autograd.grad(score_B.sum(), [media])

    def _compare(self, stage: str, gradients: Callable[..., Sequence[Tensor]], *, half: bool) -> None:
        """ConfigError where `gradients(checkpointed=...)` differ."""
        found = []
        devices = [self.device] if self.device.type == "cuda" else []
        for checkpointed in (False, True):
            with torch.random.fork_rng(devices), torch.enable_grad():
                torch.manual_seed(0)
                try:
                    parts = gradients(checkpointed=checkpointed)
                except CheckpointError as error:
                    raise ConfigError(f"{_differs(stage)} ({str(error).splitlines()[0]}). {_ADVICE}") from error
            found.append(torch.cat([part.flatten().double() for part in parts]))
        plain, repeated = found
        difference = float((repeated - plain).norm() / plain.norm().clamp(min=torch.finfo(torch.float32).tiny))
        allowed = HALF_TOLERANCE if half else TOLERANCE
        if not difference <= allowed:
            raise ConfigError(f"{_differs(stage)}: by {difference:.2g} of its norm, at most {allowed:g}. {_ADVICE}")


def _differs(stage: str) -> str:
    return f"{stage}: its gradient with recomputed activations differs from that of plain autograd"


_ADVICE = (
    "It must compute the same when it is called again: look for a cache that keeps state between calls, random numbers "
    "that are not torch's own, and nondeterministic kernels. self_check: false leaves this check out"
)
