"""`alignkit dense-pairs`: pairs of clips from captioned real videos, as latents in the dense format."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alignkit.commands.specs import GeneratorSpec, absences, build_generator
from alignkit.commands.verb import Verb, counts_line, execute
from alignkit.config import init_fields
from alignkit.errors import ConfigError
from alignkit.pairs import PairMaker
from alignkit.provenance import vars_of, write_config
from alignkit.records import Sampling
from data_pipelines.dense import Clips, PairsConfig, make_pairs, read_clips


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipsConfig:
    """Where the real videos and their captions come from.

    path: a folder of NAME.mp4 with NAME.txt or with a metadata file, a .jsonl, .csv or .parquet file, or a dataset.
    video_column: the column of the videos in a table; default: video or file_name.
    caption_column: the column of the captions; default: caption, text or prompt.
    root: the folder of the files that rows name by their path; default: the data's own.
    """

    path: Path
    video_column: str | None = None
    caption_column: str | None = None
    root: Path | None = None

    def read(self) -> Clips:
        """The clips, in order. Raises DataError where there is none."""
        return read_clips(self.path, video_column=self.video_column, caption_column=self.caption_column, root=self.root)


@dataclass(frozen=True, kw_only=True)
class DensePairsJob(PairsConfig):
    """Make pairs of clips.

    clips: where the real videos come from.
    generator: the text-to-video model.
    sampling: steps, guidance scale, and frames, rate and size of the clips; videos are brought to them.
    out: the folder of the pairs; run again, it continues.
    """

    clips: ClipsConfig
    generator: GeneratorSpec
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=40, num_frames=81, fps=16))
    out: Path

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling.num_frames < 2:
            raise ConfigError("sampling: num_frames is 1; give the number of frames of a clip, such as 81")
        self.generator.require_frames(self.sampling.num_frames, "sampling.num_frames")

    @property
    def pairs(self) -> PairsConfig:
        """The keys of the pairs alone."""
        values = vars_of(self)
        return PairsConfig(**{name: values[name] for name in init_fields(PairsConfig)})


def _plan(job: DensePairsJob) -> list[str]:
    missing = [] if job.clips.path.exists() else [f"NOT THERE YET: {job.clips.path} (clips)"]
    size = f"{job.sampling.num_frames} frames of {job.sampling.width} x {job.sampling.height}"
    made = f"make {job.kind} pairs ({size}) of the videos in {job.clips.path} with {job.generator.model} into {job.out}"
    return [*absences({"generator": job.generator}), *missing, made]


def _work(job: DensePairsJob) -> None:
    build = functools.partial(build_maker, job.generator, job.sampling)
    clips = job.clips.read()
    result = make_pairs(clips, job.pairs, job.sampling, job.out, build_maker=build, identity=job.generator.identity)
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
