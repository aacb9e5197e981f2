"""Speed and memory of the Syn-Pic stages; prints one JSON line.

    python benchmarks/synpic.py --model alignkit/sandbox/weights/unet   with a real generator
    python benchmarks/synpic.py                                         with a source that only sleeps and draws noise

generation   pictures/s through the stage and of the bare pipeline called in a loop, in turns, and their ratio (>= 0.95)
overlap      seconds of generate_and_score with a reward that waits, against the two stages one after the other
memory       peak RSS (MiB) of all three stages at 1,000 and at 20,000 rows with a fast source, in child processes
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.records import Prompt, Sampling, Scores
from alignkit.seeds import derive_seed
from data_pipelines import synpic

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 64


@dataclass(frozen=True)
class NoiseSource:
    """Noise from the seeds, after `seconds` an image."""

    name: str = "noise"
    seconds: float = 0.0

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> Tensor:
        """Pixels [B, 3, H, W]."""
        import torch

        time.sleep(self.seconds * len(prompts))
        shape = (3, sampling.height, sampling.width)
        return torch.stack([torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@dataclass(frozen=True)
class WaitingReward:
    """The mean of the pixels, after `seconds` an image."""

    seconds: float = 0.0

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores [B]."""
        time.sleep(self.seconds * len(prompts))
        return Scores(media.mean(dim=(1, 2, 3)))


def make_prompts(count: int, start: int = 0) -> list[Prompt]:
    """Distinct prompts of the sandbox's grammar in spirit."""
    return [Prompt.from_text(f"a photo of {number} red circles") for number in range(start, start + count)]


def config(options: argparse.Namespace, part_size: int, candidates: int = 2) -> synpic.GenerateConfig:
    """One source, `candidates` images a prompt."""
    sampling = Sampling(steps=options.steps, guidance_scale=options.guidance, height=SIZE, width=SIZE)
    source = synpic.SourceConfig(name="source", seeds_per_prompt=candidates, sampling=sampling)
    return synpic.GenerateConfig(sources=(source,), part_size=part_size, batch_size=options.batch_size)


def bare_loop(source: Any, options: argparse.Namespace) -> Callable[[Sequence[Prompt], synpic.GenerateConfig], None]:
    """The pipeline (or the noise source) called on the same batches; the images are thrown away."""
    import torch

    def call(texts: list[str], seeds: list[int], sampling: Sampling) -> None:
        if not options.model:
            source.generate(texts, seeds, sampling)
            return
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = {"height": SIZE, "width": SIZE, "guidance_scale": sampling.guidance_scale, "output_type": "pt"}
        size |= source.sampling_arguments()
        with torch.no_grad():
            source.pipeline(texts, num_inference_steps=sampling.steps, generator=generators, **size)

    def loop(prompts: Sequence[Prompt], settings: synpic.GenerateConfig) -> None:
        jobs = [(prompt, k) for prompt in prompts for k in range(settings.candidates)]
        for start in range(0, len(jobs), settings.batch_size):
            batch = jobs[start : start + settings.batch_size]
            seeds = [derive_seed(settings.seed, prompt.id, k) for prompt, k in batch]
            call([prompt.text for prompt, _ in batch], seeds, settings.sources[0].sampling)

    return loop


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock time of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def generation(options: argparse.Namespace) -> dict[str, float]:
    """Stage and bare loop in turns, so that both meet the same machine; the median of the rounds' ratios."""
    if options.model:
        from alignkit.generators import load_generator

        source = load_generator(options.model)
        source.pipeline.set_progress_bar_config(disable=True)
    else:
        source = NoiseSource(seconds=0.02)
    loop, settings = bare_loop(source, options), config(options, part_size=options.prompts // 2)
    loop(make_prompts(options.batch_size), settings)
    pictures, bare, stage = options.prompts * settings.candidates, [], []
    for number in range(options.rounds):
        prompts = make_prompts(options.prompts, start=number * options.prompts)
        with tempfile.TemporaryDirectory() as folder:
            draw = partial(synpic.generate_candidates, build_sources={"source": lambda: source})
            timed = [(bare, partial(loop, prompts, settings)), (stage, partial(draw, prompts, settings, folder))]
            for times, run in timed if number % 2 else timed[::-1]:
                times.append(seconds(run))
    ratios = [b / s for b, s in zip(bare, stage, strict=True)]
    rates = {"bare_pictures_per_s": pictures / min(bare), "stage_pictures_per_s": pictures / min(stage)}
    return {**rates, "ratio": statistics.median(ratios), "ratio_of_best": min(bare) / min(stage)}


def overlap(options: argparse.Namespace) -> dict[str, float]:
    """Both stages apart and together, with a source and a reward that wait equally long."""
    prompts, settings = make_prompts(64), config(options, part_size=8)
    score = synpic.ScoreConfig(rewards=("waiting",), batch_size=options.batch_size)
    sources = {"source": partial(NoiseSource, seconds=0.03)}
    rewards = {"waiting": partial(WaitingReward, 0.03)}
    with tempfile.TemporaryDirectory() as base:
        folders = [Path(base) / name for name in "abcd"]
        draw = partial(synpic.generate_candidates, prompts, settings, folders[0], build_sources=sources)
        judge = partial(synpic.score_candidates, folders[0], score, folders[1], build_rewards=rewards)
        both = partial(synpic.generate_and_score, prompts, settings, score, (folders[2], folders[3]))
        apart = seconds(draw), seconds(judge)
        together = seconds(partial(both, build_sources=sources, build_rewards=rewards))
    hidden = (sum(apart) - together) / apart[1]
    return {"generate_s": apart[0], "score_s": apart[1], "together_s": together, "share_of_scoring_hidden": hidden}


def memory(rows: int) -> float:
    """Peak RSS in MiB of a child process that generates, scores and ranks `rows` prompts."""
    command = [sys.executable, __file__, "--child-rows", str(rows)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this very program
    return float(done.stdout)


def child(options: argparse.Namespace) -> None:
    """Run all stages on the fast source and print the peak RSS."""
    import torch

    torch.set_num_threads(1)
    score = synpic.ScoreConfig(rewards=("mean",))
    with tempfile.TemporaryDirectory() as base:
        folders = [Path(base) / name for name in "csr"]
        synpic.generate_and_score(
            make_prompts(options.child_rows),
            config(options, part_size=100),
            score,
            (folders[0], folders[1]),
            build_sources={"source": NoiseSource},
            build_rewards={"mean": WaitingReward},
        )
        synpic.rank_candidates(folders[0], folders[1], synpic.RankConfig(), folders[2])
    # Not ru_maxrss: a process that was started by a larger one inherits that one's peak.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a diffusers folder; without it a noise source is used")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=64, help="prompts a round, two pictures each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs=2, default=(1000, 20000))
    parser.add_argument("--child-rows", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child_rows:
        child(options)
        return
    result: dict[str, Any] = {"generation": generation(options), "overlap": overlap(options)}
    result["rss_mib"] = {str(rows): memory(rows) for rows in options.rows}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
