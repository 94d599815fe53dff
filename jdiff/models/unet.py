"""The UNet of Stable Diffusion 1.x and 2.x (arXiv:2112.10752; CompVis/stable-diffusion; diffusers' UNet2DConditionModel).

Shapes: B batch, H W height and width, C channels, L tokens (H * W), S text length, E text width, N heads, K head dim,
D width of a level or of the time embedding.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdiff.attention import attention
from jdiff.layers import (
    Conv,
    Dense,
    Downsample,
    GroupNorm,
    LayerNorm,
    ResnetBlock,
    SplitDense,
    Upsample,
    gelu_gated,
    timestep_embedding,
    torch_uniform,
    zeros,
)
from jdiff.models.macs import macs
from jdiff.rows import boundary

EPS = 1e-5
KEPT = {"attention": jax.checkpoint_policies.save_only_these_names("attention"), "full": None}
"""What recomputation keeps of a block beside its input."""


def _recomputed(block: Any, remat: str) -> Any:
    return block if remat == "none" else nn.remat(block, policy=KEPT[remat])


class CrossAttention(nn.Module):
    """Multi-head attention of x to `context`, to itself when there is none; q, k, v without bias."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array, context_BSE: jax.Array | None = None) -> jax.Array:
        B, L, D = x_BLD.shape
        context_BSE = x_BLD if context_BSE is None else context_BSE
        dense = lambda name, bias: Dense(D, bias, torch_uniform, self.dtype, name=name)  # noqa: E731
        q_BLD, k_BSD, v_BSD = (
            dense("to_q", False)(x_BLD),
            dense("to_k", False)(context_BSE),
            dense("to_v", False)(context_BSE),
        )
        q, k, v = (y.reshape(B, -1, self.heads, D // self.heads) for y in (q_BLD, k_BSD, v_BSD))
        return dense("to_out_0", True)(attention(q, k, v).reshape(B, L, D))


class GEGLU(nn.Module):
    """One half of a product, gated by the (exact) GELU of the other (arXiv:2002.05202)."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        proj = SplitDense(2 * self.hidden, 2, kernel_init=torch_uniform, dtype=self.dtype, name="proj")
        return gelu_gated(*proj(x_BLD))


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        D = x_BLD.shape[-1]
        h_BLF = GEGLU(4 * D, self.dtype, name="net_0")(x_BLD)
        return Dense(D, kernel_init=torch_uniform, dtype=self.dtype, name="net_2")(h_BLF)


class TransformerBlock(nn.Module):
    """Attention to itself, to the text, and a feed-forward layer, each after a LayerNorm and around a skip."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array, context_BSE: jax.Array) -> jax.Array:
        x_BLD += CrossAttention(self.heads, self.dtype, name="attn1")(LayerNorm(EPS, name="norm1")(x_BLD))
        x_BLD += CrossAttention(self.heads, self.dtype, name="attn2")(LayerNorm(EPS, name="norm2")(x_BLD), context_BSE)
        return x_BLD + FeedForward(self.dtype, name="ff")(LayerNorm(EPS, name="norm3")(x_BLD))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over a picture's pixels, around a skip.

    linear: the projections in and out are products of tokens (SD 2.x), not 1x1 convolutions (SD 1.x): the same numbers, other
    kernels.
    """

    heads: int
    depth: int
    groups: int
    linear: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, context_BSE: jax.Array) -> jax.Array:
        B, H, W, C = x_BHWC.shape
        h = GroupNorm(self.groups, 1e-6, name="norm")(x_BHWC)
        if self.linear:
            h_BLC = Dense(C, kernel_init=torch_uniform, dtype=self.dtype, name="proj_in")(h.reshape(B, H * W, C))
        else:
            conv = Conv(C, (1, 1), kernel_init=torch_uniform, dtype=self.dtype, name="proj_in")
            h_BLC = conv(h).reshape(B, H * W, C)
        for i in range(self.depth):
            h_BLC = TransformerBlock(self.heads, self.dtype, name=f"transformer_blocks_{i}")(h_BLC, context_BSE)
        if self.linear:
            h = Dense(C, kernel_init=zeros, dtype=self.dtype, name="proj_out")(h_BLC).reshape(B, H, W, C)
        else:
            h = Conv(C, (1, 1), kernel_init=zeros, dtype=self.dtype, name="proj_out")(h_BLC.reshape(B, H, W, C))
        return boundary(x_BHWC + h)


class Level(nn.Module):
    """The blocks of one resolution: `layers` times a residual block and, where heads > 0, a transformer.

    resample: "down", "up" or nothing. On the way down it returns what it made at each block, for the way up; on the way up
    it takes those back from `skips`, last first.
    """

    features: int
    layers: int
    heads: int
    depth: int
    groups: int
    linear: bool
    resample: str
    remat: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BHWC: jax.Array,
        temb_BD: jax.Array,
        context_BSE: jax.Array,
        skips: tuple[jax.Array, ...] = (),
        size: tuple[int, int] | None = None,
    ) -> tuple[jax.Array, list[jax.Array]]:
        resnet, transformer = _recomputed(ResnetBlock, self.remat), _recomputed(SpatialTransformer, self.remat)
        made = []
        for i in range(self.layers):
            if skips:
                x_BHWC = jnp.concatenate([x_BHWC, skips[-1 - i]], axis=-1)
            block = resnet(self.features, self.groups, EPS, zero_out=True, dtype=self.dtype, name=f"resnets_{i}")
            x_BHWC = block(x_BHWC, temb_BD)
            if self.heads:
                settings = (self.heads, self.depth, self.groups, self.linear, self.dtype)
                x_BHWC = transformer(*settings, name=f"attentions_{i}")(x_BHWC, context_BSE)
            made.append(x_BHWC)
        if self.resample == "down":
            x_BHWC = Downsample(dtype=self.dtype, name="downsamplers_0")(x_BHWC)
            made.append(x_BHWC)
        if self.resample == "up":
            x_BHWC = Upsample(self.dtype, name="upsamplers_0")(x_BHWC, size)
        return x_BHWC, made


class MidBlock(nn.Module):
    """Two residual blocks with a transformer between."""

    heads: int
    depth: int
    groups: int
    linear: bool
    remat: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, temb_BD: jax.Array, context_BSE: jax.Array) -> jax.Array:
        resnet, transformer = _recomputed(ResnetBlock, self.remat), _recomputed(SpatialTransformer, self.remat)
        settings = {"groups": self.groups, "eps": EPS, "zero_out": True, "dtype": self.dtype}
        C = x_BHWC.shape[-1]
        x_BHWC = resnet(C, **settings, name="resnets_0")(x_BHWC, temb_BD)
        middle = transformer(self.heads, self.depth, self.groups, self.linear, self.dtype, name="attentions_0")
        return resnet(C, **settings, name="resnets_1")(middle(x_BHWC, context_BSE), temb_BD)


class TimeEmbedding(nn.Module):
    """An MLP with SiLU over the timestep's sinusoids: (B, block_out_channels[0]) -> (B, width)."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, waves_BD: jax.Array) -> jax.Array:
        dense = lambda name: Dense(self.width, kernel_init=torch_uniform, dtype=self.dtype, name=name)  # noqa: E731
        return dense("linear_2")(nn.silu(dense("linear_1")(waves_BD)))


class UNet(nn.Module):
    """Predicts noise (or v): `apply({"params": p}, x_BHWC, t_B, context_BSE)` -> (B, H, W, out_channels). Any height and width.

    in_channels: 9 for SD's inpainting model (latent, mask, masked latent). block_out_channels: width of each level.
    attention: which levels attend, from the top. heads: of each level; channels / heads is the head dim.
    transformer_depth: blocks a transformer. linear_projection: see `SpatialTransformer`; SD 2.x has it.
    remat: what the backward pass recomputes: nothing, every block but its attention's output ("attention"), or all of it ("full").
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    layers_per_block: int = 2
    transformer_depth: int = 1
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    linear_projection: bool = False
    remat: Literal["none", "attention", "full"] = "none"
    dtype: Any = jnp.float32

    frozen = r"$^"  # no leaf

    def __post_init__(self):
        super().__post_init__()
        levels = len(self.block_out_channels)
        if len(self.attention) != levels or len(self.heads) != levels:
            raise ValueError(
                f"attention={self.attention} and heads={self.heads} need one entry for each of the {levels} levels "
                f"of block_out_channels={self.block_out_channels}"
            )
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if width % heads or width % self.norm_num_groups:
                raise ValueError(
                    f"a level's width {width} is not a multiple of its {heads} heads and {self.norm_num_groups} groups"
                )
        if self.remat not in ("none", *KEPT):
            raise ValueError(f"remat={self.remat!r} is unknown; use 'none', 'attention' or 'full'")

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, t_B: jax.Array, context_BSE: jax.Array) -> jax.Array:
        C, E = x_BHWC.shape[-1], context_BSE.shape[-1]
        if self.in_channels != C or self.cross_attention_dim != E:
            raise ValueError(
                f"the UNet takes {self.in_channels} channels and a text of width {self.cross_attention_dim}, found {C} and {E}"
            )
        widths, groups, last = self.block_out_channels, self.norm_num_groups, len(self.block_out_channels) - 1
        wide = jnp.promote_types(self.dtype, jnp.float32)
        waves_BD = timestep_embedding(t_B.astype(wide), widths[0])
        temb_BD = TimeEmbedding(4 * widths[0], self.dtype, name="time_embedding")(waves_BD)
        context_BSE = context_BSE.astype(self.dtype)
        shared = (self.transformer_depth, groups, self.linear_projection)

        x_BHWC = Conv(widths[0], (3, 3), kernel_init=torch_uniform, dtype=self.dtype, name="conv_in")(x_BHWC)
        skips, heads = [x_BHWC], [n if attends else 0 for n, attends in zip(self.heads, self.attention, strict=True)]
        for i, width in enumerate(widths):
            resample = "down" if i < last else ""
            settings = (width, self.layers_per_block, heads[i], *shared, resample, self.remat, self.dtype)
            x_BHWC, made = Level(*settings, name=f"down_blocks_{i}")(x_BHWC, temb_BD, context_BSE)
            skips += made
        x_BHWC = MidBlock(self.heads[-1], *shared, self.remat, self.dtype, name="mid_block")(
            x_BHWC, temb_BD, context_BSE
        )
        for i, width in enumerate(widths[::-1]):
            resample = "up" if i < last else ""
            settings = (width, self.layers_per_block + 1, heads[last - i], *shared, resample, self.remat, self.dtype)
            skips, here = skips[: -self.layers_per_block - 1], tuple(skips[-self.layers_per_block - 1 :])
            # an odd side was rounded up on the way down: the next level's skips say what it was
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            level = Level(*settings, name=f"up_blocks_{i}")
            x_BHWC, _ = level(x_BHWC, temb_BD, context_BSE, here, size)
        x_BHWC = nn.silu(GroupNorm(groups, EPS, name="conv_norm_out")(x_BHWC))
        return Conv(self.out_channels, (3, 3), kernel_init=zeros, dtype=self.dtype, name="conv_out")(x_BHWC)

    def concatenated(self) -> dict[str, tuple[int, int]]:
        """Kernels whose input is a picture beside a skip: how many channels each brings, by the kernel's path."""
        widths, last = self.block_out_channels, len(self.block_out_channels) - 1
        skips = [widths[0]]
        for i, width in enumerate(widths):
            skips += [width] * (self.layers_per_block + (i < last))
        found, hidden = {}, widths[-1]
        for i, width in enumerate(widths[::-1]):
            for j in range(self.layers_per_block + 1):
                parts, hidden = (hidden, skips.pop()), width
                for name in ("conv1", "conv_shortcut"):
                    found[f"up_blocks_{i}/resnets_{j}/{name}/kernel"] = parts
        return found

    def dummy_inputs(self, batch: int = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Zeros of shapes that `init` takes, the smallest that will do."""
        side = 2 ** (len(self.block_out_channels) - 1)
        x_BHWC = jnp.zeros((batch, side, side, self.in_channels))
        return x_BHWC, jnp.zeros((batch,)), jnp.zeros((batch, 1, self.cross_attention_dim))

    def macs(self, height: int = 64, width: int = 64, text_length: int = 77) -> int:
        """Multiply-accumulates of one sample of that size."""
        shapes = ((1, height, width, self.in_channels), (1,), (1, text_length, self.cross_attention_dim))
        return macs(self, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


CONFIGS: dict[str, dict[str, Any]] = {
    "sd15/unet": {},
    "sd15-inpainting/unet": {"in_channels": 9},
    "sd21/unet": {"heads": (5, 10, 20, 20), "cross_attention_dim": 1024, "linear_projection": True},
}
