"""Sizes: which one a row is brought to, and batches whose rows are all of one size.

A row goes to the size bucket of its first image, with all its candidates. Without `resolution` that is the picture's
own size, cut to what the network takes; with it, of the sizes of nearly that area, the one of the nearest aspect, as in
the common LoRA scripts. Not here: how pixels are resampled (`media`).
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from alignkit.errors import ConfigError
from alignkit.escape import get_logger
from alignkit.seeds import derive_seed

logger = get_logger(__name__)
STEP = 64  # pixels between the sides of neighbouring buckets, where the resolution is not too small for it


@dataclass(frozen=True)
class Sizes:
    """What a config wishes: `resolution` and `bucket_step` in pixels a side, `num_frames` of clips at `fps`."""

    resolution: int | None = None
    bucket_step: int | None = None
    num_frames: int | None = None
    fps: float | None = None

    def bucket(self, height: int, width: int, multiple: int) -> tuple[int, int]:
        """(height, width) of the bucket of an image; its sides are multiples of `multiple`.

        Without `resolution` a side is 0 where the image is smaller than `multiple`.
        """
        if self.resolution is None:
            return height // multiple * multiple, width // multiple * multiple
        wished = self.bucket_step or min(STEP, self.resolution // 8)
        options = buckets(self.resolution, max(1, math.ceil(wished / multiple)) * multiple)
        return min(options, key=lambda size: abs(math.log(size[1] * height / (size[0] * width))))

    def frames(self, available: int, step: int) -> int:
        """Frames of a row whose shortest clip has so many: 1 + `step` k, as the codec's time axis asks."""
        return self.num_frames or 1 + (available - 1) // step * step


AS_THEY_ARE = Sizes()


@functools.cache
def buckets(resolution: int, step: int) -> tuple[tuple[int, int], ...]:
    """All (height, width) of at most `resolution`^2 pixels, as large as steps allow, of aspects from 1:4 to 4:1.

    Raises ConfigError when `step` leaves none.
    """
    widths = range(math.ceil(resolution / 2 / step) * step, 2 * resolution + 1, step)
    sizes = tuple((resolution**2 // width // step * step, width) for width in widths if width)
    found = tuple(size for size in sizes if size[0])
    if not found:
        raise ConfigError(f"resolution {resolution} is too small for steps of {step} pixels; raise it")
    return found


class BucketBatches(Sampler[list[int]]):
    """Batches of rows of one size; each row stands in one batch of an epoch.

    What is left over of a bucket makes a batch of its own, smaller than the others (`drop_last` leaves it out). With a
    `seed` rows and batches are shuffled by (seed, `epoch()`), else they come in the rows' order. There is no attribute
    `batch_size`: where it finds one, accelerate takes a smaller batch for the end of the data.
    """

    def __init__(
        self,
        sizes: Sequence[Hashable],
        batch_size: int,
        *,
        epoch: Callable[[], int] = lambda: 0,
        seed: int | None = None,
        drop_last: bool = False,
    ) -> None:
        self.sizes, self.rows_per_batch, self.epoch = sizes, batch_size, epoch
        self.seed, self.drop_last = seed, drop_last

    def __len__(self) -> int:
        whole = math.floor if self.drop_last else math.ceil
        return sum(whole(count / self.rows_per_batch) for count in Counter(self.sizes).values())

    def __iter__(self) -> Iterator[list[int]]:
        source = None
        if self.seed is not None:
            source = torch.Generator().manual_seed(derive_seed("order", self.seed, self.epoch()))
        members: dict[Hashable, list[int]] = defaultdict(list)
        for row in _order(len(self.sizes), source):
            members[self.sizes[row]].append(row)
        batches = [
            rows[start : start + self.rows_per_batch]
            for rows in members.values()
            for start in range(0, len(rows), self.rows_per_batch)
        ]
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == self.rows_per_batch]
        yield from (batches[index] for index in _order(len(batches), source))


def _order(count: int, source: torch.Generator | None) -> Sequence[int]:
    return range(count) if source is None else torch.randperm(count, generator=source).tolist()


def report(counts: Mapping[Hashable, int], media: int, changed: int, batch_size: int) -> None:
    """One warning when sizes differ or media were resized; silent for data of one size that fits.

    `counts` are rows per size, `media` all images or clips, `changed` those that were resized or cropped.
    """
    if len(counts) == 1 and not changed:
        return
    lone = sum(count for count in counts.values() if count < batch_size)
    hint = ""
    if lone and len(counts) > 1:
        advice = "fewer buckets: `resolution`, and `num_frames` of clips"
        hint = f"; rows in buckets smaller than a batch of {batch_size}: {lone} ({advice})"
    text = "%d images or clips in %d size buckets, %d of them resized or cropped%s"
    logger.warning(text, media, len(counts), changed, hint)
