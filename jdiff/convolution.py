"""NHWC convolution with HWIO kernels: XLA's own, but on a CPU a sum of matrix products wherever those are quicker.

For the gradient of a convolution's input XLA:CPU transposes the kernel, element by element: 3 of the 5 seconds of a LoRA step
of Stable Diffusion's UNet; for that of its kernel it transposes the pictures. Written as one product a tap of the kernel, neither
is moved. Where the pictures have few pixels, a row of all taps a pixel makes the forward pass one product, too. What is quicker
where was measured (docs/performance.md). Legend: C channels in, D out, h w the output's size, T taps, P output
pixels of the batch.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jdiff import target
from jdiff.product import product

Pairs: TypeAlias = tuple[tuple[int, int], ...]

VERY_FEW_PIXELS, FEW_PIXELS, SOME_PIXELS, MANY_PIXELS = 256, 512, 1024, 2**14
"""Output pixels of a batch: up to so many, a wide kernel is best read once, as it lies; rows of taps are quicker than a
convolution; so is a product a tap for the input's gradient; from so many on, for the gradient of kernels that are not narrow."""
WIDE, NARROW, FEW_CHANNELS = 2**16, 2**12, 16
"""Weights a tap, C * D, from which on a kernel is wide; below which it is narrow; channels that are few to make of 64 or more."""


def convolve(
    x_BHWC: jax.Array, kernel: jax.Array, strides: Sequence[int] = (1, 1), padding: str | Sequence[Any] = "SAME"
) -> jax.Array:
    """(B, H, W, C) with (kh, kw, C, D) of the same dtype -> (B, h, w, D). Forward-mode derivatives only off the CPU."""
    strides = tuple(strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x_BHWC.shape[1:3], kernel.shape[:2], strides, padding)
    pairs: Pairs = tuple((int(low), int(high)) for low, high in padding)
    if target.platform() != "cpu":
        return _xla(x_BHWC, kernel, strides, pairs)
    if kernel.shape[:2] == strides == (1, 1) and pairs == ((0, 0), (0, 0)):
        return product(x_BHWC, kernel[0, 0])
    return _convolve(x_BHWC, kernel, strides, pairs)


def has_integers() -> bool:
    """Whether the backend convolves int8 to int32: XLA:GPU does not (jax#7637). XLA:CPU is quicker at it than in fp32."""
    return target.platform() in ("cpu", "tpu")


def _xla(x_BHWC: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pairs: Pairs) -> jax.Array:
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x_BHWC, kernel, strides, pairs, dimension_numbers=dims)


def _forward(x_BHWC: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pairs: Pairs) -> jax.Array:
    out = jax.eval_shape(partial(_xla, strides=strides, pairs=pairs), x_BHWC, kernel).shape
    if not _wide(kernel) or _pixels(out) > FEW_PIXELS:
        return _xla(x_BHWC, kernel, strides, pairs)
    rows_PTC = _rows(x_BHWC, kernel.shape, out, strides, pairs)
    return jnp.dot(rows_PTC, kernel.reshape(-1, kernel.shape[-1])).reshape(out)


_convolve = jax.custom_vjp(_forward, nondiff_argnums=(2, 3))


def _backward(
    strides: tuple[int, ...], pairs: Pairs, saved: tuple[jax.Array, jax.Array], g_BhwD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_BHWC, kernel = saved
    if _wide(kernel) and _pixels(g_BhwD.shape) <= SOME_PIXELS:
        dx_BHWC = _input_gradient(x_BHWC, kernel, g_BhwD, strides, pairs)
    else:
        (dx_BHWC,) = jax.vjp(lambda x: _xla(x, kernel, strides, pairs), x_BHWC)[1](g_BhwD)
    return dx_BHWC, _kernel_gradient(x_BHWC, kernel, g_BhwD, strides, pairs)


_convolve.defvjp(lambda x, kernel, strides, pairs: (_forward(x, kernel, strides, pairs), (x, kernel)), _backward)


def _input_gradient(
    x_BHWC: jax.Array, kernel: jax.Array, g_BhwD: jax.Array, strides: tuple[int, ...], pairs: Pairs
) -> jax.Array:
    """Each tap's product with the output's gradient, added up where that tap read."""
    C, D = kernel.shape[2:]
    B, h, w, _ = g_BhwD.shape
    wide = jnp.promote_types(g_BhwD.dtype, jnp.float32)
    dot: Callable[..., jax.Array] = partial(lax.dot_general, preferred_element_type=wide)
    if _pixels(g_BhwD.shape) <= VERY_FEW_PIXELS:
        # (T * C, D) times (D, P): the kernel, all of the memory there is, streams by
        parts_TCP = dot(kernel.reshape(-1, D), g_BhwD.reshape(-1, D), (((1,), (1,)), ((), ())))
        parts = jnp.moveaxis(parts_TCP.reshape(-1, C, B, h, w), 1, -1)
    else:
        parts = (dot(g_BhwD, kernel[tap], (((3,), (1,)), ((), ()))) for tap in _taps(kernel.shape))
    moved = (
        _put(part, tap, x_BHWC.shape, strides, pairs) for part, tap in zip(parts, _taps(kernel.shape), strict=True)
    )
    return reduce(jnp.add, moved).astype(x_BHWC.dtype)


def _kernel_gradient(
    x_BHWC: jax.Array, kernel: jax.Array, g_BhwD: jax.Array, strides: tuple[int, ...], pairs: Pairs
) -> jax.Array:
    """Products of the pixels that a tap read with the output's gradient: all taps in one product, or one after the other."""
    C, D = kernel.shape[2:]
    wide = jnp.promote_types(g_BhwD.dtype, jnp.float32)
    dot: Callable[..., jax.Array] = partial(
        lax.dot_general, dimension_numbers=(((0,), (0,)), ((), ())), preferred_element_type=wide
    )
    g_PD = g_BhwD.reshape(-1, D)
    pixels = _pixels(g_BhwD.shape)
    if D <= FEW_CHANNELS and C >= 4 * FEW_CHANNELS:
        # each tap's gradient at the pixels that it read
        moved = [_put(g_BhwD, tap, x_BHWC.shape, strides, pairs) for tap in _taps(kernel.shape)]
        gradient_CTD = dot(x_BHWC.reshape(-1, C), jnp.concatenate(moved, -1).reshape(-1, len(moved) * D))
        gradient = jnp.moveaxis(gradient_CTD.reshape(C, -1, D), 0, 1)
    elif _wide(kernel) and pixels <= FEW_PIXELS:
        gradient = dot(_rows(x_BHWC, kernel.shape, g_BhwD.shape, strides, pairs), g_PD)
    elif _wide(kernel) or (C * D >= NARROW and pixels >= MANY_PIXELS):
        reads = _reads(x_BHWC, kernel.shape, g_BhwD.shape, strides, pairs)
        gradient = jnp.stack([dot(read.reshape(-1, C), g_PD) for read in reads])
    else:
        (gradient,) = jax.vjp(lambda kernel: _xla(x_BHWC, kernel, strides, pairs), kernel)[1](g_BhwD)
    return gradient.reshape(kernel.shape).astype(kernel.dtype)


def _wide(kernel: jax.Array) -> bool:
    return kernel.shape[2] * kernel.shape[3] >= WIDE


def _pixels(shape: Sequence[int]) -> int:
    return shape[0] * shape[1] * shape[2]


def _taps(kernel_shape: Sequence[int]) -> list[tuple[int, int]]:
    return [(i, j) for i in range(kernel_shape[0]) for j in range(kernel_shape[1])]


def _reads(
    x_BHWC: jax.Array, kernel_shape: Sequence[int], out: Sequence[int], strides: tuple[int, ...], pairs: Pairs
) -> list[jax.Array]:
    """What each tap reads for the output (B, h, w, D): T arrays (B, h, w, C)."""
    B, _, _, C = x_BHWC.shape
    padded = jnp.pad(x_BHWC, ((0, 0), *pairs, (0, 0)))
    span = [1 + (n - 1) * stride for n, stride in zip(out[1:3], strides, strict=True)]
    return [
        lax.slice(padded, (0, i, j, 0), (B, i + span[0], j + span[1], C), (1, *strides, 1))
        for i, j in _taps(kernel_shape)
    ]


def _rows(
    x_BHWC: jax.Array, kernel_shape: Sequence[int], out: Sequence[int], strides: tuple[int, ...], pairs: Pairs
) -> jax.Array:
    """What all taps read for a pixel of the output, in a row: (P, T * C)."""
    rows = jnp.concatenate(_reads(x_BHWC, kernel_shape, out, strides, pairs), -1)
    return rows.reshape(-1, rows.shape[-1])


def _put(
    y_BhwC: jax.Array, tap: tuple[int, int], shape: Sequence[int], strides: tuple[int, ...], pairs: Pairs
) -> jax.Array:
    """`_reads` backwards for one tap: the output's pixels at the input's (H, W) that it reads, zeros elsewhere."""
    spaces = []
    for axis in (0, 1):
        low, n = tap[axis] - pairs[axis][0], y_BhwC.shape[1 + axis]
        spaces.append((low, shape[1 + axis] - low - (1 + (n - 1) * strides[axis]), strides[axis] - 1))
    return lax.pad(y_BhwC, jnp.zeros((), y_BhwC.dtype), ((0, 0, 0), *spaces, (0, 0, 0)))
