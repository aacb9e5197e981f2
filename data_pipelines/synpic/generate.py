"""The first stage of Syn-Pic: candidates of several generators and seeds, as encoded bytes in parquet parts.

Images are PNG in a column `images`, videos FFV1 in Matroska in a column `videos`.

`generate_and_score` scores each finished part while the next one is generated. Models come in as picklable builders,
called once and only when a part is missing. Importing this module loads no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from alignkit.claims import claim
from alignkit.errors import ConfigError, DataError, FlaggedError
from alignkit.locks import locked
from alignkit.media import checked_pixels, encode_medium, quantise
from alignkit.protocols import ImageSource, Reward, require_modality, require_sampling
from alignkit.records import Prompt, Sampling
from alignkit.seeds import derive_seed
from alignkit.storage import (
    STAGE_FILES,
    Part,
    StageResult,
    finish_run,
    finished_part,
    part_name,
    write_part,
    write_quarantine,
)
from data_pipelines.prompts import drop_duplicates
from data_pipelines.synpic.media_columns import media_column, media_feature
from data_pipelines.synpic.score import (
    ScoreConfig,
    Scorer,
    build_all,
    check_names,
    named_identities,
)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

ENCODERS = 2  # threads; PNG at level 1 keeps far ahead of any generator with two
Cells = list[list["Future[bytes] | None"]]  # [rows][K] media to come; None: flagged by a safety checker
_NAMES = {4: "images", 5: "videos"}  # by the axes of a batch of pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One generator: its name among the builders, candidates for each prompt, and how they are sampled."""

    name: str
    seeds_per_prompt: int = 1
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """Which candidates to generate. K, the candidates of a prompt, is the sum of the sources' `seeds_per_prompt`.

    `part_size` prompts make one file; `batch_size` candidates go into one call of a generator, never across parts.
    The paper takes one image from each of four generators.
    """

    sources: Sequence[SourceConfig]
    seed: int = 0
    part_size: int = 64
    batch_size: int = 8

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ConfigError(f"sources: {names} names one twice; raise its `seeds_per_prompt` instead")
        for key, value in (("part_size", self.part_size), ("batch_size", self.batch_size)):
            if value < 1:
                raise ConfigError(f"{key} must be at least 1, got {value}")
        if any(source.seeds_per_prompt < 1 for source in self.sources):
            raise ConfigError(
                "every source needs `seeds_per_prompt` of at least 1; leave out a source that makes no candidate"
            )
        if self.candidates < 2:
            has = f"{names[0]} x {self.candidates}" if names else "no source"
            raise ConfigError(
                f"one candidate a prompt cannot be ranked ({has}); set `seeds_per_prompt: 2` or add a second source"
            )

    @property
    def candidates(self) -> int:
        """K, the number of candidates a prompt."""
        return sum(source.seeds_per_prompt for source in self.sources)


def generate_candidates(
    prompts: Sequence[Prompt],
    config: GenerateConfig,
    out_dir: str | Path,
    *,
    build_sources: Mapping[str, Callable[[], ImageSource]],
    identities: Mapping[str, str] | None = None,
    on_part: Callable[[Part], None] = lambda _part: None,
) -> StageResult:
    """Generate K candidates for every prompt into `out_dir/data/part-*.parquet`, one row a prompt.

    Columns: prompt_id, prompt, metadata (JSON), images [K] or videos [K], generators [K], seeds [K], sampling (JSON by
    source).
    A prompt with an image that a pipeline's safety checker replaced is left out; each such image has a line in
    `quarantine.jsonl`, and the manifest counts them (`flagged`) and the prompts (`quarantined`).
    Candidate k of a prompt has the seed `derive_seed(config.seed, prompt.id, k)`, whatever the batch. Encoding and
    writing happen in threads while the next batch is generated. `on_part` is called, from the writing thread, with each
    part that is safely on disk (parts of an earlier, interrupted run first). `identities` says what stands for the
    weights of each source: where it differs from that of an earlier run in `out_dir`, the run is refused.

    Raises UnknownNameError for a source without a builder, DataError without prompts or where all are left out,
    ResumeError, StorageError.
    """
    with locked(Path(out_dir)):
        opened = _Candidates.open(Path(out_dir), config, prompts, build_sources, identities)
        return opened.generate(build_sources, on_part)


def generate_and_score(
    prompts: Sequence[Prompt],
    generate: GenerateConfig,
    score: ScoreConfig,
    out_dirs: tuple[str | Path, str | Path],
    *,
    build_sources: Mapping[str, Callable[[], ImageSource]],
    build_rewards: Mapping[str, Callable[[], Reward]],
    source_identities: Mapping[str, str] | None = None,
    reward_identities: Mapping[str, str] | None = None,
) -> tuple[StageResult, StageResult]:
    """Both stages at once, into `out_dirs` (candidates, scores): each part is scored while the next one is generated.

    The two folders hold the bytes that `generate_candidates` and then `score_candidates` would have written.
    The identities are what those two take.
    """
    candidates_dir, scores_dir = map(Path, out_dirs)
    with locked(candidates_dir), locked(scores_dir):
        opened = _Candidates.open(candidates_dir, generate, prompts, build_sources, source_identities)
        rows = len(opened.prompts)
        scorer = Scorer.open(scores_dir, score, candidates_dir, build_rewards, rows=rows, identities=reward_identities)
        if not (scores_dir / "manifest.json").exists():
            # Here, for loading a model in one thread disturbs generating in another (the default dtype).
            rewards = scorer.rewards()
            if any(source.sampling.num_frames > 1 for source in generate.sources):
                require_modality(rewards, "video")
        pending: list[Future[None]] = []

        def score_later(part: Part) -> None:
            for future in pending:
                if future.done():
                    future.result()  # a reward that failed stops the generation too
            pending.append(pool.submit(scorer.score, part))

        pool = ThreadPoolExecutor(1, thread_name_prefix="score")
        try:
            generated = opened.generate(build_sources, score_later)
            for future in pending:
                future.result()
            return generated, scorer.finish()
        finally:
            pool.shutdown(cancel_futures=True)
            scorer.bar.close()


@dataclass(frozen=True, slots=True)
class _Candidates:
    """A claimed candidates folder, its distinct prompts, and how many duplicates were dropped."""

    folder: Path
    config: GenerateConfig
    prompts: Sequence[Prompt]
    duplicates: int

    @classmethod
    def open(
        cls,
        folder: Path,
        config: GenerateConfig,
        prompts: Sequence[Prompt],
        build_sources: Mapping[str, Callable[[], ImageSource]],
        identities: Mapping[str, str] | None,
    ) -> _Candidates:
        """Begin or resume: what decides the stage's bytes is claimed, the prompts by their number and hash."""
        unique, duplicates = drop_duplicates(prompts)
        if not unique:
            raise DataError("no prompts to generate candidates for; give at least one")
        names = [source.name for source in config.sources]
        check_names(names, build_sources, kind="generator")
        digest = hashlib.sha256()
        for prompt in unique:
            digest.update(f"{prompt.id}\x1f{prompt.text}\x1f{_metadata(prompt)}\x1e".encode())
        inputs = {"prompts": len(unique), "prompts_sha256": digest.hexdigest()}
        inputs |= named_identities(names, identities)
        sources = [asdict(source) | {"sampling": source.sampling.plain()} for source in config.sources]
        settings = asdict(config) | {"sources": sources}
        claim(folder, {"stage": "generate", "config": settings, "inputs": inputs}, writes=STAGE_FILES)
        return cls(folder, config, unique, duplicates)

    def generate(
        self, build_sources: Mapping[str, Callable[[], ImageSource]], on_part: Callable[[Part], None]
    ) -> StageResult:
        """Generate the missing parts and write the manifest."""
        names = [part_name(index) for index in range(-(-len(self.prompts) // self.config.part_size))]
        parts = {name: part for name in names if (part := finished_part(self.folder, name))}
        missing = [name for name in names if name not in parts]
        sources = build_all((source.name for source in self.config.sources), build_sources) if missing else {}
        for source in self.config.sources if sources else ():
            require_sampling(sources[source.name], source.sampling)
        for part in parts.values():
            on_part(part)
        parts |= _write_parts(_Producer(self.config, sources, self.folder), self.prompts, missing, on_part)
        return self._finish([parts[name] for name in names])

    def _finish(self, parts: Sequence[Part]) -> StageResult:
        """Write the manifest; counts of what was left out are in it only where something was."""
        flagged = [fault for part in parts for fault in part.notes.get("flagged", ())]
        quarantined = len({fault["prompt_id"] for fault in flagged})
        rows = len(self.prompts) - quarantined
        noun = "videos" if media_column(self.folder, parts[0]) == "videos" else "pictures"
        counts = {"duplicate_prompts": self.duplicates, noun: rows * self.config.candidates}
        if flagged:
            counts |= {"quarantined": quarantined, "flagged": len(flagged)}
            path = write_quarantine(self.folder, flagged)
            if not rows:
                raise DataError(
                    f"no prompt is left: pipelines flagged {len(flagged)} images as unsafe, see '{path}'; switch that "
                    "check off, or give other prompts, with another folder"
                )
        return finish_run(self.folder, "generate", parts, rows=rows, counts=counts)


def _metadata(prompt: Prompt) -> str:
    return json.dumps(dict(prompt.metadata), sort_keys=True, default=str)


def _write_parts(
    producer: _Producer, prompts: Sequence[Prompt], missing: Sequence[str], on_part: Callable[[Part], None]
) -> dict[str, Part]:
    """Generate and write the missing parts; while one is written the next is generated, and no more is held."""
    size = producer.config.part_size
    rows_of = {name: prompts[int(name[5:]) * size :][:size] for name in missing}
    parts: dict[str, Part] = {}

    def write(name: str, cells: Cells) -> None:
        parts[name] = producer.write(name, rows_of[name], cells)
        on_part(parts[name])

    with contextlib.ExitStack() as stack:
        total = sum(map(len, rows_of.values())) * producer.config.candidates
        bar = stack.enter_context(tqdm(total=total, desc="generate", unit="candidate", disable=not missing))
        encoders = stack.enter_context(ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode"))
        writer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="write"))
        writing: Future[None] | None = None
        for name in missing:
            cells = producer.generate(rows_of[name], encoders, bar)
            if writing is not None:
                writing.result()
            writing = writer.submit(write, name, cells)
        if writing is not None:
            writing.result()
    return parts


@dataclass(frozen=True, slots=True)
class _Producer:
    """Generates and writes parts with sources that are built."""

    config: GenerateConfig
    sources: Mapping[str, ImageSource]
    folder: Path
    ndim: dict[str, int] = field(default_factory=dict)  # of a batch, once the first one is generated

    def generate(self, rows: Sequence[Prompt], encoders: ThreadPoolExecutor, bar: tqdm[Any]) -> Cells:
        """Encoded bytes to come, [rows][K]."""
        cells: Cells = [[] for _ in rows]
        first = 0
        for source in self.config.sources:
            jobs = [(row, k) for row in range(len(rows)) for k in range(first, first + source.seeds_per_prompt)]
            for start in range(0, len(jobs), self.config.batch_size):
                batch = jobs[start : start + self.config.batch_size]
                media, flags = self._media(source, [(rows[row], k) for row, k in batch])
                if media.ndim != self.ndim.setdefault("media", media.ndim):
                    raise DataError(
                        f"generator '{source.name}' makes {_NAMES[media.ndim]}, an earlier source makes "
                        f"{_NAMES[self.ndim['media']]}; rank images and videos apart, in two folders"
                    )
                for (row, _), medium, is_flagged in zip(batch, media, flags, strict=True):
                    job = None if is_flagged else encoders.submit(encode_medium, medium, source.sampling.fps)
                    cells[row].append(job)
                bar.update(len(batch))
            first += source.seeds_per_prompt
        return cells

    def _media(self, source: SourceConfig, batch: Sequence[tuple[Prompt, int]]) -> tuple[np.ndarray, Sequence[bool]]:
        """uint8 [B, H, W, 3], or [B, F, H, W, 3] of videos, and which of them a safety checker replaced."""
        seeds = [derive_seed(self.config.seed, prompt.id, k) for prompt, k in batch]
        texts, flags = [prompt.text for prompt, _ in batch], (False,) * len(batch)
        try:
            pixels = self.sources[source.name].generate(texts, seeds, source.sampling)
        except FlaggedError as error:
            pixels, flags = error.pixels, error.flags
        return quantise(checked_pixels(pixels, len(batch), f"generator '{source.name}'")), flags

    def write(self, name: str, rows: Sequence[Prompt], cells: Cells) -> Part:
        """Wait for the encoded media and make them a finished part, without prompts that have a flagged one."""
        kept, media, flagged = [], [], []
        for prompt, row in zip(rows, cells, strict=True):
            encoded = [cell.result() for cell in row if cell is not None]
            if len(encoded) == len(row):
                kept.append(prompt)
                media.append(encoded)
            flagged += [self._flagged(prompt, k) for k, cell in enumerate(row) if cell is None]
        table = self._table(kept, media)
        notes = {"flagged": flagged} if flagged else {}
        return write_part(self.folder, name, {f"data/{name}.parquet": table}, notes=notes)

    def _flagged(self, prompt: Prompt, candidate: int) -> dict[str, Any]:
        """The line in quarantine of a candidate that a safety checker replaced."""
        generator = self._generators[candidate]
        reason = f"the pipeline of generator '{generator}' flagged candidate {candidate} as unsafe and replaced it"
        place = {"candidate": candidate, "generator": generator}
        place["seed"] = derive_seed(self.config.seed, prompt.id, candidate)
        return {**place, "prompt_id": prompt.id, "prompt": prompt.text, "reason": reason}

    @property
    def _generators(self) -> list[str]:
        """Which source makes each of the K candidates."""
        return [source.name for source in self.config.sources for _ in range(source.seeds_per_prompt)]

    def _table(self, rows: Sequence[Prompt], media: list[list[bytes]]) -> pa.Table:
        import pyarrow as pa
        from datasets import Features, List, Value

        column = _NAMES[self.ndim["media"]]
        text, texts, whole = Value("string"), List(Value("string")), List(Value("int64"))
        named = {"prompt_id": text, "prompt": text, "metadata": text, column: List(media_feature(column))}
        schema = Features({**named, "generators": texts, "seeds": whole, "sampling": text}).arrow_schema
        generators = self._generators
        sampling = json.dumps({s.name: s.sampling.plain() for s in self.config.sources}, sort_keys=True)
        columns = {
            "prompt_id": [prompt.id for prompt in rows],
            "prompt": [prompt.text for prompt in rows],
            "metadata": [_metadata(prompt) for prompt in rows],
            column: [[{"bytes": data, "path": None} for data in row] for row in media],
            "generators": [generators] * len(rows),
            "seeds": [[derive_seed(self.config.seed, p.id, k) for k in range(len(generators))] for p in rows],
            "sampling": [sampling] * len(rows),
        }
        return pa.table(columns, schema=schema)
