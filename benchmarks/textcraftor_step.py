"""Cost of a TextCraftor step, compared with the bare calls that it needs, and cost of its window. JSON lines.

    python benchmarks/textcraftor_step.py [--model sandbox:flow] [--prompts 2] [--steps 8] [--window 3] [--repeats 7]
        [--side 64] [--guidance_scale 2.5] [--only speed rewards memory]

`speed`: every step of a running `trainer.train()` against the same calls on the same tensors written out bare: both
encodings, the chain, decoding, reward, backward with its repeated forward passes, the optimizer's step. In turns;
medians, of CPU seconds where there is no CUDA. `ratio` is bare over step.
`rewards`: calls of the denoiser and of the trained encoders in one step, for one reward and for three.
`memory`: peak bytes of the tensors that one gradient makes, by the number of steps with gradients, all other settings
the same (counted op by op, on any device).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rankdpo_step import WARM_UP, TensorBytes, Turns, keep_freed_memory
from reward_flow import bare_step
from transformers import PrinterCallback

from alignkit.commands.specs import build_reward
from alignkit.generators import load_generator
from alignkit.records import Prompt, texts
from alignkit.sandbox.captions import prompts
from alignkit.shipped import model_path
from alignkit.trainers.data import collate
from alignkit.trainers.textcraftor import TextCraftorConfig, TextCraftorTrainer


def trainer_of(
    model: str, folder: str, rewards: Mapping[str, Any], asked: Sequence[Prompt], **keys: Any
) -> TextCraftorTrainer:
    """A trainer for the rewards in equal parts, without files, checks and printing; `keys` are those of the config."""
    arguments = TextCraftorConfig(
        output_dir=folder,
        reward_weights=dict.fromkeys(rewards, 1.0),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        guard=None,
        self_check=False,
        save_strategy="no",
        disable_tqdm=True,
        **{"tuned_steps": "all", **keys},
    )
    generator = load_generator(model, device=str(arguments.device))
    trainer = TextCraftorTrainer(generator, arguments, asked, rewards=rewards)
    trainer.remove_callback(PrinterCallback)
    return trainer


def build(chosen: argparse.Namespace, folder: str, rewards: int = 1) -> TextCraftorTrainer:
    """A trainer on the sandbox's prompts, with `rewards` copies of one reward."""
    reward = build_reward("preference", {"model": model_path(chosen.reward)})
    steps = chosen.repeats + WARM_UP
    return trainer_of(
        chosen.model,
        folder,
        {f"reward_{number}": reward for number in range(rewards)},
        prompts(chosen.prompts * steps, seed=11),
        sampling_steps=chosen.steps,
        guidance_scale=chosen.guidance_scale,
        height=chosen.side,
        width=chosen.side,
        gradient_steps=f"last {chosen.window}",
        max_steps=steps,
        per_device_train_batch_size=chosen.prompts,
    )


def first_batch(trainer: TextCraftorTrainer) -> dict[str, Any]:
    """The rows of one step."""
    return collate([trainer.train_dataset[row] for row in range(trainer.args.train_batch_size)])


def speed(chosen: argparse.Namespace, folder: str) -> Iterator[dict[str, Any]]:
    """Seconds of full and bare steps."""
    trainer = build(chosen, folder)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time  # a busy CPU has its own time
    batch, window = first_batch(trainer), len(trainer.args.gradient.draw(chosen.steps).steps.active or ())
    words, conditioner = texts(batch["prompts"]), trainer.generator.conditioner

    def encode() -> tuple[Any, Any]:
        with torch.no_grad():
            base = conditioner(words, reference=True)
        return base, conditioner(words)

    turns = Turns(lambda: {"bare": bare_step(trainer, batch, window, encode)}, clock)
    trainer.add_callback(turns)
    trainer.train()
    taken = turns.medians()
    seconds = {f"{name}_s": round(float(value), 4) for name, value in taken.items()}
    yield {**seconds, "ratio": round(float(taken["bare"] / taken["step"]), 4)}


def rewards(chosen: argparse.Namespace, folder: str) -> Iterator[dict[str, Any]]:
    """Calls in the forward and backward pass of one step."""
    for count in (1, 3):
        trainer, calls = build(chosen, folder, count), {"denoiser": 0, "encoders": 0}

        def note(name: str, calls: dict[str, int] = calls) -> None:
            calls[name] += 1

        trainer.generator.net.register_forward_hook(lambda *_, note=note: note("denoiser"))
        trainer.generator.conditioner.register_forward_hook(lambda *_, note=note: note("encoders"))
        gradient(trainer)
        yield {"rewards": count, "denoiser_calls": calls["denoiser"], "encoder_calls": calls["encoders"]}


def memory(chosen: argparse.Namespace, folder: str) -> Iterator[dict[str, Any]]:
    """Peak bytes by the number of steps with gradients."""
    trainer, one = build(chosen, folder), 0
    for count in sorted({1, 2, chosen.window, chosen.steps}):
        trainer._estimator = replace(trainer._estimator, steps=f"last {count}")  # noqa: SLF001 - no other trainer
        with TensorBytes() as counter:
            gradient(trainer)
        one = one or counter.peak
        yield {"differentiated_steps": count, "bytes": counter.peak, "over_one": round(counter.peak / one, 4)}


def gradient(trainer: TextCraftorTrainer) -> None:
    """One forward and backward pass."""
    trainer.method_loss(trainer.model, first_batch(trainer)).loss.mean().backward()
    trainer.model.zero_grad()


MEASURES = {"speed": speed, "rewards": rewards, "memory": memory}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sandbox:flow")
    parser.add_argument("--reward", default="sandbox:careful", help="a preference model")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="denoising steps of a chain")
    parser.add_argument("--window", type=int, default=3, help="of them with gradients")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--side", type=int, default=64, help="image size in pixels")
    parser.add_argument("--guidance_scale", type=float, default=2.5)
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    chosen = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen.only:
            for line in MEASURES[name](chosen, folder):
                print(json.dumps({"question": name, "settings": vars(chosen), **line}), flush=True)


if __name__ == "__main__":
    main()
