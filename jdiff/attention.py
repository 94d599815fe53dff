"""Attention: one door, and by backend what stands behind it.

Shapes: B batch, L queries, S keys, N heads, K head dim.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jdiff import target
from jdiff.pallas import splash, whole_attention
from jdiff.primal import quicker
from jdiff.prologue import Prologue
from jdiff.sums import row_sum


def attention(q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array, causal: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, the one door to attention: (B, L, N, K) out. causal: token i sees the tokens 0..i.

    On GPU it is JAX's fused attention (cuDNN where it takes the shape and dtype), on TPU splash where there are many keys, and
    where there are few and no gradient is taken a kernel of jdiff's; elsewhere two products with an fp32 softmax between, over
    a chunk of the queries at a time where all scores at once would be large: memory grows with L + S, in the gradient too.
    """
    if target.platform() == "gpu" and q_BLNK.dtype in (jnp.bfloat16, jnp.float16):
        return jax.nn.dot_product_attention(q_BLNK, k_BSNK, v_BSNK, is_causal=causal)
    if target.platform() == "tpu" and not causal and splash.takes(q_BLNK, k_BSNK):
        return splash.attend(q_BLNK, k_BSNK, v_BSNK)
    q_BNLK, k_BNSK, v_BNSK = (jnp.swapaxes(x, 1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
    L, S = q_BLNK.shape[1], k_BSNK.shape[1]
    chunks = 1 if causal else math.ceil(L * S / MOST_SCORES)
    # rows of zeros fill the last chunk: a query's output depends on no other query, and their cotangents are zero
    missing = math.ceil(L / chunks) * chunks - L
    q_BNLK = jnp.pad(q_BNLK, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else q_BNLK
    out_BNLK: jax.Array = _attention(q_BNLK, k_BNSK, v_BNSK, causal, chunks)
    return jnp.swapaxes(out_BNLK, 1, 2)[:, :L]


@partial(jax.tree_util.register_dataclass, data_fields=["q_BLNK", "k_BSNK", "v_BSNK"], meta_fields=[])
@dataclasses.dataclass(eq=False)
class Attended(Prologue):
    """`attention`, its heads side by side, as the input of a product."""

    q_BLNK: jax.Array
    k_BSNK: jax.Array
    v_BSNK: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        B, L, N, K = self.q_BLNK.shape
        return B, L, N * K

    def floats(self) -> jax.Array:
        return attention(self.q_BLNK, self.k_BSNK, self.v_BSNK).reshape(self.shape)

    def rounds(self, fixed: bool) -> bool:
        return target.platform() == "tpu" and whole_attention.takes(self.q_BLNK, self.k_BSNK)

    def integers(self, step: jax.Array | None) -> list[jax.Array]:
        return whole_attention.rounded(self.q_BLNK, self.k_BSNK, self.v_BSNK, step)


@partial(jax.tree_util.register_dataclass, data_fields=["qkv_BLE"], meta_fields=["heads"])
@dataclasses.dataclass(eq=False)
class JoinedAttended(Prologue):
    """`Attended`, of queries, keys and values side by side, as one product makes them: (B, L, 3 D)."""

    qkv_BLE: jax.Array
    heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        B, L, E = self.qkv_BLE.shape
        return B, L, E // 3

    def apart(self) -> Attended:
        B, L, D = self.shape
        return Attended(*(x.reshape(B, L, self.heads, D // self.heads) for x in jnp.split(self.qkv_BLE, 3, -1)))

    def floats(self) -> jax.Array:
        plain = lambda self: self.apart().floats()  # noqa: E731
        quick = lambda self: whole_attention.attend_joined(self.qkv_BLE, self.heads)  # noqa: E731
        return (quicker(quick, plain) if self._has_kernel() else plain)(self)

    def _has_kernel(self) -> bool:
        return target.platform() == "tpu" and whole_attention.takes_joined(self.qkv_BLE, self.heads)

    def rounds(self, fixed: bool) -> bool:
        return self._has_kernel() or self.apart().rounds(fixed)

    def integers(self, step: jax.Array | None) -> list[jax.Array]:
        if self._has_kernel():
            return whole_attention.rounded_joined(self.qkv_BLE, self.heads, step)
        return self.apart().integers(step)


MOST_SCORES = 2**20
"""Scores a head that are formed at once: 256 queries of 4096 keys, the best chunk of those tried on a CPU."""

MANY_KEYS = 384
"""From as many on a CPU saves the log-sum-exp: with 256 that costs XLA:CPU its one pass over the scores, forward and gradient of
DiT-S/2 at batch 8 taking 33 ms a layer for 23; with 400 it has none to lose (docs/performance.md)."""


def _saves_log_sum(q_BNLK: jax.Array, k_BNSK: jax.Array, causal: bool) -> bool:
    whole = q_BNLK.dtype in (jnp.float32, jnp.float64)  # a column of a product must not round it
    return target.platform() == "cpu" and k_BNSK.shape[2] >= MANY_KEYS and whole and not causal


def _unnormalized(q_BNLK: jax.Array, k_BNSK: jax.Array, causal: bool = False) -> tuple[jax.Array, jax.Array]:
    """exp(scores - max) and the max over keys, at least fp32."""
    scores_BNLS = jnp.einsum("BNLK,BNSK->BNLS", q_BNLK * (q_BNLK.shape[-1] ** -0.5), k_BNSK)
    scores_BNLS = scores_BNLS.astype(jnp.promote_types(scores_BNLS.dtype, jnp.float32))
    if causal:
        seen_LS = jnp.tril(jnp.ones(scores_BNLS.shape[-2:], bool))
        scores_BNLS = jnp.where(seen_LS, scores_BNLS, -jnp.inf)
    max_BNL1 = scores_BNLS.max(-1, keepdims=True)
    return jnp.exp(scores_BNLS - max_BNL1), max_BNL1


def _over_keys(p_BNLS: jax.Array, out_BNLK: jax.Array) -> jax.Array:
    """The sum of p over its keys, in out's dtype: (B, N, L, 1), or as wide as out.

    A TPU adds up as in `row_sum`, but in as many columns as are divided by the sum: they need not be spread out again.
    """
    if target.platform() != "tpu":
        return row_sum(p_BNLS).astype(out_BNLK.dtype)
    ones_SK = jnp.ones((p_BNLS.shape[-1], out_BNLK.shape[-1]), out_BNLK.dtype)
    return jnp.einsum("BNLS,SK->BNLK", p_BNLS.astype(out_BNLK.dtype), ones_SK)


def _attend(
    q_BNLK: jax.Array, k_BNSK: jax.Array, v_BNSK: jax.Array, causal: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """The output, and the log-sum-exp of the scores (B, N, L, 1) where the gradient is to have it.

    The normalisation comes after the second product, where it touches the fewest numbers.
    """
    p_BNLS, max_BNL1 = _unnormalized(q_BNLK, k_BNSK, causal)
    out_BNLK = jnp.einsum("BNLS,BNSK->BNLK", p_BNLS.astype(q_BNLK.dtype), v_BNSK)
    sums = _over_keys(p_BNLS, out_BNLK)
    log_sum_BNL1 = max_BNL1 + jnp.log(sums) if _saves_log_sum(q_BNLK, k_BNSK, causal) else None
    return out_BNLK / sums, log_sum_BNL1


def _attend_backward(saved: Any, g_BNLK: jax.Array, causal: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """FlashAttention's gradient (arXiv:2205.14135): probabilities are made again from the scores, and the softmax's inner
    product is that of `out` and its cotangent.

    Where the log-sum-exp is saved, keys are the rows of what is made: two of the three products over it then take it as it lies.
    Elsewhere queries are, and in those two a head's columns come first: what comes first is what XLA:CPU transposes.
    """
    q_BNLK, k_BNSK, v_BNSK, out_BNLK, log_sum_BNL1 = saved
    dtype, scale = q_BNLK.dtype, q_BNLK.shape[-1] ** -0.5
    if log_sum_BNL1 is not None:
        p_BNSL = jnp.exp(_less(k_BNSK, q_BNLK * scale, log_sum_BNL1))
        ds_BNSL = p_BNSL * _less(v_BNSK, g_BNLK, row_sum(g_BNLK * out_BNLK))
        dq_BNLK = jnp.einsum("BNSL,BNSK->BNLK", ds_BNSL, k_BNSK) * scale
        dk_BNSK = jnp.einsum("BNSL,BNLK->BNSK", ds_BNSL, q_BNLK) * scale
        return dq_BNLK, dk_BNSK, jnp.einsum("BNSL,BNLK->BNSK", p_BNSL, g_BNLK)
    p_BNLS, _ = _unnormalized(q_BNLK, k_BNSK, causal)
    g_BNLK = g_BNLK / _over_keys(p_BNLS, out_BNLK)
    inner_BNL1 = row_sum(g_BNLK * out_BNLK)
    ds_BNLS = (p_BNLS * (jnp.einsum("BNLK,BNSK->BNLS", g_BNLK, v_BNSK) - inner_BNL1)).astype(dtype)
    dq_BNLK = jnp.einsum("BNLS,BNSK->BNLK", ds_BNLS, k_BNSK) * scale
    dk_BNKS = jnp.einsum("BNLK,BNLS->BNKS", q_BNLK * scale, ds_BNLS)
    dv_BNKS = jnp.einsum("BNLK,BNLS->BNKS", g_BNLK, p_BNLS.astype(dtype))
    return dq_BNLK, jnp.swapaxes(dk_BNKS, 2, 3), jnp.swapaxes(dv_BNKS, 2, 3)


def _less(x_BNSK: jax.Array, y_BNLK: jax.Array, of_BNL1: jax.Array) -> jax.Array:
    """x y^T less one number for each row of y, as one more column of the product: no pass over what comes out."""
    ones_BNS1 = jnp.ones_like(x_BNSK[..., :1])
    wide = jnp.concatenate([x_BNSK, ones_BNS1], -1), jnp.concatenate([y_BNLK, -of_BNL1], -1)
    return jnp.einsum("BNSK,BNLK->BNSL", *wide)


def _in_chunks(
    q_BNLK: jax.Array, k_BNSK: jax.Array, v_BNSK: jax.Array, causal: bool, chunks: int
) -> tuple[jax.Array, jax.Array | None]:
    """`_attend`'s, over so many equal chunks of the queries in turn."""
    if chunks == 1:
        return _attend(q_BNLK, k_BNSK, v_BNSK, causal)
    made = jax.lax.map(lambda q: _attend(q, k_BNSK, v_BNSK), _split(q_BNLK, chunks))
    return jax.tree.map(_joined, made)


def _without_gradient(q_BNLK: jax.Array, k_BNSK: jax.Array, v_BNSK: jax.Array, causal: bool, chunks: int) -> jax.Array:
    q_BLNK, k_BSNK, v_BSNK = (jnp.swapaxes(x, 1, 2) for x in (q_BNLK, k_BNSK, v_BNSK))  # as they were: XLA drops both
    if target.platform() == "tpu" and not causal and whole_attention.takes(q_BLNK, k_BSNK):
        out_BLD = whole_attention.attend(q_BLNK, k_BSNK, v_BSNK)
        return jnp.swapaxes(out_BLD.reshape(q_BLNK.shape), 1, 2)
    return _in_chunks(q_BNLK, k_BNSK, v_BNSK, causal, chunks)[0]


_attention = jax.custom_vjp(_without_gradient, nondiff_argnums=(3, 4))


def _forward(
    q_BNLK: jax.Array, k_BNSK: jax.Array, v_BNSK: jax.Array, causal: bool, chunks: int
) -> tuple[jax.Array, Any]:
    out_BNLK, log_sum_BNL1 = jax.tree.map(
        partial(checkpoint_name, name="attention"), _in_chunks(q_BNLK, k_BNSK, v_BNSK, causal, chunks)
    )
    return out_BNLK, (q_BNLK, k_BNSK, v_BNSK, out_BNLK, log_sum_BNL1)


def _backward(causal: bool, chunks: int, saved: Any, g_BNLK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys' and values' gradients add up over the chunks."""
    if chunks == 1:
        return _attend_backward(saved, g_BNLK, causal)
    q_BNLK, k_BNSK, v_BNSK, out_BNLK, log_sum_BNL1 = saved

    def body(sums: tuple[jax.Array, jax.Array], chunk: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        q, out, log_sum, g = chunk
        dq, dk, dv = _attend_backward((q, k_BNSK, v_BNSK, out, log_sum), g)
        return (sums[0] + dk, sums[1] + dv), dq

    zeros = (jnp.zeros_like(k_BNSK), jnp.zeros_like(v_BNSK))
    of_queries = jax.tree.map(partial(_split, chunks=chunks), (q_BNLK, out_BNLK, log_sum_BNL1, g_BNLK))
    (dk_BNSK, dv_BNSK), dq = jax.lax.scan(body, zeros, of_queries)
    return _joined(dq), dk_BNSK, dv_BNSK


_attention.defvjp(_forward, _backward)


def _split(x_BNLK: jax.Array, chunks: int) -> jax.Array:
    B, N, L, K = x_BNLK.shape
    return jnp.moveaxis(x_BNLK.reshape(B, N, chunks, L // chunks, K), 2, 0)


def _joined(x_chunks: jax.Array) -> jax.Array:
    chunks, B, N, rows, K = x_chunks.shape
    return jnp.moveaxis(x_chunks, 0, 2).reshape(B, N, chunks * rows, K)
