"""`alignkit ladder`: one set of prompts, many ways of learning from it, one table.

    DATA/candidates  scores  ranked     Syn-Pic, made once, where an arm trains on ranked candidates
    DATA/aspects                        questions, where an arm trains on those
    DATA/pairs  labels                  pairs of clips and their labels, where an arm trains on those
    DATA/base  cache                    the base side, latents and reference errors, shared by all arms
    DATA/arms/NAME/aspects pairs labels data of an arm that has a writer, pairs or labels of its own
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
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alignkit.claims import claim, claimed, holds_results
from alignkit.commands.data import SynPicJob
from alignkit.commands.ladder_job import ArmConfig, LadderJob
from alignkit.commands.methods import config_class, unchecked_methods
from alignkit.commands.specs import absences, tuned_spec
from alignkit.commands.stages import compare, fit
from alignkit.commands.trainer_keys import require_guard, trained_frames, trained_rewards
from alignkit.commands.training_data import PromptShares, TrainingData
from alignkit.commands.verb import Verb, execute
from alignkit.config import init_fields, load
from alignkit.errors import AlignKitError, ConfigError
from alignkit.escape import to_code, to_markdown
from alignkit.evaluation.ladder import ArmResult, mean_minutes, read_arm, table, write_cost
from alignkit.locks import locked
from alignkit.provenance import new_keys, plain, write_resolved
from alignkit.storage import write_text


def _arguments(job: LadderJob, name: str, seed: int) -> Any:
    """The trainer's config of one run.

    Raises ConfigError for a key that the method's trainer has not, and for what the ladder lacks.
    """
    method = job.arms[name].method
    job.data_job(name)
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
        job.check_judges("reward_weights", trained_rewards(args))
        require_guard(args, job.validation)
    except ConfigError as error:
        raise ConfigError(f"arms.{name}: {error}") from error
    return args


def run_arm(job: LadderJob, shares: PromptShares, data: TrainingData, name: str, seed: int) -> str:
    """Train one arm with one seed and evaluate it, in a process of its own; returns its label."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.workers))
    folder, arm = job.folder(name, seed), job.arms[name]
    folder.mkdir(parents=True, exist_ok=True)
    args = _arguments(job, name, seed)
    with (
        (folder / "log.txt").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        locked(folder),
    ):
        validation = None
        if job.validation is not None:
            validation = functools.partial(job.validation.build, shares.validation, job.rewards)
        # A training that was begun before, or by a version that recorded no cost, has a cost that is not known.
        started, is_new = time.process_time(), not claimed(folder)
        result = fit(
            arm.method,
            (job.policy, job.aligned),
            args,
            data,
            validation=validation,
            select=functools.partial(_rows, job=job, arm=arm, seed=seed),
            sampling=job.evaluate.sampling,
            rewards={key: job.rewards[key] for key in trained_rewards(args)},
        )
        if is_new:
            write_cost(job.cost(name, seed), time.process_time() - started)
        sides = {"base": job.aligned, "tuned": tuned_spec(job.aligned, result)}
        prompts, judges = job.judged(shares), {"rewards": job.rewards, "gold": job.gold}
        for scale, config in job.comparisons.items():
            out = job.evaluation(name, seed, scale)
            compare(sides, prompts, config, out, base_cache=job.shared / "base", **judges)
    return f"{name}, seed {seed}"


def _rows(rows: Any, *, job: LadderJob, arm: ArmConfig, seed: int) -> Any:
    """The training rows as the arm sees them."""
    from data_pipelines.ablations import first_share, own_candidates, ranked_by, shuffled_labels, shuffled_segments

    if arm.ranked_by:
        rows = ranked_by(rows, arm.ranked_by, job.rank.temperature)
    if arm.own_samples:
        rows = own_candidates(rows, job.policy)
    if arm.share < 1:
        rows = first_share(rows, arm.share)
    if arm.labels == "ranked":
        return rows
    return shuffled_labels(rows, seed) if "phi" in rows.column_names else shuffled_segments(rows, seed)


def _plan(job: LadderJob) -> list[str]:
    runs = len(job.arms) * len(job.training_seeds)
    unchecked = unchecked_methods(arm.method for arm in job.arms.values())
    for name in [] if unchecked else job.arms:  # which keys all arms share depends on every method
        _arguments(job, name, job.training_seeds[0])
    data = [] if unchecked else [line for name in job.arms for line in job.data_job(name).data_plan()]
    return [
        *absences(job.generators, rewards=job.rewards, prompts=job.prompts),
        *unchecked,
        *dict.fromkeys(data),
        f"train and evaluate {len(job.arms)} arms x {len(job.training_seeds)} seeds = {runs} runs, by {job.workers}",
        *(f"arm {name}: {arm.method}, {dict(arm.train)}" for name, arm in job.arms.items()),
        f"write the table to {job.table}",
    ]


def _work(argv: Sequence[str], job: LadderJob) -> None:
    for name in job.arms:
        _arguments(job, name, job.training_seeds[0])  # a wrong key stops here, not in the last arm
    # `data` is a place, and what is in it has records of its own; so has each arm.
    free = {"title", "workers", "data", "arms", "training_seeds", "contrasts"}
    if not holds_results(job.out / "arms"):
        free |= {*init_fields(LadderJob)} - {*init_fields(SynPicJob)}
    write_resolved(job.out, job, free)
    for name, arm in job.arms.items():
        folder = job.out / "arms" / name
        new = {*new_keys(claimed(folder).get("arm", {}), arm, "arm")}
        claim(folder, {"arm": plain(arm), "train": plain(job.train)}, free=new)
    prepared, data = _make_data(job)
    runs = [(name, seed) for seed in job.training_seeds for name in job.arms]
    failed = _run_all(job, prepared, data, runs)
    evaluations = {f"Guidance {scale:g}": _results(job, scale) for scale in job.comparisons}
    page = table(evaluations, title=job.title, settings=_settings(job, data, argv), contrasts=job.contrasts)
    write_text(job.table, page)
    print(f"\n{page}\ntable: {job.table}")
    if failed:
        raise AlignKitError(f"{len(failed)} runs failed: {'; '.join(failed)}. The rest is kept: give the command again")


def _make_data(job: LadderJob) -> tuple[PromptShares, dict[str, TrainingData]]:
    """The prompts with what rewards read beside the text, and each arm's training data; arms share what is equal.

    The CPU seconds of new data are recorded. Those of data that were begun before are not known.
    """
    shares, made, data = job.shares, dict[tuple[type, Path], TrainingData](), dict[str, TrainingData]()
    prepared = shares
    jobs = {name: job.data_job(name) for name in job.arms}
    is_new = {own.out: not holds_results(own.out) for own in jobs.values()}
    for name, own in jobs.items():
        key = type(own), own.out
        if key not in made:
            started = time.process_time()
            made[key] = own.make_data(shares)
            if is_new[own.out]:
                write_cost(job.data_cost(name), time.process_time() - started)
        data[name] = made[key]
    for name in {type(own): name for name, own in jobs.items()}.values():
        prepared = job.data_job(name, is_own=False).prepared(prepared)
    return prepared, data


def _results(job: LadderJob, scale: float) -> list[ArmResult]:
    """The arms of which a run has been evaluated at this guidance scale."""
    arms = []
    for name in job.arms:
        seeds = job.training_seeds
        costs = [job.cost(name, seed) for seed in seeds]
        arm = read_arm(name, [job.evaluation(name, seed, scale) for seed in seeds], costs)
        arms += [] if arm is None else [arm]
    return arms


def _settings(job: LadderJob, data: Mapping[str, TrainingData], argv: Sequence[str]) -> list[str]:
    """The lines above the table: the command, and what every number depends on."""
    scales = " and ".join(f"{scale:g}" for scale in job.comparisons)
    judged = len(job.judged(job.shares))
    candidates = []
    if job.generate is not None and job.score is not None:
        drawn = "; ".join(
            f"{s.name} x {s.seeds_per_prompt} at guidance {s.sampling.guidance_scale:g}" for s in job.generate.sources
        )
        candidates = [to_markdown(f"candidates: {drawn}; ranked by {', '.join(job.score.rewards)}")]
    return [
        f"command: {to_code(shlex.join(['alignkit', 'ladder', *argv]))}",
        *candidates,
        f"training, all arms: {to_code(json.dumps(dict(job.train)))}",
        *(
            f"arm {to_markdown(name)}: {_words(arm)}, {len(data[name].train())} rows{_data_minutes(job, name)}"
            for name, arm in job.arms.items()
        ),
        (
            f"evaluation: {judged} held-out prompts x {job.evaluate.seeds_per_prompt} seeds, "
            f"{job.evaluate.sampling.steps} steps, guidance {scales}; training seeds {list(job.training_seeds)}"
        ),
    ]


def _data_minutes(job: LadderJob, name: str) -> str:
    minutes = mean_minutes([job.data_cost(name)])
    return "" if minutes is None else f" made in {minutes:.1f} CPU min"


def _words(arm: ArmConfig) -> str:
    parts = [to_markdown(arm.method)]
    parts += ["random labels"] if arm.labels == "random" else []
    parts += ["own samples only"] if arm.own_samples else []
    parts += [f"ranked by {to_markdown(', '.join(arm.ranked_by))}"] if arm.ranked_by else []
    parts += [f"{arm.share:.0%} of the rows"] if arm.share < 1 else []
    parts += [f"questions: {to_code(json.dumps(dict(arm.writer.options)))}"] if arm.writer else []
    parts += [f"pairs: {to_code(json.dumps(dict(arm.pairs)))}"] if arm.pairs else []
    parts += [f"labels by {to_markdown(', '.join(arm.label.voters))}"] if arm.label else []
    return ", ".join([*parts, to_code(json.dumps(dict(arm.train)))])


def die_with_parent() -> None:
    """End this process when the one that started it is gone, however it went: no training runs on unseen."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _run_all(
    job: LadderJob, shares: PromptShares, data: Mapping[str, TrainingData], todo: Sequence[tuple[str, int]]
) -> list[str]:
    """Run all arms, `workers` at a time, with a bar; returns what failed and why."""
    failed = []
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(job.workers, mp_context=context, initializer=die_with_parent)
    with pool, tqdm(total=len(todo), unit="run") as bar:
        futures = {pool.submit(run_arm, job, shares, data[name], name, seed): (name, seed) for name, seed in todo}
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
