"""Images and videos: 8-bit arrays <-> encoded bytes, one decoder for all parts of the program.

Images are uint8 [H, W, 3], videos uint8 [F, H, W, 3], both RGB and upright; H height, W width, F frames. Encoding is
lossless and gives the same bytes every time: PNG for images, FFV1 in Matroska for videos. A decoder takes encoded
bytes, a path, or a cell of a `datasets` column, {"bytes", "path"}. PyAV is called in `clips` only. Not here: sound.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from alignkit import clips
from alignkit.errors import DataError, NumericsError

if TYPE_CHECKING:
    from torch import Tensor

Encoded = bytes | str | Path | Mapping[str, Any]
Result = TypeVar("Result")

BACKGROUND = clips.BACKGROUND

VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".mov", ".avi")
_STILL_BRANDS = (b"avif", b"heic", b"heix", b"mif1")  # of images in the container of mp4
GREY_16 = 65535  # white in the modes I and I;16, which hold 16-bit images
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_DAMAGE = (UnidentifiedImageError, OSError, ValueError, SyntaxError, *_BOMBS)
ROUNDING = 0.5 / 255  # of pixels, which are stored with 8 bits
PREVIEW_SIDE = 256  # pixels; larger videos are made smaller for a preview: a report shows dozens
PREVIEW_FRAMES = 128  # of a longer video each second, third, ... frame
PREVIEW_LOSSLESS_SIDE = 128  # previews up to this side lose nothing


def checked_pixels(pixels: Any, count: int, where: str) -> Tensor:
    """`pixels` as they are, if they are what a generator must return for `count` prompts.

    That is a floating-point tensor [count, 3, H, W], or [count, F, 3, H, W] of videos, in [0, 1]; rounding may pass
    the ends by half an 8-bit step. Raises DataError naming `where` for another type, shape or range, NumericsError for
    pixels that are not finite.
    """
    import torch

    expected = f"float pixels [{count}, 3, H, W], or [{count}, F, 3, H, W] of videos, in [0, 1]"
    if not isinstance(pixels, torch.Tensor):
        raise DataError(f"{where} returned a {type(pixels).__name__}, expected a tensor of {expected}")
    if pixels.dim() not in (4, 5) or len(pixels) != count or pixels.shape[-3] != 3 or not pixels.numel():
        raise DataError(f"{where} returned pixels {list(pixels.shape)}, expected {expected}")
    low, high = (float(value) for value in pixels.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NumericsError(
            f"{where}: an image or video holds NaN or infinite pixels; run the model (or its VAE) in bf16 or fp32"
        )
    if not pixels.is_floating_point() or low < -ROUNDING or high > 1 + ROUNDING:
        kind = str(pixels.dtype).removeprefix("torch.")
        raise DataError(f"{where} returned {kind} pixels from {low:g} to {high:g}, expected {expected}; scale them")
    return pixels


def quantise(pixels: Tensor) -> np.ndarray:
    """Float pixels [..., 3, H, W], clamped to [0, 1] -> uint8 [..., H, W, 3] on the CPU, rounded half to even.

    Raises NumericsError where one is not finite.
    """
    import torch

    if not torch.isfinite(pixels).all():
        raise NumericsError(
            "an image or video holds NaN or infinite pixels; run the model (or its VAE) in bf16 or fp32"
        )
    scaled = pixels.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    array: np.ndarray = scaled.movedim(-3, -1).contiguous().cpu().numpy()
    return array


def to_pixels(array: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] -> float32 pixels [..., 3, H, W] in [0, 1]; the inverse of `quantise`."""
    import torch

    return torch.from_numpy(np.asarray(array, np.float32) / np.float32(255)).movedim(-1, -3).contiguous()


# --- images ---------------------------------------------------------------------------------------------------------


def encode_image(array: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> PNG bytes, at compression level 1: lossless and fast."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def image_size(data: Encoded, where: str) -> tuple[int, int]:
    """(height, width) of the upright image, from its header; DataError naming `where` for bytes that are no image."""
    source = _source(data, where)
    try:
        with Image.open(_opened(source)) as image:
            _require_bounded(image)
            # PIL decodes all of a PNG to look for metadata behind its pixels: only where there can be some.
            may_be_turned = True
            if image.format == "PNG" and isinstance(source, bytes):
                may_be_turned = any(mark in source for mark in (b"eXIf", b"exif", b"xmp"))
            is_turned = may_be_turned and image.getexif().get(0x0112) in _TURNED
            return (image.width, image.height) if is_turned else (image.height, image.width)
    except _DAMAGE as error:
        raise _damaged(source, where, error) from error


def decode_image(data: Encoded | Image.Image, where: str, *, background: str = BACKGROUND) -> np.ndarray:
    """An image of any PIL mode (or the first frame of a moving one) -> uint8 RGB [H, W, 3].

    Its EXIF orientation is applied. Transparent parts show `background`, a colour name or "#rrggbb". 16-bit grey (modes
    I and I;16) is scaled from [0, 65535], float grey (mode F) from [0, 1]. Raises DataError naming `where` for bytes
    that cannot be decoded and for grey values outside these ranges.
    """
    return _read(data, where, lambda image: _to_rgb(ImageOps.exif_transpose(image), where, background))


def has_transparency(data: Encoded | Image.Image, where: str) -> bool:
    """Whether a part of an image is transparent, so that `decode_image` shows its background there.

    Pixels are decoded only where mode or header allow for transparency. Raises DataError as `decode_image` does.
    """
    return _read(data, where, _is_transparent)


def transparency_note(transparent: int, images: int) -> str:
    """The message about a stage's images of which some have transparency."""
    return f"{transparent} of {images} images have transparency; they are composited on {BACKGROUND}"


def _read(data: Encoded | Image.Image, where: str, read: Callable[[Image.Image], Result]) -> Result:
    """`read` of the opened image; DataError naming `where` for what cannot be decoded."""
    if isinstance(data, Image.Image):
        return read(data)
    source = _source(data, where)
    try:
        with Image.open(_opened(source)) as image:
            _require_bounded(image)
            return read(image)
    except DataError:
        raise
    except _DAMAGE as error:
        raise _damaged(source, where, error) from error


def _require_bounded(image: Image.Image) -> None:
    """DecompressionBombError from PIL's limit on; PIL itself only warns up to twice as many pixels."""
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")


def _to_rgb(image: Image.Image, where: str, background: str) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        return _from_deep_grey(image, where, background)
    layer = _layer(image)
    if layer is not None:
        behind = Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255))
        image = Image.alpha_composite(behind, layer)
    return np.asarray(image.convert("RGB"))


def _layer(image: Image.Image) -> Image.Image | None:
    """The image in RGBA, where its mode or header allow for transparency."""
    if image.mode == "La":  # premultiplied; PIL converts it to nothing else
        image = image.convert("LA")
    may_be = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
    return image.convert("RGBA") if may_be else None


def _is_transparent(image: Image.Image) -> bool:
    if image.mode.startswith(("I", "F")):
        level = image.info.get("transparency")
        return isinstance(level, int) and bool((np.asarray(image) == level).any())
    layer = _layer(image)
    return layer is not None and int(np.asarray(layer.getchannel("A")).min()) < 255


def _from_deep_grey(image: Image.Image, where: str, background: str) -> np.ndarray:
    """Grey of more than 8 bits, by the range of its mode; the transparent level of a PNG shows the background."""
    grey = np.asarray(image).astype(np.float64)
    white = 1.0 if image.mode == "F" else float(GREY_16)
    low, high = float(grey.min()), float(grey.max())
    if not (low >= 0 and high <= white):
        raise DataError(
            f"{where}: a grey image of mode {image.mode} has values from {low:g} to {high:g}; they must be within "
            f"0 and {white:g}: scale it, or save it with 8 bits"
        )
    rgb = np.rint(grey * (255 / white)).astype(np.uint8)[..., None].repeat(3, axis=-1)
    if isinstance(image.info.get("transparency"), int):
        rgb[grey == image.info["transparency"]] = ImageColor.getrgb(background)[:3]
    return rgb


def _source(data: Encoded, where: str) -> bytes | str | Path:
    source: bytes | str | Path | None = data if not isinstance(data, Mapping) else data["bytes"] or data["path"]
    if not source:
        raise DataError(f"{where}: the image or video is empty (zero bytes); put the file back or remove the row")
    return source


def _opened(source: bytes | str | Path) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _damaged(source: bytes | str | Path, where: str, error: Exception) -> DataError:
    if isinstance(error, _BOMBS):
        limit = f"the limit is {Image.MAX_IMAGE_PIXELS:,}"
        return DataError(
            f"{where}: the image has too many pixels ({error}; {limit}); make it smaller or remove the row"
        )
    if isinstance(error, ValueError) and "text" in str(error).lower():
        return DataError(f"{where}: the image has too large text chunks ({error}); save it without its metadata")
    if isinstance(source, bytes) and is_video(source):
        return DataError(f"{where}: a video, where an image is expected; keep images and videos in separate datasets")
    size = f"{len(source)} bytes" if isinstance(source, bytes) else f"'{source}'"
    return DataError(
        f"{where}: the image cannot be decoded: truncated or not an image ({size}: {error}); replace it or remove the "
        "row"
    )


def fit(frames: np.ndarray, size: tuple[int, int], multiple: int) -> np.ndarray:
    """The centre of uint8 frames [F, H, W, 3] at `size` (height, width).

    They are resampled to cover `size` first (Lanczos, antialiased), unless they exceed it by less than `multiple`
    pixels a side: those are only cut off.
    """
    height, width = size
    old_height, old_width = frames.shape[1:3]
    if not (0 <= old_height - height < multiple and 0 <= old_width - width < multiple):
        scale = max(height / old_height, width / old_width)
        covering = (max(width, round(old_width * scale)), max(height, round(old_height * scale)))
        images = [Image.fromarray(frame).resize(covering, Image.Resampling.LANCZOS) for frame in frames]
        frames = np.stack([np.asarray(image) for image in images])
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return frames[:, top : top + height, left : left + width]


# --- videos ---------------------------------------------------------------------------------------------------------


def is_video(data: bytes, name: str = "") -> bool:
    """Whether encoded bytes of a file called `name` are a video: mp4, mkv, webm, mov, avi, or a moving GIF or WebP.

    Everything else counts as an image, also damaged bytes: the image decoder then names the fault.
    """
    start, brand = data[:4], data[8:12]
    if start == b"GIF8" or (start, brand) == (b"RIFF", b"WEBP"):
        try:
            moving: Any = Image.open(io.BytesIO(data))
            return bool(moving.is_animated)
        except _DAMAGE:
            return False
    is_mp4 = data[4:8] == b"ftyp" and brand not in _STILL_BRANDS
    is_container = is_mp4 or start == b"\x1aE\xdf\xa3" or (start, brand) == (b"RIFF", b"AVI ")
    return is_container or Path(name).suffix.lower() in VIDEO_ENDINGS


def encode_clip(frames: np.ndarray, fps: float) -> bytes:
    """uint8 [F, H, W, 3] at `fps` frames a second -> FFV1 in Matroska; lossless, equal frames give equal bytes."""
    return clips.encode(frames, fps)


def decode_clip(
    data: Encoded,
    where: str,
    *,
    count: int | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """The first `count` frames (default: all) of a video -> uint8 RGB [F, H, W, 3].

    A rotation by 90, 180 or 270 degrees that the file asks players for is applied. With `fps` the frames are those that
    are nearest in presentation time to 0, 1/fps, 2/fps, ... seconds; a tie goes to the frame of even number. With
    `size` (height, width) each frame is brought to it by `fit` as it is decoded, so large frames are not held together.
    Raises DataError naming `where`.
    """
    each = None if size is None else lambda frame: fit(frame[None], size, 1)[0]
    return clips.decode(_source(data, where), where, count=count, fps=fps, each=each)


def clip_shape(data: Encoded, where: str) -> tuple[int, int, int]:
    """(frames, height, width) of a video without decoding it; DataError naming `where`."""
    return clips.shape(_source(data, where), where)


def clip_preview(frames: np.ndarray, fps: float) -> bytes:
    """uint8 [F, H, W, 3] -> an animated WebP of at most 256 pixels a side and 128 frames, which plays in a loop."""
    step = -(-len(frames) // PREVIEW_FRAMES)
    frames = frames[::step]
    height, width = frames.shape[1:3]
    scale = min(1.0, PREVIEW_SIDE / max(height, width))
    images = [Image.fromarray(frame) for frame in frames]
    if scale < 1:
        images = [image.resize((max(1, round(width * scale)), max(1, round(height * scale)))) for image in images]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=images[1:],
        duration=round(1000 * step / fps),
        loop=0,
        lossless=max(height, width) <= PREVIEW_LOSSLESS_SIDE,
        quality=75,
    )
    return buffer.getvalue()


def read_preview(data: bytes, where: str, count: int, fps: float) -> np.ndarray:
    """The `count` frames at `fps` that a preview of `clip_preview` stands for -> uint8 [F, H, W, 3].

    A frame that it left out is the one before it; equal frames, which the format merges, are apart again. Raises
    DataError naming `where`, also for a preview of another number of frames.
    """
    step = -(-count // PREVIEW_FRAMES)
    expected = -(-count // step)
    if is_video(data):
        frames = decode_clip(data, where, count=expected, fps=1000 / round(1000 * step / fps))
    else:  # all of them were equal
        frames = decode_image(data, where)[None].repeat(expected, axis=0)
    if len(frames) != expected:
        raise DataError(f"{where}: the preview has {len(frames)} frames, {expected} are expected; make the pairs again")
    return frames.repeat(step, axis=0)[:count]


def encode_medium(array: np.ndarray, fps: float) -> bytes:
    """An image [H, W, 3] as PNG, a video [F, H, W, 3] at `fps` as FFV1."""
    return encode_image(array) if array.ndim == 3 else encode_clip(array, fps)
