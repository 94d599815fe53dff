"""What kernels that round share: their outputs, and the rounding.

`step`: a number, fixed beforehand, in whose multiples all are rounded; or None for one a token, that of its largest value,
which is made too.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.sums import LANES

SUBLANES = 8
"""Rows of fp32 that lie in one register; 32 of int8."""


def takes(x_BLD: jax.Array) -> bool:
    """Whether arrays of that shape and dtype are rounded by kernels."""
    return x_BLD.dtype == jnp.bfloat16 and x_BLD.shape[1] % (4 * SUBLANES) == x_BLD.shape[2] % LANES == 0


def rows_at_once(length: int, most: int) -> int:
    """The largest number of tokens, up to `most`, that divides length and fills registers of int8."""
    return next(n for n in range(min(length, most), 0, -1) if length % n == 0 and n % (4 * SUBLANES) == 0)


def inverse(step: jax.Array | None) -> list[jax.Array]:
    """The number that a kernel multiplies by, where there is one."""
    return [] if step is None else [1 / step.astype(jnp.float32).reshape(1)]


def shapes(shape: tuple[int, ...], step: Sequence[jax.Array]) -> list[jax.ShapeDtypeStruct]:
    """Of a kernel's outputs (B, L, D): int8, and without a fixed step one a token (B, L, 1)."""
    steps = [] if step else [jax.ShapeDtypeStruct((*shape[:-1], 1), jnp.float32)]
    return [jax.ShapeDtypeStruct(shape, jnp.int8), *steps]


def write(y_LD: jax.Array, inverse: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Rounds fp32 to a kernel's outputs, as `shapes` has them. Not finite: NaN for a token's step, unseen where it is fixed."""
    if inverse:
        outputs[0][...] = _nearest(y_LD * inverse[0][0])
        return
    largest = jnp.abs(y_LD).max(-1, keepdims=True)
    step = jnp.where(largest == 0, 1, jnp.where(largest == jnp.inf, jnp.nan, largest)) / 127.5
    outputs[0][...] = _nearest(y_LD * (1 / step))
    outputs[1][...] = step


def _nearest(y: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(y), -127, 127).astype(jnp.int8)
