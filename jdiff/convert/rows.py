"""A family's table: one row a kind of leaf, from our path to the checkpoint's name or names."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jdiff.convert.layouts import Copies, Layers, Layout, Pointwise, Split, usual

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
LEAVES |= {"mean": "running_mean", "var": "running_var", "class_embedding": "class_embedding"}
MOST = 1500
"""Characters of an error."""
Sizes = Mapping[str, tuple[int, ...]]


class ConversionError(ValueError):
    """A checkpoint that is not the model's, or a file that is not what it says; the message lists what differs, in one line."""

    def __init__(self, message: str):
        # names come from the file, and may hold anything
        line = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(line if len(line) <= MOST else f"{line[:MOST]}…")


def refuse(message: str) -> ConversionError:
    """A ConversionError to raise."""
    return ConversionError(message)


def size(sizes: Sizes, name: str, ndim: int) -> tuple[int, ...]:
    """The shape of an array that a model is told by; ConversionError when it is missing or of another rank."""
    if name not in sizes:
        raise ConversionError(f"{name} is missing: what the model's sizes are told by")
    if len(sizes[name]) != ndim:
        raise ConversionError(f"{name} has the shape {list(sizes[name])}, not {ndim} axes")
    return sizes[name]


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number in the group of `pattern`, over the names that it matches the start of; 0 for none."""
    found = (re.match(pattern, name) for name in names)
    return max((int(match.group(1)) + 1 for match in found if match), default=0)


@dataclasses.dataclass(frozen=True)
class Row:
    """Leaves whose path, but for its last step, matches all of `pattern`, and what they are called in the checkpoint.

    name: a template as of `re.Match.expand`, or a function of the module and the groups; `.weight` or `.bias` follows.
    `{layer}` stands for each layer of a stacked leaf, `{copy}` for each block that holds an equal copy, `{qkv}` for q, k and v
    of a fused one. None: the checkpoint does not hold the leaf, which follows from the model.
    pointwise: kernels are stored as 1x1 convolutions.
    """

    pattern: str
    name: str | Callable[..., str] | None
    pointwise: bool = False


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our leaves: its path, its arrays' names, and how they lie in it. No names: it is derived."""

    path: str
    names: tuple[str, ...]
    layout: Layout


def entries(module: Any, table: tuple[Row, ...], leaves: Mapping[str, Any]) -> list[Entry]:
    """An entry for each leaf (path -> anything with ndim), from the first row that matches it.

    ConversionError for a leaf without a row: the checkpoint's format has no place for it.
    """
    return [_entry(module, table, path, len(leaf.shape)) for path, leaf in leaves.items()]


def _entry(module: Any, table: tuple[Row, ...], path: str, ndim: int) -> Entry:
    parent, _, leaf = path.rpartition("/")
    for row in table:
        match = re.fullmatch(row.pattern, parent or path)
        if match is None:
            continue
        if row.name is None:
            return Entry(path, (), usual(leaf, ndim))
        name = row.name(module, *match.groups()) if callable(row.name) else match.expand(row.name)
        if parent:
            name = f"{name}.{LEAVES[leaf]}"
        stacked, copied, fused = (f"{{{key}}}" in name for key in ("layer", "copy", "qkv"))
        layout: Layout = Pointwise() if row.pointwise and leaf == "kernel" else usual(leaf, ndim - stacked)
        names = [name.replace("{qkv}", part) for part in "qkv"] if fused else [name]
        if fused:
            layout = Split(layout, 3)
        if stacked:
            layout = Layers(layout, module.depth)
        if copied:
            layout = Copies(layout, module.depth)
        if stacked or copied:
            names = [n.replace("{layer}", str(i)).replace("{copy}", str(i)) for i in range(module.depth) for n in names]
        return Entry(path, tuple(names), layout)
    raise ConversionError(f"{path}: this format has no place for it")
