"""The network of a generator as one module with one forward, and the switch to its frozen base model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from alignkit.adapters import lora
from alignkit.adapters.module_tree import ModuleTree
from alignkit.diffusion.schedules import Schedule
from alignkit.errors import AdapterError
from alignkit.generators.conditioner import Conditioner
from alignkit.records import Conditioning, Texts


class NetworkFamily(Protocol):
    """What the denoiser needs of its family."""

    noise_schedule: Schedule
    conditioner: Conditioner

    def call_network(self, net: nn.Module, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        """One call of the family's network."""
        ...


class Denoiser(nn.Module):
    """The module that a trainer trains: the network, and the text encoders that are trained with it.

    Its forward is what is called in training and in chains, so DDP, FSDP and autocast can wrap it.
    """

    def __init__(self, family: NetworkFamily, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.trained_encoders = nn.ModuleDict()  # by the pipeline's component name
        self._family = family  # no module, so it adds no parameters here
        self._frozen: tuple[nn.Module, ...] = ()  # a tuple, so that the copy's parameters are not this module's
        self._is_reference = False
        self._tree, self._trees = ModuleTree(self), (ModuleTree(net),)  # the second: of the network and its frozen copy

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning | Texts, *, reference: bool = False) -> Tensor:
        """The native prediction for latents x_t [B, C, H, W] or [B, C, T, H, W] at canonical times t [B].

        With `Texts` the prompts are encoded here by the trained encoders; without any, and for the reference, the
        cached conditioning is used. `reference=True` gives the prediction of the frozen base model. Unlike the context
        `as_reference` it also holds when a checkpointed region repeats its forward in the backward pass.
        """
        with self.as_reference() if reference else nullcontext():
            return self._predict(x_t, t, cond)

    def _predict(self, x_t: Tensor, t: Tensor, cond: Conditioning | Texts) -> Tensor:
        net = self._frozen[0] if self._is_reference and self._frozen else self.net
        dtype = self._dtype(net)
        if isinstance(cond, Texts) and self.trained_encoders and not self._is_reference:
            encoded = self._family.conditioner(cond.texts).drop(cond.dropped)
            cond = encoded.repeat(len(x_t) // len(encoded)).with_controls(cond.cached.controls)
        elif isinstance(cond, Texts):
            cond = cond.cached
        # Cached latents and conditioning are float32 whatever the network's dtype. Times and controls [B] stay float32,
        # as in the pipelines.
        cond = cond.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() and tensor.dim() > 1 else tensor)
        return self._family.call_network(net, x_t.to(dtype), self._family.noise_schedule.model_time(t), cond)

    def _dtype(self, net: nn.Module) -> torch.dtype:
        if all(tree.root is not net for tree in self._trees):
            self._trees = tuple(ModuleTree(part) for part in (self.net, *self._frozen))
        return next(tree.dtype() for tree in self._trees if tree.root is net)

    @override
    def train(self, mode: bool = True) -> Denoiser:
        """As in torch, without a walk over all modules where nothing changes: Trainer calls it in every step."""
        return super().train(mode) if self._tree.needs_mode(mode) else self

    def reset_lists(self) -> None:
        """List modules and parameters again. Call it after changes inside the network that PEFT did not make."""
        for tree in (self._tree, *self._trees):
            tree.reset()

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch, without a walk over all modules."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for parameter in self._tree.parameters():
            if parameter.grad is not None:
                parameter.grad = None

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes that FSDP shards one by one by default: those that diffusers names and the network has."""
        present = {type(module).__name__ for module in self.net.modules()}
        return sorted(present & set(self.net._no_split_modules or ()))  # noqa: SLF001 - accelerate reads it as well

    def freeze_copy(self) -> None:
        """Keep the present weights as the reference (full fine-tuning)."""
        self._frozen = (copy.deepcopy(self.net).requires_grad_(False).eval(),)

    @property
    def has_reference(self) -> bool:
        """Whether the base model can be called: there is a frozen copy or an adapter to switch off."""
        return bool(self._frozen or self._tree.lora_layers())

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within it forward is the frozen base model: the frozen copy, or the network without adapters.

        Adapters in the trained text encoders are off too. Use `forward(..., reference=True)` in a checkpointed region
        that needs gradients: that region is repeated in the backward pass, after this context has ended. Raises
        AdapterError without a reference.
        """
        layers = self._tree.lora_layers()
        if not self._frozen and not layers:
            raise AdapterError(
                "no reference: the model has neither an adapter nor a frozen copy; call `add_lora` or load an adapter"
            )
        before, self._is_reference = self._is_reference, True
        try:
            with lora.disabled(layers):
                yield
        finally:
            self._is_reference = before

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """Called by Trainer when `activation_checkpointing` is true: the network checkpoints its own blocks.

        A block that ran without adapters is also repeated without them.
        """
        self.net.enable_gradient_checkpointing(self._checkpoint_block)

    def _checkpoint_block(self, block: nn.Module, *inputs: Any) -> Any:
        is_reference = self._is_reference and torch.is_grad_enabled()  # without gradients nothing is repeated

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), lora.disabled(lora.lora_layers(block)) if is_reference else nullcontext()

        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
