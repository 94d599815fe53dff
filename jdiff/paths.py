"""Where jdiff keeps files of its own."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """For what can be made again: $JDIFF_CACHE, else $XDG_CACHE_HOME/jdiff, else ~/.cache/jdiff."""
    if "JDIFF_CACHE" in os.environ:
        return Path(os.environ["JDIFF_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jdiff"
