"""What `compile: true` of a generator saves: plain and compiled sampling in turns, of the sandbox's generators.

    python benchmarks/compiled_sampling.py                       # one JSON line a generator
    python benchmarks/compiled_sampling.py --only film --batch 32

`ratio` is the CPU time of a plain batch over that of a compiled one, median of `--repeats`; `first_s` is what the
first compiled batch takes longer than a later one, `pays_after` the number of batches that make up for it. Nothing is
taken from torch's cache of earlier runs. One thread, float32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from typing import Any

import torch

from alignkit.commands.specs import GeneratorSpec, build_generator
from alignkit.records import Sampling
from alignkit.sandbox import captions, film_captions

SAMPLINGS = {
    "unet": Sampling(steps=8, guidance_scale=1.0, height=64, width=64),
    "flow": Sampling(steps=12, guidance_scale=2.5, height=64, width=64),
    "film": Sampling(steps=16, guidance_scale=3.0, height=32, width=32, num_frames=33, fps=8),
}


def case(name: str, batch: int, repeats: int) -> dict[str, Any]:
    """The measured line of one generator of the sandbox."""
    source = film_captions if name == "film" else captions
    texts, seeds = [prompt.text for prompt in source.prompts(batch, seed=1)], list(range(batch))
    specs = [GeneratorSpec(model=f"sandbox:{name}", compile=is_compiled) for is_compiled in (False, True)]
    generators = [build_generator(name, spec) for spec in specs]

    def seconds(generator: Any) -> float:
        start = time.process_time()
        with torch.inference_mode():
            generator.generate(texts, seeds[: len(texts)], SAMPLINGS[name])
        return time.process_time() - start

    first_plain, first_compiled = map(seconds, generators)
    taken = [[seconds(generator) for generator in generators] for _ in range(repeats)]
    plain, compiled = map(statistics.median, zip(*taken, strict=True))
    longer, saved = (first_compiled - compiled) - (first_plain - plain), plain - compiled
    return {
        "generator": name,
        "batch": len(texts),
        "plain_s": round(plain, 2),
        "compiled_s": round(compiled, 2),
        "ratio": round(statistics.median(one / other for one, other in taken), 2),
        "first_s": round(longer, 1),
        "pays_after": math.ceil(longer / saved) if saved > 0 else None,
    }


def main() -> None:
    """Print one JSON line a generator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SAMPLINGS, action="append", help="one generator; may be given again")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for name in given.only or SAMPLINGS:
            print(json.dumps(case(name, given.batch, given.repeats)), flush=True)


if __name__ == "__main__":
    main()
