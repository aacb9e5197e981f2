"""Object detection for `geneval`: transformers' detection classes, colours by CLIP, and the protocols of both.

Without gradient. Images are prepared by the folder's own image processor in its PIL form, so torchvision is not needed
and scores do not depend on whether it is installed. RT-DETR and YOLOS folders need nothing more; DETR's published
folders name a timm backbone, except in revision `no_timm`.
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
_AROUND = 0.6  # the grey that GenEval fills in around a mask: #999


@dataclass(frozen=True, slots=True)
class Detections:
    """Objects of one image: boxes [N, 4] (left, top, right, bottom; pixels), label and score of each.

    `masks` [N, H, W] (bool) if the detector segments; colours are then read without the surroundings of the object.
    """

    boxes: Tensor
    labels: Sequence[str]
    scores: Tensor
    masks: Tensor | None = None


class Detector(Protocol):
    """Detects objects. `labels` are all names that it can return."""

    labels: Collection[str]

    def __call__(self, media: Tensor) -> list[Detections]:
        """Detections of any score, for each image of [B, 3, H, W] in [0, 1]."""
        ...


class ColorReader(Protocol):
    """Names colours."""

    def __call__(self, image: Tensor, boxes: Tensor, masks: Tensor | None, name: str) -> list[str]:
        """The colour of the object `name` in each box [N, 4] of the image [3, H, W]."""
        ...


class TransformersDetector:
    """An AutoModelForObjectDetection folder or hub id, with its image processor: RT-DETR, YOLOS, DETR and others.

    Raises MissingFileError where the model is missing.
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

    The box is cropped and classified by CLIP; pixels outside a mask are set to grey first. Raises MissingFileError
    where the folder is missing.
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

    def __call__(self, image: Tensor, boxes: Tensor, masks: Tensor | None, name: str) -> list[str]:
        import torch
        from torch.nn.functional import normalize

        cuts = [_cut(image, box, None if masks is None else masks[i]) for i, box in enumerate(boxes)]
        crops = torch.cat([self._fit(crop[None].float()) for crop in cuts]).to(self._clip.device)
        with torch.no_grad():
            if name not in self._known:
                self._known[name] = self._colors(name)
            likeness = (
                normalize(self._clip.get_image_features(pixel_values=crops).pooler_output, dim=-1) @ self._known[name].T
            )
        return [COLORS[index] for index in likeness.argmax(1).tolist()]

    def _colors(self, name: str) -> Tensor:
        """One unit vector per colour, [10, D]: the mean over the templates."""
        from torch.nn.functional import normalize

        texts = [template.format(color=color, name=name) for color in COLORS for template in _TEMPLATES]
        length = self._clip.config.text_config.max_position_embeddings
        tokens = self._tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        embedded = self._clip.get_text_features(**tokens.to(self._clip.device)).pooler_output
        return normalize(normalize(embedded, dim=-1).unflatten(0, (len(COLORS), -1)).mean(1), dim=-1)


def _cut(image: Tensor, box: Tensor, mask: Tensor | None) -> Tensor:
    """The pixels [3, h, w] of the box, at least one; grey outside the mask."""
    import torch

    if mask is not None:
        image = torch.where(mask.to(image.device), image, _AROUND)
    height, width = image.shape[-2:]
    left, top, right, bottom = (round(edge) for edge in box.tolist())
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]
