"""int8 as an operation on parameter trees: recipes say by path how each kernel is rounded; the model's layers do the rest.

A recipe has a list of rules for each family of models: (regex over whole paths, name of `SCHEMES`). The first that matches wins,
and each must get a kernel; what no rule matches stays as it is. Embedders, first and last layers, the time path and norms stay
high, and so do text encoders and autoencoders; what makes adaLN's shifts, scales and gates of the time (a third of DiT-XL/2's
parameters) is stored in int8 and multiplied in floats; the products of attention stay as they are.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import gptq, qtensor, tree, weights
from jdiff.qtensor import Observed, QTensor, Rounded, Scheme
from jdiff.weights import LoRAWeight, unwrap

Tree: TypeAlias = tree.Tree
Rules: TypeAlias = Sequence[tuple[str, str]]

SCHEMES: dict[str, Scheme | None] = {
    "high": None,
    "w8": Scheme(),
    "w8a8": Scheme(integer=True),
    "w8a8-static": Scheme(integer=True, static=True),
    "w4": Scheme(bits=4, group=64),
}
"""Name -> how a kernel is rounded; None: not at all."""


def _dit(blocks: str) -> Rules:
    return (
        (r"(x_embedder|t_embedder/.*|final_linear)/kernel", "high"),
        (r"(final_)?adaLN_modulation/kernel", "w8"),
        (r"blocks/.*/kernel", blocks),
    )


def _unet(rest: str) -> Rules:
    return (
        (r"(conv_in|conv_out|time_embedding/.*)/kernel", "high"),
        (r".*/time_emb_proj/kernel", "w8"),
        (r".*/kernel", rest),
    )


RECIPES: dict[str, dict[str, Rules]] = {
    name: {"dit": _dit(name), "unet": _unet(name)} for name in ("w8a8", "w8a8-static", "w8", "w4")
}
"""Name -> the rules of each model that is rounded, by what a pipeline calls it.

w8a8: products of integers, activations rounded where they are used; w8a8-static: by steps that calibration has fixed. w8: kernels
in int8, products in floats. w4: kernels in int4, 64 inputs to a scale, products in floats.
"""


def find_recipe(name: str) -> dict[str, Rules]:
    """A recipe by its name; ValueError, with the nearest, for one that there is not."""
    if name not in RECIPES:
        raise ValueError(f"quantize={name!r} is unknown{tree.nearest(name, RECIPES)}; use one of {list(RECIPES)}")
    return RECIPES[name]


def choose(params: Tree, rules: Rules) -> dict[str, str]:
    """The rule's pattern that each weight goes by, by its path; weights that no rule matches are left out.

    params: weights or shapes. ValueError for a rule that gets nothing, or names no scheme; for a kernel that is an integer's
    already; for one that `w4`'s groups do not divide.
    """
    leaves, schemes = weights.flatten(params), dict(rules)
    chosen: dict[str, str] = {}
    for pattern, scheme in rules:
        if scheme not in SCHEMES:
            raise ValueError(
                f"quantize: rule {pattern!r} has the scheme {scheme!r}{tree.nearest(scheme, SCHEMES)}; use one of {list(SCHEMES)}"
            )
        matched = [path for path in leaves if re.fullmatch(pattern, path)]
        mine = [path for path in matched if path not in chosen]
        if not mine:
            why = "rules before it take all that it matches" if matched else f"it matches none of {len(leaves)} arrays"
            raise ValueError(
                f"quantize: rule {pattern!r} gets no array: {why}, of which the first is {next(iter(leaves), '')!r}"
            )
        chosen |= dict.fromkeys(mine, pattern)
    for path, pattern in chosen.items():
        kernel, scheme = unwrap(leaves[path])[0], SCHEMES[schemes[pattern]]
        if isinstance(kernel, QTensor | Rounded):
            raise ValueError(f"quantize: {path} is quantized already: give the checkpoint that it was made from")
        if scheme is not None and len(kernel.shape) < 2:
            raise ValueError(f"quantize: {path} has the shape {tuple(kernel.shape)}, which is no kernel's")
        if scheme is not None and scheme.group and kernel.shape[-2] % scheme.group:
            raise ValueError(
                f"quantize: {path} has {kernel.shape[-2]} inputs, no multiple of the {scheme.group} that share a scale: use w8"
            )
    return chosen


def quantize(
    params: Tree,
    rules: Rules,
    parts: Mapping[str, tuple[int, ...]] | None = None,
    peaks: Mapping[str, jax.Array] | None = None,
    scales: Mapping[str, jax.Array] | None = None,
    done: Callable[[Any], None] = lambda _: None,
    moments: Mapping[str, jax.Array] | None = None,
) -> Tree:
    """The tree with its kernels as `QTensor`s, one after another; kernels inside adapters too. Errors as `choose`'s.

    params: a model's, arrays of jax or numpy, or what makes one in `np.asarray`; or their shapes, under `jax.eval_shape`.
    parts: the lengths of a kernel's input axis that have scales of their own, by path (`UNet.concatenated`). peaks: what
    `observe` has seen, which static schemes need. scales: learned, by path (`first_scales`), for all kernels. done: called with
    each kernel that has been rounded. moments: what `observe` has seen by `moment`: kernels that have one are rounded by GPTQ,
    which makes scales of its own, others to the nearest.
    """

    def rounded(path: str, leaf: Any, scheme: Scheme, sizes: tuple[int, ...]) -> QTensor:
        if scheme.static and path not in (peaks or {}):
            raise ValueError(
                f"quantize: {path} takes a static step, which is made of what was seen of its inputs: calibrate (tools/quantize.py)"
            )
        peak = (peaks or {}).get(path) if scheme.static else None
        made = _quantized(leaf, scheme, sizes, peak, _learned(scales, path, leaf), (moments or {}).get(path))
        done(leaf)
        return made

    return _each(params, rules, parts, rounded)


def train(
    params: Tree,
    rules: Rules,
    parts: Mapping[str, tuple[int, ...]] | None = None,
    scales: Mapping[str, jax.Array] | None = None,
) -> Tree:
    """The tree with its kernels as `Rounded`: int8 forward, the gradient of float kernels, and of the scales where there are some.
    Arguments and errors as `quantize`'s."""

    def rounded(path: str, leaf: Any, scheme: Scheme, sizes: tuple[int, ...]) -> Rounded:
        if scheme.static:
            raise ValueError(f"quantize: {path} would have a static step, which is not trained: use w8a8")
        return Rounded(leaf, scheme, sizes, _learned(scales, path, leaf))

    return _each(params, rules, parts, rounded)


def first_scales(
    params: Tree, rules: Rules, parts: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, jax.Array]:
    """LSQ's scales of all kernels that the rules round, by path, as they start: see `qtensor.first_scale`. Errors as `choose`'s."""
    found: dict[str, jax.Array] = {}

    def look(path: str, leaf: Any, scheme: Scheme, sizes: tuple[int, ...]) -> Any:
        found[path] = qtensor.first_scale(leaf, scheme, sizes)
        return leaf

    _each(params, rules, parts, look)
    return found


def _learned(scales: Mapping[str, jax.Array] | None, path: str, leaf: Any) -> jax.Array | None:
    """A kernel's own of some learned scales. ValueError when they are another model's."""
    if scales is None:
        return None
    if path not in scales or scales[path].shape[-1] != leaf.shape[-1]:
        raise ValueError(
            f"quantize: there are no learned scales for {path} {tuple(leaf.shape)}: they are another model's"
        )
    return scales[path]


def largest(window: qtensor.Window, x: jax.Array, y: jax.Array) -> jax.Array:
    """Each input channel's largest absolute value, (C,): what `observe` sees of inputs for static steps and balancing."""
    return jnp.abs(x).max(tuple(range(x.ndim - 1)))


def moment(window: qtensor.Window, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean of x^T x, (C, C): what `observe` sees of a product's inputs for GPTQ."""
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return x.T @ x / len(x)


def observe(
    apply: Callable[[Tree], jax.Array], params: Tree, paths: Iterable[str], see: qtensor.See = largest
) -> dict[str, Any]:
    """What `see` makes of each kernel's inputs and product in one call of a model, by the kernel's path; stacked as layers are.

    apply: params -> any output that is made with all of these kernels, each of them used once. params: floats, or quantized.
    """
    leaves, shapes = weights.flatten(params), {}

    def run(watch: Callable[[str], Observed], paths: Iterable[str]) -> jax.Array:
        seen = {path: watch(path) for path in paths}
        return apply(weights.map_with_path(lambda path, leaf: seen.get(path, leaf), params)).sum()

    def noted(path: str) -> Observed:
        def note(window: qtensor.Window, x: jax.Array, y: jax.Array) -> None:
            shapes[path] = jax.eval_shape(partial(see, window), x, y)

        return Observed(leaves[path], None, note)

    jax.eval_shape(lambda: run(noted, paths))
    stack = lambda path, one: jnp.zeros((*leaves[path].shape[: len(leaves[path].shape) % 2], *one.shape), one.dtype)  # noqa: E731
    nothing = {path: jax.tree.map(partial(stack, path), shapes[path]) for path in paths}
    return jax.grad(lambda found: run(lambda path: Observed(leaves[path], found[path], see), found))(nothing)


def divisors(kernel: jax.Array, peak: jax.Array, alpha: float) -> jax.Array:
    """SmoothQuant's (arXiv:2211.10438, equation 4) for a kernel's input channels, (..., C): peak^alpha / weight^(1 - alpha),
    with the largest absolute values of either; 1 for a channel where one is zero."""
    weight = jnp.abs(kernel).max(-1)
    found = peak**alpha / weight ** (1 - alpha)
    return jnp.where((peak == 0) | (weight == 0), 1, found)


def _seen(kernel: Any) -> tuple[int, ...]:
    """The shape of what `largest` sees of a kernel's inputs."""
    return (*kernel.shape[: len(kernel.shape) % 2], kernel.shape[-2])


def _each(params: Tree, rules: Rules, parts: Mapping[str, tuple[int, ...]] | None, function: Any) -> Tree:
    chosen, schemes = choose(params, rules), dict(rules)

    def change(path: str, leaf: Any) -> Any:
        scheme = SCHEMES[schemes[chosen[path]]] if path in chosen else None
        if scheme is None:
            return leaf
        if isinstance(leaf, LoRAWeight):
            return replace(leaf, w=change(path, leaf.w))
        # a scale for each of w4's groups is for each part as well
        return function(path, leaf, scheme, () if scheme.group else (parts or {}).get(path, ()))

    return weights.map_with_path(change, params)


_quantize = jax.jit(qtensor.quantize, static_argnums=(1, 2))
_by_gptq = jax.jit(gptq.quantize, static_argnums=(2, 3))


def _quantized(
    leaf: Any,
    scheme: Scheme,
    sizes: tuple[int, ...],
    peak: jax.Array | None,
    scale: jax.Array | None,
    moment: jax.Array | None,
) -> QTensor:
    def one(kernel: Any, peak: jax.Array | None, scale: jax.Array | None, moment: jax.Array | None) -> QTensor:
        kernel = kernel if isinstance(kernel, jax.Array) else np.asarray(kernel)
        if moment is None:
            return _quantize(kernel, scheme, sizes, peak, scale)
        return _by_gptq(kernel, moment, scheme, sizes, peak)

    if len(leaf.shape) % 2 == 0 or (isinstance(leaf, jax.Array) and moment is None):
        return one(leaf, peak, scale, moment)
    # of what is in a file a layer at a time: all of a large model's are gigabytes
    each = [[None] * len(leaf) if of is None else of for of in (peak, scale, moment)]
    layers = [
        jax.tree.map(np.asarray, one(*row)) for row in zip((leaf[i] for i in range(len(leaf))), *each, strict=True)
    ]
    return jax.tree.map(lambda *rows: np.stack(rows), *layers)


@dataclass(frozen=True)
class Line:
    """What a rule does: how many weights it gets, and their bytes before and after."""

    pattern: str
    scheme: str
    arrays: int
    before: int
    after: int


def describe(params: Tree, rules: Rules) -> list[Line]:
    """A line a rule, and a last one, pattern "", for what no rule matches. params: weights or shapes. Errors as `choose`'s."""
    chosen, leaves = choose(params, rules), weights.flatten(params)
    peaks = {path: jax.ShapeDtypeStruct(_seen(leaves[path]), jnp.float32) for path in chosen}
    whole = jax.eval_shape(
        lambda params, peaks: quantize(params, rules, peaks=peaks), jax.tree.map(_shape, params), peaks
    )
    made = weights.flatten(whole)
    lines = []
    for pattern, scheme in (*rules, ("", "high")):
        paths = [path for path in leaves if chosen.get(path, "") == pattern]
        sizes = (sum(size(each[path]) for path in paths) for each in (leaves, made))
        lines.append(Line(pattern, scheme, len(paths), *sizes))
    return lines


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)


def size(params: Tree) -> int:
    """Bytes of all arrays, or of shapes; an int4 takes half a byte."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(params))


def _bytes(leaf: Any) -> int:
    count = int(np.prod(leaf.shape, dtype=np.int64))
    return (count + 1) // 2 if str(leaf.dtype) == "int4" else count * np.dtype(leaf.dtype).itemsize


def table(lines: Iterable[Line]) -> str:
    """`describe`'s lines as text, in MB, with their sum."""
    lines = list(lines)
    lines.append(Line("all", "", *(sum(getattr(line, key) for line in lines) for key in ("arrays", "before", "after"))))
    width = max(len(line.pattern or "no rule") for line in lines)
    rows = [f"{'rule':{width}}  scheme  arrays  before MB  after MB  saved MB"]
    for line in lines:
        mb = [f"{n / 1e6:.2f}" for n in (line.before, line.after, line.before - line.after)]
        rows.append(
            f"{line.pattern or 'no rule':{width}}  {line.scheme:6}  {line.arrays:6}  {mb[0]:>9}  {mb[1]:>8}  {mb[2]:>8}"
        )
    return "\n".join(rows)
