"""Labellers of pairs of clips, by the segment: a judge that compares, or a reward whose scores are compared.

`LABELLERS` maps a name to its class; one of a user's own is `package.module:attribute` with `label` of
`alignkit.pairs.Labeller`. A segment is cut out of both clips and judged as a clip of its own, so a fault elsewhere
does not count. Not here: people's votes (`alignkit annotate`), files, and how several labellers become one label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, require_at_least
from alignkit.media import to_pixels
from alignkit.pairs import ShownPair
from alignkit.protocols import ExplainingJudge, Judge, Reporting, SegmentScoring, require_modality
from alignkit.records import Prompt, Verdict
from alignkit.resolve import construct, resolve
from alignkit.segments import places_of
from rewards import JUDGES
from rewards.serving.judge import RewardJudge

if TYPE_CHECKING:
    from torch import Tensor

# Options of the table's judges: their media are clips, and they read every frame that they get.
_CLIPS: dict[str, dict[str, Any]] = {"served": {"modality": "video", "frames": 1024}, "vlm": {"modality": "video"}}

Place = tuple[int, int]  # pair, segment


class JudgeLabeller:
    """A judge, asked about each segment of a pair.

    judge: a name in `rewards.JUDGES`, or 'package.module:attribute', built with `options`; or a judge that is built.
    rate: frames a second that the judge is shown, as DenseDPO (arXiv 2506.03517, A.6) shows 8; None, or a rate above
    that of the clips, shows all.
    """

    def __init__(
        self, judge: Judge | str = "served", *, options: Mapping[str, Any] | None = None, rate: float | None = 8.0
    ) -> None:
        if rate is not None and not rate > 0:
            raise ConfigError(f"labeller: rate is {rate}; give frames a second, such as 8, or null for all")
        if isinstance(judge, str):
            given = {**_CLIPS.get(judge, {}), **(options or {})}
            judge = construct(resolve(judge, JUDGES, kind="judge"), given, what=f"judge '{judge}'")
        if not isinstance(judge, Judge):
            raise ConfigError(f"labeller: a {type(judge).__name__} has no `compare`; see alignkit.protocols.Judge")
        self.judge: Judge = judge
        self.rate = rate

    def label(self, pairs: Sequence[ShownPair]) -> list[list[Verdict]]:
        """See `alignkit.pairs.Labeller`. Segments of equal shape are compared in one call."""
        import numpy as np

        groups: dict[tuple[int, ...], list[Place]] = defaultdict(list)
        for number, pair in enumerate(pairs):
            for segment in range(len(pair.segments)):
                shape = (len(self._frames(pair, segment)), *pair.clips.shape[2:])
                groups[shape].append((number, segment))
        found: dict[Place, Verdict] = {}
        for places in groups.values():
            cuts = [pairs[n].clips[:, list(self._frames(pairs[n], segment))] for n, segment in places]
            media = to_pixels(np.stack(cuts, 1))  # [2, B, F, 3, H, W]
            prompts = [pairs[n].prompt for n, _ in places]
            found |= zip(places, _verdicts(self.judge, media, prompts), strict=True)
        verdicts: list[list[Verdict]] = [[] for _ in pairs]
        for n, segment in sorted(found):
            verdicts[n].append(found[n, segment])
        return verdicts

    def report(self) -> object:
        """What a served judge has cost; empty where there is nothing to say."""
        return self.judge.report() if isinstance(self.judge, Reporting) else ""

    def _frames(self, pair: ShownPair, segment: int) -> Sequence[int]:
        return shown_frames(pair.segments[segment], pair.fps, self.rate)


class RewardLabeller(JudgeLabeller):
    """The clip whose segment a reward scores higher; within `least_difference` it is a tie (the tie band).

    reward: a reward of clips in `rewards.REWARDS`, or 'package.module:attribute', built with `options`; or one that is
    built. One with `score_segments` (`alignkit.protocols.SegmentScoring`) gets whole clips, others the segment alone.
    rate: as in `JudgeLabeller`; default: all frames. Raises ConfigError for a reward of images.
    """

    def __init__(
        self,
        reward: Any,
        *,
        options: Mapping[str, Any] | None = None,
        least_difference: float = 0.0,
        rate: float | None = None,
    ) -> None:
        require_at_least(0, {"labeller: least_difference": least_difference})
        self._of_reward = RewardJudge(reward, options=options, least_difference=least_difference)
        require_modality({str(reward): self._of_reward.reward}, "video")
        super().__init__(self._of_reward, rate=rate)

    def label(self, pairs: Sequence[ShownPair]) -> list[list[Verdict]]:
        """See `alignkit.pairs.Labeller`."""
        reward = self._of_reward.reward
        if not isinstance(reward, SegmentScoring):
            return super().label(pairs)
        return [self._whole(pair, reward) for pair in pairs]

    def _whole(self, pair: ShownPair, reward: SegmentScoring) -> list[Verdict]:
        import torch

        with torch.no_grad():
            sides = reward.score_segments(to_pixels(pair.clips), [pair.prompt] * 2, [pair.segments] * 2)
        if [len(side) for side in sides] != [len(pair.segments)] * 2:
            raise ConfigError(
                f"{type(reward).__name__}: score_segments gave {[len(side) for side in sides]} scores for two clips of "
                f"{len(pair.segments)} segments; give one for each segment"
            )
        return [self._of_reward.verdict(float(one), float(other)) for one, other in zip(*sides, strict=True)]


def _verdicts(judge: Judge, media: Tensor, prompts: Sequence[Prompt]) -> list[Verdict]:
    """Verdicts on media[0] against media[1], each [B, F, 3, H, W].

    Raises ConfigError for verdicts that are not one of 1, 0, -1 (or None) for each pair.
    """
    if isinstance(judge, ExplainingJudge):
        verdicts = list(judge.verdicts(media[0], media[1], prompts))
    else:
        verdicts = [Verdict(label) for label in judge.compare(media[0], media[1], prompts)]
    labels = [verdict.label for verdict in verdicts]
    if len(labels) != len(prompts) or not set(labels) <= {1, 0, -1, None}:
        raise ConfigError(f"a {type(judge).__name__} gave {labels} for {len(prompts)} pairs; give 1, 0 or -1 for each")
    return verdicts


def shown_frames(segment: tuple[int, int], fps: float, rate: float | None) -> Sequence[int]:
    """The frames of a segment of a clip at `fps` that are shown at `rate` frames a second, the first one among them.

    At least two where the segment has two. A `rate` of None, or above `fps`, shows all.
    """
    start, end = segment
    if rate is None or rate >= fps:
        return range(start, end)
    length = end - start
    count = max(min(2, length), round(length * rate / fps))
    return [start + min(place, length - 1) for place in places_of(count, fps, rate)]


LABELLERS = {
    "judge": "rewards.labellers:JudgeLabeller",
    "reward": "rewards.labellers:RewardLabeller",
}
