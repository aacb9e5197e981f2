"""DenseDPO (Wu et al. 2025, arXiv 2506.03517): pairs of clips with labels of their segments; and its comparators.

`loss` names what is minimised, one or several:

    dense_dpo    the labels of segments, each latent frame a preference of its own (`reduction`)
    clip_dpo     one label for the clip, the majority of its segments: Flow-DPO (on pairs of independent clips) and
                 StructuralDPO (on the pairs of DenseDPO)
    dense_sft    the denoising error of the better clip in each labelled frame
    clip_sft     the denoising error of the better clip: supervised fine-tuning on winners

Differences to the paper: caption dropout (`caption_dropout`, not stated there); `protect_winner` is Diffusion-SDPO's
(arXiv 2511.03317), for each frame; the reference is the network with its adapters off. docs/densedpo.md has settings
and traps, `alignkit.losses.dense` the equations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from alignkit.columns import column
from alignkit.errors import ConfigError, DataError
from alignkit.escape import get_logger
from alignkit.losses import dense_dpo, dense_sft, loser_scale
from alignkit.losses.dense import counted
from alignkit.records import LossOutput
from alignkit.segments import (
    CODEC,
    ETAS,
    LABELS,
    LEAST_LABELLED,
    NONE,
    SEGMENTS,
    clip_label,
    is_labelled,
    owners,
    places_of,
    read_labels,
)
from alignkit.trainers.buckets import AS_THEY_ARE
from alignkit.trainers.config import OfflineConfig
from alignkit.trainers.draws import DrawPlan
from alignkit.trainers.drift import Drift
from alignkit.trainers.latents import LATENTS, LatentDataset
from alignkit.trainers.offline import OfflineTrainer
from alignkit.trainers.ranges import DECAY, POSITIVE, Range, require_in_range, weights_by_name

logger = get_logger(__name__)
LOSSES = ("dense_dpo", "clip_dpo", "dense_sft", "clip_sft")
REDUCTIONS = ("frame", "segment", "sum")
CLIP_LABEL = "clip_label"  # batch key


@dataclass
class DenseDPOConfig(OfflineConfig):
    """Defaults of the loss are the paper's; learning rate, LoRA and batch are in configs/densedpo_wan.yaml."""

    loss: str | list[str] = field(
        default="dense_dpo",
        metadata={"help": "dense_dpo, clip_dpo (Flow-DPO, StructuralDPO), dense_sft, clip_sft. Several are added."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each loss, in the order of `loss`; default: 1 each."}
    )
    beta: float = field(
        default=500.0, metadata={"help": "Strength of the pull to the reference; larger changes the model less."}
    )
    reduction: str = field(
        default="frame",
        metadata={"help": "dense_dpo: frame (the paper's code), segment, or sum (its eq. 7) in one sigmoid."},
    )
    least_labelled: float = field(
        default=LEAST_LABELLED, metadata={"help": "Pairs with a smaller share of labelled segments are left out."}
    )
    share_noise: bool = field(default=True, metadata={"help": "One noise for both clips of a pair."})
    share_timestep: bool = field(default=True, metadata={"help": "One timestep for both clips of a pair."})
    low_memory: bool = field(
        default=False, metadata={"help": "Keep the activations of one clip at a time; costs one more forward pass."}
    )
    protect_winner: float | None = field(
        default=None, metadata={"help": "mu of the loser's gradient scale in each latent frame (SDPO); off."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in_range(vars(self), {"beta": POSITIVE, "least_labelled": Range(0, 1), "protect_winner": DECAY})
        for key, allowed, values in (("loss", LOSSES, self.losses), ("reduction", REDUCTIONS, [self.reduction])):
            for value in values:
                if value not in allowed:
                    raise ConfigError(f"{key} is '{value}'; use {', '.join(allowed[:-1])} or {allowed[-1]}")
        if self.protect_winner is not None and (self.low_memory or not self.compares):
            raise ConfigError(
                "protect_winner needs a loss of pairs, and both clips' outputs at once: dense_dpo or clip_dpo, and no "
                "low_memory"
            )

    @property
    def losses(self) -> dict[str, float]:
        """The weight of each loss by its name."""
        return weights_by_name(self.loss, self.loss_weights)

    @property
    def compares(self) -> bool:
        """Whether a loss compares both clips, and both with the reference."""
        return any(name.endswith("_dpo") for name in self.losses)


class DenseDPOTrainer(OfflineTrainer):
    """Trains a video generator on rows of the dense format (docs/formats.md).

    One loss keeps its own shape and weight: [B, T], divided by the number of labelled latent frames over all GPUs and
    accumulated micro-batches (with `reduction` [B, S] or [B], by labelled segments or pairs). A loss of whole clips,
    and several losses, are averaged over the terms of each pair first: [B], divided by the number of labelled pairs.
    """

    args: DenseDPOConfig
    needs_reference = True
    candidates = 2

    def __init__(self, model: Any, args: DenseDPOConfig, train_dataset: Any, *rest: Any, **options: Any) -> None:
        self.needs_reference = args.compares
        self._terms = [_Term.of(name, weight, args) for name, weight in args.losses.items()]
        self._drift = Drift("set protect_winner, or add dense_sft or clip_sft to `loss`")
        super().__init__(model, args, train_dataset, *rest, **options)

    @override
    def draw_plan(self, args: Any) -> DrawPlan:
        return replace(super().draw_plan(args), share_noise=args.share_noise, share_timestep=args.share_timestep)

    # --- data ---

    @override
    def targets(self, rows: Any, count: int) -> Mapping[str, Sequence[Tensor] | Tensor]:
        if count != 2:
            raise DataError(f"row 0 has {count} clips; a row of labelled segments has two")
        return {}  # how many latent frames a row has is known once it is encoded: see `prepare_data`

    @override
    def prepare_data(self, rows: Any, args: Any) -> LatentDataset | None:
        """As in OfflineTrainer, with labels of latent frames; pairs with too few labels are left out and counted.

        Raises ConfigError for a generator of images; DataError, before anything is encoded, for missing columns, and
        naming the row for labels and segments that do not fit.
        """
        if rows is None or isinstance(rows, LatentDataset):
            return rows
        if self.generator.modality != "video":
            raise ConfigError(f"'{self.generator.name}' makes images; segments are those of videos: use a video model")
        _require_columns(rows, args)
        _warn_of_unequal_starts(rows)
        labels, segments = read_labels(rows)
        dataset = super().prepare_data(rows, args)
        frames = [shape[2] for shape in dataset.latent_shapes]
        places = self._places(rows, frames, args.fps)
        ratio = self.generator.temporal_ratio
        own = [owners(*row, ratio) for row in zip(segments, places, strict=True)]
        by_frame, seen = [], []
        for values, numbers in zip(labels, own, strict=True):
            by_frame.append(torch.tensor([values[n] if values and n != NONE else 0 for n in numbers]))
            seen.append([values[n] for n in dict.fromkeys(numbers) if values and n != NONE])  # `num_frames` cuts clips
        dataset.targets[LABELS] = by_frame
        dataset.targets[SEGMENTS] = list(map(torch.tensor, own))
        dataset.targets[CLIP_LABEL] = torch.tensor(list(map(clip_label, seen)))
        self._leave_out(dataset, seen, args.least_labelled)
        return dataset

    def _places(self, rows: Any, frames: Sequence[int], fps: float | None) -> list[Sequence[int]]:
        """The pixel frames behind the latent frames of each row; DataError where a row says another number."""
        ratio, names = self.generator.temporal_ratio, rows.column_names
        counts = [1 + ratio * (latent_frames - 1) for latent_frames in frames]
        given = column(rows, "num_frames").to_pylist() if LATENTS in names and "num_frames" in names else counts
        for row, (count, own) in enumerate(zip(counts, given, strict=True)):
            if own != count:
                raise DataError(f"row {row}: num_frames is {own}, and its latents are of {count} frames")
        rates = column(rows, "fps").to_pylist() if fps is not None else [1.0] * len(rows)
        for row, rate in enumerate(rates):
            if not isinstance(rate, int | float) or not 0 < rate < math.inf:
                raise DataError(f"row {row}: fps is {rate!r:.80}; give the frames a second of the clip, above 0")
        return [places_of(count, rate, fps) for count, rate in zip(counts, rates, strict=True)]

    def _leave_out(self, dataset: LatentDataset, labels: Sequence[Sequence[int]], least: float) -> None:
        """Keep the rows in which enough segments are labelled and a loss counts."""
        by_frame = not all(term.is_clip for term in self._terms)
        frames, clips = dataset.targets[LABELS], dataset.targets[CLIP_LABEL]
        counts = [bool(frames[row].any() if by_frame else clips[row]) for row in range(len(labels))]
        kept = [row for row, own in enumerate(labels) if counts[row] and is_labelled(own, least)]
        if len(kept) < len(labels):
            text = "%d of %d pairs are left out: no labels, or too many ties (least_labelled %g)"
            logger.warning(text, len(labels) - len(kept), len(labels), least)
        dataset.select(kept)

    # --- the loss ---

    @override
    def loss_weight(self, batch: Mapping[str, Any]) -> Tensor | float:
        masks = [term.counted(batch) for term in self._terms]
        return _pairs(masks).sum() if self._is_by_pair else masks[0].sum()

    @property
    def _is_by_pair(self) -> bool:
        return len(self._terms) > 1 or self._terms[0].is_clip

    @override
    def method_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> LossOutput:
        args, protect = self.args, None
        if args.protect_winner is None:
            policy_B2T = self.errors(model, batch, per="frame", one_by_one=args.low_memory)
        else:
            residual_BT2D = self.residuals(model, batch).permute(0, 3, 1, 2, 4, 5).flatten(3)
            policy_B2T = residual_BT2D.square().mean(-1).transpose(1, 2)
            protect = loser_scale(residual_BT2D, args.protect_winner)
        reference_B2T = policy_B2T.detach()  # not read by losses that do not compare
        if args.compares:
            reference_B2T = self.reference_errors(model, batch, per="frame", one_by_one=args.low_memory)
        outputs = [term.loss(policy_B2T, reference_B2T, batch, protect) for term in self._terms]
        return self._by_pair(outputs, batch) if self._is_by_pair else outputs[0]

    def _by_pair(self, outputs: Sequence[LossOutput], batch: Mapping[str, Any]) -> LossOutput:
        """The mean of each loss over the terms of a pair, times its weight, added; [B].

        Of several losses each is logged, unweighted; shared metrics are the first one's.
        """
        masks = [term.counted(batch) for term in self._terms]
        pairs_B, metrics, total_B = _pairs(masks), {}, 0
        for term, output, mask in zip(self._terms, outputs, masks, strict=True):
            loss_B = _row_sums(output.loss) / _row_sums(mask).clamp(min=1)
            total_B = total_B + term.weight * loss_B
            metrics = {**output.metrics, **metrics}
            if len(outputs) > 1:
                metrics[f"loss_{term.name}"] = loss_B.detach().sum() / pairs_B.sum().clamp(min=1)
        return LossOutput(total_B, metrics, pairs_B.sum())

    @override
    def warn_of(self, health: Mapping[str, float]) -> None:
        self._drift.watch(health, self.state.global_step)


@dataclass(frozen=True)
class _Term:
    """One of the losses: its function, and what it sees of a batch."""

    name: str
    weight: float
    function: Any
    reduction: Any

    @classmethod
    def of(cls, name: str, weight: float, args: DenseDPOConfig) -> _Term:
        if name.endswith("_sft"):
            return cls(name, weight, dense_sft, "frame")
        reduction = args.reduction if name == "dense_dpo" else "segment"
        return cls(name, weight, partial(dense_dpo, beta=args.beta, reduction=reduction), reduction)

    @property
    def is_clip(self) -> bool:
        return self.name.startswith("clip_")

    def _seen(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Labels and segments [B, T]; of a whole clip, which is one segment with one label."""
        labels_BT, segments_BT = batch[LABELS], batch[SEGMENTS]
        if not self.is_clip:
            return labels_BT, segments_BT
        return batch[CLIP_LABEL].unsqueeze(1).expand_as(labels_BT), torch.zeros_like(segments_BT)

    def counted(self, batch: Mapping[str, Any]) -> Tensor:
        labels_BT, segments_BT = self._seen(batch)
        return counted(labels_BT, self.reduction, segments_BT)

    def loss(
        self, policy_B2T: Tensor, reference_B2T: Tensor, batch: Mapping[str, Any], protect: Tensor | None
    ) -> LossOutput:
        labels_BT, segments_BT = self._seen(batch)
        options = {} if self.name.endswith("_sft") else {"segments_BT": segments_BT, "protect": protect}
        output: LossOutput = self.function(policy_B2T, reference_B2T, labels_BT, **options)
        return output


def _row_sums(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).sum(-1)


def _pairs(masks: Sequence[Tensor]) -> Tensor:
    """Pairs in which any loss counts, bool [B]."""
    return torch.stack([_row_sums(mask) > 0 for mask in masks]).any(0)


def _require_columns(rows: Any, args: DenseDPOConfig) -> None:
    """Refuse, before anything is encoded, rows that lack a column, and settings that given latents cannot follow."""
    names = set(rows.column_names)
    required = {LABELS, SEGMENTS} | ({CODEC} if LATENTS in names else set()) | ({"fps"} if args.fps else set())
    if required - names:
        raise DataError(
            f"rows of labelled segments lack {sorted(required - names)}; these have {sorted(names)}. docs/formats.md "
            "describes the columns"
        )
    if LATENTS in names and args.sizes != AS_THEY_ARE:
        raise ConfigError(
            "the data holds latents, which are trained on as they are; leave out num_frames, fps, resolution and "
            "bucket_step, or give rows with videos"
        )


def _warn_of_unequal_starts(rows: Any) -> None:
    """`dense-pairs` refuses to make such pairs; rows may come from elsewhere."""
    etas = column(rows, ETAS).to_pylist() if ETAS in rows.column_names else []
    unequal = sum(len(set(row or ())) > 1 for row in etas)
    if unequal:
        logger.warning(
            "in %d of %d pairs the clips started at different noise levels (column '%s'), or one is the real video. "
            "Training learns the difference in noise, and quality does not rise (DenseDPO, A.2 and C.4); remove them",
            unequal,
            len(etas),
            ETAS,
        )
