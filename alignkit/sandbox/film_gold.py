"""The verifier of clips: analyses the pixels of a clip and decides where and how far it shows its caption.

Its only inputs are pixels and caption. A pixel belongs to an object as in `gold.py`; connected pixels of one frame form
an object. Its colour is that of most of its pixels. Its overlap with a shape is the intersection over union of its soft
mask with that of the shape drawn at the same centre and with the same area, so it is graded and needs no search.

A frame is faulty if it has another number of objects than the caption, or an object of the caption is not there: no
object of its colour overlaps with its shape by FAULTY, or another shape fits better by CLEARLY. It is right above
RIGHT; in between it is what the frame before was. A fault lasts at least LEAST_FAULT frames; shorter ones do not
count, since one frame is within the noise of a video codec. Motion is judged on the whole clip, by the object's colour
alone: otherwise a training that improves shapes would seem to add motion. Not judged: the ground, sizes, and the places
of still objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from alignkit.errors import ConfigError, DataError, nearest
from alignkit.records import Prompt, Scores
from alignkit.sandbox import scenes
from alignkit.sandbox.clips import DIRECTIONS
from alignkit.sandbox.film_captions import parse
from alignkit.sandbox.films import COLORS, FRAMES, SEGMENTS, SHAPES, SIZE, FilmSpec

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_AREA = 10  # pixels; the smallest drawn object covers about 45
FAULTY, RIGHT = 0.6, 0.75  # overlap with the wanted shape
CLEARLY = 0.05  # by so much another shape must fit better to be a fault
LEAST_FAULT = 2  # frames
MOVES, FAST = 3.0, 10.0  # pixels from the first frame to the last; slow paths have 5 to 8, fast ones 12 to 17
STRAIGHT = 0.5  # largest share of a motion across its direction
REACH = 9  # pixels from an object's centre to the edge of its window
PARTS = ("total", "graded", "frames", "segments", "direction", "speed", "still", "dynamic", "pixels", "flicker")
_PALETTE = np.array([scenes.PALETTE[name] for name in COLORS], np.float32) / 255
# Pixels that a shape of radius 1 covers.
_AREAS = np.array([4 * 0.86**2, np.pi * (1 - 0.48**2), 8 * 0.32 - 4 * 0.32**2], np.float32)
_IN_PLANE = np.zeros((3, 3, 3), bool)
_IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)


@dataclass(frozen=True, slots=True)
class Sightings:
    """The objects of all frames, N rows: frame, colour (index of COLORS), overlap with each shape [N, 3], x and y."""

    frame: NDArray[np.int64]
    color: NDArray[np.int64]
    overlap: NDArray[np.float32]
    x: NDArray[np.float32]
    y: NDArray[np.float32]


@dataclass(frozen=True)
class Reading:
    """What the verifier found in a clip of F frames for a caption with K objects.

    `overlap` [K, F]: of each wanted object with its shape, 0 where no object has its colour. `fits` [K, F]: whether an
    object has its colour and no other shape overlaps more. `scores` [F]: graded
    share of wanted objects that are there, 1 is best; more objects than wanted lower it. `is_faulty` [F].
    `shifts` [K, 2]: pixels (x, y) from the first frame to the last along a line fitted to the places of each wanted
    object's colour; NaN if it is mostly not seen.
    """

    spec: FilmSpec
    overlap: NDArray[np.float32]
    fits: NDArray[np.bool_]
    scores: NDArray[np.float32]
    is_faulty: NDArray[np.bool_]
    shifts: NDArray[np.float32]

    @cached_property
    def segment_scores(self) -> NDArray[np.float32]:
        """Mean score of each of the SEGMENTS [8]."""
        return np.array([self.scores[start:end].mean() for start, end in SEGMENTS], np.float32)

    @cached_property
    def segment_is_right(self) -> NDArray[np.bool_]:
        """Whether fewer than half of a segment's frames (of 5: fewer than 2) are faulty, [8]."""
        faulty = np.array([self.is_faulty[start:end].sum() for start, end in SEGMENTS])
        return faulty < LEAST_FAULT

    @cached_property
    def has_direction(self) -> bool:
        """Whether the wanted object moves in the wanted direction; without a direction, whether all stand still."""
        if self.spec.direction is None:
            return self.rests_are_still
        along, across = self.path
        return bool(along >= MOVES and abs(across) <= STRAIGHT * along)

    @cached_property
    def has_speed(self) -> bool:
        """Whether the path has the length that the caption says; without a direction, whether all stand still."""
        if self.spec.direction is None:
            return self.rests_are_still
        along, _ = self.path
        return bool(MOVES <= along < FAST if self.spec.speed == "slowly" else along >= FAST)

    @cached_property
    def path(self) -> tuple[float, float]:
        """Pixels of the first object's shift along and across the wanted direction."""
        ux, uy = DIRECTIONS[self.spec.direction or "left"]
        x, y = self.shifts[0]
        return float(x * ux + y * uy), float(x * uy + y * ux)

    @cached_property
    def rests_are_still(self) -> bool:
        """Whether the objects that shall not move stand still."""
        rests = self.shifts[0 if self.spec.direction is None else 1 :]
        return bool((np.hypot(*rests.T) < MOVES).all())

    @cached_property
    def pixels(self) -> float:
        """Length of the longest shift of a wanted object; 0 if none is seen."""
        lengths = np.nan_to_num(np.hypot(*self.shifts.T))
        return float(lengths.max())

    @cached_property
    def is_right(self) -> bool:
        """Whether no frame is faulty and the motion is that of the caption."""
        moves_well = self.has_direction and self.has_speed and self.rests_are_still
        return not self.is_faulty.any() and moves_well


def _classes(frames: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each pixel [F, H, W] the nearest colour and the share of the way to it from the ground, at most 1."""
    edge = np.ones((SIZE, SIZE), bool)
    edge[2:-2, 2:-2] = False
    ground = np.median(frames[:, edge], axis=1)[:, None, None]
    offset = frames - ground
    axes = _PALETTE - ground[:, 0]  # [F, colours, 3]
    squared = np.square(axes).sum(-1)
    along = np.einsum("fhwc,fkc->fhwk", offset, axes)
    best = (along / np.sqrt(squared)[:, None, None]).argmax(-1)
    share = np.take_along_axis(along / squared[:, None, None], best[..., None], -1)[..., 0]
    return best, np.clip(share, 0, 1)


def look(frames: NDArray[np.float32]) -> Sightings:
    """All objects in the frames [F, 32, 32, 3] in [0, 1] of a clip."""
    classes, share = _classes(frames)
    labels, count = ndimage.label(share > 0.5, _IN_PLANE)
    names = labels * len(COLORS) + classes
    votes = np.bincount(names[labels > 0], minlength=(count + 1) * len(COLORS)).reshape(-1, len(COLORS))
    kept = np.flatnonzero(votes.sum(1) >= SMALLEST_AREA)
    color = votes[kept].argmax(1)
    centres = np.array(ndimage.center_of_mass(share, labels, kept), np.float32).reshape(-1, 3)
    frame = centres[:, 0].round().astype(np.int64)
    masks, corner = _windows(labels, classes, share, (kept, color, frame, centres[:, 1:]))
    area = masks.sum((1, 2)) + 1e-6
    steps = np.arange(2 * REACH + 1, dtype=np.float32) + 0.5
    x = (masks.sum(1) * steps).sum(1) / area
    y = (masks.sum(2) * steps).sum(1) / area
    overlap = _overlaps(masks, area, steps - x[:, None], steps - y[:, None])
    return Sightings(frame, color, overlap, x + corner[:, 1], y + corner[:, 0])


def _windows(
    labels: NDArray[np.int64],
    classes: NDArray[np.int64],
    share: NDArray[np.float32],
    objects: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Soft masks [N, 19, 19] of the objects (label, colour, frame, centre), and their windows' corners [N, 2] (y, x).

    A mask is the share of each pixel within one pixel of the object; pixels that have clearly another colour have none.
    """
    kept, color, frame, centres = objects
    corner = centres.round().astype(np.int64) - REACH
    pad = ((0, 0), (REACH + 1, REACH + 1), (REACH + 1, REACH + 1))
    steps = np.arange(2 * REACH + 3)
    rows, columns = corner[:, :1] + REACH + steps, corner[:, 1:] + REACH + steps
    index = (frame[:, None, None], rows[:, :, None], columns[:, None, :])
    own = np.pad(labels, pad)[index] == kept[:, None, None]
    near = ndimage.binary_dilation(own, _IN_PLANE)
    other = (np.pad(classes, pad)[index] != color[:, None, None]) & (np.pad(share, pad)[index] > 0.5)
    masks = np.where(near & ~other, np.pad(share, pad)[index], 0)
    return masks[:, 1:-1, 1:-1], corner


def _overlaps(
    masks: NDArray[np.float32], area: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Intersection over union [N, 3] of masks with every shape of the same area, at pixels x, y [N, 19] from it."""
    found = []
    for shape, unit in zip(SHAPES, _AREAS, strict=True):
        radius = np.sqrt(area / unit)[:, None, None]
        distance = scenes.distance(shape, x[:, None, :], y[:, :, None], radius)
        template = np.clip(0.5 - distance, 0, 1)
        found.append(np.minimum(masks, template).sum((1, 2)) / np.maximum(masks, template).sum((1, 2)))
    return np.stack(found, axis=1)


def read(frames: NDArray[np.float32], spec: FilmSpec) -> Reading:
    """What a clip [33, 32, 32, 3] in [0, 1] shows of `spec`."""
    seen = look(frames)
    count = np.bincount(seen.frame, minlength=len(frames))
    wanted = len(spec.kinds)
    overlap = np.zeros((wanted, len(frames)), np.float32)
    excess = np.zeros_like(overlap)  # by how much another shape fits better
    shifts = np.empty((wanted, 2), np.float32)
    for index, (shape, color) in enumerate(spec.kinds):
        own = SHAPES.index(shape)
        rows = np.flatnonzero(seen.color == COLORS.index(color))
        rows = rows[np.argsort(seen.overlap[rows, own], kind="stable")]  # of several in a frame the best is kept
        overlap[index, seen.frame[rows]] = seen.overlap[rows, own]
        excess[index, seen.frame[rows]] = seen.overlap[rows].max(1) - seen.overlap[rows, own]
        track = np.full((len(frames), 2), np.nan, np.float32)
        track[seen.frame[rows]] = np.stack([seen.x[rows], seen.y[rows]], axis=1)
        shifts[index] = _shift(track)
    scores = overlap.sum(0) / np.maximum(count, wanted)
    is_counted = count == wanted
    fits = (overlap > 0) & (excess <= 0)
    is_right = is_counted & ((overlap >= RIGHT) & fits).all(0)
    is_wrong = ~is_counted | ((overlap < FAULTY) | (excess > CLEARLY)).any(0)
    return Reading(spec, overlap, fits, scores, _lasting(is_right, is_wrong), shifts)


def _shift(track: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pixels from the first frame to the last on the line fitted to `track` [F, 2]; NaN if under half is known."""
    known = np.flatnonzero(~np.isnan(track[:, 0]))
    if 2 * len(known) < len(track):
        return np.full(2, np.nan, np.float32)
    slope = np.polyfit(known, track[known], 1)[0]
    return np.asarray(slope * (len(track) - 1), np.float32)


def _lasting(is_right: NDArray[np.bool_], is_wrong: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Faulty frames [F]: undecided frames follow the one before, and faults shorter than LEAST_FAULT do not count."""
    known = np.flatnonzero(is_right | is_wrong)
    if not len(known):
        return np.zeros(len(is_right), bool)
    source = known[np.maximum(np.searchsorted(known, np.arange(len(is_right)), side="right") - 1, 0)]
    runs, _ = ndimage.label(is_wrong[source])
    lengths = np.bincount(runs)
    return np.asarray((runs > 0) & (lengths[runs] >= LEAST_FAULT))


def flicker(frames: NDArray[np.float32]) -> float:
    """Mean absolute second difference in time of a frame's mean brightness, in units of 1/255."""
    return float(np.abs(np.diff(frames.mean((1, 2, 3)), n=2)).mean() * 255)


class FilmGoldReward:
    """The verifier as a reward: 1.0 where a clip shows its caption, else 0.0. Evaluation only: no gradient.

    Parts: `graded` (mean score of the frames), `frames` (share without a fault), `segments` (share that is right),
    `direction`, `speed`, `still` (each 0 or 1), `dynamic` (1 if an object moves by 3 pixels), `pixels` (how far),
    and `flicker` (of the brightness, in 1/255).

    With `part` one of them is the score instead: `dynamic` shows whether a training loses motion. Raises ConfigError
    for another name.
    """

    name = "film_gold"
    modality = "video"
    needs_prompt = True
    differentiable = False
    comparable_across_prompts = True
    native_range = (0.0, 1.0)
    licence = "Apache-2.0"
    source = "alignkit.sandbox.film_gold"

    def __init__(self, part: str = "total") -> None:
        if part not in PARTS:
            raise ConfigError(f"film_gold: part '{part}' is none of {', '.join(PARTS)}.{nearest(part, PARTS)}")
        self._part = part

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Verdicts [B] of media [B, 33, 3, 32, 32] in [0, 1]; raises DataError for a text outside the grammar of
        `film_captions`, for media of another shape or number than prompts, and for pixels that are not finite.
        """
        import torch

        clips = _clips(media, prompts)
        rows = [_parts(clip, parse(prompt.text)) for clip, prompt in zip(clips, prompts, strict=True)]
        columns = torch.tensor([list(row.values()) for row in rows], dtype=torch.float32).unbind(1)
        parts = dict(zip(rows[0], columns, strict=True))
        return Scores(parts.pop(self._part), parts)

    def score_segments(
        self, media: Tensor, prompts: Sequence[Prompt], segments: Sequence[Sequence[tuple[int, int]]]
    ) -> list[list[float]]:
        """Mean graded score of the frames [start, end) of each clip's segments; motion does not count. Raises as above.

        See `alignkit.protocols.SegmentScoring`.
        """
        found = []
        for clip, prompt, own in zip(_clips(media, prompts), prompts, segments, strict=True):
            scores = read(clip, parse(prompt.text)).scores
            found.append([float(scores[start:end].mean()) for start, end in own])
        return found


def _parts(clip: NDArray[np.float32], spec: FilmSpec) -> dict[str, float]:
    """The verdict `total` on a clip, and its parts."""
    reading = read(clip, spec)
    values = (
        reading.is_right,
        float(reading.scores.mean()),
        1 - float(reading.is_faulty.mean()),
        float(reading.segment_is_right.mean()),
        reading.has_direction,
        reading.has_speed,
        reading.rests_are_still,
        reading.pixels >= MOVES,
        reading.pixels,
        flicker(clip),
    )
    return dict(zip(PARTS, values, strict=True))


def _clips(media: Tensor, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    """`media` as frames [B, 33, 32, 32, 3]."""
    expected = (FRAMES, 3, SIZE, SIZE)
    if tuple(media.shape[1:]) != expected or len(media) != len(prompts) or not len(media):
        raise DataError(
            f"film_gold: media {list(media.shape)}, {len(prompts)} prompts; give [B, {', '.join(map(str, expected))}] "
            "and B prompts"
        )
    if not media.isfinite().all():
        raise DataError("film_gold: a pixel is NaN or infinite; look at the generator or its precision")
    frames: NDArray[np.float32] = media.detach().float().cpu().permute(0, 1, 3, 4, 2).numpy()
    return frames
