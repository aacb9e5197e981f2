"""The dense-pairs stage: a pair of latents for each real video, stored in parts, resumable.

Decoding runs in threads ahead of the generator; a part is written when its last video is done. Not here: how a pair is
computed (`alignkit.generators.pairs`), and labels, which later stages add.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alignkit.claims import claim
from alignkit.errors import DataError
from alignkit.locks import locked
from alignkit.media import clip_preview, encode_clip
from alignkit.pairs import PairMaker
from alignkit.records import Sampling
from alignkit.storage import (
    STAGE_FILES,
    Part,
    StageResult,
    finish_run,
    finished_part,
    part_name,
    write_atomic,
    write_part,
    write_quarantine,
    write_text,
)
from data_pipelines.dense.card import card_text
from data_pipelines.dense.clips import Clip, Clips, Fault
from data_pipelines.dense.config import PairsConfig
from data_pipelines.dense.decoding import Decoded, ahead, decode_listed
from data_pipelines.dense.rows import SCHEDULE, WEIGHTS, pair_row, rebuild_pair, request_for, table_of

__all__ = ["make_pairs", "rebuild_pair"]

STAGE = "dense-pairs"
PREVIEWS = "clips"  # folder


def make_pairs(
    clips: Clips,
    config: PairsConfig,
    sampling: Sampling,
    out_dir: str | Path,
    *,
    build_maker: Callable[[], PairMaker],
    identity: str = "",
) -> StageResult:
    """A pair for every clip into `out_dir/data/part-*.parquet`, one row a pair, with manifest and dataset card.

    A clip that cannot be used is left out and has a line in `quarantine.jsonl`, as have those that `clips.faults`
    names. `identity` stands for the weights of the maker: where it differs from that of an earlier run in `out_dir`,
    the run is refused. The maker, which has `sampling` itself, is built only when a part is missing.

    Raises DataError where no pair is left, ResumeError, StorageError; what the maker raises.
    """
    folder = Path(out_dir)
    digest = hashlib.sha256("".join(f"{clip.id}\x1f{clip.prompt.text}\x1e" for clip in clips.items).encode())
    inputs = {"clips": len(clips.items), "clips_sha256": digest.hexdigest(), "generator": identity}
    settings = {name: value for name, value in asdict(config).items() if name != "workers"}
    record = {"stage": STAGE, "config": settings | {"sampling": sampling.plain()}, "inputs": inputs}
    with locked(folder):
        claim(folder, record, writes=(*STAGE_FILES, PREVIEWS))
        names = [part_name(index) for index in range(-(-len(clips.items) // config.part_size))]
        parts = {name: part for name in names if (part := finished_part(folder, name))}
        missing = [name for name in names if name not in parts]
        if missing:
            parts |= _Writer(folder, clips, config, sampling, build_maker()).write(missing)
        return _finish(folder, [parts[name] for name in names], clips.faults, settings)


@dataclass(frozen=True)
class _Writer:
    """Makes and writes the missing parts with a maker that is built."""

    folder: Path
    clips: Clips
    config: PairsConfig
    sampling: Sampling
    maker: PairMaker

    def write(self, names: Sequence[str]) -> dict[str, Part]:
        """The parts `names`. While one clip is denoised the next ones are decoded, across parts too."""
        size = self.config.part_size
        numbers_of = {name: range(len(self.clips.items))[int(name[5:]) * size :][:size] for name in names}
        numbers = [number for rows in numbers_of.values() for number in rows]
        bar = tqdm(total=len(numbers), desc=STAGE, unit="pair")
        with bar, ahead(self._decode, numbers, self.config.workers) as decoded:
            return {name: self._part(name, rows, decoded, bar) for name, rows in numbers_of.items()}

    def _decode(self, number: int) -> Decoded | DataError | None:
        """None for a vanilla pair, which needs no video."""
        if self.config.kind == "vanilla":
            return None
        return decode_listed(self.clips, self.clips.items[number], self.sampling)

    def _part(self, name: str, numbers: range, decoded: Any, bar: tqdm[Any]) -> Part:
        rows, faults = [], []
        for number in numbers:
            clip, video = self.clips.items[number], next(decoded)
            if isinstance(video, DataError):
                faults.append({"source_id": clip.id, "prompt": clip.prompt.text, "reason": str(video)})
            else:
                rows.append(self._row(number, clip, video))
            del video  # before the next one is waited for
            bar.update()
        # A file without rows cannot be opened by `datasets`.
        tables = {f"data/{name}.parquet": table_of(rows, videos=self.config.videos)} if rows else {}
        notes = {"rows": len(rows), "quarantined": faults}
        return write_part(self.folder, name, tables, notes=notes, row_group_size=1)  # one pair is read without others

    def _row(self, number: int, clip: Clip, video: Decoded | None) -> Mapping[str, Any]:
        request = request_for(clip, self.config)
        pair = self.maker.make(request, None if video is None else video.frames)
        row = pair_row(clip, request, pair, self.config, self.sampling)
        row |= {"source_sha256": "" if video is None else video.sha256}
        row |= {"generator": self.maker.name, "codec": self.maker.codec}
        row |= {WEIGHTS: self.maker.weights, SCHEDULE: self.maker.schedule}
        fps, shown = self.sampling.fps, self.config.videos or self.config.previews
        both = self.maker.decode(pair.latents) if shown else ()
        if self.config.videos:
            row["videos"] = [{"bytes": encode_clip(frames, fps), "path": None} for frames in both]
        for copy, frames in enumerate(both if self.config.previews else ()):
            write_atomic(self.folder / PREVIEWS / f"{number:06d}-{copy}.webp", clip_preview(frames, fps))
        return row


def _finish(folder: Path, parts: Sequence[Part], faults: Sequence[Fault], config: Mapping[str, Any]) -> StageResult:
    quarantined = [*faults, *(fault for part in parts for fault in part.notes["quarantined"])]
    path = write_quarantine(folder, quarantined)
    rows = sum(part.notes["rows"] for part in parts)
    if not rows:
        raise DataError(f"no pair is left: all {len(quarantined)} videos are in quarantine, see '{path}'; correct them")
    counts = {"pairs": rows, "quarantined": len(quarantined)}
    write_text(folder / "README.md", card_text(config, counts))
    return finish_run(folder, STAGE, parts, rows=rows, counts=counts)
