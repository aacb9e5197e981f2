"""A loaded diffusers pipeline as a generator: conditioner, denoiser, codec, grid and step.

A family adds three things: how prompts become Conditioning, how its network is called, and its noise schedule.
`generate` always calls the vanilla pipeline; `alignkit.generators.rollout` repeats it with gradients. Video families
add a time axis (`alignkit.generators.families.video`).
"""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor, nn

from alignkit.adapters import comfyui, exports, lora, lora_files
from alignkit.adapters.fingerprint import base_of
from alignkit.diffusion.conversions import add_noise, target_of
from alignkit.diffusion.schedules import Schedule, expand
from alignkit.diffusion.solvers import Grid, ddim_step
from alignkit.errors import AdapterError, ConfigError, FlaggedError, nearest
from alignkit.generators.codec import Codec
from alignkit.generators.conditioner import Conditioner
from alignkit.generators.denoiser import Denoiser
from alignkit.generators.description import FamilyDescription
from alignkit.generators.frames import require_frames
from alignkit.generators.grids import scheduler_grid
from alignkit.generators.prompt_length import quiet, tokenizers_of, warn_of_cuts
from alignkit.generators.switching import sample
from alignkit.generators.table import origins
from alignkit.records import Conditioning, Sampling

# A denoiser or a module that wraps it, called as model(x_t, t, cond) -> prediction.
Predictor = Callable[[Tensor, Tensor, Conditioning], Tensor]


class PipelineGenerator(FamilyDescription, Codec):
    """Base of the families: codec, reference switch, sampling and adapters are the same for all of them.

    `model` is the denoiser, `conditioner` holds the text encoders, which are frozen until they are trained.
    """

    modality = "image"  # or "video": pixels are then [B, F, 3, H, W] and latents [B, C, T, H, W]
    guidance: float | None = None  # guidance scale passed to the network in training; None if it takes none
    unguided = 1.0  # the largest scale at which the pipeline leaves out the unconditional call
    unused_parts: tuple[str, ...] = ()  # components of the pipeline that are never loaded
    optional_parts: tuple[str, ...] = ("safety_checker", "feature_extractor", "image_encoder")  # may be missing
    component: str  # the pipeline's component that is trained: "unet" or "transformer"
    prediction: str  # native target, one of alignkit.diffusion.conversions.TARGETS
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    noise_schedule: Schedule
    _tokens: int = sys.maxsize  # the family's own limit of prompt tokens, if it has one

    def __init__(self, pipeline: Any, name: str) -> None:
        pipeline.set_progress_bar_config(disable=True)
        quiet(pipeline)
        self._has_warned_of_cuts = False
        self.pipeline, self.name = pipeline, name
        self.conditioner = Conditioner(self)
        self.model = Denoiser(self, pipeline.components[self.component])

    # --- what a family defines ---

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        """The network's own names and tensors [B, ...] for B prompts."""
        raise NotImplementedError

    def encode_negative(self, text: str) -> dict[str, Tensor]:
        """The same [1, ...] for a negative prompt; "" is the null condition."""
        return self.encode_texts([text])

    def call_network(self, net: nn.Module, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        """One call of the family's network: the native prediction in the canonical layout."""
        raise NotImplementedError

    def training_controls(self, t: Tensor) -> Mapping[str, Tensor]:  # noqa: ARG002 - for some families
        """The controls [B] of the network in training at times `t` [B]: guidance scale, target time."""
        return {}

    def sampling_arguments(self) -> dict[str, Any]:
        """Extra keywords of the pipeline call."""
        return {}

    def call_arguments(self, prompts: Sequence[str], sampling: Sampling) -> dict[str, Any]:
        """The keywords of the pipeline call except prompts, generators and output type."""
        arguments = {
            "num_inference_steps": sampling.steps,
            "guidance_scale": sampling.guidance_scale,
            "height": sampling.height,
            "width": sampling.width,
        }
        if sampling.negative_prompt:  # without one each pipeline has its own default, zeros for instance
            arguments["negative_prompt"] = [sampling.negative_prompt] * len(prompts)
        return {**arguments, **self.sampling_arguments(), **sampling.extra}

    def grid_arguments(self, steps: int, shape: Sequence[int]) -> dict[str, Any]:  # noqa: ARG002 - for some families
        """The arguments of the scheduler's `set_timesteps` for latents of `shape`."""
        return {"num_inference_steps": steps}

    def guide(self, cond_pred: Tensor, uncond_pred: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of a conditional and an unconditional prediction (Ho & Salimans 2022)."""
        return uncond_pred + scale * (cond_pred - uncond_pred)

    def text_window(self, tokenizer: Any) -> tuple[str, int]:
        """The prefix that the pipeline writes before a prompt, and its limit of tokens, prefix and special ones too."""
        return "", min(tokenizer.model_max_length, self._tokens)

    # --- the same for all ---

    def require_sampling(self, sampling: Sampling) -> None:
        """ConfigError for keywords that the pipeline's call lacks, sizes that it would change, and an empty window."""
        self.require_frames(sampling.num_frames, "sampling: num_frames")
        self.conditioner.require_steps(sampling.steps)
        reserved = ("self", "prompt", "generator", "output_type")
        known = [name for name in inspect.signature(type(self.pipeline).__call__).parameters if name not in reserved]
        for name in sampling.extra:
            if name not in known:
                kind = type(self.pipeline).__name__
                raise ConfigError(f"sampling.extra: '{name}' is no keyword of a {kind}.{nearest(name, known)}")
        multiple = self.pixel_multiple
        for name, side in (("height", sampling.height), ("width", sampling.width)):
            below = side - side % multiple
            if below != side:
                sides = " or ".join(str(size) for size in (below, below + multiple) if size)
                raise ConfigError(f"sampling: {name} is {side}; {self.name} takes multiples of {multiple}: {sides}")

    def require_frames(self, frames: int, key: str) -> None:
        """ConfigError naming `key` for a number of frames that the model does not make; see `generators.frames`."""
        require_frames(frames, key, self.name, modality=self.modality, step=self.frame_step)

    def warn_of_cuts(self, prompts: Sequence[str]) -> None:
        """Warn, once per generator, of prompts that are longer than its text encoders read."""
        if not self._has_warned_of_cuts:
            tokenizers = tokenizers_of(self.pipeline)
            self._has_warned_of_cuts = warn_of_cuts(tokenizers, self.text_window, self.name, prompts)

    @property
    def net(self) -> Any:
        """The diffusers network that is trained."""
        return self.model.net

    def put_net(self, net: nn.Module) -> None:
        """Replace the network."""
        self.model.net = net
        self.pipeline.register_modules(**{self.component: net})

    @property
    def is_quantized(self) -> bool:
        """Whether the network's frozen weights are quantised: they can neither be trained nor merged into."""
        return self.net.config.get("quantization_config") is not None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def text_device(self) -> torch.device:
        """Where the text encoders are; the network's device if there is none."""
        return next((parameter.device for parameter in self.conditioner.parameters()), self.device)

    @property
    def idle_parts(self) -> list[nn.Module]:
        """The components that a training on cached data does not call, so that they may leave the accelerator.

        These are the VAE and all else but denoisers (Wan 2.2 has two) and, if any text encoder is trained, the text
        encoders: encoding a prompt needs all of them.
        """
        encoders = self.conditioner.encoders.keys() if self.conditioner.trained else set()
        parts = {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}
        return [part for name, part in parts.items() if name not in encoders and type(part) is not type(self.net)]

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of B prompts on the network's device, differentiable to trained text encoders."""
        return self.conditioner(prompts).to(self.device)

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The native prediction, with the training values of controls that `cond` lacks.

        A trainer calls the (wrapped) `model` instead, with `training_controls` added.
        """
        return self.model(x_t, t, cond.with_controls({**self.training_controls(t), **cond.controls}))

    def sample_t(self, n: int, generator: torch.Generator) -> Tensor:
        """n training times [n] from the family's density."""
        return self.noise_schedule.sample_t(n, generator)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) noise."""
        alpha, sigma = (expand(value, x0) for value in self.noise_schedule.coefficients(t))
        return add_noise(x0, noise, alpha, sigma)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The native target of a prediction: eps, v, velocity or x0."""
        alpha, sigma = (expand(value, x0) for value in self.noise_schedule.coefficients(t))
        return target_of(self.prediction, x0, noise, alpha, sigma)

    # --- chains ---

    def grid(self, steps: int, shape: Sequence[int]) -> Grid:
        """The steps of the family's solver for latents of `shape` [C, ...]; see `generators.grids`."""
        return scheduler_grid(self.pipeline.scheduler, self.prediction, self.grid_arguments(steps, shape))

    def initial_noise(self, shape: Sequence[int], source: torch.Generator) -> Tensor:
        """Unit noise [1, *shape] in float32: the pipeline's own numbers for the same generator."""
        return torch.randn(1, *shape, generator=source)

    def guided(
        self,
        model: Predictor,
        x_t: Tensor,
        times: tuple[Tensor, Tensor],
        cond: Conditioning,
        scale: float,
        *,
        grad_unconditional: bool = True,
    ) -> Tensor:
        """The guided prediction for a step from times[0] to times[1], each [B].

        One call if `scale` is at most `unguided`; without `grad_unconditional` the unconditional one has no gradients.
        """
        cond_pred = model(x_t, times[0], cond)
        if scale <= self.unguided:
            return cond_pred
        with torch.set_grad_enabled(torch.is_grad_enabled() and grad_unconditional):
            uncond_pred = model(x_t, times[0], cond.unconditional())
        return self.guide(cond_pred, uncond_pred, scale)

    def step(self, grid: Grid, index: int, prediction: Tensor, x_t: Tensor, _: Sequence[torch.Generator]) -> Tensor:
        """x after step `index`; few-step families draw fresh noise [1, ...] from each row's generator."""
        return ddim_step(self.prediction, prediction, x_t, grid, index)

    @property
    def pixel_multiple(self) -> int:
        """The sides of an image are multiples of this: spatial ratio times the network's patch size."""
        patch = self.net.config.get("patch_size") or 1
        return self.spatial_ratio * (patch if isinstance(patch, int) else patch[-1])

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> Tensor:
        """The vanilla pipeline with one torch generator per item: pixels [B, 3, H, W] in [0, 1].

        A safety checker is off meanwhile. Raises FlaggedError where the pipeline replaced images nevertheless.
        """
        self.require_sampling(sampling)
        self.warn_of_cuts(prompts)
        modes = (self.conditioner.training, self.net.training)
        self.conditioner.eval()
        self.model.eval()
        sources = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        try:
            return self._run_pipeline(list(prompts), sources, self.call_arguments(prompts, sampling))
        finally:
            self.conditioner.train(modes[0])
            self.model.train(modes[1])

    def _run_pipeline(self, prompts: list[str], sources: list[torch.Generator], arguments: dict[str, Any]) -> Tensor:
        with self._without_safety_checker():
            output = sample(self.pipeline, self.conditioner, prompts, sources, arguments)
        flags = (isinstance(output, Mapping) and output.get("nsfw_content_detected")) or ()
        if named := [*itertools.compress(prompts, flags)]:
            message = (
                f"generator '{self.name}': its pipeline replaced {len(named)} of {len(prompts)} images as unsafe, so "
                f"they cannot be used; switch that check off, or leave out these prompts: {named}"
            )
            raise FlaggedError(message, pixels=output[0].float(), flags=flags)
        return output[0].float()

    @contextmanager
    def _without_safety_checker(self) -> Iterator[None]:
        """The pipeline of a user may have one; an image that it blacks out says nothing about the model."""
        checker = self.pipeline.components.get("safety_checker")
        if checker is None:
            yield
            return
        self.pipeline.register_modules(safety_checker=None)
        try:
            yield
        finally:
            self.pipeline.register_modules(safety_checker=checker)

    # --- adapters ---

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it network and text encoders are those of the frozen base model.

        It must not surround a checkpointed region that needs gradients; see `Denoiser.forward(reference=True)`. Raises
        AdapterError without a reference.
        """
        parts = [part for part in (self.model, self.conditioner) if part.has_reference]
        with ExitStack() as switches:
            for part in parts or [self.model]:
                switches.enter_context(part.as_reference())
            yield

    def add_lora(self, rank: int, alpha: float | None, targets: Sequence[str] | None, dropout: float) -> lora.Coverage:
        """Freeze the network and put a fresh LoRA on it; returns what the LoRA covers."""
        return lora.inject(self.net, rank=rank, alpha=alpha, targets=targets or self.lora_targets, dropout=dropout)

    @property
    def lora_loading(self) -> dict[str, Any]:
        """Keywords of the pipeline's `load_lora_weights` beside the folder."""
        return {}

    @property
    def adapter_prefix(self) -> str:
        """The prefix of the trained network's weights in diffusers' LoRA files."""
        return self.component

    def add_text_lora(self, rank: int, alpha: float | None, targets: Sequence[str] | None, dropout: float) -> None:
        """Put a fresh LoRA on `lora_encoders`, which are then trained with the network; see `Conditioner.add_lora`.

        Raises AdapterError if the pipeline's own LoRA loader knows no text encoder.
        """
        if not self.lora_encoders:
            kind = type(self.pipeline).__name__
            raise AdapterError(f"the LoRA loader of a {kind} knows no text encoder; train the network alone")
        self.conditioner.add_lora(rank, alpha, targets, dropout, list(self.lora_encoders))
        self._update_trained_encoders()

    @property
    def lora_encoders(self) -> dict[str, Any]:
        """The text encoders that the pipeline's own LoRA loader knows, by component name."""
        names = self.pipeline._lora_loadable_modules if isinstance(self.pipeline, LoraBaseMixin) else []  # noqa: SLF001
        return {name: self.conditioner.encoders[name] for name in names if name in self.conditioner.encoders}

    @property
    def adapted(self) -> dict[str, Any]:
        """The network and the text encoders that carry an adapter, by component name."""
        parts = {self.component: self.net, **self.lora_encoders, **self.conditioner.encoders}
        return {name: part for name, part in parts.items() if lora.lora_layers(part)}

    def _update_trained_encoders(self) -> None:
        encoders = {name: part for name, part in self.adapted.items() if name != self.component}
        self.model.trained_encoders = nn.ModuleDict(encoders)

    def load_adapter(self, folder: Path, name: str = lora.NAME, *, trainable: bool = True) -> None:
        """Load a LoRA file or folder of `save_adapter`, diffusers, PEFT or kohya as `name`, active with weight 1."""
        parts = {self.adapter_prefix: self.net, **self.lora_encoders}
        lora_files.load(Path(folder), parts, self.adapter_prefix, origins, name=name, trainable=trainable)
        self._update_trained_encoders()

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        """Make exactly these adapters active, each times its weight; {} switches all off."""
        lora.activate(self.model, weights)

    def save_adapter(self, folder: Path, name: str = lora.NAME) -> None:
        """diffusers' layout in `folder`, PEFT's in `folder/peft`, ComfyUI's in `folder/comfyui` if it has the keys."""
        folder, prefix = Path(folder), self.adapter_prefix
        lora.require_adapter(self.model, name)
        parts = {part: net for part, net in self.adapted.items() if name in lora.adapter_names(net)}
        unreadable = sorted(set(parts) - {self.component} - set(self.lora_encoders))
        if unreadable:
            raise AdapterError(
                f"the LoRA loader of a {type(self.pipeline).__name__} does not read an adapter of {unreadable}; save "
                "the text encoders with `generator.conditioner.save(folder)`"
            )
        files = {prefix if part == self.component else part: net for part, net in parts.items()}
        bases = {part: base_of(net) for part, net in files.items()}
        exports.export_diffusers(files, folder, name=name, bases=bases)
        for part, net in files.items():
            place, base = folder / "peft" / ("" if part == prefix else part), str(self.pipeline.name_or_path)
            exports.export_peft(net, place, base_model=base, name=name, base=bases[part])
        file = folder / "comfyui" / f"{Path(self.name).name}.safetensors"
        comfyui.export(parts, file, {self.component: self.comfyui}, adapter=name, bases=bases)

    def merge_adapter(self) -> None:
        """Fold the active adapters into the weights for good: sampling then costs what the base model costs."""
        self._require_all_bits()
        for part in self.adapted.values():
            lora.merge(part)
        self._update_trained_encoders()

    def _require_all_bits(self) -> None:
        if self.is_quantized:
            raise AdapterError(
                f"'{self.name}' is quantised, so nothing can be merged into it: load the model without quantize, with "
                "the saved adapter, and merge there"
            )

    def save_merged(self, folder: Path) -> None:
        """A plain pipeline folder with the adapter folded into the weights; this generator keeps its adapter."""
        self._require_all_bits()
        adapted = self.adapted
        merged = copy.deepcopy(adapted)
        for part in merged.values():
            lora.merge(part)
        self.pipeline.register_modules(**merged)
        try:
            self.pipeline.save_pretrained(folder)
        finally:
            self.pipeline.register_modules(**adapted)
