"""Captioned real videos -> the clips of the stage, and a list of what cannot be used.

    folder          NAME.mp4 with NAME.txt or NAME.caption, in subfolders too
    table           metadata.jsonl, .csv or .parquet in a folder, or such a file alone: a file's name and its caption
    dataset         parquet or `save_to_disk` with encoded videos and captions

Videos are mp4, webm, mkv, mov, avi, and moving GIF or WebP. Here they are only named; `Clips.read` gives the bytes or
the file of one. One bad video, caption or row does not stop the stage: it becomes a fault, a line of quarantine.jsonl.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import DataError, MissingFileError
from alignkit.escape import get_logger
from alignkit.media import VIDEO_ENDINGS
from alignkit.pairs import RealVideo
from alignkit.paths import Bounds
from alignkit.records import Prompt
from data_pipelines.cells import read_cell
from data_pipelines.folders import CAPTIONS, caption_of
from data_pipelines.opening import TABLES, bounds_of, open_dataset
from data_pipelines.prompts import to_prompt
from data_pipelines.tables import read_rows, read_text

if TYPE_CHECKING:
    from datasets import Dataset

logger = get_logger(__name__)

ENDINGS = (*VIDEO_ENDINGS, ".gif", ".webp")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
VIDEO_COLUMNS = ("video", "file_name")
CAPTION_COLUMNS = ("caption", "text", "prompt")
_ROWS_WITHOUT = 100  # rows at the start of a table that may all lack a column, as single faults

Fault = dict[str, Any]  # source_id and reason


@dataclass(frozen=True, slots=True)
class Clip:
    """A real video: `id` is its name below the folder, or its row; all randomness of its pair is keyed by it."""

    id: str
    prompt: Prompt
    place: Any  # what `Clips.read` needs: a path, or the number of a row
    where: str  # for messages


@dataclass(frozen=True)
class Clips:
    """The clips in order, what was left out and why, and `read(place, where)`, which gives bytes or a path."""

    items: Sequence[Clip]
    faults: Sequence[Fault]
    read: Callable[[Any, str], bytes | Path]


@dataclass
class _Found:
    """What is found while a folder or table is read."""

    items: list[Clip] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    names: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, where: str, place: Any, caption: Any) -> None:
        """A clip, or a fault where its caption is none. A name that comes again gets a number."""
        self.names[name] += 1
        count = self.names[name]
        name = name if count == 1 else f"{name}#{count}"
        try:
            prompt = to_prompt(caption, where, column="caption")
        except DataError as error:
            self.leave_out(name, error)
            return
        if prompt.text:
            self.items.append(Clip(name, prompt, place, where))
        else:
            self.leave_out(name, f"{where}: the caption is empty; write one")

    def leave_out(self, name: str, reason: object) -> None:
        """A fault."""
        self.faults.append({"source_id": name, "reason": str(reason)})


def read_clips(
    path: str | Path, *, video_column: str | None = None, caption_column: str | None = None, root: Path | None = None
) -> Clips:
    """The captioned videos at `path`, see above; `root` is where files may be that rows name (default: the folder).

    Columns are `video` or `file_name`, and `caption`, `text` or `prompt`, unless they are named. Of data with several
    splits the first one is read, "train" where there is one. Raises MissingFileError where nothing is at `path`,
    DataError without any clip, for columns that no row has, and for files that cannot be read at all.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"'{path}' does not exist; give a folder or dataset of captioned videos")
    columns = (_wanted(video_column, VIDEO_COLUMNS), _wanted(caption_column, CAPTION_COLUMNS))
    table = path if path.is_file() else next((path / name for name in METADATA if (path / name).is_file()), None)
    if table is not None and (table != path or table.suffix.lower() in TABLES):
        found, read = _from_table(table, Bounds(table.parent, (root or table.parent,)), columns)
    elif path.is_dir() and any(map(_is_video, path.rglob("*"))) and not any(path.rglob("*.parquet")):
        found, read = _from_folder(path)
    else:
        found, read = _from_dataset(path, columns, root)
    for fault in found.faults[:1]:
        logger.warning(
            "%s: %d videos or captions are left out, the first: %s", path, len(found.faults), fault["reason"]
        )
    if not found.items:
        first = f"; the first fault: {found.faults[0]['reason']}" if found.faults else ""
        raise DataError(f"'{path}' holds no video with a caption (NAME.mp4 with NAME.txt, or a table){first}")
    return Clips(found.items, found.faults, read)


def made_clips(videos: Sequence[RealVideo]) -> Clips:
    """The clips of videos that were made rather than read; a name that comes again gets a number.

    Raises DataError where there is none.
    """
    found = _Found()
    for number, video in enumerate(videos):
        found.add(video.id, f"video '{video.id}'", number, video.caption)
    if not found.items:
        raise DataError("the source of videos made none with a caption")
    return Clips(found.items, found.faults, lambda number, _: videos[number].read())


def _wanted(name: str | None, known: Sequence[str]) -> Sequence[str]:
    return known if name is None else (name,)


def _is_video(file: Path) -> bool:
    return file.suffix.lower() in ENDINGS and not file.name.startswith(".")


def _from_folder(folder: Path) -> tuple[_Found, Callable[[Any, str], bytes | Path]]:
    found, bounds = _Found(), Bounds(folder)
    videos = sorted(file for file in folder.rglob("*") if _is_video(file))
    for video in videos:
        name = video.relative_to(folder).as_posix()
        try:
            caption = caption_of(video)
            text = read_text(caption) if caption else None
        except DataError as error:
            found.leave_out(name, error)
            continue
        if text is None:
            found.leave_out(name, f"'{video}': a video without a caption; write one into {video.stem}.txt")
        else:
            found.add(name, f"'{video}'", name, text)
    stems = {video.with_suffix("") for video in videos}
    for file in sorted(file for file in folder.rglob("*") if file.suffix in CAPTIONS):
        if file.with_suffix("") not in stems:
            found.leave_out(file.relative_to(folder).as_posix(), f"'{file}': a caption without a video of its name")
    return found, bounds.file


def _from_table(
    table: Path, bounds: Bounds, columns: Sequence[Sequence[str]]
) -> tuple[_Found, Callable[[Any, str], bytes | Path]]:
    found, missing = _Found(), 0
    for number, (place, row) in enumerate(read_rows(table), start=1):
        where = f"'{table}', {place}"
        try:
            video, caption = (_present(row, names, where) for names in columns)
        except DataError as error:
            missing += 1
            if missing == number > _ROWS_WITHOUT:
                raise
            found.leave_out(place, error)
            continue
        name = row[video]["path"] if isinstance(row[video], dict) and "path" in row[video] else row[video]
        if isinstance(name, str) and name:
            found.add(name, f"{where}, '{name}'", name, row[caption])
        else:
            found.leave_out(place, f"{where}, {video}: expected the name of a file, not {type(name).__name__}")
    others = table.parent.rglob("*") if table.name in METADATA else ()
    named = {posixpath.normpath(name) for name in found.names}
    for file in sorted(filter(_is_video, others)):
        if (other := file.relative_to(table.parent).as_posix()) not in named:
            found.leave_out(other, f"'{file}': a video without a row in {table.name}")
    return found, bounds.file


def _present(row: Any, names: Sequence[str], where: str) -> str:
    for name in names:
        if name in row:
            return name
    raise DataError(f"{where}: none of the columns {', '.join(names)}; it has {', '.join(row)}")


def _from_dataset(
    path: Path, columns: Sequence[Sequence[str]], root: Path | None
) -> tuple[_Found, Callable[[Any, str], bytes | Path]]:
    from datasets import Video

    splits = open_dataset(path, root=root)
    rows: Dataset = splits.get("train", next(iter(splits.values())))
    video, caption = (_present(rows.features, names, f"'{path}'") for names in columns)
    if isinstance(rows.features[video], Video):
        rows = rows.cast_column(video, Video(decode=False))
    found, bounds = _Found(), bounds_of(path, root)
    for number, text in enumerate(rows[caption][:]):
        found.add(f"row-{number}", f"'{path}', row {number}, {video}", number, text)
    media = rows.select_columns([video])
    return found, lambda number, where: read_cell(media[number][video], bounds, where)
