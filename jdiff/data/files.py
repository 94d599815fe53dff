"""Picture files below a folder."""

import os
from pathlib import Path
from typing import Any

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")


def walk(folder: Path, endings: tuple[str, ...], bar: Any, prefix: str = "") -> list[str]:
    """Files below a folder whose names end so (in lower case), as paths from it with `prefix` before them; not sorted.

    Hidden files are left out, and links that would lead round in a circle. bar: a tqdm, moved on by one for each file.
    """
    found, pending = [], [(str(folder), prefix)]
    while pending:
        where, below = pending.pop()
        with os.scandir(where) as entries:
            for entry in entries:
                name = f"{below}/{entry.name}" if below else entry.name
                if entry.name.startswith(".") or (entry.is_symlink() and _leads_up(entry.path)):
                    continue
                if entry.is_dir():
                    pending.append((entry.path, name))
                elif entry.name.lower().endswith(endings):
                    found.append(name)
                    bar.update()
    return found


def _leads_up(link: str) -> bool:
    """Whether a link is to a folder that it lies in, so that following it would never end."""
    return os.path.realpath(link) in map(str, Path(os.path.realpath(os.path.dirname(link)), "x").parents)
