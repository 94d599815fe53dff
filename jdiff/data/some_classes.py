"""Some classes of a source that has more."""

from typing import Any, Literal

import numpy as np

from jdiff.data.source import DataError
from jdiff.tree import nearest


class SomeClasses:
    """The records of the classes that `only` names, by comma, with the labels and class names of the whole; see
    `jdiff.data.Source`."""

    buckets = None

    def __init__(self, source: Any, only: str):
        """DataError for a class that the source does not have, or a source without classes or with buckets."""
        if source.buckets is not None or not hasattr(source, "labels"):
            raise DataError(
                f"data.only={only!r}: classes can be chosen of openmoji, imagefolder and latents, unbucketed"
            )
        self._source, labels = source, []
        for name in (name.strip() for name in only.split(",")):
            if name not in source.class_names:
                near, there = nearest(name, source.class_names), source.class_names
                raise DataError(f"data.only={only!r}: {name!r} is no class{near}; there are {there}")
            labels.append(source.class_names.index(name))
        self._rows = np.flatnonzero(np.isin(source.labels, labels))
        if not len(self._rows):
            raise DataError(f"data.only={only!r}: no record is of that class")
        self.name: str = source.name
        self.kind: Literal["image", "latent"] = source.kind
        self.shape, self.class_names, self.has_captions = source.shape, source.class_names, source.has_captions
        self.fingerprint = f"{source.fingerprint}-{only}"
        self.null_context = getattr(source, "null_context", None)
        if hasattr(source, "preview"):
            self.preview = source.preview

    @property
    def num_classes(self) -> int:
        """The whole source's."""
        return self._source.num_classes

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self, index: int) -> list[str]:
        """See `Captioned.texts`."""
        return self._source.texts(int(self._rows[index]))

    def read(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        """See `Source.read`."""
        return self._source.read(int(self._rows[index]), flip, rng)
