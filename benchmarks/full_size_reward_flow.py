"""Reward gradients at full size on a CUDA GPU: peak memory of each stage and seconds, beside what the doctor says.

    python benchmarks/full_size_reward_flow.py [--cases wan sdxl flux] [--minutes 6.5] [--tiny]

Cases: Wan2.1-1.3B at 480x832x81 with Qwen2.5-VL-7B, which reads 24 frames; SDXL and FLUX.1 at 1024 x 1024 with
Qwen2.5-VL-3B; four questions each. Weights are random bfloat16 (their values change neither speed nor memory), built
from configs/models and configs/critics without any download; no text encoder is built. A LoRA of rank 16, autocast to
bf16, networks and critic with activation checkpointing, one differentiated step. Each case runs twice and prints one
JSON line with the figures of its second run. A case that does not fit is a line too. After `--minutes` the process ends
whatever it does. `--tiny` runs tiny networks on any device, to show that the script works; its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from full_size_step import CASES as IMAGES
from full_size_step import TINY_VAE, bare_folder, random_net
from random_weights import byte_pairs
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

from alignkit.adapters import lora
from alignkit.commands.doctor import memory, stages
from alignkit.commands.doctor.critic_plan import CriticPlan
from alignkit.commands.doctor.dry_media import codec
from alignkit.commands.doctor.dry_step import Ledger, network_inputs
from alignkit.commands.doctor.main import DoctorJob, chain_of, setup_of
from alignkit.commands.doctor.model_shapes import Model, blank, read_model
from alignkit.generators.description import LatentSize
from rewards.models.patches import read_patches, sample_frames
from rewards.models.vision_language import VisionLanguage, freeze

CRITICS = Path(__file__).parent.parent / "configs" / "critics"
QUESTIONS = [f"Is there a red bicycle, number {number}, beside the wall? Answer with yes or no." for number in range(4)]
TINY_CRITIC = {
    "text_config": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "vocab_size": 4096, "rope_parameters": {"mrope_section": [4, 6, 6]}},
    "vision_config": {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64},
}


@dataclass(frozen=True)
class Case:
    """A model of configs/models and a critic; `tiny`, `tiny_vae`: what makes their configs tiny."""

    model: str
    critic: str
    tiny: dict[str, Any]
    tiny_vae: dict[str, Any] = field(default_factory=lambda: TINY_VAE)
    frames: int | None = None  # that the critic reads
    tiny_frames: int | None = None  # of the video


CASES = {
    "wan": Case(
        "wan21_1_3b",
        "qwen25_vl_7b",
        {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 32},
        {"base_dim": 8, "num_res_blocks": 1},
        frames=24,
        tiny_frames=25,
    ),
    "sdxl": Case("sdxl", "qwen25_vl_3b", IMAGES["sdxl"].tiny),
    "flux": Case(
        "flux1_dev",
        "qwen25_vl_3b",
        {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
        | {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]},
    ),
}


class Meter:
    """The peak bytes of each stage and its seconds: of the card's allocator, or of the tensors made on a CPU."""

    def __init__(self, weights: int, known: list[Tensor]) -> None:
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._weights, self._cuda, self._ledger = weights, torch.cuda.is_available(), Ledger(known)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures what runs within it."""
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._ledger.peak, start = self._ledger.live, time.perf_counter()
        with self.counted():
            yield
        if self._cuda:
            torch.cuda.synchronize()
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.peaks[name] = torch.cuda.max_memory_allocated() if self._cuda else self._weights + self._ledger.peak

    def counted(self) -> Any:
        """What has to be on while tensors are made that a later stage measures."""
        return torch.enable_grad() if self._cuda else self._ledger


@dataclass
class Parts:
    """The networks of a case on the device."""

    model: Model
    net: Any
    generator: Any
    critic: VisionLanguage
    words: Tensor
    device: torch.device


def write_critic(case: Case, work: Path, *, tiny: bool) -> Path:
    """A folder with the critic's configs; token numbers are those of a tokenizer that is trained here."""
    folder = work / case.critic
    folder.mkdir(exist_ok=True)
    for path in (CRITICS / case.critic).glob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        for part, changes in TINY_CRITIC.items() if tiny and path.name == "config.json" else ():
            config[part] |= changes
        (folder / path.name).write_text(json.dumps(config), encoding="utf-8")
    return folder


def build_critic(folder: Path, device: torch.device, plan: CriticPlan) -> tuple[VisionLanguage, Tensor]:
    """The critic with random weights, frozen as the reward freezes it, and the rows of words that the reward keeps."""
    words = byte_pairs(*QUESTIONS)
    config = AutoConfig.from_pretrained(folder)
    for name, token in {"image": "<|image_pad|>", "video": "<|video_pad|>"}.items():
        vars(config)[f"{name}_token_id"] = words.convert_tokens_to_ids(token)
    for name in ("start", "end"):
        vars(config)[f"vision_{name}_token_id"] = words.convert_tokens_to_ids(f"<|vision_{name}|>")
    with torch.device("meta"):
        network = AutoModelForImageTextToText.from_config(config)
    network = freeze(random_net(network, device), str(device), checkpointing=plan.checkpointing)
    patches = {kind: read_patches(str(folder), config, video=kind == "video") for kind in ("image", "video")}
    return VisionLanguage(network.model, words, patches, rate=2.0), network.lm_head.weight


def build(folder: Path, plan: CriticPlan, device: torch.device) -> Parts:
    """All networks of the case."""
    model = read_model(folder)
    net = random_net(model.blank_denoiser(), device).requires_grad_(False)
    lora.inject(net, rank=16, targets=list(model.family.lora_targets))
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data, parameter.grad = parameter.data.float(), torch.zeros_like(parameter, dtype=torch.float32)
    net.train().enable_gradient_checkpointing()
    vae: Any = random_net(blank("diffusers", model.vae["_class_name"], model.vae), device)
    return Parts(model, net, codec(model, vae), *build_critic(plan.folder, device, plan), device)


def step(parts: Parts, chain: stages.Chain, x: Tensor) -> Tensor:
    """The state after one checkpointed step with guidance from `x`, on conditioning of the sizes of the family."""
    size = LatentSize(1, x.shape[2] if x.dim() == 5 else 1, *x.shape[-2:])
    with torch.device(parts.device):
        given = network_inputs(parts.model.family, parts.net, size)
    latents = "sample" if "sample" in given else "hidden_states"
    shape = given[latents].shape

    def predict(state: Tensor) -> Tensor:
        inputs = {**given, latents: state.reshape(shape).to(torch.bfloat16)}
        with torch.autocast(parts.device.type, torch.bfloat16):
            calls = 1 if chain.guidance is stages.Guidance.NONE else 2
            first, *others = [parts.net(**inputs, return_dict=False)[0].float() for _ in range(calls)]
        return (first if not others else others[0] + 5 * (first - others[0])).reshape(state.shape)

    return x - 0.05 * checkpoint(predict, x, use_reentrant=False)


def answers(critic: VisionLanguage, pixels: Tensor, frames: int | None) -> Tensor:
    """The sum of the states that answer the questions about the pixels."""
    media = pixels if frames is None else sample_frames(pixels, min(frames, pixels.shape[1]))
    seen = critic.see(media)
    rows = [critic.tokens(seen, question) for question in QUESTIONS]
    ends = [(index, len(row) - 1) for index, row in enumerate(rows)]
    return critic.read(seen, [0] * len(rows), rows, ends).float().sum()


def run(parts: Parts, chain: stages.Chain, meter: Meter) -> None:
    """A step, decoding and the critic forward; then backward, stage by stage, as autograd goes through them."""
    x = torch.randn(1, *parts.generator.latent_shape(*chain.size), device=parts.device, requires_grad=True)
    with meter.counted():
        result = step(parts, chain, x)
        latents = result.detach().requires_grad_()
    with meter.stage("decoding forward"):
        pixels = parts.generator.decode(latents, chain.decoding)
    with meter.stage(stages.CRITIC):
        media = pixels.detach().requires_grad_()
        answers(parts.critic, media, chain.critic.frames if chain.critic else None).backward()
    with meter.stage(stages.DECODING):
        pixels.backward(media.grad)
    with meter.stage(stages.STEP):
        result.backward(latents.grad)


def measure(name: str, chosen: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One case: bytes by stage, and the doctor's."""
    case, cuda = CASES[name], torch.cuda.is_available()
    folder = bare_folder(case.model, case.tiny if chosen.tiny else {}, work, case.tiny_vae)
    critic = write_critic(case, work, tiny=chosen.tiny)
    plan = CriticPlan(model=critic, dtype="bfloat16", checkpointing=True, frames=case.frames, questions=len(QUESTIONS))
    parts = build(folder, plan, torch.device("cuda" if cuda else "cpu"))
    job = DoctorJob(
        method="reward_flow",
        resolution=64 if chosen.tiny else None,
        num_frames=case.tiny_frames if chosen.tiny else None,
        dtype="bfloat16",
        bf16=True,
        activation_checkpointing=True,
        critic=plan,
    )
    chain = replace(chain_of(job, setup_of(job, parts.model), parts.model), states=2)
    kept = [parts.net, parts.generator.pipeline.vae, parts.critic.network]
    known = [tensor for part in kept for tensor in [*part.parameters(), *part.buffers()]]
    known += [parts.words] * (not any(parts.words is tensor for tensor in known))  # tied in small models
    known += [tensor.grad for tensor in known if tensor.grad is not None]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in known)
    for _ in range(1 if chosen.tiny else 2):
        meter = Meter(weights, known)
        run(parts, chain, meter)
    held = sum(stages.resident(parts.model, chain).values())
    predicted = {
        key: held + stages.stage(parts.model, chain, key) for key in (stages.CRITIC, stages.DECODING, stages.STEP)
    }
    return {
        "case": name,
        "tiny": chosen.tiny,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "weights_gb": round(weights / memory.GB, 4),
        "peak_gb": {key: round(value / memory.GB, 4) for key, value in meter.peaks.items()},
        "doctor_gb": {key: round(value / memory.GB, 4) for key, value in predicted.items()},
        "doctor_over_measured": {key: round(value / meter.peaks[key], 3) for key, value in predicted.items()},
        "seconds": meter.seconds,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--minutes", type=float, default=6.5, help="after which the process ends")
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args()
    if not torch.cuda.is_available() and not chosen.tiny:
        parser.error("this measures a CUDA GPU, and there is none here; --tiny shows on a CPU that the script works")
    signal.alarm(max(1, round(60 * chosen.minutes)))
    with tempfile.TemporaryDirectory() as work:
        for name in tqdm(chosen.cases, desc="cases"):
            try:
                line = measure(name, chosen, Path(work))
            except torch.cuda.OutOfMemoryError as error:
                line = {"case": name, "does_not_fit": str(error).partition("\n")[0]}
            print(json.dumps(line), flush=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    signal.alarm(0)


if __name__ == "__main__":
    main()
