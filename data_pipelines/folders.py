"""Folders of images with captions in text files -> rows that name the files.

    pairs       w/NAME.png and l/NAME.png, caption in w/NAME.txt
    captioned   NAME.png with NAME.txt or NAME.caption, as kohya's scripts read them; also in folders `10_NAME`

The number in `10_NAME` is how often its images are repeated in an epoch. Where all are equal they change nothing and
are left out; otherwise rows are repeated in their smallest ratio. Images without a caption (or partner) and captions
without an image are counted. Not here: folders with a metadata file, which `datasets` reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkit.errors import DataError
from alignkit.paths import Bounds
from data_pipelines.tables import read_text

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
CAPTIONS = (".txt", ".caption")
REPEATS = re.compile(r"(\d+)_.*")

Say = Callable[..., None]  # as `logger.warning`


@dataclass(frozen=True, slots=True)
class FolderRow:
    """A caption and the image files that belong to it, the better one first."""

    text: str
    files: tuple[Path, ...]


def pair_rows(folder: Path, say: Say) -> list[FolderRow]:
    """Rows of w/ and l/. Raises DataError naming a file of a pair that is missing, empty or outside `folder`."""
    winners = _images(folder / "w")
    if not winners:
        raise DataError(
            f"'{folder / 'w'}' holds no image ({', '.join(IMAGES)}); name pairs of videos in a JSON lines file with "
            "prompt, chosen and rejected"
        )
    rows = [_pair_row(folder, winner, folder / "l" / winner.name) for winner in winners]
    names = {winner.stem for winner in winners}
    for what, files in (
        ("images in l/ without a partner in w/", _images(folder / "l")),
        ("captions in w/ without an image", _captions(folder / "w")),
    ):
        _report(folder, what, [file for file in files if file.stem not in names], say)
    return rows


def is_captioned_folder(folder: Path) -> bool:
    """Whether images with captions beside them are in `folder`, or in folders `10_NAME` in it."""
    return any(caption_of(image) for part in _parts(folder) for image in _images(part))


def captioned_rows(folder: Path, say: Say) -> list[FolderRow]:
    """Rows of one image each, repeated as the module's docstring says."""
    parts = _parts(folder)
    shared = math.gcd(*parts.values())
    rows: list[FolderRow] = []
    for part, repeats in parts.items():
        rows += _part_rows(folder, part, say) * (repeats // shared)
    named = [f"{part.name} {repeats // shared} times" for part, repeats in parts.items() if part != folder]
    if len(set(parts.values())) > 1:
        say("%s: repeats of folders are kept in their smallest ratio: %s", folder, ", ".join(named))
    elif shared > 1:
        say("%s: every folder has %d repeats, which change nothing and are left out", folder, shared)
    return rows


def unused_files(folder: Path, used: Iterable[str], endings: Sequence[str], say: Say) -> None:
    """Count the media files below `folder` that are not in `used` (paths)."""
    known = {Path(path).resolve() for path in used}
    files = (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in endings)
    _report(folder, "files without a row in the metadata", [file for file in files if file.resolve() not in known], say)


def _parts(folder: Path) -> dict[Path, int]:
    """The folders that hold images and how often each is repeated: `folder` itself, then those named `10_NAME`."""
    named = {part: REPEATS.fullmatch(part.name) for part in sorted(folder.iterdir()) if part.is_dir()}
    repeats = {part: int(match[1]) for part, match in named.items() if match and _images(part)}
    if 0 in repeats.values():
        raise DataError(f"'{folder}': a folder with 0 repeats; move it away, or name it 1_NAME")
    return {**({folder: 1} if _images(folder) else {}), **repeats}


def _part_rows(folder: Path, part: Path, say: Say) -> list[FolderRow]:
    bounds, images = Bounds(folder), _images(part)
    captions = {image: caption_of(image) for image in images}
    names = {image.stem for image in images}
    _report(part, "images without a caption", [image for image, caption in captions.items() if not caption], say)
    _report(part, "captions without an image", [file for file in _captions(part) if file.stem not in names], say)
    return [
        FolderRow(read_text(caption), (bounds.file(str(image.absolute()), f"'{image}'"),))
        for image, caption in captions.items()
        if caption
    ]


def caption_of(image: Path) -> Path | None:
    """NAME.txt or NAME.caption; DataError where both are there."""
    files = [file for ending in CAPTIONS if (file := image.with_suffix(ending)).is_file()]
    if len(files) > 1:
        raise DataError(f"'{image}' has two captions, {files[0].name} and {files[1].name}; remove one")
    return files[0] if files else None


def _pair_row(folder: Path, winner: Path, loser: Path) -> FolderRow:
    caption, bounds = winner.with_suffix(".txt"), Bounds(folder)
    for file, what in ((winner, "winner"), (loser, "loser of the same name"), (caption, "caption")):
        if not file.is_file() or not file.stat().st_size:
            raise DataError(f"'{file}' ({what}) is missing or empty; every pair is w/NAME.png, l/NAME.png, w/NAME.txt")
    files = tuple(bounds.file(str(file.absolute()), f"'{file}'") for file in (winner, loser))
    return FolderRow(read_text(caption), files)


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGES)


def _captions(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in CAPTIONS)


def _report(folder: Path, what: str, files: Sequence[Path], say: Say) -> None:
    if files:
        say("%s: %d %s are not used, for example '%s'", folder, len(files), what, files[0].name)
