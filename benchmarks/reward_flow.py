"""Reward gradients: cost and error of each estimator, memory against steps, and the speed of a training step.

    python benchmarks/reward_flow.py --estimators [--model sandbox:unet] [--reward preference --weights sandbox:careful]
        [--batches 4] [--batch 8] [--sampling_steps 8] [--guidance_scale 1]
    python benchmarks/reward_flow.py --memory [the same]
    python benchmarks/reward_flow.py --step [--window 3] [--repeats 7] [the same]

`--estimators`: one JSON line for each estimator: CPU seconds of a gradient, the cosine of its gradient to the exact one
on the same prompts and noise (mean, least and largest over batches), the cosine between the gradients of different
batches, and the norms. `capped` is the exact chain with the cap of the trainer's default.
`--memory`: one JSON line for each number of differentiated steps: peak bytes of the tensors that one gradient makes and
CPU seconds, with each step and the decoding checkpointed, with each step alone, and with none; `time_over_steps_alone`
is the CPU time of the first over that of the second.
`--step`: one JSON line: CPU seconds (on a GPU: seconds) of a training step through the last `--window` steps, of the
forward and backward passes that it needs and nothing else, and their ratio; the two take turns.
A critic is `--reward yes_no --weights sandbox:vlm`; each prompt has the questions of its grammar.
The weights are a LoRA at its start, in float32, so B of the LoRA alone has a gradient.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from agreement import with_questions
from rankdpo_step import WARM_UP, TensorBytes, Turns
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PrinterCallback

from alignkit.commands.specs import build_reward
from alignkit.diffusion.estimators import ESTIMATORS, Estimator
from alignkit.diffusion.solvers import ddim_step
from alignkit.generators import load_generator
from alignkit.records import texts
from alignkit.sandbox.aspects import GrammarWriter
from alignkit.sandbox.captions import prompts
from alignkit.shipped import model_path
from alignkit.trainers import reward_flow
from alignkit.trainers.data import collate

COUNTS = (1, 2, 4, 8)
EXACT, CAPPED = "exact", "capped"


def build(chosen: argparse.Namespace, folder: str) -> reward_flow.RewardTrainer:
    """A trainer on the sandbox's prompts: its gradients are taken, or its steps are timed."""
    arguments = reward_flow.RewardConfig(
        output_dir=folder,
        reward_weights={"reward": 1.0},
        sampling_steps=chosen.sampling_steps,
        guidance_scale=chosen.guidance_scale,
        height=chosen.side,
        width=chosen.side,
        gradient_steps=f"last {chosen.window}",
        per_device_train_batch_size=chosen.batch,
        max_steps=chosen.repeats + WARM_UP,
        guard=None,
        self_check=False,
        **({} if chosen.step else {"state_gradient_cap": None}),
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        disable_tqdm=True,
    )
    options = {"model": model_path(chosen.weights)} if chosen.weights else {}
    rewards = {"reward": build_reward(chosen.reward, options)}
    generator = load_generator(chosen.model, device=str(arguments.device))
    rows = with_questions(prompts(chosen.batches * chosen.batch, seed=11), GrammarWriter())
    return reward_flow.RewardTrainer(generator, arguments, rows, rewards=rewards)


def batches(trainer: reward_flow.RewardTrainer, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """`chosen.batches` batches of different prompts."""
    starts = range(0, chosen.batches * chosen.batch, chosen.batch)
    return [collate([trainer.train_dataset[row] for row in range(start, start + chosen.batch)]) for start in starts]


def gradient(trainer: reward_flow.RewardTrainer, batch: dict[str, Any]) -> tuple[Tensor, float]:
    """The gradient of the mean loss by all trained weights, as one vector, and its CPU seconds."""
    weights = [weight for weight in trainer.generator.model.parameters() if weight.requires_grad]
    start = time.process_time()
    loss = trainer.method_loss(trainer.model, batch).loss.mean()
    parts = torch.autograd.grad(loss, weights, allow_unused=True)
    seconds = time.process_time() - start
    return torch.cat([part.flatten() for part in parts if part is not None]), seconds


def settle(trainer: reward_flow.RewardTrainer, estimator: Estimator, step: int, cap: float | None = None) -> None:
    """Make the next gradient one by `estimator`, as at training step `step`."""
    trainer._estimator, trainer.args.state_gradient_cap, trainer.state.global_step = estimator, cap, step  # noqa: SLF001


def cosine(first: Tensor, second: Tensor) -> float:
    """Of two vectors; 0 where one is zero."""
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0))


def estimators(trainer: reward_flow.RewardTrainer, chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each estimator, the exact one first."""
    given, exact = batches(trainer, chosen), []
    cases = {EXACT: (ESTIMATORS[EXACT], None), CAPPED: (ESTIMATORS[EXACT], 1.0)}
    further = [replace(ESTIMATORS["draft"], steps=f"last {k}") for k in (2, 5) if k < chosen.sampling_steps]
    cases |= {estimator.steps: (estimator, None) for estimator in further}
    cases |= {name: (estimator, None) for name, estimator in ESTIMATORS.items() if name != EXACT}
    for name, (estimator, cap) in tqdm(cases.items(), desc="estimators"):
        found, seconds = [], []
        for step, batch in enumerate(given):
            settle(trainer, estimator, step, cap)
            vector, took = gradient(trainer, batch)
            found.append(vector)
            seconds.append(took)
        exact = exact or found
        to_exact = torch.tensor([cosine(*pair) for pair in zip(found, exact, strict=True)])
        between = torch.tensor([cosine(*pair) for pair in itertools.combinations(found, 2)])
        norms = torch.stack([vector.norm() for vector in found])
        yield {
            "estimator": name,
            "cpu_s": round(sorted(seconds)[len(seconds) // 2], 3),
            "cosine_to_exact": [round(float(value), 3) for value in (to_exact.mean(), to_exact.min(), to_exact.max())],
            "cosine_between_batches": round(float(between.mean()), 3) if len(between) else None,
            "norm": [float(f"{value:.3g}") for value in (norms.median(), norms.min(), norms.max())],
        }


@contextmanager
def plain_decoding() -> Iterator[None]:
    """Within it the decoding is not checkpointed."""
    with mock.patch.object(reward_flow.RewardConfig, "decoding", None):
        yield


@contextmanager
def kept_activations() -> Iterator[None]:
    """Within it no step and no decoding is checkpointed."""

    def rollout(*inputs: Any, **options: Any) -> Tensor:
        return real(*inputs, checkpointed=False, **options)

    real = reward_flow.rollout
    with plain_decoding(), mock.patch.object(reward_flow, "rollout", rollout):
        yield


def memory(trainer: reward_flow.RewardTrainer, chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each number of differentiated steps."""
    batch = batches(trainer, chosen)[0]
    for count in tqdm([*(k for k in COUNTS if k < chosen.sampling_steps), chosen.sampling_steps], desc="steps"):
        settle(trainer, replace(ESTIMATORS["draft"], steps=f"last {count}"), 0)
        line: dict[str, Any] = {"differentiated_steps": count}
        line["checkpointed_bytes"], line["checkpointed_cpu_s"] = _peak(trainer, batch)
        with plain_decoding():
            line["steps_alone_bytes"], line["steps_alone_cpu_s"] = _peak(trainer, batch)
        line["time_over_steps_alone"] = round(line["checkpointed_cpu_s"] / line["steps_alone_cpu_s"], 3)
        with kept_activations():
            line["plain_bytes"], line["plain_cpu_s"] = _peak(trainer, batch)
        yield line


def bare_step(
    trainer: reward_flow.RewardTrainer, batch: dict[str, Any], window: int, encode: Callable[[], tuple[Any, Any]]
) -> Callable[[], None]:
    """The calls of a training step and nothing else, with the same activation checkpoints: steps, decoding, reward.

    The last `window` steps of the chain have gradients.
    `encode` gives the conditioning of the steps before those, and that of those.
    """
    generator, args = trainer.generator, trainer.args
    shape = generator.latent_shape(args.height, args.width)
    grid, first = generator.grid(args.sampling_steps, shape), args.sampling_steps - window
    sources = [torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]]
    noise = torch.cat([generator.initial_noise(shape, source) for source in sources]).to(args.device) * grid.start
    (reward,) = trainer._rewards.rewards.values()  # noqa: SLF001 - the one that it trains on

    def step() -> None:
        before, within = encode()
        x = noise

        def predict(state: Tensor, index: int) -> Tensor:
            cond = within if index >= first else before
            return generator.guided(generator.model, state, grid.times(index, state), cond, args.guidance_scale)

        for index in range(len(grid)):
            repeats = index >= first
            with torch.set_grad_enabled(repeats):
                prediction = checkpoint(predict, x, index, use_reentrant=False) if repeats else predict(x, index)
            x = ddim_step(generator.prediction, prediction, x, grid, index)
        pixels = generator.decode(x, args.decoding)
        total = checkpoint(lambda media: reward(media, batch["prompts"]).total, pixels, use_reentrant=False)
        (-total.mean()).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def step(trainer: reward_flow.RewardTrainer, chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line with the seconds of both."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time  # a busy CPU has its own time
    batch = batches(trainer, chosen)[0]

    @torch.no_grad()
    def encode() -> tuple[Any, Any]:
        cond = trainer.generator.conditioner(texts(batch["prompts"]))
        return cond, cond

    turns = Turns(lambda: {"bare": bare_step(trainer, batch, chosen.window, encode)}, clock)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(turns)
    trainer.train()
    taken = turns.medians()
    yield {name: round(float(value), 4) for name, value in taken.items()} | {
        "ratio": round(float(taken["bare"] / taken["step"]), 4)
    }


def _peak(trainer: reward_flow.RewardTrainer, batch: dict[str, Any]) -> tuple[int, float]:
    with TensorBytes() as counter:
        gradient(trainer, batch)
    return counter.peak, round(gradient(trainer, batch)[1], 3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimators", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--window", type=int, default=3, help="with --step: differentiated steps, the last ones")
    parser.add_argument("--repeats", type=int, default=7, help="with --step: steps that are timed")
    parser.add_argument("--model", default="sandbox:unet")
    parser.add_argument("--reward", default="preference")
    parser.add_argument("--weights", default="sandbox:careful", help="the reward's option `model`; '' for none")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sampling_steps", type=int, default=8)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--side", type=int, default=64, help="image size in pixels")
    chosen = parser.parse_args()
    questions = (estimators, memory, step)
    if not any(vars(chosen)[measure.__name__] for measure in questions):
        parser.error("name what is measured: --estimators, --memory or --step")
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(chosen, folder)
        settings = {key: value for key, value in vars(chosen).items() if key not in [one.__name__ for one in questions]}
        for measure in questions:
            for line in measure(trainer, chosen) if vars(chosen)[measure.__name__] else ():
                print(json.dumps({"question": measure.__name__, "settings": settings, **line}), flush=True)


if __name__ == "__main__":
    main()
