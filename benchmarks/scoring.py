"""Scoring throughput of each reward against the bare model's forward on the same batch. One JSON line a case.

    python benchmarks/scoring.py [NAME ...] [--batch 8] [--size 512] [--repeats 9] [--device cpu] [--dtype float32]
    python benchmarks/scoring.py pick_score --model FOLDER [--processor FOLDER]    published weights
    python benchmarks/scoring.py hps --model HPS_v2.1_compressed.pt --processor FOLDER
    python benchmarks/scoring.py ensemble                                          shared vision against unshared

Weights are random at a moderate size by default: a ViT of 6 layers, 384 wide, at 224 pixels. The bare forward gets
pixels and tokens that are ready; the reward checks, resizes and normalises pictures and tokenises prompts that it has
not seen before. Both run in turn, no gradient; a figure is the median over the repeats of their ratio, on a CPU in
seconds of the processor. `CASES` is the table: a new reward is one builder there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.utils import logging

from alignkit.protocols import Reward
from alignkit.records import Prompt
from rewards.aesthetic import WIDTHS, Aesthetic
from rewards.clip import ClipReward, share_vision
from rewards.clip_score import ClipScore
from rewards.hps import Hps
from rewards.mps import Cross, Mps
from rewards.pick_score import PickScore

TEXTS = ("a red bicycle beside a wall", "two cats on a sofa", "an old harbour at night, oil painting", "a bowl of soup")


@dataclass(frozen=True)
class Case:
    """A reward, a batch of media for it with prompts, and the bare model's forward on the same batch."""

    reward: Reward
    media: Tensor
    prompts: Sequence[Prompt]
    bare: Callable[[], Any]


@dataclass(frozen=True)
class Bench:
    """What is measured: a place for random weights, and the command's options."""

    work: Path
    options: argparse.Namespace

    @property
    def given(self) -> dict[str, str]:
        """Where a reward runs."""
        return {"device": self.options.device, "dtype": self.options.dtype}

    def media(self) -> Tensor:
        """Random pictures."""
        size = (self.options.batch, 3, self.options.size, self.options.size)
        return torch.rand(size, generator=torch.Generator().manual_seed(0)).to(self.options.device)

    def prompts(self) -> list[Prompt]:
        """A prompt of its own for every picture, for equal ones are read once."""
        return [Prompt.from_text(f"{TEXTS[i % len(TEXTS)]}, no. {i}") for i in range(self.options.batch)]


def tokenizer() -> CLIPTokenizer:
    """A token a letter."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,."
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=77)


def random_clip(work: Path) -> Path:
    """A folder with a random CLIP of moderate size."""
    folder = work / "clip"
    if not folder.exists():
        words, sizes = tokenizer(), {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
        text = sizes | {"num_hidden_layers": 4, "vocab_size": len(words), "eos_token_id": words.eos_token_id}
        text |= {"bos_token_id": words.bos_token_id, "pad_token_id": words.pad_token_id, "hidden_act": "gelu"}
        vision = sizes | {"num_hidden_layers": 6, "patch_size": 16, "hidden_act": "gelu"}
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=256)
        CLIPModel(config).save_pretrained(folder)
        words.save_pretrained(folder)
    return folder


def places(bench: Bench) -> tuple[str, dict[str, str]]:
    """The model's place and the options that say where its tokenizer is."""
    if bench.options.model:
        return bench.options.model, {"processor": bench.options.processor} if bench.options.processor else {}
    folder = str(random_clip(bench.work))
    return folder, {"processor": folder}


def on_clip(bench: Bench, reward: ClipReward, after: Callable[[Any], Any] | None = None) -> Case:
    """The case of a reward on CLIP: its bare forward sees ready pixels and reads ready tokens."""
    media, prompts, clip = bench.media(), bench.prompts(), reward.clip
    pixels = clip.preparation(media).to(clip.model.dtype)
    words = [prompt.text for prompt in prompts]
    window = clip.model.config.text_config.max_position_embeddings
    tokens = clip.tokenizer(words, padding="max_length", max_length=window, truncation=True, return_tensors="pt")
    ids = tokens.input_ids.to(media.device)

    def bare() -> Any:
        seen = clip.model.get_image_features(pixels)
        said = clip.model.get_text_features(ids) if reward.needs_prompt else None
        return after(seen, said) if after else None

    return Case(reward, media, prompts, bare)


def clip_score(bench: Bench) -> Case:
    """CLIP score."""
    model, processor = places(bench)
    return on_clip(bench, ClipScore(model, **processor, **bench.given))


def pick_score(bench: Bench) -> Case:
    """PickScore."""
    model, processor = places(bench)
    return on_clip(bench, PickScore(model, **processor, **bench.given))


def hps(bench: Bench) -> Case:
    """HPSv2."""
    model, processor = places(bench)
    return on_clip(bench, Hps(model, **processor, **bench.given))


def aesthetic(bench: Bench) -> Case:
    """The aesthetic score; with `--model` it needs the published head as well."""
    model, processor = places(bench)
    head = bench.options.head or str(bench.work / "head.pth")
    if not bench.options.head:
        widths = zip((0, 2, 4, 6, 7), (256, *WIDTHS), WIDTHS, strict=False)
        layers = {f"layers.{place}": torch.nn.Linear(wide, narrow) for place, wide, narrow in widths}
        torch.save({f"{n}.{k}": v for n, layer in layers.items() for k, v in layer.state_dict().items()}, head)
    return on_clip(bench, Aesthetic(model, head=head, **processor, **bench.given))


def mps_reward(bench: Bench) -> Mps:
    """MPS with the given weights or random ones."""
    model, processor = places(bench)
    if not bench.options.model:
        clip, model = CLIPModel.from_pretrained(model), str(bench.work / "mps.safetensors")
        tensors = {f"model.{name}": value.contiguous() for name, value in clip.state_dict().items()}
        cross = Cross(4, 256, 256, 64, 1024).state_dict()
        save_file(tensors | {f"cross_model.{name}": value for name, value in cross.items()}, model)
    return Mps(model, **processor, **bench.given)


def mps(bench: Bench) -> Case:
    """MPS: the bare forward includes the cross model."""
    reward = mps_reward(bench)
    clip, cross = reward.clip.model, reward._cross["cross_model"]  # noqa: SLF001 - the bare model itself

    def after(seen: Any, said: Any) -> Tensor:
        read = clip.text_projection(said.last_hidden_state)
        relevant = torch.ones(read.shape[:2], dtype=torch.bool, device=read.device)
        return cross(clip.visual_projection(seen.last_hidden_state), read, relevant)

    return on_clip(bench, reward, after)


CASES: dict[str, Callable[[Bench], Case]] = {
    "clip_score": clip_score,
    "pick_score": pick_score,
    "hps": hps,
    "aesthetic": aesthetic,
    "mps": mps,
}


def clock(run: Callable[[], Any], device: str) -> float:
    """Seconds of one run: of the processor on a CPU, which other programs there do not change, else of the wall."""
    timer = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.accelerator.synchronize()
    start = timer()
    run()
    if device != "cpu":
        torch.accelerator.synchronize()
    return timer() - start


def in_turn(first: Callable[[int], Any], second: Callable[[int], Any], bench: Bench) -> tuple[list[float], list[float]]:
    """Seconds of both, run in turn with the order changing, after one run each that is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(bench.options.repeats + 1):
        for which in (0, 1) if index % 2 else (1, 0):
            seconds = clock(lambda i=index, w=which: (first, second)[w](i), bench.options.device)
            if index:
                times[which].append(seconds)
    return times


def unseen(prompts: Sequence[Prompt], index: int) -> list[Prompt]:
    """The prompts with a number, so that nothing read before can be remembered."""
    return [Prompt.from_text(f"{prompt.text} {index}", **prompt.metadata) for prompt in prompts]


def against_bare(name: str, bench: Bench) -> dict[str, Any]:
    """A reward's pictures a second, and its share of the bare model's."""
    case = CASES[name](bench)
    count = len(case.media)
    scored, bare = in_turn(lambda i: case.reward(case.media, unseen(case.prompts, i)), lambda _: case.bare(), bench)
    ratio = statistics.median(b / s for s, b in zip(scored, bare, strict=True))
    rates = {"per_s": count / statistics.median(scored), "bare_per_s": count / statistics.median(bare)}
    return {"reward": name, **{key: round(value, 2) for key, value in rates.items()}, "ratio": round(ratio, 3)}


def ensemble(bench: Bench) -> dict[str, Any]:
    """PickScore, HPSv2 and MPS of equal vision weights: together with one look, and with three."""
    folder = str(random_clip(bench.work))
    random = Bench(bench.work, argparse.Namespace(**{**vars(bench.options), "model": ""}))

    def members() -> list[ClipReward]:
        options = {"processor": folder, **bench.given}
        return [PickScore(folder, **options), Hps(folder, **options), mps_reward(random)]

    shared, unshared, media, prompts = members(), members(), bench.media(), bench.prompts()
    towers = share_vision(shared)

    def score(rewards: list[ClipReward], index: int) -> None:
        fresh = media.clone()  # a new batch: nothing seen before may be used
        for reward in rewards:
            reward(fresh, unseen(prompts, index))

    one, three = in_turn(lambda i: score(shared, i), lambda i: score(unshared, i), bench)
    speed = statistics.median(t / o for o, t in zip(one, three, strict=True))
    times = {"shared_s": round(statistics.median(one), 4), "unshared_s": round(statistics.median(three), 4)}
    return {"reward": "ensemble", "members": len(shared), "towers": towers, **times, "speed_up": round(speed, 2)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join([*CASES, 'ensemble'])}; all by default")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in pixels")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", default="", help="published weights, for a single name")
    parser.add_argument("--processor", default="", help="its tokenizer and preprocessor_config.json")
    parser.add_argument("--head", default="", help="the aesthetic score's head")
    chosen = parser.parse_args()
    names = chosen.names or [*CASES, "ensemble"]
    if unknown := set(names) - {*CASES, "ensemble"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join([*CASES, 'ensemble'])}")
    if chosen.model and (len(names) > 1 or names == ["ensemble"]):
        parser.error("--model belongs to one reward; name it")
    logging.disable_progress_bar()
    torch.manual_seed(0)
    settings = {key: getattr(chosen, key) for key in ("batch", "size", "repeats", "device", "dtype", "model")}
    settings["threads"] = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as work, torch.no_grad():
        bench = Bench(Path(work), chosen)
        for name in names:
            result = ensemble(bench) if name == "ensemble" else against_bare(name, bench)
            print(json.dumps({**result, "settings": settings}), flush=True)


if __name__ == "__main__":
    main()
