"""Settings of glibc's allocator, which it reads when a process begins."""

from __future__ import annotations

import os
import sys

# fewer page faults: the allocator keeps its arenas (measured +19 to +30 % tokens a second)
SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "68719476736", "MALLOC_TOP_PAD_": "268435456"}


def keep_arenas() -> None:
    """Start the script again under these settings, unless it runs under them."""
    if any(os.environ.get(key) != value for key, value in SETTINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **SETTINGS})
