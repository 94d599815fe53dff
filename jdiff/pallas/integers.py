"""What kernels that round share: their outputs, and the rounding.

`step`: a number, fixed beforehand, in whose multiples all are rounded; or None for one a token, that of its largest value,
which is made too.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jdiff.pallas.blocks import largest_divisor
from jdiff.qtensor import nearest, step_of
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
        outputs[0][...] = nearest(y_LD * inverse[0][0])
        return
    step_L1 = step_of(jnp.abs(y_LD).max(-1, keepdims=True))
    outputs[0][...] = nearest(y_LD * (1 / step_L1))
    outputs[1][...] = jnp.broadcast_to(step_L1, (step_L1.shape[0], LANES)).T[:1]


def over_tokens(
    body: Callable[..., None],
    x_BLD: jax.Array,
    others: Sequence[tuple[jax.Array, Any]],
    inverse: Sequence[jax.Array],
    most: int,
    name: str,
) -> Sequence[jax.Array]:
    """A kernel that takes up to `most` tokens of a row at a time and rounds what it makes of them.

    body: (x, others, 1 / step where it is fixed, outputs), refs all; it writes by `write`. others: arrays, and their `BlockSpec`s
    over (row, part of it).
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    B, L, D = x_BLD.shape
    rows = largest_divisor(L, min(most, MOST_NUMBERS // D), ROWS)
    tokens = lambda block: pl.BlockSpec(block, lambda i, j: (i, j, 0, 0)[: len(block)])  # noqa: E731
    shapes, blocks = outputs(x_BLD.shape, rows, inverse)
    numbers = [pl.BlockSpec(memory_space=pltpu.SMEM) for _ in inverse]
    return pl.pallas_call(
        body,
        grid=(B, L // rows),
        in_specs=[tokens((None, rows, D)), *[spec for _, spec in others], *numbers],
        out_specs=[tokens(block) for block in blocks],
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name=name,
        metadata={"steps": str(B * (L // rows))},
    )(x_BLD, *[array for array, _ in others], *inverse)
