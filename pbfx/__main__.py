"""`python -m pbfx` is `pbfx`."""

from __future__ import annotations

import sys

from pbfx.cli import main

sys.exit(main())
