"""Building blocks shared by the models (Flax Linen).

Shapes: B batch, L tokens, D width, N heads, K head dim, F hidden. Parameters are fp32; a layer computes in its `dtype`
(its input's dtype when None). Kernels may be `QTensor` or `LoRAWeight`: see `weights.py`.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jdiff import target, weights
from jdiff.pallas import activated, integers, modulated
from jdiff.primal import quicker
from jdiff.prologue import Input, Prologue
from jdiff.rows import boundary, rows_apart, tensor_size
from jdiff.sums import row_sum

Initializer = Callable[..., Any]
Dtype = Any
xavier_uniform = nn.initializers.xavier_uniform
zeros = nn.initializers.zeros
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what PyTorch's Linear and Conv2d start from, and so the UNet and the autoencoder."""


class Dense(nn.Module):
    """Affine map of the last axis: (..., in) -> (..., features).

    follows: see `weights.dot`.
    """

    features: int
    use_bias: bool = True
    kernel_init: Initializer = xavier_uniform()
    dtype: Dtype | None = None
    follows: bool = False

    @nn.compact
    def __call__(self, x: Input) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        y = rows_apart(weights.dot(_taken(x, kernel, self.dtype), kernel, self.follows))
        if self.use_bias:
            y += self.param("bias", zeros, (self.features,), jnp.float32).astype(y.dtype)
        return y


def _taken(x: Input, kernel: Any, dtype: Dtype | None) -> Input:
    """x as a product takes it: in the layer's dtype, its rows apart; or a prologue of that dtype, where the kernel takes one."""
    if isinstance(x, Prologue):
        x = x.floats() if dtype is not None and x.dtype != dtype else weights.taken(x, kernel)
    return x if isinstance(x, Prologue) else rows_apart(x.astype(dtype or x.dtype))


class _PartedDense(nn.Module):
    """`Dense` in equal parts: (..., in) -> `parts` of (..., features / parts).

    Biases are added to the parts: XLA:TPU then adds up their gradients within the products that make those of the parts.
    """

    features: int
    parts: int
    kernel_init: Initializer = xavier_uniform()
    dtype: Dtype | None = None

    def _operands(self, x: Input) -> tuple[Input, Any, jax.Array]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        x = _taken(x, kernel, self.dtype)
        return x, kernel, self.param("bias", zeros, (self.features,), jnp.float32).astype(x.dtype)

    def _apart(self, x: Input, kernel: Any, bias: jax.Array) -> list[jax.Array]:
        parts = weights.split_dot(x, kernel, self.parts)
        return [rows_apart(y) + b for y, b in zip(parts, jnp.split(bias, self.parts), strict=True)]


class SplitDense(_PartedDense):
    """`Dense`, whose outputs come as a list of equal parts."""

    @nn.compact
    def __call__(self, x: Input) -> list[jax.Array]:
        return self._apart(*self._operands(x))


class JoinedDense(_PartedDense):
    """`Dense` of equal parts, which lie side by side in one array (..., features), for what reads them there.

    On a TPU one product makes them where no gradient is taken, and no devices share out its columns, parts of which would be moved.
    Elsewhere they are joined to be taken apart: XLA does neither.
    keep: what is done to each part before it is joined (`checkpoint_name`).
    """

    keep: Callable[[jax.Array], jax.Array] = lambda y: y

    @nn.compact
    def __call__(self, x: Input) -> jax.Array:
        operands = self._operands(x)
        joined = lambda *operands: jnp.concatenate([self.keep(y) for y in self._apart(*operands)], -1)  # noqa: E731
        whole = lambda x, kernel, bias: rows_apart(weights.dot(x, kernel)) + bias  # noqa: E731
        one = target.platform() == "tpu" and tensor_size() == 1
        return (quicker(whole, joined) if one else joined)(*operands)


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
        y = rows_apart(weights.conv(rows_apart(x_BHWC), kernel, self.strides, self.padding))
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
    """Normalises the last axis, without gain or bias; statistics in at least fp32; x's dtype out.

    On a TPU they are sums in fp32 of what is rounded to bfloat16, where x is (`sums.row_sum`).
    """
    if target.platform() == "tpu" and x_BLD.dtype == jnp.bfloat16:
        y_BLD: jax.Array = _layer_norm_of_sums(x_BLD, eps)
        return y_BLD
    x = x_BLD.astype(jnp.promote_types(x_BLD.dtype, jnp.float32))
    x = x - x.mean(-1, keepdims=True)
    return (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)).astype(x_BLD.dtype)


def _layer_norm_forward(x_BLD: jax.Array, eps: float) -> tuple[jax.Array, Any]:
    mean_BL1 = row_sum(x_BLD) / x_BLD.shape[-1]
    centred_BLD = x_BLD.astype(jnp.float32) - mean_BL1
    squares_BLD = (centred_BLD * centred_BLD).astype(x_BLD.dtype)
    inverse_BL1 = jax.lax.rsqrt(row_sum(squares_BLD) / x_BLD.shape[-1] + eps)
    return (centred_BLD * inverse_BL1).astype(x_BLD.dtype), (x_BLD, mean_BL1, inverse_BL1)


def _layer_norm_backward(eps: float, saved: Any, g_BLD: jax.Array) -> tuple[jax.Array]:
    """With n the normalised x: dx = (g - mean(g) - n mean(g n)) / sigma. XLA:TPU makes these sums where it makes g."""
    x_BLD, mean_BL1, inverse_BL1 = saved
    g = g_BLD.astype(jnp.float32)
    n = (x_BLD.astype(jnp.float32) - mean_BL1) * inverse_BL1
    dx = (g - g.mean(-1, keepdims=True) - n * jnp.mean(g * n, -1, keepdims=True)) * inverse_BL1
    return (dx.astype(x_BLD.dtype),)


_layer_norm_of_sums = jax.custom_vjp(lambda x_BLD, eps: _layer_norm_forward(x_BLD, eps)[0], nondiff_argnums=(1,))
_layer_norm_of_sums.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU, tanh-approximated (arXiv:1606.08415). Its gradient is written out so that it is one pass over x."""
    half = 0.5 * x
    return half + half * jnp.tanh(x * (GELU_SLOPE + GELU_CUBIC * (x * x)))


def _gelu_tanh_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    square = x * x
    tanh = jnp.tanh(x * (GELU_SLOPE + GELU_CUBIC * square))
    slope = GELU_SLOPE + 3 * GELU_CUBIC * square
    return (g * (0.5 + 0.5 * (tanh + x * (1 - tanh * tanh) * slope)),)


gelu_tanh.defvjp(lambda x: (gelu_tanh(x), x), _gelu_tanh_backward)
GELU_SLOPE = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715 * GELU_SLOPE


@jax.custom_vjp
def gelu_gated(h: jax.Array, gate: jax.Array) -> jax.Array:
    """`h * GELU(gate)`, the exact one. Its gradients are written out so that they are one pass over both."""
    return h * (gate * _normal_share(gate))


def _normal_share(x: jax.Array) -> jax.Array:
    """The standard normal distribution's share below x."""
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_gated_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    h, gate = saved
    share, density = _normal_share(gate), jnp.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
    return g * (gate * share), g * h * (share + gate * density)


gelu_gated.defvjp(lambda h, gate: (gelu_gated(h, gate), (h, gate)), _gelu_gated_backward)


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


@partial(jax.tree_util.register_dataclass, data_fields=["x_BLD", "shift_BD", "scale_BD"], meta_fields=["eps"])
@dataclasses.dataclass(eq=False)
class Modulated(Prologue):
    """adaLN's input of a product (arXiv:2212.09748): `layer_norm(x) * (1 + scale) + shift`, scale and shift one a sample."""

    x_BLD: jax.Array
    shift_BD: jax.Array
    scale_BD: jax.Array
    eps: float

    def floats(self) -> jax.Array:
        return layer_norm(self.x_BLD, self.eps) * (1 + self.scale_BD[:, None]) + self.shift_BD[:, None]

    def rounds(self, fixed: bool) -> bool:
        return target.platform() == "tpu" and integers.takes(self.x_BLD)

    def integers(self, step: jax.Array | None) -> list[jax.Array]:
        return modulated.rounded(self.x_BLD, self.shift_BD, self.scale_BD, self.eps, step)


@partial(jax.tree_util.register_dataclass, data_fields=["x_BLF"], meta_fields=[])
@dataclasses.dataclass(eq=False)
class Activated(Prologue):
    """GELU, tanh-approximated, as the input of a product."""

    x_BLF: jax.Array

    def floats(self) -> jax.Array:
        return gelu_tanh(self.x_BLF)

    def rounds(self, fixed: bool) -> bool:
        """By a fixed step XLA:TPU rounds behind the product that makes x, at no cost."""
        return target.platform() == "tpu" and not fixed and integers.takes(self.x_BLF)

    def integers(self, step: jax.Array | None) -> list[jax.Array]:
        assert step is None
        return activated.rounded(gelu_tanh, self.x_BLF)


class LayerNorm(nn.Module):
    """`layer_norm` with gain and bias."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x_BLD.shape[-1],), jnp.float32)
        bias = self.param("bias", zeros, (x_BLD.shape[-1],), jnp.float32)
        return layer_norm(x_BLD, self.eps) * scale.astype(x_BLD.dtype) + bias.astype(x_BLD.dtype)


class GroupNorm(nn.Module):
    """Normalises each of `groups` groups of channels over the whole picture; statistics in at least fp32."""

    groups: int = 32
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        C = x_BHWC.shape[-1]
        if C % self.groups:
            raise ValueError(
                f"{C} channels do not divide into {self.groups} groups: change the widths or norm_num_groups"
            )
        scale = self.param("scale", nn.initializers.ones, (C,), jnp.float32)
        bias = self.param("bias", zeros, (C,), jnp.float32)
        return group_norm(x_BHWC, scale, bias, self.groups, self.eps)


def group_norm(x_BHWC: jax.Array, scale_C: jax.Array, bias_C: jax.Array, groups: int, eps: float) -> jax.Array:
    """See `GroupNorm`. Gain and offset of a channel are formed first, so that the picture is read twice and written once.

    Its gradient is written out: it keeps x alone, and makes its sums over the pixels where they are quick.
    """
    B, *space, C = x_BHWC.shape
    y_BPC: jax.Array = _group_norm(x_BHWC.reshape(B, math.prod(space), C), scale_C, bias_C, groups, eps)
    return y_BPC.reshape(x_BHWC.shape)


def _group_norm_forward(
    x_BPC: jax.Array, scale_C: jax.Array, bias_C: jax.Array, groups: int, eps: float
) -> tuple[jax.Array, Any]:
    wide = jnp.promote_types(x_BPC.dtype, jnp.float32)
    mean_BC = _group_mean(jnp.mean(x_BPC, 1, dtype=wide), groups)
    centred_BPC = x_BPC.astype(wide) - mean_BC[:, None]
    inverse_BC = jax.lax.rsqrt(_group_mean(jnp.mean(centred_BPC * centred_BPC, 1), groups) + eps)
    y_BPC = centred_BPC * (inverse_BC * scale_C.astype(wide))[:, None] + bias_C.astype(wide)
    return y_BPC.astype(x_BPC.dtype), (x_BPC, scale_C, bias_C, mean_BC, inverse_BC)


def _group_norm_backward(groups: int, eps: float, saved: Any, g_BPC: jax.Array) -> tuple[jax.Array, ...]:
    """With n the normalised x and m a group's mean: dx = (g scale - m(g scale) - n m(g scale n)) / sigma."""
    x_BPC, scale_C, bias_C, mean_BC, inverse_BC = saved
    wide, pixels = mean_BC.dtype, x_BPC.shape[1]
    g_BPC = g_BPC.astype(wide)
    n_BPC = (x_BPC.astype(wide) - mean_BC[:, None]) * inverse_BC[:, None]
    g_BC, gn_BC = _pixel_sum(g_BPC), _pixel_sum(g_BPC * n_BPC)
    gain_C = scale_C.astype(wide)
    mean_g_BC, mean_gn_BC = (_group_mean(sums * gain_C, groups) / pixels for sums in (g_BC, gn_BC))
    dx_BPC = (g_BPC * gain_C - mean_g_BC[:, None] - n_BPC * mean_gn_BC[:, None]) * inverse_BC[:, None]
    return dx_BPC.astype(x_BPC.dtype), gn_BC.sum(0).astype(scale_C.dtype), g_BC.sum(0).astype(bias_C.dtype)


def _group_mean(y_BC: jax.Array, groups: int) -> jax.Array:
    """Each channel's value becomes the mean of its group's."""
    B, C = y_BC.shape
    mean_BG1 = y_BC.reshape(B, groups, -1).mean(-1, keepdims=True)
    return jnp.broadcast_to(mean_BG1, (B, groups, C // groups)).reshape(B, C)


def _pixel_sum(y_BPC: jax.Array) -> jax.Array:
    """(B, C). XLA:CPU adds up a product's many wide rows at 0.4 GB/s (20 ms for 1024 x 960), but not as a product with ones."""
    if target.platform() != "cpu":
        return y_BPC.sum(1)
    return jnp.einsum("BP,BPC->BC", jnp.ones(y_BPC.shape[:2], y_BPC.dtype), y_BPC)


def _group_norm_plain(x_BPC: jax.Array, scale_C: jax.Array, bias_C: jax.Array, groups: int, eps: float) -> jax.Array:
    return _group_norm_forward(x_BPC, scale_C, bias_C, groups, eps)[0]


_group_norm = jax.custom_vjp(_group_norm_plain, nondiff_argnums=(3, 4))
_group_norm.defvjp(_group_norm_forward, _group_norm_backward)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a skip: (B, H, W, C) -> (B, H, W, features).

    Given an embedding `temb_BD`, its projection is added between the two. diffusers' ResnetBlock2D, CompVis' ResBlock.
    zero_out: the second convolution starts at zero (guided-diffusion's and CompVis' UNet).
    """

    features: int
    groups: int = 32
    eps: float = 1e-5
    zero_out: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, temb_BD: jax.Array | None = None) -> jax.Array:
        conv = partial(Conv, self.features, dtype=self.dtype)
        h = nn.silu(GroupNorm(self.groups, self.eps, name="norm1")(x_BHWC))
        h = conv((3, 3), kernel_init=torch_uniform, name="conv1")(h)
        if temb_BD is not None:
            project = Dense(self.features, kernel_init=torch_uniform, dtype=self.dtype, name="time_emb_proj")
            h += project(nn.silu(temb_BD))[:, None, None]
        h = nn.silu(GroupNorm(self.groups, self.eps, name="norm2")(h))
        h = conv((3, 3), kernel_init=zeros if self.zero_out else torch_uniform, name="conv2")(h)
        if x_BHWC.shape[-1] != self.features:
            x_BHWC = conv((1, 1), kernel_init=torch_uniform, name="conv_shortcut")(x_BHWC)
        return boundary(x_BHWC + h)


class Downsample(nn.Module):
    """3x3 convolution of stride 2. padding: of height and width; ((0, 1), (0, 1)) in the autoencoder."""

    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        features = x_BHWC.shape[-1]
        conv = Conv(features, (3, 3), (2, 2), self.padding, kernel_init=torch_uniform, dtype=self.dtype, name="conv")
        return conv(x_BHWC)


class Upsample(nn.Module):
    """To (height, width) by nearest neighbours, then a 3x3 convolution. Twice the input's size when none is given."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        B, H, W, C = x_BHWC.shape
        height, width = size or (2 * H, 2 * W)
        if (height, width) == (2 * H, 2 * W):
            x_BHWC = jnp.broadcast_to(x_BHWC[:, :, None, :, None], (B, H, 2, W, 2, C)).reshape(B, height, width, C)
        else:
            x_BHWC = x_BHWC[:, np.arange(height) * H // height][:, :, np.arange(width) * W // width]
        return Conv(C, (3, 3), kernel_init=torch_uniform, dtype=self.dtype, name="conv")(x_BHWC)
