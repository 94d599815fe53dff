"""Integer kernels: how they are made, and their products.

Rounding is symmetric, without zero points. As in Google's AQT the largest value stands half a step beyond the largest integer, to
which it is clipped: no error is above half a step, and steps are finer. Products are int8 x int8 -> int32, with both scales on what
comes out. The backward pass is in floats, straight through the rounding (arXiv:1308.3432): that of the same product with
the dequantized kernel and the activations as they were.

Shapes: C inputs, D outputs, G parts of the input axis.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdiff import target
from jdiff.convolution import convolve, has_integers
from jdiff.primal import quicker
from jdiff.product import product, written
from jdiff.prologue import Input, Prologue

Window: TypeAlias = tuple[tuple[int, ...], Any] | None
"""Strides and padding of a convolution; None for a matrix product."""
See: TypeAlias = Callable[[Window, jax.Array, jax.Array], Any]
"""(window, inputs, their product) -> floating-point arrays."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a kernel is rounded.

    bits: 8 or 4. group: so many inputs share a scale, at each tap of a convolution; None: all inputs and taps of a column do.
    integer: activations are rounded to int8 as well, where they are used, and the product is one of integers. static: by steps that
    were fixed beforehand.
    """

    bits: int = 8
    group: int | None = None
    integer: bool = False
    static: bool = False

    @property
    def top(self) -> int:
        """The largest integer: 127, or 7."""
        return 2 ** (self.bits - 1) - 1

    def layout(self, shape: Sequence[int], sizes: tuple[int, ...] = ()) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(lengths of the input axis' parts that have a scale each, axes of the taps that share them) of a kernel (..., C, D).

        sizes: the parts that a kernel is known to have. ValueError when they do not make up C.
        """
        C = shape[-2]
        parts = sizes or (self.group or C,) * (C // (self.group or C))
        if sum(parts) != C:
            raise ValueError(
                f"a kernel {tuple(shape)} has {C} inputs, which parts of {sorted(set(parts))} do not make up"
            )
        return parts, () if self.group else tuple(range(len(shape) % 2, len(shape) - 2))


@partial(jax.tree_util.register_dataclass, data_fields=["qvalue", "scale", "step"], meta_fields=["integer", "sizes"])
@dataclasses.dataclass(eq=False)
class QTensor:
    """A symmetric integer kernel: `qvalue * scale`, each row of scales being that of a part of the input axis.

    qvalue: int8 or int4, a kernel's own shape (..., C, D). scale: float, (..., G, D); a convolution's taps share theirs,
    (1, 1, G, D), or not, (kh, kw, G, D). Leading axes are stacked layers. integer: see `Scheme`. sizes: the parts' lengths where
    they differ. step: (..., G), what activations are rounded to multiples of; None: it is taken from them as they come. `qvalue`
    comes first because Flax checks a parameter's shape against its first leaf.
    """

    qvalue: Any
    scale: Any
    integer: bool = False
    sizes: tuple[int, ...] = ()
    step: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape

    @property
    def dtype(self) -> Any:
        return self.scale.dtype


class OfKernel:
    """What stands for the kernel `w` that it holds: its shape and its dtype."""

    w: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def dtype(self) -> Any:
        return self.w.dtype


@partial(jax.tree_util.register_dataclass, data_fields=["w", "scale"], meta_fields=["scheme", "sizes"])
@dataclasses.dataclass(eq=False)
class Rounded(OfKernel):
    """A float kernel in training that acts as the QTensor it would become; its gradient goes straight through the rounding.

    scale: learned, as a QTensor's, by LSQ (see `_learn`); None: made of the kernel at each use.
    """

    w: Any
    scheme: Scheme
    sizes: tuple[int, ...] = ()
    scale: Any = None


@partial(jax.tree_util.register_dataclass, data_fields=["w", "found"], meta_fields=["see"])
@dataclasses.dataclass(eq=False)
class Observed(OfKernel):
    """A kernel whose product is looked at: whatever is differentiated, the gradient by `found`, arrays of any values, is what `see`
    makes of the inputs (..., C) and the product (..., D). w: array or QTensor."""

    w: Any
    found: Any
    see: See


@partial(jax.tree_util.register_dataclass, data_fields=["w", "q", "on"], meta_fields=[])
@dataclasses.dataclass(eq=False)
class Either(OfKernel):
    """A kernel in floats, and rounded, of which the second is used where `on` is true, so that one program tries each alone."""

    w: Any
    q: QTensor
    on: Any


Kernel: TypeAlias = QTensor | Rounded | Observed | Either


def quantize(
    kernel: jax.Array,
    scheme: Scheme,
    sizes: tuple[int, ...] = (),
    peak: jax.Array | None = None,
    scale: jax.Array | None = None,
) -> QTensor:
    """A kernel (..., C, D) rounded to the nearest, a scale for each column's part.

    An odd number of axes means stacked layers in front. sizes: parts of the input axis that have a scale each, C in all. peak:
    (..., C), the inputs' largest absolute values, which a static scheme needs. scale: learned, in whose multiples what is beyond
    the largest integer is clipped; None: that of each part's largest value.
    ValueError when the parts are not those of the kernel, or there is no peak.
    """
    if scheme.static and peak is None:
        raise ValueError("static steps are made of what activations were seen to be: calibrate, and give peaks")
    parts, taps = scheme.layout(kernel.shape, sizes)
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    made = jnp.abs(scale) if scale is not None else _over(jnp.max, jnp.abs(kernel), parts, taps) / (scheme.top + 0.5)
    scale = _some(made)
    qvalue = jnp.clip(jnp.round(kernel / _spread(scale, parts)), -scheme.top, scheme.top)
    step = None
    if scheme.static and peak is not None:
        pieces = jnp.split(peak.astype(jnp.float32), np.cumsum(parts[:-1]), axis=-1)
        step = _some(jnp.stack([piece.max(-1) for piece in pieces], -1) / 127.5)
    qvalue = qvalue.astype(jnp.int8 if scheme.bits == 8 else jnp.int4)
    return QTensor(qvalue, scale.astype(jnp.float32), scheme.integer, tuple(sizes), step)


def first_scale(kernel: jax.Array, scheme: Scheme, sizes: tuple[int, ...] = ()) -> jax.Array:
    """What LSQ's scales start from (arXiv:1902.08153, section 2.1): 2 mean |w| / sqrt(top), float32. Arguments as `quantize`'s."""
    mean = _over(jnp.mean, jnp.abs(kernel.astype(jnp.float32)), *scheme.layout(kernel.shape, sizes))
    return _some(2 * mean / np.sqrt(scheme.top))


def _some(scale: jax.Array) -> jax.Array:
    """1 in the place of 0: what is all zeros has any scale."""
    return jnp.where(scale == 0, 1, scale)


def _over(function: Any, values: jax.Array, parts: tuple[int, ...], taps: tuple[int, ...]) -> jax.Array:
    """`jnp.max` or the like over each part of the input axis, and `taps`: (..., G, D)."""
    if len(set(parts)) == 1:
        *lead, _, D = values.shape
        grouped = values.reshape(*lead, len(parts), parts[0], D)
        return function(grouped, axis=(*taps, -2), keepdims=True).squeeze(-2)
    pieces = jnp.split(values, np.cumsum(parts[:-1]), axis=-2)
    return jnp.concatenate([function(piece, axis=(*taps, -2), keepdims=True) for piece in pieces], -2)


def _spread(scale: jax.Array, parts: Sequence[int]) -> jax.Array:
    """A scale for each input: (..., C, D); (..., 1, D) when all share one."""
    if len(parts) == 1:
        return scale
    if len(set(parts)) == 1:
        return jnp.repeat(scale, parts[0], axis=-2)
    rows = [
        jnp.broadcast_to(scale[..., i : i + 1, :], (*scale.shape[:-2], n, scale.shape[-1])) for i, n in enumerate(parts)
    ]
    return jnp.concatenate(rows, -2)


def spread(w: QTensor) -> jax.Array:
    """A scale for each input, (..., C, D); (..., 1, D) when all share one."""
    return _spread(w.scale, _parts(w))


def _parts(w: QTensor) -> tuple[int, ...]:
    G = w.scale.shape[-2]
    return w.sizes or (w.shape[-2] // G,) * G


def dequantize(w: QTensor, dtype: Any = jnp.float32) -> jax.Array:
    """The kernel in floats."""
    return w.qvalue.astype(dtype) * spread(w).astype(dtype)


def dot(x: Input, w: Kernel) -> jax.Array:
    """`x (..., C) @ w (C, D)` in x's dtype; activations are rounded by the kernel's own step, or by a scale a token.

    x: an array, or what the kernel `takes`.
    """
    return split_dot(x, w, 1)[0] if isinstance(x, Prologue) else _product(None, x, w)


def split_dot(x: Input, w: Kernel, parts: int) -> list[jax.Array]:
    """`dot` in so many equal parts of D. On a TPU each part has a product of its own, as in `product.split_product`; what
    comes in is rounded once for all."""
    if isinstance(x, Prologue):
        assert isinstance(w, QTensor)
        return _of_prologue(x, w, parts)
    if not isinstance(w, QTensor) or target.platform() != "tpu":
        return jnp.split(dot(x, w), parts, axis=-1)
    return [dot(x, column) for column in _columns(w, parts)]


def _columns(w: QTensor, parts: int) -> list[QTensor]:
    cut = partial(jnp.split, indices_or_sections=parts, axis=-1)
    columns = zip(cut(w.qvalue), cut(w.scale), strict=True)
    return [dataclasses.replace(w, qvalue=qvalue, scale=scale) for qvalue, scale in columns]


def takes(x: Prologue, w: Kernel) -> bool:
    """Whether the product is of integers that x can be made in: all inputs have the same step, or one a token."""
    if not isinstance(w, QTensor) or not is_integer(None, w):
        return False
    return w.scale.shape[-2] == 1 and x.rounds(w.step is not None)


def _of_prologue(x: Prologue, w: QTensor, parts: int) -> list[jax.Array]:
    """`split_dot` of what is rounded as it is made; where a gradient is taken, of floats."""

    def quick(x: Prologue, w: QTensor) -> list[jax.Array]:
        x_s8, *steps = x.integers(w.step)
        step, columns = steps[0] if steps else w.step, _columns(w, parts)
        sums = [_accumulate(None, x_s8, column.qvalue).astype(jnp.float32) for column in columns]
        return [(y * (step * column.scale)).astype(x.dtype) for y, column in zip(sums, columns, strict=True)]

    return quicker(quick, lambda x, w: split_dot(x.floats(), w, parts))(x, w)


def conv(x_BHWC: jax.Array, w: Kernel, strides: Sequence[int], padding: Any) -> jax.Array:
    """See `convolution.convolve`. Activations are rounded by a scale a pixel where the kernel is 1x1, else one a picture; they
    are not where the backend convolves no integers."""
    pads = (
        lax.padtype_to_pads(x_BHWC.shape[1:3], w.shape[:2], strides, padding) if isinstance(padding, str) else padding
    )
    return _product((tuple(strides), tuple((int(a), int(b)) for a, b in pads)), x_BHWC, w)


def take(w: QTensor, ids: jax.Array, dtype: Any) -> jax.Array:
    """Rows of a table."""
    scale = spread(w).astype(dtype)
    return jnp.take(w.qvalue, ids, axis=0).astype(dtype) * (
        scale[0] if len(scale) == 1 else jnp.take(scale, ids, axis=0)
    )


def _product(window: Window, x: jax.Array, w: Kernel) -> jax.Array:
    if isinstance(w, Observed):
        return _observed(window, w.see, x, w.w, w.found)
    if isinstance(w, Either):
        return lax.cond(w.on, lambda: _product(window, x, w.q), lambda: _float(window, x, w.w.astype(x.dtype)))
    if isinstance(w, Rounded):
        return _straight_through(window, w.scheme, w.sizes, x, w.w, w.scale)
    return _integer(window, x, w) if is_integer(window, w) else weight_only(window, x, w)


def is_integer(window: Window, w: QTensor) -> bool:
    """Whether this backend makes the product of integers."""
    return w.integer and (window is None or _pointwise(window, w) or has_integers())


def weight_only(window: Window, x: jax.Array, w: QTensor) -> jax.Array:
    """The product in floats: one row of scales meets what comes out, several meet the kernel."""
    if w.scale.size == w.shape[-1]:
        return _float(window, x, w.qvalue.astype(x.dtype)) * w.scale.reshape(-1).astype(x.dtype)
    return _float(window, x, dequantize(w, x.dtype))


def _float(window: Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return product(x, kernel) if window is None else convolve(x, kernel, *window)


def _pointwise(window: Window, w: QTensor) -> bool:
    return window == ((1, 1), ((0, 0), (0, 0))) and w.shape[:2] == (1, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _integer(window: Window, x: jax.Array, w: QTensor) -> jax.Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    total = jnp.zeros((), wide)
    for _, step, sums, scale in integer_parts(window, x, w):
        total += sums.astype(wide) * (step * scale)
    return total.astype(x.dtype)


def integer_parts(
    window: Window, x: jax.Array, w: QTensor
) -> Iterator[tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    """(x in int8, its step, int32 sums, the kernel's scales (D,)) of each part of the input axis: the product of integers is the
    sum of `sums * step * scales`."""
    qvalue, scale = w.qvalue, w.scale
    if window is not None and _pointwise(window, w):
        window, qvalue, scale = None, qvalue[0, 0], scale[0, 0]
    scale, start = scale.reshape(-1, w.shape[-1]), 0
    for row, size in enumerate(_parts(w)):
        part, axes = x[..., start : start + size], (-1,) if window is None else (1, 2, 3)
        x_s8, step = round_activations(part, axes, None if w.step is None else w.step[row])
        x_s8 = written(x_s8)
        yield x_s8, step, _accumulate(window, x_s8, qvalue[..., start : start + size, :]), scale[row]
        start += size


_integer.defvjp(
    lambda window, x, w: (_integer(window, x, w), (x, w)),
    lambda window, saved, g: jax.vjp(partial(weight_only, window), *saved)[1](g),
)


def round_activations(
    x: jax.Array, axes: tuple[int, ...], step: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(int8, step in at least fp32) with x near int8 * step, a step for all values over `axes`: NaN where they are not finite.

    step: one for all, fixed beforehand; what is beyond 127 of it is clipped, and NaN and infinity are not seen.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if step is None:
        step = step_of(jnp.abs(x).max(axes, keepdims=True))
    return nearest(x / step), step


def step_of(largest: jax.Array) -> jax.Array:
    """What values up to `largest` are rounded to multiples of: 1 of zeros, NaN where they are not finite."""
    return jnp.where(largest == 0, 1, jnp.where(largest == jnp.inf, jnp.nan, largest)) / 127.5


def nearest(x: jax.Array) -> jax.Array:
    """int8 in -127..127; halves to the even one."""
    return jnp.clip(jnp.round(x), -127, 127).astype(jnp.int8)


def _accumulate(window: Window, x_s8: jax.Array, kernel_s8: jax.Array) -> jax.Array:
    if window is None:
        axes = (((x_s8.ndim - 1,), (0,)), ((), ()))
        return lax.dot_general(x_s8, kernel_s8, axes, preferred_element_type=jnp.int32)
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x_s8, kernel_s8, *window, dimension_numbers=layout, preferred_element_type=jnp.int32
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _observed(window: Window, see: See, x: jax.Array, kernel: Any, found: Any) -> jax.Array:
    return _observe(window, see, x, kernel, found)[0]


def _observe(window: Window, see: See, x: jax.Array, kernel: Any, found: Any) -> tuple[jax.Array, Any]:
    y = _product(window, x, kernel) if isinstance(kernel, QTensor) else _float(window, x, kernel.astype(x.dtype))
    return y, (x, see(window, x, y))


# zeros of x, not None, by which what comes before would not be looked at
_observed.defvjp(_observe, lambda window, see, saved, g: (jnp.zeros_like(saved[0]), None, saved[1]))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _straight_through(
    window: Window, scheme: Scheme, sizes: tuple[int, ...], x: jax.Array, kernel: jax.Array, scale: jax.Array | None
) -> jax.Array:
    return _product(window, x, quantize(kernel, scheme, sizes, scale=scale))


def _straight_through_backward(
    window: Window, scheme: Scheme, sizes: tuple[int, ...], saved: tuple[Any, ...], g: jax.Array
) -> tuple[Any, ...]:
    x, kernel, scale = saved
    w = quantize(kernel, scheme, sizes, scale=scale)
    dx, dkernel = jax.vjp(partial(_float, window), x, dequantize(w, x.dtype))[1](g)
    dkernel = dkernel.astype(kernel.dtype)
    return (dx, dkernel, None) if scale is None else (dx, *_learn(dkernel, kernel, scale, scheme, sizes))


def _learn(
    g: jax.Array, kernel: jax.Array, scale: jax.Array, scheme: Scheme, sizes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """LSQ's gradients by a kernel and its scales, of the rounded kernel's g (arXiv:1902.08153, equations 3 to 5): by the kernel g
    where it is not clipped; by a scale the sum of g * (round(w / s) - w / s), or g times the largest integer where it is, over
    the square root of (weights of that scale) * (largest integer)."""
    parts, taps = scheme.layout(kernel.shape, sizes)
    exact = kernel / _spread(_some(jnp.abs(scale)), parts)
    whole, inside = jnp.clip(jnp.round(exact), -scheme.top, scheme.top), jnp.abs(exact) < scheme.top
    sums = _over(jnp.sum, g * jnp.where(inside, whole - exact, whole), parts, taps)
    counts = np.asarray(parts if len(set(parts)) > 1 else parts[:1])[:, None] * np.prod([kernel.shape[i] for i in taps])
    by_scale = jnp.sign(scale) * sums / np.sqrt(counts * scheme.top)
    return jnp.where(inside, g, 0), by_scale.astype(scale.dtype)


_straight_through.defvjp(
    lambda window, scheme, sizes, x, kernel, scale: (
        _straight_through(window, scheme, sizes, x, kernel, scale),
        (x, kernel, scale),
    ),
    _straight_through_backward,
)
