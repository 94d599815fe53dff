"""InceptionV3 as the Fréchet distance takes it (arXiv:1512.00567, TensorFlow's graph of 2015-12-05; mseitzer/pytorch-fid).

Not torchvision's: average pooling does not count the padding, and the last block pools by maximum. The layers have
torchvision's names. For evaluation alone: the statistics of batch normalisation are parameters like others.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdiff.layers import Conv, Dense, Dtype, zeros

SIZE, CLASSES, EPS = 299, 1008, 1e-3
SPATIAL = 7
"""Channels of the 17x17 map that sFID takes (arXiv:2103.03841)."""


class Layer(NamedTuple):
    """A convolution with batch normalisation and ReLU. Padded to keep the picture's size, or not at all."""

    name: str
    width: int
    height_of_kernel: int
    width_of_kernel: int
    stride: int = 1
    padded: bool = True


Chain = tuple[str | Layer | tuple[Layer, Layer], ...]
"""Layers one after the other; two that stand side by side; and poolings: "mean" and "max" keep the size, "halve" does not."""


def _a(pooled: int) -> tuple[Chain, ...]:
    return (
        (Layer("branch1x1", 64, 1, 1),),
        (Layer("branch5x5_1", 48, 1, 1), Layer("branch5x5_2", 64, 5, 5)),
        (Layer("branch3x3dbl_1", 64, 1, 1), Layer("branch3x3dbl_2", 96, 3, 3), Layer("branch3x3dbl_3", 96, 3, 3)),
        ("mean", Layer("branch_pool", pooled, 1, 1)),
    )


def _c(width: int) -> tuple[Chain, ...]:
    kernels = ((1, 1), (7, 1), (1, 7), (7, 1))
    return (
        (Layer("branch1x1", 192, 1, 1),),
        (Layer("branch7x7_1", width, 1, 1), Layer("branch7x7_2", width, 1, 7), Layer("branch7x7_3", 192, 7, 1)),
        (
            *(Layer(f"branch7x7dbl_{i}", width, *kernel) for i, kernel in enumerate(kernels, 1)),
            Layer("branch7x7dbl_5", 192, 1, 7),
        ),
        ("mean", Layer("branch_pool", 192, 1, 1)),
    )


def _e(pooling: str) -> tuple[Chain, ...]:
    fork = lambda name: (Layer(f"{name}a", 384, 1, 3), Layer(f"{name}b", 384, 3, 1))  # noqa: E731
    return (
        (Layer("branch1x1", 320, 1, 1),),
        (Layer("branch3x3_1", 384, 1, 1), fork("branch3x3_2")),
        (Layer("branch3x3dbl_1", 448, 1, 1), Layer("branch3x3dbl_2", 384, 3, 3), fork("branch3x3dbl_3")),
        (pooling, Layer("branch_pool", 192, 1, 1)),
    )


STEM: Chain = (
    Layer("Conv2d_1a_3x3", 32, 3, 3, 2, padded=False),
    Layer("Conv2d_2a_3x3", 32, 3, 3, padded=False),
    Layer("Conv2d_2b_3x3", 64, 3, 3),
    "halve",
    Layer("Conv2d_3b_1x1", 80, 1, 1),
    Layer("Conv2d_4a_3x3", 192, 3, 3, padded=False),
    "halve",
)
BLOCKS: dict[str, tuple[Chain, ...]] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": (
        (Layer("branch3x3", 384, 3, 3, 2, padded=False),),
        (
            Layer("branch3x3dbl_1", 64, 1, 1),
            Layer("branch3x3dbl_2", 96, 3, 3),
            Layer("branch3x3dbl_3", 96, 3, 3, 2, padded=False),
        ),
        ("halve",),
    ),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": (
        (Layer("branch3x3_1", 192, 1, 1), Layer("branch3x3_2", 320, 3, 3, 2, padded=False)),
        (
            Layer("branch7x7x3_1", 192, 1, 1),
            Layer("branch7x7x3_2", 192, 1, 7),
            Layer("branch7x7x3_3", 192, 7, 1),
            Layer("branch7x7x3_4", 192, 3, 3, 2, padded=False),
        ),
        ("halve",),
    ),
    "Mixed_7b": _e("mean"),
    "Mixed_7c": _e("max"),
}


class Features(NamedTuple):
    """pool_BD: (B, 2048), for FID, KID, precision and recall; spatial_BD: (B, 17 * 17 * 7), for sFID; logits_BK: (B, 1008),
    without bias, as the Inception score takes them."""

    pool_BD: jax.Array
    spatial_BD: jax.Array
    logits_BK: jax.Array


class BatchNorm(nn.Module):
    """Normalises by statistics that are given."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        C = x_BHWC.shape[-1]
        scale, var = (self.param(name, nn.initializers.ones, (C,), jnp.float32) for name in ("scale", "var"))
        bias, mean = (self.param(name, zeros, (C,), jnp.float32) for name in ("bias", "mean"))
        gain = scale * jax.lax.rsqrt(var + EPS)
        return x_BHWC * gain.astype(x_BHWC.dtype) + (bias - mean * gain).astype(x_BHWC.dtype)


class ConvBN(nn.Module):
    """What a `Layer` says."""

    layer: Layer
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        _, width, h, w, stride, padded = self.layer
        padding = [((k - 1) // 2,) * 2 if padded else (0, 0) for k in (h, w)]
        conv = Conv(width, (h, w), (stride, stride), padding, False, dtype=self.dtype, name="conv")
        return nn.relu(BatchNorm(name="bn")(conv(x_BHWC)))


class Block(nn.Module):
    """Chains side by side, their channels one after the other."""

    chains: tuple[Chain, ...]
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return jnp.concatenate([self._run(chain, x_BHWC) for chain in self.chains], -1)

    def _run(self, chain: Chain, x: jax.Array) -> jax.Array:
        for step in chain:
            if isinstance(step, str):
                x = pool(x, step)
            elif isinstance(step, Layer):
                x = ConvBN(step, self.dtype, name=step.name)(x)
            else:
                x = jnp.concatenate([ConvBN(layer, self.dtype, name=layer.name)(x) for layer in step], -1)
        return x


class Inception(nn.Module):
    """Pictures (B, 299, 299, 3) in [-1, 1] -> `Features`."""

    dtype: Dtype = jnp.float32

    def dummy_inputs(self) -> tuple[jax.Array]:
        """Arguments of `init`."""
        return (jnp.zeros((1, SIZE, SIZE, 3), jnp.float32),)

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> Features:
        """ValueError for pictures of another size."""
        if x_BHWC.shape[1:] != (SIZE, SIZE, 3):
            raise ValueError(f"Inception takes pictures of {SIZE}x{SIZE} in 3 channels, found {x_BHWC.shape[1:]}")
        x = Block((STEM,), self.dtype, name="stem")(x_BHWC)
        outputs = {}
        for name, chains in BLOCKS.items():
            x = outputs[name] = Block(chains, self.dtype, name=name)(x)
        spatial = outputs["Mixed_6d"][..., :SPATIAL].astype(jnp.float32)
        pool_BD = x.astype(jnp.float32).mean((1, 2))
        return Features(pool_BD, spatial.reshape(len(x), -1), Dense(CLASSES, use_bias=False, name="fc")(pool_BD))


def pool(x_BHWC: jax.Array, how: str) -> jax.Array:
    """3x3: "mean" of what lies inside the picture, or "max", both at stride 1; "halve": maximum at stride 2, unpadded."""
    if how == "mean":
        return nn.avg_pool(x_BHWC, (3, 3), padding="SAME", count_include_pad=False)
    return nn.max_pool(x_BHWC, (3, 3), (2, 2) if how == "halve" else (1, 1), "VALID" if how == "halve" else "SAME")
