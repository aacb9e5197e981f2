"""`alignkit frontier`: mixtures of reward-tuned members over a grid of weights, evaluated, and which are worth having.

    OUT/base                                   the base's side, made once
    OUT/points/SPACE/WEIGHTS/seed-S/mixture    what `alignkit soup` makes
    OUT/points/SPACE/WEIGHTS/seed-S/soup       of mixed weights that act in a window: the one member of that mixture
    OUT/points/SPACE/WEIGHTS/seed-S/evaluation base against the mixture, scored by all rewards

A point whose evaluation is finished is recognised, so the command may be stopped and given again, with more points,
spaces or trainings of members. Deliberately not here: how members are mixed (`alignkit.generators.soups`, `mixtures`),
and what a front is (`alignkit.evaluation.frontier`).
"""

from __future__ import annotations

import functools
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tqdm import tqdm

from alignkit.commands.specs import (
    GeneratorSpec,
    PromptsConfig,
    RewardSpec,
    absences,
    require_names,
)
from alignkit.commands.stages import compare
from alignkit.commands.verb import Verb, execute
from alignkit.config import build, read_tree
from alignkit.diffusion.tuned_steps import ALL_STEPS, TunedSteps
from alignkit.errors import ConfigError, DataError, MissingFileError, ResumeError, require_at_least
from alignkit.escape import to_code, to_markdown
from alignkit.evaluation.frontier import MEMBERS, OTHERS, Frontier, Point, load_moocore, simplex, table
from alignkit.evaluation.frontier_page import render
from alignkit.evaluation.generated import write_generated
from alignkit.evaluation.ladder import read_arm
from alignkit.evaluation.paired import EvaluateConfig
from alignkit.locks import locked
from alignkit.paths import require_plain_names
from alignkit.provenance import claim_config, write_config
from alignkit.records import Prompt
from alignkit.storage import write_text

if TYPE_CHECKING:
    from alignkit.generators.members import Base, Member

Space = Literal["weights", "embedding", "prediction"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierJob:
    """Mix members over a grid of weights, evaluate every mixture, and draw the front.

    base: the model that all members were trained from.
    members: by a name of your choice a list of results of trainings (LoRAs, or folders of components), one for each
        training seed; all members have equally many.
    objectives: the rewards whose gains make the front; the evaluation uses every reward.
    spaces: what is mixed: weights, embedding (of text encoders), prediction (of denoisers).
    grid: weights are the multiples of 1 / grid that sum to 1; for two members and 4 these are 1, 0.75, 0.5, 0.25, 0.
    points: further weights, each one number a member.
    any_sum: allow points whose weights do not sum to 1.
    window: the steps in which all mixtures act, as in `alignkit soup`; the base acts in the others. Members change text
        encoders alone then, or denoisers alone. Members alone are evaluated in these steps too, as end points.
    null: whether mixtures of text encoders also replace the null condition of guidance.
    others: other generators on the same axes, by a name of your choice, e.g. a joint training: one, or a list of one
        for each training seed. The interval of a single one is over prompts alone.
    prompts: where prompts come from; the held-out share is used (all with held_out: 0).
    rewards: all rewards by a name of your choice.
    gold: the held-out reward, for which no member was tuned.
    evaluate: how base and mixtures are compared.
    evaluate_from: leave out this many of these prompts, from the first: those by which a sweep chose.
    evaluate_prompts: evaluate on at most this many of the others; default: all.
    table: where the table goes (default: OUT/frontier.md).
    title: its heading, and that of the page OUT/frontier.html.
    """

    out: Path
    base: GeneratorSpec
    members: Mapping[str, Sequence[str]]
    objectives: Sequence[str]
    spaces: Sequence[Space] = ("weights",)
    grid: int = 4
    points: Sequence[Sequence[float]] = ()
    any_sum: bool = False
    window: Sequence[float] | None = None
    null: bool = True
    others: Mapping[str, GeneratorSpec | Sequence[GeneratorSpec]] = field(default_factory=dict)
    prompts: PromptsConfig
    rewards: Mapping[str, RewardSpec]
    gold: str | None = None
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    evaluate_from: int = 0
    evaluate_prompts: int | None = None
    table: Path | None = None
    title: str = "The frontier"

    def __post_init__(self) -> None:
        require_at_least(0, {"evaluate_from": self.evaluate_from})
        require_at_least(1, {"grid": self.grid, "evaluate_prompts": self.evaluate_prompts})
        if self.base.is_own or self.base.adapter is not None or self.base.encoder is not None:
            raise ConfigError("base: give a diffusers model without adapter and encoder; those are members")
        require_plain_names(self.members, "members")
        require_plain_names(self.others, "others")
        require_names(self.objectives, self.rewards, kind="reward", key="objectives")
        require_names([self.gold] if self.gold else [], self.rewards, kind="reward", key="gold")
        if len(self.members) < 2:
            raise ConfigError(f"members: {', '.join(self.members) or 'none'}; a frontier mixes at least two")
        counts = {name: len(folders) for name, folders in self.members.items()}
        if len(set(counts.values())) > 1 or not min(counts.values()):
            raise ConfigError(f"members have {counts} trainings; give equally many, one for each training seed")
        for name, given in self.others.items():
            if not isinstance(given, GeneratorSpec) and len(given) != len(self.seeds):
                raise ConfigError(
                    f"others.{name} has {len(given)} trainings; give one generator, or one for each of the members' "
                    f"{len(self.seeds)} training seeds"
                )
        if len(set(self.objectives)) < max(2, len(self.objectives)):
            raise ConfigError(f"objectives: {list(self.objectives)}; give at least two rewards, each once")
        self._check_points()
        TunedSteps.between(self.window).on(self.evaluate.sampling.steps)

    def _check_points(self) -> None:
        from alignkit.adapters.merging import require_weights

        for weights in self.points:
            if len(weights) != len(self.members):
                raise ConfigError(f"points: {list(weights)} has {len(weights)} weights for {len(self.members)} members")
            if not any(weights):
                raise ConfigError(f"points: {list(weights)} is the base itself, whose gains are 0; leave it out")
            require_weights(weights, any_sum=self.any_sum)

    @property
    def seeds(self) -> range:
        """The numbers of the members' trainings."""
        return range(len(next(iter(self.members.values()))))

    @property
    def weights(self) -> list[tuple[float, ...]]:
        """The weights of all mixtures, without those of a single member; of those with equal names, the first."""
        given = [*simplex(len(self.members), self.grid), *(tuple(map(float, one)) for one in self.points)]
        known = {_name(one): one for one in reversed(given)}
        ends = set(map(_name, simplex(len(self.members), 1)))
        return [known[name] for name in dict.fromkeys(map(_name, given)) if name not in ends]

    def steps(self, space: str) -> TunedSteps:
        """Where a mixture of `space` acts."""
        if space in (MEMBERS, OTHERS):
            return ALL_STEPS
        return TunedSteps.between(self.window, null=self.null or space == "prediction")

    def trainings(self, other: str) -> Sequence[GeneratorSpec]:
        """The generators of one of `others`, by training seed."""
        given = self.others[other]
        return [given] if isinstance(given, GeneratorSpec) else given

    def asked(self) -> Sequence[Prompt]:
        """The prompts that base and mixtures are compared on. Raises what the prompts' source raises."""
        held_out = self.prompts.split()[1] if self.prompts.held_out else self.prompts.read()
        return held_out[self.evaluate_from :][: self.evaluate_prompts]

    def folder(self, space: str, name: str, seed: int) -> Path:
        """The folder of one point of one training seed."""
        return self.out / "points" / space / name / f"seed-{seed}"


def _name(weights: Sequence[float]) -> str:
    """Of a mixture, in tables and as a folder."""
    return "-".join(map("{:g}".format, weights))


@dataclass(frozen=True, slots=True)
class _Task:
    """One evaluation: a mixture of one training seed, or one of `others`."""

    space: str
    name: str
    weights: tuple[float, ...]
    seed: int


def _tasks(job: FrontierJob) -> Iterator[_Task]:
    rows = [tuple(map(float, row)) for row in np.eye(len(job.members))]
    points = [(MEMBERS, name, row) for name, row in zip(job.members, rows, strict=True)]
    for space in job.spaces:
        ends = [] if job.steps(space) == ALL_STEPS else rows  # a member in some steps gives other images than in all
        points += [(space, _name(weights), weights) for weights in (*ends, *job.weights)]
    for seed in job.seeds:
        yield from (_Task(*point, seed) for point in points)
    for name in job.others:
        yield from (_Task(OTHERS, name, (0.0,) * len(rows), seed) for seed in range(len(job.trainings(name))))


@dataclass(frozen=True)
class _Mixer:
    """Makes the mixtures of a frontier; the members of one training seed are read once."""

    job: FrontierJob

    @functools.cached_property
    def _base(self) -> Base:
        from alignkit.generators.members import Base

        return Base.open(self.job.base.model, self.job.base.family)

    @functools.cached_property
    def _read(self) -> Callable[[str], tuple[Member, dict[str, str]]]:
        """A member and the checksums of its files."""
        from alignkit.generators.members import read_member

        @functools.lru_cache(len(self.job.members))
        def read(folder: str) -> tuple[Member, dict[str, str]]:
            member = read_member(folder, self._base)
            return member, member.checksums()

        return read

    def _parts(self, task: _Task) -> tuple[list[tuple[Member, dict[str, str]]], list[float]]:
        """The members with a weight, and their weights."""
        given = zip(self.job.members.values(), task.weights, strict=True)
        used = [(self._read(folders[task.seed]), weight) for folders, weight in given if weight != 0]
        members, weights = zip(*used, strict=True)
        return list(members), list(weights)

    def _folder(self, task: _Task) -> Path:
        return self.job.folder(task.space, task.name, task.seed) / "mixture"

    def require_same(self, task: _Task) -> None:
        """ResumeError for a mixture that was made before of other members, with other weights or for other steps."""
        from alignkit.adapters.mixture import is_mixture, read_mixture

        out = self._folder(task)
        if task.space == OTHERS or not is_mixture(out):
            return
        made, (members, weights) = read_mixture(out), self._parts(task)
        soup = out.with_name("soup")
        mixed = read_mixture(soup) if is_mixture(soup) else made
        files = [record.files for record in mixed.members]
        found = {"members": files, "weights": list(mixed.weights), "window": made.window}
        checksums = [own for _, own in members]
        wanted = {"members": checksums, "weights": weights, "window": self.job.steps(task.space)}
        different = [key for key in wanted if found[key] != wanted[key]]
        if different:
            raise ResumeError(
                f"'{out}' was made with other {' and '.join(different)} than this config asks for. Give the old "
                "members in the old order, or another `out`; to make this point of members that were trained again, "
                f"remove '{out.parent}'"
            )

    def mixed(self, task: _Task) -> GeneratorSpec:
        """The base with the mixture, made where it is missing. A member alone, in all steps, is a soup of one."""
        from alignkit.adapters.mixture import is_mixture
        from alignkit.generators.soups import make_mixture, make_soup

        out, window = self._folder(task), self.job.steps(task.space)
        if not is_mixture(out):  # its record is written last
            shutil.rmtree(out, ignore_errors=True)
            given, weights = self._parts(task)
            members = [member for member, _ in given]
            if task.space in ("embedding", "prediction"):
                make_mixture(self._base, members, weights, out, space=task.space, window=window, any_sum=True)
            elif window == ALL_STEPS:
                make_soup(self._base, members, weights, out, any_sum=True)
            else:
                self._make_soup_in_window(members, weights, out, window)
        return replace(self.job.base, adapter=out)

    def _make_soup_in_window(
        self, members: Sequence[Member], weights: Sequence[float], out: Path, window: TunedSteps
    ) -> None:
        """Mixed weights have no window, so they become the one member of a mixture that has."""
        from alignkit.generators.members import read_member
        from alignkit.generators.soups import make_mixture, make_soup, require_space

        changed = {component for member in members for component in member.components}
        space: Literal["embedding", "prediction"] = "prediction"
        if any(component.startswith("text_encoder") for component in changed):
            space = "embedding"
        require_space(members, space)
        soup = out.with_name("soup")
        shutil.rmtree(soup, ignore_errors=True)
        # Without the members' window, or a warning says that they act in all steps now.
        make_soup(self._base, [replace(one, window=None) for one in members], weights, soup, any_sum=True)
        mixed = replace(read_member(str(soup), self._base), window=members[0].window)
        make_mixture(self._base, [mixed], [1.0], out, space=space, window=window)


def _plan(job: FrontierJob) -> list[str]:
    tasks = list(_tasks(job))
    others = {f"{name}, seed {n}": one for name in job.others for n, one in enumerate(job.trainings(name))}
    missing = [folder for folders in job.members.values() for folder in folders if not Path(folder).exists()]
    return [
        *absences({"base": job.base, **others}, rewards=job.rewards, prompts=job.prompts),
        *(f"NOT THERE YET: {folder} (members)" for folder in missing),
        f"mix {', '.join(job.members)} in {len(job.weights)} ways in the spaces {', '.join(job.spaces)}",
        f"evaluate {len(tasks)} points on the held-out share of {job.prompts}, scored by {', '.join(job.rewards)}",
        f"write {job.table or job.out / 'frontier.md'} and {job.out / 'frontier.html'}",
    ]


def _work(argv: Sequence[str], job: FrontierJob) -> None:
    load_moocore()  # before any point is made
    # What a point depends on is in its own folder; the rest may change.
    free = {"members", "spaces", "grid", "points", "any_sum", "others", "objectives", "table", "title"}
    claim_config(job.out, job, free)
    prompts, tasks, mixer = job.asked(), list(_tasks(job)), _Mixer(job)
    for task in tasks:
        mixer.require_same(task)
    write_config(job.out, job)  # which says what the points are of, also to the studio
    bar = tqdm(tasks, unit="point")
    for task in bar:
        bar.set_postfix_str(f"{task.space} {task.name}, seed {task.seed}")
        folder = job.folder(task.space, task.name, task.seed)
        with locked(folder):
            sides = {
                "base": job.base,
                "tuned": job.trainings(task.name)[task.seed] if task.space == OTHERS else mixer.mixed(task),
            }
            out = folder / "evaluation"
            compare(
                *(sides, prompts, job.evaluate, out),
                rewards=job.rewards,
                gold=job.gold,
                base_cache=job.out / "base",
            )
    frontier, folders = _read(job, tasks)
    command = shlex.join(["alignkit", "frontier", *argv])
    settings = [
        f"command: {to_code(command)}",
        *(f"{to_markdown(name)}: {', '.join(map(to_code, own))}" for name, own in job.members.items()),
        (
            f"evaluation: {len(prompts)} held-out prompts x {job.evaluate.seeds_per_prompt} seeds, "
            f"{job.evaluate.sampling.steps} steps, guidance {job.evaluate.sampling.guidance_scale:g}; members of "
            f"{len(job.seeds)} training seeds"
        ),
    ]
    text, path = table(frontier, title=job.title, settings=settings), job.table or job.out / "frontier.md"
    write_text(path, text)
    page = job.out / "frontier.html"
    write_generated(page, render(frontier, folders, title=job.title, command=command))
    print(f"\n{text}\ntable: {path}\npage:  {page}")


def read_frontier(folder: Path) -> Frontier:
    """The finished points in the folder of an `alignkit frontier`.

    Raises MissingFileError where it is none, ConfigError for its config, DataError without a finished point.
    """
    if not (folder / "config.yaml").is_file():
        raise MissingFileError(f"'{folder}' is no folder of `alignkit frontier`: config.yaml is missing")
    problems: list[str] = []
    job = build(FrontierJob, read_tree([], folder / "config.yaml", problems), problems)
    frontier, _ = _read(replace(job, out=folder), list(_tasks(job)))
    if not frontier.points:
        raise DataError(f"'{folder}' has no finished point; let `alignkit frontier` finish one")
    return frontier


def _read(job: FrontierJob, tasks: Sequence[_Task]) -> tuple[Frontier, dict[str, Path]]:
    """All points, and the folder of the first seed's evaluation of each."""
    found, folders = [], {}
    for task in tasks:
        seeds = range(len(job.trainings(task.name))) if task.space == OTHERS else job.seeds
        own = [job.folder(task.space, task.name, seed) / "evaluation" for seed in seeds]
        result = read_arm(task.name, own) if task.seed == 0 else None
        if result is not None:
            found.append(Point(task.space, task.weights, result))
            folders[f"{task.space} {task.name}"] = own[0]
    return Frontier(list(job.members), job.objectives, found), folders


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Evaluate mixtures of trainings over a grid of weights: Pareto front, hypervolume, barriers."
    execute(
        Verb("frontier", summary, lambda *_: FrontierJob, _plan, functools.partial(_work, argv), lambda job: job.out),
        argv,
    )
