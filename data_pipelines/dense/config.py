"""Which pairs are made of each real video; checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alignkit.errors import ConfigError, require_at_least
from alignkit.pairs import EtaMeaning
from alignkit.segments import equal_segments


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Which pairs are made; defaults are those of DenseDPO (arXiv 2506.03517, appendix A.2).

    kind: guided, both copies start from the noised real video, for labels by segment; structural, the same for one
        label of the whole clip; vanilla, two full generations of the caption, for one label.
    eta: lowest and highest start of a pair, drawn once for each video; lower keeps more of the video's structure.
    eta_meaning: sigma, eta is the noise level of the start; step_index, the last int(eta N) of N steps are taken, which
        diffusers calls `strength`.
    seed: with the video's name it decides eta and the noise of both copies.
    segment_seconds: length of a segment of a guided pair.
    same_eta: both copies start at the same eta. False needs `allow_shortcuts`.
    real_first: the first copy is the real video itself. True needs `allow_shortcuts`.
    allow_shortcuts: make the two kinds of pairs that the paper saw fail.
    latents_dtype: precision in which latents are stored.
    videos: also store both clips, without loss, in a column `videos`.
    previews: also write both clips as animated WebP into OUT/clips, to look at.
    part_size: videos of one file.
    workers: threads that decode videos ahead of the generator.
    """

    kind: Literal["guided", "vanilla", "structural"] = "guided"
    eta: Sequence[float] = (0.65, 0.8)
    eta_meaning: EtaMeaning = "sigma"
    seed: int = 0
    segment_seconds: float = 1.0
    same_eta: bool = True
    real_first: bool = False
    allow_shortcuts: bool = False
    latents_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    videos: bool = False
    previews: bool = False
    part_size: int = 16
    workers: int = 2

    def __post_init__(self) -> None:
        require_at_least(1, {"part_size": self.part_size, "workers": self.workers})
        if len(self.eta) != 2 or not 0 < self.eta[0] <= self.eta[1] < 1:
            raise ConfigError(
                f"eta is {list(self.eta)}; give lowest and highest start, such as 0.65 0.8, within 0 and 1"
            )
        if not self.segment_seconds > 0:
            raise ConfigError(f"segment_seconds is {self.segment_seconds}; it must be above 0")
        shortcuts = [
            name for name, asked in (("same_eta", not self.same_eta), ("real_first", self.real_first)) if asked
        ]
        if shortcuts and self.kind == "vanilla":
            raise ConfigError(f"{shortcuts[0]} is for pairs that start from a real video, and kind is vanilla")
        if shortcuts and not self.allow_shortcuts:
            raise ConfigError(
                f"{' and '.join(shortcuts)}: the copies of such a pair differ in noise statistics, from which the loss "
                "falls without any gain in quality (DenseDPO, A.2 and C.4). Give allow_shortcuts: true to make them"
            )

    @property
    def shortcut(self) -> str:
        """What makes a pair trivial: "real", its first copy is the real video; "eta", two different eta; or ""."""
        return "real" if self.real_first else "" if self.same_eta else "eta"

    def segments(self, num_frames: int, fps: float) -> list[list[int]]:
        """[start, end) frames of each segment; a tail shorter than half a segment belongs to the one before it.

        Pairs with one label have one segment.
        """
        length = num_frames if self.kind != "guided" else max(1, round(self.segment_seconds * fps))
        return [list(segment) for segment in equal_segments(num_frames, length)]
