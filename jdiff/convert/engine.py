"""One walk for every family: our path -> the checkpoint's name, our array <-> theirs.

A family's modules keep upstream's names, so its table is a few regexes that put dots back where ours has slashes and
underscores. Layouts follow from the leaf's name and rank: a kernel is transposed (linear IO <-> OI, convolution HWIO <-> OIHW),
everything else is as it is.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jdiff import tree
from jdiff.convert.names import FAMILIES, IGNORED

Arrays = Mapping[str, Any]
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


class ConversionError(ValueError):
    """A checkpoint that is not the model's; the message lists what differs."""


def torch_name(module: Any, path: str) -> str:
    """The checkpoint's name of one of our leaves: `down_blocks_0/resnets_1/conv1/kernel` -> `down_blocks.0.resnets.1.conv1.weight`.

    KeyError for a class without a table.
    """
    *parents, leaf = path.split("/")
    name = "/".join(parents)
    for pattern, replacement in FAMILIES[type(module).__name__]:
        name = re.sub(pattern, replacement, name)
    return f"{name.replace('/', '.')}.{LEAVES[leaf]}"


def from_torch(module: Any, arrays: Arrays) -> Any:
    """A checkpoint's arrays (numpy, by name) as `module`'s tree, views where they can be, dtypes as they are.

    ConversionError lists every array that is missing, unexpected or of another shape.
    """
    arrays = _canonical(module, arrays)
    expected = tree.flatten(_shapes(module))
    names = {path: torch_name(module, path) for path in expected}
    missing = [name for name in names.values() if name not in arrays]
    unexpected = sorted(set(arrays) - set(names.values()))
    found = {path: _layout(path, arrays[name]) for path, name in names.items() if name in arrays}
    wrong = [
        f"{names[path]} has the shape {list(array.shape)}, not {list(expected[path].shape)} (in jdiff's layout)"
        for path, array in found.items()
        if array.shape != expected[path].shape
    ]
    problems = [_listed("missing", missing), _listed("unexpected", unexpected), _listed("misshapen", wrong)]
    if any(problems):
        raise ConversionError(f"not the weights of this {type(module).__name__}: {'; '.join(filter(None, problems))}")
    return jax.tree.unflatten(jax.tree.structure(_shapes(module)), list(found.values()))


def to_torch(module: Any, params: Any) -> dict[str, np.ndarray]:
    """Undoes `from_torch`: arrays by the checkpoint's names and in its layouts, C-contiguous."""
    flat = tree.flatten(params)
    wrong = tree.differences(jax.tree.map(_dtypeless, _shapes(module)), jax.tree.map(_dtypeless, params))
    if wrong:
        raise ConversionError(f"not the tree of this {type(module).__name__}: {_listed('differences', wrong)}")
    return {torch_name(module, p): np.ascontiguousarray(_layout(p, np.asarray(x), True)) for p, x in flat.items()}


def _dtypeless(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, np.float32)


def _shapes(module: Any) -> Any:
    return jax.eval_shape(lambda key: module.init(key, *module.dummy_inputs()), jax.random.key(0))["params"]


def _layout(path: str, array: np.ndarray, outwards: bool = False) -> np.ndarray:
    """Linear OI <-> IO, convolution OIHW <-> HWIO."""
    if not path.endswith("/kernel"):
        return array
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1) if outwards else array.transpose(2, 3, 1, 0)
    return array.T


def _canonical(module: Any, arrays: Arrays) -> dict[str, Any]:
    """Names without what differs between versions of a library, and without the arrays that hold no weight."""
    family = type(module).__name__
    kept: dict[str, Any] = {}
    for name, array in arrays.items():
        for pattern, replacement in IGNORED.get(family, ()):
            name = re.sub(pattern, replacement, name)
        if not name:
            continue
        if name in kept:
            raise ConversionError(f"{name} is there twice, under an older and a newer name")
        kept[name] = array
    return kept


def _listed(what: str, names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what}: {', '.join(names[:most])}{more}" if names else ""
