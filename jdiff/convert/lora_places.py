"""Where a checkpoint's modules lie in our trees, and how the two factors of an adapter lie in an array: by the tables that
convert whole models, read for their kernels."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jdiff import tree
from jdiff.convert import engine
from jdiff.convert.arrays import Array
from jdiff.convert.engine import Naming
from jdiff.convert.layouts import CONV, LINEAR, Copies, Layers, Pointwise, Shape, Split

ADAPTED = ("kernel", "embedding")
"""What a leaf is called that may have an adapter."""
_UP = Pointwise()


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A kernel or table of ours, and the checkpoint's modules that it is.

    path, shape: ours. modules: names (without `.weight`) by stacked layer and by fused part; several names are copies of one
    another. stacked: whether the first axis is one of layers.
    """

    path: str
    shape: Shape
    modules: tuple[tuple[tuple[str, ...], ...], ...]
    stacked: bool

    @property
    def table(self) -> bool:
        """Whether it is an embedding's table, (rows, width)."""
        return self.path.endswith("embedding")

    @property
    def parts(self) -> int:
        """How many modules lie side by side on its last axis."""
        return len(self.modules[0])

    @property
    def kernel(self) -> Shape:
        """The shape of one module's kernel: (in, out), (kh, kw, in, out) or (rows, width)."""
        shape = self.shape[1:] if self.stacked else self.shape
        return (*shape[:-1], shape[-1] // self.parts)


def leaves(module: Any, naming: Naming) -> list[Leaf]:
    """Every leaf of a model that may have an adapter, in the tree's order. Errors as `engine.plan`'s."""
    shapes = tree.flatten(engine.shapes(module))
    found = []
    for entry in engine.plan(module, naming):
        if entry.path.rpartition("/")[2] in ADAPTED:
            stacked = isinstance(entry.layout, Layers)
            names = tuple(name.removesuffix(".weight") for name in entry.names)
            found.append(Leaf(entry.path, tuple(shapes[entry.path].shape), _grid(names, entry.layout), stacked))
    return found


def _grid(names: tuple[str, ...], layout: Any) -> tuple[tuple[tuple[str, ...], ...], ...]:
    if isinstance(layout, Copies):
        return ((names,),)
    inner = layout.inner if isinstance(layout, Layers) else layout
    parts = inner.parts if isinstance(inner, Split) else 1
    return tuple(tuple((name,) for name in names[i : i + parts]) for i in range(0, len(names), parts))


# Factors, from PyTorch's order of axes and back


def fits(leaf: Leaf, a: Array, b: Array) -> list[tuple[str, Shape, str]]:
    """What is wrong with a's and b's shapes for a module of this leaf: (a or b, its shape, what was expected)."""
    *spatial, fan_in, out = leaf.kernel
    pointwise = all(n == 1 for n in spatial) and not leaf.table
    inputs = [fan_in, *spatial]
    expected = {"a": [inputs], "b": [[out], [out, 1, 1]]}
    if pointwise:  # a product of pixels: the files have it as a convolution or as a plain one
        expected["a"] = [[fan_in], [fan_in, 1, 1]]
    wrong = []
    for part, array in (("a", a), ("b", b)):
        shape = list(array.shape)
        rest = shape[1:] if part == "a" else [shape[0], *shape[2:]]
        if rest not in expected[part]:
            first = expected[part][0]
            text = ["r", *map(str, first)] if part == "a" else [str(first[0]), "r", *map(str, first[1:])]
            wrong.append((part, tuple(shape), f"[{', '.join(text)}]"))
    return wrong


def factors(leaf: Leaf, a: Array, b: Array) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) of one module as they lie in our tree: (…, in, R) and (R, out), from PyTorch's (R, in, …) and (out, R[, 1, 1])."""
    a, b = np.asarray(a), np.asarray(b)
    wide = len(leaf.kernel) == 4
    a = a.reshape(*a.shape[:2], 1, 1) if wide and a.ndim == 2 else a if wide else a.reshape(a.shape[:2])
    ours = (CONV if wide else LINEAR).read([a])
    return np.asarray(ours), np.asarray((_UP if b.ndim == 4 else LINEAR).read([b]))


def stored(leaf: Leaf, a: np.ndarray, b: np.ndarray) -> tuple[Array, Array]:
    """Undoes `factors`: a convolution's as convolutions, a product's as products."""
    if len(leaf.kernel) == 4:
        return CONV.write(a)[0], _UP.write(b)[0]
    return LINEAR.write(a)[0], LINEAR.write(b)[0]


def magnitudes(leaf: Leaf, form: str) -> Shape:
    """The shape that a format has a module's magnitudes in: kohya's (LyCORIS) as a kernel that is 1 but for its outputs,
    peft's a vector, or for convolutions (1, out, 1, 1)."""
    out, axes = leaf.kernel[-1], len(leaf.kernel)
    if form == "kohya":
        return (out, *(1,) * (axes - 1))
    return (1, out, 1, 1) if axes == 4 else (out,)


def magnitude_fits(leaf: Leaf, array: Array, form: str) -> bool:
    """Whether an array holds a module's magnitudes, one an output.

    In kohya's files (1, n) and (1, n, 1, 1) are LyCORIS' other kind, one an input, which is no DoRA of the paper's.
    """
    out = leaf.kernel[-1]
    shapes = [(out,), (out, 1), (out, 1, 1, 1)]
    return tuple(array.shape) in (shapes if form == "kohya" else [*shapes, (1, out, 1, 1)])


def by_module(found: list[Leaf], form: str) -> Mapping[str, tuple[Leaf, int, int, int]]:
    """Module's name, as the format spells it -> (its leaf, layer, part, which copy)."""
    return {
        name.replace(".", "_") if form == "kohya" else name: (leaf, i, j, k)
        for leaf in found
        for i, row in enumerate(leaf.modules)
        for j, copies in enumerate(row)
        for k, name in enumerate(copies)
    }
