"""The settings of the critic in a planned training, for the doctor. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignkit.errors import require_at_least
from alignkit.shipped import model_path, shipped_file


@dataclass(frozen=True, kw_only=True, slots=True)
class CriticPlan:
    """A Qwen2-VL or Qwen2.5-VL as the reward `yes_no`, whose options have the same names.

    model: its folder, with weights or with config.json and preprocessor_config.json alone (configs/critics).
    dtype: the precision of its weights.
    checkpointing: whether its layers are checkpointed.
    frames: how many frames of a video it reads; default: all.
    max_pixels: bound on a frame; default: the folder's.
    questions: how many texts are asked about each image or video, a negated one being a text of its own.
    """

    model: Path
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    checkpointing: bool = False
    frames: int | None = None
    max_pixels: int | None = None
    questions: int = 4

    def __post_init__(self) -> None:
        require_at_least(1, {"frames": self.frames, "max_pixels": self.max_pixels, "questions": self.questions})

    @property
    def folder(self) -> Path:
        """The local or shipped folder."""
        return shipped_file(Path(model_path(str(self.model))))
