"""Names in a config become generators, rewards, judges and prompts.

A spec is a section of a config: frozen, and checked before any work. Its `identity` changes with the model's files, so
that a stage that is run again notices another model. Builders are partials of top-level functions, so they can be
pickled to another process, and nothing is loaded until one is called.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alignkit.adapters.mixture import acts_while_sampling, is_mixture
from alignkit.errors import ConfigError, UnknownNameError, nearest, require_at_least
from alignkit.escape import get_logger
from alignkit.generators import GENERATORS
from alignkit.generators.frames import require_known_frames
from alignkit.protocols import Judge, Reporting, require_independent
from alignkit.provenance import content
from alignkit.records import Prompt, Sampling
from alignkit.resolve import construct, require_known, resolve
from alignkit.shipped import SANDBOX, model_path, shipped_file
from data_pipelines.prompts import read_prompts, split_of
from rewards import JUDGES, REWARDS

if TYPE_CHECKING:
    from alignkit.generators.pipeline import PipelineGenerator
    from alignkit.protocols import ImageSource, Reward
    from alignkit.trainers.validation import Validation
    from data_pipelines.synpic import GenerateConfig

logger = get_logger(__name__)

WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorSpec:
    """A generator.

    model: a diffusers folder, a hub id, 'sandbox:NAME', or 'package.module:attribute' of your own builder.
    adapter: a LoRA folder to load on it, or the folder of a mixture (`alignkit soup`).
    encoder: a folder of tuned text encoders, used in the steps that its alignkit.json names.
    dtype: the precision of its weights.
    quantize: the network's frozen weights in int8 (torchao) or nf4 (bitsandbytes); text encoders and VAE keep `dtype`.
    compile: sample with torch.compile (slow first batch); not for mixtures of embeddings or predictions.
    family: 'package.module:attribute' of your own family, for a pipeline class that alignkit does not know.
    options: keywords for a builder of your own, or of the family (Wan 2.2: expert).
    """

    model: str
    adapter: Path | None = None
    encoder: Path | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["int8", "nf4"] | None = None
    compile: bool = False
    family: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = (self.adapter, self.encoder, self.dtype != "float32", self.quantize, self.compile, self.family)
        if self.is_own and any(given):
            raise ConfigError(
                f"model '{self.model}' is your own builder: its adapter, encoder, dtype, quantize, compile, family are "
                "options"
            )
        if self.family is not None:
            require_known(self.family, GENERATORS, kind="generator family")
        model_path(self.model)  # an unknown model of the sandbox stops here, before any work

    @property
    def is_own(self) -> bool:
        """Whether `model` names a builder rather than weights."""
        return ":" in self.model and not self.model.startswith(SANDBOX) and not Path(self.model).exists()

    @property
    def identity(self) -> str:
        """Changes with the weights of local folders, wherever they are; hub ids and builders' names are used as is.

        `compile` is no part of it, as the device is none: images differ by rounding.
        """
        changes = {"adapter": self.adapter, "encoder": self.encoder, "quantize": self.quantize, "family": self.family}
        changes |= self.options
        if self.dtype != "float32":
            changes["dtype"] = self.dtype
        loading = [f"{name}={content(value)}" for name, value in changes.items() if value]
        return " ".join([content(self.model), *loading])

    @property
    def absent(self) -> list[str]:
        """Local folders that are named but not there (a name with one slash may be a hub id)."""
        local = self.model.startswith((".", "/", "~")) or self.model.count("/") != 1
        named = [self.model] if local and not self.is_own else []
        named += [str(folder) for folder in (self.adapter, self.encoder) if folder]
        return [name for name in named if not Path(model_path(name)).exists()]

    def require_frames(self, frames: int | None, key: str) -> None:
        """ConfigError naming `key` where a local model of a known family does not make videos of `frames`.

        Nothing is loaded; a model that is not known here is asked once it is.
        """
        if frames is not None and not self.is_own and self.family is None:
            require_known_frames(frames, key, Path(model_path(self.model)), self.model)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSpec:
    """A reward.

    reward: a name in the table of rewards, or 'package.module:attribute' of your own.
    options: keywords for its constructor, such as the model folder.
    """

    reward: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_known(self.reward, REWARDS, kind="reward")

    @property
    def identity(self) -> str:
        """Changes with the options and with the files that they name, a composite's `state` among them."""
        return identity_of(self.reward, self.options)

    @property
    def absent(self) -> list[str]:
        """Files of weights that the options name and that are not there."""
        files = [leaf for leaf in _leaves(self.options) if Path(leaf).suffix in WEIGHT_FILES]
        return [file for file in files if not Path(file).exists()]


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeSpec:
    """A judge, which compares two media of one prompt.

    judge: a name in the table of judges, or 'package.module:attribute' of your own.
    options: keywords for its constructor (served: base_url, model, question; reward: reward and its options).
    """

    judge: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_known(self.judge, JUDGES, kind="judge")

    @property
    def identity(self) -> str:
        """Changes with the options and with the files that they name, a question's among them."""
        return identity_of(self.judge, self.options)


def tuned_spec(base: GeneratorSpec, result: Path) -> GeneratorSpec:
    """`base` with the result of its training: an adapter, tuned text encoders, or (with an index) another model."""
    if (result / "model_index.json").is_file():
        return replace(base, model=str(result), adapter=None, encoder=None)
    if is_mixture(result):
        return replace(base, encoder=result)
    return replace(base, adapter=result)


def identity_of(name: str, options: Mapping[str, Any]) -> str:
    """A name and its options, with the content of the files and folders that they name.

    `cache` is left out at every level: replies are added to it, but it does not change a score.
    """
    known = content(_without_caches(options))
    return " ".join([name, *(f"{option}={value}" for option, value in sorted(known.items()))])


def _without_caches(value: Any) -> Any:
    """Nested options without any named `cache`."""
    if isinstance(value, Mapping):
        return {name: _without_caches(inner) for name, inner in value.items() if name != "cache"}
    return [_without_caches(inner) for inner in value] if isinstance(value, list | tuple) else value


def _leaves(value: Any) -> Iterable[str]:
    """The texts in nested options, such as the model folders of a composite's members."""
    if isinstance(value, Mapping):
        return [leaf for inner in value.values() for leaf in _leaves(inner)]
    if isinstance(value, list | tuple):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return [str(value)]


def with_paths(value: Any) -> Any:
    """Nested options with `sandbox:NAME` as the folder that it stands for."""
    if isinstance(value, Mapping):
        return {name: with_paths(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [with_paths(inner) for inner in value]
    return model_path(value) if isinstance(value, str) else value


def identities(
    specs: Mapping[str, GeneratorSpec] | Mapping[str, RewardSpec] | Mapping[str, JudgeSpec],
) -> dict[str, str]:
    """What stands for each model's weights when a stage is run again."""
    return {name: spec.identity for name, spec in specs.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptsConfig:
    """Where prompts come from: a file, or a function of yours that makes them.

    file: .txt (one a line), .jsonl, .csv or .parquet; configs/prompts/general.jsonl and video.jsonl are shipped.
    column: the text's column in formats that have columns.
    source: 'package.module:attribute', called as source(count, **options), returning Prompt records.
    options: keywords for `source`.
    count: use only the first prompts, this many; needed with `source`.
    held_out: share of prompts kept apart from training for validation and evaluation, by a hash of the text.
    """

    file: Path | None = None
    column: str = "prompt"
    source: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    count: int | None = None
    held_out: float = 0.1

    def __post_init__(self) -> None:
        require_at_least(1, {"count": self.count})
        if (self.file is None) == (self.source is None):
            raise ConfigError("prompts: give either `file` or `source`")
        if self.source is not None and self.count is None:
            raise ConfigError(f"prompts: source '{self.source}' needs `count`")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"prompts: held_out is {self.held_out}; it must lie in [0, 1)")

    def __str__(self) -> str:
        """`400 prompts of file.txt`."""
        return f"{self.count or 'all'} prompts of {self.file or self.source}"

    def read(self) -> list[Prompt]:
        """All prompts, in order. Raises DataError naming file and row, UnknownNameError for an unknown source."""
        if self.source is not None:
            return list(resolve(self.source, {}, kind="prompt source")(self.count, **self.options))
        return read_prompts(shipped_file(self.file or Path()), column=self.column)[: self.count]

    def split(self) -> tuple[list[Prompt], list[Prompt]]:
        """Training and held-out prompts."""
        prompts = self.read()
        sides = {prompt.id: split_of(prompt.id, self.held_out) for prompt in prompts}
        return [p for p in prompts if sides[p.id] == "train"], [p for p in prompts if sides[p.id] != "train"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Media generated and scored during training, every `eval_steps`; the best checkpoint may be chosen by the scores.

    rewards: which rewards score; metrics are eval_reward/NAME, and eval_reward/mean for several.
    prompts: how many held-out prompts.
    seed: fixes the seeds of the media.
    """

    rewards: Sequence[str]
    prompts: int = 32
    seed: int = 0
    batch_size: int = 16
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        require_at_least(1, {"prompts": self.prompts, "batch_size": self.batch_size})

    def build(
        self, prompts: Sequence[Prompt], rewards: Mapping[str, RewardSpec], trained: Mapping[str, Reward]
    ) -> Validation:
        """Load the rewards that are not among the loaded `trained` ones, for the first held-out `prompts`.

        Raises ConfigError where there are no prompts.
        """
        from alignkit.trainers.validation import Validation

        if not prompts:
            raise ConfigError("validation has no held-out prompts; raise prompts.held_out or give more prompts")
        builders = RewardBuilders({name: rewards[name] for name in self.rewards})
        loaded = {name: trained[name] if name in trained else builder() for name, builder in builders.items()}
        require_independent(loaded)
        return Validation(prompts[: self.prompts], self.sampling, loaded, self.seed, self.batch_size)


def require_names(names: Sequence[str], known: Mapping[str, Any], *, kind: str, key: str) -> None:
    """UnknownNameError, with the nearest one, for a name in `key` that is not among those the config defines."""
    for name in names:
        if name not in known:
            raise UnknownNameError(f"{key}: no {kind} '{name}' under `{kind}s`.{nearest(name, known)}")


def require_sources(generate: GenerateConfig, generators: Mapping[str, GeneratorSpec]) -> None:
    """UnknownNameError for a source that is none of `generators`, ConfigError for frames that it does not make."""
    require_names([source.name for source in generate.sources], generators, kind="generator", key="generate.sources")
    for source in generate.sources:
        frames = source.sampling.num_frames
        generators[source.name].require_frames(frames, f"generate.sources, '{source.name}': num_frames")


def generator_builders(specs: Mapping[str, GeneratorSpec]) -> dict[str, Callable[[], ImageSource]]:
    """One builder a generator; calling it loads the model."""
    return {name: functools.partial(build_generator, name, spec) for name, spec in specs.items()}


def build_generator(name: str, spec: GeneratorSpec) -> Any:
    """Load a generator for sampling. Raises MissingFileError naming the files that a model folder lacks."""
    if spec.is_own:
        return resolve(spec.model, {}, kind="generator")(**spec.options)
    if spec.adapter is not None and acts_while_sampling(spec.adapter):
        if spec.compile:
            logger.warning("'%s' acts while it samples, so '%s' is sampled without `compile`", spec.adapter, name)
        load_mixture = resolve("alignkit.generators.mixtures:load_mixture", {}, kind="mixture")
        return load_mixture(load_policy(name, replace(spec, adapter=None)), spec.adapter, spec.family)
    generator = load_policy(name, spec)
    if not generator.is_quantized:
        generator.merge_adapter()
    if spec.compile:
        from alignkit.generators.compiling import compile_denoisers

        compile_denoisers(generator)
    return generator


def load_policy(name: str, spec: GeneratorSpec) -> PipelineGenerator:
    """Load a diffusers pipeline with its adapter."""
    import torch

    from alignkit.generators import load_generator

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return load_generator(
        spec.model,
        name=name,
        adapter=spec.adapter,
        encoder=spec.encoder,
        dtype=dtypes[spec.dtype],
        quantize=spec.quantize,
        family=spec.family,
        options=spec.options,
    )


class RewardBuilders(dict[str, "Callable[[], Reward]"]):
    """One builder a reward, by name; calling it loads the model.

    CLIP rewards of equal vision weights that are built here share one vision encoder.
    """

    def __init__(self, specs: Mapping[str, RewardSpec]) -> None:
        self.built: dict[str, Reward] = {}
        super().__init__({name: functools.partial(_build_beside, self.built, name, specs[name]) for name in specs})

    def reports(self) -> list[str]:
        """What served rewards have cost, a line each."""
        return [f"{name}: {reward.report()}" for name, reward in self.built.items() if isinstance(reward, Reporting)]


def _build_beside(built: dict[str, Reward], name: str, spec: RewardSpec) -> Reward:
    built[name] = build_reward(spec.reward, dict(spec.options))
    if "rewards.models.clip" in sys.modules:  # the import takes seconds; if it was not made, no reward uses CLIP
        from rewards.models.clip import share_vision

        share_vision(built.values())
    return built[name]


def build_reward(reward: str, options: Mapping[str, Any]) -> Any:
    """Construct a reward. Raises UnknownNameError for an unknown name, ConfigError for options that do not fit."""
    return construct(resolve(reward, REWARDS, kind="reward"), with_paths(options), what=f"reward '{reward}'")


def build_judge(judge: str, options: Mapping[str, Any]) -> Judge:
    """Construct a judge. Raises UnknownNameError for an unknown name, ConfigError for options that do not fit."""
    built = construct(resolve(judge, JUDGES, kind="judge"), with_paths(options), what=f"judge '{judge}'")
    if not isinstance(built, Judge):
        raise ConfigError(
            f"judge '{judge}' is a {type(built).__name__} without `compare`; see alignkit.protocols.Judge"
        )
    return built


def absences(
    generators: Mapping[str, GeneratorSpec],
    *,
    rewards: Mapping[str, RewardSpec] | None = None,
    prompts: PromptsConfig | None = None,
) -> list[str]:
    """Lines for a dry run about local files that are not there yet."""
    kinds: dict[str, Mapping[str, GeneratorSpec] | Mapping[str, RewardSpec]] = {"generator": generators}
    kinds["reward"] = rewards or {}
    lines = [
        f"NOT THERE YET: {path} ({kind} '{name}')"
        for kind, specs in kinds.items()
        for name, spec in specs.items()
        for path in spec.absent
    ]
    if prompts is not None and prompts.file is not None and not shipped_file(prompts.file).exists():
        lines.append(f"NOT THERE YET: {prompts.file} (prompts)")
    return lines
