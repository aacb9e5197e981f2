"""The verifier: analyses the pixels of an image and decides whether the image shows its caption.

Its only inputs are pixels and caption: no scene graph, generator or seed. A pixel belongs to an object if its colour is
at least half-way from the ground's colour to a palette colour, measured along that direction (so anti-aliased edges
keep the hue of their object). Connected pixels of one colour form an object; its shape is that of the template with the
best overlap. Not judged: the background, sizes, and the quality of the image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from alignkit.errors import DataError
from alignkit.records import Prompt, Scores
from alignkit.sandbox.captions import parse
from alignkit.sandbox.scenes import PALETTE, SHAPES, SIZE, Spec, Thing, _obeys, coverage

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_AREA = 14  # pixels; the smallest drawn object covers about 40
TEMPLATE = 20  # pixels a side of a normalised object mask
RECOGNISED = 0.70  # least overlap at which a blob counts as a known shape
FAULTS = (
    "too many objects",
    "too few objects",
    "no known shape",
    "another shape",
    "colour of the other object",
    "another colour",
    "another position",
)
_COLORS = np.array(list(PALETTE.values()), np.float32) / 255


@dataclass(frozen=True, slots=True)
class Seen:
    """An object found in an image; `shape` is None where no template fits."""

    shape: str | None
    color: str
    x: float
    y: float
    area: int


def _ground(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """The ground's colour: the median of the two outermost pixel rows and columns."""
    edge = np.ones(image.shape[:2], bool)
    edge[2:-2, 2:-2] = False
    return np.median(image[edge], axis=0)


def _color_classes(image: NDArray[np.float32]) -> NDArray[np.int64]:
    """Palette index of each pixel [H, W], -1 for ground."""
    ground = _ground(image)
    axes = _COLORS - ground
    length = np.linalg.norm(axes, axis=1)
    offset = image - ground
    along = offset @ (axes / length[:, None]).T  # [H, W, colours], in units of the image
    cosine = along / (np.linalg.norm(offset, axis=-1, keepdims=True) + 1e-6)
    best = cosine.argmax(-1)
    share = np.take_along_axis(along, best[..., None], -1)[..., 0] / length[best]
    return np.where(share > 0.5, best, -1)


def _normalise(mask: NDArray[np.float32]) -> NDArray[np.float32]:
    """A mask cropped to its bounding box and stretched to TEMPLATE x TEMPLATE."""
    factors = (TEMPLATE / mask.shape[0], TEMPLATE / mask.shape[1])
    return np.asarray(ndimage.zoom(mask, factors, order=1, grid_mode=True, mode="nearest"), np.float32)


@cache
def _templates() -> dict[str, list[NDArray[np.float32]]]:
    """Normalised masks of every shape at several sizes."""
    templates: dict[str, list[NDArray[np.float32]]] = {}
    for shape in SHAPES:
        for radius in (6.0, 7.3, 9.0, 11.0):
            mask = coverage(Thing(shape, "white", SIZE / 2, SIZE / 2, radius)) > 0.5
            box = ndimage.find_objects(mask.astype(int))[0]
            templates.setdefault(shape, []).append(_normalise(mask[box].astype(np.float32)))
    return templates


def _shape_of(mask: NDArray[np.bool_]) -> str | None:
    """The shape whose template overlaps best (intersection over union), or None."""
    blob = _normalise(mask.astype(np.float32))
    best, name = 0.0, None
    for shape, masks in _templates().items():
        for template in masks:
            overlap = float(np.minimum(blob, template).sum() / np.maximum(blob, template).sum())
            if overlap > best:
                best, name = overlap, shape
    height, width = mask.shape
    stretched = max(height, width) > 1.6 * min(height, width)
    return None if best < RECOGNISED or stretched else name


def look(image: NDArray[np.float32]) -> list[Seen]:
    """All objects in an image [H, W, 3] in [0, 1]."""
    classes = _color_classes(image)
    objects = []
    for index, color in enumerate(PALETTE):
        labels, _ = ndimage.label(classes == index)
        for number, box in enumerate(ndimage.find_objects(labels), start=1):
            mask = labels[box] == number
            area = int(mask.sum())
            if area >= SMALLEST_AREA:
                rows, columns = np.nonzero(mask)
                x, y = columns.mean() + box[1].start + 0.5, rows.mean() + box[0].start + 0.5
                objects.append(Seen(_shape_of(mask), color, float(x), float(y), area))
    return objects


def fault(objects: Sequence[Seen], spec: Spec) -> str | None:
    """The first difference between the objects and `spec`, a value of FAULTS; None where they are exactly those."""
    if len(objects) != len(spec.kinds):
        return "too many objects" if len(objects) > len(spec.kinds) else "too few objects"
    if any(thing.shape is None for thing in objects):
        return "no known shape"
    if Counter(thing.shape for thing in objects) != Counter(shape for shape, _ in spec.kinds):
        return "another shape"
    asked = dict(spec.kinds)  # in "counting" all objects are of one kind, elsewhere no two share a shape
    wrong = {thing.color for thing in objects if asked[str(thing.shape)] not in (None, thing.color)}
    if wrong:
        return "colour of the other object" if wrong <= {*asked.values()} else "another colour"
    if spec.relation is not None:
        by_shape = {thing.shape: thing for thing in objects}
        first, second = (by_shape[shape] for shape in asked)
        if not _obeys(first.x - second.x, first.y - second.y, spec.relation, margin=1.0):
            return "another position"
    return None


def shows(objects: Sequence[Seen], spec: Spec) -> bool:
    """Whether the objects are exactly those of `spec` (no more, no fewer) and their positions obey its relation."""
    return fault(objects, spec) is None


class GoldReward:
    """The verifier as a reward: 1.0 where the image shows its caption, else 0.0. Evaluation only: no gradient."""

    name = "gold"
    modality = "image"
    needs_prompt = True
    differentiable = False
    comparable_across_prompts = True
    native_range = (0.0, 1.0)
    licence = "Apache-2.0"
    source = "alignkit.sandbox.gold"

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Verdicts [B] of media [B, 3, H, W] in [0, 1]; raises DataError for a text outside the caption grammar,
        for media of another shape or number than prompts, and for pixels that are not finite.
        """
        import torch

        if media.dim() != 4 or media.shape[1] != 3 or len(media) != len(prompts):
            raise DataError(f"gold: media {list(media.shape)}, {len(prompts)} prompts; give [B, 3, H, W] and B prompts")
        if not torch.isfinite(media).all():
            raise DataError("gold: a pixel is NaN or infinite; look at the generator or its precision")
        images = media.detach().float().cpu().permute(0, 2, 3, 1).numpy()
        verdicts = [
            float(shows(look(image), parse(prompt.text))) for image, prompt in zip(images, prompts, strict=True)
        ]
        return Scores(torch.tensor(verdicts))
