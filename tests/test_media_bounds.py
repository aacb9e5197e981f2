"""What a hostile image or video may cost: pixels, text chunks and requests are bounded."""

from __future__ import annotations

import io
import socket

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from alignkit import media
from alignkit.errors import DataError


def saved(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(11, 10), (30, 10)], ids=["PIL warns", "PIL refuses"])
def test_decompression_bombs_are_named(monkeypatch, size):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for read in (media.decode_image, media.image_size):
        with pytest.raises(DataError, match=r"^row 3: the image has too many pixels \(.*100\); make it smaller"):
            read(saved(Image.new("1", size)), "row 3")
        read(saved(Image.new("1", (10, 10))), "row 3")


def test_large_text_chunks_are_named():
    texts = PngInfo()
    texts.add_text("prompt", "x" * 2_000_000, zip=True)
    data = saved(Image.new("RGB", (4, 4)), pnginfo=texts)
    assert len(data) < 10_000
    with pytest.raises(DataError, match=r"^row 3: the image has too large text chunks"):
        media.decode_image(data, "row 3")


def test_a_clip_of_too_many_pixels_is_named(monkeypatch):
    data = media.encode_clip(np.zeros((17, 8, 8, 3), np.uint8), 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)  # of a clip, sixteen times as many
    assert media.decode_clip(data, "row 3", count=16).shape[0] == 16
    with pytest.raises(DataError, match=r"^row 3: the clip has too many pixels \(17 or more frames of 8 x 8;"):
        media.decode_clip(data, "row 3")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)
    for read in (media.decode_clip, media.clip_shape):
        with pytest.raises(DataError, match=r"^row 3: the clip has too many pixels \(1 or more"):
            read(data, "row 3")


def test_no_clip_leads_to_the_network(tmp_path):
    """Neither by its path nor by what is in it (a session description would wait for packets)."""
    session = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    session += b"a=rtpmap:96 H264/90000\n"
    (tmp_path / "x.sdp").write_bytes(session)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/clip.mkv"
        playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n".encode()
        listing = f"ffconcat version 1.0\nfile {url}\n".encode()
        for data in (url, {"bytes": None, "path": url}, playlist, listing, session, tmp_path / "x.sdp"):
            with pytest.raises(DataError, match=r"^row 3: the clip cannot be decoded"):
                media.decode_clip(data, "row 3")
        with pytest.raises(BlockingIOError):
            server.accept()
