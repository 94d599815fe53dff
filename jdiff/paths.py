"""Where jdiff keeps files of its own, and how any file of its making appears: whole."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def cache_dir() -> Path:
    """For what can be made again: $JDIFF_CACHE, else $XDG_CACHE_HOME/jdiff, else ~/.cache/jdiff."""
    if "JDIFF_CACHE" in os.environ:
        return Path(os.environ["JDIFF_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jdiff"


@contextlib.contextmanager
def whole(dest: Path) -> Iterator[Path]:
    """Where to write a file or folder that appears at `dest` at the end, or not at all when something is raised.

    It is `.NAME.partial` beside `dest`; what a killed writer left there is removed first.
    """
    partial = dest.with_name(f".{dest.name}.partial")
    remove(partial)
    try:
        yield partial
        os.replace(partial, dest)
    except BaseException:
        remove(partial)
        raise


def remove(path: Path) -> None:
    """Removes a file or a folder, where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
