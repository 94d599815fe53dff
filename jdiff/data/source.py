"""What every data source offers, and how one is opened by name."""

from typing import Any, Literal, Protocol

import numpy as np


class DataError(ValueError):
    """Data that cannot be trained on; the message is one line that names it and says what to do."""


class BrokenRecord(Exception):
    """One record that cannot be read: `where` it is and why."""

    def __init__(self, where: str, reason: str):
        super().__init__(where, reason)
        self.where, self.reason = where, reason


class Source(Protocol):
    """Random access to labelled pictures or latents. It is pickled to worker processes, so it holds listings, not pixels.

    shape: (H, W, C) of every record. fingerprint: changes when the listing does, so that a resumed run can tell.
    """

    name: str
    kind: Literal["image", "latent"]
    shape: tuple[int, int, int]
    class_names: list[str]
    fingerprint: str

    @property
    def num_classes(self) -> int:
        """How many labels there are: 0..num_classes-1."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        """`{kind: array of `shape`, "label": int}`: uint8 for pictures, float32 for latents; mirrored when `flip`.

        What is random in a record comes from `rng` alone. BrokenRecord when it cannot be read.
        """
        ...


def open_source(name: str, *, path: str | None = None, image_size: int = 32) -> Source:
    """openmoji | imagefolder | tfds | latents, by name; DataError when there is nothing to read at `path`."""
    if name == "openmoji":
        from jdiff.data.openmoji import OpenMoji

        return OpenMoji(image_size)
    if name not in ("imagefolder", "tfds", "latents"):
        raise DataError(f"data.name={name!r} is unknown; use openmoji, imagefolder, tfds or latents")
    if not path:
        raise DataError(f"data.path is missing, and data.name={name!r} needs it: --config.data.path=…")
    if name == "imagefolder":
        from jdiff.data.imagefolder import ImageFolder

        return ImageFolder(path, image_size)
    if name == "tfds":
        from jdiff.data.tfds import Tfds

        return Tfds(path, image_size)
    from jdiff.data.latents import Latents

    return Latents(path)
