"""Generated pages (reports, cards) that never replace what somebody edited by hand."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from alignkit.storage import write_atomic

_MARK = re.compile(rb"\n<!-- written by alignkit, sha256 ([0-9a-f]{64}) -->\n\Z")


def write_generated(path: Path, text: str) -> None:
    """Write a page with a checksum comment at its end; a file that was edited by hand is first renamed.

    Its new name is `NAME.kept-1.EXT` (2, 3, ...), so that writing a page again loses nothing.
    """
    body = text.encode()
    if path.exists():
        data = path.read_bytes()
        mark = _MARK.search(data)
        if mark is None or hashlib.sha256(data[: mark.start()]).hexdigest().encode() != mark.group(1):
            number = 1
            while (renamed := path.with_name(f"{path.stem}.kept-{number}{path.suffix}")).exists():
                number += 1
            path.rename(renamed)
    write_atomic(path, body + f"\n<!-- written by alignkit, sha256 {hashlib.sha256(body).hexdigest()} -->\n".encode())
