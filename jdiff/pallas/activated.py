"""GELU and rounding to int8, a step a token, in one pass: XLA:TPU makes one for the largest values, and GELU again for the other.

Shapes: B batch, L tokens, F hidden.
"""

from collections.abc import Callable
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
    body = partial(_some_rows, activation)
    kernel = lambda x_BLF: integers.over_tokens(body, x_BLF, [], [], MOST_ROWS, "activated")  # noqa: E731
    return integers.by_token(on_each_device(kernel, x_BLF, lie=[tokens], out=[tokens, (*tokens, None)]))


def _some_rows(activation: Callable[[jax.Array], jax.Array], x_LF: Any, *outputs: Any) -> None:
    integers.write(activation(x_LF[...].astype(jnp.float32)), (), outputs)
