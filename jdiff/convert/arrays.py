"""Arrays put together from others without being formed: a stack of layers, a product's fused columns.

A checkpoint's arrays stay views of the mapped file until somebody asks for numbers, one leaf at a time; taken apart again they
are the very arrays that came in.
"""

import mmap
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

FLOATS = ("float32", "float16", "bfloat16", "float64")
Array: TypeAlias = Any
"""A numpy array, `Stacked` or `Joined`; anything else with shape and dtype that `np.asarray` takes."""


class Lazy:
    """Several arrays seen as one: has shape, dtype and ndim, and becomes a new C-ordered array in `np.asarray`."""

    shape: tuple[int, ...]

    def __init__(self, parts: Sequence[Array]):
        self.parts = tuple(parts)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def _fill(self, out: np.ndarray) -> None:
        raise NotImplementedError

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array that is not formed yet cannot be had without a copy")
        out = np.empty(self.shape, self.dtype)
        self._fill(out)
        return out if dtype is None else out.astype(dtype, copy=False)


class Stacked(Lazy):
    """Equally shaped arrays along a new first axis; `stacked[i]` is the i-th, as it came in."""

    def __init__(self, parts: Sequence[Array]):
        super().__init__(parts)
        self.shape = (len(self.parts), *self.parts[0].shape)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> Array:
        return self.parts[i]

    def _fill(self, out: np.ndarray) -> None:
        for part, row in zip(self.parts, out, strict=True):
            _copy(part, row)


class Joined(Lazy):
    """Arrays one after another along `axis`."""

    def __init__(self, parts: Sequence[Array], axis: int):
        super().__init__(parts)
        first = self.parts[0].shape
        self.axis = axis % len(first)
        length = sum(part.shape[self.axis] for part in self.parts)
        self.shape = (*first[: self.axis], length, *first[self.axis + 1 :])

    def _fill(self, out: np.ndarray) -> None:
        start = 0
        for part in self.parts:
            stop = start + part.shape[self.axis]
            _copy(part, out[(slice(None),) * self.axis + (slice(start, stop),)])
            start = stop


def _copy(part: Array, out: np.ndarray) -> None:
    if isinstance(part, Lazy):
        part._fill(out)
    else:
        out[...] = part


def columns(x: Array, n: int) -> tuple[Array, ...]:
    """Undoes `Joined(…, -1)`: n equal parts of the last axis."""
    if isinstance(x, Joined) and x.axis == x.ndim - 1 and len(x.parts) == n:
        return x.parts
    return tuple(np.split(np.asarray(x), n, axis=-1))


def transpose(x: Array, axes: tuple[int, ...]) -> Array:
    """`np.transpose` that leaves joined arrays joined."""
    if isinstance(x, Joined):
        return Joined([transpose(part, axes) for part in x.parts], axes.index(x.axis))
    return np.transpose(np.asarray(x), axes)


def numbers(x: Array) -> np.ndarray:
    """The array itself, formed when it is not yet."""
    return np.asarray(x)


def contiguous(x: Array, dtype: Any) -> np.ndarray:
    """The array in C order and of that dtype; itself where it is so already. (`np.ascontiguousarray` gives scalars an axis.)"""
    return numbers(x).astype(dtype, order="C", copy=False)


def is_float(dtype: Any) -> bool:
    """Whether arrays of that dtype are cast where a cast is asked for."""
    return np.dtype(dtype).name in FLOATS


def release(x: Array) -> None:
    """Lets the system take back the memory of mapped files that an array is a view of: it is read again when it is needed."""
    if isinstance(x, Lazy):
        for part in x.parts:
            release(part)
        return
    base: Any = x
    while base is not None and not isinstance(
        base, mmap.mmap
    ):  # through arrays, memoryviews and as_strided's own class
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    if base is not None and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
