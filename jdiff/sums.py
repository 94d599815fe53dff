"""Sums along rows, as each platform makes them quickly."""

import jax
import jax.numpy as jnp

from jdiff import target

LANES = 128
"""Columns that a TPU multiplies at once."""


def row_sum(x: jax.Array) -> jax.Array:
    """The sum over the last axis, which stays with a length of 1, in at least fp32.

    A TPU adds bfloat16 up by a product with ones, which adds in fp32 too: XLA:TPU's estimate for a sum along a row is two to four
    times as much (docs/performance.md).
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if target.platform() == "tpu" and x.dtype == jnp.bfloat16:
        ones = jnp.ones((x.shape[-1], LANES), x.dtype)
        return jnp.einsum("...D,DK->...K", x, ones, preferred_element_type=wide)[..., :1]
    return jnp.sum(x, -1, keepdims=True, dtype=wide)
