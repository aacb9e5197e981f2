"""Cost of a DenseDPO training step, and of a pair of clips, compared with the bare calls that they need. JSON lines.

    python benchmarks/dense_step.py [--model FOLDER] [--pairs 2] [--frames 17] [--side 32] [--repeats 9] [--steps 8]
        [--only step pairs memory] [--rows 1000 10000]

step: every step of a running `trainer.train()` (rows from the cache, loss, clipping, optimizer, health panel) against
    reference forward, policy forward, loss and backward on tensors that lie ready; in turns, medians.
pairs: the stage `dense-pairs` (files decoded ahead in threads, encoding, noising, parts written) against the bare
    sampler (the VAE's encoder, and the denoiser twice a step, for guidance, on both copies); in turns, medians.
memory: peak resident bytes of the stage for two numbers of clips, each in a process of its own, with a maker that
    computes nothing: what grows is the stage.
Without `--model`: the sandbox's video generator with random weights. A GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from rankdpo_step import WARM_UP, Turns, keep_freed_memory
from torch import Tensor
from transformers import PrinterCallback

from alignkit.generators import load_generator
from alignkit.generators.pairs import RolloutPairs, start_of
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.media import encode_clip, to_pixels
from alignkit.pairs import Pair, PairRequest
from alignkit.records import Prompt, Sampling
from alignkit.trainers.data import collate
from alignkit.trainers.densedpo import DenseDPOConfig, DenseDPOTrainer
from alignkit.trainers.latents import conditioning
from data_pipelines.dense.clips import Clip, Clips
from data_pipelines.dense.config import PairsConfig
from data_pipelines.dense.pairs import make_pairs
from data_pipelines.dense.rows import stored_latents

FPS = 8.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_model(folder: Path) -> Path:
    """The sandbox's video generator before training."""
    from alignkit.sandbox import film_models

    torch.manual_seed(0)
    film_models.pipeline(film_models.vae()).save_pretrained(folder)
    return folder


def rows(generator: PipelineGenerator, chosen: argparse.Namespace) -> datasets.Dataset:
    """Labelled pairs of random latents; their values change no time."""
    from alignkit.adapters.fingerprint import base_of

    shape, codec = generator.latent_shape(chosen.side, chosen.side, chosen.frames), base_of(generator.pipeline.vae)
    segments = [[start, min(start + 4, chosen.frames)] for start in range(0, chosen.frames, 4)]
    made = []
    for number in range(chosen.pairs * (chosen.repeats + WARM_UP)):
        rng = torch.Generator().manual_seed(number)
        cells = [stored_latents(torch.randn(shape, generator=rng), "float32") for _ in range(2)]
        row = {"prompt_id": str(number), "prompt": "a red square", "codec": codec, "fps": FPS}
        row |= {"latents": [{"bytes": cell, "path": None} for cell in cells], "num_frames": chosen.frames}
        made.append({**row, "segments": segments, "labels": [1 - 2 * (number % 2)] * len(segments)})
    return datasets.Dataset.from_list(made)


def step(model: Path, chosen: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Seconds of full and bare steps, and their ratio."""
    arguments = DenseDPOConfig(
        output_dir=str(work / "train"),
        max_steps=chosen.repeats + WARM_UP,
        per_device_train_batch_size=chosen.pairs,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        disable_tqdm=True,
    )
    generator = load_generator(model, device=DEVICE)
    trainer = DenseDPOTrainer(generator, arguments, rows(generator, chosen))
    trainer.remove_callback(PrinterCallback)
    turns = Turns(lambda: {"bare": bare_step(trainer)})
    trainer.add_callback(turns)
    trainer.train()
    taken = turns.medians()
    return {"pairs_per_s": round(chosen.pairs / taken["step"], 3), "ratio": round(taken["bare"] / taken["step"], 4)}


def bare_step(trainer: DenseDPOTrainer) -> Callable[[], None]:
    """The network calls of a step and nothing else."""
    generator, model = trainer.generator, trainer.model_wrapped
    batch = collate([trainer.train_dataset[number] for number in range(trainer.args.train_batch_size)])
    batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
    cond = conditioning(batch, trainer.null).repeat(2)
    x0, noise, t = (batch[name].flatten(0, 1) for name in ("latents", "noise", "t"))
    x_t, target = generator.add_noise(x0, noise, t), generator.target(x0, noise, t)

    def run() -> None:
        with torch.no_grad(), generator.reference():
            model(x_t, t, cond)
        (model(x_t, t, cond).float() - target).square().mean().backward()
        model.zero_grad()

    return run


def film(number: int, frames: int, side: int) -> bytes:
    """A clip of noise in a file."""
    noise = np.random.default_rng(number).integers(0, 255, (frames, side, side, 3), dtype=np.uint8)
    return encode_clip(noise, FPS)


def clips(count: int, read: Callable[[Any, str], bytes]) -> Clips:
    """`count` captioned clips."""
    items = [
        Clip(str(number), Prompt(str(number), "a red square", {}), number, f"clip {number}") for number in range(count)
    ]
    return Clips(items, [], read)


def _clock() -> float:
    """Seconds, once the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Timed:
    """A `PairMaker` whose pairs alternate with the bare sampler's calls; `taken` has the seconds of both."""

    maker: RolloutPairs

    def __post_init__(self) -> None:
        self.name, self.weights, self.codec = self.maker.name, self.maker.weights, self.maker.codec
        self.schedule = self.maker.schedule
        self.taken: dict[str, list[float]] = {"stage": [], "bare": []}
        self._since = 0.0

    def make(self, request: PairRequest, clip: np.ndarray | None) -> Pair:
        """A pair; the time of the stage counts from the end of the earlier bare calls to the end of this pair."""
        pair = self.maker.make(request, clip)
        start = _clock()
        if self._since:
            self.taken["stage"].append(start - self._since)
        self._bare(request, clip, pair.latents)
        self._since = _clock()
        self.taken["bare"].append(self._since - start)
        return pair

    def decode(self, latents: Tensor) -> np.ndarray:
        """As the maker."""
        return self.maker.decode(latents)

    @torch.no_grad()
    def _bare(self, request: PairRequest, clip: np.ndarray | None, x: Tensor) -> None:
        generator, sampling = self.maker.generator, self.maker.sampling
        grid = start_of(generator.grid(sampling.steps, x.shape[1:]), request.etas[0], request.meaning)
        generator.encode(to_pixels(clip)[None].to(generator.device))
        cond = generator.encode_prompts([request.prompt])
        copies = cond.repeat(2)
        for t in grid.t[: len(grid)]:
            for _ in ("conditional", "unconditional"):  # two calls, as Wan's pipeline does
                generator.model(x, t.expand(2).to(x), copies)


def pairs(model: Path, chosen: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Seconds a pair of the stage and of the bare sampler, and their ratio."""
    sampling = Sampling(chosen.steps, 3.0, chosen.side, chosen.side, chosen.frames, fps=FPS)
    timed = Timed(RolloutPairs(load_generator(model, device=DEVICE), sampling))
    files = [film(number, chosen.frames, chosen.side) for number in range(chosen.repeats + WARM_UP)]
    config = PairsConfig(eta=(0.7, 0.7), part_size=4)
    make_pairs(
        clips(len(files), lambda place, _: files[place]), config, sampling, work / "pairs", build_maker=lambda: timed
    )
    stage, bare = (float(np.median(timed.taken[name][WARM_UP - 1 :])) for name in ("stage", "bare"))
    return {"pairs_per_s": round(1 / stage, 3), "ratio": round(bare / stage, 4)}


class Idle:
    """A `PairMaker` that computes nothing."""

    name, weights, schedule, codec = "idle", "none", "none", "none"

    def make(self, request: PairRequest, clip: np.ndarray | None) -> Pair:  # noqa: ARG002
        """Zeros."""
        return Pair(torch.zeros(2, 4, 2, 4, 4), (0.7, 0.7))

    def decode(self, latents: Tensor) -> np.ndarray:
        """Not called."""
        raise NotImplementedError


def peak_of_stage(count: int, side: int) -> int:
    """Peak resident bytes of this process after the stage has made `count` pairs."""
    data, sampling = film(0, 5, side), Sampling(2, 1.0, side, side, 5, fps=FPS)
    with tempfile.TemporaryDirectory() as folder:
        make_pairs(clips(count, lambda *_: data), PairsConfig(), sampling, Path(folder) / "pairs", build_maker=Idle)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(chosen: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes for each number of clips."""
    peaks = {}
    for count in chosen.rows:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peaks[count] = pool.submit(peak_of_stage, count, chosen.side).result()
    first, last = peaks[chosen.rows[0]], peaks[chosen.rows[-1]]
    return {"peak_bytes": peaks, "last_over_first": round(last / first, 4)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=("step", "pairs", "memory"), default=["step", "pairs", "memory"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1000, 10_000])
    chosen = parser.parse_args()
    keep_freed_memory()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        needs_model = {"step", "pairs"} & set(chosen.only)
        model = chosen.model or (random_model(work / "model") if needs_model else None)
        cases = {"step": lambda: step(model, chosen, work), "pairs": lambda: pairs(model, chosen, work)}
        cases["memory"] = lambda: memory(chosen)
        for name in chosen.only:
            print(json.dumps({"case": name, **cases[name]()}), flush=True)


if __name__ == "__main__":
    main()
