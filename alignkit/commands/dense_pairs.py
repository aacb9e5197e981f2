"""`alignkit dense-pairs`: pairs of clips from captioned real videos, as latents in the dense format."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignkit.commands.specs import GeneratorSpec, absences, build_generator
from alignkit.commands.verb import Verb, counts_line, execute
from alignkit.config import init_fields
from alignkit.errors import ConfigError, require_at_least
from alignkit.pairs import PairMaker
from alignkit.provenance import vars_of, write_config
from alignkit.records import Sampling
from alignkit.resolve import resolve
from alignkit.storage import StageResult
from data_pipelines.dense import Clips, PairsConfig, made_clips, make_pairs, read_clips


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipsConfig:
    """Where the real videos and their captions come from: files, or a function of yours that makes them.

    path: a folder of NAME.mp4 with NAME.txt or with a metadata file, a .jsonl, .csv or .parquet file, or a dataset.
    video_column: the column of the videos in a table; default: video or file_name.
    caption_column: the column of the captions; default: caption, text or prompt.
    root: the folder of the files that rows name by their path; default: the data's own.
    source: 'package.module:attribute', called as source(count, **options), returning `alignkit.pairs.RealVideo`
        records.
    options: keywords for `source`.
    count: use only the first videos, this many; needed with `source`.
    """

    path: Path | None = None
    video_column: str | None = None
    caption_column: str | None = None
    root: Path | None = None
    source: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    count: int | None = None

    def __post_init__(self) -> None:
        require_at_least(1, {"clips.count": self.count})
        if (self.path is None) == (self.source is None):
            raise ConfigError("clips: give either `path` or `source`")
        if self.source is not None and self.count is None:
            raise ConfigError(f"clips: source '{self.source}' needs `count`")

    def __str__(self) -> str:
        """`folder`, or `400 of module:attribute`."""
        whole = str(self.path or self.source)
        return f"{self.count} of {whole}" if self.count else whole

    @property
    def missing(self) -> list[str]:
        """The line of a dry run about videos that are not there yet."""
        return [] if self.path is None or self.path.exists() else [f"NOT THERE YET: {self.path} (clips)"]

    def read(self) -> Clips:
        """The clips, in order. Raises DataError where there is none, UnknownNameError for an unknown source."""
        if self.path is None:
            return made_clips(resolve(str(self.source), {}, kind="video source")(self.count, **self.options))
        columns = {"video_column": self.video_column, "caption_column": self.caption_column}
        found = read_clips(self.path, root=self.root, **columns)
        return replace(found, items=found.items[: self.count])


@dataclass(frozen=True, kw_only=True)
class PairStage(PairsConfig):
    """Which pairs are made, and how their clips are sampled.

    sampling: steps, guidance scale, and frames, rate and size of the clips; videos are brought to them.
    """

    sampling: Sampling = field(default_factory=lambda: Sampling(steps=40, num_frames=81, fps=16))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling.num_frames < 2:
            raise ConfigError("sampling: num_frames is 1; give the number of frames of a clip, such as 81")

    @property
    def words(self) -> str:
        """`guided pairs (81 frames of 832 x 480)`."""
        sampling = self.sampling
        return f"{self.kind} pairs ({sampling.num_frames} frames of {sampling.width} x {sampling.height})"

    def make(self, clips: ClipsConfig, generator: GeneratorSpec, out: Path) -> StageResult:
        """The pairs of `clips` by `generator` in the folder `out`."""
        values = vars_of(self)
        config = PairsConfig(**{name: values[name] for name in init_fields(PairsConfig)})
        build = functools.partial(build_maker, generator, self.sampling)
        return make_pairs(clips.read(), config, self.sampling, out, build_maker=build, identity=generator.identity)


@dataclass(frozen=True, kw_only=True)
class DensePairsJob(PairStage):
    """Make pairs of clips.

    clips: where the real videos come from.
    generator: the text-to-video model.
    out: the folder of the pairs; run again, it continues.
    """

    clips: ClipsConfig
    generator: GeneratorSpec
    out: Path

    def __post_init__(self) -> None:
        super().__post_init__()
        self.generator.require_frames(self.sampling.num_frames, "sampling.num_frames")


def _plan(job: DensePairsJob) -> list[str]:
    made = f"make {job.words} of the videos in {job.clips} with {job.generator.model} into {job.out}"
    return [*absences({"generator": job.generator}), *job.clips.missing, made]


def _work(job: DensePairsJob) -> None:
    result = job.make(job.clips, job.generator, job.out)
    write_config(job.out, job)
    print(f"{counts_line(result.counts)} in {result.folder}")
    if result.counts["quarantined"]:
        print(f"what was left out and why: {result.folder / 'quarantine.jsonl'}")


def build_maker(spec: GeneratorSpec, sampling: Sampling) -> PairMaker:
    """Raises ConfigError for a model that is no text-to-video pipeline."""
    from alignkit.generators.pairs import RolloutPairs
    from alignkit.generators.pipeline import PipelineGenerator

    generator = build_generator(Path(spec.model).name, spec)
    if isinstance(generator, PairMaker):  # a builder of the user's own
        return generator
    if not isinstance(generator, PipelineGenerator):
        raise ConfigError(f"model '{spec.model}' is a {type(generator).__name__}; pairs need a diffusers pipeline")
    return RolloutPairs(generator, sampling)


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Make pairs of clips from captioned real videos, for labels by segment; run again, it continues."
    execute(Verb("dense-pairs", summary, lambda *_: DensePairsJob, _plan, _work, lambda job: job.out), argv)
