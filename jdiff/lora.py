"""LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353) as operations on parameter trees; nothing here knows a model.

`adapters` is a nested dict that mirrors a model's parameters. Where the model has a kernel, at `…/kernel`, it has a dict
{"a": (…, in, R) or (…, kh, kw, in, R), "b": (…, R, out), "scale": (…) or (…, R)} and for DoRA "magnitude": (…, out).
Leading axes are stacked layers, the kernel's own. scale is alpha / R, one number or one a rank, and is never trained.
`attach` makes kernels of `weights.LoRAWeight` of them, and the model's layers do the rest.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jdiff import tree, weights
from jdiff.weights import LoRAWeight, QTensor, Weight, column_norm, unwrap

Tree: TypeAlias = tree.Tree
Adapter: TypeAlias = dict[str, Any]
Shape: TypeAlias = tuple[int, ...]

_ATTENTION = r"to_[qkv]|to_out_0|[qkv]_proj|out_proj|attn/qkv|attn/proj"
_MLP = r"ff/net_0/proj|ff/net_2|mlp/fc1|mlp/fc2"
TARGETS: dict[str, tuple[str, str]] = {
    "attn": (rf"(.*/)?({_ATTENTION})/kernel", "linear"),
    "attn+mlp": (rf"(.*/)?({_ATTENTION}|{_MLP})/kernel", "linear"),
    "all-linear": (r".*", "linear"),
    "conv": (r".*", "1x1|3x3"),
    "all": (r".*", "linear|1x1|3x3"),
}
"""Name -> (regex over kernels' paths, regex over what they are: `linear`, or a convolution's `HxW`)."""
METHODS = ("kaiming", "gaussian", "pissa")
TRAINED = ("a", "b", "magnitude")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which kernels get an adapter, and how large: pattern is a name of `TARGETS` or a regex that matches all of a path.

    alpha: the adapter's change is multiplied by alpha / rank; None for alpha = rank. ValueError for a rank below 1 or a
    pattern that is no regex.
    """

    pattern: str
    rank: int
    alpha: float | None = None

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora: rule {self.pattern!r} has rank {self.rank}; it must be at least 1")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"lora: rule {self.pattern!r} is no regex: {error}") from error

    def matches(self, path: str, shape: Shape) -> bool:
        """Whether the kernel of that path and shape is one of this rule's."""
        paths, kinds = TARGETS.get(self.pattern, (self.pattern, r".*"))
        spatial = shape[len(shape) % 2 : -2]
        kind = "x".join(map(str, spatial)) if spatial else "linear"
        return bool(re.fullmatch(paths, path) and re.fullmatch(kinds, kind))

    def scale(self, rslora: bool) -> float:
        """alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if rslora else self.rank)


def targets(base: Tree, rules: Sequence[Rule]) -> dict[str, Rule]:
    """The kernels that get an adapter, by path, each with the first rule that matches it. base: weights or shapes.

    ValueError when a rule gets no kernel: it matches none, or rules before it take all that it matches.
    """
    kernels = {path: leaf.shape for path, leaf in weights.flatten(base).items() if re.fullmatch(r"(.*/)?kernel", path)}
    chosen: dict[str, Rule] = {}
    for rule in rules:
        matched = [path for path, shape in kernels.items() if rule.matches(path, shape)]
        mine = {path: rule for path in matched if path not in chosen}
        if not matched:
            example = next(iter(kernels), "none")
            raise ValueError(
                f"lora: rule {rule.pattern!r} matches no kernel{tree.nearest(rule.pattern, [*TARGETS, *kernels])}; use one of "
                f"{list(TARGETS)} or a regex of whole paths, of which the first is {example!r}"
            )
        if not mine:
            raise ValueError(f"lora: rules before {rule.pattern!r} take all that it matches: put it first, or drop it")
        chosen |= mine
    return {path: chosen[path] for path in kernels if path in chosen}


def init(
    key: jax.Array,
    base: Tree,
    rules: Sequence[Rule],
    *,
    method: Literal["kaiming", "gaussian", "pissa"] = "kaiming",
    rslora: bool = False,
    dora: bool = False,
) -> Tree:
    """New adapters in float32, initialised as peft does; the model with them attached is as before.

    method: "kaiming": a from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), b zero; "gaussian": a from N(0, 1/rank^2), b zero; "pissa"
    (arXiv:2404.02948): a * scale @ b is the kernel's principal part, to be trained over what `unmerge(base, adapters)` leaves.
    dora: magnitudes too, the kernels' column norms.
    base may be a tree of shapes, unless pissa or dora reads its values. ValueError for a rule that gets no kernel; for pissa
    with dora, of a convolution (peft has none), of a QTensor or of a kernel with adapters; for DoRA of a column that is zero.
    """
    if method not in METHODS:
        raise ValueError(
            f"lora: method {method!r} is unknown{tree.nearest(method, METHODS)}; use one of {list(METHODS)}"
        )
    if method == "pissa" and dora:
        raise ValueError("lora: pissa does not go with DoRA: both change what the base counts for")
    chosen, leaves = targets(base, rules), weights.flatten(base)
    made = {}
    for (path, rule), path_key in zip(chosen.items(), jax.random.split(key, len(chosen)), strict=True):
        w, scale = leaves[path], rule.scale(rslora)
        if (dora or method == "pissa") and isinstance(jax.tree.leaves(w)[0], jax.ShapeDtypeStruct):
            raise ValueError(f"lora: {path} is only a shape, and {'DoRA' if dora else 'pissa'} starts from its values")
        if method == "pissa":
            a, b = _pissa(path, w, rule.rank, scale)
        else:
            a = _random(path_key, w, rule.rank, method)
            b = jnp.zeros((*_stack(w), rule.rank, w.shape[-1]), jnp.float32)
        made[path] = {"a": a, "b": b, "scale": jnp.full(_stack(w), scale, jnp.float32)}
        if dora:
            made[path]["magnitude"] = _magnitude(path, w, made[path])
    return tree.nested(made)


def relative(adapters: Tree, start: Tree) -> Tree:
    """What adapters are more than `start`, itself adapters of the same kernels, as adapters of both ranks together.

    So PiSSA is LoRA over the untouched base, as peft converts it. ValueError for DoRA, whose changes do not add up.
    """
    first, made = by_path(start), {}
    for path, new in by_path(adapters).items():
        if "magnitude" in new:
            raise ValueError(
                f"lora: {path} is DoRA, which has no difference to its start: use method kaiming or gaussian"
            )
        old = first[path]
        factors = {name: jnp.concatenate([new[name], old[name]], axis) for name, axis in (("a", -1), ("b", -2))}
        ranks = [(each["scale"], each["b"].shape[:-1]) for each in (new, old)]
        scales = [jnp.broadcast_to(scale.reshape(*shape[:-1], -1), shape) for scale, shape in ranks]
        made[path] = {**factors, "scale": jnp.concatenate([scales[0], -scales[1]], -1)}
    return tree.nested(made)


def attach(
    base: Tree,
    adapters: Tree,
    strength: float | jax.Array | None = None,
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> Tree:
    """The tree with a LoRAWeight at each of the adapters' kernels; no array of it is copied. What is attached already stays,
    inside: the changes add up.

    Attach to the one tree that holds all models: `set_strength` and `detach` count attachments in a tree, and adapters that
    reach none of its kernels leave no trace. strength: a factor of the adapters' whole effect, held as an array, so that
    another value compiles nothing anew; None for 1 without an array.
    dropout: the share of x that each adapter drops in front of `a`, in training; key: one typed or raw key, which every
    adapter and stacked layer splits its own from; read only if dropout > 0.
    ValueError names a path that base does not have, parts that are missing or unknown, or shapes that do not fit.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"lora: dropout={dropout} must be at least 0 and below 1")
    if dropout and key is None:
        raise ValueError(f"lora: dropout={dropout} needs a key")
    leaves, found = weights.flatten(base), by_path(adapters)
    index = 1 + max((lora.index for leaf in leaves.values() for lora in unwrap(leaf)[1]), default=-1)
    new = {}
    for i, (path, parts) in enumerate(found.items()):
        w = _reached(leaves, path)
        _check(path, w, parts)
        keys = _keys(jax.random.fold_in(key, i), w) if dropout and key is not None else None
        settings = {"strength": _strength(strength, w), "key": keys, "rate": float(dropout), "index": index}
        new[path] = LoRAWeight(w, **parts, **settings)
    return weights.map_with_path(lambda path, leaf: new.get(path, leaf), base)


def detach(attached: Tree) -> tuple[Tree, list[Tree]]:
    """Undoes `attach`: (the base, the adapters in the order of their attachment). Strengths and dropout are left behind."""
    found: dict[int, dict[str, Adapter]] = {}
    for path, leaf in weights.flatten(attached).items():
        for lora in unwrap(leaf)[1]:
            parts = {name: getattr(lora, name) for name in (*TRAINED, "scale")}
            at = found.setdefault(lora.index, {})
            if path in at:
                raise ValueError(f"lora: {path} has two adapters of index {lora.index}: `attach` numbers them")
            at[path] = {name: value for name, value in parts.items() if value is not None}
    return weights.map_with_path(lambda _, leaf: unwrap(leaf)[0], attached), [
        tree.nested(found[index]) for index in sorted(found)
    ]


def set_strength(attached: Tree, index: int, strength: float | jax.Array) -> Tree:
    """The tree with another strength for its attachment number `index`, the first being 0.

    Nothing compiles anew, unless it was attached with strength None. ValueError when there is no such attachment.
    """
    known = sorted({lora.index for leaf in weights.flatten(attached).values() for lora in unwrap(leaf)[1]})
    if index not in known:
        raise ValueError(f"lora: there is no attachment {index}; there are {known}")

    def changed(w: Any) -> Any:
        if not isinstance(w, LoRAWeight):
            return w
        here = _strength(strength, w) if w.index == index else w.strength
        return dataclasses.replace(w, w=changed(w.w), strength=here)

    return weights.map_with_path(lambda _, leaf: changed(leaf), attached)


def merge(base: Tree, adapters: Tree, strength: float = 1.0) -> Tree:
    """The base with the adapters' change added to its kernels, computed in at least fp32, in each kernel's dtype.

    Equals the attached model. (Several DoRA adapters attached are each relative to the base, but merged one after the other
    to what the ones before have made of it.) ValueError as `attach`, and for kernels that are quantized or have adapters.
    """
    return _change(base, by_path(adapters), lambda w, adapter: w + strength * _delta(w, adapter))


def unmerge(merged: Tree, adapters: Tree, strength: float = 1.0) -> Tree:
    """Undoes `merge`, to the rounding of the kernels' dtype. ValueError as `merge`, and for DoRA: merging replaces the
    length of each column, and what it was before is in the base alone."""
    found = by_path(adapters)
    for path, parts in found.items():
        if "magnitude" in parts:
            raise ValueError(f"lora: {path} is DoRA, which forgets the columns' lengths when merged: keep the base")
    return _change(merged, found, lambda w, adapter: w - strength * _delta(w, adapter))


def extract(
    base: Tree, tuned: Tree, pattern: str = "all", *, rank: int | None = None, energy: float | None = None
) -> tuple[Tree, dict[str, float]]:
    """The change from `base` to `tuned` as adapters: its best approximation at a rank, by SVD (kohya's
    extract_lora_from_models).

    Either rank: at most; a smaller kernel gets its full rank; or energy: in (0, 1], the least rank at which a kernel's
    squared change is explained to that share, in all stacked layers together. pattern: as a `Rule`'s. The scale is 1.
    Returns (adapters, share of the squared change that they explain, by path): there is an entry for each leaf that
    changed, 0 for those that no adapter reaches. ValueError when the trees differ in more than values, or in no kernel.
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"lora: extract takes either a rank or an energy, found rank={rank} and energy={energy}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"lora: extract: energy={energy} must be above 0 and at most 1")
    if lines := tree.differences(base, tuned):
        raise ValueError(f"lora: extract: base and tuned differ in {len(lines)} leaves; the first: {lines[0]}")
    before, after = weights.flatten(base), weights.flatten(tuned)
    chosen = targets(base, [Rule(pattern, 1 if rank is None else rank)])
    made, shares = {}, {}
    for path in [path for path in before if _differ(before[path], after[path])]:
        shares[path] = 0.0
        if path not in chosen:
            continue
        w, new = (_wide(path, leaves[path]) for leaves in (before, after))
        a, b, values = _principal((new - w).reshape(*_stack(w), -1, w.shape[-1]))
        explained = jnp.cumsum(jnp.sum(jnp.square(values).reshape(-1, values.shape[-1]), 0))
        explained = explained / explained[-1]
        R = min(rank or len(explained), len(explained))
        if energy is not None:
            R = 1 + int(jnp.argmax(explained >= energy))
        a = a[..., :R].reshape(*w.shape[:-1], R)
        made[path] = {"a": a, "b": b[..., :R, :], "scale": jnp.ones(_stack(w), jnp.float32)}
        shares[path] = float(explained[R - 1])
    if not made:
        raise ValueError(f"lora: extract: base and tuned are equal in every kernel that {pattern!r} matches")
    return tree.nested(made), shares


def resize(adapters: Tree, rank: int) -> Tree:
    """Adapters of at most that rank, each the best approximation of what it was, from the factors alone: QR of both and an
    SVD of (R, R). Those of no higher rank stay as they are; the others' scale becomes 1. Magnitudes stay.

    ValueError for a rank below 1, or one that is no less than any adapter's.
    """
    found = by_path(adapters)
    largest = max((parts["a"].shape[-1] for parts in found.values()), default=0)
    if not 1 <= rank < largest:
        raise ValueError(f"lora: resize: rank {rank} must be at least 1 and below the adapters' largest, {largest}")
    return tree.nested(
        {path: parts if parts["a"].shape[-1] <= rank else _resized(parts, rank) for path, parts in found.items()}
    )


def count(adapters: Tree) -> int:
    """Number of trained scalars: those of a, b and magnitude."""
    return sum(tree.count(leaf) for path, leaf in tree.flatten(adapters).items() if path.split("/")[-1] in TRAINED)


def by_path(adapters: Tree) -> dict[str, Adapter]:
    """Each adapter's arrays {"a", "b", "scale"[, "magnitude"]} by its kernel's path.

    ValueError names one that lacks a part or has an unknown one.
    """
    found: dict[str, Adapter] = {}
    for path, leaf in tree.flatten(adapters).items():
        kernel, _, part = path.rpartition("/")
        found.setdefault(kernel, {})[part] = leaf
    for path, parts in found.items():
        lacking = [name for name in ("a", "b", "scale") if name not in parts]
        unknown = [name for name in parts if name not in (*TRAINED, "scale")]
        if lacking or unknown:
            what = f"lacks {lacking}" if lacking else f"has the unknown parts {unknown}"
            raise ValueError(f"lora: the adapter at {path!r} {what}; it takes a, b, scale and, for DoRA, magnitude")
    return found


def _stack(w: Any) -> Shape:
    """A kernel's axes of stacked layers: (in, out) and (kh, kw, in, out) are even in number, one more is the stack."""
    return tuple(w.shape[: len(w.shape) % 2])


def _each_layer(function: Callable[..., Any], w: Any) -> Callable[..., Any]:
    return jax.vmap(function) if _stack(w) else function


def _strength(strength: float | jax.Array | None, w: Weight) -> jax.Array | None:
    return None if strength is None else jnp.broadcast_to(jnp.asarray(strength, jnp.float32), _stack(w))


def _keys(key: jax.Array, w: Weight) -> jax.Array:
    """Key data, one key a stacked layer: arrays of plain integers, which a scan slices."""
    return jax.random.key_data(jax.random.split(key, _stack(w)) if _stack(w) else key)


def _differ(old: Any, new: Any) -> bool:
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    return any(bool(jnp.any(jnp.asarray(a) != jnp.asarray(b))) for a, b in pairs)


def _reached(leaves: Mapping[str, Any], path: str) -> Any:
    if path not in leaves:
        raise ValueError(f"lora: the model has no kernel {path!r}{tree.nearest(path, leaves)}")
    return leaves[path]


def fitting(w: Any, rank: int) -> dict[str, list[Shape]]:
    """The shapes that each part of an adapter of a weight may have. w: anything with its shape."""
    stack = _stack(w)
    return {
        "a": [(*w.shape[:-1], rank)],
        "b": [(*stack, rank, w.shape[-1])],
        "scale": [stack, (*stack, rank)],
        "magnitude": [(*stack, w.shape[-1])],
    }


def _check(path: str, w: Weight, parts: Adapter) -> None:
    """ValueError for an adapter whose shapes do not fit its kernel."""
    shapes = {name: tuple(jnp.shape(value)) for name, value in parts.items()}
    R = (shapes["a"] or (0,))[-1]
    if R < 1:
        raise ValueError(f"lora: {path} has a of shape {shapes['a']}: its rank must be at least 1")
    wanted = fitting(w, R)
    for name, shape in shapes.items():
        if shape not in wanted[name]:
            expected = " or ".join(map(str, wanted[name]))
            raise ValueError(
                f"lora: {path} has {name} of shape {shape}, expected {expected} for a kernel {tuple(w.shape)} at rank {R}"
            )


def _wide(path: str, w: Any) -> jax.Array:
    """An array in at least fp32. ValueError for what is not an array."""
    if isinstance(w, QTensor):
        raise ValueError(f"lora: {path} is quantized: dequantize it first")
    if isinstance(w, LoRAWeight):
        raise ValueError(f"lora: {path} has adapters attached: detach them first")
    w = jnp.asarray(w)
    return w.astype(jnp.promote_types(w.dtype, jnp.float32))


def _change(base: Tree, found: Mapping[str, Adapter], function: Callable[[jax.Array, Adapter], jax.Array]) -> Tree:
    """The tree with `function(kernel, adapter)` for each kernel that has an adapter, computed wide, in the kernel's dtype."""
    leaves, new = weights.flatten(base), {}
    for path, parts in found.items():
        w = _reached(leaves, path)
        _check(path, w, parts)
        new[path] = function(_wide(path, w), parts).astype(w.dtype)
    return weights.map_with_path(lambda path, leaf: new.get(path, leaf), base)


def _product(shape: Shape, adapter: Adapter) -> jax.Array:
    """a * scale @ b in the kernel's shape, in at least fp32."""
    a = _scaled(adapter)
    b = adapter["b"].astype(a.dtype)
    return jnp.matmul(a, b, precision="highest").reshape(shape)


def _scaled(adapter: Adapter) -> jax.Array:
    """a * scale as matrices (…, fan_in, R), in at least fp32."""
    a, scale, stack = adapter["a"], jnp.asarray(adapter["scale"]), adapter["b"].shape[:-2]
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return a.reshape(*stack, -1, a.shape[-1]).astype(wide) * scale.reshape(*stack, 1, -1).astype(wide)


def _delta(w: jax.Array, adapter: Adapter) -> jax.Array:
    """What an adapter adds to a kernel at strength 1."""
    change = _product(w.shape, adapter)
    if "magnitude" not in adapter:
        return change
    norm = _each_layer(column_norm, w)(w, adapter["a"], adapter["b"], jnp.asarray(adapter["scale"]))
    g = (adapter["magnitude"] / norm).reshape(*norm.shape[:-1], *(1,) * (w.ndim - norm.ndim), -1)
    return (g - 1) * w + g * change


def _magnitude(path: str, w: Weight, adapter: Adapter) -> jax.Array:
    """DoRA's start: the column norms of the kernel inside all adapters."""
    kernel = unwrap(w)[0]
    nothing = jnp.zeros_like(adapter["b"])
    norm = _each_layer(column_norm, w)(kernel, adapter["a"], nothing, adapter["scale"])
    if not isinstance(norm, Tracer) and not bool(jnp.all(norm > 0)):
        raise ValueError(f"lora: {path} has a column that is zero, which DoRA would divide by: leave the kernel out")
    return norm


def _random(key: jax.Array, w: Weight, rank: int, method: str) -> jax.Array:
    """`a`: PyTorch's kaiming_uniform_(a=sqrt(5)), or a normal of deviation 1 / rank."""
    shape, fan_in = (*w.shape[:-1], rank), math.prod(w.shape[len(_stack(w)) : -1])
    if method == "gaussian":
        return jax.random.normal(key, shape, jnp.float32) / rank
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _principal(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(a, b, singular values), greatest first, of matrices (…, m, n): `a[..., :R] @ b[..., :R, :]` is their best
    approximation of rank R, its factors of equal length."""
    u, values, vt = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(values)
    return u * root[..., None, :], root[..., None] * vt, values


def _pissa(path: str, w: Weight, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    kernel = _wide(path, w)
    if kernel.ndim - len(_stack(w)) > 2:
        raise ValueError(f"lora: {path} is a convolution, which has no pissa: use kaiming, or leave it out")
    if rank > min(kernel.shape[-2:]):
        raise ValueError(f"lora: {path} has rank {min(kernel.shape[-2:])} itself: pissa of rank {rank} needs more")
    a, b, _ = _principal(kernel)
    root = math.sqrt(scale)
    return a[..., :rank] / root, b[..., :rank, :] / root


def _resized(adapter: Adapter, rank: int) -> Adapter:
    a, b = adapter["a"], adapter["b"]
    scaled = _scaled(adapter)
    qa, ra = jnp.linalg.qr(scaled)
    qb, rb = jnp.linalg.qr(jnp.swapaxes(b.astype(scaled.dtype), -1, -2))
    left, right, _ = _principal(ra @ jnp.swapaxes(rb, -1, -2))
    kept = min(rank, left.shape[-1])
    small = (qa @ left[..., :kept]).reshape(*a.shape[:-1], kept)
    other = right[..., :kept, :] @ jnp.swapaxes(qb, -1, -2)
    return {**adapter, "a": small, "b": other, "scale": jnp.ones(b.shape[:-2], jnp.float32)}
