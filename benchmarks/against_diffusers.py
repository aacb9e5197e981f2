"""Seconds of Diffusion-DPO in alignkit beside diffusers' own script, on the same model and pairs. One JSON line.

    python benchmarks/against_diffusers.py [--script PATH] [--steps 12] [--epochs 3] [--pairs 12] [--side 256] [--bf16]
        [--batch 1] [--rank 8] [--work FOLDER] [--tiny]

PATH is diffusers' examples/research_projects/diffusion_dpo/train_diffusion_dpo_sdxl.py (Apache-2.0; not part of
alignkit). It runs in a process of its own, twice: with few steps and with all epochs; the difference is the cost
of the steps, and a third start with `--help` measures its imports. Without it, or where it does not run (it imports
torchvision and wandb), a bare loop makes the same calls, and the output says so; its steps then alternate with
ours in one process.

`whole_run`: `--epochs` epochs from loading to saving, without imports; ours builds the latents cache.
`per_step`: ours with that cache, and with a cache that also holds the reference errors of all epochs (from an
earlier run with the same draws, see `precompute_reference`).
`loss`: both losses on the same pairs, noise and timesteps, with the same random LoRA; a difference in float64 above
1e-4 of their size ends in an error.

The model is a small SDXL with random weights. Its VAE and text encoders have the same shares of the arithmetic as those
of SDXL at 256 pixels (`sizes`). `--tiny` shows that the script works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import small_sdxl
import torch
from bare_dpo import Bare, Settings, stacked
from rankdpo_step import WARM_UP, Turns, first_batch, keep_freed_memory
from torch import Tensor
from tqdm import tqdm

from alignkit.generators import load_generator
from alignkit.trainers.data import collate
from alignkit.trainers.rankdpo import RankDPOConfig, RankDPOTrainer
from data_pipelines.importers import load_ranked

FEW = 2  # steps of the script's short run
CLOCKS = ("wall_s", "cpu_s")
TARGETS = {"per_step": {"fp32": 1.4, "bf16": 1.7}, "whole_run": 1.2, "loss_relative_difference": 1e-4}


def clocks() -> np.ndarray:
    """Wall seconds and CPU seconds of this process."""
    return np.array([time.perf_counter(), time.process_time()])


# --- the script -------------------------------------------------------------------------------------------------------


class ScriptError(Exception):
    """The script ended with an error."""


class Script:
    """diffusers' script in a process of its own."""

    def __init__(self, path: Path, model: Path, data: Path, settings: Settings, work: Path) -> None:
        self.path, self.settings, self.work = path, settings, work
        self.flags = {
            "pretrained_model_name_or_path": model,
            "dataset_name": data,
            "dataset_split_name": "train",
            "cache_dir": work / "datasets",
            "seed": settings.seed,
            "resolution": settings.side,
            "train_batch_size": settings.batch,
            "rank": settings.rank,
            "learning_rate": settings.learning_rate,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "beta_dpo": int(settings.beta),
            "mixed_precision": "bf16" if settings.bf16 else "no",
        }

    def measure(self, epochs: int, steps: int) -> dict[str, np.ndarray]:
        """Seconds of a step, and of the run of `epochs` (that is `steps`) without imports. Raises ScriptError."""
        imports = self._seconds(["--help"])
        few = self._seconds(self._options(max_train_steps=FEW))
        whole = self._seconds(self._options(num_train_epochs=epochs))
        return {"per_step": (whole - few) / (steps - FEW), "whole_run": whole - imports}

    def _options(self, **length: int) -> list[str]:
        flags = {**self.flags, **length, "output_dir": self.work / f"script-{'-'.join(length)}"}
        return ["--no_hflip", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]

    def _seconds(self, options: Sequence[str]) -> np.ndarray:
        """Wall and CPU seconds of one run; its output is copied to stderr."""
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command, last = [sys.executable, str(self.path), *options], b""
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:  # noqa: S603 - the user names it
            output: Any = process.stdout
            for part in iter(lambda: output.read1(2**12), b""):
                last = (last + part)[-(2**12) :]
                if options != ["--help"]:
                    sys.stderr.write(part.decode(errors="replace"))
        if process.returncode:
            lines = last.decode(errors="replace").strip().splitlines() or ["it printed nothing"]
            raise ScriptError(f"'{self.path}' ended with status {process.returncode}: {lines[-1]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return np.array([time.perf_counter() - start, cpu])


# --- both sides in this process ---------------------------------------------------------------------------------------


class Ours:
    """Trainers on the pairs; all share one latents cache."""

    def __init__(self, model: Path, data: Path, settings: Settings, work: Path) -> None:
        self.model, self.data, self.settings, self.work = model, data, settings, work

    def trainer(self, name: str, **options: Any) -> RankDPOTrainer:
        """A trainer with the settings of both sides; the first one fills the cache."""
        settings = self.settings
        arguments = RankDPOConfig(
            output_dir=str(self.work / name),
            cache_dir=str(self.work / "cache"),
            loss="diffusion_dpo",
            beta=settings.beta,
            lora_rank=settings.rank,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            caption_dropout=0.0,
            resolution=settings.side,
            seed=settings.seed,
            bf16=settings.bf16,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            **options,
        )
        rows = load_ranked(self.data, "train", held_out=0.0)
        generator = load_generator(self.model, dtype=torch.bfloat16 if settings.bf16 else torch.float32)
        return RankDPOTrainer(generator, arguments, rows)

    def whole_run(self, epochs: int) -> tuple[np.ndarray, RankDPOTrainer, set[tuple[int, float]]]:
        """Seconds with an empty cache; the trainer, and the draws (row, a value of the noise) that it used."""
        draws: set[tuple[int, float]] = set()

        def noted(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            draws.update((int(item["row"]), float(item["noise"].flatten()[0])) for item in items)
            return collate(items)

        start = clocks()
        trainer = self.trainer("whole", num_train_epochs=epochs)
        trainer.data_collator = noted
        trainer.train()
        trainer.save_model(str(self.work / "ours"))
        return clocks() - start, trainer, draws

    def warm(self, steps: int, others: Mapping[str, Callable[[], Any]], *, ready: bool) -> dict[str, np.ndarray]:
        """Median seconds of a step with the cache filled, in turns with `others`; `ready`: reference errors too."""
        trainer = self.trainer(f"warm-{ready}", max_steps=steps + WARM_UP, precompute_reference=ready)
        turns = Turns(lambda: dict(others), clocks)
        trainer.add_callback(turns)
        trainer.train()
        return turns.medians()


def bare_run(bare: Callable[[], Bare], epochs: int, folder: Path) -> tuple[np.ndarray, Bare]:
    """Seconds from loading to saving."""
    start = clocks()
    loop = bare()
    for _ in tqdm(range(loop.steps(epochs)), desc="the bare loop"):
        loop.step()
    loop.save(folder)
    return clocks() - start, loop


@torch.no_grad()
def losses(trainer: RankDPOTrainer, bare: Bare) -> dict[str, Any]:
    """Ours and the bare loop's, with one random LoRA, our noise and times, and each side's own decoding and encoding.

    In float32 their difference is one of rounding, which beta = 5000 makes large; so both networks are compared in
    float64 as well, and stay in it. In bf16 they are compared as they train.
    """
    net, source = trainer.generator.net, torch.Generator(trainer.args.device).manual_seed(0)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.02, generator=source)
    bare.unet.load_state_dict(net.state_dict())
    found: dict[str, Any] = {"bf16" if bare.settings.bf16 else "float32": _both_losses(trainer, bare)}
    if not bare.settings.bf16:
        net.double()
        bare.unet.double()
        found["float64"] = _both_losses(trainer, bare)
    return found


def _both_losses(trainer: RankDPOTrainer, bare: Bare) -> dict[str, float]:
    batch = first_batch(trainer)
    with trainer.accelerator.autocast():
        ours = float(trainer.method_loss(trainer.model_wrapped, batch).loss.mean())
    rows = stacked([bare.rows[number] for number in batch["row"].tolist()])
    timesteps: Tensor = trainer.generator.noise_schedule.model_time(batch["t"][:, 0])
    latents, noise = bare.latents(rows, sample=False), batch["noise"][:, 0].to(bare.unet.dtype)
    theirs = float(bare.loss(latents, noise, timesteps, bare.condition(rows)))
    return {"ours": ours, "bare": theirs, "relative_difference": abs(ours - theirs) / abs(theirs)}


# --- the answer -------------------------------------------------------------------------------------------------------


def seconds(values: np.ndarray) -> dict[str, float]:
    """By clock; on a CUDA device the CPU's seconds mean nothing."""
    used = CLOCKS[:1] if torch.cuda.is_available() else CLOCKS
    return {name: round(float(value), 4) for name, value in zip(used, values, strict=False)}


def compared(ours: np.ndarray, theirs: np.ndarray) -> dict[str, dict[str, float]]:
    """The seconds of both sides, and theirs over ours."""
    return {"ours": seconds(ours), "theirs": seconds(theirs), "ratio": seconds(theirs / ours)}


def warm_up(settings: Settings, work: Path) -> None:
    """One step of both sides on a tiny model, so that late imports are not part of the whole runs."""
    small_sdxl.build(tiny=True).save_pretrained(model := work / "model")
    data = small_sdxl.write_pairs(work / "pairs", settings.batch, settings.side)
    Ours(model, data, settings, work).whole_run(1)
    bare_run(lambda: Bare(model, data, settings, work / "datasets"), 1, work / "theirs")


def measure(chosen: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All figures."""
    settings = Settings(chosen.batch, chosen.side, chosen.rank, chosen.learning_rate, chosen.beta, 0, chosen.bf16)
    if not chosen.tiny:
        warm_up(settings, work / "warm_up")
    pipeline = small_sdxl.build(tiny=chosen.tiny)
    sizes = {"unet_parameters": sum(parameter.numel() for parameter in pipeline.unet.parameters())}
    sizes |= small_sdxl.shares(pipeline, chosen.side)
    pipeline.save_pretrained(model := work / "model")
    data = small_sdxl.write_pairs(work / "pairs", chosen.pairs, chosen.side)

    theirs, script = "a bare loop of the same calls; no script was given", None
    if chosen.script is not None:
        try:
            script = Script(chosen.script, model, data, settings, work).measure(chosen.epochs, chosen.all_steps)
            theirs = f"'{chosen.script}', from runs of two lengths"
        except ScriptError as error:
            theirs = f"a bare loop of the same calls; {error}"
    print(f"diffusers' side is {theirs}", file=sys.stderr)

    ours = Ours(model, data, settings, work)
    whole, trainer, draws = ours.whole_run(chosen.epochs)
    bare_whole, bare = bare_run(lambda: Bare(model, data, settings, work / "datasets"), chosen.epochs, work / "theirs")
    per_step = {}
    for name, ready in (("latents cached", False), ("latents and reference errors cached", True)):
        taken = ours.warm(chosen.steps, {} if script else {"theirs": bare.step}, ready=ready)
        per_step[name] = compared(taken["step"], script["per_step"] if script else taken["theirs"])
    return {
        "question": "seconds of Diffusion-DPO in alignkit beside diffusers' script",
        "theirs": theirs,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "precision": "bf16" if chosen.bf16 else "fp32",
        "per_step": per_step,
        "whole_run": compared(whole, script["whole_run"] if script else bare_whole),
        "loss": losses(trainer, bare),
        "draws": {"rows x epochs": chosen.pairs * chosen.epochs, "distinct": len(draws)},
        "sizes": sizes,
        "settings": asdict(settings) | {"epochs": chosen.epochs, "pairs": chosen.pairs, "steps": chosen.steps},
        "targets": TARGETS,
    }


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, help="diffusers' train_diffusion_dpo_sdxl.py")
    parser.add_argument("--steps", type=int, default=12, help="steps whose median counts, after two that do not")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--side", type=int, default=256, help="image size in pixels, a multiple of 32")
    parser.add_argument("--batch", type=int, default=1, help="pairs a step")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=5000.0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--work", type=Path, help="an empty or new folder; default: a temporary one")
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args()
    if chosen.side % 32 or chosen.side < 32:
        parser.error(f"--side is {chosen.side}; it must be a positive multiple of 32")
    chosen.all_steps = chosen.epochs * math.ceil(chosen.pairs / max(1, chosen.batch))
    if min(chosen.batch, chosen.steps) < 1 or chosen.all_steps <= FEW:
        parser.error(f"give at least one pair a step and one step, and more than {FEW} steps in all epochs")
    if chosen.script is not None and not chosen.script.is_file():
        parser.error(
            f"--script: '{chosen.script}' is no file; name diffusers' train_diffusion_dpo_sdxl.py, or leave it out"
        )
    if chosen.work is not None and chosen.work.is_dir() and any(chosen.work.iterdir()):
        parser.error(f"--work: '{chosen.work}' is not empty; an old cache in it would make the first run a warm one")
    return chosen


def main() -> None:
    """Measure and print."""
    chosen = arguments()
    keep_freed_memory()
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        answer = measure(chosen, chosen.work or Path(folder))
    print(json.dumps(answer))
    difference = answer["loss"].get("float64", {}).get("relative_difference", 0.0)
    if difference > TARGETS["loss_relative_difference"]:
        sys.exit(f"the two losses differ by {difference:.1e} of their size, so the ratios compare two things")


if __name__ == "__main__":
    main()
