"""Building blocks shared by the models (Flax Linen).

Shapes: B batch, L tokens, D width, N heads, K head dim, F hidden. Parameters are fp32; a layer computes in its `dtype`
(its input's dtype when None). Kernels may be `QTensor` or `LoRAWeight`: see `weights.py`.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jdiff import weights

Initializer = Callable[..., Any]
Dtype = Any
xavier_uniform = nn.initializers.xavier_uniform
zeros = nn.initializers.zeros


class Dense(nn.Module):
    """Affine map of the last axis: (..., in) -> (..., features)."""

    features: int
    use_bias: bool = True
    kernel_init: Initializer = xavier_uniform()
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype or x.dtype)
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        y = weights.dot(x, kernel)
        if self.use_bias:
            y += self.param("bias", zeros, (self.features,), jnp.float32).astype(y.dtype)
        return y


class Conv(nn.Module):
    """2-D convolution: (B, H, W, in) -> (B, H', W', features), kernel HWIO."""

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: Any = "SAME"
    use_bias: bool = True
    kernel_init: Initializer = xavier_uniform()
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x_BHWC = x_BHWC.astype(self.dtype or x_BHWC.dtype)
        shape = (*self.kernel_size, x_BHWC.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        y = weights.conv(x_BHWC, kernel, self.strides, self.padding)
        if self.use_bias:
            y += self.param("bias", zeros, (self.features,), jnp.float32).astype(y.dtype)
        return y


class Embed(nn.Module):
    """Table look-up: ids -> ids.shape + (features,). An id out of range is the caller's error: it is not checked."""

    num_embeddings: int
    features: int
    embedding_init: Initializer = nn.initializers.normal(0.02)
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        table = self.param("embedding", self.embedding_init, (self.num_embeddings, self.features), jnp.float32)
        return weights.take(table, ids, self.dtype)


def layer_norm(x_BLD: jax.Array, eps: float) -> jax.Array:
    """Normalises the last axis, without gain or bias; statistics in at least fp32; x's dtype out."""
    x = x_BLD.astype(jnp.promote_types(x_BLD.dtype, jnp.float32))
    x = x - x.mean(-1, keepdims=True)
    return (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)).astype(x_BLD.dtype)


@jax.custom_vjp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU, tanh-approximated (arXiv:1606.08415). Its gradient is written out so that it is one pass over x."""
    return 0.5 * x * (1 + jnp.tanh(GELU_SLOPE * (x + 0.044715 * x**3)))


def _gelu_tanh_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    tanh = jnp.tanh(GELU_SLOPE * (x + 0.044715 * x**3))
    slope = GELU_SLOPE * (1 + 3 * 0.044715 * x**2)
    return (g * 0.5 * (1 + tanh + x * (1 - tanh**2) * slope),)


gelu_tanh.defvjp(lambda x: (gelu_tanh(x), x), _gelu_tanh_backward)
GELU_SLOPE = math.sqrt(2 / math.pi)


def attention(q_BLNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, the one door to attention: (B, L, N, K) out.

    On GPU it is JAX's fused attention (cuDNN where it takes the shape and dtype); elsewhere two products with an fp32
    softmax between.
    """
    if jax.default_backend() == "gpu" and q_BLNK.dtype in (jnp.bfloat16, jnp.float16):
        return jax.nn.dot_product_attention(q_BLNK, k_BSNK, v_BSNK)
    q_BNLK, k_BNSK, v_BNSK = (jnp.swapaxes(x, 1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
    return jnp.swapaxes(_attention(q_BNLK, k_BNSK, v_BNSK), 1, 2)


def _unnormalized(q_BNLK: jax.Array, k_BNSK: jax.Array) -> jax.Array:
    """exp(scores - max), at least fp32."""
    scores_BNLS = jnp.einsum("BNLK,BNSK->BNLS", q_BNLK * (q_BNLK.shape[-1] ** -0.5), k_BNSK)
    scores_BNLS = scores_BNLS.astype(jnp.promote_types(scores_BNLS.dtype, jnp.float32))
    return jnp.exp(scores_BNLS - scores_BNLS.max(-1, keepdims=True))


@jax.custom_vjp
def _attention(q_BNLK: jax.Array, k_BNSK: jax.Array, v_BNSK: jax.Array) -> jax.Array:
    """The normalisation comes after the second product, where it touches the fewest numbers."""
    p_BNLS = _unnormalized(q_BNLK, k_BNSK)
    out_BNLK = jnp.einsum("BNLS,BNSK->BNLK", p_BNLS.astype(q_BNLK.dtype), v_BNSK)
    return out_BNLK / p_BNLS.sum(-1, keepdims=True).astype(q_BNLK.dtype)


def _attention_forward(q_BNLK: jax.Array, k_BNSK: jax.Array, v_BNSK: jax.Array) -> tuple[jax.Array, Any]:
    out_BNLK = checkpoint_name(_attention(q_BNLK, k_BNSK, v_BNSK), "attention")
    return out_BNLK, (q_BNLK, k_BNSK, v_BNSK, out_BNLK)


def _attention_backward(saved: Any, g_BNLK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """FlashAttention's gradient (arXiv:2205.14135): probabilities are made again from the scores, and the softmax's inner
    product is that of `out` and its cotangent.

    Saving the log-sum-exp would spare little and cost XLA:CPU its one-pass attention: at DiT-S/2, b8, on 2 cores,
    forward and gradient take 23 ms a layer so, 33 ms with it, 35 ms by autodiff.
    """
    q_BNLK, k_BNSK, v_BNSK, out_BNLK = saved
    dtype, scale = q_BNLK.dtype, q_BNLK.shape[-1] ** -0.5
    p_BNLS = _unnormalized(q_BNLK, k_BNSK)
    g_BNLK = g_BNLK / p_BNLS.sum(-1, keepdims=True).astype(dtype)
    inner_BNL1 = jnp.sum((g_BNLK * out_BNLK).astype(p_BNLS.dtype), -1, keepdims=True)
    ds_BNLS = (p_BNLS * (jnp.einsum("BNLK,BNSK->BNLS", g_BNLK, v_BNSK) - inner_BNL1)).astype(dtype)
    dq_BNLK = jnp.einsum("BNLS,BNSK->BNLK", ds_BNLS, k_BNSK) * scale
    dk_BNSK = jnp.einsum("BNLS,BNLK->BNSK", ds_BNLS, q_BNLK) * scale
    return dq_BNLK, dk_BNSK, jnp.einsum("BNLS,BNLK->BNSK", p_BNLS.astype(dtype), g_BNLK)


_attention.defvjp(_attention_forward, _attention_backward)


def timestep_embedding(t_B: jax.Array, width: int, max_period: float = 10_000.0, freq_shift: int = 0) -> jax.Array:
    """Sinusoids of t, [cos, sin], frequencies max_period^(-i / (half - freq_shift)): (B, width), in at least fp32.

    width must be even. freq_shift is diffusers' `downscale_freq_shift`.
    """
    dtype = jnp.promote_types(t_B.dtype, jnp.float32)
    half = width // 2
    freqs = np.exp(-math.log(max_period) * np.arange(half, dtype=np.float64) / (half - freq_shift))
    args = t_B.astype(dtype)[:, None] * freqs.astype(dtype)
    return jnp.concatenate([jnp.cos(args), jnp.sin(args)], axis=-1)


def sincos_positions_2d(width: int, height: int, grid_width: int) -> np.ndarray:
    """Fixed 2-D positions, float64 (height * grid_width, width): the column coordinate fills the first half, each half [sin, cos].

    MAE's `get_2d_sincos_pos_embed`, as DiT uses it.
    """
    freqs = 10_000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))
    row, column = np.meshgrid(np.arange(height), np.arange(grid_width), indexing="ij")
    args = [np.outer(axis.reshape(-1), freqs) for axis in (column, row)]
    return np.concatenate([f(arg) for arg in args for f in (np.sin, np.cos)], axis=-1)
