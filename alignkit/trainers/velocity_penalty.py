"""The squared difference between the velocities of policy and reference on the states that a chain visits."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignkit.diffusion.solvers import Grid
from alignkit.diffusion.steps import Steps
from alignkit.generators.pipeline import PipelineGenerator, Predictor
from alignkit.generators.rollout import ByStep, StepHook, at_step
from alignkit.generators.state_gradients import StateGradients
from alignkit.trainers.native_error import MAX_WEIGHT


class VelocityPenalty:
    """Mean over the active steps of |v - v_reference|^2 [B], the mean over a latent's elements.

    For Gaussian steps of equal variance it is proportional to the KL divergence of policy and reference on the
    policy's own states. v = alpha eps - sigma x0 (arXiv 2202.00512) for eps, v and x0 networks, the flow's velocity for
    flow networks; the weight that turns a squared error of eps or x0 into one of v is at most MAX_WEIGHT. Both
    predictions are guided ones. The gradient is that of the whole expression: the reference is differentiated by the
    state too, with the coupling of `steps`.

    Pass it as `on_step` of `rollout` over the same arguments, `x` being its start.
    """

    def __init__(
        self,
        generator: PipelineGenerator,
        model: Predictor,
        cond: ByStep,
        grid: Grid,
        x: Tensor,
        *,
        scale: float,
        steps: Steps,
    ) -> None:
        self._generator, self._cond, self._grid, self._scale, self._steps = generator, cond, grid, scale, steps
        self._reference = functools.partial(model, reference=True)
        self._state, self._errors = x, [x.new_zeros(len(x))]

    def __call__(self, index: int, x: Tensor, prediction: Tensor) -> None:
        """Adds step `index`, whose prediction was made at the state that the call before saw."""
        if self._steps.carries(index):
            state = self._steps.network_input(self._state)
            if torch.is_grad_enabled() and state.requires_grad:
                reference = checkpoint(self._predict, state, index, use_reentrant=False)
            else:
                with torch.no_grad():
                    reference = self._predict(state, index)
            alpha, sigma, *_ = (float(value) for value in self._grid.step(index))
            factor = {"epsilon": alpha, "sample": sigma}.get(self._generator.prediction, 1.0)
            error = (prediction - reference.to(prediction.dtype)).flatten(1).square().mean(1)
            self._errors.append(error / max(factor**2, 1 / MAX_WEIGHT))
        self._state = x

    def mean(self) -> Tensor:
        """The penalty of each row, [B]."""
        return torch.stack(self._errors).sum(0) / max(1, len(self._errors) - 1)

    def _predict(self, state: Tensor, index: int) -> Tensor:
        times, unconditional = self._grid.times(index, state), self._steps.unconditional
        arguments = (self._reference, state, times, at_step(self._cond, index), self._scale)
        return self._generator.guided(*arguments, grad_unconditional=unconditional)


def both(gradients: StateGradients, penalty: VelocityPenalty | None) -> StepHook:
    """A hook of `rollout` that calls first the one, then the other, and notes the penalty's own gradients."""

    def on_step(index: int, state: Tensor, prediction: Tensor) -> None:
        gradients(index, state, prediction)
        if penalty is not None:
            if prediction.requires_grad:
                prediction = prediction.view_as(prediction)  # a branch of its own: its gradient is the penalty's alone
                prediction.register_hook(functools.partial(gradients.note_penalty, index))
            penalty(index, state, prediction)

    return on_step
