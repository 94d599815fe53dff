"""Records of noise in place of a data set that is not at hand: to plan a run, or to time its steps."""

import re
from typing import Any, Literal

import numpy as np

from jdiff.data.source import DataError

LENGTH = 10_000


class Noise:
    """`path` says what: `32x32x4:1000` are latents of that shape, of 1000 classes; three channels are pictures. See
    `jdiff.data.Source`; each record has a caption of one word."""

    name = "noise"
    buckets = None
    has_captions = True

    def __init__(self, path: str):
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)(?::([1-9]\d*))?", path)
        if found is None:
            raise DataError(
                f"data.path={path!r}: write HEIGHTxWIDTHxCHANNELS:CLASSES, as 32x32x4:1000 or 512x512x3, for data.name='noise'"
            )
        height, width, channels, classes = (int(n or 1) for n in found.groups())
        self.shape: tuple[int, int, int] = (height, width, channels)
        self.kind: Literal["image", "latent"] = "image" if channels == 3 else "latent"
        self.class_names = [str(i) for i in range(classes)]
        self.fingerprint = f"noise {path}"

    @property
    def num_classes(self) -> int:
        """As many as `path` says, one when it says none."""
        return len(self.class_names)

    def __len__(self) -> int:
        return LENGTH

    def texts(self, index: int) -> list[str]:
        """One word."""
        return ["noise"]

    def read(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        """See `Source.read`."""
        image = self.kind == "image"
        record = rng.integers(0, 256, self.shape, np.uint8) if image else rng.standard_normal(self.shape, np.float32)
        return {self.kind: record, "label": index % self.num_classes, "caption": "noise"}
