"""Images and videos: what is encoded comes back exactly, and every form of file is decoded as a viewer shows it."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
import torch
from clips import frames, timed
from PIL import Image, ImageCms

from alignkit import media
from alignkit.errors import DataError, NumericsError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


# --- tensors --------------------------------------------------------------------------------------------------------


def test_every_level_survives_the_round_trip_and_halves_round_to_even():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    pixels = media.to_pixels(levels)
    assert pixels.shape == (1, 3, 16, 16)
    assert torch.equal(pixels[0, 0].flatten(), torch.arange(256) / 255)
    assert np.array_equal(media.quantise(pixels), levels)
    assert media.quantise(torch.rand(2, 5, 3, 4, 6)).shape == (2, 5, 4, 6, 3)
    assert media.quantise(torch.tensor([-1.0, 2.0, 0.5 / 255]).reshape(3, 1, 1)).tolist() == [[[0, 255, 0]]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_refused(value):
    with pytest.raises(NumericsError, match="NaN or infinite pixels"):
        media.quantise(torch.tensor([0.5, value, 0.5]).reshape(3, 1, 1))


RAMP = torch.linspace(0, 1, 96).reshape(2, 3, 4, 4)
GENERATED = [
    (RAMP * 255, DataError, "mine returned float32 pixels from 0 to 255, expected float pixels"),
    (RAMP * 2 - 1, DataError, "float32 pixels from -1 to 1, expected .* scale them"),
    (
        torch.tensor([0, 1], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 3, 4, 4),
        DataError,
        "uint8 pixels from 0 to 1",
    ),
    (torch.full((2, 3, 4, 4), torch.nan), NumericsError, "mine: an image or video holds NaN or infinite pixels"),
    (torch.full((2, 3, 4, 4), torch.inf), NumericsError, "NaN or infinite pixels"),
    (torch.rand(3, 3, 4, 4), DataError, r"pixels \[3, 3, 4, 4\], expected float pixels \[2, 3, H, W\]"),
    (torch.rand(2, 4, 4, 3), DataError, r"pixels \[2, 4, 4, 3\], expected"),
    (torch.rand(2, 4, 4), DataError, r"pixels \[2, 4, 4\], expected"),
    (torch.rand(2, 3, 0, 4), DataError, r"pixels \[2, 3, 0, 4\], expected"),
    (torch.rand(2, 3, 4, 4).numpy(), DataError, "mine returned a ndarray, expected a tensor of float pixels"),
    ([torch.rand(3, 4, 4)] * 2, DataError, "mine returned a list, expected"),
]


@pytest.mark.parametrize(("pixels", "kind", "match"), GENERATED)
def test_what_no_generator_may_return(pixels, kind, match):
    with pytest.raises(kind, match=match):
        media.checked_pixels(pixels, 2, "mine")


def test_what_a_generator_may_return():
    """Images, videos, half precision; and rounding that 8 bits do not show."""
    ends = torch.tensor([-0.0019, 1.0019]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)
    assert media.quantise(ends).tolist() == media.quantise(ends.clamp(0, 1)).tolist()
    for pixels in (torch.rand(2, 3, 4, 4), torch.rand(2, 5, 3, 4, 4), torch.rand(2, 3, 4, 4).bfloat16(), ends):
        assert media.checked_pixels(pixels, 2, "mine") is pixels


# --- images ---------------------------------------------------------------------------------------------------------


def test_an_image_is_encoded_losslessly_with_equal_bytes(tmp_path):
    array = frames(1)[0]
    data = media.encode_image(array)
    assert data == media.encode_image(array.copy())
    (tmp_path / "x.png").write_bytes(data)
    forms = (data, tmp_path / "x.png", str(tmp_path / "x.png"), {"bytes": data, "path": None})
    for form in (*forms, {"bytes": None, "path": str(tmp_path / "x.png")}):
        assert np.array_equal(media.decode_image(form, "here"), array)
        assert media.image_size(form, "here") == array.shape[:2]
    assert media.encode_medium(array, 8) == data


def _deep(mode, values, dtype):
    return Image.frombytes(mode, (len(values), 1), np.array(values, dtype).tobytes())


def _palette(*, transparent):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    if transparent:
        image.info["transparency"] = 0
    return image


def _lab():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.applyTransform(Image.new("RGB", (1, 1), RED), ImageCms.buildTransform(*profiles, "RGB", "LAB"))


def _pixel(mode, value):
    return Image.new(mode, (1, 1), value)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (_pixel("1", 1), [WHITE]),
        (_pixel("L", 100), [(100,) * 3]),
        (_palette(transparent=False), [RED, BLUE]),
        (_palette(transparent=True), [WHITE, BLUE]),
        (_pixel("RGB", RED), [RED]),
        (_pixel("RGBX", (*RED, 0)), [RED]),
        (_pixel("RGBA", (*RED, 255)), [RED]),
        (_pixel("RGBA", (*RED, 0)), [WHITE]),  # the hidden colour does not show
        (_pixel("RGBA", (0, 0, 0, 0)), [WHITE]),
        (_pixel("RGBA", (0, 0, 0, 51)), [(204,) * 3]),  # 255 * (1 - 51 / 255)
        (_pixel("RGBA", (0, 0, 0, 51)).convert("RGBa"), [(204,) * 3]),
        (_pixel("LA", (0, 51)), [(204,) * 3]),
        (_pixel("LA", (0, 51)).convert("La"), [(204,) * 3]),
        (_palette(transparent=False).convert("PA"), [RED, BLUE]),
        (_pixel("CMYK", (0, 255, 255, 0)), [RED]),
        (_pixel("YCbCr", (128, 128, 128)), [(128,) * 3]),
        (_pixel("HSV", (0, 255, 255)), [RED]),
        (_lab(), [RED]),
        (_deep("I;16", [0, 257 * 100, 65535], "<u2"), [(0,) * 3, (100,) * 3, WHITE]),
        (_deep("I;16L", [257 * 100], "<u2"), [(100,) * 3]),
        (_deep("I;16B", [257 * 100], ">u2"), [(100,) * 3]),
        (_deep("I;16N", [257 * 100], "=u2"), [(100,) * 3]),
        (_deep("I", [0, 257 * 100, 65535], "=i4"), [(0,) * 3, (100,) * 3, WHITE]),
        (_deep("F", [0.0, 0.2, 1.0], "=f4"), [(0,) * 3, (51,) * 3, WHITE]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_of_pil(image, expected):
    array = media.decode_image(image, "here")
    assert array.dtype == np.uint8
    assert np.abs(array[0].astype(int) - expected).max() <= (6 if image.mode == "LAB" else 0)  # LAB in 8 bits is coarse


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (_pixel("L", 100), False),
        (_pixel("RGB", RED), False),
        (_pixel("RGBX", (*RED, 0)), False),
        (_pixel("RGBA", (*RED, 255)), False),  # an alpha channel alone hides nothing
        (_pixel("RGBA", (*RED, 254)), True),
        (_pixel("RGBA", (*RED, 51)).convert("RGBa"), True),
        (_pixel("LA", (0, 255)), False),
        (_pixel("LA", (0, 51)), True),
        (_pixel("LA", (0, 51)).convert("La"), True),
        (_palette(transparent=False), False),
        (_palette(transparent=True), True),
        (_palette(transparent=False).convert("PA"), False),
        (_deep("F", [0.0, 0.2, 1.0], "=f4"), False),
        (_deep("I", [0, 257 * 100], "=i4"), False),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_transparency_of_every_mode(image, expected):
    assert media.has_transparency(image, "here") is expected


def test_transparency_of_files():
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert media.has_transparency(saved(deep, transparency=257 * 100), "here")
    assert not media.has_transparency(saved(deep, transparency=257 * 99), "here")
    assert media.has_transparency(saved(_pixel("RGB", RED), transparency=RED), "here")
    assert not media.has_transparency(saved(_pixel("RGB", RED), transparency=BLUE), "here")
    for kind in ("PNG", "WEBP", "GIF"):
        assert media.has_transparency(saved(_pixel("RGBA", (*RED, 0)), kind), "here")
    assert not media.has_transparency(saved(_pixel("RGB", RED), "JPEG"), "here")
    with pytest.raises(DataError, match="here: the image cannot be decoded"):
        media.has_transparency(b"no image", "here")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (_deep("I", [0, 65536], "=i4"), "here: a grey image of mode I has values from 0 to 65536"),
        (_deep("F", [0.0, 255.0], "=f4"), "mode F has values from 0 to 255; they must be within 0 and 1"),
        (_deep("F", [-0.5, 1.0], "=f4"), "from -0.5 to 1"),
        (_deep("F", [float("nan")], "=f4"), "from nan to nan"),
    ],
)
def test_grey_values_outside_the_range_of_the_mode_are_refused(image, message):
    with pytest.raises(DataError, match=message):
        media.decode_image(image, "here")


def test_files_of_deep_and_transparent_images():
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    for data in (saved(deep), saved(deep, "TIFF"), saved(_deep("F", [0, 100 / 255, 1], "=f4"), "TIFF")):
        assert media.decode_image(data, "here")[0, :, 0].tolist() == [0, 100, 255]
    through = saved(_pixel("RGBA", (*RED, 0)))
    assert media.decode_image(through, "here", background="blue").tolist() == [[list(BLUE)]]
    keyed = saved(deep, transparency=257 * 100)
    assert media.decode_image(keyed, "here", background="#0000ff")[0, 1].tolist() == list(BLUE)
    assert media.decode_image(saved(_pixel("RGB", RED), transparency=RED), "here")[0, 0].tolist() == list(WHITE)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, kind):
    """The file holds what a camera stores: the upright image, changed by the inverse of what its tag asks for."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = RED, BLUE, WHITE  # black below, to the right
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif.tobytes(), **options)
    assert media.image_size(data, "here") == (16, 32)
    array = media.decode_image(data, "here")
    assert array.shape == upright.shape
    assert np.abs(array[4::8, 8::16].astype(int) - upright[4::8, 8::16]).max() < 8


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"here: the image or video is empty \(zero bytes\)"),
        ({"bytes": None, "path": None}, "here: the image or video is empty"),
        (media.encode_image(frames(1)[0])[:60], "here: the image cannot be decoded: truncated or not an image .60 b"),
        (b"no image", "here: the image cannot be decoded"),
        ("/no/such/file.png", "here: the image cannot be decoded.*/no/such/file.png"),
    ],
)
def test_an_image_that_cannot_be_decoded_is_named(data, message):
    with pytest.raises(DataError, match=message):
        media.decode_image(data, "here")


# --- videos ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 16, 24), (3, 17, 25), (9, 64, 48)])
def test_a_clip_is_encoded_losslessly_with_equal_bytes(shape):
    array = frames(*shape)
    data = media.encode_clip(array, 8)
    assert data == media.encode_clip(array, 8.0) == media.encode_medium(array, 8)
    assert np.array_equal(media.decode_clip(data, "here"), array)
    assert np.array_equal(media.decode_clip(data, "here", count=2), array[:2])
    assert media.clip_shape(data, "here") == shape


@pytest.mark.parametrize("fps", [8, 24, 30000 / 1001, 12.5])
def test_the_frame_rate_is_stored(fps):
    data = media.encode_clip(frames(7), fps)
    assert np.array_equal(media.decode_clip(data, "here", fps=fps), frames(7))
    with av.open(io.BytesIO(data)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-4)


def test_frames_are_chosen_by_presentation_time():
    """Ten frames 100 ms apart, then ten frames 20 ms apart: by number, every second frame would be missed."""
    pictures = frames(20)
    times = [100 * k for k in range(10)] + [1000 + 20 * k for k in range(10)]
    chosen = [*range(11), 15]
    assert np.array_equal(media.decode_clip(timed(pictures, times), "here", fps=10), pictures[chosen])
    late = timed(pictures, [time + 500 for time in times])  # the clock of a file may start anywhere
    assert np.array_equal(media.decode_clip(late, "here", fps=10), pictures[chosen])
    assert np.array_equal(media.decode_clip(late, "here", fps=10, count=4), pictures[:4])


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_the_rotation_that_players_apply_is_applied(degrees):
    pictures = frames(3, 16, 24)
    data = timed(pictures, [0, 100, 200], degrees=degrees)
    expected = np.stack([np.rot90(picture, degrees // 90) for picture in pictures])  # both counter-clockwise
    assert np.array_equal(media.decode_clip(data, "here"), expected)
    assert media.clip_shape(data, "here") == expected.shape[:3]


def test_the_matrix_of_a_phone_turns_the_frame_clockwise():
    """MP4's own matrix, written by hand: (x, y) -> (-y, x) with y downwards is a quarter turn clockwise."""
    pictures = np.zeros((2, 16, 32, 3), np.uint8)
    pictures[:, :8, :16] = 200  # above, to the left
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 32, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(buffer.getvalue())
    start = data.index(b"tkhd") + 4 + 4 + 8 + 4 + 4 + 4 + 8 + 8  # version 0: times, ids, duration, reserved, layer
    matrix = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    data[start : start + 36] = matrix
    shown = media.decode_clip(bytes(data), "here")
    assert shown.shape == (2, 32, 16, 3)
    corners = shown[0, [4, 4, 28, 28], [4, 12, 4, 12], 0].astype(int)
    assert np.abs(corners - [0, 200, 0, 0]).max() < 40  # above, to the right


def test_a_slanted_clip_is_refused():
    with pytest.raises(DataError, match=r"here: the clip is to be shown rotated by .*45 degrees"):
        media.decode_clip(timed(frames(1), [0], degrees=45), "here")


@pytest.mark.parametrize("size", [(16, 24), (500, 300)])
def test_a_preview_plays(size):
    array = np.linspace(0, 255, 4 * 3, dtype=np.uint8).reshape(4, 1, 1, 3).repeat(size[0], 1).repeat(size[1], 2)
    data = media.clip_preview(array, 8)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.n_frames, image.info["loop"]) == ("WEBP", 4, 0)
        assert max(image.size) <= 256
        for number in range(4):
            image.seek(number)
            image.load()
            assert image.info["duration"] == 125
            middle = np.asarray(image.convert("RGB"))[image.height // 2, image.width // 2]
            assert np.abs(middle.astype(int) - array[number, 0, 0]).max() <= (0 if size == (16, 24) else 12)


@pytest.mark.parametrize("kind", ["WEBP", "GIF"])
def test_a_clip_that_ends_in_equal_frames_keeps_them(kind):
    """Both formats store equal frames as one, with the time for which it is shown."""
    pictures = frames(33)
    pictures[21:] = pictures[20]
    images, buffer = [Image.fromarray(picture) for picture in pictures // 64 * 64], io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    images[0].save(buffer, kind, save_all=True, append_images=images[1:], duration=100, **options)
    decoded = media.decode_clip(buffer.getvalue(), "here", fps=10)
    assert len(decoded) == 33
    assert (decoded[21:] == decoded[20]).all()
    assert media.decode_clip(buffer.getvalue(), "here").shape[0] == 21


def _preview_of(pictures):
    return media.read_preview(media.clip_preview(pictures, 8), "here", len(pictures), 8)


def test_a_preview_gives_the_frames_back():
    """Lossless at this size; also where it merged frames, all of them in the second case, and left out every second."""
    still = frames(1).repeat(33, axis=0)
    moving = np.concatenate([still[:12], frames(9, seed=1), still[:12]])
    for pictures in (moving, still):
        assert np.array_equal(_preview_of(pictures), pictures)
    long = frames(131).repeat(2, axis=0)[:261]
    assert np.array_equal(_preview_of(long)[::3], long[::3])
    with pytest.raises(DataError, match="here: the preview has 30 frames, 33 are expected"):
        media.read_preview(media.clip_preview(frames(30), 8), "here", 33, 8)


def test_frames_are_brought_to_a_size_one_by_one():
    data, size = media.encode_clip(frames(5, 40, 60), 8), (16, 16)
    whole = media.fit(media.decode_clip(data, "here"), size, 1)
    assert np.array_equal(media.decode_clip(data, "here", size=size), whole)


def test_names_in_another_encoding_do_not_matter():
    data = media.encode_clip(frames(2), 8)
    assert b"DURATION" in data
    assert np.array_equal(media.decode_clip(data.replace(b"DURATION", b"DURATI\xe9N"), "here"), frames(2))


def test_an_unknown_codec_is_named():
    data = media.encode_clip(frames(2), 8).replace(b"V_FFV1", b"V_FFVX")
    with pytest.raises(DataError, match="here: the clip cannot be decoded"):
        media.decode_clip(data, "here")


def test_these_modules_load_neither_torch_nor_pyav():
    import subprocess
    import sys

    code = "import sys, alignkit.media, alignkit.storage; sys.exit(bool({'torch', 'av'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
