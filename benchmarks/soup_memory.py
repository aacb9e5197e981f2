"""Peak memory of `alignkit soup` on two trainings of a full-size model with random weights. JSON lines.

    python benchmarks/soup_memory.py [--model sdxl] [--rank 64] [--work FOLDER] [--only lora weights]

`lora`: two LoRAs of the denoiser into one. `weights`: two tuned denoisers into one; the base is read too.
Models are those of configs/models. SDXL needs 23 GB of disk in FOLDER (default: a temporary one, removed at the end).

`peak_bytes`: anonymous memory of the process (/proc/self/status, Linux) above that before members are read. Pages of
mapped files are not in it: the system takes them back when it needs memory. `result_bytes`: the written file.
`two_tensors_bytes`: the two largest tensors of the denoiser, in the float64 of the sums. The bound of the peak is
result + two_tensors.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn

from alignkit.adapters import exports, lora
from alignkit.adapters.tensor_files import Layout, write_stream
from alignkit.generators.components import component_class
from alignkit.generators.folders import read_json
from alignkit.generators.members import Base, read_member
from alignkit.generators.soups import make_soup

CONFIGS = Path(__file__).parent.parent / "configs" / "models"
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
LAYERS = re.compile(r"\.(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)$")


def weights(folder: Path, library: str, kind: str, seed: int) -> None:
    """Random float16 weights for the config in `folder`."""
    network = shapes(folder, kind, library)
    layouts = {name: Layout(torch.float16, tuple(value.shape)) for name, value in network.state_dict().items()}
    draw = torch.Generator().manual_seed(seed)

    def tensor(name: str) -> Tensor:
        return torch.empty(layouts[name].shape, dtype=torch.float16).normal_(0, 0.02, generator=draw)

    write_stream(folder / f"{STEMS[library]}.safetensors", layouts, tensor, exports.file_metadata(None))


def shapes(folder: Path, kind: str, library: str) -> nn.Module:
    """The network of the config in `folder`, on the meta device."""
    network, config = component_class(library, kind), read_json(folder / "config.json")
    with torch.device("meta"):
        if library == "diffusers":
            return network.from_config(config)
        return network(network.config_class(**config))


def make_base(model: str, folder: Path) -> Base:
    """The pipeline's folder with random weights."""
    shutil.copytree(CONFIGS / model, folder)
    index = read_json(folder / "model_index.json")
    for number, config in enumerate(sorted(folder.glob("*/config.json"))):
        weights(config.parent, *index[config.parent.name], seed=number)
    return Base.open(str(folder))


def make_loras(base: Base, denoiser: str, rank: int, work: Path) -> list[str]:
    """Two random LoRAs on the attention and feed-forward layers."""
    network = base.shapes(denoiser)
    layers = {name: part for name, part in network.named_modules() if LAYERS.search(name)}
    for number in range(2):
        draw = torch.Generator().manual_seed(number)
        state = {}
        for name, layer in layers.items():
            rows, columns = layer.weight.shape
            state[f"{name}{lora.DOWN}"] = torch.randn(rank, columns, generator=draw) / rank
            state[f"{name}{lora.UP}"] = torch.randn(rows, rank, generator=draw) / rank
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(layers))
        exports.write_diffusers(
            {denoiser: network}, {denoiser: state}, {denoiser: config}, work / f"lora_{number}", None
        )
    return [str(work / f"lora_{number}") for number in range(2)]


def make_tuned(base: Base, denoiser: str, work: Path) -> list[str]:
    """Two folders of other random weights."""
    folders = [work / f"tuned_{number}" / denoiser for number in range(2)]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        shutil.copyfile(base.folder / denoiser / "config.json", folder / "config.json")
        weights(folder, *base.index[denoiser], seed=100 + number)
    return list(map(str, folders))


@dataclass
class Peak:
    """Highest anonymous memory above that at the start, bytes."""

    start: int
    highest: int = 0


def anonymous() -> int:
    """Bytes of this process that are no pages of files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit("soup_memory: /proc/self/status has no RssAnon; this benchmark needs Linux")
    return 1024 * int(found[1])


@contextmanager
def watched() -> Iterator[Peak]:
    """Sample the memory every 5 ms in another thread."""
    peak, done = Peak(anonymous()), threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak.highest = max(peak.highest, anonymous() - peak.start)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def measure(question: str, folder: str, members: list[str], out: Path) -> None:
    """Mix with weights 0.7 and 0.3, and print. Run it in its own process: freed memory of other work would count."""
    base = Base.open(folder)
    denoiser, before = base.family.component, time.perf_counter()
    with watched() as peak:
        make_soup(base, [read_member(name, base) for name in members], [0.7, 0.3], out)
    seconds = time.perf_counter() - before
    largest = sorted(value.numel() for value in base.shapes(denoiser).state_dict().values())[-2:]
    result = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    found = {"result": result, "two_tensors": 8 * sum(largest), "peak": peak.highest}
    held = peak.highest <= result + 8 * sum(largest)
    sizes = {f"{name}_bytes": value for name, value in found.items()}
    print(json.dumps({"question": question, **sizes, "holds": held, "seconds": round(seconds, 1)}), flush=True)


def main() -> None:
    """Write the files, mix them, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdxl", choices=sorted(folder.name for folder in CONFIGS.iterdir()))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--work", type=Path, help="a folder on a disk with room; it is not emptied")
    parser.add_argument("--only", nargs="+", default=["lora", "weights"], choices=["lora", "weights"])
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
        work = Path(folder)
        base = make_base(chosen.model, work / "base")
        denoiser = base.family.component
        made = {
            "lora": lambda: make_loras(base, denoiser, chosen.rank, work),
            "weights": lambda: make_tuned(base, denoiser, work),
        }
        for question in chosen.only:
            arguments = (question, str(base.folder), made[question](), work / f"mixed_{question}")
            process = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"soup_memory: the process of '{question}' ended with {process.exitcode}")


if __name__ == "__main__":
    main()
