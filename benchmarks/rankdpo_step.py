"""What a RankDPO step costs beside the bare calls it needs, and what the low-memory step holds. One JSON line.

    python benchmarks/rankdpo_step.py [--model FOLDER] [--prompts 2] [--candidates 4] [--repeats 9] [--runs 4]
        [--only "full, low memory" ...]

Speed: every step of a running `trainer.train()` (rows from the cache, loss, clipping, optimizer, health panel) against
the same network calls on the same tensors written out bare: reference forward, policy forward, mean of squares,
backward (for low memory with its second forward), and for full tuning the optimizer's step. In turns; medians. With a
precomputed reference, bare needs no reference forward; the one pass that makes it is shared by `--runs` runs in the
amortised number.
Memory: peak bytes of all tensors that loss and backward make for K = 8 candidates, over those for one (counted op by
op, on any device), and torch.cuda's own peak where there is CUDA.
Fixed cost: what switching, listing and clearing cost a step on SDXL's 7,529 modules with a LoRA, whatever is computed.
Without `--model`: the sandbox's flow transformer with random weights.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import io
import json
import sys
import tempfile
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from fixed_cost import fixed_cost
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from typing_extensions import override

from alignkit.generators import load_generator
from alignkit.records import Conditioning
from alignkit.trainers.data import collate
from alignkit.trainers.latents import conditioning
from alignkit.trainers.rankdpo import RankDPOConfig, RankDPOTrainer

Batch = dict[str, Tensor]
WARM_UP = 2  # steps that are not counted


def random_model(folder: Path) -> Path:
    """The sandbox's flow transformer before training, as a pipeline folder."""
    from alignkit.sandbox import generators, models

    torch.manual_seed(0)
    generators.build_flow(models.vae()).save_pretrained(folder)
    return folder


# What the trainer is told of each kind, in this order: full_finetune, low_memory, precompute_reference.
KINDS = {
    "lora": (False, False, False),
    "lora, precomputed reference": (False, False, True),
    "lora, low memory": (False, True, False),
    "lora, low memory, precomputed reference": (False, True, True),
    "full": (True, False, False),
    "full, precomputed reference": (True, False, True),
    "full, low memory": (True, True, False),
    "full, low memory, precomputed reference": (True, True, True),
}


def rows(prompts: int, candidates: int, side: int) -> datasets.Dataset:
    """Ranked rows of noise images: what they show does not matter to a stop-watch."""

    def picture() -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.effect_noise((side, side), 80).convert("RGB").save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    phi = [k / max(1, candidates - 1) for k in range(candidates)]
    made = [
        {"prompt_id": str(p), "prompt": "a red circle", "images": [picture() for _ in range(candidates)], "phi": phi}
        for p in range(prompts)
    ]
    features = datasets.Features(
        {
            "prompt_id": datasets.Value("string"),
            "prompt": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "phi": datasets.List(datasets.Value("float64")),
        }
    )
    return datasets.Dataset.from_list(made, features=features)


def build(model: Path, chosen: argparse.Namespace, work: Path, **options: Any) -> RankDPOTrainer:
    """A trainer over as many rows as the steps of one epoch need."""
    steps = chosen.repeats + WARM_UP
    arguments = RankDPOConfig(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=chosen.prompts,
        use_cpu=not torch.cuda.is_available(),
        bf16=chosen.bf16,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    data = rows(chosen.prompts * steps, chosen.candidates, chosen.side)
    trainer = RankDPOTrainer(load_generator(model, device="cpu"), arguments, data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def first_batch(trainer: RankDPOTrainer) -> Batch:
    """The rows of one step, on the device."""
    batch = collate([trainer.train_dataset[i] for i in range(trainer.args.train_batch_size)])
    return {name: value.to(trainer.args.device) for name, value in batch.items()}


def bare_step(trainer: RankDPOTrainer, *, reference: bool) -> Callable[[], None]:
    """The network calls of that step and nothing else, on tensors that lie ready."""
    generator, model, batch = trainer.generator, trainer.model_wrapped, first_batch(trainer)
    count = batch["latents"].shape[1]
    cond = conditioning(batch, trainer.null)
    x0, noise, t = (batch[name].flatten(0, 1) for name in ("latents", "noise", "t"))
    x_t, target = generator.add_noise(x0, noise, t), generator.target(x0, noise, t)

    def error(x: Tensor, wanted: Tensor, time_: Tensor, given: Conditioning) -> Tensor:
        return (model(x, time_, given).float() - wanted).square().mean()

    def policy() -> Tensor:
        if not trainer.args.low_memory:
            return error(x_t, target, t, cond.repeat(count))
        columns = zip(*(tensor.unflatten(0, (-1, count)).unbind(1) for tensor in (x_t, target, t)), strict=True)
        return torch.stack([checkpoint(error, *column, cond, use_reentrant=False) for column in columns]).mean()

    def frozen() -> None:
        with torch.no_grad(), generator.reference():
            if not trainer.args.low_memory:
                model(x_t, t, cond.repeat(count))
                return
            for x, time_ in zip(*(tensor.unflatten(0, (-1, count)).unbind(1) for tensor in (x_t, t)), strict=True):
                model(x, time_, cond)

    def step() -> None:
        if reference:
            frozen()
        policy().backward()
        if trainer.args.full_finetune:
            trainer.optimizer.step()
        model.zero_grad()

    return step


class Turns(TrainerCallback):
    """Times each step of a running training, from one `on_step_end` to the next, and between them the `others`.

    So a busy machine is equally unkind to all. All that Trainer does is in `step`: rows, clipping, optimizer, logging.
    `clock` gives seconds, or an array of the seconds of several clocks.
    """

    def __init__(
        self, make_others: Callable[[], dict[str, Callable[[], Any]]], clock: Callable[[], Any] = time.perf_counter
    ) -> None:
        self.make_others, self.others, self.clock = make_others, {}, clock
        self.taken: dict[str, list[Any]] = defaultdict(list)
        self.since = clock()

    @override
    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        _synchronise()
        took = self.clock() - self.since
        self.others = self.others or self.make_others()
        times = {"step": took, **{name: self._seconds(run) for name, run in self.others.items()}}
        if state.global_step > WARM_UP:
            for name, value in times.items():
                self.taken[name].append(value)
        self.since = self.clock()

    def _seconds(self, run: Callable[[], Any]) -> Any:
        start = self.clock()
        run()
        _synchronise()
        return self.clock() - start

    def medians(self) -> dict[str, Any]:
        """Median seconds of every kind."""
        return {name: np.median(seconds, axis=0) for name, seconds in self.taken.items()}


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: else page faults, a tenth of a step on a CPU, hit whichever side comes first."""
    if sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**25)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def speed(model: Path, chosen: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Images a second of full and bare steps, and their ratio, for each of the KINDS that were chosen."""
    results = []
    for name in tqdm(chosen.only, desc="steps"):
        full, low, ready = KINDS[name]
        options = {"full_finetune": full, "low_memory": low, "precompute_reference": ready}
        trainer = build(model, chosen, work / name.replace(", ", "-").replace(" ", "_"), **options)
        turns = Turns(functools.partial(_others, trainer, ready=ready))
        trainer.add_callback(turns)
        trainer.train()
        taken = turns.medians()
        images = chosen.prompts * chosen.candidates
        result = {
            "kind": name,
            "images_per_s": round(images / taken["step"], 2),
            "bare_images_per_s": round(images / taken["bare"], 2),
            "ratio": round(taken["bare"] / taken["step"], 4),
        }
        if ready:
            # Each run reads the shared errors; one of `runs` pays for them.
            result["amortised_images_per_s"] = round(images / (taken["step"] + taken["reference"] / chosen.runs), 2)
        results.append(result)
    return results


def _others(trainer: RankDPOTrainer, *, ready: bool) -> dict[str, Callable[[], None]]:
    steps = {"bare": bare_step(trainer, reference=not ready)}
    if ready:
        batch, low = first_batch(trainer), trainer.args.low_memory
        steps["reference"] = lambda: (trainer.reference_errors(trainer.model_wrapped, batch, one_by_one=low), None)[1]
    return steps


class TensorBytes(TorchDispatchMode):
    """Peak bytes of tensors made within it (outputs, saved activations, gradients, temporaries), each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, counted=False)  # what was there before, or is counted already
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            self._note(tensor, counted=True)
        return output

    def _note(self, tensor: Any, *, counted: bool) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:  # noqa: SLF001 - the one name of a storage while it lives
            self._sizes[storage._cdata] = storage.nbytes() if counted else 0  # noqa: SLF001
            self.live += self._sizes[storage._cdata]  # noqa: SLF001
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata)  # noqa: SLF001

    def _forget(self, name: int) -> None:
        self.live -= self._sizes.pop(name)


def memory(model: Path, chosen: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Peak bytes of K = 8 in the low-memory and in the plain step, over K = 1."""
    result: dict[str, Any] = {}
    for name, candidates, low in (("one", 1, False), ("low_memory", 8, True), ("plain", 8, False)):
        chosen_k = argparse.Namespace(**{**vars(chosen), "candidates": max(2, candidates), "prompts": 1, "repeats": 1})
        trainer = build(model, chosen_k, work / f"memory-{name}", low_memory=low)
        batch = first_batch(trainer)
        batch |= {key: batch[key][:, :candidates] for key in ("latents", "noise", "t", "phi")}
        result[f"{name}_tensor_bytes"] = _tensor_bytes(trainer, batch)
        if torch.cuda.is_available():
            result[f"{name}_cuda_bytes"] = _cuda_bytes(trainer, batch)
    for kind in ("tensor", "cuda"):
        if f"one_{kind}_bytes" in result:
            one = result[f"one_{kind}_bytes"]
            result[f"low_memory_over_one_{kind}"] = round(result[f"low_memory_{kind}_bytes"] / one, 4)
            result[f"plain_over_one_{kind}"] = round(result[f"plain_{kind}_bytes"] / one, 4)
    return result


def _backward(trainer: RankDPOTrainer, batch: Batch) -> None:
    loss = trainer.method_loss(trainer.model, batch).loss
    loss.mean().backward()
    trainer.model.zero_grad()


def _tensor_bytes(trainer: RankDPOTrainer, batch: Batch) -> int:
    with TensorBytes() as counter:
        _backward(trainer, batch)
    return counter.peak


def _cuda_bytes(trainer: RankDPOTrainer, batch: Batch) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _backward(trainer, batch)
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--side", type=int, default=64, help="picture size in pixels")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--runs", type=int, default=4, help="runs that share one precomputed reference")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help="; ".join(KINDS))
    chosen = parser.parse_args()
    keep_freed_memory()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = chosen.model or random_model(work / "model")
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(chosen).items()}
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
        )
        answer = {
            "question": "cost of a RankDPO step over its bare network calls",
            "device": device,
            "settings": settings,
            "steps": speed(model, chosen, work),
            "memory": memory(model, chosen, work),
            "fixed_cost": fixed_cost(),
            "targets": {"ratio": 0.95, "low_memory_over_one": 1.25, "fixed_cost_ms": 15},
        }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
