"""CPU seconds until the first batch of a RankDPO training on cached data. One JSON line for each number of rows.

    python benchmarks/startup.py [--rows 10000 100000] [--candidates 4] [--rows_a_prompt 10] [--profile]

Rows are those of a parquet file of tiny images; latents and conditioning are in the cache, written through the store
with random values. `load_s` is what `alignkit train` does to load the rows, of which a tenth is held out by prompt.
`start_s` is the trainer's construction and its first batch. Of it, `fixed_s` is the same for 16 rows (the model, its
LoRA, fingerprints), `hashing_s` is SHA-256 of the media, row by row, and of the cache's files, and `rest_s` is what
remains: the cost of the rows without that of their bytes. `--profile` prints the functions that take the most of it.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import hashlib
import io
import json
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from alignkit.generators import load_generator
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.records import Prompt
from alignkit.sandbox import generators, models
from alignkit.storage import checksum
from alignkit.trainers.content import conditioning_key, latents_key, prompt_digests, row_digests
from alignkit.trainers.latents import CHANGED, COND, LATENTS, TRANSPARENT
from alignkit.trainers.rankdpo import RankDPOConfig, RankDPOTrainer
from alignkit.trainers.sharding import Ranks
from alignkit.trainers.store import Store, packed
from data_pipelines.importers import load_ranked
from data_pipelines.rows import without_prompts

ENCODED = datasets.List(datasets.Image(decode=False))
SIDE = 8  # pixels of an image
T5_TOKENS = 256  # of a prompt
WORDS = ["red", "green", "blue", "gold", "circle", "ring", "cross", "square", "above", "below", "beside", "behind"]


def write_rows(folder: Path, count: int, chosen: argparse.Namespace) -> None:
    """Ranked rows as a parquet file of one split, each image with bytes of its own after the PNG's end."""
    buffer = io.BytesIO()
    Image.effect_noise((SIDE, SIDE), 80).convert("RGB").save(buffer, "PNG")
    image, candidates = buffer.getvalue(), chosen.candidates
    encoded = pa.array([image + number.to_bytes(8, "big") for number in range(count * candidates)])
    prompts = [Prompt.from_text(_text(row // chosen.rows_a_prompt)) for row in range(count)]
    phi = torch.rand(count * candidates, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    offsets = pa.array(range(0, count * candidates + 1, candidates), pa.int32())
    scores = pa.ListArray.from_arrays(offsets, pa.array(phi))
    columns = {
        "prompt_id": pa.array([prompt.id for prompt in prompts]),
        "prompt": pa.array([prompt.text for prompt in prompts]),
        "images": pa.ListArray.from_arrays(
            offsets, pa.StructArray.from_arrays([encoded, pa.nulls(len(encoded), pa.string())], ["bytes", "path"])
        ),
        "generators": pa.array([["base"] * candidates] * count),
        "seeds": pa.array([list(range(candidates))] * count),
        "sampling": pa.array(["{}"] * count),
        "scores": pa.StructArray.from_arrays([scores], ["reward"]),
        "phi": scores,
    }
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "rows.parquet")


def _text(number: int) -> str:
    words = [WORDS[number // len(WORDS) ** place % len(WORDS)] for place in range(12)]
    return f"a photo of a {' '.join(words)}, number {number}"


def random_model(folder: Path) -> Path:
    """The sandbox's flow transformer before training, with a T5 that reads as much as SD3's."""
    torch.manual_seed(0)
    pipeline = generators.build_flow(models.vae())
    pipeline.tokenizer_3.model_max_length = T5_TOKENS
    pipeline.save_pretrained(folder)
    return folder


def fill(cache: Path, generator: PipelineGenerator, rows: datasets.Dataset, candidates: int) -> None:
    """Store random latents and conditioning under the rows' keys."""
    latent = torch.randn(candidates, *generator.latent_shape(SIDE, SIDE))
    with torch.no_grad():
        cond = {name: tensor[0] for name, tensor in generator.encode_prompts(["a ring"]).tensors.items()}
    made = {**packed({LATENTS: (latent, latent.dtype)}), CHANGED: 0, TRANSPARENT: 0}
    texts = packed({COND + name: (tensor[:1], tensor.dtype) for name, tensor in cond.items()})
    kinds: tuple[tuple[str, list[str], dict[str, Any]], ...] = (
        (f"latents-{latents_key(generator)}", row_digests(rows, "images", Ranks()), made),
        (f"conditioning-{conditioning_key(generator)}", prompt_digests(rows["prompt"][:]), texts),
    )
    for folder, keys, row in kinds:
        Store(cache / folder, Ranks()).rows(keys, lambda numbers, row=row: [row] * len(numbers), 1000)


def start(model: Path, work: Path, rows: datasets.Dataset) -> None:
    """The trainer, and its first batch."""
    options: dict[str, Any] = {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    options |= {"cache_dir": str(work / "cache"), "per_device_train_batch_size": 2, "max_steps": 1}
    args = RankDPOConfig(output_dir=str(work / "out"), **options)
    trainer = RankDPOTrainer(load_generator(model, device="cpu"), args, rows)
    next(iter(trainer.get_train_dataloader()))


def hash_all(media: Sequence[bytes], cache: Path) -> None:
    """SHA-256 of the bytes alone: one call for each row's media, one for each file of the cache."""
    for row in media:
        hashlib.sha256(row).hexdigest()
    for file in cache.glob("*/*.arrow"):
        checksum(file)


def seconds(run: Callable[[], None]) -> float:
    """CPU seconds of this process, all threads."""
    gc.collect()
    start_time = time.process_time()
    run()
    return time.process_time() - start_time


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--rows_a_prompt", type=int, default=10)
    parser.add_argument("--profile", action="store_true")
    chosen = parser.parse_args()
    datasets.disable_progress_bars()
    for count in chosen.rows:
        with tempfile.TemporaryDirectory() as folder:
            datasets.config.HF_DATASETS_CACHE = Path(folder) / "datasets"
            found = measure(count, chosen, Path(folder))
        print(json.dumps({"rows": count, **found, "settings": vars(chosen) | {"rows": count}}))


def measure(count: int, chosen: argparse.Namespace, work: Path) -> dict[str, float]:
    """The seconds of one number of rows."""
    model, folder = random_model(work / "model"), work / "data"
    write_rows(folder, count, chosen)
    rows = load(folder)
    fill(work / "cache", load_generator(model, device="cpu"), rows, chosen.candidates)
    media = [b"".join(image["bytes"] for image in row) for row in rows.cast_column("images", ENCODED)["images"]]
    few = rows.select(range(16))
    start(model, work / "few", few)  # lazy imports; a cache of its own
    found = {
        "load_s": seconds(lambda: load(folder)),
        "start_s": seconds(lambda: start(model, work, rows)),
        "fixed_s": seconds(lambda: start(model, work / "few", few)),
        "hashing_s": seconds(lambda: hash_all(media, work / "cache")),
    }
    found["rest_s"] = found["start_s"] - found["fixed_s"] - found["hashing_s"]
    if chosen.profile:
        profile = cProfile.Profile()
        profile.runcall(start, model, work, load(folder))
        pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(45)
    return {"trained_on": len(rows), **{name: round(value, 2) for name, value in found.items()}}


def load(folder: Path) -> datasets.Dataset:
    """The training rows, as `alignkit train` loads them: nine tenths of those on disk."""
    return without_prompts(load_ranked(folder, "train"), frozenset(["0"]))


if __name__ == "__main__":
    main()
