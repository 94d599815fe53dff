"""CLIP whole (arXiv:2103.00020; transformers' CLIPModel): a vision transformer and a text encoder, projected into one space.

Shapes: B batch, S text length, H W height and width, C channels, L patches and a class token, E width, D the space's width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdiff.layers import Conv, Dense, Embed, LayerNorm
from jdiff.models.clip import CLIPText, Layer, check_layers
from jdiff.models.macs import macs


class CLIPVision(nn.Module):
    """Pictures (B, image_size, image_size, 3), normalised, to the class token's state (B, E) after the last LayerNorm."""

    image_size: int
    patch_size: int
    width: int
    hidden: int
    layers: int
    heads: int
    activation: str
    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        B, size = len(x_BHWC), self.image_size
        if x_BHWC.shape[1:] != (size, size, 3):
            raise ValueError(f"CLIP takes pictures of {size}x{size} in 3 channels, found {x_BHWC.shape[1:]}")
        normal, patch = nn.initializers.normal, (self.patch_size, self.patch_size)
        conv = Conv(self.width, patch, patch, "VALID", False, normal(0.02), dtype=self.dtype, name="patch_embedding")
        x_BLE = conv(x_BHWC).reshape(B, -1, self.width)
        class_E = self.param("class_embedding", normal(self.width**-0.5), (self.width,), jnp.float32)
        class_B1E = jnp.broadcast_to(class_E.astype(x_BLE.dtype), (B, 1, self.width))
        x_BLE = jnp.concatenate([class_B1E, x_BLE], 1)
        L = x_BLE.shape[1]
        x_BLE += Embed(L, self.width, dtype=self.dtype, name="position_embedding")(jnp.arange(L))
        x_BLE = LayerNorm(self.eps, name="pre_layrnorm")(x_BLE)  # upstream's spelling
        shared = (self.heads, self.hidden, self.layers, self.activation, self.eps, self.dtype, False)
        for i in range(self.layers):
            x_BLE = Layer(*shared, name=f"layers_{i}")(x_BLE)
        return LayerNorm(self.eps, name="post_layernorm")(x_BLE[:, 0])


class CLIP(nn.Module):
    """Pictures and texts to one space: `method="image"` and `"text"` give (B, D), not of length 1; a call compares them.

    The first fields are the text encoder's, as of `CLIPText`; projection: D; eos_id: the token at whose first place a text is
    read.
    """

    vocab_size: int = 49408
    width: int = 512
    hidden: int = 2048
    layers: int = 12
    heads: int = 8
    max_length: int = 77
    activation: str = "quick_gelu"
    eps: float = 1e-5
    eos_id: int = 49407
    image_size: int = 224
    patch_size: int = 32
    vision_width: int = 768
    vision_hidden: int = 3072
    vision_layers: int = 12
    vision_heads: int = 12
    vision_activation: str = "quick_gelu"
    vision_eps: float = 1e-5
    projection: int = 512
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_layers(self.width, self.heads, self.activation)
        check_layers(self.vision_width, self.vision_heads, self.vision_activation)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}")

    def setup(self):
        text = (self.vocab_size, self.width, self.hidden, self.layers, self.heads, self.max_length)
        self.text_model = CLIPText(*text, self.activation, self.eps, self.dtype)
        vision = (self.vision_width, self.vision_hidden, self.vision_layers, self.vision_heads)
        self.vision_model = CLIPVision(
            self.image_size, self.patch_size, *vision, self.vision_activation, self.vision_eps, self.dtype
        )
        project = lambda width: Dense(self.projection, False, nn.initializers.normal(width**-0.5))  # noqa: E731
        self.text_projection, self.visual_projection = project(self.width), project(self.vision_width)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), (), jnp.float32)

    def image(self, x_BHWC: jax.Array) -> jax.Array:
        """Pictures (B, image_size, image_size, 3), normalised by CLIP's mean and deviation -> (B, D)."""
        return self.visual_projection(self.vision_model(x_BHWC))

    def text(self, ids_BS: jax.Array) -> jax.Array:
        """Token ids with `eos_id` in each row, at most max_length long -> (B, D)."""
        x_BSE = self.text_model(ids_BS)
        return self.text_projection(x_BSE[jnp.arange(len(ids_BS)), (ids_BS == self.eos_id).argmax(1)])

    def __call__(self, x_BHWC: jax.Array, ids_BS: jax.Array) -> jax.Array:
        """Logits of each picture for each text: their cosines times exp(logit_scale)."""
        image_BD, text_BD = (
            x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (self.image(x_BHWC), self.text(ids_BS))
        )
        return image_BD @ text_BD.T * jnp.exp(self.logit_scale)

    def dummy_inputs(self) -> tuple[jax.Array, jax.Array]:
        """Zeros of the shapes that `init` takes."""
        return jnp.zeros((1, self.image_size, self.image_size, 3)), jnp.zeros((1, self.max_length), jnp.int32)

    def macs(self) -> int:
        """Multiply-accumulates of a picture and a text."""
        return macs(self, *self.dummy_inputs())


_LARGE = {"width": 768, "hidden": 3072, "heads": 12, "projection": 768, "patch_size": 14}
CONFIGS: dict[str, dict[str, Any]] = {
    "CLIP-ViT-B/32": {},
    "CLIP-ViT-L/14": {
        **_LARGE,
        **{"vision_width": 1024, "vision_hidden": 4096, "vision_layers": 24, "vision_heads": 16},
    },
}
