"""Where a user's cache is."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$ECKART_CACHE`, else `eckart` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    if own := os.environ.get("ECKART_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eckart"
