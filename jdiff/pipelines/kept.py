"""Batches on disk, a file each: what was killed while it made them goes on where it was."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from jdiff import tree
from jdiff.npz import mapped
from jdiff.paths import whole


def place_of(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Where below `folder` the batches of some facts lie, which are all that these depend on; others have places of their own."""
    return folder / tree.digest(facts)


def file_of(place: Path, first: int, kind: str) -> Path:
    """The file of the batch that begins with this picture. kind: npy or npz."""
    return place / f"{first:09d}.{kind}"


def keep(path: Path, facts: Mapping[str, Any], write: Callable[[IO[bytes]], None]) -> None:
    """Writes a batch's file, there whole or not at all, also where the power fails; beside the first of a place its facts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not (told := path.with_name("facts.json")).is_file():
        told.write_text(json.dumps(facts, indent=2) + "\n")
    with whole(path) as partial, partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


class KeptPictures:
    """The pictures of some facts, in order, below `folder`: uint8 (B, H, W, 3) a file. `done` counts those that are there.

    ValueError for a file that is damaged.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self.folder, self.place = folder, place_of(folder, facts)
        self.done = sum(len(part) for part in self)
        self._facts = facts

    def add(self, pictures_BHWC: np.ndarray) -> None:
        """The next ones."""
        keep(file_of(self.place, self.done, "npy"), self._facts, lambda file: np.save(file, pictures_BHWC))
        self.done += len(pictures_BHWC)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The batches, each read when it is asked for."""
        first = 0
        while (path := file_of(self.place, first, "npy")).is_file():
            part = mapped(path)
            yield part
            first += len(part)

    def remove(self) -> None:
        """Once they are elsewhere."""
        shutil.rmtree(self.place, ignore_errors=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def write_npz(path: Path, parts: Iterable[np.ndarray], count: int, columns: Mapping[str, np.ndarray]) -> None:
    """`count` pictures that come in parts as `arr_0` of an npz, and columns beside them; never all in memory at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for i, part in enumerate(parts):
                if i == 0:
                    shape = (count, *part.shape[1:])
                    header = {"descr": np.lib.format.dtype_to_descr(part.dtype), "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_2_0(file, header)
                file.write(np.ascontiguousarray(part).data)
        for name, values in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.save(file, values)
