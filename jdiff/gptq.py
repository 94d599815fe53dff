"""GPTQ (arXiv:2210.17323): a kernel's rows rounded one after another, each error made up for by the rows that are still to come.

Shapes: C inputs, D outputs.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jdiff import qtensor
from jdiff.qtensor import QTensor, Scheme

DAMPING = 0.01
"""Of the moments' diagonal, as in the paper: what is added to it, as a share of its mean."""


def quantize(
    kernel_CD: jax.Array,
    moment_CC: jax.Array,
    scheme: Scheme,
    sizes: tuple[int, ...] = (),
    peak_C: jax.Array | None = None,
) -> QTensor:
    """`qtensor.quantize`'s scales and other integers: those that err less in products with inputs of this second moment.

    moment: the mean of x^T x over the inputs that were seen. Rows whose inputs are largest go first (the authors' `act_order`),
    when all the others can still make up for them.
    """
    made = qtensor.quantize(kernel_CD, scheme, sizes, peak_C)
    C, top = len(kernel_CD), 2 ** (scheme.bits - 1) - 1
    diagonal_C = jnp.diag(moment_CC)
    order_C = jnp.argsort(-diagonal_C)
    damped_CC = moment_CC + (DAMPING * diagonal_C.mean() + jnp.finfo(jnp.float32).tiny) * jnp.eye(C)
    # row i of the inverse's Cholesky factor says how the rows after i take over an error of row i
    factor_CC = jnp.linalg.cholesky(jnp.linalg.inv(damped_CC[order_C][:, order_C])).T
    scale_CD = jnp.broadcast_to(qtensor.spread(made), kernel_CD.shape)[order_C]

    def body(i: int, rest_CD: jax.Array) -> jax.Array:
        row_D = rest_CD[i]
        rounded_D = jnp.clip(jnp.round(row_D / scale_CD[i]), -top, top)
        error_D = (row_D - rounded_D * scale_CD[i]) / factor_CC[i, i]
        after_C = jnp.where(jnp.arange(C) > i, factor_CC[i], 0)
        return (rest_CD - after_C[:, None] * error_D).at[i].set(rounded_D)

    rounded_CD = jax.lax.fori_loop(0, C, body, kernel_CD[order_C].astype(jnp.float32))
    whole_CD = jnp.zeros_like(rounded_CD).at[order_C].set(rounded_CD)
    return replace(made, qvalue=whole_CD.astype(made.qvalue.dtype))
