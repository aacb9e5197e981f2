"""Frozen records that stages, generators, rewards and trainers exchange.

Importing this module loads no torch: tensors appear in annotations only. Shape letters: P prompts, K candidates a
prompt, B batch, C/H/W channels and size, F frames, L tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, require_at_least

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt; `id` is a hash of the normalised text, so equal prompts have equal ids in every run."""

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def from_text(cls, text: str, **metadata: Any) -> Prompt:
        """Strip, fold white space and NFC-normalise `text`; the id is 16 hex digits of its SHA-256."""
        folded = " ".join(unicodedata.normalize("NFC", text).split())
        return cls(hashlib.sha256(folded.encode()).hexdigest()[:16], folded, metadata)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How images or videos are generated.

    guidance_scale: weight of classifier-free guidance; 1: no unconditional call.
    num_frames: frames of a video; 1 makes images.
    fps: frames a second with which videos are stored and shown; no input of the network.
    extra: further keywords of the pipeline's call.

    Counts and sizes are at least 1; the guidance scale is finite and not negative, the frame rate finite and positive.
    Which sizes a model takes (multiples of 8 or more) is checked by its generator. Raises ConfigError.
    """

    steps: int = 30
    guidance_scale: float = 5.0
    height: int = 512
    width: int = 512
    num_frames: int = 1
    negative_prompt: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    fps: float = 8.0

    def __post_init__(self) -> None:
        sizes = {"height": self.height, "width": self.width, "num_frames": self.num_frames}
        require_at_least(1, {"steps": self.steps, **sizes})
        if not 0 <= self.guidance_scale < math.inf:
            raise ConfigError(f"guidance_scale is {self.guidance_scale}; it must be finite and not negative")
        if not 0 < self.fps < math.inf:
            raise ConfigError(f"sampling: fps is {self.fps}; it must be positive, e.g. 8")
        for name in self.extra:
            if name in {*sizes, "guidance_scale", "negative_prompt"}:
                raise ConfigError(f"sampling.extra: {name} is a key of `sampling` itself; write it there")

    def plain(self) -> dict[str, Any]:
        """All settings as JSON values; `fps` for videos only, so that those of images are as they always were."""
        settings = asdict(self)
        if self.num_frames == 1:
            del settings["fps"]
        return settings

    def to_json(self) -> str:
        """Canonical JSON (sorted keys) of `plain`, the form stored beside every image or video."""
        return json.dumps(self.plain(), sort_keys=True)


@dataclass(frozen=True, slots=True)
class Scores:
    """What a reward says of B media: `total` [B], higher is better, and named parts [B] of it."""

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


FAILED = "failed"  # reason of a verdict whose requests got no reply


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which of two media a judge prefers: 1 the first, -1 the second, 0 neither; None where it gave no usable answer.

    reason: why it is 0 or None. details: what the judge answered, JSON values.
    """

    label: int | None
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LossOutput:
    """An unreduced loss of any shape, already 0 where nothing counts, and what to log: detached scalars, or one number
    for each row, NaN where a row has none.

    `weight` is the number of terms that count; None: all, `loss.numel()`. The loss of a training step is the sum of
    all losses divided by the sum of all weights, over ranks and accumulated micro-batches.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    weight: Tensor | float | None = None

    def total_weight(self) -> float:
        """`weight` as a number, or the number of terms."""
        return float(self.loss.numel() if self.weight is None else self.weight)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """All that the denoiser takes beside x_t and t. A record, because families need different tensors.

    `tensors` [B, ...] are what the text encoders computed, by the network's own names; `null` [1, ...] has the same
    names and is the null condition. `controls` [B] are the other inputs of the network (guidance scale, target time);
    they belong to the row and stay when its text is dropped.
    """

    tensors: Mapping[str, Tensor]
    null: Mapping[str, Tensor]
    controls: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def control(self, name: str) -> Tensor:
        """The control `name` [B]. Raises ConfigError if the conditioning has none."""
        if name not in self.controls:
            raise ConfigError(
                f"the conditioning has no control '{name}', only {sorted(self.controls)}; add "
                "`generator.training_controls(t)` with `with_controls`, or call `generator.predict` or `guided`"
            )
        return self.controls[name]

    def with_controls(self, controls: Mapping[str, Tensor]) -> Conditioning:
        """The same with these controls [B] added or replaced."""
        return replace(self, controls={**self.controls, **controls})

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply `change` to every tensor and control of the rows; the null condition does not change."""
        tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
        controls = {name: change(control) for name, control in self.controls.items()}
        return replace(self, tensors=tensors, controls=controls)

    def rows(self, index: Any) -> Conditioning:
        """The rows that `index` (slice, list or index tensor) selects."""
        return self.map(lambda tensor: tensor[index])

    def repeat(self, times: int) -> Conditioning:
        """Each row `times` times in a row: [B, ...] -> [B * times, ...]."""
        return self.map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def drop(self, mask_B: Tensor) -> Conditioning:
        """Rows where `mask_B` is true get the null condition (caption dropout); controls stay."""
        return replace(self, tensors={k: _where(mask_B, self.null[k], v) for k, v in self.tensors.items()})

    def unconditional(self) -> Conditioning:
        """The null condition for every row, for classifier-free guidance; controls stay."""
        return replace(self, tensors={k: self.null[k].expand_as(v) for k, v in self.tensors.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on `device`, the null condition too."""
        rows = self.map(lambda tensor: tensor.to(device))
        return replace(rows, null={name: tensor.to(device) for name, tensor in self.null.items()})


@dataclass(frozen=True, slots=True)
class Texts:
    """P prompts as text, for a denoiser that trains text encoders and therefore encodes them in every step.

    `dropped` [P] marks the prompts that get the null condition. `cached` is the conditioning [B, ...] by the base
    encoders with `dropped` already applied: the reference uses it, and so does a denoiser without trained encoders.
    Prompt p belongs to rows p B / P to (p + 1) B / P - 1 of a batch.
    """

    texts: Sequence[str]
    dropped: Tensor
    cached: Conditioning

    def __len__(self) -> int:
        return len(self.cached)

    def with_controls(self, controls: Mapping[str, Tensor]) -> Texts:
        """The same with these controls [B] added or replaced."""
        return replace(self, cached=self.cached.with_controls(controls))

    def repeat(self, times: int) -> Texts:
        """Each row `times` times in a row: B -> B * times; the texts stay P."""
        return replace(self, cached=self.cached.repeat(times))

    def to(self, device: torch.device | str) -> Texts:
        """The same on `device`."""
        return replace(self, dropped=self.dropped.to(device), cached=self.cached.to(device))


def _where(mask_B: Tensor, null: Tensor, rows: Tensor) -> Tensor:
    import torch

    mask = mask_B.reshape(-1, *([1] * (rows.dim() - 1)))
    return torch.where(mask, null.to(rows.dtype), rows)


def texts(prompts: Sequence[Prompt]) -> list[str]:
    """The prompt texts, in order."""
    return [prompt.text for prompt in prompts]
