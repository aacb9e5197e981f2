"""GenEval's verdicts (arXiv 2310.11513): does an image show what its prompt names, so many, so placed?

What is wanted stands in the prompt's metadata, as in GenEval's evaluation_metadata.jsonl: `include` and `exclude`,
lists of {class, count, color, position: [relation, index of an earlier clause]}, and `tag`. A class is there when its
`count` best detections pass the threshold; colour and position are asked of those alone. Rules and thresholds are the
published program's; its detector is a Mask2Former of mmdetection, so numbers compare between runs of one detector only.
Left out: suppression of overlapping boxes of a class, which the published program has but switches off.
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
    """One thing asked of an image: its kind (one of KINDS), whether it holds, and why not."""

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
        """Why not, a line each."""
        return "\n".join(requirement.reason for requirement in self.requirements if requirement.reason)

    def share(self, kind: str | None = None) -> float:
        """Share of the requirements (of one kind) that are met; 1 where none is asked."""
        met = [requirement.met for requirement in self.requirements if kind in (None, requirement.kind)]
        return sum(met) / len(met) if met else 1.0


@dataclass(frozen=True, slots=True)
class _Picture:
    """An image [3, H, W] and the places of its things in `found`, by class, best first."""

    pixels: Tensor
    found: Detections
    places: Mapping[str, Sequence[int]]

    def box(self, place: int) -> list[float]:
        return self.found.boxes[place].tolist()


class GenEval:
    """1 where all that the metadata asks holds, else 0; with `fractional`, the share of the requirements that hold.

    detector: a folder or hub id for `TransformersDetector`, or 'package.module:attribute', a builder of a `Detector`.
    colors: a CLIPModel folder or hub id for `ClipColors`, or a builder of a `ColorReader`; where colours are asked.
    aliases: GenEval's class names to the detector's, where they differ.
    threshold, counting_threshold: least score of a detection, the latter for prompts of tag `counting`.
    Parts: the share of requirements met of each kind, 1 where a prompt asks none; `judge` gives reasons. Raises
    DataError for metadata that says nothing, or names a class that the detector does not know.
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
        pictures = precise(check_media(media, prompts, self).detach())
        asked = [self._clauses(prompt) for prompt in prompts]
        verdicts = []
        for pixels, found, prompt, (include, exclude) in zip(
            pictures, self._detector(pictures), prompts, asked, strict=True
        ):
            picture = _Picture(pixels, found, self._places(found, is_counting=prompt.metadata.get("tag") == "counting"))
            verdicts.append(Verdict((*self._included(picture, include), *self._excluded(picture, exclude))))
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
        """What is wrong with a clause, the `index`-th of its kind; "" if nothing."""
        name, count = clause.get("class"), clause.get("count")
        if not isinstance(name, str) or type(count) is not int or count < 1:
            return "`class` must be a name and `count` a number from 1 up"
        if self._label(name) not in self._detector.labels:
            return f"the detector knows no '{name}'.{nearest(name, self._detector.labels)} See `aliases`."
        if clause.get("color") is not None and self._colors is None:
            return "asks a colour; give `colors`, a CLIP folder such as openai/clip-vit-large-patch14"
        if clause.get("position") is not None:
            position = clause["position"]
            if len(position) != 2 or position[0] not in RELATIONS or position[1] not in range(index):
                return f"`position` is [one of {', '.join(RELATIONS)}; index of an earlier clause]"
        return ""

    def _label(self, name: str) -> str:
        return name if name in self._detector.labels else self._aliases.get(name, name)

    def _places(self, found: Detections, *, is_counting: bool) -> dict[str, list[int]]:
        """Indices of the detections that pass, by class, best first."""
        least = self._counting_threshold if is_counting else self._threshold
        places: dict[str, list[int]] = {}
        for index in found.scores.argsort(descending=True, stable=True).tolist():
            same = places.setdefault(found.labels[index], [])
            if found.scores[index] > least and len(same) < self._max_objects:
                same.append(index)
        return places

    def _included(self, picture: _Picture, clauses: Sequence[Mapping[str, Any]]) -> Iterator[Requirement]:
        groups: list[Sequence[int] | None] = []  # the things of each clause that holds
        for clause in clauses:
            name, count = clause["class"], clause["count"]
            things = picture.places.get(self._label(name), ())[:count]
            checks = [_present(name, count, len(things))]
            if clause.get("color") is not None:
                checks.append(self._colored(picture, clause, things, is_checked=checks[-1].met))
            if clause.get("position") is not None:
                is_checked = all(check.met for check in checks)
                checks.append(self._placed(picture, clause, things, groups, is_checked=is_checked))
            groups.append(things if all(check.met for check in checks) else None)
            yield from checks

    def _colored(
        self, picture: _Picture, clause: Mapping[str, Any], things: Sequence[int], *, is_checked: bool
    ) -> Requirement:
        if not is_checked or self._colors is None:
            return Requirement("color", met=False)
        indices, masks = list(things), picture.found.masks
        boxes = picture.found.boxes[indices]
        colors = self._colors(picture.pixels, boxes, None if masks is None else masks[indices], clause["class"])
        right = colors.count(clause["color"])
        if right >= clause["count"]:
            return Requirement("color", met=True)
        seen = ", ".join(f"{colors.count(color)} {color}" for color in sorted(set(colors)))
        wanted = f"{clause['color']} {clause['class']}>={clause['count']}"
        return Requirement("color", met=False, reason=f"expected {wanted}, found {seen}")

    def _placed(
        self,
        picture: _Picture,
        clause: Mapping[str, Any],
        things: Sequence[int],
        groups: Sequence[Sequence[int] | None],
        *,
        is_checked: bool,
    ) -> Requirement:
        if not is_checked:
            return Requirement("position", met=False)
        wanted, index = clause["position"]
        targets = groups[index]
        if targets is None:
            return Requirement("position", met=False, reason=f"no target for {clause['class']} to be {wanted}")
        for thing in things:
            for target in targets:
                seen = relations(picture.box(thing), picture.box(target), self._margin)
                if wanted not in seen:
                    told = " and ".join(sorted(seen)) or "neither side of"
                    reason = f"expected {clause['class']} {wanted} target, found {told} target"
                    return Requirement("position", met=False, reason=reason)
        return Requirement("position", met=True)

    def _excluded(self, picture: _Picture, clauses: Sequence[Mapping[str, Any]]) -> Iterator[Requirement]:
        for clause in clauses:
            name, count = clause["class"], clause["count"]
            found = len(picture.places.get(self._label(name), ()))
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
    """How `box` lies to `target` (left, top, right, bottom; y grows downwards): up to two of RELATIONS, or none.

    The offset of the centres, less `margin` times the sum of the two sizes on each axis, over the whole offset's
    length; an axis counts beyond one half.
    """
    offset = [(box[i] + box[i + 2] - target[i] - target[i + 2]) / 2 for i in (0, 1)]
    reach = [margin * (abs(box[i + 2] - box[i]) + abs(target[i + 2] - target[i])) for i in (0, 1)]
    beyond = [math.copysign(max(abs(o) - r, 0), o) for o, r in zip(offset, reach, strict=True)]
    if max(map(abs, beyond)) < 1e-3:
        return set()
    x, y = (value / math.hypot(*offset) for value in beyond)
    sides = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in sides.items() if holds}
