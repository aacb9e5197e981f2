"""Steps at full size on a CUDA GPU, RankDPO of SDXL and SD3.5-M and DenseDPO of Wan 2.1 1.3B: images/s or clips/s,
peak memory, share of the GPU's peak.

    python benchmarks/full_size_step.py [--models sdxl sd35_medium wan21_1_3b] [--steps 8] [--checkpointing] [--tiny]

Weights are random bfloat16 (their values change neither speed nor memory), latents and conditioning random rows of the
cache's layout; the step is that of a running `trainer.train()`: LoRA, autocast to bf16, for images with and without
precomputed reference. No text encoder is built: training reads the cache. One JSON line a case, with what `alignkit
doctor` says of it. Beside clips/s stands what DenseDPO's training times come to: 256 pairs x 1000 steps in 16 hours on
64 A100, of an unnamed model at up to 512 pixels and 5 seconds. `--tiny` runs tiny networks on any device, to show that
the script works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from typing_extensions import override

from alignkit.commands.doctor import memory
from alignkit.commands.doctor.dry_step import encoding_bytes
from alignkit.commands.doctor.model_shapes import Model, blank, read_model
from alignkit.generators.families.stable_diffusion3 import StableDiffusion3
from alignkit.generators.families.stable_diffusion_xl import StableDiffusionXL
from alignkit.generators.families.wan import Wan
from alignkit.media import encode_clip
from alignkit.records import Conditioning
from alignkit.segments import LABELS, SEGMENTS
from alignkit.trainers.buckets import AS_THEY_ARE
from alignkit.trainers.densedpo import CLIP_LABEL, DenseDPOConfig, DenseDPOTrainer
from alignkit.trainers.draws import DrawPlan
from alignkit.trainers.latents import COND, LATENTS, Encoder, LatentDataset
from alignkit.trainers.rankdpo import RankDPOConfig, RankDPOTrainer
from alignkit.trainers.store import packed

CONFIGS = Path(__file__).parent.parent / "configs" / "models"
TINY_VAE = {"block_out_channels": [32] * 4, "layers_per_block": 1}
WARM_UP = 2  # steps that are not counted
PAPER_CLIPS_PER_S = 256 * 2 * 1000 / (16 * 3600) / 64  # DenseDPO, of one A100
Size = tuple[int, int, int]  # height, width, frames
# Dense bf16 operations a second, from the makers' data sheets, by what the device's name holds.
MATRIX_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


@dataclass(frozen=True)
class Case:
    """A model of configs/models; `cond`: shapes of one prompt's conditioning; `tiny`: what makes its config tiny.

    clip, tiny_clip: the size of a video; without, images of `--side`.
    """

    pipeline: Any
    adapter: Any
    scheduler: Any
    cond: dict[str, tuple[int, ...]]
    tiny: dict[str, Any]
    tiny_cond: dict[str, tuple[int, ...]]
    tiny_vae: dict[str, Any] = field(default_factory=lambda: TINY_VAE)
    clip: Size | None = None
    tiny_clip: Size = (32, 32, 9)


CASES = {
    "sdxl": Case(
        diffusers.StableDiffusionXLPipeline,
        StableDiffusionXL,
        diffusers.EulerDiscreteScheduler,
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,)},
        {
            "block_out_channels": [32, 64],
            "attention_head_dim": [2, 4],
            "transformer_layers_per_block": [1, 1],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": 32,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
        {"encoder_hidden_states": (77, 32), "text_embeds": (32,)},
    ),
    "sd35_medium": Case(
        diffusers.StableDiffusion3Pipeline,
        StableDiffusion3,
        diffusers.FlowMatchEulerDiscreteScheduler,
        {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)},
        {
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "dual_attention_layers": [0],
        },
        {"encoder_hidden_states": (333, 32), "pooled_projections": (32,)},
    ),
    "wan21_1_3b": Case(
        diffusers.WanPipeline,
        Wan,
        diffusers.UniPCMultistepScheduler,
        {"encoder_hidden_states": (512, 4096)},
        {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "text_dim": 32},
        {"encoder_hidden_states": (512, 32)},
        tiny_vae={"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        clip=(480, 832, 81),
    ),
}


def bare_folder(name: str, changes: dict[str, Any], work: Path, vae: dict[str, Any] = TINY_VAE) -> Path:
    """A copy of the model's configs without text encoders, with `changes` in the denoiser's and `vae` in the VAE's."""
    source, target = CONFIGS / name, work / name
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in index.items() if not key.startswith("text_encoder")}
    for part in (key for key in kept if not key.startswith("_")):
        for path in (source / part).glob("*.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            config |= changes if part in ("unet", "transformer") else {}
            config |= vae if changes and part == "vae" else {}
            (target / part).mkdir(parents=True, exist_ok=True)
            (target / part / path.name).write_text(json.dumps(config), encoding="utf-8")
    (target / "model_index.json").write_text(json.dumps(kept), encoding="utf-8")
    return target


def random_net(net: nn.Module, device: torch.device) -> Any:
    """A network of the meta device on `device`, in bfloat16, with small random numbers."""
    net = nn.Module.to(net, torch.bfloat16).to_empty(device=device)  # diffusers' own `to` warns of float32 modules
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            tensor.normal_(std=0.02)
    return net


def generator_of(case: Case, folder: Path, model: Model, cond: dict[str, tuple[int, ...]], device: Any) -> Any:
    """The family's adapter on a pipeline without text encoders; prompts become random conditioning."""
    vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    parts = {
        model.denoiser: random_net(model.blank_denoiser(), device),
        "vae": random_net(blank("diffusers", vae["_class_name"], vae), device),
        "scheduler": case.scheduler.from_config(scheduler),
    }
    absent = [f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
    expected = case.pipeline.__init__.__code__.co_varnames
    pipeline = case.pipeline(**parts, **{name: None for name in absent if name in expected})
    if case.clip is not None:
        pipeline.tokenizer = SimpleNamespace(model_max_length=512)  # Wan's adapter reads the limit
    generator = case.adapter(pipeline, folder.name)

    def encode_prompts(prompts: list[str]) -> Conditioning:
        rows, null = (
            {name: torch.randn(n, *shape, device=device) for name, shape in cond.items()} for n in (len(prompts), 1)
        )
        return Conditioning(rows, null)

    generator.encode_prompts = encode_prompts
    return generator


def cached_rows(
    generator: Any, cond: dict[str, tuple[int, ...]], chosen: argparse.Namespace, size: Size, candidates: int
) -> LatentDataset:
    """Random rows for all steps, as the latent cache holds them; of clips, every second latent frame is labelled."""
    count, shape = chosen.prompts * (chosen.steps + WARM_UP), generator.latent_shape(*size)
    latents = packed({LATENTS: (torch.randn(candidates, *shape), torch.float32)})
    texts = packed({COND + name: (torch.randn(size), torch.float32) for name, size in cond.items()})
    targets: dict[str, Tensor] = {"phi": torch.linspace(0, 1, candidates).expand(count, -1)}
    if generator.modality == "video":
        numbers = torch.arange(shape[1])
        by_frame = {LABELS: numbers % 2, SEGMENTS: numbers, CLIP_LABEL: torch.tensor(1)}
        targets = {name: values.expand(count, *values.shape) for name, values in by_frame.items()}
    plan = DrawPlan(generator.noise_schedule.sample_t, 0, 0.1)
    rows, prompts = (datasets.Dataset.from_list([row] * count) for row in (latents, texts))
    return LatentDataset(rows, prompts, targets, list(map(str, range(count))), plan)


def encode_row(generator: Any, size: Size, candidates: int) -> dict[str, Any]:
    """Encode one row of K media as the latents cache does: media a second, and the peak of memory beside weights."""
    height, width, frames = size
    images = [Image.effect_noise((width, height), 80).convert("RGB") for _ in range(candidates)]
    cells, kind, name = images, datasets.Image(), "images"
    if generator.modality == "video":
        clips = [np.asarray(image)[None].repeat(frames, axis=0) for image in images]
        cells, kind, name = [{"bytes": encode_clip(clip, 16)} for clip in clips], datasets.Video(decode=False), "videos"
    features = datasets.Features({name: datasets.List(kind), "prompt": datasets.Value("string")})
    rows = datasets.Dataset.from_list([{name: cells, "prompt": "noise"}], features=features)
    encoder = Encoder(generator, rows, name, AS_THEY_ARE)
    encoder.latents([0])
    cuda = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    encoder.latents([0])
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before if cuda else None
    return {
        "encoded_per_s": round(candidates / seconds, 3),
        "encoding_gb": peak and round(peak / memory.GB, 3),
    }


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    @override
    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def median(self) -> float:
        """Of the steps after the warm-up."""
        marks = self.marks[WARM_UP - 1 :]
        return statistics.median(later - earlier for earlier, later in itertools.pairwise(marks))


def planned(arguments: Any, generator: Any, size: Size, candidates: int, *, ready: bool) -> memory.Setup:
    """The training as the doctor takes it."""
    height, width, frames = size
    return memory.Setup(
        height=height,
        width=width,
        frames=frames,
        batch=arguments.per_device_train_batch_size,
        candidates=candidates,
        lora_rank=arguments.lora_rank,
        lora_targets=tuple(generator.lora_targets),
        full_finetune=False,
        needs_reference=True,
        dtype="bfloat16",
        bf16=True,
        precompute_reference=ready,
        activation_checkpointing=arguments.activation_checkpointing,
    )


def measure(name: str, chosen: argparse.Namespace, work: Path, *, ready: bool) -> dict[str, Any]:
    """One case: the step's figures, and the doctor's."""
    case, cuda = CASES[name], torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    cond = case.tiny_cond if chosen.tiny else case.cond
    folder = bare_folder(name, case.tiny if chosen.tiny else {}, work, case.tiny_vae)
    model = read_model(folder)
    generator = generator_of(case, folder, model, cond, device)
    is_video = case.clip is not None
    size = (chosen.side, chosen.side, 1) if case.clip is None else case.tiny_clip if chosen.tiny else case.clip
    candidates = 2 if is_video else chosen.candidates
    Config, Trainer = (DenseDPOConfig, DenseDPOTrainer) if is_video else (RankDPOConfig, RankDPOTrainer)
    arguments = Config(
        output_dir=str(work / f"{name}-{ready}"),
        max_steps=chosen.steps + WARM_UP,
        per_device_train_batch_size=chosen.prompts,
        bf16=True,
        use_cpu=not cuda,
        activation_checkpointing=chosen.checkpointing,
        learning_rate=1e-6,
        save_strategy="no",
        disable_tqdm=True,
        **({} if is_video else {"precompute_reference": ready}),
    )
    encoded = encode_row(generator, size, candidates)
    clock = Clock()
    rows = cached_rows(generator, cond, chosen, size, candidates)
    trainer = Trainer(generator, arguments, rows, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    measured = torch.cuda.max_memory_allocated() if cuda else None
    setup = planned(arguments, generator, size, candidates, ready=ready)
    estimate = memory.total(model, setup)
    per_s = chosen.prompts * candidates / clock.median()
    rate = per_s * sum(memory.operations(model, setup).values())
    peak = next((value for part, value in MATRIX_PEAK.items() if cuda and part in torch.cuda.get_device_name()), None)
    return {
        "model": name,
        "tiny": chosen.tiny,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "precomputed_reference": ready,
        ("clips_per_s" if is_video else "images_per_s"): round(per_s, 3),
        **({"paper_clips_per_s": round(PAPER_CLIPS_PER_S, 3)} if is_video else {}),
        "peak_gb": measured and round(measured / memory.GB, 3),
        **encoded,
        "doctor_encoding_gb": round(encoding_bytes(model, memory.run_of(setup)) / memory.GB, 3),
        "doctor_gb": round(estimate / memory.GB, 3),
        "doctor_over_measured": measured and round(estimate / measured, 4),
        "tflop_per_s": round(rate / 1e12, 3),
        "share_of_matrix_peak": peak and round(rate / peak, 4),
        "settings": {key: value for key, value in vars(chosen).items() if key not in ("models", "tiny")},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--side", type=int, help="picture size in pixels; default 1024, tiny 64")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args()
    chosen.side = chosen.side or (64 if chosen.tiny else 1024)
    if not torch.cuda.is_available() and not chosen.tiny:
        parser.error("this measures a CUDA GPU, and there is none here; --tiny shows on a CPU that the script works")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as work:
        for name in chosen.models:
            for ready in (False, True) if CASES[name].clip is None else (False,):
                print(json.dumps(measure(name, chosen, Path(work), ready=ready)), flush=True)
                gc.collect()  # the trainer and its network are a cycle; the next case needs their memory
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
