"""Matrix products, written as each compiler makes them and their gradients with the smallest copies. Legend: I in, O out."""

import jax
import jax.numpy as jnp
from jax import lax

from jdiff import target
from jdiff.primal import quicker


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x (..., I) @ kernel (I, O)` of one dtype. Forward-mode derivatives only off the CPU.

    For the kernel's gradient XLA:CPU transposes the operand that comes first, which autodiff makes the output's cotangent. Here it
    is the narrower of the two: a training step of DiT-S/2 takes 2 % less on a device a core, 18 % on one (docs/performance.md).
    """
    return _product(x, kernel) if target.platform() == "cpu" else jnp.dot(x, kernel)


_product = jax.custom_vjp(jnp.dot)


def _backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    over = ((rows, rows), ((), ()))
    gradient = lax.dot_general(x, g, over) if x.shape[-1] <= g.shape[-1] else lax.dot_general(g, x, over).T
    return lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ()))), gradient


_product.defvjp(lambda x, kernel: (jnp.dot(x, kernel), (x, kernel)), _backward)


def split_product(x: jax.Array, kernel: jax.Array, parts: int) -> list[jax.Array]:
    """`product` in so many equal parts of O. On a TPU each part has a product of its own, and the gradients are those of one:
    XLA:TPU copies what it splits, but not what it joins (docs/performance.md).
    """
    if target.platform() == "tpu":
        split: list[jax.Array] = _split_product(x, kernel, parts)
        return split
    return jnp.split(product(x, kernel), parts, axis=-1)


def written(x: jax.Array) -> jax.Array:
    """x, which on a TPU is made and written before what reads it: of two products and what is done between them XLA:TPU otherwise
    makes one loop, by its own estimate a quarter slower (docs/performance.md). Where a gradient is taken x alone, for there it is
    kept, and making it twice is estimated at less than reading it."""
    return quicker(lax.optimization_barrier, lambda x: x)(x) if target.platform() == "tpu" else x


def _products(x: jax.Array, kernel: jax.Array, parts: int) -> list[jax.Array]:
    return [jnp.dot(x, part) for part in jnp.split(kernel, parts, axis=-1)]


_split_product = jax.custom_vjp(_products, nondiff_argnums=(2,))
_split_product.defvjp(
    lambda x, kernel, parts: (_products(x, kernel, parts), (x, kernel)),
    lambda parts, saved, gs: _backward(saved, jnp.concatenate(gs, -1)),
)
