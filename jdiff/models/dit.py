"""DiT: a diffusion transformer with adaLN-Zero conditioning (arXiv:2212.09748; facebookresearch/DiT).

Shapes: B batch, H W height and width, C channels, P patch, L tokens, D width, N heads, K head dim, F mlp hidden, Z depth.
The blocks' parameters are stacked along a leading axis Z, whether the blocks run as a loop or unrolled, so a checkpoint
never depends on how it is run.
"""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jdiff import tree
from jdiff.attention import Attended, JoinedAttended
from jdiff.layers import (
    Activated,
    Conv,
    Dense,
    Embed,
    JoinedDense,
    Modulated,
    sincos_positions_2d,
    timestep_embedding,
    xavier_uniform,
    zeros,
)
from jdiff.models.macs import macs
from jdiff.prologue import Input
from jdiff.rows import boundary

Remat = Literal["none", "dots", "full"]
EPS = 1e-6
SAVED = {"dots": jax.checkpoint_policies.save_only_these_names("attention", "product"), "full": None}
product = partial(checkpoint_name, name="product")
"""Marks what `remat="dots"` keeps: products as the next layer reads them, their biases added."""


def _linear_patch_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Xavier-uniform of the patch convolution seen as a Linear, fan_in P*P*C, fan_out D, as the official code has it."""
    return xavier_uniform()(key, (int(np.prod(shape[:-1])), shape[-1]), dtype).reshape(shape)


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv product; qk_norm adds an RMS norm of q and k a head."""

    num_heads: int
    qk_norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Input) -> jax.Array:
        B, L, D = x_BLD.shape
        # kept as attention takes them: of other shapes XLA:CPU would keep, and copy, others
        keep = lambda y_BLD: product(y_BLD.reshape(B, L, self.num_heads, D // self.num_heads)).reshape(B, L, D)  # noqa: E731
        qkv_BLE = JoinedDense(3 * D, 3, dtype=self.dtype, keep=keep, name="qkv")(x_BLD)
        attended = JoinedAttended(qkv_BLE, self.num_heads)
        if self.qk_norm:
            apart = attended.apart()
            q_BLNK = nn.RMSNorm(epsilon=EPS, dtype=self.dtype, name="q_norm")(apart.q_BLNK)
            k_BLNK = nn.RMSNorm(epsilon=EPS, dtype=self.dtype, name="k_norm")(apart.k_BSNK)
            attended = Attended(q_BLNK, k_BLNK, apart.v_BSNK)
        return product(Dense(D, dtype=self.dtype, name="proj")(attended))


class Mlp(nn.Module):
    """Two layers with tanh-approximated GELU."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Input) -> jax.Array:
        h_BLF = product(Dense(self.hidden, dtype=self.dtype, name="fc1")(x_BLD))
        return product(Dense(x_BLD.shape[-1], dtype=self.dtype, follows=True, name="fc2")(Activated(h_BLF)))


class Block(nn.Module):
    """Attention and MLP, each modulated and gated; written as a scan's body: (x, modulation) -> (x, None)."""

    num_heads: int
    hidden: int
    qk_norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array, modulation_B6D: jax.Array) -> tuple[jax.Array, None]:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.split(modulation_B6D, 6, axis=-1)
        attn = Attention(self.num_heads, self.qk_norm, self.dtype, name="attn")
        x_BLD += gate_msa[:, None] * attn(Modulated(x_BLD, shift_msa, scale_msa, EPS))
        mlp = Mlp(self.hidden, self.dtype, name="mlp")
        x_BLD += gate_mlp[:, None] * mlp(Modulated(x_BLD, shift_mlp, scale_mlp, EPS))
        return boundary(x_BLD), None


class Modulation(Dense):
    """adaLN's product, as the body of a scan that hands its input on: one product a block, because a single product for
    all of them makes XLA transpose every kernel first."""

    @nn.compact
    def __call__(self, c_BD: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return c_BD, super().__call__(c_BD)


class TimestepEmbedder(nn.Module):
    """Sinusoids of 256 dims, then an MLP with SiLU: (B,) -> (B, D)."""

    width: int
    freq_shift: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t_B: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        waves = timestep_embedding(t_B, 256, freq_shift=self.freq_shift)
        h = Dense(self.width, kernel_init=init, dtype=self.dtype, name="mlp_0")(waves)
        return Dense(self.width, kernel_init=init, dtype=self.dtype, name="mlp_2")(nn.silu(h))


class DiT(nn.Module):
    """The whole model: `apply({"params": p}, x_BHWC, t_B, y_B)` -> (B, H, W, 2C) with learn_sigma, else (B, H, W, C).

    image_size: height and width of the input (of the latent, for a latent model), a multiple of patch_size.
    num_classes: label ids are 0..num_classes-1; with label_dropout > 0 there is one more, `null_label`, the unconditional one.
    learn_sigma: twice the channels out, the second half parametrises the variance.
    freq_shift: the timestep's frequencies are 10000^(-i / (128 - freq_shift)): 0 in the official code, with which the published
    weights were trained; 1 in diffusers' DiTTransformer2DModel, whose outputs differ by that.
    scan_layers: run the blocks as one compiled loop (compile time flat in depth), or unrolled.
    remat: what the backward pass recomputes: nothing, all but the matrix products ("dots"), or whole blocks ("full").
    dtype: of the computation; parameters are fp32. `pos_embed` is a parameter because checkpoints hold it, but it is never
    trained: see `frozen`.
    """

    image_size: int = 32
    channels: int = 4
    num_classes: int = 1000
    patch_size: int = 2
    width: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    learn_sigma: bool = True
    label_dropout: float = 0.1
    qk_norm: bool = False
    freq_shift: int = 0
    scan_layers: bool = True
    remat: Remat = "dots"
    dtype: Any = jnp.float32

    frozen = r"pos_embed"

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        if self.width % 4:
            raise ValueError(f"width={self.width} is not a multiple of 4, which the 2-D positions need")
        if self.remat not in ("none", "dots", "full"):
            raise ValueError(f"remat={self.remat!r} is unknown; use 'none', 'dots' or 'full'")

    @property
    def null_label(self) -> int | None:
        """The id that stands for "no label", or None when label_dropout is 0 and the model has none."""
        return self.num_classes if self.label_dropout > 0 else None

    def dummy_inputs(self, batch: int = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Zeros of the shapes that `init` and `apply` take."""
        x_BHWC = jnp.zeros((batch, self.image_size, self.image_size, self.channels))
        return x_BHWC, jnp.zeros((batch,)), jnp.zeros((batch,), jnp.int32)

    def macs(self) -> int:
        """Multiply-accumulates of one sample's forward pass: products and convolutions; the paper's "Gflops"."""
        return macs(self, *jax.eval_shape(self.dummy_inputs))

    dividable = ("blocks/attn/qkv/kernel", "blocks/attn/proj/kernel", "blocks/mlp/fc1/kernel")

    def divide_inputs(self, params: Any, path: str, s_ZD: jax.Array) -> Any:
        """Parameters of the same function, in which one of the `dividable` kernels has its inputs divided by s and its rows
        multiplied by it: adaLN's shifts and gains (1 + scale), or the values that attention averages, take the division."""
        i, source = {
            "blocks/attn/qkv/kernel": (0, "adaLN_modulation"),
            "blocks/mlp/fc1/kernel": (3, "adaLN_modulation"),
            "blocks/attn/proj/kernel": (2, "blocks/attn/qkv"),
        }[path]
        flat, gains = tree.flatten(params), source == "adaLN_modulation"
        first, last = i * self.width, (i + 1 + gains) * self.width
        divisor = jnp.concatenate([s_ZD, s_ZD], -1) if gains else s_ZD
        kernel, bias = flat[f"{source}/kernel"], flat[f"{source}/bias"]
        part = bias[:, first:last] / divisor
        if gains:
            part = part.at[:, self.width :].add(1 / s_ZD - 1)
        flat[f"{source}/kernel"] = kernel.at[..., first:last].divide(divisor[:, None])
        flat[f"{source}/bias"] = bias.at[:, first:last].set(part)
        flat[path] = flat[path] * s_ZD[..., None]
        return tree.nested(flat)

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, t_B: jax.Array, y_B: jax.Array) -> jax.Array:
        B, H, W, C = x_BHWC.shape
        if (self.image_size, self.image_size, self.channels) != (H, W, C):
            expected = (self.image_size, self.image_size, self.channels)
            raise ValueError(f"the model takes pictures of {expected}, found {(H, W, C)}")
        P, D, grid = self.patch_size, self.width, self.image_size // self.patch_size
        dtype = jnp.promote_types(self.dtype, x_BHWC.dtype) if x_BHWC.dtype == jnp.float64 else self.dtype

        embed = Conv(D, (P, P), (P, P), "VALID", kernel_init=_linear_patch_init, dtype=dtype, name="x_embedder")
        positions = lambda _, shape, param_dtype: jnp.asarray(sincos_positions_2d(D, grid, grid)[None], param_dtype)  # noqa: E731
        pos_embed = self.param("pos_embed", positions, (1, grid * grid, D), jnp.float32)
        x_BLD = embed(x_BHWC).reshape(B, grid * grid, D) + pos_embed.astype(dtype)

        rows = self.num_classes + (self.label_dropout > 0)
        c_BD = TimestepEmbedder(D, self.freq_shift, dtype, name="t_embedder")(t_B)
        c_BD = nn.silu(c_BD + Embed(rows, D, dtype=dtype, name="y_embedder")(y_B))

        stacked: dict[str, Any] = {
            "variable_axes": {"params": 0},
            "split_rngs": {"params": True},
            "length": self.depth,
        }
        modulations = nn.scan(Modulation, **stacked)(6 * D, kernel_init=zeros, dtype=dtype, name="adaLN_modulation")
        _, modulation_ZB6D = modulations(c_BD, None)
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=not self.scan_layers, policy=SAVED[self.remat])
        blocks = nn.scan(block, unroll=1 if self.scan_layers else self.depth, **stacked)
        hidden = int(D * self.mlp_ratio)
        x_BLD, _ = blocks(self.heads, hidden, self.qk_norm, dtype, name="blocks")(x_BLD, modulation_ZB6D)

        final = Dense(2 * D, kernel_init=zeros, dtype=dtype, name="final_adaLN_modulation")(c_BD)
        shift_BD, scale_BD = jnp.split(final, 2, axis=-1)
        out = C * (1 + self.learn_sigma)
        linear = Dense(P * P * out, kernel_init=zeros, dtype=dtype, name="final_linear")
        y_BLD = linear(Modulated(x_BLD, shift_BD, scale_BD, EPS))
        y = y_BLD.reshape(B, grid, grid, P, P, out).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(B, H, W, out)


SIZES = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}
CONFIGS = {
    f"DiT-{size}/{patch}": {**shape, "patch_size": patch} for size, shape in SIZES.items() for patch in (2, 4, 8)
}
