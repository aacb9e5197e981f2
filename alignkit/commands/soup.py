"""`alignkit soup`: several trainings of one model as one: a LoRA, components, or a mixture at sampling time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from alignkit.adapters.mixture import BASE, Mixture
from alignkit.commands.greedy import Candidates, GreedyConfig, used
from alignkit.commands.specs import GeneratorSpec, absences
from alignkit.commands.verb import Verb, execute
from alignkit.diffusion.tuned_steps import TunedSteps
from alignkit.errors import ConfigError
from alignkit.shipped import model_path

if TYPE_CHECKING:
    from alignkit.adapters.merging import Merge
    from alignkit.generators.members import Base, Member


@dataclass(frozen=True, kw_only=True, slots=True)
class SoupJob:
    """Mix reward-tuned adapters, encoders or denoisers of one base.

    members: LoRA files or folders, folders of full weights (a component, or a pipeline), or the word base.
    weights: one number a member, in the same order.
    base: the model that all members were trained from: a diffusers folder, a hub id or 'sandbox:NAME'.
    space: weights (a soup, one model), embedding (of text encoders) or prediction (of denoisers), mixed while sampling.
    method: linear (the weighted sum of changes), wise_ft (one member, its strength), ties, dare, or greedy (equal
        shares of the members that raise the score in `greedy`, tried one by one; it takes no weights).
    greedy: what the score of a greedy soup is.
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
    weights: Sequence[float] = ()
    base: str
    out: Path
    space: Literal["weights", "embedding", "prediction"] = "weights"
    method: Literal["linear", "wise_ft", "ties", "dare", "greedy"] = "linear"
    greedy: GreedyConfig | None = None
    density: float = 1.0
    seed: int = 0
    rank: int | None = None
    output: Literal["auto", "adapter", "components", "model"] = "auto"
    window: Sequence[float] | None = None
    null: bool = True
    any_sum: bool = False
    family: str | None = None

    def __post_init__(self) -> None:
        if (self.method == "greedy") != (self.greedy is not None):
            raise ConfigError("method: greedy and the section `greedy` (prompts, reward) belong together; give both")
        if self.greedy is not None and (self.weights or len(self.members) < 2):
            raise ConfigError("a greedy soup chooses its weights from at least two members; leave out weights")
        if self.greedy is None and len(self.members) != len(self.weights):
            raise ConfigError(f"{len(self.members)} members and {len(self.weights)} weights; give one weight for each")
        if self.space == "weights" and self.steps != TunedSteps(null=self.null):
            raise ConfigError("a window is for space embedding or prediction: mixed weights act in all steps")
        if self.space != "embedding" and not self.null:
            raise ConfigError("null: false is for space embedding")
        has_other = self.method not in ("linear", "greedy") or self.rank is not None or self.output != "auto"
        if self.space != "weights" and has_other:
            raise ConfigError(
                f"methods other than linear and greedy, rank and output are of weights; a mixture of {self.space}s "
                "takes none of them"
            )

    @property
    def steps(self) -> TunedSteps:
        """Where an embedding or prediction mixture acts."""
        return TunedSteps.between(self.window, null=self.null)


def _plan(job: SoupJob) -> list[str]:
    missing = [name for name in job.members if name != BASE and not Path(model_path(name)).exists()]
    missing += GeneratorSpec(model=job.base, family=job.family).absent
    lines = [f"NOT THERE YET: {name}" for name in missing]
    _require_weights(job)
    if job.greedy is not None:
        config = job.greedy
        share = f"the share of {config.prompts} that is not held out"
        return [
            *lines,
            *absences({}, rewards={"greedy": config.reward}, prompts=config.prompts),
            f"score {2 * len(job.members) - 1} candidates by {config.reward.reward} on {share}, in {_work_folder(job)}",
            f"mix the members that raise it, in equal shares, as changes of {job.base}, into {job.out}",
        ]
    parts = " + ".join(f"{weight:g} {member}" for weight, member in zip(job.weights, job.members, strict=True))
    how = (
        f"mix {parts} by {job.method}" if job.space == "weights" else f"mix the {job.space}s of {parts} while sampling"
    )
    return [*lines, f"{how}, as changes of {job.base}, into {job.out}"]


def _require_weights(job: SoupJob) -> None:
    """ConfigError for weights or a density that the method cannot take; those of a greedy soup are not known yet."""
    _merge(job).check(job.weights if job.greedy is None else [1.0], any_sum=job.any_sum)


def _work_folder(job: SoupJob) -> Path:
    """Of the candidates of a greedy soup."""
    given = job.greedy.work if job.greedy is not None else None
    return given or job.out.with_name(f"{job.out.name}-greedy")


def _merge(job: SoupJob) -> Merge:
    from alignkit.adapters.merging import Merge

    return Merge("linear" if job.method == "greedy" else job.method, job.density, job.seed)


def _work(job: SoupJob) -> None:
    from alignkit.generators.members import Base, read_member
    from alignkit.generators.soups import require_new

    require_new(job.out)
    _require_weights(job)
    base = Base.open(job.base, job.family)
    members = [read_member(name, base) for name in job.members]
    weights = job.weights if job.greedy is None else _chosen(job, job.greedy, base, members)
    mixture = _write(job, base, members, weights, job.out)
    if job.space == "weights":
        error = f", relative error {mixture.rank_error:.3g}" if job.rank is not None else ""
        print(f"{', '.join(mixture.files)} in {job.out}{error}")
    else:
        print(f"a mixture of {len(mixture.members)} members in {job.out}")
    if job.greedy is not None:
        print(f"in equal shares: {', '.join(member.name for member in mixture.members)}")
    print(f"next: give it as a generator's `adapter`: alignkit evaluate --tuned.adapter {job.out} ...")


def _chosen(job: SoupJob, greedy: GreedyConfig, base: Base, members: Sequence[Member]) -> list[float]:
    """The weights of the greedy soup, after checks of what would otherwise be refused at its end."""
    from alignkit.generators.members import require_one_base
    from alignkit.generators.soups import kind_of_result

    require_one_base(members, base)
    if job.space == "weights":
        kind_of_result(base, members, job.output, job.rank)
    spec = GeneratorSpec(model=job.base, family=job.family, dtype=greedy.dtype)
    how = {"space": job.space, "window": job.window, "null": job.null, "rank": job.rank}
    write = functools.partial(_write, replace(job, output="auto"), base, members)
    return Candidates(greedy, spec, job.members, _work_folder(job), write, how).choose()


def _write(job: SoupJob, base: Base, members: Sequence[Member], weights: Sequence[float], out: Path) -> Mixture:
    """The mixture of `members` in the new folder `out`; those that a greedy choice left out are no part of it."""
    from alignkit.generators.soups import make_mixture, make_soup

    places = used(weights) if job.greedy is not None else range(len(members))
    shares = [weights[place] for place in places]
    mixed = (base, [members[place] for place in places], shares, out)
    if job.space != "weights":
        return make_mixture(*mixed, space=job.space, window=job.steps, any_sum=job.any_sum)
    return make_soup(*mixed, merge=_merge(job), output=job.output, rank=job.rank, any_sum=job.any_sum)


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Mix several trainings of one model: a soup of weights, or a mixture of embeddings or predictions."
    execute(Verb("soup", summary, lambda *_: SoupJob, _plan, _work, lambda job: job.out), argv)
