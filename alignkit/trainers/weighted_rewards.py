"""Several differentiable rewards as one: their weighted mean, targets, and the checks before a training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignkit.errors import ConfigError, NumericsError, UnknownNameError, nearest
from alignkit.protocols import Reward, as_scores, require_independent, require_modality
from alignkit.records import Prompt, Scores


class WeightedRewards:
    """The weighted mean of rewards, with gradients to the media.

    Args:
        rewards: the loaded rewards by name; those without a weight are not used.
        weights: positive weight by name.
        targets: a reward at or above its target counts as the target in that row, without gradient (the hinge of ReFL,
            arXiv 2304.05977).

    Raises UnknownNameError for a name in `weights` or `targets` without a reward, ConfigError for a reward that is not
    differentiable or whose rows depend on each other.
    """

    def __init__(
        self, rewards: Mapping[str, Reward], weights: Mapping[str, float], targets: Mapping[str, float]
    ) -> None:
        for name in weights:
            if name not in rewards:
                raise UnknownNameError(
                    f"reward_weights names '{name}', which is none of the rewards.{nearest(name, rewards)}"
                )
        self.rewards = {name: rewards[name] for name in weights}
        for name in targets:
            if name not in self.rewards:
                raise UnknownNameError(f"reward_targets names '{name}', which has no weight.{nearest(name, weights)}")
        for name, reward in self.rewards.items():
            if not reward.differentiable:
                raise ConfigError(
                    f"reward '{name}' is not differentiable, so no gradient can go through it; train on another one, "
                    "and keep it for validation"
                )
        require_independent(self.rewards)
        self._weights, self._targets = dict(weights), dict(targets)
        self.logged: Mapping[str, Sequence[str]] = {}  # by reward, the parts whose means are metrics
        self.scores: dict[str, Tensor] = {}  # by reward, of the last call [B], without gradients

    def __call__(
        self, media: Tensor, prompts: Sequence[Prompt], *, checkpointed: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(what is maximised [B], the means to log) of media [B, 3, H, W] or [B, F, 3, H, W] in [0, 1].

        `checkpointed` keeps no activations of the rewards, so that only one reward needs memory at a time. Raises
        NumericsError naming a reward that gives NaN or infinity. A part is a metric of rows [B], NaN where it has none.
        """
        total_B = media.new_zeros(len(media))
        mean_B, metrics = total_B, {}
        share = sum(self._weights.values())
        for name, weight in self._weights.items():
            scores = self._score(name, media, prompts, checkpointed=checkpointed)
            score_B = scores.total
            self.scores[name] = score_B.detach()
            target = self._targets.get(name)
            mean_B = mean_B + weight / share * score_B.detach()
            total_B = total_B + weight / share * (score_B if target is None else score_B.clamp(max=target))
            metrics[f"reward/{name}"] = score_B.detach().mean()
            metrics[f"spread/{name}"] = score_B.detach().std(correction=0)
            absent_B = torch.full_like(score_B.detach(), math.nan)
            metrics |= {f"part/{name}/{part}": scores.parts.get(part, absent_B) for part in self.logged.get(name, ())}
            if target is not None:
                metrics[f"satisfied/{name}"] = (score_B.detach() >= target).float().mean()
        return total_B, {"reward": mean_B.mean(), **metrics}

    def _score(self, name: str, media: Tensor, prompts: Sequence[Prompt], *, checkpointed: bool) -> Scores:
        def score(pixels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
            scores = as_scores(self.rewards[name](pixels, prompts), name, len(prompts))
            return scores.total, {part: value.detach() for part, value in scores.parts.items()}

        repeats = checkpointed and media.requires_grad
        score_B, parts = checkpoint(score, media, use_reentrant=False) if repeats else score(media)
        score_B = score_B.to(media.device, torch.promote_types(score_B.dtype, media.dtype))
        if not score_B.isfinite().all():
            raise NumericsError(
                f"reward '{name}' is {score_B.tolist()} for the prompts {[p.text for p in prompts]}; fix the reward"
            )
        return Scores(score_B, parts)

    def require_gradients(self, media: Tensor, prompt: Prompt, modality: str) -> dict[str, tuple[str, ...]]:
        """The names of the parts of each reward.

        Each is called on `media`, [1, 3, H, W] or [1, F, 3, H, W] in [0, 1], in the size that will be trained on.
        Raises ConfigError naming the first one of another modality, or whose gradient does not reach the pixels.
        """
        require_modality(self.rewards, modality)
        parts = {}
        for name in self.rewards:
            pixels = media.detach().clone().requires_grad_(True)
            with torch.enable_grad():
                scores = self._score(name, pixels, [prompt], checkpointed=False)
            gradient, score_B, parts[name] = None, scores.total, tuple(scores.parts)
            if score_B.requires_grad:
                (gradient,) = torch.autograd.grad(score_B.sum(), pixels, allow_unused=True)
            if gradient is None or not gradient.isfinite().all() or not gradient.any():
                found = "none" if gradient is None else "zero" if gradient.isfinite().all() else "not finite"
                raise ConfigError(
                    f"reward '{name}' is declared differentiable, but its gradient at the pixels is {found}. Its "
                    "preprocessing (a conversion to 8-bit or PIL, no_grad, detach) must keep the graph"
                )
        return parts
