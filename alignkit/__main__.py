"""`python -m alignkit`: the program, where its script is not on the path."""

from __future__ import annotations

import sys

from alignkit.cli import main

sys.exit(main())
