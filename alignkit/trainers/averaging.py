"""A moving average of the policy's trained weights as the reference (Linear-DPO, arXiv 2605.21123).

With a LoRA the average is one of its weights, in full fine-tuning one of the whole network. The reference is the policy
with the average in the place of its weights, so trained text encoders and frozen adapters that are on are part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback
from typing_extensions import override

FILE = "reference.safetensors"  # in a checkpoint


class AveragedWeights(TrainerCallback):
    """average = decay average + (1 - decay) weight, after every optimizer step.

    `trained` gives the trained weights by name. It is called at the first use, when the average begins as the weights
    themselves, and not again: the same tensors must stay the trained ones.
    """

    def __init__(self, trained: Callable[[], Mapping[str, Tensor]], decay: float) -> None:
        self._trained, self._update = trained, get_ema_multi_avg_fn(decay)
        self._weights: dict[str, Tensor] = {}
        self._averages: dict[str, Tensor] = {}

    @property
    def averages(self) -> dict[str, Tensor]:
        """The averages by the names of their weights."""
        if not self._averages:
            self._weights = dict(self._trained())
            self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}
        return self._averages

    @override
    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        averages = list(self.averages.values())
        self._update(averages, [weight.detach() for weight in self._weights.values()], 0)

    @contextmanager
    def as_weights(self) -> Iterator[None]:
        """Within it the trained weights hold the average. Nothing in it may need gradients, before or after its end."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, average in self.averages.items():
            weight = self._weights[name]
            weight.data, average.data = average.data, weight.data
        torch.clear_autocast_cache()  # it keeps casts by parameter, whatever the parameter holds by now

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint's folder."""
        save_file({name: average.cpu().contiguous() for name, average in self.averages.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Take the average from a checkpoint's folder, which was written with the same trained weights."""
        for name, stored in load_file(folder / FILE).items():
            self.averages[name].copy_(stored)
