"""Where pictures to be scored come from: a folder, an .npz of them, a data source."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jdiff import data
from jdiff.data import BrokenRecord, DataError, Source
from jdiff.evaluate.moments import Moments
from jdiff.evaluate.scores import Reference

BATCH = 256
"""Pictures read at once."""


def open_pictures(source: str, image_size: int) -> Source | np.ndarray:
    """A folder of pictures, cropped to image_size; an .npz with `arr_0`, uint8 (N, H, W, 3); or openmoji[:train|heldout].

    DataError for what is none of these.
    """
    name, _, split = source.partition(":")
    if name == "openmoji":
        return data.open_source(name, image_size=image_size, split=split or "all")
    if not source.endswith(".npz"):
        return data.open_source("imagefolder", path=source, image_size=image_size)
    with _npz(source) as file:
        if "arr_0" not in file:
            raise DataError(f"{source} holds {sorted(file)}, and pictures are in arr_0")
        pictures = file["arr_0"]
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise DataError(f"{source}: arr_0 is {pictures.dtype}{list(pictures.shape)}, not uint8 (N, H, W, 3)")
    return pictures


def batches(pictures: Source | np.ndarray, count: int | None = None) -> Iterator[np.ndarray]:
    """uint8 (B, H, W, 3) each, in order; count: at most, spread evenly over all. DataError for a picture that cannot be read."""
    index = np.arange(len(pictures))
    if count is not None and count < len(index):
        index = np.linspace(0, len(index) - 1, count).astype(int)
    rng = np.random.default_rng(0)
    with tqdm(total=len(index), unit="image", desc="features", leave=False) as bar:
        for start in range(0, len(index), BATCH):
            chosen = index[start : start + BATCH]
            if isinstance(pictures, np.ndarray):
                yield pictures[chosen]
            else:
                try:
                    yield np.stack([pictures.read(int(i), False, rng)["image"] for i in chosen])
                except BrokenRecord as error:
                    raise DataError(f"{error.where} cannot be read, and a score is of all: {error.reason}") from error
            bar.update(len(chosen))


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
    np.savez(path, **arrays)


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


def _npz(path: str) -> np.lib.npyio.NpzFile:
    try:
        file = np.load(Path(path), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise DataError(f"{path} is no .npz")
    return file
