"""A weight knows its own operation.

A parameter leaf is an array or a small pytree that stands for one. `dot`, `conv` and `take` are the only places that ask
which, so every model is written once: attaching LoRA or quantizing is a change of the tree, never of the model.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=["qvalue", "scale"], meta_fields=[])
class QTensor:
    """A symmetric integer tensor: `qvalue * scale`.

    qvalue: int8, a kernel's own shape (..., in, out); scale: float, (..., 1, out), one a column. Leading axes are stacked
    layers. `qvalue` comes first because Flax checks a parameter's shape against its first leaf.
    """

    def __init__(self, qvalue: Any, scale: Any):
        self.qvalue, self.scale = qvalue, scale

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape

    @property
    def dtype(self) -> Any:
        return self.scale.dtype


@partial(jax.tree_util.register_dataclass, data_fields=["w", "a", "b", "scale"], meta_fields=[])
class LoRAWeight:
    """A frozen kernel with a low-rank side branch, `w + scale * a @ b`, that is never formed (arXiv:2106.09685).

    w: array or QTensor, (in, out) or (kh, kw, in, out); a: (in, R) or (kh, kw, in, R); b: (R, out); scale: scalar,
    alpha / R. Stacked layers put one more axis in front of all four.
    """

    def __init__(self, w: Any, a: Any, b: Any, scale: Any):
        self.w, self.a, self.b, self.scale = w, a, b, scale

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def dtype(self) -> Any:
        return self.w.dtype


Weight: TypeAlias = jax.Array | QTensor | LoRAWeight


def dot(x: jax.Array, w: Weight) -> jax.Array:
    """`x (..., in) @ w (in, out)` in x's dtype."""
    if isinstance(w, LoRAWeight):
        return dot(x, w.w) + dot(dot(x, w.a) * w.scale.astype(x.dtype), w.b)
    if isinstance(w, QTensor):
        return jnp.dot(x, w.qvalue.astype(x.dtype)) * w.scale[0].astype(x.dtype)
    return jnp.dot(x, w.astype(x.dtype))


def conv(x_BHWC: jax.Array, w: Weight, strides: Sequence[int] = (1, 1), padding: Any = "SAME") -> jax.Array:
    """NHWC convolution with an HWIO kernel, in x's dtype."""
    if isinstance(w, LoRAWeight):
        side = conv(x_BHWC, w.a, strides, padding) * w.scale.astype(x_BHWC.dtype)
        return conv(x_BHWC, w.w, strides, padding) + dot(side, w.b)
    if isinstance(w, QTensor):
        y = conv(x_BHWC, w.qvalue.astype(x_BHWC.dtype), strides, padding)
        return y * w.scale.reshape(-1).astype(x_BHWC.dtype)
    return jax.lax.conv_general_dilated(
        x_BHWC, w.astype(x_BHWC.dtype), strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def take(w: Weight, ids: jax.Array, dtype: Any) -> jax.Array:
    """Rows of an embedding table (rows, width): shape ids.shape + (width,). ids must be in range: they are not checked."""
    if isinstance(w, LoRAWeight):
        return take(w.w, ids, dtype) + dot(jnp.take(w.a, ids, axis=0).astype(dtype) * w.scale.astype(dtype), w.b)
    if isinstance(w, QTensor):
        return jnp.take(w.qvalue, ids, axis=0).astype(dtype) * w.scale[0].astype(dtype)
    return jnp.take(w, ids, axis=0).astype(dtype)
