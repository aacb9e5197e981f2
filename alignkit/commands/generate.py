"""`alignkit generate`: candidates for prompts, from several generators and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkit.commands.specs import (
    GeneratorSpec,
    PromptsConfig,
    absences,
    generator_builders,
    identities,
    require_sources,
)
from alignkit.commands.verb import Verb, execute
from alignkit.provenance import write_config
from data_pipelines.synpic import GenerateConfig, generate_candidates


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateJob:
    """Generate candidates.

    prompts: where the prompts come from.
    generators: the generators by a name of your choice.
    generate: which of them generate how many candidates, and how.
    out: the folder of the candidates; run again, it continues.
    """

    prompts: PromptsConfig
    generators: Mapping[str, GeneratorSpec]
    generate: GenerateConfig
    out: Path

    def __post_init__(self) -> None:
        require_sources(self.generate, self.generators)


def _plan(job: GenerateJob) -> list[str]:
    sources = ", ".join(f"{source.name} x {source.seeds_per_prompt}" for source in job.generate.sources)
    candidates = f"{job.generate.candidates} candidates ({sources})"
    return [*absences(job.generators, prompts=job.prompts), f"generate {candidates} for {job.prompts} into {job.out}"]


def _work(job: GenerateJob) -> None:
    prompts = job.prompts.read()
    build_sources = generator_builders(job.generators)
    known = identities(job.generators)
    result = generate_candidates(prompts, job.generate, job.out, build_sources=build_sources, identities=known)
    write_config(job.out, job)
    media = f"{result.counts['videos']} videos" if "videos" in result.counts else f"{result.counts['pictures']} images"
    print(f"{result.rows} prompts, {media} in {result.folder}")
    if "flagged" in result.counts:
        flagged, prompts_left_out = result.counts["flagged"], result.counts["quarantined"]
        print(
            f"{flagged} images were flagged as unsafe by a safety checker; their prompts ({prompts_left_out}) are left "
            f"out: {result.folder / 'quarantine.jsonl'}"
        )
    print(f"next: alignkit score --candidates {job.out} --out {job.out.with_name('scores')} ...")


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Generate candidates for prompts with several generators; run again, it continues."
    execute(Verb("generate", summary, lambda *_: GenerateJob, _plan, _work, lambda job: job.out), argv)
