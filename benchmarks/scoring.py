"""Scoring throughput of each reward against the bare model's forward on the same batch. One JSON line a case.

    python benchmarks/scoring.py [NAME ...] [--batch 8] [--size 512] [--repeats 9] [--device cpu] [--dtype float32]
    python benchmarks/scoring.py pick_score --model FOLDER [--processor FOLDER]    published weights
    python benchmarks/scoring.py hps --model HPS_v2.1_compressed.pt --processor FOLDER
    python benchmarks/scoring.py hpsv3 --model HPSv3.safetensors --processor FOLDER
    python benchmarks/scoring.py ensemble                                          shared vision against unshared
    python benchmarks/scoring.py --tiny --batch 2 --size 64 --repeats 1            does every case run?

Weights are random at a moderate size by default (`random_weights.py`): towers of 6 layers, 384 wide. The bare forward
gets pixels and tokens that are ready; the reward checks, resizes and normalises images and tokenises prompts that it
has not seen before. Both run in turn, no gradient; a figure is the median over the repeats of their ratio, on a CPU in
seconds of the processor. `speed_up` is over a bare forward for each question. Cases: `scoring_cases.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import random_weights as weights
import torch
from scoring_cases import CASES, Bench, mps_reward
from transformers.utils import logging

from alignkit.records import Prompt
from rewards.hps import Hps
from rewards.models.clip import ClipReward, share_vision
from rewards.pick_score import PickScore


def clock(run: Callable[[], Any], device: str) -> float:
    """Seconds of one run: of the processor on a CPU, which other programs there do not change, else of the wall."""
    timer = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.accelerator.synchronize()
    start = timer()
    run()
    if device != "cpu":
        torch.accelerator.synchronize()
    return timer() - start


def in_turn(first: Callable[[int], Any], second: Callable[[int], Any], bench: Bench) -> tuple[list[float], list[float]]:
    """Seconds of both, run in turn with the order changing, after one run each that is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(bench.options.repeats + 1):
        for which in (0, 1) if index % 2 else (1, 0):
            seconds = clock(lambda i=index, w=which: (first, second)[w](i), bench.options.device)
            if index:
                times[which].append(seconds)
    return times


def unseen(prompts: Sequence[Prompt], index: int) -> list[Prompt]:
    """The prompts with a number, so that nothing read before can be remembered."""
    return [Prompt.from_text(f"{prompt.text} {index}", **prompt.metadata) for prompt in prompts]


def against_bare(name: str, bench: Bench) -> dict[str, Any]:
    """A reward's images a second, and its share of the bare model's."""
    case = CASES[name](bench)
    count, median = len(case.media), statistics.median

    def score(index: int) -> None:
        case.reward(case.media, unseen(case.prompts, index))

    scored, bare = in_turn(score, lambda _: case.bare(), bench)
    ratio = median(b / s for s, b in zip(scored, bare, strict=True))
    found = {"per_s": round(count / median(scored), 2), "bare_per_s": round(count / median(bare), 2)}
    if case.full is not None:
        scored, full = in_turn(score, lambda _: case.full(), bench)
        found |= {"full_per_s": round(count / median(full), 2)}
        found |= {"speed_up": round(median(f / s for s, f in zip(scored, full, strict=True)), 2)}
    return {"reward": name, **found, "ratio": round(ratio, 3)}


def ensemble(bench: Bench) -> dict[str, Any]:
    """PickScore, HPSv2 and MPS of equal vision weights: together with one look, and with three."""
    folder = str(weights.clip(bench.work, bench.size))
    random = Bench(bench.work, argparse.Namespace(**{**vars(bench.options), "model": ""}))

    def members() -> list[ClipReward]:
        options = {"processor": folder, **bench.given}
        return [PickScore(folder, **options), Hps(folder, **options), mps_reward(random)]

    shared, unshared, media, prompts = members(), members(), bench.media(), bench.prompts()
    towers = share_vision(shared)

    def score(rewards: list[ClipReward], index: int) -> None:
        fresh = media.clone()  # a new batch: nothing seen before may be used
        for reward in rewards:
            reward(fresh, unseen(prompts, index))

    one, three = in_turn(lambda i: score(shared, i), lambda i: score(unshared, i), bench)
    speed = statistics.median(t / o for o, t in zip(one, three, strict=True))
    times = {"shared_s": round(statistics.median(one), 4), "unshared_s": round(statistics.median(three), 4)}
    return {"reward": "ensemble", "members": len(shared), "towers": towers, **times, "speed_up": round(speed, 2)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join([*CASES, 'ensemble'])}; all by default")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in pixels")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", default="", help="published weights, for a single name")
    parser.add_argument("--processor", default="", help="its tokenizer and preprocessor_config.json")
    parser.add_argument("--head", default="", help="the aesthetic score's head")
    parser.add_argument("--tiny", action="store_true", help="random weights that are tiny: does it run?")
    chosen = parser.parse_args()
    names = chosen.names or [*CASES, "ensemble"]
    if unknown := set(names) - {*CASES, "ensemble"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join([*CASES, 'ensemble'])}")
    if chosen.model and (len(names) > 1 or names == ["ensemble"]):
        parser.error("--model belongs to one reward; name it")
    logging.disable_progress_bar()
    torch.manual_seed(0)
    settings = {key: vars(chosen)[key] for key in ("batch", "size", "repeats", "device", "dtype", "model", "tiny")}
    settings["threads"] = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as work, torch.no_grad():
        bench = Bench(Path(work), chosen)
        for name in names:
            result = ensemble(bench) if name == "ensemble" else against_bare(name, bench)
            print(json.dumps({**result, "settings": settings}), flush=True)


if __name__ == "__main__":
    main()
