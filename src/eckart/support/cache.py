"""Where a user's cache is."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`$ECKART_CACHE`, else `eckart` in `$XDG_CACHE_HOME`, else in `~/.cache`; without a home a temporary folder."""
    if own := os.environ.get("ECKART_CACHE"):
        return Path(os.path.expanduser(own))  # as it stands for a user whom the system does not know
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eckart"
    except RuntimeError:  # a user whom the system does not know, as in containers
        return Path(tempfile.gettempdir()) / "eckart-cache"
