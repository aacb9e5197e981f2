"""The text side of a generator as one module: prompts in, Conditioning out, differentiable.

It holds all text encoders of the pipeline (CLIP, T5, UMT5, Qwen, Gemma, Llama). They are frozen until `add_lora` or
`unfreeze`, so no gradient reaches encoders that are not trained.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from alignkit.adapters import lora
from alignkit.adapters.module_tree import ModuleTree
from alignkit.diffusion.tuned_steps import ALL_STEPS, TunedSteps
from alignkit.errors import AdapterError, UnknownNameError, nearest
from alignkit.records import Conditioning

# Suffixes of the attention projections of each kind of encoder: CLIP, decoders (Qwen, Gemma, Llama), T5 and UMT5.
ATTENTION = (
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"),
)


class TextFamily(Protocol):
    """What the conditioner needs of its family."""

    pipeline: Any

    @property
    def text_device(self) -> torch.device:
        """Where prompts are encoded."""
        ...

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        """The network's own names and tensors [B, ...] for B prompts."""
        ...

    def encode_negative(self, text: str) -> dict[str, Tensor]:
        """The same [1, ...] for a negative prompt."""
        ...


class Conditioner(nn.Module):
    """All text encoders of a pipeline; its forward encodes prompts, so DDP and FSDP can wrap it.

    Trained encoders stay components of the pipeline, so `generate` uses them too: in the steps of a chain that `window`
    names, by default in all. The same holds for a mixture of encoders (`mix`). `folder` is where tuned encoders were
    loaded from.
    """

    window: TunedSteps | None = None
    folder: Path | None = None

    def __init__(self, family: TextFamily) -> None:
        super().__init__()
        parts = {name: part for name, part in family.pipeline.components.items() if name.startswith("text_encoder")}
        self.encoders = nn.ModuleDict({name: part for name, part in parts.items() if part is not None})
        self._family = family  # no module, so it adds no parameters here
        self._frozen: dict[str, nn.Module] = {}  # copies of encoders under full tuning; a plain dict registers nothing
        self._is_mixed = self._is_reference = False
        self._tree = ModuleTree(self)
        self.requires_grad_(False).eval()

    def forward(self, texts: Sequence[str], *, reference: bool = False) -> Conditioning:
        """Conditioning of B prompts with its null condition, differentiable to the weights of trained encoders.

        Autocast is off, so that cached and newly encoded prompts agree. `reference=True` uses the base encoders, also
        when a checkpointed region repeats its forward in the backward pass.
        """
        switch = self.as_reference() if reference else nullcontext()
        with switch, torch.autocast(self._family.text_device.type, enabled=False):
            return Conditioning(self._family.encode_texts(list(texts)), self._family.encode_negative(""))

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The encoders that carry a LoRA or are fully tuned, by the pipeline's component name."""
        return {name: part for name, part in self.encoders.items() if name in self._frozen or lora.lora_layers(part)}

    def add_lora(
        self,
        rank: int,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        dropout: float = 0.0,
        encoders: Sequence[str] | None = None,
    ) -> None:
        """Put a fresh LoRA on `encoders` (component names), by default on all.

        `targets` are suffixes of layer names, by default the attention projections. Raises UnknownNameError for an
        encoder that the pipeline does not have, AdapterError for one that is trained already or has none of the layers.
        """
        for encoder in self._untrained(encoders).values():
            lora.inject(encoder, rank=rank, alpha=alpha, targets=targets or attention_layers(encoder), dropout=dropout)

    def unfreeze(self, encoders: Sequence[str] | None = None) -> None:
        """Train all weights of `encoders` (component names), by default of all; frozen copies become the reference.

        The dtype does not change: cast to float32 before, because half-precision weights lose small updates. Raises
        UnknownNameError for an encoder that the pipeline does not have, AdapterError for one that is trained already.
        """
        for name, encoder in self._untrained(encoders).items():
            if name not in self._frozen:
                self._frozen[name] = copy.deepcopy(encoder).requires_grad_(False).eval()
            encoder.requires_grad_(True)

    def put(self, encoders: Mapping[str, nn.Module], window: TunedSteps) -> None:
        """Use tuned `encoders` (component names), frozen, in the steps of `window`; those before are the reference.

        Raises UnknownNameError for an encoder that the pipeline does not have, AdapterError for one that is trained
        already, or that is of another class or shape.
        """
        for name, present in self._untrained(list(encoders)).items():
            problem = _misfit(present, encoders[name])
            if name in self._frozen or problem:
                problem = problem or "that one is tuned already"
                raise AdapterError(f"'{name}' is no tuned version of this model's {type(present).__name__}: {problem}")
            self._frozen[name] = present
        device = self._family.text_device
        tuned = {name: part.to(device).requires_grad_(False).eval() for name, part in encoders.items()}
        self.encoders.update(tuned)
        self._family.pipeline.register_modules(**tuned)
        self.window = window
        self._tree.reset()

    def mix(self, encode: Callable[..., Any], window: TunedSteps) -> None:
        """Encode prompts by `encode` in the steps of `window`; the pipeline's `encode_prompt` is the reference.

        `encode` takes and gives what `encode_prompt` does. Raises AdapterError where tuned encoders were put before.
        """
        if self.window is not None:
            raise AdapterError(
                "a mixture of embeddings is made from the base's own text encoders: leave out `encoder`, or make the "
                "tuned encoders a member of the mixture"
            )
        own = self._family.pipeline.encode_prompt

        @functools.wraps(own)
        def chosen(*arguments: Any, **named: Any) -> Any:
            return (own if self._is_reference else encode)(*arguments, **named)

        self._family.pipeline.encode_prompt = chosen
        self.window, self._is_mixed = window, True
        self._tree.reset()

    def unmix(self) -> None:
        """Undo `mix`: the pipeline's `encode_prompt` encodes in all steps."""
        if self._is_mixed:
            del self._family.pipeline.encode_prompt
            self.window, self._is_mixed = None, False
            self._tree.reset()

    def _untrained(self, names: Sequence[str] | None) -> dict[str, nn.Module]:
        chosen = list(self.encoders) if names is None else list(names)
        if not chosen:
            raise AdapterError(f"a {type(self._family.pipeline).__name__} has no text encoder to train")
        for name in chosen:
            if name not in self.encoders:
                raise UnknownNameError(
                    f"no text encoder '{name}'; the pipeline has {list(self.encoders)}.{nearest(name, self.encoders)}"
                )
            encoder = self.encoders[name]
            if lora.lora_layers(encoder) or any(parameter.requires_grad for parameter in encoder.parameters()):
                raise AdapterError(f"'{name}' is trained already; merge its adapter first or load the model again")
        return {name: self.encoders[name] for name in chosen}

    def base(self, name: str) -> nn.Module:
        """The encoder that the reference uses; one that carries an adapter is switched, not copied."""
        return self._frozen.get(name, self.encoders[name])

    @property
    def has_reference(self) -> bool:
        """Whether any encoder is trained or mixed, so that the base encoders differ from the present ones."""
        return bool(self._is_mixed or self._frozen or self._tree.lora_layers())

    @property
    def is_switched(self) -> bool:
        """Whether chains use the base encoders in some steps, or for the null condition."""
        return self.has_reference and not self._is_reference and self.window not in (None, ALL_STEPS)

    def require_steps(self, count: int) -> None:
        """ConfigError for a chain of `count` steps of which `window` holds none."""
        if self.window is not None:
            self.window.on(count)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within it prompts are encoded by the base encoders: adapters off, frozen copies in place of tuned encoders.

        Use `forward(..., reference=True)` in a checkpointed region that needs gradients. Raises AdapterError if no
        encoder is trained.
        """
        if not self.has_reference:
            raise AdapterError("no reference: no text encoder is trained; add a LoRA (`add_lora`) first")
        pipeline = self._family.pipeline
        before, was_reference = {name: pipeline.components[name] for name in self._frozen}, self._is_reference
        pipeline.register_modules(**{name: part.to(self._family.text_device) for name, part in self._frozen.items()})
        self._is_reference = True
        try:
            with lora.disabled(self._tree.lora_layers()):
                yield
        finally:
            pipeline.register_modules(**before)
            self._is_reference = was_reference

    def save(self, folder: Path) -> list[Path]:
        """Write each trained encoder as a plain pipeline component `folder/NAME`, its adapter merged.

        The vanilla pipeline takes it in place of its own: `from_pretrained(model, NAME=CLASS.from_pretrained(...))`.
        This conditioner keeps its adapters. Raises AdapterError if no encoder is trained.
        """
        if not self.trained:
            raise AdapterError("no text encoder is trained, so there is nothing to save")
        written = []
        for name, encoder in self.trained.items():
            merged: Any = copy.deepcopy(encoder) if lora.lora_layers(encoder) else encoder
            lora.merge(merged)
            merged.save_pretrained(Path(folder) / name)
            written.append(Path(folder) / name)
        return written

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes that FSDP shards one by one by default: those that transformers names and the encoders have."""
        named: set[str] = set()
        for encoder in self.encoders.values():
            named |= set(encoder._no_split_modules or ())  # noqa: SLF001 - accelerate reads it as well
        return sorted(named & {type(module).__name__ for module in self.modules()})

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """Called by Trainer when `activation_checkpointing` is true: trained encoders checkpoint their own layers.

        transformers does so in training mode only.
        """
        for encoder in self.trained.values():
            library: Any = encoder
            library.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _misfit(present: nn.Module, tuned: nn.Module) -> str | None:
    if type(present) is not type(tuned):
        return f"it is a {type(tuned).__name__}"
    shapes = [{name: tuple(value.shape) for name, value in part.state_dict().items()} for part in (present, tuned)]
    different = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
    return f"'{different[0][0]}' has another shape or is in one of them alone" if different else None


def attention_layers(encoder: nn.Module) -> tuple[str, ...]:
    """The suffixes in `ATTENTION` that the encoder's layers have. Raises AdapterError if no kind fits."""
    names = [f".{name}\n" for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    joined = "".join(names)  # each name stands between a dot and a newline
    for suffixes in ATTENTION:
        if all(f".{suffix}\n" in joined for suffix in suffixes):
            return suffixes
    raise AdapterError(f"no default LoRA targets for a {type(encoder).__name__}; give suffixes of its layer names")


# DDP and FSDP find the tensors of a module's inputs and outputs through this registry.
register_pytree_node(
    Conditioning,
    lambda cond: ([dict(cond.tensors), dict(cond.null), dict(cond.controls)], None),
    lambda parts, _: Conditioning(*parts),
)
