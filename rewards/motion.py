"""Measures of a clip that need no network: the motion from frame to frame, and the flicker of the brightness.

Clips [B, F, 3, H, W] in [0, 1]. As in `pixel_statistics`, a higher value is not better; monitored beside a learnt video
reward they show whether clips become still to raise it. Computed on luminance in fp32 or more, differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from alignkit.errors import ConfigError, DataError
from alignkit.records import Prompt, Scores
from rewards.models.media import check_media
from rewards.pixel_statistics import luminance

if TYPE_CHECKING:
    from torch import Tensor

NOISE = 1e-4  # squared gradient per pixel below which a place is too flat for an estimate (a gradient of 0.01)
STILL = 1e-3  # pixels; rounds off the length of a vector near 0, where its gradient has no direction
SMALLEST_SIDE = 16  # of the coarsest level


class Motion:
    """Mean length of the optical flow in pixels a frame, over the places with enough texture.

    The flow is that of Lucas and Kanade (1981), refined from coarse to fine (Bouguet 2001): within a window around each
    pixel, the shift that maps it to the next frame with the least squared error. A frame difference would grow with
    contrast and brightness; this length does not. The weight of a place is l / (l + NOISE), with l the smaller
    eigenvalue of its structure tensor: flat areas and straight edges, where motion cannot be measured, have almost no
    weight. Places that leave the image have none.

    Accurate for shifts up to a sixteenth of the shorter side, for larger ones only on coarse textures; tests state the
    error (sharp edges between pixels add up to 0.25). Measured in the clip's own pixels and frames: compare clips of
    one size and rate. Left out: occlusion, separating the camera's motion from that of objects. Raises ConfigError for
    options below 1 or an even window, DataError for sides below 16.
    """

    name = "motion"
    modality = "video"
    needs_prompt = False
    differentiable = True
    comparable_across_prompts = True
    native_range = (0.0, float("inf"))
    licence = "Apache-2.0"
    source = "Lucas and Kanade, IJCAI 1981"

    def __init__(self, window: int = 9, refinements: int = 4) -> None:
        if window < 1 or window % 2 == 0 or refinements < 1:
            raise ConfigError(f"motion: window {window} must be odd, and refinements {refinements} at least 1")
        self._window, self._refinements = window, refinements

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        clips = check_media(media, prompts, self)
        if min(clips.shape[-2:]) < SMALLEST_SIDE:
            raise DataError(f"motion: frames of {list(clips.shape[-2:])}; sides of at least {SMALLEST_SIDE} are needed")
        grey = luminance(clips)
        first, second = (frames.flatten(0, 1)[:, None] for frames in (grey[:, :-1], grey[:, 1:]))
        flow, weight = self._flow(first, second)
        squared = flow.square().sum(1)
        length = squared / ((squared + STILL**2).sqrt() + STILL)  # |flow|, less up to STILL
        shape = (len(clips), -1)
        total, weights = ((values * weight).reshape(shape).sum(1) for values in (length, length.new_ones(())))
        return Scores(total / (weights + NOISE * weight[0].numel()))

    def _flow(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Flow [N, 2, H, W] (x, y) from frames [N, 1, H, W] to the next ones, and each pixel's weight [N, H, W]."""
        from torch.nn import functional

        levels = [(first, second)]
        while min(levels[-1][0].shape[-2:]) >= 2 * SMALLEST_SIDE:
            levels.append(tuple(functional.avg_pool2d(frame, 2) for frame in levels[-1]))
        flow = first.new_zeros(len(first), 2, *levels[-1][0].shape[-2:])
        for before, after in reversed(levels):
            size = before.shape[-2:]
            if flow.shape[-2:] != size:
                flow = 2 * functional.interpolate(flow, size, mode="bilinear", align_corners=False)
            flow, weight = self._refined(before, after, flow)
        return flow, weight

    def _refined(self, before: Tensor, after: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        """A level's flow after Gauss-Newton steps, (A + NOISE) step = b in each window, and the weight."""
        import torch

        slope_x, slope_y = _slopes(before)
        xx, xy, yy = (self._windowed(product) for product in (slope_x**2, slope_x * slope_y, slope_y**2))
        damped_x, damped_y = xx + NOISE, yy + NOISE
        determinant = damped_x * damped_y - xy**2
        for _ in range(self._refinements):
            warped, inside = _warped(after, flow)
            missing = (warped - before) * inside
            x, y = self._windowed(slope_x * missing), self._windowed(slope_y * missing)
            flow = flow - torch.cat([damped_y * x - xy * y, damped_x * y - xy * x], dim=1) / determinant
        spread = (((xx - yy) / 2) ** 2 + xy**2 + NOISE**4).sqrt()
        smaller = ((xx + yy) / 2 - spread).clamp_min(0)
        return flow, (smaller / (smaller + NOISE) * _warped(after, flow)[1])[:, 0]

    def _windowed(self, values: Tensor) -> Tensor:
        """Mean within the window around each pixel; at the border, over the part inside the image."""
        from torch.nn.functional import avg_pool2d

        return avg_pool2d(values, self._window, 1, self._window // 2, count_include_pad=False)


def _slopes(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences per pixel along x and y of [N, 1, H, W]; one-sided halves at the border."""
    from torch.nn.functional import pad

    wide = pad(frames, (1, 1, 1, 1), mode="replicate")
    return (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2, (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2


def _warped(frames: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """`frames` [N, 1, H, W] read at each pixel plus `flow`, and 1 where that lies inside the image, else 0."""
    import torch
    from torch.nn.functional import grid_sample

    height, width = frames.shape[-2:]
    kind = {"dtype": flow.dtype, "device": flow.device}
    rows, columns = torch.arange(height, **kind)[:, None], torch.arange(width, **kind)
    # grid_sample's coordinates: -1 and 1 are the centres of the outermost pixels
    grid = torch.stack([(columns + flow[:, 0]) * 2 / (width - 1) - 1, (rows + flow[:, 1]) * 2 / (height - 1) - 1], -1)
    inside = (grid.detach().abs() <= 1).all(-1, keepdim=True).to(flow.dtype).movedim(-1, 1)
    return grid_sample(frames, grid, mode="bilinear", padding_mode="border", align_corners=True), inside


class Flicker:
    """Mean absolute second difference in time of a frame's mean luminance, |m[t-1] - 2 m[t] + m[t+1]|.

    It is 0 for a still, a linear fade and a pan over an even scene; an oscillation of w radians a frame gives
    4 sin^2(w / 2) times its amplitude. At most 2, for black and white frames in alternation. Left out: local flicker
    that cancels in the mean. Raises DataError for fewer than 3 frames.
    """

    name = "flicker"
    modality = "video"
    needs_prompt = False
    differentiable = True
    comparable_across_prompts = True
    native_range = (0.0, 2.0)
    licence = "Apache-2.0"
    source = "rewards.motion"

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        clips = check_media(media, prompts, self)
        if clips.shape[1] < 3:
            raise DataError(f"flicker: clips of {clips.shape[1]} frames; a second difference needs at least 3")
        brightness = luminance(clips).mean((2, 3))
        return Scores(brightness.diff(n=2).abs().mean(1))
