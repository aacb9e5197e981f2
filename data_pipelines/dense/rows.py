"""Rows of the dense format: the request of each pair, its columns, and a pair made again from its row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import DataError
from alignkit.pairs import Pair, PairMaker, PairRequest
from alignkit.records import Sampling
from alignkit.seeds import derive_seed
from alignkit.segments import ETAS
from data_pipelines.dense.clips import Clip
from data_pipelines.dense.config import PairsConfig
from data_pipelines.dense.decoding import decoded

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

# Columns beside the VAE's that say which generator made a pair: fingerprints of its weights and of its noise schedule.
WEIGHTS, SCHEDULE = "weights", "schedule"
LATENTS = "latents"  # column, and the name of the tensor in each cell's safetensors bytes
_SEEDS = 2.0**63  # every seed is below it


def request_for(clip: Clip, config: PairsConfig) -> PairRequest:
    """What the pair of `clip` depends on, drawn from the seed of the run and the clip's id."""
    low, high = config.eta
    draws = [derive_seed(config.seed, clip.id, "eta", copy) / _SEEDS for copy in range(2)]
    etas = [low + (high - low) * (draws[0] if config.same_eta else draw) for draw in draws]
    if config.real_first:
        etas[0] = 0.0
    if config.kind == "vanilla":
        etas = [1.0, 1.0]
    seeds = [derive_seed(config.seed, clip.id, copy) for copy in range(2)]
    return PairRequest(clip.prompt.text, (seeds[0], seeds[1]), (etas[0], etas[1]), config.eta_meaning)


def request_of(row: Mapping[str, Any]) -> PairRequest:
    """The request that a row was made from."""
    return PairRequest(row["prompt"], tuple(row["seeds"]), tuple(row[ETAS]), row["eta_meaning"])


def rebuild_pair(row: Mapping[str, Any], data: bytes | Path | None, maker: PairMaker) -> Pair:
    """The pair of `row` made again from its video `data`; None for a vanilla pair.

    On the same machine, thread count and library versions the latents are equal to the last bit before they are stored
    (`latents_dtype`). Raises DataError where the video, the VAE, the weights, the noise schedule or the settings of
    sampling are others.
    """
    where = f"source_id '{row['source_id']}'"
    if maker.codec != row["codec"]:
        raise DataError(
            f"{where}: made with the VAE {row['codec']}, and here is {maker.codec}; load the model of the row"
        )
    for column, own, advice in (
        (WEIGHTS, maker.weights, "load the model, the adapters and the precision of the row"),
        (SCHEDULE, maker.schedule, "give the model the scheduler of the row, with its shift"),
    ):
        if row.get(column) and own != row[column]:
            raise DataError(f"{where}: made with the {column} {row[column]}, and here are {own}; {advice}")
    sampling = sampling_of(row)
    if maker.sampling.plain() != sampling.plain():
        raise DataError(
            f"{where}: made with the sampling {row['sampling']}, and here is {maker.sampling.to_json()}; build the "
            "maker with `sampling_of(row)`"
        )
    if data is None:
        return maker.make(request_of(row), None)
    clip = decoded(data, where, sampling)
    if clip.sha256 != row["source_sha256"]:
        raise DataError(
            f"{where}: the video is another file than the row's (SHA-256 {row['source_sha256']}); give that file"
        )
    return maker.make(request_of(row), clip.frames)


def sampling_of(row: Mapping[str, Any]) -> Sampling:
    """The settings of sampling in a row."""
    return Sampling(**json.loads(row["sampling"]))


def pair_row(clip: Clip, request: PairRequest, pair: Pair, config: PairsConfig, sampling: Sampling) -> dict[str, Any]:
    """The columns of one pair, without its videos, those of the maker (`generator`, `codec` ...) and of the file.

    `eta` and `sigma_start` are null where the copies differ in them.
    """
    segments = config.segments(sampling.num_frames, sampling.fps)
    sigmas, etas = list(pair.sigma_starts), list(request.etas)
    label = 0 if not config.shortcut else 1 if etas[0] <= etas[1] else -1  # what is nearer to the real video is better
    return {
        "prompt_id": clip.prompt.id,
        "prompt": clip.prompt.text,
        "source_id": clip.id,
        LATENTS: [{"bytes": stored_latents(row, config.latents_dtype), "path": None} for row in pair.latents],
        "kind": config.kind,
        "eta": etas[0] if etas[0] == etas[1] else None,
        "sigma_start": sigmas[0] if sigmas[0] == sigmas[1] else None,
        ETAS: etas,
        "sigma_starts": sigmas,
        "eta_meaning": request.meaning,
        "seeds": list(request.seeds),
        "fps": sampling.fps,
        "num_frames": sampling.num_frames,
        "segments": segments,
        "labels": [label] * len(segments) if config.shortcut else [],
        "label_source": config.shortcut,
        "sampling": sampling.to_json(),
    }


def stored_latents(latents: Tensor, dtype: str) -> bytes:
    """Latents [C, T, h, w] as the bytes of a safetensors file with the one tensor `latents`."""
    import torch
    from safetensors.torch import save

    return save({LATENTS: latents.detach().to(vars(torch)[dtype]).cpu().contiguous()})


def table_of(rows: Sequence[Mapping[str, Any]], *, videos: bool) -> pa.Table:
    """The rows as a table that `datasets.load_dataset` opens."""
    import pyarrow as pa
    from datasets import Features, List, Value, Video

    text, number, whole = Value("string"), Value("float64"), Value("int64")
    medium = List({"bytes": Value("large_binary"), "path": text})
    texts = (
        "prompt_id",
        "prompt",
        "source_id",
        "source_sha256",
        "kind",
        "eta_meaning",
        "sampling",
        "generator",
        WEIGHTS,
        SCHEDULE,
        "codec",
    )
    named: dict[str, Any] = {**dict.fromkeys(texts, text), LATENTS: medium}
    named |= {"eta": number, "sigma_start": number, ETAS: List(number), "sigma_starts": List(number)}
    named |= {"seeds": List(whole), "fps": number, "num_frames": whole, "segments": List(List(whole))}
    named |= {"labels": List(Value("int8")), "label_source": text}
    if videos:
        named["videos"] = List(Video(decode=False))
    return pa.Table.from_pylist(list(rows), schema=Features(named).arrow_schema)
