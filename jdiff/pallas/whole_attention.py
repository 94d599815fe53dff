"""Attention of so few tokens that all scores of a head lie in a TPU's vector memory at once.

It reads queries, keys and values as the products left them, heads side by side in a row, and leaves its output as the next product
takes it: nothing is transposed in memory. Scores are made with keys as their rows, so that the softmax's maximum runs
over rows, which costs a TPU less than over columns, and its sum is one more row of the product with the values.

Shapes: B batch, L queries, S keys, N heads, K head dim, D = N K.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.pallas import integers
from jdiff.pallas.integers import SUBLANES
from jdiff.rows import heads_apart, on_each_device, tensor_size
from jdiff.sums import LANES

MOST_TOKENS = 512
"""Queries or keys: beyond, splash is the better."""
MOST_BYTES = 2**24
"""Of vector memory, which all chips let a kernel have."""


def takes(q_BLNK: jax.Array, k_BSNK: jax.Array) -> bool:
    """Whether `attend` takes such."""
    _, L, N, K = q_BLNK.shape
    return _takes(q_BLNK.dtype, L, k_BSNK.shape[1], N, K)


def takes_joined(qkv_BLE: jax.Array, heads: int) -> bool:
    """Whether `attend_joined` takes such; not for a mesh whose devices share out the heads."""
    (_, L, E), D = qkv_BLE.shape, qkv_BLE.shape[2] // 3
    return tensor_size() == 1 and D % LANES == 0 and _takes(qkv_BLE.dtype, L, L, heads, E // (3 * heads))


def _takes(dtype: Any, L: int, S: int, N: int, K: int) -> bool:
    # what is read and written comes twice, beside values and output with tokens last, and scores of some heads
    room = 8 * (L + S) * N * K + (2 * S + 4 * L) * N * K + 16 * L * S
    fits = max(L, S) <= MOST_TOKENS and room <= MOST_BYTES
    return dtype == jnp.bfloat16 and K % SUBLANES == L % LANES == S % LANES == 0 and fits


def attend(q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, heads side by side: (B, L, D), bfloat16.

    Products add up in fp32, and the softmax is in it. Each device of a mesh takes its rows and its heads. It has no gradient.
    """
    return _on_each(_side_by_side(q_BLNK, k_BSNK, v_BSNK), q_BLNK.shape[2], APART, None)[0]


def rounded(q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array, step: jax.Array | None) -> list[jax.Array]:
    """`attend`, rounded: int8 (B, L, D), and steps (B, L, 1) where none is given."""
    return integers.by_token(
        _on_each(_side_by_side(q_BLNK, k_BSNK, v_BSNK), q_BLNK.shape[2], APART, integers.inverse(step))
    )


def attend_joined(qkv_BLE: jax.Array, heads: int) -> jax.Array:
    """`attend`, of queries, keys and values side by side in one array, as one product made them: (B, L, E), E = 3 D."""
    return _on_each([qkv_BLE] * 3, heads, JOINED, None)[0]


def rounded_joined(qkv_BLE: jax.Array, heads: int, step: jax.Array | None) -> list[jax.Array]:
    """`rounded`, of such."""
    return integers.by_token(_on_each([qkv_BLE] * 3, heads, JOINED, integers.inverse(step)))


APART, JOINED = (0, 0, 0), (0, 1, 2)
"""Places of queries, keys and values in their arrays, counted in D."""


def _side_by_side(*arrays: jax.Array) -> list[jax.Array]:
    return [x.reshape(*x.shape[:2], -1) for x in arrays]


def _on_each(
    arrays: list[jax.Array], heads: int, places: tuple[int, ...], inverse: list[jax.Array] | None
) -> list[jax.Array]:
    """inverse: None for floats."""
    D, numbers = arrays[0].shape[2] // (1 + max(places)), inverse or []
    lie, whole = ("rows", None, heads_apart(heads)), ("rows", None, None)
    if inverse == []:  # a token's largest value is one of all heads
        lie = whole
    kernel = partial(_on_one, D // heads, places, inverse is not None)
    out = [lie] if inverse is None or inverse else [lie, (*whole, None)]
    return on_each_device(kernel, *arrays, *numbers, lie=[lie] * 3 + [(None,)] * len(numbers), out=out)


def _on_one(
    K: int,
    places: tuple[int, ...],
    rounds: bool,
    q_BLD: jax.Array,
    k_BSD: jax.Array,
    v_BSD: jax.Array,
    *inverse: jax.Array,
) -> Sequence[jax.Array]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (B, L, _), S, D = q_BLD.shape, k_BSD.shape[1], q_BLD.shape[2] // (1 + max(places))
    row = lambda tokens, place: pl.BlockSpec((None, tokens, D), lambda i: (i, 0, place))  # noqa: E731
    inputs = [row(tokens, place) for tokens, place in zip((L, S, S), places, strict=True)]
    shapes, blocks = [jax.ShapeDtypeStruct((B, L, D), q_BLD.dtype)], [(None, L, D)]
    if rounds:
        shapes, blocks = integers.outputs((B, L, D), L, inverse)
    return pl.pallas_call(
        partial(_one_row, K, rounds, len(inverse)),
        grid=(B,),
        in_specs=[*inputs, *[pl.BlockSpec(memory_space=pltpu.SMEM) for _ in inverse]],
        out_specs=[pl.BlockSpec(block, lambda i, block=block: (i, 0, 0, 0)[: len(block)]) for block in blocks],
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((D, S), v_BSD.dtype), pltpu.VMEM((D, L), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="whole_attention",
        metadata={"steps": str(B)},
    )(q_BLD, k_BSD, v_BSD, *inverse)


def _one_row(K: int, rounds: bool, fixed: int, q_LD: Any, k_SD: Any, v_SD: Any, *rest: Any) -> None:
    """rest: 1 / step where it is fixed, the outputs, and room for values and output with tokens last."""
    *outputs, v_DS, out_DL = rest[fixed:]
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
    if rounds:
        integers.write(out_DL[...].T, rest[:fixed], outputs)
    else:
        outputs[0][...] = out_DL[...].T.astype(outputs[0].dtype)
