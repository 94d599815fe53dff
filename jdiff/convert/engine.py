"""One walk for every family and format: a checkpoint's names and arrays -> the module's tree, and back.

The table gives each leaf of `jax.eval_shape(module.init)` its names; the walk holds them against what is there. Nothing is
filled in, left over, cast or reshaped: whatever differs is an error that lists it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from jdiff import tree
from jdiff.convert import clip, dit, inception, unet, vae
from jdiff.convert.arrays import FLOATS, Array, Lazy, numbers
from jdiff.convert.layouts import Unequal
from jdiff.convert.rows import ConversionError, Entry, Row, entries

Arrays = Mapping[str, Array]
Ignored = Sequence[tuple[str, str]]
TABLES: dict[str, dict[str, tuple[Row, ...]]] = {
    "DiT": {"dit": dit.OFFICIAL, "diffusers": dit.DIFFUSERS},
    "UNet": {"diffusers": unet.DIFFUSERS, "compvis": unet.COMPVIS},
    "AutoencoderKL": {"diffusers": vae.DIFFUSERS, "compvis": vae.COMPVIS},
    "CLIPText": {"diffusers": clip.TRANSFORMERS, "compvis": clip.TRANSFORMERS},
    "CLIP": {"diffusers": clip.WHOLE},
    "Inception": {"torchvision": inception.TORCHVISION},
}
"""Class -> format -> table. transformers' names go by diffusers', whose folders they stand in."""
MOST_GRID = 1024
COUNTED = ("depth", "layers", "vision_layers", "layers_per_block", "transformer_depth")
"""Settings of which each one more takes arrays of its own."""
DERIVED = {"DiT": dit.derived}
"""Class -> what makes a leaf that a format does not store."""
MOST = 5
"""How many of a kind an error names."""


@dataclasses.dataclass(frozen=True)
class Naming:
    """How a module's arrays are called in a checkpoint: a format's table, and what is done to its names after that.

    spell: table's name -> name in the checkpoint: a prefix, an older spelling.
    """

    table: str
    spell: Callable[[str], str] = str


@lru_cache(maxsize=16)
def shapes(module: Any) -> Any:
    """The module's tree of shapes. ConversionError for settings that do not fit one another."""
    try:
        return jax.eval_shape(lambda key: module.init(key, *module.dummy_inputs()), jax.random.key(0))["params"]
    except (ValueError, TypeError, ArithmeticError, IndexError) as error:
        raise ConversionError(f"no {type(module).__name__} has these settings: {error}") from error


def plausible(module: Any, arrays: Arrays) -> None:
    """ConversionError for a module that no checkpoint of so many arrays can be of: a config or record may ask for anything, and
    even a tree of shapes takes time and memory with it."""
    kind = type(module)
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING or field.name in ("parent", "name", "dtype"):
            continue
        value, usual = getattr(module, field.name), field.default
        parts, kinds = (value, usual) if isinstance(usual, tuple) else ((value,), (usual,))
        if (
            not isinstance(parts, tuple)
            or not 1 <= len(parts) <= 32
            or not all(_like(part, kinds[0]) for part in parts)
        ):
            raise ConversionError(f"{kind.__name__}: {field.name}={str(value)[:80]} makes no sense")
        if field.name in COUNTED and value > max(len(arrays), 100):
            raise ConversionError(f"{kind.__name__}: {field.name}={value} is more than {len(arrays)} arrays can be")
    grid = getattr(module, "image_size", 0) // getattr(module, "patch_size", 1)
    if grid > MOST_GRID:
        raise ConversionError(f"image_size={module.image_size} is {grid} patches wide, and {MOST_GRID} is the most")


def _like(value: Any, usual: Any) -> bool:
    """Whether a setting is of the usual one's type and, where that is a number, above zero (a rate may be zero)."""
    if isinstance(usual, bool | str):
        return isinstance(value, type(usual))
    number = isinstance(value, int | float if isinstance(usual, float) else int) and not isinstance(value, bool)
    return number and (value > 0 or usual == 0 or isinstance(usual, float)) and 0 <= value < 2**31


def plan(module: Any, naming: Naming) -> list[Entry]:
    """Each leaf's entry, in the tree's order, its names spelt as in the checkpoint.

    ConversionError when the family has no such format, or the format no place for a leaf.
    """
    tables = TABLES.get(type(module).__name__, {})
    if naming.table not in tables:
        raise ConversionError(f"a {type(module).__name__} cannot be stored as {naming.table}; it can as {list(tables)}")
    found = entries(module, tables[naming.table], tree.flatten(shapes(module)))
    return [dataclasses.replace(entry, names=tuple(map(naming.spell, entry.names))) for entry in found]


def read(
    modules: Sequence[tuple[Any, Naming]], arrays: Arrays, ignored: Ignored = (), mixed: bool = False
) -> tuple[list[Any], dict[str, str]]:
    """The modules' trees, in their order, from one set of arrays, and why each array that is left over holds no parameter.

    Leaves are views of the arrays or put together from them when asked (`arrays.Stacked`). ignored: (regex, reason) of names
    that may be left over. mixed: whether a module's parameters may differ in dtype.

    ConversionError lists every array that is missing (with the nearest that is there), unexpected (likewise), of another
    shape, of another dtype than its module's others, or unlike its copies.
    """
    for module, _ in modules:
        plausible(module, arrays)
    plans = [plan(module, naming) for module, naming in modules]
    names = [name for entries in plans for entry in entries for name in entry.names]
    wanted = set(names)
    if len(wanted) != len(names):
        raise ConversionError("two parameters have one name in this format")
    left = [name for name in arrays if name not in wanted]
    reasons = {name: reason for name in left if (reason := _reason(name, ignored)) is not None}
    unexpected = [name for name in left if name not in reasons]
    missing = [name for name in names if name not in arrays]
    problems = [
        f"{what}: {_more([name + tree.nearest(name, others) for name in names[:MOST]], len(names))}"
        for what, names, others in (("missing", missing, unexpected), ("unexpected", unexpected, missing))
        if names
    ]
    trees = []
    for (module, _), planned in zip(modules, plans, strict=True):
        found, wrong = _leaves(module, planned, arrays)
        wrong += [] if mixed else _dtypes(planned, arrays)
        problems += wrong
        if not problems:
            trees.append(jax.tree.unflatten(jax.tree.structure(shapes(module)), found))
    if problems:
        what = " and ".join(type(module).__name__ for module, _ in modules)
        raise ConversionError(f"not the weights of this {what}: {'; '.join(problems)}")
    return trees, reasons


def write(module: Any, params: Any, naming: Naming) -> dict[str, Array]:
    """Undoes `read` for one module: arrays by name, views where they can be, in no particular order of memory.

    ConversionError when the tree is not the module's, or a leaf that the format does not store is not what the format's
    readers would make in its place.
    """
    expected, found = tree.flatten(shapes(module)), tree.flatten(params)
    wrong = [
        *(f"missing: {path}" for path in expected if path not in found),
        *(f"unexpected: {path}" for path in found if path not in expected),
        *(
            f"{path} has the shape {list(found[path].shape)}, not {list(leaf.shape)}"
            for path, leaf in expected.items()
            if path in found and tuple(found[path].shape) != tuple(leaf.shape)
        ),
    ]
    if wrong:
        raise ConversionError(f"not the tree of this {type(module).__name__}: {_more(wrong)}")
    arrays: dict[str, Array] = {}
    for entry in plan(module, naming):
        leaf = found[entry.path] if isinstance(found[entry.path], Lazy) else np.asarray(found[entry.path])
        if not entry.names:
            fixed, stored = DERIVED[type(module).__name__](module, entry.path), numbers(leaf).astype(np.float32)
            # sines of another library may differ in the last bit of the stored dtype, no more
            room = 1e-6 if leaf.dtype.itemsize >= 4 else 2.0**-8
            if not np.allclose(stored, fixed, rtol=0, atol=room):
                raise ConversionError(
                    f"{entry.path} is not the fixed one, which alone {naming.table} has: it would be lost"
                )
            continue
        arrays |= zip(entry.names, entry.layout.write(leaf), strict=True)
    return arrays


def _leaves(module: Any, entries: list[Entry], arrays: Arrays) -> tuple[list[Array], list[str]]:
    """Leaves in the tree's order, and what is wrong with their arrays; those of entries with a wrong array are left out."""
    expected = tree.flatten(shapes(module))
    found, wrong = [], []
    for entry in entries:
        if not entry.names:
            others = [array for e in entries for n in e.names if (array := arrays.get(n)) is not None]
            made = DERIVED[type(module).__name__](module, entry.path)
            found.append(made.astype(others[0].dtype) if others else made)
            continue
        theirs = entry.layout.shapes(tuple(expected[entry.path].shape))
        misshapen = [
            f"{name} has the shape {list(arrays[name].shape)}, not {list(shape)}"
            for name, shape in zip(entry.names, theirs, strict=True)
            if name in arrays and tuple(arrays[name].shape) != tuple(shape)
        ]
        if misshapen:
            wrong.append(f"misshapen: {_more(misshapen)}")
        elif all(name in arrays for name in entry.names):
            try:
                found.append(entry.layout.read([arrays[name] for name in entry.names]))
            except Unequal as error:
                wrong.append(f"unequal: {entry.names[error.index]} is not its copy {entry.names[0]}")
    return found, wrong[:MOST]


def _dtypes(entries: list[Entry], arrays: Arrays) -> list[str]:
    """Arrays that are no floating-point numbers, or of another dtype than most of the module."""
    there = {name: str(arrays[name].dtype) for entry in entries for name in entry.names if name in arrays}
    found: dict[str, list[str]] = {}
    for name, dtype in there.items():
        found.setdefault(dtype, []).append(name)
    common = max(found, key=lambda dtype: len(found[dtype]), default="float32")
    odd = [
        f"{name} is {dtype}, not {common}" for name, dtype in there.items() if dtype != common or dtype not in FLOATS
    ]
    return [f"of another dtype: {_more(odd)} (give a dtype to cast to)"] if odd else []


def _reason(name: str, ignored: Ignored) -> str | None:
    return next((reason for pattern, reason in ignored if re.fullmatch(pattern, name)), None)


def _more(lines: list[str], total: int = 0) -> str:
    """The first few, and how many there are besides."""
    total = total or len(lines)
    return ", ".join(lines[:MOST]) + (f" and {total - MOST} more" if total > MOST else "")
