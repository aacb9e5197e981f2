"""`alignkit annotate`: people label segments of pairs of clips on a page in their browser."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkit.commands.dense_pairs import build_maker
from alignkit.commands.specs import GeneratorSpec, absences
from alignkit.commands.verb import Verb, execute
from alignkit.errors import ConfigError
from data_pipelines.annotation import Annotators, Pairs, Server
from data_pipelines.dense.votes import VOTES, require_labeller

PORT = 8765


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotateJob:
    """Label pairs of clips by people.

    pairs: the folder that `alignkit dense-pairs` wrote.
    out: the folder in which the votes are; default: that of the pairs.
    annotator: the one name that the page accepts; default: the page asks.
    seed: with the annotator and the pair it decides which clip is shown on the left.
    port: of the page, on 127.0.0.1; 0 takes a free one.
    generator: the model whose VAE decodes the clips of a folder that holds latents alone.
    """

    pairs: Path
    out: Path | None = None
    annotator: str | None = None
    seed: int = 0
    port: int = PORT
    generator: GeneratorSpec | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port is {self.port}; give a number below 65536, such as {PORT}")
        if self.annotator is not None:
            require_labeller(self.annotator)

    @property
    def folder(self) -> Path:
        """Where the votes are."""
        return self.out or self.pairs


def _plan(job: AnnotateJob) -> list[str]:
    missing = [] if job.pairs.exists() else [f"NOT THERE YET: {job.pairs} (pairs)"]
    generators = {"generator": job.generator} if job.generator else {}
    shown = f"serve a page on 127.0.0.1, port {job.port or 'any'}, that shows the pairs in {job.pairs}"
    return [*absences(generators), *missing, f"{shown} and writes votes to {job.folder / VOTES}"]


def _work(job: AnnotateJob) -> None:
    pairs = Pairs(job.pairs, functools.partial(build_maker, job.generator) if job.generator else None)
    annotators = Annotators(pairs, job.folder, seed=job.seed, only=job.annotator)
    with Server(annotators, job.port) as server:
        print(f"{len(pairs.rows)} pairs, {pairs.segments} segments; open {server.url} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            progress = ", ".join(f"{name} {count}" for name, count in annotators.progress().items())
            print(f"\nvotes are in {job.folder / VOTES}; labelled segments: {progress or 'none'}")


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Label segments of pairs of clips on a page in the browser; several annotators, resumable."
    execute(Verb("annotate", summary, lambda *_: AnnotateJob, _plan, _work), argv)
