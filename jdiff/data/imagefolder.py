"""Class folders of pictures: PATH/CLASS/**/picture.jpg, as ImageNet is laid out; a folder without any is one class."""

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from jdiff.data import buckets, images
from jdiff.data.files import PICTURES, walk
from jdiff.data.packed import Packed
from jdiff.data.source import BrokenRecord, DataError


class ImageFolder:
    """Pictures of (image_size, image_size, 3), cropped as ADM does, or of the bucket's size; see `jdiff.data.Source`.

    Classes are numbered in their names' order.
    """

    name = "imagefolder"
    kind: Literal["image", "latent"] = "image"
    has_captions = False

    def __init__(self, path: str, image_size: int, sizes: tuple[buckets.Size, ...] | None = None):
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
                    found = sorted(walk(self.root / folder, PICTURES, bar, folder))
                    if found:
                        labels += [len(self.class_names)] * len(found)
                        self.class_names.append(folder)
                        names += found
                if not names:
                    names = sorted(walk(self.root, PICTURES, bar))
                    labels, self.class_names = [0] * len(names), [self.root.resolve().name]
        except OSError as error:
            raise DataError(f"data.path={path!r} cannot be listed: {error}") from error
        if not names:
            raise DataError(
                f"data.path={path!r} holds no pictures ({', '.join(PICTURES)}), neither in class folders nor itself"
            )
        self.labels = np.asarray(labels, np.int32)
        self._names = Packed(os.fsencode(name) for name in names)
        listing = hashlib.sha256(self._names.buffer)
        listing.update(self._names.offsets.tobytes() + self.labels.tobytes() + str(self.shape).encode())
        self.buckets = None
        if sizes is not None:
            self.buckets = buckets.assign(sizes, len(self), lambda i: images.header_size(str(self.file(i))), path)
            listing.update(self.buckets.digest())
        self.fingerprint = listing.hexdigest()[:16]

    @property
    def num_classes(self) -> int:
        """How many class folders hold pictures."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def file(self, index: int) -> Path:
        """The path of one picture."""
        return self.root / os.fsdecode(self._names[index])

    def read(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        """See `Source.read`."""
        path = self.file(index)
        size = self.shape[0] if self.buckets is None else self.buckets.size(index)
        try:
            with path.open("rb") as file:
                image = images.decode(file, size)
        except Exception as error:  # PIL's plugins raise nearly anything on damaged bytes
            raise BrokenRecord(str(path), f"{type(error).__name__}: {error}".replace("\n", " ")) from error
        return {"image": image[:, ::-1] if flip else image, "label": self.labels[index]}
