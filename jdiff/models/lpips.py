"""LPIPS, a learned perceptual distance (arXiv:1801.03924; richzhang/PerceptualSimilarity, version 0.1 with VGG16)."""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jdiff.layers import Conv, Dtype

STAGES = (((0, 2), 64), ((5, 7), 128), ((10, 12, 14), 256), ((17, 19, 21), 512), ((24, 26, 28), 512))
"""VGG16's convolutions by torchvision's numbers, and their width: stages with a pooling between, and a tap at each one's end."""
SHIFT, SCALE = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
IGNORED = (
    r"classifier\..*",  # VGG's classes
    r"lins\..*",  # the lpips package's second names for lin0..lin4
    r"scaling_layer\..*",  # SHIFT and SCALE
)


class LPIPS(nn.Module):
    """Two batches of pictures in [-1, 1], (B, H, W, 3) each -> distances (B,), 0 for equal ones; never trained.

    VGG16's activations after five ReLUs, each pixel's scaled to length 1, their squared differences weighted a channel and
    averaged over the picture. Sides of 16 pixels at least.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
        B = len(x_BHWC)
        z = jnp.concatenate([x_BHWC, y_BHWC])
        z = (z - SHIFT.astype(z.dtype)) / SCALE.astype(z.dtype)
        total_B: Any = 0.0
        for stage, (numbers, width) in enumerate(STAGES):
            z = nn.max_pool(z, (2, 2), (2, 2)) if stage else z
            for number in numbers:
                z = nn.relu(Conv(width, (3, 3), dtype=self.dtype, name=f"features_{number}")(z))
            unit = z.astype(jnp.promote_types(z.dtype, jnp.float32))
            # 1e-10 is added to the length, and the root's gradient is not finite at 0
            square = jnp.sum(unit * unit, -1, keepdims=True)
            length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
            unit = unit / (length + 1e-10)
            weight_C = self.param(f"lin{stage}", nn.initializers.constant(1.0), (width,))
            total_B += (((unit[:B] - unit[B:]) ** 2) @ weight_C.astype(unit.dtype)).mean((1, 2))
        return total_B


def from_torch(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """LPIPS' parameters from arrays under torchvision's names for VGG16 (`features.N.weight`) and lpips' for its weights
    (`linK.model.1.weight`), or all under the names of the lpips package (`net.sliceS.N.weight`).

    ValueError lists what is missing, unknown, or of another shape.
    """
    layers = [(number, width) for numbers, width in STAGES for number in numbers]
    inputs = [3, *(width for _, width in layers)]
    expected: dict[str, tuple[int, ...]] = {}
    for (number, width), before in zip(layers, inputs, strict=False):
        expected |= {f"features.{number}.weight": (width, before, 3, 3), f"features.{number}.bias": (width,)}
    expected |= {f"lin{k}.model.1.weight": (1, width, 1, 1) for k, (_, width) in enumerate(STAGES)}
    found = {
        re.sub(r"net\.slice\d\.", "features.", name): array
        for name, array in arrays.items()
        if not any(re.fullmatch(pattern, name) for pattern in IGNORED)
    }
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is unknown" for name in found if name not in expected]
    wrong += [
        f"{name} has shape {found[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if wrong:
        raise ValueError(f"these are no weights of LPIPS with VGG16: {len(wrong)} differ, first: {wrong[0]}")
    params: dict[str, Any] = {}
    for number, _ in layers:
        kernel = np.ascontiguousarray(found[f"features.{number}.weight"].transpose(2, 3, 1, 0), np.float32)
        params[f"features_{number}"] = {"kernel": kernel, "bias": found[f"features.{number}.bias"].astype(np.float32)}
    return params | {
        f"lin{k}": found[f"lin{k}.model.1.weight"].astype(np.float32).reshape(-1) for k in range(len(STAGES))
    }
