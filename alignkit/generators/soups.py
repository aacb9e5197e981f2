"""Mixtures as files: one LoRA that vanilla diffusers loads, or components that `from_pretrained` loads, and the record.

The weights of whole components are computed and written one at a time, so a mixture of two large models needs the
memory of a few of their weights.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from torch import Tensor

from alignkit.adapters import exports, lora
from alignkit.adapters.exports import file_metadata
from alignkit.adapters.merging import Merge, require_weights
from alignkit.adapters.mixing import Full, Lora, WeightSoup, soup_of_loras
from alignkit.adapters.mixture import BASE, FILE, MemberRecord, Mixture, write_mixture
from alignkit.adapters.tensor_files import Layout, write_stream
from alignkit.diffusion.tuned_steps import ALL_STEPS, TunedSteps
from alignkit.errors import AdapterError, StorageError
from alignkit.escape import get_logger
from alignkit.generators.members import Base, Member, renamed_layers, require_one_base, weights_of
from alignkit.locks import LOCK
from alignkit.storage import checksum, read_json, write_json

Output = Literal["auto", "adapter", "components", "model"]
logger = get_logger(__name__)
PARTIAL = ".partial"  # where a mixture is written until it is whole, in its folder


@dataclass(frozen=True, slots=True)
class Mix:
    """What a soup is made of."""

    base: Base
    members: Sequence[Member]
    weights: Sequence[float]
    merge: Merge


def make_soup(
    base: Base,
    members: Sequence[Member],
    weights: Sequence[float],
    out: Path,
    *,
    merge: Merge | None = None,
    output: Output = "auto",
    rank: int | None = None,
    any_sum: bool = False,
) -> Mixture:
    """Write the soup of `members` into the new folder `out`, with `alignkit.json` beside it.

    output: adapter (`pytorch_lora_weights.safetensors` of scale 1, for `load_lora_weights`), components (a folder for
        each denoiser or text encoder that a member changes), model (the whole pipeline); auto is adapter where all
        members are LoRAs, else components.
    rank: cut an adapter to this rank, by singular values; without it its rank is the sum of the members' ranks.
    any_sum: weights may sum to another number than 1.

    The precision of written components is that of the base's files, or a member's wider one with all weights; float32
    for 8 bits. After an error nothing is left of it. Logs a warning for members that were trained for some steps.
    Raises StorageError where `out` holds something, AdapterError for members of another base and for an output that
    cannot hold the result.
    """
    # Without the base itself: its change is 0, and its weight would count in the scale of TIES.
    used = [bool(member.components) for member in members]
    mix = Mix(base, list(compress(members, used)), list(compress(weights, used)), merge or Merge())
    mix.merge.check(weights, any_sum=any_sum)
    changed, kind = _changed(members), kind_of_result(base, members, output, rank)
    require_new(out)
    fingerprints = require_one_base(members, base)
    _warn_of_windows(members, ALL_STEPS)
    with _whole(out) as folder:
        error = 0.0
        if kind == "adapter":
            error = _write_adapter(mix, rank, folder, fingerprints)
        elif kind == "model":
            _copy_rest(base, changed, folder)
        for component in changed if kind != "adapter" else ():
            _write_component(mix, component, folder / component)
        written = {str(file.relative_to(folder)): checksum(file) for file in sorted(folder.rglob("*.safetensors"))}
        mixture = Mixture(
            space="weights",
            base=base.model,
            base_fingerprint=fingerprints,
            members=tuple(map(_record, members)),
            weights=tuple(map(float, weights)),
            method=mix.merge.method,
            density=mix.merge.density,
            seed=mix.merge.seed,
            rank_error=error,
            files=written,
        )
        write_mixture(folder, mixture)
    return mixture


def make_mixture(
    base: Base,
    members: Sequence[Member],
    weights: Sequence[float],
    out: Path,
    *,
    space: Literal["embedding", "prediction"],
    window: TunedSteps = ALL_STEPS,
    any_sum: bool = False,
) -> Mixture:
    """Write a mixture that acts at sampling time: copies of the members in `out`/members, and `alignkit.json`.

    embedding mixes what text encoders give, prediction what denoisers give; see `alignkit.generators.mixtures`. Raises
    AdapterError for a member that changes anything else, and as `make_soup` does.
    """
    require_weights(weights, any_sum=any_sum)
    require_space(members, space)
    _changed(members)
    require_new(out)
    fingerprints = require_one_base(members, base)
    _warn_of_windows(members, window)
    with _whole(out) as folder:
        records = []
        for number, member in enumerate(members):
            place = "" if member.name == BASE else f"members/{number}"
            for name, file in member.files.items():
                (folder / place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, folder / place / name)
            records.append(_record(member, place))
        mixture = Mixture(
            space=space,
            base=base.model,
            base_fingerprint=fingerprints,
            members=tuple(records),
            weights=tuple(map(float, weights)),
            window=window,
        )
        write_mixture(folder, mixture)
    return mixture


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder whose entries move into `out` when the block ends without an error, the record last; else they are gone.

    What a killed process left is removed first.
    """
    folder = out / PARTIAL
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == FILE):
            entry.rename(out / entry.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # not empty: it holds the mixture, or the lock
            out.rmdir()


def _warn_of_windows(members: Sequence[Member], window: TunedSteps) -> None:
    for member in members:
        if member.window not in (None, window):
            logger.warning(
                "member '%s' was trained for %s, this mixture acts in %s: give it the same window, or judge the result",
                *(member.name, member.window, window),
            )


def require_space(members: Sequence[Member], space: Literal["embedding", "prediction"]) -> None:
    """AdapterError for a member that changes anything but what is mixed in `space`."""
    for member in members:
        for component in member.components:
            if component.startswith("text_encoder") != (space == "embedding"):
                wanted = "text encoders" if space == "embedding" else "the denoiser"
                raise AdapterError(
                    f"member '{member.name}' changes {component}, and a mixture of {space}s takes members that change "
                    f"{wanted} alone; mix weights, or give that part of the member"
                )


def require_new(out: Path) -> None:
    """StorageError where `out` holds anything but this command's lock, or half a mixture: nothing is overwritten."""
    if out.exists() and (not out.is_dir() or any(entry.name not in (LOCK, PARTIAL) for entry in out.iterdir())):
        raise StorageError(f"'{out}' exists and is not empty; a mixture never overwrites, give another folder")


def _changed(members: Sequence[Member]) -> list[str]:
    """The components that any member changes."""
    changed = list(dict.fromkeys(component for member in members for component in member.components))
    if not changed:
        raise AdapterError("all members are the base itself, so there is nothing to mix")
    return changed


def kind_of_result(base: Base, members: Sequence[Member], output: Output, rank: int | None) -> Output:
    """What `make_soup` writes for `output`. Raises AdapterError where that cannot hold the result."""
    changed = _changed(members)
    kind = output if output != "auto" else "components" if any(member.weights for member in members) else "adapter"
    whole = [member.name for member in members if member.weights]
    if kind == "adapter" and whole:
        raise AdapterError(f"member '{whole[0]}' has full weights, which no adapter holds; give output: components")
    unreadable = sorted(set(changed) - set(base.loadable))
    if kind == "adapter" and unreadable:
        raise AdapterError(
            f"the LoRA loader of a {base.index['_class_name']} does not read an adapter of {unreadable[0]}; give "
            "output: components"
        )
    if kind != "adapter" and rank is not None:
        raise AdapterError(f"rank is {rank}, but full weights are written; leave it out, or give output: adapter")
    return kind


def _record(member: Member, place: str = "") -> MemberRecord:
    return MemberRecord(name=member.name, files=member.checksums(), place=place)


# --- one LoRA -------------------------------------------------------------------------------------------------------


def _write_adapter(mix: Mix, rank: int | None, out: Path, fingerprints: Mapping[str, str]) -> float:
    """Write one file; returns the result's relative error."""
    states, configs, errors = {}, {}, []
    for component in _changed(mix.members):
        loras = [member.lora(component) for member in mix.members]
        state, error = soup_of_loras(loras, mix.weights, mix.merge, rank)
        errors.append(error)
        downs = {key.removesuffix(lora.DOWN): value for key, value in state.items() if key.endswith(lora.DOWN)}
        paths, highest = sorted(downs), max(map(len, downs.values()))
        _fill(state, highest)
        states[component] = state
        configs[component] = LoraConfig(r=highest, lora_alpha=highest, target_modules=paths)
    parts = {component: mix.base.shapes(component) for component in states}
    bases = {component: fingerprints[component] for component in states}
    exports.write_diffusers(parts, states, configs, out, bases)
    return max(errors)


def _fill(state: dict[str, Tensor], rank: int) -> None:
    """Fill up layers of a lower rank with zeros: one rank and alpha then holds for all, which every loader reads."""
    for key, tensor in state.items():
        axis = int(key.endswith(lora.UP))
        if tensor.shape[axis] < rank:
            shape = [*tensor.shape[:axis], rank - tensor.shape[axis], *tensor.shape[axis + 1 :]]
            state[key] = torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)


# --- whole components -----------------------------------------------------------------------------------------------


def component_soup(mix: Mix, component: str) -> WeightSoup:
    """The weights of a component, computed one at a time; a member that does not change it counts as the base."""
    origin = mix.base.tensors(component)
    parts: list[Full | Lora] = []
    for member in mix.members:
        if component in member.weights:
            parts.append(Full(weights_of(member.weights[component], component, mix.base)))
        else:
            parts.append(renamed_layers(member.lora(component), list(origin)))
    common = set(origin).intersection(*(part.weights for part in parts if isinstance(part, Full)))
    # Buffers that the class computes itself, and a member lacks, are left out.
    shared = origin.select(dict(zip(sorted(common), sorted(common), strict=True)))
    return WeightSoup(parts, mix.weights, mix.merge, shared)


def _write_component(mix: Mix, component: str, out: Path) -> None:
    mixed = component_soup(mix, component)
    origin = mix.base.tensors(component)
    layouts = {name: Layout(mixed.dtype(name), origin.layout(name).shape) for name in mixed.names}
    out.mkdir(parents=True, exist_ok=True)
    for file in (mix.base.folder / component).glob("*.json"):
        if ".index." not in file.name:  # the result has no shards
            shutil.copyfile(file, out / file.name)
    config, floats = out / "config.json", [one.dtype for one in layouts.values() if one.dtype.is_floating_point]
    said = read_json(config)
    for key in said.keys() & {"dtype", "torch_dtype"}:  # transformers loads in this precision
        said[key] = str(Counter(floats).most_common(1)[0][0]).removeprefix("torch.")
    write_json(config, said)
    stem = "diffusion_pytorch_model" if mix.base.index[component][0] == "diffusers" else "model"
    write_stream(out / f"{stem}.safetensors", layouts, mixed.weight, file_metadata(None))


def _copy_rest(base: Base, changed: Sequence[str], out: Path) -> None:
    """The files of the base's pipeline, less the components that are written."""
    shutil.copytree(
        base.folder,
        out,
        ignore=lambda folder, _: changed if Path(folder) == base.folder else [],
        dirs_exist_ok=True,
    )
