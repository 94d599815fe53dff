"""PatchGAN's discriminator (arXiv:1611.07004; as CompVis/taming-transformers has it): one logit for each patch of a picture."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdiff.layers import Conv, Dtype, zeros

SLOPE, EPS = 0.2, 1e-5


class BatchNorm(nn.Module):
    """Normalises each channel by the statistics of the batch it is given, which under jit is the global batch.

    The original averages statistics for use in evaluation, too; a discriminator is never evaluated, so none are kept.
    """

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        C = x_BHWC.shape[-1]
        scale = self.param("scale", lambda key: 1 + 0.02 * jax.random.normal(key, (C,), jnp.float32))
        bias = self.param("bias", zeros, (C,), jnp.float32)
        x = x_BHWC.astype(jnp.promote_types(x_BHWC.dtype, jnp.float32))
        x = x - x.mean((0, 1, 2))
        x = x * (jax.lax.rsqrt(jnp.mean(x * x, (0, 1, 2)) + EPS) * scale) + bias
        return x.astype(x_BHWC.dtype)


class PatchDiscriminator(nn.Module):
    """Pictures (B, H, W, 3) -> logits (B, h, w, 1), high where a patch looks real; h is about H / 8.

    Three convolutions of stride 2 and two of stride 1, each 4x4, widths `width` times 1, 2, 4, 8: each logit sees 70x70 pixels.
    """

    width: int = 64
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """ValueError for pictures too small to give a logit."""
        _, H, W, _ = x_BHWC.shape
        if min(H, W) < 24:
            raise ValueError(f"the discriminator takes pictures of 24x24 pixels or more, found {H}x{W}")
        for i, (times, stride) in enumerate(((1, 2), (2, 2), (4, 2), (8, 1))):
            x_BHWC = self._conv(times * self.width, stride, f"conv_{i}", i == 0)(x_BHWC)
            if i:
                x_BHWC = BatchNorm(name=f"norm_{i}")(x_BHWC)
            x_BHWC = nn.leaky_relu(x_BHWC, SLOPE)
        return self._conv(1, 1, "conv_out", True)(x_BHWC)

    def _conv(self, features: int, stride: int, name: str, bias: bool) -> Conv:
        """Without a bias before a norm, which would take it out again."""
        init, padding = nn.initializers.normal(0.02), ((1, 1), (1, 1))
        return Conv(features, (4, 4), (stride, stride), padding, bias, init, self.dtype, name=name)
