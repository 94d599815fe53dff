"""LayerNorm, adaLN's modulation and rounding to int8 in one pass: in front of a product of integers XLA:TPU makes three of it.

Shapes: B batch, L tokens, D width.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.pallas.integers import SUBLANES, as_integers
from jdiff.rows import on_each_device
from jdiff.sums import LANES

MOST_ROWS = 256
"""Tokens at a time."""


def takes(x_BLD: jax.Array) -> bool:
    """Whether `integers` has been compiled for such."""
    return x_BLD.dtype == jnp.bfloat16 and x_BLD.shape[1] % (4 * SUBLANES) == x_BLD.shape[2] % LANES == 0


def integers(x_BLD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array, eps: float, step: jax.Array) -> jax.Array:
    """int8 (B, L, D) near `(norm(x) * (1 + scale) + shift) / step`, all in fp32 until it is rounded. step: a number.

    Each device of a mesh takes its rows. It has no gradient.
    """
    tokens, of_row = ("rows", None, None), ("rows", None)
    wide = shift_BD.astype(jnp.float32), scale_BD.astype(jnp.float32)  # of which a kernel can read any one row
    arrays = x_BLD, *wide, 1 / step.astype(jnp.float32).reshape(1)
    return on_each_device(partial(_on_one, eps), *arrays, lie=[tokens, of_row, of_row, (None,)], out=tokens)


def _on_one(eps: float, x_BLD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array, inverse: jax.Array) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    B, L, D = x_BLD.shape
    rows = next(n for n in range(min(L, MOST_ROWS), 0, -1) if L % n == 0 and n % (4 * SUBLANES) == 0)
    tokens = pl.BlockSpec((None, rows, D), lambda i, j: (i, j, 0))
    some = min(B, SUBLANES)  # of shifts and gains one row is not fetched alone
    near = pl.BlockSpec((some, D), lambda i, j: (jax.lax.div(i, some), 0))
    return pl.pallas_call(
        partial(_some_rows, eps),
        grid=(B, L // rows),
        in_specs=[tokens, near, near, pl.BlockSpec(memory_space=pltpu.SMEM)],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct(x_BLD.shape, jnp.int8),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="modulated",
        metadata={"steps": str(B * (L // rows))},
    )(x_BLD, shift_BD, scale_BD, inverse)


def _some_rows(eps: float, x_LD: Any, shift_BD: Any, scale_BD: Any, inverse: Any, out_LD: Any) -> None:
    from jax.experimental import pallas as pl

    row = pl.ds(jax.lax.rem(pl.program_id(0), shift_BD.shape[0]), 1)
    x = x_LD[...].astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
    gain_1D = (1 + scale_BD[row]) * inverse[0]
    out_LD[...] = as_integers(x * gain_1D + shift_BD[row] * inverse[0])
