"""Chromium for tests of pages; a test module that imports this is skipped where Playwright is absent.

Such a module takes `needs_chromium` as its `pytestmark`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install playwright)")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 120_000  # milliseconds until a state that does not come is a failure, also on a busy machine

needs_chromium = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt-get install chromium, or set CHROMIUM)"),
]


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """A headless browser."""
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield chromium
        chromium.close()
