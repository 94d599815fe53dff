"""Pictures on disk, a file a batch: sampling that was killed goes on where it was."""

import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdiff import tree
from jdiff.paths import whole


class KeptPictures:
    """The pictures of some facts, in order, below `folder`: uint8 (B, H, W, 3) a file. `done` counts those that are there.

    facts: all that the pictures depend on. Those of other facts lie in folders of their own and are left alone.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self.folder, self.place = folder, folder / tree.digest(facts)
        self.done = sum(len(part) for part in self)
        self._facts = facts

    def add(self, pictures_BHWC: np.ndarray) -> None:
        """The next ones, as a file that is there whole or not at all."""
        if not self.done:
            self.place.mkdir(parents=True, exist_ok=True)
            (self.place / "facts.json").write_text(json.dumps(self._facts, indent=2) + "\n")
        with whole(self._file(self.done)) as partial, partial.open("wb") as file:
            np.save(file, pictures_BHWC)
            file.flush()
            os.fsync(file.fileno())
        self.done += len(pictures_BHWC)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The batches, each read when it is asked for."""
        first = 0
        while (path := self._file(first)).is_file():
            part = np.load(path, mmap_mode="r")
            yield part
            first += len(part)

    def _file(self, first: int) -> Path:
        return self.place / f"{first:09d}.npy"

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
