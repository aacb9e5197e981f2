"""`alignkit ladder`: one set of ranked candidates, many ways of learning from it, one table.

    DATA/candidates  scores  ranked     Syn-Pic, made once
    DATA/base  cache                    the base side, latents and reference errors, shared by all arms
    OUT/arms/NAME/seed-S                a training, its adapter and its evaluation

Arms are trained in worker processes, each on its share of the cores; a finished arm is recognised, so the command may
be stopped and given again. A sweep is a ladder whose arms differ in learning rate or beta. Not here: any loss.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import shlex
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from alignkit.claims import holds_results
from alignkit.commands.data import DATA, SynPicJob, TrainingData, data_kind
from alignkit.commands.methods import DEFAULT_METHOD, config_class, unchecked_methods
from alignkit.commands.specs import ValidationConfig, absences, tuned_spec
from alignkit.commands.stages import compare, fit
from alignkit.commands.trainer_keys import trained_frames
from alignkit.commands.verb import Verb, execute
from alignkit.config import init_fields, load
from alignkit.errors import AlignKitError, ConfigError, require_at_least
from alignkit.escape import to_code, to_markdown
from alignkit.evaluation.ladder import ArmResult, read_arm, table
from alignkit.evaluation.paired import EvaluateConfig
from alignkit.locks import locked
from alignkit.provenance import write_resolved
from alignkit.records import Prompt
from alignkit.storage import write_text


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmConfig:
    """One way of learning.

    method: a training method on ranked data: a name that `alignkit --help` lists after `train`, or one of your own.
    labels: ranked, or random (each prompt's phi shuffled among its candidates: the control).
    own_samples: learn from the policy's own candidates only.
    train: trainer keys on top of the ladder's; each must be a key of this arm's method.
    """

    method: str = DEFAULT_METHOD
    labels: Literal["ranked", "random"] = "ranked"
    own_samples: bool = False
    train: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LadderJob(SynPicJob):
    """Train and evaluate every arm with every seed.

    data: where candidates, rankings and caches are; ladders that name the same folder share them (default: out).
    arms: the ways of learning, by name.
    training_seeds: each arm is trained with each of them (LoRA start, order, noise, shuffled labels).
    train: trainer keys that all arms share. An arm leaves out those that its method does not have and another arm's
        method has; a key that no arm's method has is an error.
    validation: media scored during training.
    evaluate: how base and tuned are compared.
    guidance_scales: guidance scales of further comparisons, which differ from `evaluate` in nothing else.
    evaluate_from: leave out so many held-out prompts, those that a sweep has chosen by.
    evaluate_prompts: use at most so many of the others.
    workers: arms trained at the same time.
    table: where the table goes.
    title: its heading.
    """

    data: Path | None = None
    arms: Mapping[str, ArmConfig]
    training_seeds: Sequence[int] = (0, 1, 2)
    train: Mapping[str, Any] = field(default_factory=dict)
    validation: ValidationConfig | None = None
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    guidance_scales: Sequence[float] = ()
    evaluate_from: int = 0
    evaluate_prompts: int | None = None
    workers: int = 2
    table: Path
    title: str = "The ladder"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_judges("validation.rewards", self.validation.rewards if self.validation else [])
        self.aligned.require_frames(self.evaluate.sampling.num_frames, "evaluate.sampling.num_frames")
        if self.validation is not None:
            self.aligned.require_frames(self.validation.sampling.num_frames, "validation.sampling.num_frames")
        require_at_least(0, {"evaluate_from": self.evaluate_from})
        require_at_least(1, {"evaluate_prompts": self.evaluate_prompts, "workers": self.workers})
        if not self.training_seeds or not all(0 <= seed < 2**32 for seed in self.training_seeds):
            raise ConfigError(
                f"training_seeds is {list(self.training_seeds)}; give at least one, each from 0 to 2**32 - 1"
            )
        if len(self.comparisons) != 1 + len(self.guidance_scales):
            raise ConfigError(f"guidance_scales is {list(self.guidance_scales)}; it repeats a guidance scale")
        reserved = {"out", "output_dir", "cache_dir", "seed", "noise_seed"}
        for name, arm in self.arms.items():
            taken = sorted(reserved & {*self.train, *arm.train})
            if taken:
                raise ConfigError(f"arms.{name}: {taken} are set by the ladder; remove them from train")

    @property
    def shared(self) -> Path:
        """The folder of what all arms share."""
        return self.data or self.out

    @property
    def comparisons(self) -> Mapping[float, EvaluateConfig]:
        """How base and tuned are compared, by guidance scale; that of `evaluate` is the first."""
        first = self.evaluate.sampling
        scales = [first.guidance_scale, *self.guidance_scales]
        return {s: replace(self.evaluate, sampling=replace(first, guidance_scale=s)) for s in scales}

    def judged(self, held_out: Sequence[Prompt]) -> Sequence[Prompt]:
        """The held-out prompts that base and tuned are compared on."""
        shown = self.validation.prompts if self.validation else 0
        return held_out[max(shown, self.evaluate_from) :][: self.evaluate_prompts]

    def folder(self, arm: str, seed: int) -> Path:
        """Where an arm's training with one seed lives."""
        return self.out / "arms" / arm / f"seed-{seed}"

    def evaluation(self, arm: str, seed: int, scale: float) -> Path:
        """Where the comparison at one guidance scale lives."""
        is_first = scale == self.evaluate.sampling.guidance_scale
        return self.folder(arm, seed) / ("evaluation" if is_first else f"evaluation-guidance-{scale:g}")


def _arguments(job: LadderJob, name: str, seed: int) -> Any:
    """The trainer's config of one run.

    Raises ConfigError for a key that the method's trainer has not, and for a method that trains on other data.
    """
    method = job.arms[name].method
    if data_kind(method) != DATA["ranked"]:
        raise ConfigError(f"arms.{name}: method '{method}' trains on other data; a ladder's is ranked")
    keys = {
        "disable_tqdm": True,
        **job.train,
        **job.arms[name].train,
        "output_dir": str(job.folder(name, seed)),
        "cache_dir": str(job.shared / "cache"),
        "seed": seed,
        "noise_seed": seed,
    }
    classes = {arm.method: config_class(arm.method) for arm in job.arms.values()}
    own = classes[method]
    # Drop shared keys that only another arm's method has. Unknown keys stay, so that `load` reports them.
    others = {key for other in classes.values() for key in init_fields(other)} - set(init_fields(own))
    keys = {key: value for key, value in keys.items() if key not in others - set(job.arms[name].train)}
    try:
        args = load(own, base=keys)
        job.aligned.require_frames(trained_frames(args), "num_frames")
    except ConfigError as error:
        raise ConfigError(f"arms.{name}: {error}") from error
    return args


def run_arm(job: LadderJob, name: str, seed: int) -> str:
    """Train one arm with one seed and evaluate it, in a process of its own; returns its label."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.workers))
    folder, arm = job.folder(name, seed), job.arms[name]
    folder.mkdir(parents=True, exist_ok=True)
    _, held_out = job.prompts.split()
    shown = job.validation.prompts if job.validation else 0
    with (
        (folder / "log.txt").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        locked(folder),
    ):
        validation = None
        if job.validation is not None:
            validation = functools.partial(job.validation.build, held_out[:shown], job.rewards)
        select = functools.partial(_rows, arm=arm, seed=seed, policy=job.policy)
        result = fit(
            arm.method,
            (job.policy, job.aligned),
            _arguments(job, name, seed),
            TrainingData(kind="ranked", path=job.shared / "ranked"),
            validation=validation,
            select=select,
            sampling=job.evaluate.sampling,
        )
        sides = {"base": job.aligned, "tuned": tuned_spec(job.aligned, result)}
        prompts, judges = job.judged(held_out), {"rewards": job.rewards, "gold": job.gold}
        for scale, config in job.comparisons.items():
            out = job.evaluation(name, seed, scale)
            compare(sides, prompts, config, out, base_cache=job.shared / "base", **judges)
    return f"{name}, seed {seed}"


def _rows(rows: Any, *, arm: ArmConfig, seed: int, policy: str) -> Any:
    """The ranked rows as the arm sees them."""
    from data_pipelines.ablations import own_candidates, shuffled_labels

    if arm.own_samples:
        rows = own_candidates(rows, policy)
    return shuffled_labels(rows, seed) if arm.labels == "random" else rows


def _plan(job: LadderJob) -> list[str]:
    runs = len(job.arms) * len(job.training_seeds)
    unchecked = unchecked_methods(arm.method for arm in job.arms.values())
    for name in [] if unchecked else job.arms:  # which keys all arms share depends on every method
        _arguments(job, name, job.training_seeds[0])
    return [
        *absences(job.generators, rewards=job.rewards, prompts=job.prompts),
        *unchecked,
        f"generate, score and rank {job.generate.candidates} candidates for the training share of {job.prompts}",
        f"train and evaluate {len(job.arms)} arms x {len(job.training_seeds)} seeds = {runs} runs, by {job.workers}",
        *(f"arm {name}: {arm.method}, {arm.labels} labels, {dict(arm.train)}" for name, arm in job.arms.items()),
        f"write the table to {job.table}",
    ]


def _work(argv: Sequence[str], job: LadderJob) -> None:
    for name in job.arms:
        _arguments(job, name, job.training_seeds[0])  # a wrong key stops here, not in the last arm
    free = {"title", "workers", "data"}  # `data` is a place; what is in it has records of its own
    if not holds_results(job.out / "arms"):
        free |= {*init_fields(LadderJob)} - {*init_fields(SynPicJob)}
    write_resolved(job.out, job, free)
    counts = job.make_ranked(job.prompts.split()[0], job.shared)
    print(counts)
    failed = _run_all(job, [(name, seed) for seed in job.training_seeds for name in job.arms])
    evaluations = {f"Guidance {scale:g}": _results(job, scale) for scale in job.comparisons}
    page = table(evaluations, title=job.title, settings=_settings(job, counts, argv))
    write_text(job.table, page)
    print(f"\n{page}\ntable: {job.table}")
    if failed:
        raise AlignKitError(f"{len(failed)} runs failed: {'; '.join(failed)}. The rest is kept: give the command again")


def _results(job: LadderJob, scale: float) -> list[ArmResult]:
    """The arms of which a run has been evaluated at this guidance scale."""
    arms = []
    for name in job.arms:
        arm = read_arm(name, [job.evaluation(name, seed, scale) for seed in job.training_seeds])
        arms += [] if arm is None else [arm]
    return arms


def _settings(job: LadderJob, counts: str, argv: Sequence[str]) -> list[str]:
    """The lines above the table: the command, and what every number depends on."""
    drawn = "; ".join(
        f"{s.name} x {s.seeds_per_prompt} at guidance {s.sampling.guidance_scale:g}" for s in job.generate.sources
    )
    scales = " and ".join(f"{scale:g}" for scale in job.comparisons)
    judged = len(job.judged(job.prompts.split()[1]))
    return [
        f"command: {to_code(shlex.join(['alignkit', 'ladder', *argv]))}",
        to_markdown(f"candidates: {drawn}; ranked by {', '.join(job.score.rewards)}; {counts}"),
        f"training, all arms: {to_code(json.dumps(dict(job.train)))}",
        *(f"arm {to_markdown(name)}: {_words(arm)}" for name, arm in job.arms.items()),
        (
            f"evaluation: {judged} held-out prompts x {job.evaluate.seeds_per_prompt} seeds, "
            f"{job.evaluate.sampling.steps} steps, guidance {scales}; training seeds {list(job.training_seeds)}"
        ),
    ]


def _words(arm: ArmConfig) -> str:
    own = ", own samples only" if arm.own_samples else ""
    return f"{to_markdown(arm.method)}, {arm.labels} labels{own}, {to_code(json.dumps(dict(arm.train)))}"


def die_with_parent() -> None:
    """End this process when the one that started it is gone, however it went: no training runs on unseen."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _run_all(job: LadderJob, todo: Sequence[tuple[str, int]]) -> list[str]:
    """Run all arms, `workers` at a time, with a bar; returns what failed and why."""
    failed = []
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(job.workers, mp_context=context, initializer=die_with_parent)
    with pool, tqdm(total=len(todo), unit="run") as bar:
        futures = {pool.submit(run_arm, job, name, seed): (name, seed) for name, seed in todo}
        try:
            for future in as_completed(futures):
                name, seed = futures[future]
                error = future.exception()
                if isinstance(error, KeyboardInterrupt):
                    raise error
                if error is not None:
                    log = job.folder(name, seed) / "log.txt"
                    failed.append(f"{name} seed {seed}: {type(error).__name__}: {error} ({log})")
                bar.set_postfix_str(f"{name}, seed {seed}")
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Train one generator in many ways on the same candidates, each with several seeds, and write a table."
    work = functools.partial(_work, argv)
    execute(Verb("ladder", summary, lambda *_: LadderJob, _plan, work, lambda job: job.out), argv)
