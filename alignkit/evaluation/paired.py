"""Paired evaluation: base and tuned generate for the same prompts and seeds, every reward scores every image or video.

Media are scored as they are stored (8 bits a channel), so every number can be recomputed from the folder. One batch is
one part (`storage`): a killed evaluation run again generates the missing parts only. Deliberately not here: loading
models (callers pass sources) and statistics (`statistics`).
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from alignkit.claims import claim
from alignkit.errors import ConfigError, DataError, NumericsError, UnknownNameError, nearest
from alignkit.escape import to_line
from alignkit.evaluation.results import (
    SCORE,
    Evaluation,
    Pairs,
    RewardResult,
    part_files,
    read_pairs,
    read_scores,
    write_evaluation,
)
from alignkit.evaluation.statistics import Bootstrap, Comparison, Floats, compare
from alignkit.locks import locked
from alignkit.media import checked_pixels, encode_medium, quantise, to_pixels
from alignkit.protocols import ImageSource, Reward, as_scores, require_independent, require_modality, require_sampling
from alignkit.records import Prompt, Sampling
from alignkit.seeds import derive_seed
from alignkit.storage import finished_part, read_table, to_json, write_atomic, write_part

MOST_NOT_FINITE = 0.05  # share of a side's images or videos that a reward may fail on before the evaluation stops


@dataclass(frozen=True, slots=True)
class EvaluateConfig:
    """How an evaluation is generated. Seed k of a prompt is `derive_seed(seed, prompt.id, k)`, for both sides."""

    seeds_per_prompt: int = 4
    seed: int = 0
    batch_size: int = 8
    sampling: Sampling = field(default_factory=Sampling)
    bootstrap_samples: int = 2000
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for key in ("seeds_per_prompt", "batch_size", "bootstrap_samples"):
            if asdict(self)[key] < 1:
                raise ConfigError(f"evaluate: {key} is {asdict(self)[key]}; it must be at least 1.")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"evaluate: confidence is {self.confidence}; it must lie between 0 and 1, e.g. 0.95.")


@dataclass(frozen=True, slots=True)
class _Item:
    prompt: Prompt
    seed: int


def evaluate(
    base: ImageSource,
    tuned: ImageSource,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
    out_dir: Path,
    *,
    rewards: Mapping[str, Reward],
    gold: str | None,
    inputs: Mapping[str, str] | None = None,
    base_cache: Path | None = None,
) -> Evaluation:
    """Generate, score and compare both sides; writes `out_dir` (layout in `results`) and returns its statistics.

    `gold` names the held-out reward among `rewards`. Run again after a kill, it continues; over a folder of another
    evaluation it raises ResumeError with the difference. `inputs` identifies the weights: "base", "tuned" and
    "reward NAME", each with a `provenance.fingerprint`; without it the names alone stand for the models. `base_cache`
    is a folder that keeps base sides for later evaluations with equal base, prompts, seeds, sampling and rewards.

    Raises DataError for empty or duplicate prompts, ConfigError for rewards or a cache without the identity of the
    base, NumericsError when a reward is not finite on more than 5% of a side (fewer are dropped from the statistics
    and counted).
    """
    _check(prompts, rewards, gold, config.sampling)
    for source in (base, tuned):
        require_sampling(source, config.sampling)
    known = dict(inputs or {})
    with locked(out_dir):
        settings = _settings(prompts, config, rewards) | {"base": base.name}
        claim(out_dir, {"inputs": known, "evaluation": settings | {"tuned": tuned.name}})
        base_side = {"inputs": {name: known[name] for name in known if name != "tuned"}, "evaluation": settings}
        cached = _cache_folder(base_cache, base_side)
        items = _items(prompts, config)
        _write_side(cached or out_dir / "base", base, items, config, rewards, is_shared=cached is not None)
        if cached:
            _adopt(cached, out_dir / "base")
        _write_side(out_dir / "tuned", tuned, items, config, rewards)
        _require_whole(out_dir, -(-len(items) // config.batch_size))
        evaluation = _summarise(read_pairs(out_dir), (base.name, tuned.name), config, gold)
        write_evaluation(out_dir, evaluation)
        return evaluation


def score_alone(
    source: ImageSource,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
    out_dir: Path,
    *,
    rewards: Mapping[str, Reward],
    inputs: Mapping[str, str],
) -> dict[str, Floats]:
    """Generate and score one side alone, into `out_dir`/images; each reward's scores [prompts * seeds].

    It is resumed, and `inputs` identifies its weights, as in `evaluate`; it raises the same.
    """
    _check(prompts, rewards, None, config.sampling)
    require_sampling(source, config.sampling)
    with locked(out_dir):
        claim(out_dir, {"inputs": dict(inputs), "evaluation": _settings(prompts, config, rewards)})
        _write_side(out_dir / "images", source, _items(prompts, config), config, rewards)
        return read_scores(out_dir / "images")


def _items(prompts: Sequence[Prompt], config: EvaluateConfig) -> list[_Item]:
    return [
        _Item(prompt, derive_seed(config.seed, prompt.id, index))
        for prompt in prompts
        for index in range(config.seeds_per_prompt)
    ]


def _check(prompts: Sequence[Prompt], rewards: Mapping[str, Reward], gold: str | None, sampling: Sampling) -> None:
    if not prompts:
        raise DataError("evaluate: no prompts; give a file with at least one held-out prompt.")
    if not rewards:
        raise ConfigError("evaluate: no rewards; name at least one.")
    require_independent(rewards)
    if sampling.num_frames > 1:
        require_modality(rewards, "video")
    if gold is not None and gold not in rewards:
        raise UnknownNameError(f"evaluate: gold '{gold}' is not among the rewards.{nearest(gold, rewards)}")
    first: dict[str, int] = {}
    for row, prompt in enumerate(prompts):
        if prompt.id in first:
            raise DataError(f"evaluate: prompt {row} repeats prompt {first[prompt.id]}, {prompt.text!r}; remove one.")
        first[prompt.id] = row


def _settings(prompts: Sequence[Prompt], config: EvaluateConfig, rewards: Mapping[str, Reward]) -> dict[str, Any]:
    """All that media and scores of a side depend on, beside the model; batch size moves their last bits."""
    listed = "\n".join(f"{prompt.id} {category(prompt)}{prompt.metadata.get('questions', '')}" for prompt in prompts)
    return {
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(listed.encode()).hexdigest(),
        "seeds_per_prompt": config.seeds_per_prompt,
        "run_seed": config.seed,
        "batch_size": config.batch_size,
        "sampling": config.sampling.to_json(),
        "rewards": {name: f"{reward.name} ({reward.source})" for name, reward in rewards.items()},
    }


def category(prompt: Prompt) -> str:
    """The group a prompt is reported under."""
    return str(prompt.metadata.get("category", "all"))


def _cache_folder(cache: Path | None, base_side: Mapping[str, Any]) -> Path | None:
    """The folder in `cache` of one base side, claimed; None without a cache."""
    if cache is None:
        return None
    if not base_side["inputs"].get("base"):
        raise ConfigError(
            "evaluate: a base cache needs the identity of the base's weights: give inputs={'base': fingerprint(folder)}"
        )
    folder = cache / hashlib.sha256(to_json(base_side).encode()).hexdigest()[:24]
    claim(folder, base_side)
    return folder


def _adopt(cached: Path, side: Path) -> None:
    """Make the evaluation folder whole: hard links (parts never change) or, across disks, copies."""
    for part in (*part_files(cached), *(cached / "parts").glob("*.json")):
        target = side / part.relative_to(cached)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            os.link(part, target)
        except OSError:
            write_atomic(target, part.read_bytes())


def _require_whole(folder: Path, parts: int) -> None:
    """DataError for the first part of either side that was removed while the evaluation ran."""
    for side in ("base", "tuned"):
        for number in range(parts):
            path = folder / side / f"{number:05d}.parquet"
            if not path.is_file():
                raise DataError(f"'{path}' was removed while the evaluation ran; run the same command again")


def _write_side(
    folder: Path,
    source: ImageSource,
    items: Sequence[_Item],
    config: EvaluateConfig,
    rewards: Mapping[str, Reward],
    *,
    is_shared: bool = False,
) -> None:
    """Write the parts of one side that are not there whole, one batch a part.

    `is_shared`: other processes may write the same side now, so parts are written in a random order; in the same order
    all processes would generate the same part at the same time.
    """
    failures = dict.fromkeys(rewards, 0)
    parts = [*enumerate(range(0, len(items), config.batch_size))]
    if is_shared:
        random.Random().shuffle(parts)
    with tqdm(total=len(items), desc=to_line(f"evaluate {source.name}"), unit="item") as bar:
        for number, start in parts:
            batch = items[start : start + config.batch_size]
            name = f"{number:05d}"
            file = f"{name}.parquet"
            if finished_part(folder, name) is None:
                table = _generate_part(source, batch, config.sampling, rewards)
                write_part(folder, name, {file: table}, page_checksums=True)
            table = read_table(folder / file, [SCORE + reward for reward in rewards] + ["prompt"])
            _count_failures(table, failures, MOST_NOT_FINITE * len(items))
            bar.update(len(batch))


def _generate_part(
    source: ImageSource, batch: Sequence[_Item], sampling: Sampling, rewards: Mapping[str, Reward]
) -> pa.Table:
    import torch

    prompts = [item.prompt for item in batch]
    with torch.inference_mode():
        pixels = source.generate([prompt.text for prompt in prompts], [item.seed for item in batch], sampling)
        pixels = checked_pixels(pixels, len(batch), f"generator '{source.name}'")
        stored = quantise(pixels)
        require_modality(rewards, "image" if stored.ndim == 4 else "video")
        media = to_pixels(stored).to(pixels.device)  # as it is stored, so that scores can be recomputed
        scores = {}
        for name, reward in rewards.items():
            scores[name] = as_scores(reward(media, prompts), name, len(batch)).total.double().cpu().tolist()
    columns = {
        "prompt_id": [prompt.id for prompt in prompts],
        "prompt": [prompt.text for prompt in prompts],
        "category": [category(prompt) for prompt in prompts],
        "seed": [item.seed for item in batch],
        "image" if stored.ndim == 4 else "video": [encode_medium(medium, sampling.fps) for medium in stored],
    }
    return pa.table(columns | {SCORE + name: values for name, values in scores.items()})


def _count_failures(table: pa.Table, failures: dict[str, int], most: float) -> None:
    for name, before in failures.items():
        bad = ~np.isfinite(np.array(table[SCORE + name].to_pylist(), np.float64))
        failures[name] = before + int(bad.sum())
        if failures[name] > most:
            prompt = table["prompt"][int(np.argmax(bad))].as_py()
            raise NumericsError(
                f"reward '{name}' is NaN or infinite on {failures[name]} items, more than {MOST_NOT_FINITE:.0%} of "
                f"this side; the last for prompt {prompt!r}. Correct the reward or leave it out, and use a new folder."
            )


def _summarise(pairs: Pairs, names: tuple[str, str], config: EvaluateConfig, gold: str | None) -> Evaluation:
    bootstrap = Bootstrap(config.bootstrap_samples, config.confidence, derive_seed("bootstrap", config.seed))
    ordered = sorted(pairs.base, key=lambda reward: reward != gold)
    results = tuple(
        RewardResult(
            reward=reward,
            is_gold=reward == gold,
            sampling=config.sampling,
            overall=_compare(pairs, reward, bootstrap, None),
            categories={name: _compare(pairs, reward, bootstrap, name) for name in _categories(pairs, reward)},
        )
        for reward in ordered
    )
    count = len(pairs.prompts) // pairs.seeds_per_prompt
    return Evaluation(*names, config.sampling, count, config.seeds_per_prompt, config.seed, config.confidence, results)


def _categories(pairs: Pairs, reward: str) -> list[str]:
    """Categories with a finite pair, in order of appearance; none when there is a single one, the whole again."""
    gains = zip(pairs.prompts, pairs.gain(reward), strict=True)
    names = list(dict.fromkeys(category(prompt) for prompt, gain in gains if np.isfinite(gain)))
    return names if len(names) > 1 else []


def _compare(pairs: Pairs, reward: str, bootstrap: Bootstrap, group: str | None) -> Comparison:
    rows = [row for row, prompt in enumerate(pairs.prompts) if group is None or category(prompt) == group]
    base, tuned = (side[reward][rows].reshape(-1, pairs.seeds_per_prompt) for side in (pairs.base, pairs.tuned))
    return compare(base, tuned, bootstrap)
