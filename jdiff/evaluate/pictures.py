"""Where pictures to be scored come from: a folder, an .npz of them, a data source."""

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from jdiff import data
from jdiff.data import BrokenRecord, DataError
from jdiff.data.imagefolder import ImageFolder
from jdiff.evaluate.moments import Moments
from jdiff.evaluate.scores import Reference
from jdiff.npz import Npz
from jdiff.paths import whole

BATCH = 256
"""Pictures read at once."""


class Pictures(Protocol):
    """What is scored or held against: any `jdiff.data.Source` of pictures is one."""

    shape: tuple[int, int, int]
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        """See `Source.read`."""
        ...


class Stored:
    """`arr_0` of an .npz, uint8 (N, H, W, 3), of which one picture is in memory at a time; see `Pictures`.

    Quick in the order of the file, slow backwards. prompts: its `prompt`, where it has them.
    """

    def __init__(self, path: str):
        with _npz(path) as file:
            if "arr_0" not in file:
                raise DataError(f"{path} holds {sorted(file)}, and pictures are in arr_0")
            self.prompts = [str(text) for text in file["prompt"]] if "prompt" in file else None
            self.fingerprint = f"{file.info('arr_0').CRC:08x}"
        stored = _npz(path)  # stays open, for one picture after another
        self._path, self._file = path, stored.open("arr_0")
        shape, fortran, dtype = stored.header("arr_0", self._file)
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran:
            raise DataError(f"{path}: arr_0 is {dtype}{list(shape)}, not uint8 (N, H, W, 3)")
        self._count, self.shape, self._start = shape[0], (shape[1], shape[2], shape[3]), self._file.tell()

    def __len__(self) -> int:
        return self._count

    def read(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        """See `Source.read`."""
        size = math.prod(self.shape)
        try:
            self._file.seek(self._start + index * size)
            image = np.frombuffer(self._file.read(size), np.uint8).reshape(self.shape)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise BrokenRecord(f"{self._path}: arr_0[{index}]", str(error)) from error
        return {"image": image[:, ::-1] if flip else image}


def open_pictures(source: str, image_size: int, captions: bool = False) -> Pictures:
    """A folder of pictures, cropped to image_size; an .npz with `arr_0`, uint8 (N, H, W, 3); or openmoji[:train|heldout].

    captions: a folder is to have one for each picture (see `jdiff.data.captions`). DataError for what is none of these.
    """
    name, _, split = source.partition(":")
    if name == "openmoji":
        return data.open_source(name, image_size=image_size, split=split or "all")
    if source.endswith(".npz"):
        return Stored(source)
    return data.open_source("captions" if captions else "imagefolder", path=source, image_size=image_size)


def chosen(count: int, most: int | None) -> np.ndarray:
    """Which of `count` pictures are taken where at most so many are wanted: evenly spread over all, in order."""
    return np.arange(count) if most is None or most >= count else np.linspace(0, count - 1, most).astype(int)


def batches(pictures: Pictures, most: int | None = None, first: int = 0) -> Iterator[np.ndarray]:
    """uint8 (B, H, W, 3) each, of those that are `chosen`, from the first-th of these on. DataError for a picture that cannot be
    read."""
    index, rng = chosen(len(pictures), most), np.random.default_rng(0)
    with tqdm(total=len(index), initial=first, unit="image", desc="features", leave=False) as bar:
        for rows in (index[start : start + BATCH] for start in range(first, len(index), BATCH)):
            try:
                yield np.stack([pictures.read(int(i), False, rng)["image"] for i in rows])
            except BrokenRecord as error:
                raise DataError(f"{error.where} cannot be read, and a score is of all: {error.reason}") from error
            bar.update(len(rows))


def check_pairs(samples: Pictures | None, reference: Pictures, titles: tuple[str, str]) -> None:
    """DataError unless the two are pictures that lie somewhere, of one size, as many, and in folders of the same names."""
    if samples is None:
        raise DataError(f"{titles[0]} is a run of classes, whose pictures have no originals to be compared with")
    for what, one, other in (("pictures", len(samples), len(reference)), ("as shape", samples.shape, reference.shape)):
        if one != other:
            raise DataError(f"{titles[0]} has {one} {what}, {titles[1]} {other}: one by one they cannot be compared")
    if isinstance(samples, ImageFolder) and isinstance(reference, ImageFolder):
        for i in range(len(samples)):
            one, other = (folder.file(i).relative_to(folder.root).with_suffix("") for folder in (samples, reference))
            if one != other:
                raise DataError(
                    f"{titles[0]} has {one} where {titles[1]} has {other}: the folders' names must be the same"
                )


def prompts_of(source: str, pictures: Any, most: int | None = None) -> Sequence[str]:
    """The one text of each picture that is `chosen`. DataError where there is none, or more than one."""
    if isinstance(pictures, Stored):
        if pictures.prompts is None or len(pictures.prompts) != len(pictures):
            raise DataError(f"{source} has no `prompt` for each picture, as tools/sample.py --npz writes it")
        return [pictures.prompts[i] for i in chosen(len(pictures), most)]
    if not getattr(pictures, "has_captions", False):
        raise DataError(f"{source} has no texts: a score by them takes an .npz with `prompt` or a folder with captions")
    found = []
    for i in chosen(len(pictures), most):
        try:
            texts = pictures.texts(int(i))
        except BrokenRecord as error:
            raise DataError(f"{error.where} has no text that can be read: {error.reason}") from error
        if len(texts) != 1:
            raise DataError(f"{source}: picture {i} has {len(texts)} captions, and a score is of one")
        found += texts
    return found


FIELDS = (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s"))
"""A reference's moments, and ADM's names of their mean and covariance."""


def save_moments(path: Path, reference: Reference) -> None:
    """Writes a reference's moments as an .npz under the names of ADM's and pytorch-fid's, with their network, title and count."""
    arrays: dict[str, Any] = {
        "network": reference.network,
        "title": reference.title,
        "count": reference.pool.count,
    }
    for field, mu, sigma in FIELDS:
        moments: Moments | None = getattr(reference, field)
        if moments is not None:
            arrays |= {mu: moments.mean_D, sigma: moments.covariance_DD}
    with whole(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def moments_of(path: str) -> Reference | None:
    """The reference that an .npz holds as moments (`mu`, `sigma`; `mu_s`, `sigma_s` for sFID); None for a file of pictures.

    ADM's and pytorch-fid's files do not say by which network they were made, nor of how many pictures; those of `save_moments` do.
    """
    with _npz(path) as file:
        if "mu" not in file:
            return None
        count = int(file["count"]) if "count" in file else 2
        found: dict[str, Any] = {
            field: Moments.from_statistics(count, file[mu], file[sigma]) for field, mu, sigma in FIELDS if mu in file
        }
        title, network = (str(file[name]) if name in file else "" for name in ("title", "network"))
    return Reference(f"{path} ({title})" if title else path, **found, network=network)


def holds_pictures(path: str) -> bool:
    """Whether an .npz has pictures, beside moments or alone."""
    with _npz(path) as file:
        return "arr_0" in file


def _npz(path: str) -> Npz:
    try:
        return Npz(path)
    except ValueError as error:
        raise DataError(str(error)) from error
