"""GELU and rounding to int8, a step a token, in one pass: XLA:TPU makes one for the largest values, and GELU again for the other.

Shapes: B batch, L tokens, F hidden.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.pallas import integers
from jdiff.rows import on_each_device

MOST_ROWS = 64
"""Tokens at a time."""


def rounded(activation: Callable[[jax.Array], jax.Array], x_BLF: jax.Array) -> list[jax.Array]:
    """`activation(x)`, in fp32 until it is rounded: int8 (B, L, F), and steps (B, L, 1).

    Each device of a mesh takes its rows. It has no gradient.
    """
    tokens = ("rows", None, None)
    out = [tokens, ("rows", None, None, None)]
    return integers.by_token(on_each_device(partial(_on_one, activation), x_BLF, lie=[tokens], out=out))


def _on_one(activation: Callable[[jax.Array], jax.Array], x_BLF: jax.Array) -> Sequence[jax.Array]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    B, L, F = x_BLF.shape
    rows = integers.rows_at_once(L, F, MOST_ROWS)
    shapes, blocks = integers.outputs(x_BLF.shape, rows, [])
    tokens = lambda block: pl.BlockSpec(block, lambda i, j: (i, j, 0, 0)[: len(block)])  # noqa: E731
    return pl.pallas_call(
        partial(_some_rows, activation),
        grid=(B, L // rows),
        in_specs=[tokens((None, rows, F))],
        out_specs=[tokens(block) for block in blocks],
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="activated",
        metadata={"steps": str(B * (L // rows))},
    )(x_BLF)


def _some_rows(activation: Callable[[jax.Array], jax.Array], x_LF: Any, *outputs: Any) -> None:
    integers.write(activation(x_LF[...].astype(jnp.float32)), (), outputs)
