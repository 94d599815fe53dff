"""Attention of so few tokens that all scores of a head lie in a TPU's vector memory at once.

It reads queries, keys and values as the products left them, heads side by side in a row, and leaves its output as the next product
takes it: nothing is transposed in memory. Scores are made with keys as their rows, so that the softmax's maximum runs
over rows, which costs a TPU less than over columns, and its sum is one more row of the product with the values.

Shapes: B batch, L queries, S keys, N heads, K head dim, D = N K.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.pallas.integers import SUBLANES, as_integers
from jdiff.rows import heads_apart, on_each_device
from jdiff.sums import LANES

MOST_TOKENS = 512
"""Queries or keys: beyond, splash is the better."""


def takes(q_BLNK: jax.Array, k_BSNK: jax.Array) -> bool:
    """Whether `attend` has been compiled for such."""
    (_, L, _, K), S = q_BLNK.shape, k_BSNK.shape[1]
    return q_BLNK.dtype == jnp.bfloat16 and K % SUBLANES == L % LANES == S % LANES == 0 and max(L, S) <= MOST_TOKENS


def attend(q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array, step: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, heads side by side: (B, L, D), bfloat16, or int8 that are multiples of `step`, a number.

    Products add up in fp32, and the softmax is in it. Each device of a mesh takes its rows and its heads. It has no gradient.
    """
    N, K = q_BLNK.shape[2:]
    arrays = [x.reshape(*x.shape[:2], N * K) for x in (q_BLNK, k_BSNK, v_BSNK)]
    inverse = [] if step is None else [1 / step.astype(jnp.float32).reshape(1)]
    lie = ("rows", None, heads_apart(N))
    return on_each_device(partial(_on_one, K), *arrays, *inverse, lie=[lie] * 3 + [(None,)] * len(inverse), out=lie)


def _on_one(K: int, q_BLD: jax.Array, k_BSD: jax.Array, v_BSD: jax.Array, *inverse: jax.Array) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (B, L, D), S = q_BLD.shape, k_BSD.shape[1]
    row = lambda tokens: pl.BlockSpec((None, tokens, D), lambda i: (i, 0, 0))  # noqa: E731
    return pl.pallas_call(
        partial(_one_row, K),
        grid=(B,),
        in_specs=[row(L), row(S), row(S), *[pl.BlockSpec(memory_space=pltpu.SMEM) for _ in inverse]],
        out_specs=row(L),
        out_shape=jax.ShapeDtypeStruct(q_BLD.shape, jnp.int8 if inverse else q_BLD.dtype),
        scratch_shapes=[pltpu.VMEM((D, S), v_BSD.dtype), pltpu.VMEM((D, L), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="whole_attention",
        metadata={"steps": str(B)},
    )(q_BLD, k_BSD, v_BSD, *inverse)


def _one_row(K: int, q_LD: Any, k_SD: Any, v_SD: Any, *rest: Any) -> None:
    """rest: 1 / step where there is one, the output, and room for values and output with tokens last."""
    *inverse, out_LD, v_DS, out_DL = rest
    heads = q_LD.shape[1] // K
    scale = math.log2(math.e) / math.sqrt(K)
    ones_8S = jnp.ones((SUBLANES, k_SD.shape[0]), v_SD.dtype)
    head = lambda n: slice(n * K, (n + 1) * K)  # noqa: E731
    over_columns = (((1,), (1,)), ((), ()))
    v_DS[...] = v_SD[...].T

    def scores(n: int) -> jax.Array:
        k_SK, q_LK = k_SD[:, head(n)], q_LD[:, head(n)]
        return jax.lax.dot_general(k_SK, q_LK, over_columns, preferred_element_type=jnp.float32)

    def softened(s_SL: jax.Array) -> jax.Array:
        return jnp.exp2((s_SL - s_SL.max(0, keepdims=True)) * scale).astype(v_SD.dtype)

    def finish(n: int, p_SL: jax.Array) -> None:
        v_KS = jnp.concatenate([v_DS[head(n)], ones_8S])
        out_KL = jnp.dot(v_KS, p_SL, preferred_element_type=jnp.float32)
        out_DL[head(n)] = out_KL[:K] * (1 / out_KL[K : K + 1])

    # three heads are under way at once, so that the compiler may put one's products beside another's softmax
    s_SL: dict[int, jax.Array] = {}
    p_SL: dict[int, jax.Array] = {}
    for n in range(heads + 2):
        if n < heads:
            s_SL[n] = scores(n)
        if n >= 2:
            finish(n - 2, p_SL.pop(n - 2))
        if 1 <= n <= heads:
            p_SL[n - 1] = softened(s_SL.pop(n - 1))
    out = out_DL[...].T
    out_LD[...] = as_integers(out * inverse[0][0]) if inverse else out.astype(out_LD.dtype)
