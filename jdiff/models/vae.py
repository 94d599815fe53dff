"""AutoencoderKL, the first stage of latent diffusion (arXiv:2112.10752; CompVis/latent-diffusion; diffusers' AutoencoderKL).

Shapes: B batch, H W height and width of the picture, h w of the latent, C channels, L tokens.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jdiff.attention import attention
from jdiff.layers import Conv, Dense, Downsample, GroupNorm, ResnetBlock, Upsample, torch_uniform
from jdiff.models.macs import macs

EPS = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Posterior:
    """A diagonal Gaussian over latents: mean and log variance (B, h, w, C), the latter within [-30, 20]."""

    mean: jax.Array
    logvar: jax.Array

    def mode(self) -> jax.Array:
        """The mean."""
        return self.mean

    def sample(self, key: jax.Array) -> jax.Array:
        """One draw. key: a typed key, or one for each row (B,)."""
        shape, dtype = self.mean.shape, self.mean.dtype
        if key.ndim:
            noise = jax.vmap(lambda k: jax.random.normal(k, shape[1:], dtype))(key)
        else:
            noise = jax.random.normal(key, shape, dtype)
        return self.draw(noise)

    def draw(self, noise: jax.Array) -> jax.Array:
        """The draw that standard normal noise of the mean's shape makes."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def astype(self, dtype: Any) -> "Posterior":
        """The same moments in another dtype."""
        return Posterior(self.mean.astype(dtype), self.logvar.astype(dtype))

    def kl(self) -> jax.Array:
        """KL divergence from a standard normal in nats, summed over each sample's latent: (B,)."""
        return 0.5 * jnp.sum(self.mean**2 + jnp.exp(self.logvar) - 1.0 - self.logvar, axis=(1, 2, 3))


class AttnBlock(nn.Module):
    """Self-attention of one head over all pixels, around a skip."""

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        B, H, W, C = x_BHWC.shape
        h_BLC = GroupNorm(self.groups, EPS, name="group_norm")(x_BHWC).reshape(B, H * W, C)
        dense = lambda name: Dense(C, kernel_init=torch_uniform, dtype=self.dtype, name=name)  # noqa: E731
        q, k, v = (dense(name)(h_BLC)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        return x_BHWC + dense("to_out_0")(attention(q, k, v)[:, :, 0]).reshape(B, H, W, C)


class MidBlock(nn.Module):
    """Two residual blocks with attention between."""

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        C = x_BHWC.shape[-1]
        x_BHWC = ResnetBlock(C, self.groups, EPS, dtype=self.dtype, name="resnets_0")(x_BHWC)
        x_BHWC = AttnBlock(self.groups, self.dtype, name="attentions_0")(x_BHWC)
        return ResnetBlock(C, self.groups, EPS, dtype=self.dtype, name="resnets_1")(x_BHWC)


class Level(nn.Module):
    """`layers` residual blocks of one width, then `resample` ("down", "up" or nothing)."""

    features: int
    layers: int
    groups: int
    resample: str = ""
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x_BHWC = ResnetBlock(self.features, self.groups, EPS, dtype=self.dtype, name=f"resnets_{i}")(x_BHWC)
        if self.resample == "down":
            x_BHWC = Downsample(((0, 1), (0, 1)), self.dtype, name="downsamplers_0")(x_BHWC)
        if self.resample == "up":
            x_BHWC = Upsample(self.dtype, name="upsamplers_0")(x_BHWC)
        return x_BHWC


class Encoder(nn.Module):
    """Pictures (B, H, W, C) -> moments (B, h, w, 2 * latent_channels), before `quant_conv`."""

    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers: int
    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        conv = lambda features, name: Conv(features, (3, 3), kernel_init=torch_uniform, dtype=self.dtype, name=name)  # noqa: E731
        x_BHWC = conv(self.block_out_channels[0], "conv_in")(x_BHWC)
        last = len(self.block_out_channels) - 1
        for i, width in enumerate(self.block_out_channels):
            resample = "down" if i < last else ""
            x_BHWC = Level(width, self.layers, self.groups, resample, self.dtype, name=f"down_blocks_{i}")(x_BHWC)
        x_BHWC = MidBlock(self.groups, self.dtype, name="mid_block")(x_BHWC)
        x_BHWC = nn.silu(GroupNorm(self.groups, EPS, name="conv_norm_out")(x_BHWC))
        return conv(2 * self.latent_channels, "conv_out")(x_BHWC)


class Decoder(nn.Module):
    """Latents (B, h, w, latent_channels), after `post_quant_conv`, -> pictures (B, H, W, C)."""

    out_channels: int
    block_out_channels: tuple[int, ...]
    layers: int
    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z_BhwC: jax.Array) -> jax.Array:
        conv = lambda features, name: Conv(features, (3, 3), kernel_init=torch_uniform, dtype=self.dtype, name=name)  # noqa: E731
        widths = self.block_out_channels[::-1]
        x_BHWC = conv(widths[0], "conv_in")(z_BhwC)
        x_BHWC = MidBlock(self.groups, self.dtype, name="mid_block")(x_BHWC)
        for i, width in enumerate(widths):
            resample = "up" if i < len(widths) - 1 else ""
            x_BHWC = Level(width, self.layers + 1, self.groups, resample, self.dtype, name=f"up_blocks_{i}")(x_BHWC)
        x_BHWC = nn.silu(GroupNorm(self.groups, EPS, name="conv_norm_out")(x_BHWC))
        return conv(self.out_channels, "conv_out")(x_BHWC)


class AutoencoderKL(nn.Module):
    """Pictures in [-1, 1] to a Gaussian over latents, and latents back to pictures; both halves apart by `method`.

    `apply({"params": p}, x_BHWC, method="encode")` -> `Posterior`, unscaled; `apply(..., z_BhwC, method="decode")` -> (B, H, W, 3).
    Called without a method it reconstructs from a draw: (x_BHWC, key) -> (B, H, W, 3).

    block_out_channels: width of each level, from the picture's resolution down by halves.
    scaling_factor: what latents are multiplied by for the diffusion model: 1 / their standard deviation.
    """

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    dtype: Any = jnp.float32

    frozen = r"$^"  # no leaf

    def setup(self):
        shared = (self.block_out_channels, self.layers_per_block, self.norm_num_groups, self.dtype)
        self.encoder = Encoder(self.latent_channels, *shared)
        self.decoder = Decoder(self.in_channels, *shared)
        conv = lambda features: Conv(features, (1, 1), kernel_init=torch_uniform, dtype=self.dtype)  # noqa: E731
        self.quant_conv = conv(2 * self.latent_channels)
        self.post_quant_conv = conv(self.latent_channels)

    @property
    def downscale(self) -> int:
        """The picture's height over the latent's."""
        return 2 ** (len(self.block_out_channels) - 1)

    def encode(self, x_BHWC: jax.Array) -> Posterior:
        """ValueError for a height or width that the levels do not divide."""
        _, H, W, C = x_BHWC.shape
        if H % self.downscale or W % self.downscale or self.in_channels != C:
            raise ValueError(
                f"the autoencoder takes pictures of {self.in_channels} channels whose sides are multiples of "
                f"{self.downscale}, found {(H, W, C)}"
            )
        mean, logvar = jnp.split(self.quant_conv(self.encoder(x_BHWC.astype(self.dtype))), 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, z_BhwC: jax.Array) -> jax.Array:
        """ValueError for latents of another number of channels."""
        if z_BhwC.shape[-1] != self.latent_channels:
            raise ValueError(
                f"the autoencoder's latents have {self.latent_channels} channels, found {z_BhwC.shape[-1]}"
            )
        return self.decoder(self.post_quant_conv(z_BhwC.astype(self.dtype)))

    def __call__(self, x_BHWC: jax.Array, key: jax.Array) -> jax.Array:
        return self.decode(self.encode(x_BHWC).sample(key))

    def dummy_inputs(self, batch: int = 1) -> tuple[jax.Array, jax.Array]:
        """Zeros of the shapes that `init` takes, the smallest that will do."""
        return jnp.zeros((batch, self.downscale, self.downscale, self.in_channels)), jax.random.key(0)

    def macs(self, image_size: int) -> int:
        """Multiply-accumulates of one picture's way there and back."""
        picture = jax.ShapeDtypeStruct((1, image_size, image_size, self.in_channels), jnp.float32)
        return macs(self, picture, jax.eval_shape(lambda: jax.random.key(0)))


CONFIGS: dict[str, dict[str, Any]] = {"sd15/vae": {}}


def decode_tiled(decode: Any, z_BhwC: jax.Array, downscale: int, tile: int = 64, overlap: int = 16) -> np.ndarray:
    """Decodes a large latent tile by tile, neighbours blended linearly over `overlap` latent pixels: float32 (B, H, W, C).

    decode: (B, tile, tile, C) -> (B, tile * downscale, ...), jitted by the caller: it sees one shape only. Memory is that of
    one tile beside the result, which lies on the host. Seams are invisible, but statistics of the whole picture (group norms)
    become the tile's, so the result is close to `decode`'s, not equal.
    """
    B, h, w, _ = z_BhwC.shape
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap={overlap} must be at least 0 and below tile={tile}")
    if h <= tile and w <= tile:
        return np.asarray(decode(z_BhwC), np.float32)
    rows, columns = _starts(h, tile, overlap), _starts(w, tile, overlap)
    total: np.ndarray | None = None
    weight = np.zeros((h * downscale, w * downscale, 1), np.float32)
    for top in rows:
        for left in columns:
            piece = z_BhwC[:, top : top + tile, left : left + tile]
            made = np.asarray(decode(piece), np.float32)
            ramps = [_ramp(n // downscale, overlap, downscale) for n in made.shape[1:3]]
            share = (ramps[0][:, None] * ramps[1])[..., None]
            where = np.s_[
                top * downscale : top * downscale + made.shape[1], left * downscale : left * downscale + made.shape[2]
            ]
            if total is None:
                total = np.zeros((B, h * downscale, w * downscale, made.shape[-1]), np.float32)
            total[:, *where] += made * share
            weight[where] += share
    assert total is not None
    return total / weight


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin; the last ends at the edge, so that all have one size."""
    if length <= tile:
        return [0]
    return sorted({*range(0, length - tile, tile - overlap), length - tile})


def _ramp(tile: int, overlap: int, downscale: int) -> np.ndarray:
    """Weights that rise over the overlap at either end and are never zero."""
    n = np.arange(tile * downscale, dtype=np.float32) + 0.5
    edge = max(overlap * downscale, 1)
    return np.minimum(1.0, np.minimum(n, n[::-1]) / edge)
