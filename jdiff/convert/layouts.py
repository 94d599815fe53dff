"""How one of our leaves lies in a checkpoint: as one array or several, each in PyTorch's order of axes. All are undone exactly."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jdiff.convert.arrays import Array, Joined, Stacked, columns, transpose

Shape = tuple[int, ...]


class Unequal(ValueError):
    """Copies that are not equal; `index` is the first that differs from the first one."""

    def __init__(self, index: int):
        super().__init__(f"copy {index} differs")
        self.index = index


class Layout(Protocol):
    """A bijection between a leaf and `count` arrays."""

    @property
    def count(self) -> int:
        """How many arrays."""
        ...

    def shapes(self, shape: Shape) -> list[Shape]:
        """The arrays' shapes, from the leaf's."""
        ...

    def read(self, arrays: Sequence[Array]) -> Array:
        """The leaf, from arrays of the right shapes."""
        ...

    def write(self, leaf: Array) -> list[Array]:
        """The arrays, from the leaf."""
        ...


@dataclasses.dataclass(frozen=True)
class Axes:
    """One array with its axes in another order: theirs[i] is our axis order[i]."""

    order: Shape
    count: int = 1

    def shapes(self, shape: Shape) -> list[Shape]:
        return [tuple(shape[axis] for axis in self.order)]

    def read(self, arrays: Sequence[Array]) -> Array:
        return transpose(arrays[0], tuple(self.order.index(axis) for axis in range(len(self.order))))

    def write(self, leaf: Array) -> list[Array]:
        return [transpose(leaf, self.order)]


@dataclasses.dataclass(frozen=True)
class Same:
    """One array, as it is."""

    count: int = 1

    def shapes(self, shape: Shape) -> list[Shape]:
        return [shape]

    def read(self, arrays: Sequence[Array]) -> Array:
        return arrays[0]

    def write(self, leaf: Array) -> list[Array]:
        return [leaf]


@dataclasses.dataclass(frozen=True)
class Pointwise:
    """A product (in, out) stored as a 1x1 convolution (out, in, 1, 1)."""

    count: int = 1

    def shapes(self, shape: Shape) -> list[Shape]:
        return [(shape[1], shape[0], 1, 1)]

    def read(self, arrays: Sequence[Array]) -> Array:
        return np.asarray(arrays[0])[:, :, 0, 0].T

    def write(self, leaf: Array) -> list[Array]:
        return [np.asarray(leaf).T[:, :, None, None]]


@dataclasses.dataclass(frozen=True)
class Split:
    """A leaf whose last axis is `parts` arrays side by side (fused q, k, v)."""

    inner: Layout
    parts: int

    @property
    def count(self) -> int:
        return self.parts

    def shapes(self, shape: Shape) -> list[Shape]:
        return self.inner.shapes((*shape[:-1], shape[-1] // self.parts)) * self.parts

    def read(self, arrays: Sequence[Array]) -> Array:
        return Joined([self.inner.read([array]) for array in arrays], -1)

    def write(self, leaf: Array) -> list[Array]:
        return [self.inner.write(part)[0] for part in columns(leaf, self.parts)]


@dataclasses.dataclass(frozen=True)
class Layers:
    """A leaf that stacks `depth` layers, each stored apart."""

    inner: Layout
    depth: int

    @property
    def count(self) -> int:
        return self.depth * self.inner.count

    def shapes(self, shape: Shape) -> list[Shape]:
        return self.inner.shapes(shape[1:]) * self.depth

    def read(self, arrays: Sequence[Array]) -> Array:
        n = self.inner.count
        return Stacked([self.inner.read(arrays[i * n : (i + 1) * n]) for i in range(self.depth)])

    def write(self, leaf: Array) -> list[Array]:
        return [array for i in range(self.depth) for array in self.inner.write(leaf[i])]


@dataclasses.dataclass(frozen=True)
class Copies:
    """A leaf stored `count` times over. Reading raises `Unequal` when two copies differ in a bit."""

    inner: Layout
    count: int

    def shapes(self, shape: Shape) -> list[Shape]:
        return self.inner.shapes(shape) * self.count

    def read(self, arrays: Sequence[Array]) -> Array:
        first = _bits(arrays[0])
        for i, array in enumerate(arrays[1:], 1):
            if array.dtype != arrays[0].dtype or not np.array_equal(_bits(array), first):
                raise Unequal(i)
        return self.inner.read(arrays[:1])

    def write(self, leaf: Array) -> list[Array]:
        return self.inner.write(leaf) * self.count


def _bits(array: Array) -> np.ndarray:
    """The array as unsigned integers, so that NaN equals itself and -0 does not equal 0."""
    array = np.ascontiguousarray(array)
    return array.view(f"u{array.dtype.itemsize}")


LINEAR, CONV, SAME = Axes((1, 0)), Axes((3, 2, 0, 1)), Same()


def usual(leaf: str, ndim: int) -> Layout:
    """What PyTorch does with a leaf of that name and rank: kernels IO -> OI and HWIO -> OIHW, all else as it is."""
    if leaf != "kernel":
        return SAME
    return {2: LINEAR, 4: CONV}[ndim]
