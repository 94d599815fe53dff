"""Class folders of pictures: PATH/CLASS/**/picture.jpg, as ImageNet is laid out; a folder without any is one class."""

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from jdiff.data.images import decode
from jdiff.data.source import BrokenRecord, DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")


class ImageFolder:
    """Pictures of (image_size, image_size, 3), cropped as ADM does; see `jdiff.data.Source`.

    Classes are numbered in their names' order. The listing is one buffer of bytes with offsets, so that a million names
    cost little and pickle quickly.
    """

    name = "imagefolder"
    kind: Literal["image", "latent"] = "image"

    def __init__(self, path: str, image_size: int):
        self.root = Path(path)
        if not self.root.exists():
            raise DataError(f"data.path={path!r} does not exist")
        if not self.root.is_dir():
            raise DataError(f"data.path={path!r} is not a folder; imagefolder wants CLASS/picture.jpg below it")
        self.shape: tuple[int, int, int] = (image_size, image_size, 3)
        self.class_names: list[str] = []
        names, labels = [], []
        try:
            folders = sorted(e.name for e in os.scandir(self.root) if e.is_dir() and not e.name.startswith("."))
            with tqdm(desc=f"listing {path}", unit="file", leave=False, delay=1) as bar:
                for folder in folders:
                    found = sorted(_pictures(self.root / folder, folder, bar))
                    if found:
                        labels += [len(self.class_names)] * len(found)
                        self.class_names.append(folder)
                        names += found
                if not names:
                    names = sorted(_pictures(self.root, "", bar))
                    labels, self.class_names = [0] * len(names), [self.root.resolve().name]
        except OSError as error:
            raise DataError(f"data.path={path!r} cannot be listed: {error}") from error
        if not names:
            raise DataError(
                f"data.path={path!r} holds no pictures ({', '.join(EXTENSIONS)}), neither in class folders nor itself"
            )
        encoded = [os.fsencode(name) for name in names]
        self.labels = np.asarray(labels, np.int32)
        self._offsets = np.cumsum([0, *map(len, encoded)])
        self._names = b"".join(encoded)
        listing = hashlib.sha256(self._names)
        listing.update(self._offsets.tobytes() + self.labels.tobytes() + str(self.shape).encode())
        self.fingerprint = listing.hexdigest()[:16]

    @property
    def num_classes(self) -> int:
        """How many class folders hold pictures."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def file(self, index: int) -> Path:
        """The path of one picture."""
        return self.root / os.fsdecode(self._names[self._offsets[index] : self._offsets[index + 1]])

    def read(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        """See `Source.read`."""
        path = self.file(index)
        try:
            with path.open("rb") as file:
                image = decode(file, self.shape[0])
        except Exception as error:  # PIL's plugins raise nearly anything on damaged bytes
            raise BrokenRecord(str(path), f"{type(error).__name__}: {error}".replace("\n", " ")) from error
        return {"image": image[:, ::-1] if flip else image, "label": self.labels[index]}


def _pictures(folder: Path, prefix: str, bar: Any) -> list[str]:
    """Picture files below a folder, relative to the root; hidden files are left out."""
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
                elif entry.name.lower().endswith(EXTENSIONS):
                    found.append(name)
                    bar.update()
    return found


def _leads_up(link: str) -> bool:
    """Whether a link is to a folder that it lies in, so that following it would never end."""
    return os.path.realpath(link) in map(str, Path(os.path.realpath(os.path.dirname(link)), "x").parents)
