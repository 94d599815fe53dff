"""CLIP's text encoder (arXiv:2103.00020; transformers' CLIPTextModel), which Stable Diffusion conditions on.

Shapes: B batch, S text length, E width, N heads, K head dim, F mlp hidden.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdiff.attention import attention
from jdiff.layers import Dense, Embed, LayerNorm
from jdiff.models.macs import macs
from jdiff.rows import boundary

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}


class SelfAttention(nn.Module):
    """Multi-head attention. layers: how many the model has; its initialisation shrinks with it."""

    heads: int
    layers: int
    dtype: Any = jnp.float32
    causal: bool = True

    @nn.compact
    def __call__(self, x_BSE: jax.Array) -> jax.Array:
        B, S, E = x_BSE.shape
        init = nn.initializers.normal(E**-0.5 * (2 * self.layers) ** -0.5)
        dense = lambda name: Dense(E, kernel_init=init, dtype=self.dtype, name=name)  # noqa: E731
        q, k, v = (dense(name)(x_BSE).reshape(B, S, self.heads, -1) for name in ("q_proj", "k_proj", "v_proj"))
        out = Dense(E, kernel_init=nn.initializers.normal(E**-0.5), dtype=self.dtype, name="out_proj")
        return out(attention(q, k, v, causal=self.causal).reshape(B, S, E))


class Mlp(nn.Module):
    """Two layers with the model's activation."""

    hidden: int
    layers: int
    activation: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BSE: jax.Array) -> jax.Array:
        E = x_BSE.shape[-1]
        first, second = ((2 * E) ** -0.5, E**-0.5 * (2 * self.layers) ** -0.5)
        normal = nn.initializers.normal
        h_BSF = Dense(self.hidden, kernel_init=normal(first), dtype=self.dtype, name="fc1")(x_BSE)
        h_BSF = ACTIVATIONS[self.activation](h_BSF)
        return Dense(E, kernel_init=normal(second), dtype=self.dtype, name="fc2")(h_BSF)


class Layer(nn.Module):
    """Pre-norm attention and MLP: causal in the text's tower, not in the picture's."""

    heads: int
    hidden: int
    layers: int
    activation: str
    eps: float
    dtype: Any = jnp.float32
    causal: bool = True

    @nn.compact
    def __call__(self, x_BSE: jax.Array) -> jax.Array:
        attn = SelfAttention(self.heads, self.layers, self.dtype, self.causal, name="self_attn")
        x_BSE += attn(LayerNorm(self.eps, name="layer_norm1")(x_BSE))
        mlp = Mlp(self.hidden, self.layers, self.activation, self.dtype, name="mlp")
        return boundary(x_BSE + mlp(LayerNorm(self.eps, name="layer_norm2")(x_BSE)))


def check_layers(width: int, heads: int, activation: str) -> None:
    """ValueError for layers that there cannot be."""
    if width % heads:
        raise ValueError(f"width={width} is not a multiple of heads={heads}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; use one of {list(ACTIVATIONS)}")


class CLIPText(nn.Module):
    """Token ids to hidden states: `apply({"params": p}, ids_BS, clip_skip=0)` -> (B, S, E), after the final LayerNorm.

    clip_skip: how many of the last layers are left out (diffusers' count; kohya's and A1111's is one more).
    max_length: positions; S may be shorter, not longer.
    """

    vocab_size: int = 49408
    width: int = 768
    hidden: int = 3072
    layers: int = 12
    heads: int = 12
    max_length: int = 77
    activation: str = "quick_gelu"
    eps: float = 1e-5
    dtype: Any = jnp.float32

    frozen = r"$^"  # no leaf

    def __post_init__(self):
        super().__post_init__()
        check_layers(self.width, self.heads, self.activation)

    @nn.compact
    def __call__(self, ids_BS: jax.Array, clip_skip: int = 0) -> jax.Array:
        S = ids_BS.shape[1]
        if self.max_length < S:
            raise ValueError(
                f"the text encoder takes {self.max_length} tokens, found {S}: split the prompt into chunks"
            )
        if not 0 <= clip_skip < self.layers:
            raise ValueError(f"clip_skip={clip_skip} must be at least 0 and below the {self.layers} layers")
        x_BSE = Embed(self.vocab_size, self.width, dtype=self.dtype, name="token_embedding")(ids_BS)
        positions = Embed(self.max_length, self.width, dtype=self.dtype, name="position_embedding")
        x_BSE += positions(jnp.arange(S))
        shared = (self.heads, self.hidden, self.layers, self.activation, self.eps, self.dtype)
        for i in range(self.layers):
            layer = Layer(*shared, name=f"layers_{i}")
            # at initialisation all layers run, so that all have parameters
            x_BSE = layer(x_BSE) if i < self.layers - clip_skip or self.is_initializing() else x_BSE
        return LayerNorm(self.eps, name="final_layer_norm")(x_BSE)

    def dummy_inputs(self, batch: int = 1) -> tuple[jax.Array]:
        """Zeros of the shape that `init` takes."""
        return (jnp.zeros((batch, self.max_length), jnp.int32),)

    def macs(self) -> int:
        """Multiply-accumulates of one text."""
        return macs(self, jax.ShapeDtypeStruct((1, self.max_length), jnp.int32))


CONFIGS: dict[str, dict[str, Any]] = {"sd15/text": {}}
