"""Aspect-ratio buckets: pictures of about one area and many shapes, so that little of a picture is cut away.

As NovelAI describes them (blog.novelai.net "NovelAI improvements on Stable Diffusion") and kohya-ss/sd-scripts makes them:
sides are multiples of a step, and each picture goes to the bucket of the nearest ratio, enlarged no more than covers it.
"""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from jdiff.data.source import DataError

Size = tuple[int, int]
"""Height and width."""
CHUNK = 256


def make_sizes(image_size: int, step: int = 64, max_ratio: float = 2.0) -> tuple[Size, ...]:
    """The buckets' sizes: for each side the longest other one within image_size**2 pixels, both ways round; sorted.

    step: what both sides are multiples of. max_ratio: the longer side over the shorter, at most.
    DataError for an image_size that is no multiple of the step, or a ratio below 1.
    """
    if step < 1 or image_size < step or image_size % step:
        raise DataError(f"data.image_size={image_size} is no multiple of the buckets' step of {step}")
    if not max_ratio >= 1:
        raise DataError(
            f"the buckets' largest ratio is the longer side over the shorter, at least 1: found {max_ratio}"
        )
    sizes = set()
    for short in range(step, image_size + 1, step):
        long = image_size**2 // short // step * step
        if long <= max_ratio * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


def nearest(sizes: tuple[Size, ...], pictures_N2: np.ndarray) -> np.ndarray:
    """The bucket of the nearest ratio for pictures of (height, width), by the ratios' logarithms: int16 (N,)."""
    ratios = np.log([width / height for height, width in sizes])
    found = np.log(pictures_N2[:, 1] / pictures_N2[:, 0])
    return np.abs(found[:, None] - ratios).argmin(axis=1).astype(np.int16)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes and each record's bucket, `of`: int16 (N,)."""

    sizes: tuple[Size, ...]
    of: np.ndarray

    def size(self, index: int) -> Size:
        """The height and width of a record's bucket."""
        return self.sizes[self.of[index]]

    def digest(self) -> bytes:
        """What a fingerprint takes in."""
        return str(self.sizes).encode() + self.of.tobytes()

    def table(self, batch_size: int) -> str:
        """What an epoch consists of: a line for each bucket with its records, batches, and rows that repeat a record."""
        lines = [f"{'bucket':>12} {'records':>10} {'batches':>9} {'padding':>9}"]
        counts = np.bincount(self.of, minlength=len(self.sizes))
        batches = -(-counts // batch_size)
        padding = batches * batch_size - counts
        for (height, width), *numbers in zip(self.sizes, counts, batches, padding, strict=True):
            lines.append(f"{f'{height} x {width}':>12} {numbers[0]:>10,} {numbers[1]:>9,} {numbers[2]:>9,}")
        lines.append(f"{'all':>12} {counts.sum():>10,} {batches.sum():>9,} {padding.sum():>9,}")
        share = padding.sum() / max(batches.sum() * batch_size, 1)
        return "\n".join([*lines, f"buckets (height x width): {share:.1%} of an epoch's rows repeat a record"])


def assign(sizes: tuple[Size, ...], count: int, size_of: Callable[[int], Size], where: str) -> Buckets:
    """Puts each of `count` records into a bucket, by `size_of(index)`, which threads call.

    A record whose size cannot be told (any exception: it will turn out broken when it is read) goes to the fullest bucket.
    where: for the progress bar.
    """

    def sizes_of(start: int) -> np.ndarray:
        found = np.zeros((min(CHUNK, count - start), 2), np.int64)
        for i in range(len(found)):
            try:
                found[i] = size_of(start + i)
            except Exception:
                continue
        return found

    pictures_N2 = np.zeros((count, 2), np.int64)
    starts = range(0, count, CHUNK)
    with (
        tqdm(total=count, desc=f"sizes of {where}", unit="file", leave=False, delay=1) as bar,
        ThreadPoolExecutor(16) as pool,  # most of the time is spent waiting for the disk
    ):
        for start, found in zip(starts, pool.map(sizes_of, starts), strict=True):
            pictures_N2[start : start + len(found)] = found
            bar.update(len(found))
    known = pictures_N2.min(axis=1) > 0
    of = np.zeros(count, np.int16)
    if known.any():
        of[known] = nearest(sizes, pictures_N2[known])
        of[~known] = np.bincount(of[known]).argmax()
    return Buckets(sizes, of)
