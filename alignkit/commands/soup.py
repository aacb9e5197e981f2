"""`alignkit soup`: several trainings of one model as one: a LoRA, components, or a mixture at sampling time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignkit.adapters.mixture import BASE
from alignkit.commands.specs import GeneratorSpec
from alignkit.commands.verb import Verb, execute
from alignkit.diffusion.tuned_steps import TunedSteps
from alignkit.errors import ConfigError
from alignkit.shipped import model_path


@dataclass(frozen=True, kw_only=True, slots=True)
class SoupJob:
    """Mix reward-tuned adapters, encoders or denoisers of one base.

    members: LoRA files or folders, folders of full weights (a component, or a pipeline), or the word base.
    weights: one number a member, in the same order.
    base: the model that all members were trained from: a diffusers folder, a hub id or 'sandbox:NAME'.
    space: weights (a soup, one model), embedding (of text encoders) or prediction (of denoisers), mixed while sampling.
    method: linear (the weighted sum of changes), wise_ft (one member, its strength), ties or dare.
    density: the share of changes that ties and dare keep.
    seed: fixes which changes dare keeps.
    rank: cut the resulting LoRA to this rank; the error is printed. Needed for a LoRA by ties or dare.
    output: adapter (one LoRA), components (folders of full weights) or model (a whole pipeline).
    window: start and stop of the steps in which an embedding or prediction mixture acts, as fractions of the chain (0.4
        1.0) or as numbers of steps (10 25); the base acts in the others.
    null: whether an embedding mixture also replaces the null condition of guidance.
    any_sum: allow weights that do not sum to 1.
    family: 'package.module:attribute' of your own family of the base.
    out: the new folder; nothing is overwritten.
    """

    members: Sequence[str]
    weights: Sequence[float]
    base: str
    out: Path
    space: Literal["weights", "embedding", "prediction"] = "weights"
    method: Literal["linear", "wise_ft", "ties", "dare"] = "linear"
    density: float = 1.0
    seed: int = 0
    rank: int | None = None
    output: Literal["auto", "adapter", "components", "model"] = "auto"
    window: Sequence[float] | None = None
    null: bool = True
    any_sum: bool = False
    family: str | None = None

    def __post_init__(self) -> None:
        if len(self.members) != len(self.weights):
            raise ConfigError(f"{len(self.members)} members and {len(self.weights)} weights; give one weight for each")
        if self.space == "weights" and self.steps != TunedSteps(null=self.null):
            raise ConfigError("a window is for space embedding or prediction: mixed weights act in all steps")
        if self.space != "embedding" and not self.null:
            raise ConfigError("null: false is for space embedding")
        if self.space != "weights" and (self.method != "linear" or self.rank is not None or self.output != "auto"):
            raise ConfigError(f"method, rank and output are of weights; a mixture of {self.space}s takes none of them")

    @property
    def steps(self) -> TunedSteps:
        """Where an embedding or prediction mixture acts."""
        return TunedSteps.between(self.window, null=self.null)


def _plan(job: SoupJob) -> list[str]:
    from alignkit.adapters.merging import Merge

    Merge(job.method, job.density, job.seed).check(job.weights, any_sum=job.any_sum)
    missing = [name for name in job.members if name != BASE and not Path(model_path(name)).exists()]
    missing += GeneratorSpec(model=job.base, family=job.family).absent
    parts = " + ".join(f"{weight:g} {member}" for weight, member in zip(job.weights, job.members, strict=True))
    how = (
        f"mix {parts} by {job.method}" if job.space == "weights" else f"mix the {job.space}s of {parts} while sampling"
    )
    return [*(f"NOT THERE YET: {name}" for name in missing), f"{how}, as changes of {job.base}, into {job.out}"]


def _work(job: SoupJob) -> None:
    from alignkit.adapters.merging import Merge
    from alignkit.generators.members import Base, read_member
    from alignkit.generators.soups import make_mixture, make_soup, require_new

    require_new(job.out)
    merge = Merge(job.method, job.density, job.seed)
    merge.check(job.weights, any_sum=job.any_sum)
    base = Base.open(job.base, job.family)
    members = [read_member(name, base) for name in job.members]
    if job.space == "weights":
        mixture = make_soup(
            *(base, members, job.weights, job.out),
            merge=merge,
            output=job.output,
            rank=job.rank,
            any_sum=job.any_sum,
        )
        error = f", relative error {mixture.rank_error:.3g}" if job.rank is not None else ""
        print(f"{', '.join(mixture.files)} in {job.out}{error}")
    else:
        make_mixture(base, members, job.weights, job.out, space=job.space, window=job.steps, any_sum=job.any_sum)
        print(f"a mixture of {len(members)} members in {job.out}")
    print(f"next: give it as a generator's `adapter`: alignkit evaluate --tuned.adapter {job.out} ...")


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Mix several trainings of one model: a soup of weights, or a mixture of embeddings or predictions."
    execute(Verb("soup", summary, lambda *_: SoupJob, _plan, _work, lambda job: job.out), argv)
