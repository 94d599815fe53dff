"""The one path language: trees of arrays seen as `a/b/kernel` names, and rules (regex -> value) over them.

LoRA targets, quantization rules, sharding rules, decay masks and key tables all use it. A rule's regex must match the
whole path; the first match wins; a path that no rule matches is an error. Nothing here knows a model.
"""

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
T = TypeVar("T")
Rules = Sequence[tuple[str, T]]


def key_name(key: Any) -> str:
    """One step of a JAX key path as plain text: a dict key, an attribute's name or an index."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"unknown key type in a tree path: {key!r}")


def path_name(key_path: Iterable[Any]) -> str:
    """A JAX key path as `a/b/kernel`."""
    return "/".join(key_name(key) for key in key_path)


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves by path, in the tree's own order; None is no leaf."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(values: Mapping[str, Any]) -> Tree:
    """Undoes `flatten` for nested dicts: values by path -> the tree."""
    root: dict[str, Any] = {}
    for path, value in values.items():
        *parents, name = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return root


def map_with_path(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` whose function gets the path as its first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *rest)


def match(rules: Rules[T], path: str) -> T:
    """The value of the first rule whose regex matches all of `path`; KeyError if none does."""
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    raise KeyError(f"no rule matches {path!r}; the rules are {[pattern for pattern, _ in rules]}")


def apply_rules(rules: Rules[T], tree: Tree) -> Tree:
    """A tree of the rules' values, one for each leaf of `tree`."""
    return map_with_path(lambda path, _: match(rules, path), tree)


def partition(tree: Tree, chosen: Tree) -> tuple[Tree, Tree]:
    """Splits a tree by a tree of booleans: (leaves that are chosen, the others), None in the places left out, also of what stands
    for one array (a `QTensor`) where all of it is left out: so the halves look alike whatever the arrays are held in."""
    yes = jax.tree.map(lambda leaf, keep: leaf if keep else None, tree, chosen)
    no = jax.tree.map(lambda leaf, keep: None if keep else leaf, tree, chosen)
    hollow = lambda node: dataclasses.is_dataclass(node) and not jax.tree.leaves(node)  # noqa: E731
    close = lambda half: jax.tree.map(lambda x: None if hollow(x) else x, half, is_leaf=hollow)  # noqa: E731
    return close(yes), close(no)


def set_apart(tree: Tree, pattern: str) -> tuple[Tree, Tree]:
    """`partition` by path: (the leaves that `pattern` does not match, those that it does)."""
    return partition(tree, apply_rules(((pattern, False), (r".*", True)), tree))


def merge(*trees: Tree) -> Tree:
    """Undoes `partition`: at each place the first leaf that is not None."""
    whole = lambda node: node is None or dataclasses.is_dataclass(node)  # noqa: E731

    def first(*nodes: Any) -> Any:
        there = [node for node in nodes if node is not None]
        if len(there) < 2 or not dataclasses.is_dataclass(there[0]):
            return there[0] if there else None
        opened = [jax.tree.flatten(node, is_leaf=lambda part, node=node: part is not node) for node in there]
        parts = zip(*(parts for parts, _ in opened), strict=True)
        return jax.tree.unflatten(opened[0][1], [merge(*part) for part in parts])

    return jax.tree.map(first, *trees, is_leaf=whole)


def count(tree: Tree) -> int:
    """Number of scalars in all leaves (arrays or shape structs)."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))


def differences(expected: Tree, found: Tree) -> list[str]:
    """Lines naming every leaf that is missing, unexpected, or of another shape or dtype. Empty when the trees agree."""
    want, have = flatten(expected), flatten(found)
    lines = [f"missing: {path} {describe(leaf)}" for path, leaf in want.items() if path not in have]
    lines += [f"unexpected: {path} {describe(leaf)}" for path, leaf in have.items() if path not in want]
    lines += [
        f"differs: {path} expected {describe(leaf)}, found {describe(have[path])}"
        for path, leaf in want.items()
        if path in have and describe(leaf) != describe(have[path])
    ]
    return lines


def describe(leaf: Any) -> str:
    """Dtype and shape of an array-like, as `float32[2,3]`."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer: a bijection of 32-bit words in which every bit reaches every other."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    """Two 32-bit sums of an array's words, each word mixed with its position first: (2,) uint32."""
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    words = jax.lax.bitcast_convert_type(leaf, unsigned) if leaf.dtype != unsigned else leaf
    if unsigned.itemsize == 8:
        words = jax.lax.bitcast_convert_type(words, jnp.uint32)
    words = words.astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = [_mix(words ^ _mix(place + jnp.uint32(start))) for start in (0x9E3779B9, 0x7F4A7C15)]
    return jnp.stack([jnp.sum(m, dtype=jnp.uint32) for m in mixed])


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


def _of_each(function: Callable[[Any], jax.Array], tree: Tree) -> dict[str, np.ndarray]:
    """A jitted function's value for each leaf, by path.

    Leaf by leaf, so that leaves of one shape share a compilation: one program for a thousand takes minutes to compile. And one
    after another: of split leaves XLA:CPU's sums over devices, many programs' at once, can wait for one another for ever.
    """
    return jax.device_get({path: jax.block_until_ready(function(leaf)) for path, leaf in flatten(tree).items()})


def checksums(tree: Tree) -> dict[str, str]:
    """A 64-bit checksum of every array, by path, computed where the arrays lie.

    The value depends on the numbers alone, not on sharding, and any change within one word changes it, since words are
    mixed by a bijection before they are added up. It guards against damage, not against forgery.
    """
    return {path: f"{a:08x}{b:08x}" for path, (a, b) in _of_each(_checksum, tree).items()}


def not_finite(tree: Tree) -> list[str]:
    """The paths of arrays that hold NaN or infinity."""
    return [path for path, finite in _of_each(_all_finite, tree).items() if not finite]


def digest(values: Mapping[str, Any]) -> str:
    """Sixteen hex digits for a mapping (of checksums, of settings), whatever its order."""
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:16]


def fingerprint(tree: Tree) -> str:
    """Sixteen hex digits of all leaves' paths and values, the same for one set of values in float32 and in halves of it."""
    one = lambda leaf: checksums({"": np.asarray(leaf).astype(np.float32, copy=False)})[""]  # noqa: E731
    return digest({path: one(leaf) for path, leaf in flatten(tree).items()})


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for an error message, or nothing when no name is near."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
