"""Seeing things for `geneval`: a detector of transformers' object detection classes, colours by CLIP, and their seams.

Judging only: no gradient passes. Images go through the folder's own image processor in its PIL form, so torchvision
is not needed and numbers do not depend on whether it is there. RT-DETR and YOLOS folders need nothing more; DETR's
published folders name a timm backbone, except in revision `no_timm`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from alignkit.errors import MissingFileError
from alignkit.media import quantise
from rewards.models.media import Preparation
from rewards.models.weights import load_whole

if TYPE_CHECKING:
    from torch import Tensor

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_AROUND = 0.6  # what GenEval paints around a mask: #999


@dataclass(frozen=True, slots=True)
class Detections:
    """Things found in one image: boxes [N, 4] (left, top, right, bottom; pixels), label and score of each.

    `masks` [N, H, W] (bool) where the detector segments; colours then see the thing without its surroundings.
    """

    boxes: Tensor
    labels: Sequence[str]
    scores: Tensor
    masks: Tensor | None = None


class Detector(Protocol):
    """Finds things. `labels` are all the names it may give."""

    labels: Collection[str]

    def __call__(self, media: Tensor) -> list[Detections]:
        """Detections of each image of [B, 3, H, W] in [0, 1], of any score."""
        ...


class ColorReader(Protocol):
    """Names colours."""

    def __call__(self, picture: Tensor, boxes: Tensor, masks: Tensor | None, name: str) -> list[str]:
        """The colour of the thing called `name` in each box [N, 4] of the image [3, H, W]."""
        ...


class TransformersDetector:
    """An AutoModelForObjectDetection folder or hub id, with its image processor: RT-DETR, YOLOS, DETR and their kin.

    Raises MissingFileError where it is not there.
    """

    def __init__(self, model: str, *, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        try:
            loaded = load_whole(AutoModelForObjectDetection, model, "geneval: detector")
            self._processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        except OSError as error:
            raise MissingFileError(
                f"geneval: detector '{model}' is no folder here and no hub id (hf download PekingU/rtdetr_r50vd "
                f"--local-dir FOLDER gets one): {error}"
            ) from error
        self._model = loaded.to(device).eval().requires_grad_(False)
        self.labels: Collection[str] = tuple(loaded.config.id2label.values())

    def __call__(self, media: Tensor) -> list[Detections]:
        import torch

        inputs = self._processor(images=list(quantise(media)), return_tensors="pt").to(self._model.device)
        with torch.no_grad():
            output = self._model(**inputs)
        sizes = [tuple(media.shape[-2:])] * len(media)
        found = self._processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
        return [Detections(one["boxes"].cpu(), self._names(one["labels"]), one["scores"].cpu()) for one in found]

    def _names(self, indices: Tensor) -> list[str]:
        names = self._model.config.id2label
        return [names[index] for index in indices.tolist()]


class ClipColors:
    """Zero-shot colours with any CLIPModel folder, as GenEval does with ViT-L/14: three templates, ten colours.

    The box is cut out and read as CLIP reads an image; around a mask all is painted grey first. Raises
    MissingFileError where the folder is not there.
    """

    def __init__(self, model: str, *, device: str = "cpu") -> None:
        import torch
        from transformers import AutoTokenizer, CLIPModel

        try:
            clip = load_whole(CLIPModel, model, "geneval: colors", dtype=torch.float32)
            self._tokenizer = AutoTokenizer.from_pretrained(model)
        except OSError as error:
            raise MissingFileError(
                f"geneval: colors '{model}' is no CLIP folder here and no hub id (hf download "
                f"openai/clip-vit-large-patch14 --local-dir FOLDER gets GenEval's): {error}"
            ) from error
        self._clip = clip.to(device).eval().requires_grad_(False)
        self._fit = Preparation(clip.config.vision_config.image_size)
        self._known: dict[str, Tensor] = {}

    def __call__(self, picture: Tensor, boxes: Tensor, masks: Tensor | None, name: str) -> list[str]:
        import torch
        from torch.nn.functional import normalize

        crops = [_cut(picture, box, None if masks is None else masks[i]) for i, box in enumerate(boxes)]
        seen = torch.cat([self._fit(crop[None].float()) for crop in crops]).to(self._clip.device)
        with torch.no_grad():
            if name not in self._known:
                self._known[name] = self._colors(name)
            likeness = (
                normalize(self._clip.get_image_features(pixel_values=seen).pooler_output, dim=-1) @ self._known[name].T
            )
        return [COLORS[index] for index in likeness.argmax(1).tolist()]

    def _colors(self, name: str) -> Tensor:
        """One unit vector a colour [10, D]: the mean over the templates."""
        from torch.nn.functional import normalize

        texts = [template.format(color=color, name=name) for color in COLORS for template in _TEMPLATES]
        length = self._clip.config.text_config.max_position_embeddings
        tokens = self._tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        said = self._clip.get_text_features(**tokens.to(self._clip.device)).pooler_output
        return normalize(normalize(said, dim=-1).unflatten(0, (len(COLORS), -1)).mean(1), dim=-1)


def _cut(picture: Tensor, box: Tensor, mask: Tensor | None) -> Tensor:
    """The box's pixels [3, h, w], at least one, grey where the mask is not."""
    import torch

    if mask is not None:
        picture = torch.where(mask.to(picture.device), picture, _AROUND)
    height, width = picture.shape[-2:]
    left, top, right, bottom = (round(edge) for edge in box.tolist())
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return picture[:, top : max(bottom, top + 1), left : max(right, left + 1)]
