"""`alignkit sandbox train NAME`: repeat the training of one model of the embedded sandbox, from its recipe.

Resumable: the same command continues. Deliberately not here: the recipes (`alignkit.sandbox`).
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.commands.verb import Verb, execute, finished, mark_finished
from alignkit.errors import ConfigError, MissingFileError, UnknownNameError, nearest
from alignkit.provenance import write_resolved

NEEDS = {
    "vae": (),
    "clip": (),
    "reader": (),
    "careful": ("reader",),
    "showy": ("reader",),
    "unet_first": ("vae",),
    "unet_second": ("unet_first",),
    "unet_third": ("unet_second",),
    "unet_clean": ("unet_third",),
    "unet": ("unet_clean",),
    "flow_clean": ("vae",),
    "flow": ("flow_clean",),
    "vlm": (),
    "vlm_corrections": ("vlm", "unet", "flow"),
    "film_vae": (),
    "film_clean": ("film_vae",),
    "film": ("film_clean",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxJob:
    """Train one model of the sandbox.

    name: vae; clip, the CLIP proxy; reader, which matches images and words; careful and showy, the
        preference heads; unet_first to unet_clean, four stages of a generator, and unet, which is made from
        it; flow_clean, a transformer with its text encoders, and flow, which is made from it; vlm, which answers
        questions about images and videos, and vlm_corrections, a LoRA on it from generated images; film_vae,
        film_clean and film, the same for the video generator.
    out: the folder that gets one sub-folder a model; the ones a recipe starts from must be there.
    work: checkpoints and logs, one sub-folder a model.
    """

    name: str
    out: Path = Path("runs/sandbox/models")
    work: Path = Path("runs/sandbox/work")

    def __post_init__(self) -> None:
        if self.name not in NEEDS:
            raise UnknownNameError(f"unknown sandbox model '{self.name}'.{nearest(self.name, NEEDS)}")


def _trainer(job: SandboxJob, result: Path) -> Callable[[], Any]:
    """The recipe of a model, ready to run."""
    from alignkit.sandbox import corrections, film, film_vae, flow, generators, interviews, recipes, vlm
    from rewards.models.patches import Patches
    from rewards.preference import PreferenceConfig, PreferenceModel

    work = job.work / job.name
    cut = Patches(**vlm.CUTTING)
    models = {name: job.out / name for name in NEEDS[job.name]}
    heads = (PreferenceModel, PreferenceConfig)
    recipe: dict[str, Callable[[], Any]] = {
        "vae": lambda: recipes.train_vae(result, work),
        "clip": lambda: recipes.train_clip(result, work),
        "reader": lambda: recipes.train_reader(*heads, result, work),
        "vlm": lambda: interviews.train_vlm(cut, result, work),
        "vlm_corrections": lambda: corrections.train_corrections(cut, models, result, work),
        "flow_clean": lambda: flow.train_flow(job.out, result, work),
        "film_vae": lambda: film_vae.train_vae(result, work),
        "film_clean": lambda: film.train_clean(job.out, result, work),
        "film": lambda: film.train_policy(job.out, result, work),
    }
    for name in recipes.HEADS:
        trained = (name, PreferenceModel, job.out / "reader", result, work)
        recipe[name] = functools.partial(recipes.train_head, *trained)
    return recipe.get(job.name) or functools.partial(generators.train_generator, job.name, job.out, result, work)


def _plan(job: SandboxJob) -> list[str]:
    needs = [f"NOT THERE YET: {job.out / name}" for name in NEEDS[job.name] if not (job.out / name).is_dir()]
    return [*needs, f"train {job.name} into {job.out / job.name}, checkpoints in {job.work / job.name}"]


def _work(job: SandboxJob) -> None:
    absent = [name for name in NEEDS[job.name] if not (job.out / name).is_dir()]
    if absent:
        first = f"alignkit sandbox train {absent[0]} --out {job.out}"
        raise MissingFileError(f"'{job.name}' starts from {absent}, not in '{job.out}'; first: {first}")
    target, work = job.out / job.name, job.work / job.name
    if target.exists():
        raise ConfigError(f"'{target}' is there already and stays as it is; choose another --out")
    write_resolved(work, job, free={"out"})
    result = work / "result"
    if finished(work) is None:
        shutil.rmtree(result, ignore_errors=True)  # half a save of an interrupted run; the checkpoints are beside it
        _trainer(job, result)()
        mark_finished(work, {})
    partial = target.with_name(f"{target.name}.partial")
    shutil.copytree(result, partial, dirs_exist_ok=True)
    partial.rename(target)
    print(f"result: {target}")


def main(argv: Sequence[str]) -> None:
    """The verb; the name may stand alone as the first word."""
    words = ["--name", *argv] if argv and not argv[0].startswith("-") else list(argv)
    summary = f"Repeat the training of one sandbox model: {', '.join(NEEDS)}."
    execute(Verb("sandbox train", summary, lambda *_: SandboxJob, _plan, _work, lambda job: job.work / job.name), words)
