"""What kernels that round share: their outputs, and the rounding.

`step`: a number, fixed beforehand, in whose multiples all are rounded; or None for one a token, that of its largest value,
which is made too.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jdiff.sums import LANES

SUBLANES = 8
"""Rows of fp32 in one register."""


ROWS = 4 * SUBLANES
"""Of int8 in one register."""
MOST_NUMBERS = 2**20
"""That a kernel rounds at a time: with what it reads and writes meanwhile they lie in a TPU's vector memory."""


def takes(x_BLD: jax.Array) -> bool:
    """Whether arrays of that shape and dtype are rounded by kernels."""
    _, L, D = x_BLD.shape
    return x_BLD.dtype == jnp.bfloat16 and L % ROWS == D % LANES == 0 and ROWS * D <= MOST_NUMBERS


def rows_at_once(length: int, width: int, most: int) -> int:
    """The largest number of tokens, up to `most`, that divides length and fills registers."""
    most = min(length, most, MOST_NUMBERS // width)
    return next(n for n in range(most // ROWS * ROWS, 0, -ROWS) if length % n == 0)


def inverse(step: jax.Array | None) -> list[jax.Array]:
    """The number that a kernel multiplies by, where there is one."""
    return [] if step is None else [1 / step.astype(jnp.float32).reshape(1)]


Block: TypeAlias = tuple[int | None, ...]


def outputs(
    shape: tuple[int, ...], rows: int, step: Sequence[jax.Array]
) -> tuple[list[jax.ShapeDtypeStruct], list[Block]]:
    """What a kernel makes that takes so many tokens at a time, and blocks of it: int8 (B, L, D), and without a fixed step one a
    token, beside one another: (B, L / rows, 1, rows)."""
    B, L, D = shape
    made, blocks = [jax.ShapeDtypeStruct(shape, jnp.int8)], list[Block]([(None, rows, D)])
    if not step:
        made.append(jax.ShapeDtypeStruct((B, L // rows, 1, rows), jnp.float32))
        blocks.append((None, None, 1, rows))
    return made, blocks


def by_token(made: list[jax.Array]) -> list[jax.Array]:
    """A kernel's outputs, steps as (B, L, 1)."""
    return [made[0], *[steps.reshape(*made[0].shape[:2], 1) for steps in made[1:]]]


def write(y_LD: jax.Array, inverse: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Rounds fp32 to a kernel's outputs, as `outputs` has them. Not finite: NaN for a token's step, unseen where it is fixed."""
    if inverse:
        outputs[0][...] = _nearest(y_LD * inverse[0][0])
        return
    largest = jnp.abs(y_LD).max(-1, keepdims=True)
    step_L1 = jnp.where(largest == 0, 1, jnp.where(largest == jnp.inf, jnp.nan, largest)) / 127.5
    outputs[0][...] = _nearest(y_LD * (1 / step_L1))
    outputs[1][...] = jnp.broadcast_to(step_L1, (step_L1.shape[0], LANES)).T[:1]


def _nearest(y: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(y), -127, 127).astype(jnp.int8)
