"""LayerNorm, adaLN's modulation and rounding to int8 in one pass: in front of a product of integers XLA:TPU makes three of it.

Shapes: B batch, L tokens, D width.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.pallas import integers
from jdiff.rows import on_each_device

MOST_ROWS = 256
"""Tokens at a time."""


def rounded(
    x_BLD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array, eps: float, step: jax.Array | None
) -> list[jax.Array]:
    """`norm(x) * (1 + scale) + shift`, in fp32 until it is rounded: int8 (B, L, D), and steps (B, L, 1) where none is given.

    Each device of a mesh takes its rows. It has no gradient.
    """
    tokens, of_row = ("rows", None, None), ("rows", None)
    wide = shift_BD.astype(jnp.float32), scale_BD.astype(jnp.float32)  # of which a kernel can read any one row
    inverse = integers.inverse(step)
    lie = [tokens, of_row, of_row, *[(None,)] * len(inverse)]
    out = [tokens, (*tokens, None)][: 2 - len(inverse)]
    return integers.by_token(on_each_device(partial(_on_one, eps), x_BLD, *wide, *inverse, lie=lie, out=out))


def _on_one(
    eps: float, x_BLD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array, *inverse: jax.Array
) -> Sequence[jax.Array]:
    from jax.experimental import pallas as pl

    B, D = shift_BD.shape
    some = min(B, integers.SUBLANES)  # of shifts and gains one row is not fetched alone
    near = pl.BlockSpec((some, D), lambda i, j: (jax.lax.div(i, some), 0))
    body = partial(_some_rows, eps, len(inverse))
    return integers.over_tokens(body, x_BLD, [(shift_BD, near), (scale_BD, near)], inverse, MOST_ROWS, "modulated")


def _some_rows(eps: float, fixed: int, x_LD: Any, shift_BD: Any, scale_BD: Any, *rest: Any) -> None:
    from jax.experimental import pallas as pl

    row = pl.ds(jax.lax.rem(pl.program_id(0), shift_BD.shape[0]), 1)
    x = x_LD[...].astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
    integers.write(x * (1 + scale_BD[row]) + shift_BD[row], rest[:fixed], rest[fixed:])
