"""What every data source offers, and how one is opened by name."""

from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from jdiff.data.buckets import Buckets, Size


class DataError(ValueError):
    """Data that cannot be trained on; the message is one line that names it and says what to do."""


class BrokenRecord(Exception):
    """One record that cannot be read: `where` it is and why."""

    def __init__(self, where: str, reason: str):
        super().__init__(where, reason)
        self.where, self.reason = where, reason


class Source(Protocol):
    """Random access to labelled pictures or latents. It is pickled to worker processes, so it holds listings, not pixels.

    shape: (H, W, C) of every record. buckets: records then have their own bucket's H and W instead, and stand in batches of
    their bucket. fingerprint: changes when the listing does, so that a resumed run can tell. has_captions: `read` gives a
    `caption`, and the source has `texts(index)`, all the captions that it is drawn from.
    """

    name: str
    kind: Literal["image", "latent"]
    shape: tuple[int, int, int]
    class_names: list[str]
    fingerprint: str
    has_captions: bool

    @property
    def buckets(self) -> "Buckets | None":
        """The buckets' sizes, and each record's."""
        ...

    @property
    def num_classes(self) -> int:
        """How many labels there are: 0..num_classes-1."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        """`{kind: array of `shape`, "label": int, …}`: uint8 for pictures, float32 for latents; mirrored when `flip`.

        Also `caption`, a string, where the source has captions. What is random in a record comes from `rng` alone.
        BrokenRecord when it cannot be read.
        """
        ...


class Captioned(Source, Protocol):
    """A source with captions."""

    def texts(self, index: int) -> list[str]:
        """All of a record's captions, one at least; BrokenRecord when they cannot be read."""
        ...


NAMES = ("captions", "openmoji", "imagefolder", "tfds", "latents", "noise")


def open_source(
    name: str,
    *,
    path: str | None = None,
    image_size: int = 32,
    split: str = "all",
    buckets: "tuple[Size, ...] | None" = None,
    random_crop: bool = False,
    prompt: str | None = None,
    only: str | None = None,
) -> Source:
    """captions | openmoji | imagefolder | tfds | latents | noise, by name; DataError when there is nothing to read at `path`.

    split: of openmoji, all | train | heldout. buckets: sizes (`buckets.make_sizes`), for captions and imagefolder.
    random_crop, prompt: for captions. only: the classes that are read, by comma. An option that the source has not is an error.
    """
    if only is not None:
        from jdiff.data.some_classes import SomeClasses

        whole = {"path": path, "image_size": image_size, "split": split, "buckets": buckets, "random_crop": random_crop}
        return SomeClasses(open_source(name, **whole, prompt=prompt), only)
    if name not in NAMES:
        raise DataError(f"data.name={name!r} is unknown; use {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    if split != "all" and name != "openmoji":
        raise DataError(f"split={split!r} is for openmoji alone; data.name={name!r} is read whole")
    if buckets is not None and name not in ("captions", "imagefolder"):
        raise DataError(f"data.name={name!r} has pictures of one size; buckets are for captions and imagefolder")
    if random_crop and name != "captions":
        raise DataError(f"data.name={name!r} has no random crop; captions has")
    if prompt is not None and name != "captions":
        raise DataError(f"captions.prompt={prompt!r} is for data.name='captions', not {name!r}")
    if name == "openmoji":
        from jdiff.data.openmoji import OpenMoji

        return OpenMoji(image_size, split)
    if not path:
        raise DataError(f"data.path is missing, and data.name={name!r} needs it: --config.data.path=…")
    if name == "captions":
        from jdiff.data.captions import Captions

        return Captions(path, image_size, buckets, random_crop, prompt)
    if name == "imagefolder":
        from jdiff.data.imagefolder import ImageFolder

        return ImageFolder(path, image_size, buckets)
    if name == "tfds":
        from jdiff.data.tfds import Tfds

        return Tfds(path, image_size)
    if name == "noise":
        from jdiff.data.noise import Noise

        return Noise(path)
    from jdiff.data.latents import Latents

    return Latents(path)
