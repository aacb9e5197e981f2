"""GenEval's verdicts (arXiv 2310.11513): does an image show the objects of its prompt, in number, colour and position?

The requirements are in the prompt's metadata, as in GenEval's evaluation_metadata.jsonl: `include` and `exclude`, lists
of {class, count, color, position: [relation, index of an earlier clause]}, and `tag`. A class is present if its `count`
best detections exceed the threshold; colour and position are checked for these detections only. Rules and thresholds
are those of the published program; its detector is a Mask2Former of mmdetection, so numbers compare between runs of one
detector only. Left out: suppression of overlapping boxes of a class, which the published program switches off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, DataError, nearest
from alignkit.records import Prompt, Scores
from alignkit.resolve import resolve
from rewards.models.detectors import ClipColors, ColorReader, Detections, Detector, TransformersDetector
from rewards.models.media import check_media, precise, scores_beside

if TYPE_CHECKING:
    from torch import Tensor

RELATIONS = ("left of", "right of", "above", "below")
KINDS = ("count", "color", "position", "exclude")
ALIASES = {"tv remote": "remote", "computer mouse": "mouse", "computer keyboard": "keyboard"}  # GenEval's -> COCO's


@dataclass(frozen=True, slots=True)
class Requirement:
    """One requirement on an image: its kind (one of KINDS), whether it is met, and the reason if not."""

    kind: str
    met: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """All requirements of a prompt on one image, in the order of its metadata."""

    requirements: tuple[Requirement, ...]

    @property
    def correct(self) -> bool:
        """Whether every requirement is met: GenEval's own verdict."""
        return all(requirement.met for requirement in self.requirements)

    @property
    def reason(self) -> str:
        """The reasons of the requirements that are not met, one a line."""
        return "\n".join(requirement.reason for requirement in self.requirements if requirement.reason)

    def share(self, kind: str | None = None) -> float:
        """Share of the requirements (of one kind) that are met; 1 if there are none."""
        met = [requirement.met for requirement in self.requirements if kind in (None, requirement.kind)]
        return sum(met) / len(met) if met else 1.0


@dataclass(frozen=True, slots=True)
class _Image:
    """An image [3, H, W], its detections, and their indices by class, best first."""

    pixels: Tensor
    detections: Detections
    by_class: Mapping[str, Sequence[int]]

    def box(self, index: int) -> list[float]:
        return self.detections.boxes[index].tolist()


class GenEval:
    """1 if all requirements of the metadata are met, else 0; with `fractional`, the share that is met.

    detector: a folder or hub id for `TransformersDetector`, or 'package.module:attribute', a builder of a `Detector`.
    colors: a CLIPModel folder or hub id for `ClipColors`, or a builder of a `ColorReader`; for prompts with colours.
    aliases: GenEval's class names to the detector's, where they differ.
    threshold, counting_threshold: a detection counts above this score, the latter for prompts of tag `counting`.
    Parts: the share of met requirements of each kind, 1 if the prompt has none; `judge` gives reasons. Raises DataError
    for metadata without requirements, or with a class that the detector does not have.
    """

    name = "geneval"
    modality = "image"
    needs_prompt = True
    differentiable = False
    comparable_across_prompts = True
    native_range = (0.0, 1.0)
    licence = "Apache-2.0; the detector's and CLIP's"
    source = "https://arxiv.org/abs/2310.11513"
    get = "`hf download PekingU/rtdetr_r50vd --local-dir FOLDER`, or another of transformers' detectors"

    def __init__(
        self,
        detector: str,
        colors: str | None = None,
        *,
        aliases: Mapping[str, str] | None = None,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        position_threshold: float = 0.1,
        fractional: bool = False,
        device: str = "cpu",
    ) -> None:
        self._detector: Detector = _built(detector, TransformersDetector, device, "detector")
        self._colors: ColorReader | None = None if colors is None else _built(colors, ClipColors, device, "colors")
        self._aliases = ALIASES if aliases is None else aliases
        self._threshold, self._counting_threshold = threshold, counting_threshold
        self._max_objects, self._margin, self._fractional = max_objects, position_threshold, fractional

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        verdicts = self.judge(media, prompts)
        total = [verdict.share() if self._fractional else float(verdict.correct) for verdict in verdicts]
        parts = {kind: scores_beside(media, [verdict.share(kind) for verdict in verdicts]) for kind in KINDS}
        return Scores(scores_beside(media, total), parts)

    def judge(self, media: Tensor, prompts: Sequence[Prompt]) -> list[Verdict]:
        """Verdicts with reasons for media [B, 3, H, W] in [0, 1]."""
        images = precise(check_media(media, prompts, self).detach())
        clauses = [self._clauses(prompt) for prompt in prompts]
        verdicts = []
        for pixels, found, prompt, (include, exclude) in zip(
            images, self._detector(images), prompts, clauses, strict=True
        ):
            by_class = self._by_class(found, is_counting=prompt.metadata.get("tag") == "counting")
            image = _Image(pixels, found, by_class)
            verdicts.append(Verdict((*self._included(image, include), *self._excluded(image, exclude))))
        return verdicts

    def _clauses(self, prompt: Prompt) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
        """Checked `include` and `exclude` of a prompt's metadata."""
        include, exclude = (list(prompt.metadata.get(key) or ()) for key in ("include", "exclude"))
        if not include + exclude:
            raise DataError(
                f"geneval: the metadata of prompt '{prompt.text}' has no `include` and no `exclude`; read prompts from "
                "GenEval's evaluation_metadata.jsonl, or give both columns"
            )
        for index, clause in [*enumerate(include), *((0, clause) for clause in exclude)]:
            if fault := self._fault(clause, index):
                raise DataError(f"geneval: prompt '{prompt.text}', clause {dict(clause)}: {fault}")
        return include, exclude

    def _fault(self, clause: Mapping[str, Any], index: int) -> str:
        """The fault of a clause, the `index`-th of its kind; "" if it has none."""
        name, count = clause.get("class"), clause.get("count")
        if not isinstance(name, str) or type(count) is not int or count < 1:
            return "`class` must be a name and `count` a number from 1 up"
        if self._label(name) not in self._detector.labels:
            return f"the detector has no class '{name}'.{nearest(name, self._detector.labels)} See `aliases`."
        if clause.get("color") is not None and self._colors is None:
            return "it has a colour; give `colors`, a CLIP folder such as openai/clip-vit-large-patch14"
        if clause.get("position") is not None:
            position = clause["position"]
            if len(position) != 2 or position[0] not in RELATIONS or position[1] not in range(index):
                return f"`position` is [one of {', '.join(RELATIONS)}; index of an earlier clause]"
        return ""

    def _label(self, name: str) -> str:
        return name if name in self._detector.labels else self._aliases.get(name, name)

    def _by_class(self, found: Detections, *, is_counting: bool) -> dict[str, list[int]]:
        """Indices of the detections that exceed the threshold, by class, best first."""
        least = self._counting_threshold if is_counting else self._threshold
        by_class: dict[str, list[int]] = {}
        for index in found.scores.argsort(descending=True, stable=True).tolist():
            same = by_class.setdefault(found.labels[index], [])
            if found.scores[index] > least and len(same) < self._max_objects:
                same.append(index)
        return by_class

    def _included(self, image: _Image, clauses: Sequence[Mapping[str, Any]]) -> Iterator[Requirement]:
        groups: list[Sequence[int] | None] = []  # detections of each clause, None where it is not met
        for clause in clauses:
            name, count = clause["class"], clause["count"]
            things = image.by_class.get(self._label(name), ())[:count]
            checks = [_present(name, count, len(things))]
            if clause.get("color") is not None:
                checks.append(self._colored(image, clause, things, is_checked=checks[-1].met))
            if clause.get("position") is not None:
                is_checked = all(check.met for check in checks)
                checks.append(self._placed(image, clause, things, groups, is_checked=is_checked))
            groups.append(things if all(check.met for check in checks) else None)
            yield from checks

    def _colored(
        self, image: _Image, clause: Mapping[str, Any], things: Sequence[int], *, is_checked: bool
    ) -> Requirement:
        if not is_checked or self._colors is None:
            return Requirement("color", met=False)
        indices, masks = list(things), image.detections.masks
        boxes = image.detections.boxes[indices]
        colors = self._colors(image.pixels, boxes, None if masks is None else masks[indices], clause["class"])
        right = colors.count(clause["color"])
        if right >= clause["count"]:
            return Requirement("color", met=True)
        read = ", ".join(f"{colors.count(color)} {color}" for color in sorted(set(colors)))
        expected = f"{clause['color']} {clause['class']}>={clause['count']}"
        return Requirement("color", met=False, reason=f"expected {expected}, found {read}")

    def _placed(
        self,
        image: _Image,
        clause: Mapping[str, Any],
        things: Sequence[int],
        groups: Sequence[Sequence[int] | None],
        *,
        is_checked: bool,
    ) -> Requirement:
        if not is_checked:
            return Requirement("position", met=False)
        expected, index = clause["position"]
        targets = groups[index]
        if targets is None:
            return Requirement("position", met=False, reason=f"no target for {clause['class']} to be {expected}")
        for thing in things:
            for target in targets:
                sides = relations(image.box(thing), image.box(target), self._margin)
                if expected not in sides:
                    named = " and ".join(sorted(sides)) or "neither side of"
                    reason = f"expected {clause['class']} {expected} target, found {named} target"
                    return Requirement("position", met=False, reason=reason)
        return Requirement("position", met=True)

    def _excluded(self, image: _Image, clauses: Sequence[Mapping[str, Any]]) -> Iterator[Requirement]:
        for clause in clauses:
            name, count = clause["class"], clause["count"]
            found = len(image.by_class.get(self._label(name), ()))
            reason = "" if found < count else f"expected {name}<{count}, found {found}"
            yield Requirement("exclude", found < count, reason)


def _built(name: str, default: Any, device: str, kind: str) -> Any:
    """A user's own builder called without options, or `default` on a folder or hub id."""
    if ":" in name and not Path(name).exists():
        return resolve(name, {}, kind=kind)()
    if not name:
        raise ConfigError(f"geneval: {kind} is empty; give a folder, a hub id or 'package.module:attribute'")
    return default(name, device=device)


def _present(name: str, count: int, found: int) -> Requirement:
    reason = "" if found >= count else f"expected {name}>={count}, found {found}"
    return Requirement("count", found >= count, reason)


def relations(box: Sequence[float], target: Sequence[float], margin: float = 0.1) -> set[str]:
    """Position of `box` relative to `target` (left, top, right, bottom; y grows downwards): up to two of RELATIONS.

    On each axis: the offset of the centres, less `margin` times the sum of the two sizes, over the length of the whole
    offset; the relation holds if this exceeds one half.
    """
    offset = [(box[i] + box[i + 2] - target[i] - target[i + 2]) / 2 for i in (0, 1)]
    reach = [margin * (abs(box[i + 2] - box[i]) + abs(target[i + 2] - target[i])) for i in (0, 1)]
    beyond = [math.copysign(max(abs(o) - r, 0), o) for o, r in zip(offset, reach, strict=True)]
    if max(map(abs, beyond)) < 1e-3:
        return set()
    x, y = (value / math.hypot(*offset) for value in beyond)
    sides = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in sides.items() if holds}
