"""`alignkit aspects`: yes/no questions about prompts; `--show` prints some, with a critic's answers on an image."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.aspects import QuestionWriter
from alignkit.commands.specs import GeneratorSpec, PromptsConfig, RewardSpec, absences, build_generator, build_reward
from alignkit.commands.verb import Verb, counts_line, execute
from alignkit.commands.writers import WriterSpec
from alignkit.errors import ConfigError, require_at_least
from alignkit.media import decode_image, encode_medium, quantise, to_pixels
from alignkit.protocols import Reporting, Reward, as_scores
from alignkit.provenance import write_config
from alignkit.records import Prompt, Sampling
from alignkit.seeds import derive_seed
from alignkit.storage import recorded_parts, write_atomic
from data_pipelines.aspects import AspectsConfig, checked_drafts, first_rows, write_aspects

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewConfig:
    """What `--show` prints with the questions.

    prompts: number of prompts, from the first.
    critic: a reward that answers the questions of a prompt, such as yes_no; none: the questions alone.
    generator: what makes the image of a prompt.
    image: one file for all prompts, instead of a generator.
    """

    prompts: int = 3
    critic: RewardSpec | None = None
    generator: GeneratorSpec | None = None
    image: Path | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(1, {"prompts": self.prompts})
        if self.critic is not None and (self.generator is None) == (self.image is None):
            raise ConfigError("preview: the critic needs an image: give either `generator` or `image`")


@dataclass(frozen=True, kw_only=True, slots=True)
class AspectsJob:
    """Write questions about prompts.

    prompts: where the prompts come from.
    writer: what writes the questions.
    aspects: which questions are written, and how.
    out: the folder of the questions; run again, it continues.
    show: print the questions of the first prompts with the critic's answers, and write none; images go to OUT_show.
    """

    prompts: PromptsConfig
    writer: WriterSpec = field(default_factory=WriterSpec)
    aspects: AspectsConfig = field(default_factory=AspectsConfig)
    out: Path
    show: bool = False
    preview: PreviewConfig = field(default_factory=PreviewConfig)


def _plan(job: AspectsJob) -> list[str]:
    preview, kinds = job.preview, ", ".join(job.aspects.aspects)
    generators = {"preview": preview.generator} if preview.generator else {}
    critics = {"preview": preview.critic} if preview.critic else {}
    missing = absences(generators if job.show else {}, rewards=critics if job.show else {}, prompts=job.prompts)
    what = f"print the questions ({kinds}) of {preview.prompts} prompts" if job.show else f"write questions ({kinds})"
    where = f" into {job.out}"
    if job.show:
        where = f"; images go to {job.out}_show" if preview.critic and preview.generator else ""
    return [
        *missing,
        *job.writer.absent,
        f"{what} of {job.prompts} with the writer '{job.writer.writer}'{where}",
    ]


def _work(job: AspectsJob) -> None:
    prompts, build = job.prompts.read(), functools.cache(job.writer.builder())
    if job.show:
        _show(job, prompts, build)
    else:
        result = write_aspects(prompts, job.aspects, job.out, build_writer=build, identity=job.writer.identity)
        write_config(job.out, job)
        print(f"{result.rows} prompts with questions in {result.folder}: {counts_line(result.counts)}")
    if build.cache_info().currsize and isinstance(writer := build(), Reporting):
        print(f"{job.writer.writer}: {writer.report()}")


# --- --show ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shown:
    """A prompt with its questions, or with what is wrong with those that were written."""

    prompt: Prompt
    questions: Sequence[Mapping[str, Any]]
    problems: Sequence[str] = ()


def _show(job: AspectsJob, prompts: Sequence[Prompt], build: Callable[[], QuestionWriter]) -> None:
    """Print the questions of a finished stage, or ask the writer for those of the first prompts."""
    count = job.preview.prompts
    if (job.out / "manifest.json").is_file():
        from alignkit.trainers.data import PromptData

        rows = first_rows(job.out, recorded_parts(job.out, "aspects")[1], count)
        stored = [replace(prompt, id=prompt.metadata["prompt_id"]) for prompt in PromptData(rows, 0).prompts]
        shown = [_Shown(prompt, prompt.metadata["questions"]) for prompt in stored]
    else:
        results = checked_drafts(prompts[:count], job.aspects, build())
        shown = [
            _Shown(prompt, list(map(asdict, result.draft.questions)), result.problems)
            for prompt, result in zip(prompts, results, strict=False)
        ]
    preview = job.preview
    critic = build_reward(preview.critic.reward, dict(preview.critic.options)) if preview.critic else None
    images: Sequence[Tensor | None] = [None] * len(shown)
    if critic:
        images = _images(preview, [one.prompt for one in shown], job.out.with_name(f"{job.out.name}_show"))
    for one, image in zip(shown, images, strict=True):
        print(f"\nprompt: {one.prompt.text}")
        print("\n".join([*(f"  not usable: {problem}" for problem in one.problems), *_answered(one, image, critic)]))


def _images(preview: PreviewConfig, prompts: Sequence[Prompt], folder: Path) -> list[Tensor]:
    """One image [3, H, W] or video [F, 3, H, W] a prompt; what a generator makes is stored in `folder`."""
    if preview.image is not None:
        image = to_pixels(decode_image(preview.image, f"'{preview.image}' (preview.image)"))
        return [image] * len(prompts)
    if preview.generator is None:
        return []
    generator = build_generator("preview", preview.generator)
    seeds = [derive_seed(preview.seed, prompt.id) for prompt in prompts]
    media = generator.generate([prompt.text for prompt in prompts], seeds, preview.sampling)
    for prompt, medium in zip(prompts, media, strict=True):
        name = f"{prompt.id}.{'png' if medium.dim() == 3 else 'mkv'}"
        write_atomic(folder / name, encode_medium(quantise(medium), preview.sampling.fps))
        print(f"'{prompt.text}': {folder / name}")
    return list(media)


def _answered(one: _Shown, image: Tensor | None, critic: Reward | None) -> list[str]:
    """A line a question: the critic's probability of the good answer, the weight, the aspect and the text."""
    lines, parts = [], {}
    if image is not None and critic is not None and not one.problems:
        import torch

        prompt = replace(one.prompt, metadata={**one.prompt.metadata, "questions": one.questions})
        with torch.no_grad():
            scores = as_scores(critic(image[None], [prompt]), "critic", 1)
        parts = {name: math.exp(value.item()) for name, value in scores.parts.items()}
        lines.append(f"  total {scores.total.item():.3f}; for each question P(good answer), weight, aspect:")
    for question in one.questions:
        answer = f"{parts[question['name']]:.2f}" if question["name"] in parts else "   -"
        texts = [question["text"]] if question["text"] else []
        texts += [f"(no is good) {question['negated']}"] if question["negated"] else []
        lines.append(f"  {answer}  {question['weight']:5.2f}  {question['aspect']:<10} {'  '.join(texts)}")
    return lines


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Write yes/no questions about prompts for a critic; run again, it continues. --show prints some of them."
    execute(Verb("aspects", summary, lambda *_: AspectsJob, _plan, _work, lambda job: job.out), argv)
