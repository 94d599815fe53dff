"""Attention of many keys: JAX's splash kernel (FlashAttention's idea, arXiv:2205.14135). No score leaves the chip's vector memory.

Shapes: B batch, L queries, S keys, N heads, K head dim.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.pallas.blocks import largest_divisor
from jdiff.rows import heads_apart, on_each_device
from jdiff.sums import LANES

LEAST_KEYS = 1024
"""From as many on a TPU's attention is splash: at 256 XLA:TPU's own is estimated at less, with the gradient
(docs/performance.md)."""
MOST_BLOCK = 512
MOST_KEYS = 4096
"""Of bfloat16 heads up to 64 wide, and fewer of larger ones: as many as lie in a TPU's vector memory with their gradients. Queries
have a gradient by each so many keys, which are added up."""


def takes(q_BLNK: jax.Array, k_BSNK: jax.Array) -> bool:
    """Whether `attend` is the better for such, and has been compiled for them."""
    L, S, K = q_BLNK.shape[1], k_BSNK.shape[1], q_BLNK.shape[-1]
    return S >= LEAST_KEYS and L % LANES == S % LANES == 0 and K <= 2 * LANES


def attend(q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v: (B, L, N, K). Each device of a mesh takes its rows and its heads."""
    lie = ("rows", None, heads_apart(q_BLNK.shape[2]))
    return on_each_device(_on_one, q_BLNK, k_BSNK, v_BSNK, lie=[lie] * 3, out=[lie])[0]


def _on_one(q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array) -> Sequence[jax.Array]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    (L, N, K), S = q_BLNK.shape[1:], k_BSNK.shape[1]
    q, k = (largest_divisor(length, MOST_BLOCK, LANES) for length in (L, S))
    size = math.ceil(q_BLNK.dtype.itemsize / 2)
    tokens_last = splash_attention_kernel.QKVLayout.SEQ_MINOR  # a head's 40 numbers are padded to 128 where they are
    blocks = splash_attention_kernel.BlockSizes(
        block_q=q,
        block_kv=k,
        block_q_dkv=q,
        block_kv_dkv=largest_divisor(S, max(k, MOST_KEYS // (math.ceil(K / 64) * size)), k),
        block_kv_dkv_compute=k,
        use_fused_bwd_kernel=True,  # which makes the scores once, not twice
        k_layout=tokens_last,
        v_layout=tokens_last,
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((L, S))] * N)
    kernel: Any = splash_attention_kernel.make_splash_mha_single_device(
        mask, block_sizes=blocks, residual_checkpoint_name="attention"
    )
    q_BNLK, k_BNSK, v_BNSK = (jnp.swapaxes(x, 1, 2) for x in (q_BLNK * K**-0.5, k_BSNK, v_BSNK))
    return [jnp.swapaxes(jax.vmap(kernel)(q_BNLK, k_BNSK, v_BNSK), 1, 2)]
