"""A weight knows its own operation.

A parameter leaf is an array or a small pytree that stands for one. `dot`, `split_dot`, `conv` and `take` alone ask
which, so every model is written once: attaching LoRA or quantizing is a change of the tree, never of the model.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jdiff import qtensor, tree
from jdiff.convolution import convolve
from jdiff.product import product, split_product, written
from jdiff.prologue import Input, Prologue
from jdiff.qtensor import OfKernel, QTensor


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["w", "a", "b", "scale", "magnitude", "strength", "key"],
    meta_fields=["rate", "index"],
)
@dataclasses.dataclass(eq=False)
class LoRAWeight(OfKernel):
    """A frozen kernel with a low-rank side branch that is never formed (arXiv:2106.09685; as peft computes it):

        y = x w + strength * ((x a * scale) b)

    or, with a magnitude, DoRA (arXiv:2402.09353), where w0 is the kernel inside all adapters and each column's
    g = magnitude / ||w0 + a * scale @ b||, that norm a constant of the gradient:

        y = x w + strength * ((g - 1) * (x w0) + g * ((x a * scale) b))

    w: array, QTensor, or a LoRAWeight: several adapters nest and add up; (in, out) or (kh, kw, in, out); a: (in, R) or
    (kh, kw, in, R); b: (R, out); scale: alpha / R, a scalar or one a rank (R,); magnitude: (out,), or None for LoRA;
    strength: scalar, None for 1; at 0 the numbers are w's own. key: key data of the dropout of x in front of `a` (with
    DoRA, in front of w0 in its term too), None for no dropout; rate: the share of x that is dropped. index: which
    attachment of a tree it belongs to. Stacked layers put one more axis in front of every array.
    """

    w: Any
    a: Any
    b: Any
    scale: Any
    magnitude: Any = None
    strength: Any = None
    key: Any = None
    rate: float = 0.0
    index: int = 0


Weight: TypeAlias = jax.Array | qtensor.Kernel | LoRAWeight


def is_weight(leaf: Any) -> bool:
    """Whether a node of a tree stands for an array."""
    return isinstance(leaf, qtensor.Kernel | LoRAWeight)


def flatten(params: tree.Tree) -> dict[str, Any]:
    """`tree.flatten` with weights as leaves."""
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
    return {tree.path_name(path): leaf for path, leaf in found}


def map_with_path(function: Callable[[str, Any], Any], params: tree.Tree) -> tree.Tree:
    """`tree.map_with_path` with weights as leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(tree.path_name(path), leaf), params, is_leaf=is_weight
    )


def unwrap(w: Any) -> tuple[Any, list[LoRAWeight]]:
    """A weight's kernel, and the adapters around it from the inside out."""
    adapters = []
    while isinstance(w, LoRAWeight):
        adapters.insert(0, w)
        w = w.w
    return w, adapters


def taken(x: Input, w: Weight) -> Input:
    """x as the product with w takes it: an array, but for integer kernels that a prologue is made in integers for."""
    if not isinstance(x, Prologue) or (isinstance(w, qtensor.Kernel) and qtensor.takes(x, w)):
        return x
    return x.floats()


def dot(x: Input, w: Weight, follows: bool = False) -> jax.Array:
    """`x (..., in) @ w (in, out)` in x's dtype.

    follows: x is made of another product, element by element (`product.written`). Integer kernels see to what they round,
    adapters take x as it is.
    """
    x = taken(x, w)
    if isinstance(w, qtensor.Kernel):
        return qtensor.dot(x, w)
    assert not isinstance(x, Prologue)
    if isinstance(w, LoRAWeight):
        return _adapted(dot, x, w)
    return product(written(x) if follows else x, w.astype(x.dtype))


def split_dot(x: Input, w: Weight, parts: int) -> list[jax.Array]:
    """`dot` in so many equal parts of its outputs."""
    x = taken(x, w)
    if isinstance(w, qtensor.Kernel):
        return qtensor.split_dot(x, w, parts)
    assert not isinstance(x, Prologue)
    if isinstance(w, LoRAWeight):
        return jnp.split(dot(x, w), parts, axis=-1)
    return split_product(x, w.astype(x.dtype), parts)


def conv(x_BHWC: jax.Array, w: Weight, strides: Sequence[int] = (1, 1), padding: Any = "SAME") -> jax.Array:
    """NHWC convolution with an HWIO kernel, in x's dtype."""
    if isinstance(w, LoRAWeight):
        return _adapted(partial(conv, strides=strides, padding=padding), x_BHWC, w)
    if isinstance(w, qtensor.Kernel):
        return qtensor.conv(x_BHWC, w, strides, padding)
    return convolve(x_BHWC, w.astype(x_BHWC.dtype), strides, padding)


def take(w: jax.Array | QTensor | LoRAWeight, ids: jax.Array, dtype: Any) -> jax.Array:
    """Rows of an embedding table (rows, width): shape ids.shape + (width,). ids must be in range: they are not checked.

    An adapter's dropout does not reach tables, as in peft: ids cannot be dropped.
    """
    if isinstance(w, LoRAWeight):
        return _adapted(lambda ids, table: take(table, ids, dtype), ids, w, drops=False)
    if isinstance(w, QTensor):
        return qtensor.take(w, ids, dtype)
    return jnp.take(w, ids, axis=0).astype(dtype)


Product: TypeAlias = Callable[[jax.Array, Any], jax.Array]


def _adapted(product: Product, x: jax.Array, w: LoRAWeight, drops: bool = True) -> jax.Array:
    """The kernel's product with x, made once, and what each adapter adds to it."""
    w0, adapters = unwrap(w)
    y = plain = product(x, w0)
    for lora in adapters:
        strength = 1.0 if lora.strength is None else lora.strength
        dropped = _dropout(x, lora.key, lora.rate) if drops and lora.key is not None else x
        # all factors but g meet the R columns: they are the fewest
        side = dot(product(dropped, lora.a) * (lora.scale * strength).astype(y.dtype), lora.b)
        if lora.magnitude is None:
            y += side
        else:
            g = lora.magnitude / jax.lax.stop_gradient(column_norm(w0, lora.a, lora.b, lora.scale))
            y0 = plain if dropped is x else product(dropped, w0)
            y += (strength * (g - 1)).astype(y.dtype) * y0 + g.astype(y.dtype) * side
    return y


def _dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    keep = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def column_norm(w: jax.Array | QTensor, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """Length of each column of `w + a * scale @ b`: (out,), in at least fp32. a @ b is never made:

        ||w||^2 + 2 sum_r (a^T w)_ro b_ro + sum_r b_ro (a^T a b)_ro

    One layer's arrays, shaped as in `LoRAWeight`; a column goes over all axes but the last.
    """
    wide = jnp.promote_types(a.dtype, jnp.float32)
    a = a.reshape(-1, a.shape[-1]).astype(wide) * scale.astype(wide)
    b = b.astype(wide)
    if isinstance(w, QTensor):
        w = qtensor.dequantize(w, wide)
    w = w.reshape(-1, w.shape[-1]).astype(wide)
    squares = jnp.sum(jnp.square(w), 0)
    with jax.default_matmul_precision("float32"):  # g - 1 is a small difference
        return jnp.sqrt(squares + jnp.sum((2 * dot(a.T, w) + a.T @ a @ b) * b, 0))
