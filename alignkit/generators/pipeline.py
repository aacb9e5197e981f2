"""A loaded diffusers pipeline behind the seam of `alignkit.protocols.Generator`.

A family adds three things: how prompts become Conditioning, how its network is called, and its schedule. Sampling is
always the vanilla pipeline's; `alignkit.generators.rollout` repeats it with gradients. Video families add a time axis
(`alignkit.generators.families.video`).
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor, nn

from alignkit.adapters import comfyui, exports, lora, lora_files
from alignkit.adapters.fingerprint import base_of
from alignkit.diffusion import solvers
from alignkit.diffusion.conversions import add_noise, target_of
from alignkit.diffusion.schedules import Schedule, expand
from alignkit.diffusion.solvers import Grid, ddim_step
from alignkit.errors import AdapterError
from alignkit.generators import prompt_length
from alignkit.generators.description import FamilyDescription
from alignkit.generators.table import origins
from alignkit.records import Conditioning, Sampling

CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Denoiser(nn.Module):
    """The one module that is trained; its forward is `predict`, so DDP, FSDP and autocast wrap what is called."""

    def __init__(self, family: PipelineGenerator, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.towers = nn.ModuleDict()  # the text encoders that carry an adapter, by the pipeline's name for them
        # In tuples: neither the family nor a frozen copy may show up among this module's parameters.
        self._family = (family,)
        self._frozen: tuple[nn.Module, ...] = ()
        self._use_reference = False

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The native prediction for latents x_t [B, C, H, W] or [B, C, T, H, W] at canonical times t [B]."""
        net = self._frozen[0] if self._use_reference and self._frozen else self.net
        family = self._family[0]
        if cond.captions is not None and self.towers and not self._use_reference:
            with torch.autocast(x_t.device.type, enabled=False):  # as the reference's texts were encoded
                told = family.encode_prompts(cond.captions.texts).drop(cond.captions.dropped)
            cond = replace(cond, tensors={**cond.tensors, **told.repeat(len(x_t) // len(told)).tensors})
        # Cached latents and conditioning are float32, whatever precision the network was loaded in. Times and scales
        # [B] stay so, as those of the pipelines do.
        cond = cond.map(
            lambda tensor: tensor.to(net.dtype) if tensor.is_floating_point() and tensor.dim() > 1 else tensor
        )
        return family.call(net, x_t.to(net.dtype), family.noise_schedule.model_time(t), cond)

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes that FSDP shards one by one by default: those that diffusers names and the network has."""
        present = {type(module).__name__ for module in self.net.modules()}
        return sorted(present & set(self.net._no_split_modules or ()))  # noqa: SLF001 - what accelerate reads as well

    def freeze_copy(self) -> None:
        """Keep the present weights as the reference (full fine-tuning)."""
        self._frozen = (copy.deepcopy(self.net).requires_grad_(False).eval(),)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within it, forward is the frozen base model: a frozen copy, else adapters off, also in the text encoders."""
        layers = lora.lora_layers(self)
        if not self._frozen and not layers:
            raise AdapterError("no reference: the model has neither an adapter nor a frozen copy")
        self._use_reference = True
        try:
            with lora.disabled(layers):
                yield
        finally:
            self._use_reference = False

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """Called by Trainer when `activation_checkpointing` is true; diffusers checkpoints its own blocks."""
        self.net.enable_gradient_checkpointing()


class PipelineGenerator(FamilyDescription):
    """Base of the families: codec, reference switch, sampling and adapters are the same for all of them."""

    modality = "image"  # or "video": pixels are then [B, F, 3, H, W] and latents [B, C, T, H, W]
    guidance: float | None = None  # the scale that the network is told in training, where it is told one
    unguided = 1.0  # the largest scale at which the pipeline leaves the unconditional call out
    unused_parts: tuple[str, ...] = ()  # of the pipeline, never loaded
    component: str  # attribute of the pipeline that is trained: "unet" or "transformer"
    prediction: str  # native target, one of alignkit.diffusion.conversions.TARGETS
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    noise_schedule: Schedule
    _tokens: int = sys.maxsize  # of a prompt that the family keeps, where it has a limit of its own

    def __init__(self, pipeline: Any, name: str) -> None:
        pipeline.set_progress_bar_config(disable=True)
        prompt_length.quiet(pipeline)
        self._is_told_of_cuts = self._overflows = False
        self.pipeline, self.name = pipeline, name
        self.model = Denoiser(self, pipeline.components[self.component])

    # --- what a family defines ---

    def texts(self, prompts: list[str]) -> dict[str, Tensor]:
        """The network's own names and tensors [B, ...] for B prompts."""
        raise NotImplementedError

    def negative(self, text: str) -> dict[str, Tensor]:
        """The same [1, ...] for a negative prompt; "" is the null condition. Some families word it otherwise."""
        return self.texts([text])

    def call(self, net: nn.Module, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        """One call of the family's network."""
        raise NotImplementedError

    def sampling_arguments(self) -> dict[str, Any]:
        """Extra keywords of the pipeline call."""
        return {}

    def call_arguments(self, prompts: Sequence[str], sampling: Sampling) -> dict[str, Any]:
        """The pipeline call's keywords but for prompts, generators and the kind of output."""
        arguments = {
            "num_inference_steps": sampling.steps,
            "guidance_scale": sampling.guidance_scale,
            "height": sampling.height,
            "width": sampling.width,
        }
        if sampling.negative_prompt:  # without one each pipeline has its own habit, zeros for instance
            arguments["negative_prompt"] = [sampling.negative_prompt] * len(prompts)
        return {**arguments, **self.sampling_arguments(), **sampling.extra}

    def grid_arguments(self, steps: int, shape: Sequence[int]) -> dict[str, Any]:  # noqa: ARG002 - for some families
        """What the pipeline gives its scheduler's `set_timesteps` for latents of `shape`."""
        return {"num_inference_steps": steps}

    def combine(self, told: Tensor, free: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of a conditional and an unconditional prediction (Ho & Salimans 2022)."""
        return free + scale * (told - free)

    def text_window(self, tokenizer: Any) -> tuple[str, int]:
        """What the pipeline writes before a prompt, and how many tokens of both, special ones included, it keeps."""
        return "", min(tokenizer.model_max_length, self._tokens)

    # --- the same for all ---

    def warn_of_cuts(self, prompts: Sequence[str]) -> None:
        """Warn, once in this generator's life, of prompts that are longer than its text encoders read."""
        if not self._is_told_of_cuts:
            tokenizers = prompt_length.tokenizers_of(self.pipeline)
            self._is_told_of_cuts = prompt_length.warn_of_cuts(tokenizers, self.text_window, self.name, prompts)

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
        """Whether the network's frozen weights are in fewer bits: they can neither be trained nor merged into."""
        return self.net.config.get("quantization_config") is not None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of B prompts."""
        return Conditioning(self.texts(list(prompts)), self.negative(""))

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The native prediction; a trainer calls the (wrapped) `model` instead."""
        return self.model(x_t, t, cond)

    def sample_t(self, n: int, generator: torch.Generator) -> Tensor:
        return self.noise_schedule.sample_t(n, generator)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (expand(value, x0) for value in self.noise_schedule.coefficients(t))
        return add_noise(x0, noise, alpha, sigma)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (expand(value, x0) for value in self.noise_schedule.coefficients(t))
        return target_of(self.prediction, x0, noise, alpha, sigma)

    # --- chains with gradients ---

    def grid(self, steps: int, shape: Sequence[int]) -> Grid:
        """Where the family's solver stands for latents of `shape` [C, ...]; see `solvers.grid`."""
        return solvers.grid(self.pipeline.scheduler, self.prediction, self.grid_arguments(steps, shape))

    def initial_noise(self, shape: Sequence[int], source: torch.Generator) -> Tensor:
        """Unit noise [1, *shape] as the pipeline draws it: the same numbers for the same generator."""
        return torch.randn(1, *shape, generator=source)

    def guided(
        self, model: nn.Module, x_t: Tensor, times: tuple[Tensor, Tensor], cond: Conditioning, scale: float
    ) -> Tensor:
        """The guided prediction for a step from times[0] to times[1], each [B]; up to `unguided` one call."""
        told = model(x_t, times[0], cond)
        return told if scale <= self.unguided else self.combine(told, model(x_t, times[0], cond.unconditional()), scale)

    def advance(self, grid: Grid, index: int, prediction: Tensor, x_t: Tensor, _: Sequence[torch.Generator]) -> Tensor:
        """x after step `index`; few-step families draw fresh noise [1, ...] from each row's generator."""
        return ddim_step(self.prediction, prediction, x_t, grid, index)

    # --- codec ---

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of pixels [B, 3, H, W] in [0, 1], float32, as the network expects them."""
        return self._normalised(self._in_range(self._posterior_mode, pixels * 2 - 1)).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [0, 1] of latents."""
        pixels = self._in_range(self._decode, self._denormalised(latents))
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def _normalised(self, raw: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        return (raw - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def _denormalised(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def _decode(self, raw: Tensor) -> Tensor:
        return self.pipeline.vae.decode(raw).sample

    def _posterior_mode(self, pixels: Tensor) -> Tensor:
        return self.pipeline.vae.encode(pixels).latent_dist.mode()

    def _in_range(self, coder: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        """What `coder` makes of `given`; once a VAE has overflowed in fp16 (SDXL's does) it codes in float32.

        Between calls it stays in fp16: the pipeline has its own way of decoding what it samples.
        """
        vae = self.pipeline.vae
        if not self._overflows:
            result = coder(given.to(vae.dtype))
            if vae.dtype != torch.float16 or result.isfinite().all():
                return result
            warnings.warn(f"the VAE of '{self.name}' overflows in float16; it codes in float32 now", stacklevel=3)
            self._overflows = True
        vae.float()
        try:
            return coder(given.float())
        finally:
            vae.half()

    @property
    def spatial_ratio(self) -> int:
        """Pixels a side of one latent place."""
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    @property
    def temporal_ratio(self) -> int:
        """r, the frames of one latent frame: clips have 1 + r k frames; 1 for pictures."""
        return 1

    @property
    def pixel_multiple(self) -> int:
        """Pixels that the sides of a picture are multiples of: a latent place times the network's patch."""
        patch = self.net.config.get("patch_size") or 1
        return self.spatial_ratio * (patch if isinstance(patch, int) else patch[-1])

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:  # noqa: ARG002 - for video
        """[C, h, w] of a picture of that size."""
        ratio = self.spatial_ratio
        return (self.latent_channels, height // ratio, width // ratio)

    @property
    def latent_channels(self) -> int:
        """C of a latent."""
        return self.pipeline.vae.config.latent_channels

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> Tensor:
        """The vanilla pipeline with one torch generator an item: pixels [B, 3, H, W] in [0, 1]."""
        self.warn_of_cuts(prompts)
        was_training = self.net.training
        self.model.eval()
        sources = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        media = self._draw(list(prompts), sources, self.call_arguments(prompts, sampling))
        self.model.train(was_training)
        return media.float()

    def _draw(self, prompts: list[str], sources: list[torch.Generator], arguments: dict[str, Any]) -> Tensor:
        return self.pipeline(prompt=prompts, generator=sources, output_type="pt", **arguments)[0]

    # --- adapters ---

    def reference(self) -> Any:
        """Context: `model` is the frozen base model."""
        return self.model.as_reference()

    def add_lora(self, rank: int, alpha: float | None, targets: Sequence[str] | None, dropout: float) -> lora.Coverage:
        """Freeze the network and put a fresh LoRA on it; returns what the LoRA covers."""
        return lora.inject(self.net, rank=rank, alpha=alpha, targets=targets or self.lora_targets, dropout=dropout)

    @property
    def lora_loading(self) -> dict[str, Any]:
        """What the pipeline's `load_lora_weights` is told beside the folder."""
        return {}

    @property
    def adapter_prefix(self) -> str:
        """What stands before the names of the trained network's weights in diffusers' LoRA files."""
        return self.component

    def add_text_lora(self, rank: int, alpha: float | None, targets: Sequence[str] | None, dropout: float) -> None:
        """Freeze the text encoders, add a LoRA; AdapterError where the pipeline's LoRA loader knows no text encoder."""
        if not self.text_encoders:
            kind = type(self.pipeline).__name__
            raise AdapterError(f"the LoRA loader of a {kind} knows no text encoder; train the network alone")
        for tower in self.text_encoders.values():
            lora.inject(tower, rank=rank, alpha=alpha, targets=targets or CLIP_TARGETS, dropout=dropout)
        self._note_towers()

    @property
    def text_encoders(self) -> dict[str, Any]:
        """The text encoders that the pipeline's own LoRA loader knows, by the pipeline's name for them."""
        names = self.pipeline._lora_loadable_modules if isinstance(self.pipeline, LoraBaseMixin) else []  # noqa: SLF001
        named = {name: self.pipeline.components.get(name) for name in names if name.startswith("text_encoder")}
        return {name: tower for name, tower in named.items() if tower is not None}

    @property
    def adapted(self) -> dict[str, Any]:
        """The network and the text encoders, those that carry an adapter, by the pipeline's name for them."""
        parts = {self.component: self.net, **self.text_encoders}
        return {name: part for name, part in parts.items() if lora.lora_layers(part)}

    def _note_towers(self) -> None:
        self.model.towers = nn.ModuleDict({name: p for name, p in self.adapted.items() if name != self.component})

    def load_adapter(self, folder: Path, name: str = lora.NAME, *, trainable: bool = True) -> None:
        """Load a LoRA file or folder of `save_adapter`, diffusers, PEFT or kohya as `name`, active with weight 1."""
        parts = {self.adapter_prefix: self.net, **self.text_encoders}
        lora_files.load(Path(folder), parts, self.adapter_prefix, origins, name=name, trainable=trainable)
        self._note_towers()

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        """Make exactly these adapters active, each times its weight; {} switches all off."""
        lora.activate(self.model, weights)

    def save_adapter(self, folder: Path, name: str = lora.NAME) -> None:
        """diffusers' layout in `folder`, PEFT's in `folder/peft`, ComfyUI's in `folder/comfyui` if it has the keys."""
        folder, prefix = Path(folder), self.adapter_prefix
        lora.require_adapter(self.model, name)
        parts = {part: net for part, net in self.adapted.items() if name in lora.adapter_names(net)}
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
        self._note_towers()

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
