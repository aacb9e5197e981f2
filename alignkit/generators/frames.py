"""Valid numbers of frames: 1 + r k, because the codec encodes r frames after the first as one latent frame.

A codec that decodes g latent frames together after the first (CogVideoX: 2) takes 1 + r g k: of any other number it
decodes the first latent frame as r frames, so the video is longer than asked for and its segments shift.

The pipelines of diffusers round any other number. Here it is an error: checked with the configs of a local folder,
before anything is loaded, and again when a generator is called. Imports torch only with the family of a local folder.
"""

from __future__ import annotations

from pathlib import Path

from alignkit.errors import ConfigError
from alignkit.generators.folders import read_index, read_json
from alignkit.generators.table import GENERATORS
from alignkit.resolve import resolve


def require_frames(frames: int, key: str, model: str, *, modality: str, step: int) -> None:
    """ConfigError naming `key`, its value and the two nearest valid ones, unless `model` makes videos of `frames`.

    `step` is r g. One frame fits every model; of `modality` "image" it is the only number that does.
    """
    if modality == "image" and frames > 1:
        raise ConfigError(f"{key} is {frames}; '{model}' makes images: leave it out, or name a model of videos")
    below = 1 + (frames - 1) // step * step
    if below != frames:
        raise ConfigError(f"{key} is {frames}; '{model}' takes 1 + {step} k: {below} or {below + step}")


def require_known_frames(frames: int, key: str, folder: Path, model: str) -> None:
    """`require_frames` with the step from the configs of a diffusers `folder`.

    Does nothing if it cannot be read: no such folder, a pipeline class outside `GENERATORS`, a VAE without a
    config.
    """
    config = folder / "vae" / "config.json"
    if frames == 1 or not config.is_file() or not (folder / "model_index.json").is_file():
        return
    name = read_index(str(folder))["_class_name"]
    if name in GENERATORS:
        family = resolve(name, GENERATORS, kind="generator")
        step = family.vae_ratios(read_json(config))[1] * family.latent_group
        require_frames(frames, key, model, modality=family.modality, step=step)
