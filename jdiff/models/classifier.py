"""A small convolutional network that tells classes apart: its features are what scores without Inception's weights compare."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdiff.layers import Conv, Dense, Downsample, Dtype, GroupNorm, ResnetBlock, torch_uniform
from jdiff.models.macs import macs

CONFIGS: dict[str, dict[str, Any]] = {"classifier": {}}


class Classifier(nn.Module):
    """Pictures (B, H, W, channels) in [-1, 1] -> (logits (B, num_classes), features (B, widths[-1])).

    A residual block a width, each level half the size of the one before; the features are means over the picture.
    """

    num_classes: int = 10
    image_size: int = 32
    channels: int = 3
    widths: tuple[int, ...] = (32, 64, 128)
    norm_num_groups: int = 8
    dtype: Dtype = jnp.float32

    def dummy_inputs(self) -> tuple[jax.Array]:
        """Arguments of `init`."""
        return (jnp.zeros((1, self.image_size, self.image_size, self.channels), jnp.float32),)

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        conv = partial(Conv, kernel_size=(3, 3), kernel_init=torch_uniform, dtype=self.dtype)
        x = conv(self.widths[0], name="conv_in")(x_BHWC)
        for level, width in enumerate(self.widths):
            x = Downsample(dtype=self.dtype, name=f"down_{level}")(x) if level else x
            x = ResnetBlock(width, self.norm_num_groups, dtype=self.dtype, name=f"block_{level}")(x)
        x = nn.silu(GroupNorm(self.norm_num_groups, name="norm_out")(x))
        features_BD = x.astype(jnp.float32).mean((1, 2))
        return Dense(self.num_classes, name="classes")(features_BD), features_BD

    def macs(self) -> int:
        """Multiply-accumulates of a picture."""
        return macs(self, *self.dummy_inputs())
