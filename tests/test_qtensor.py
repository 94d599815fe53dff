"""Integer kernels and their products against numpy in float64 and whole numbers; what the compiled programs hold."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import convolution, layers, qtensor, target, weights
from jdiff.qtensor import QTensor, Rounded, Scheme

W8, W8A8, W4 = Scheme(), Scheme(integer=True), Scheme(bits=4, group=8)
SCHEMES = {"w8": W8, "w8a8": W8A8, "w4": W4}
SHAPES = {"dense": (24, 20), "stacked": (3, 24, 20), "conv": (3, 3, 24, 20), "pointwise": (1, 1, 24, 20)}


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _float64(w):
    """What a QTensor stands for, by its fields' description alone."""
    parts = w.sizes or (w.shape[-2] // w.scale.shape[-2],) * w.scale.shape[-2]
    return np.asarray(w.qvalue, np.float64) * np.repeat(np.asarray(w.scale, np.float64), parts, axis=-2)


def _rounded(x, axes):
    """(whole numbers, step) of activations; in float32, since a half of it may round either way."""
    largest = np.abs(x).max(axes, keepdims=True)
    step = np.where(largest == 0, 1, largest).astype(np.float32) / np.float32(127.5)
    return np.clip(np.round(x / step), -127, 127).astype(np.int64), step.astype(np.float64)


def _conv64(x, kernel, strides=(1, 1), padding="SAME"):
    """A convolution as a sum over taps, in x's own type."""
    pads = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding) if padding == "SAME" else padding
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    h, w = (1 + (x.shape[1 + i] - kernel.shape[i]) // strides[i] for i in (0, 1))
    reads = (
        (kernel[i, j], x[:, i : i + h * strides[0] : strides[0], j : j + w * strides[1] : strides[1]])
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )
    return sum(read @ tap for tap, read in reads)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_kernels_are_rounded_to_the_nearest(scheme, shape):
    kernel = _normal(*shape) * np.geomspace(0.01, 10, shape[-1]).astype(np.float32)
    w = qtensor.quantize(jnp.asarray(kernel), scheme)
    taps = tuple(range(len(shape) % 2, len(shape) - 2)) if scheme.group is None else ()
    G, top = (shape[-2] // scheme.group if scheme.group else 1), 2 ** (scheme.bits - 1) - 1
    assert w.qvalue.shape == shape and w.qvalue.dtype == (jnp.int8 if scheme.bits == 8 else jnp.int4)
    grouped = kernel.astype(np.float64).reshape(*shape[:-2], G, shape[-2] // G, shape[-1])
    scale = np.abs(grouped).max((*taps, -2), keepdims=True) / (top + 0.5)
    np.testing.assert_allclose(w.scale, scale.squeeze(-2), rtol=1e-6)
    whole = np.asarray(w.qvalue, np.int64).reshape(grouped.shape)
    assert np.abs(whole).max() == top
    assert np.all(np.abs(whole * scale - grouped) <= scale * (0.5 + 1e-5))
    np.testing.assert_allclose(qtensor.dequantize(w), _float64(w), rtol=1e-6)


def test_parts_of_the_input_have_scales_of_their_own():
    kernel = _normal(3, 3, 24, 20)
    kernel[..., 16:, :] *= 50
    whole, parts = (qtensor.quantize(jnp.asarray(kernel), W8, sizes) for sizes in ((), (16, 8)))
    assert parts.scale.shape == (1, 1, 2, 20) and parts.sizes == (16, 8)
    np.testing.assert_allclose(parts.scale[0, 0, 0], np.abs(kernel[..., :16, :]).max((0, 1, 2)) / 127.5, rtol=1e-6)
    error = lambda w: np.square(_float64(w) - kernel)[..., :16, :].mean()  # noqa: E731
    assert error(parts) < error(whole) / 500
    with pytest.raises(ValueError, match=r"24 inputs, which parts of \[8, 9\] do not make up"):
        qtensor.quantize(jnp.asarray(kernel), W8, (9, 8))


def test_zeros_stay_zeros():
    kernel = np.zeros((24, 20), np.float32)
    for scheme in SCHEMES.values():
        np.testing.assert_array_equal(qtensor.dequantize(qtensor.quantize(jnp.asarray(kernel), scheme)), kernel)
        np.testing.assert_array_equal(weights.dot(jnp.zeros((2, 24)), qtensor.quantize(jnp.asarray(kernel), scheme)), 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_rounded_away(bad):
    x = _normal(3, 24)
    x[1, 5] = bad
    y = weights.dot(jnp.asarray(x), qtensor.quantize(jnp.asarray(_normal(24, 20, seed=1)), W8A8))
    np.testing.assert_array_equal(np.isfinite(y).all(-1), [True, False, True])


@pytest.mark.parametrize("sizes", [(), (16, 8)])
def test_integer_products(sizes):
    """Equal to whole numbers' products, a scale a token and a part."""
    x, kernel = _normal(2, 5, 24), _normal(24, 20, seed=1)
    x *= np.geomspace(0.01, 100, 5).astype(np.float32)[:, None]
    w = qtensor.quantize(jnp.asarray(kernel), W8A8, sizes)
    expected, start = 0, 0
    for row, size in enumerate(sizes or (24,)):
        whole, step = _rounded(x[..., start : start + size], -1)
        expected += (
            whole @ np.asarray(w.qvalue, np.int64)[start : start + size] * step * np.asarray(w.scale, np.float64)[row]
        )
        start += size
    np.testing.assert_allclose(weights.dot(jnp.asarray(x), w), expected, rtol=2e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("sizes", [(), (16, 8)])
@pytest.mark.parametrize(
    ("taps", "strides", "padding"),
    [(3, (1, 1), "SAME"), (3, (2, 2), ((0, 1), (0, 1))), (1, (1, 1), "SAME"), (1, (2, 2), "SAME")],
)
def test_integer_convolutions(taps, strides, padding, sizes):
    """A scale a picture, or a pixel where the kernel is 1x1."""
    x, kernel = _normal(2, 8, 6, 24), _normal(taps, taps, 24, 20, seed=1)
    x[1] *= 30
    w = qtensor.quantize(jnp.asarray(kernel), W8A8, sizes)
    axes = -1 if taps == 1 and strides == (1, 1) else (1, 2, 3)
    expected, start = 0, 0
    for row, size in enumerate(sizes or (24,)):
        whole, step = _rounded(x[..., start : start + size], axes)
        made = _conv64(whole, np.asarray(w.qvalue, np.int64)[..., start : start + size, :], strides, padding)
        expected += made * step * np.asarray(w.scale, np.float64)[0, 0, row]
        start += size
    found = weights.conv(jnp.asarray(x), w, strides, padding)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("scheme", [W8, W4], ids=["w8", "w4"])
@pytest.mark.parametrize("where", ["dense", "conv", "pointwise"])
def test_weight_only_products(scheme, where):
    w = qtensor.quantize(jnp.asarray(_normal(*SHAPES[where])), scheme)
    x = _normal(2, 5, 24) if where == "dense" else _normal(2, 8, 6, 24)
    if where == "dense":
        found, expected = weights.dot(jnp.asarray(x), w), x.astype(np.float64) @ _float64(w)
    else:
        found, expected = weights.conv(jnp.asarray(x), w), _conv64(x.astype(np.float64), _float64(w))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    ids = jnp.asarray([[0, 23], [8, 8]])
    if where == "dense":
        np.testing.assert_allclose(weights.take(w, ids, jnp.float32), _float64(w)[ids], rtol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_product_in_parts_is_the_product_split(scheme, platform):
    """With its gradient, and on a TPU with activations rounded once."""
    w, x = qtensor.quantize(_normal(24, 21), scheme), jnp.asarray(_normal(5, 24))
    split = lambda x: weights.split_dot(x, w, 3)  # noqa: E731
    with target.compiling_for(platform):
        parts, back = jax.vjp(split, x)
        whole, whole_back = jax.vjp(lambda x: weights.dot(x, w), x)
        rounded = jax.jit(split).lower(x).compile().as_text().count(" round-nearest-even(")
    np.testing.assert_allclose(jnp.concatenate(parts, -1), whole, rtol=1e-6, atol=1e-6)
    g = jnp.asarray(_normal(5, 21, seed=1))
    np.testing.assert_allclose(back(jnp.split(g, 3, -1))[0], whole_back(g)[0], rtol=1e-5, atol=1e-5)
    assert rounded == scheme.integer


def test_without_integer_convolutions_activations_stay_as_they_are(monkeypatch):
    """As on a GPU; 1x1 kernels are products, which it has."""
    monkeypatch.setattr(qtensor, "has_integers", lambda: False)
    x = jnp.asarray(_normal(2, 8, 6, 24))
    for taps in (3, 1):
        made = [qtensor.quantize(jnp.asarray(_normal(taps, taps, 24, 20)), scheme) for scheme in (W8, W8A8)]
        apart = np.abs(np.subtract(*(weights.conv(x, w) for w in made))).max()
        assert (apart == 0) == (taps == 3)


def test_the_error_is_that_of_rounding():
    """For normal numbers the relative square error is the sum of both sides' step^2 / 12."""
    x, kernel = _normal(512, 1024), _normal(1024, 256, seed=1)
    exact = x.astype(np.float64) @ kernel.astype(np.float64)
    step_x, step_w = (np.abs(a).max(axis, keepdims=True) / 127.5 for a, axis in ((x, 1), (kernel, 0)))
    found = {
        name: weights.dot(jnp.asarray(x), qtensor.quantize(jnp.asarray(kernel), s))
        for name, s in (("w8", W8), ("w8a8", W8A8))
    }
    error = {name: np.square(y - exact).mean() / np.square(exact).mean() for name, y in found.items()}
    np.testing.assert_allclose(error["w8"], np.mean(step_w**2) / 12, rtol=0.02)
    np.testing.assert_allclose(error["w8a8"], np.mean(step_w**2) / 12 + np.mean(step_x**2) / 12, rtol=0.02)


@pytest.mark.parametrize("where", ["dense", "conv", "pointwise"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("trained", [False, True])
def test_gradients_go_straight_through(scheme, where, trained):
    """In float64: by x, g times the dequantized kernel; by the kernel in training, x's product with g; by the scales, exact."""
    with jax.enable_x64(True):
        kernel = jnp.asarray(_normal(*SHAPES[where]), jnp.float64)
        x = jnp.asarray(_normal(2, 5, 24) if where == "dense" else _normal(2, 8, 6, 24), jnp.float64)
        product = weights.dot if where == "dense" else weights.conv
        reference = jnp.dot if where == "dense" else (lambda x, w: convolution._xla(x, w, (1, 1), "SAME"))
        q = qtensor.quantize(kernel, scheme)
        g = jnp.asarray(np.random.default_rng(3).normal(size=product(x, q).shape))
        dx, dkernel = jax.vjp(reference, x, jnp.asarray(_float64(q)))[1](g)
        if trained:
            found = jax.vjp(lambda x, w: product(x, Rounded(w, scheme)), x, kernel)[1](g)
            np.testing.assert_array_equal(product(x, Rounded(kernel, scheme)), product(x, q))
            np.testing.assert_allclose(found[1], dkernel, rtol=1e-12, atol=1e-12)
        else:
            found = jax.vjp(
                lambda x, scale: product(x, QTensor(q.qvalue, scale, q.integer)), x, q.scale.astype(jnp.float64)
            )[1](g)
            by_scale = jax.vjp(
                lambda scale: qtensor.dequantize(QTensor(q.qvalue, scale), jnp.float64), q.scale.astype(jnp.float64)
            )
            np.testing.assert_allclose(found[1], by_scale[1](dkernel)[0], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found[0], dx, rtol=1e-6, atol=1e-6 * np.abs(dx).max())


def _lsq64(x, g, kernel, scale, parts, top, taps_share):
    """LSQ by the paper's equations, one weight at a time, for y = sum over taps of x[tap] @ w[tap] and the gradient g by y.

    x: (taps, rows, C); g: (rows, D); kernel: (taps, C, D); scale: (taps or 1, G, D). Returns (dx, dkernel, dscale) in float64.
    """
    T, C, D = kernel.shape
    part_of = np.repeat(np.arange(len(parts)), parts)
    dx, dkernel, dscale, counts = (
        np.zeros(x.shape),
        np.zeros(kernel.shape),
        np.zeros(scale.shape),
        np.zeros(scale.shape),
    )
    for t, c, d in np.ndindex(T, C, D):
        at = (0 if taps_share else t, part_of[c], d)
        v, s = kernel[t, c, d], scale[at]
        whole = min(max(np.round(v / s), -top), top)
        by_rounded = x[t, :, c] @ g[:, d]
        dx[t, :, c] += g[:, d] * np.float64(np.float32(s)) * whole
        clipped = abs(v / s) >= top
        dkernel[t, c, d] = 0 if clipped else by_rounded
        dscale[at] += by_rounded * (whole if clipped else whole - v / s)
        counts[at] += 1
    return dx, dkernel, dscale / np.sqrt(counts * top)


@pytest.mark.parametrize("where", ["dense", "conv", "pointwise", "parts"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_learned_scales_have_lsqs_gradient(scheme, where):
    """In float64, by activations, kernel and scales; of all weights some are clipped."""
    sizes = (16, 8) if where == "parts" and not scheme.group else ()
    with jax.enable_x64(True):
        shape = SHAPES["dense" if where == "parts" else where]
        kernel = jnp.asarray(_normal(*shape), jnp.float64)
        scale = qtensor.first_scale(kernel, scheme, sizes).astype(jnp.float64)
        scale *= (0.7 if scheme.bits == 4 else 0.1) * (1 + 0.2 * np.abs(_normal(*scale.shape, seed=5)))
        x = jnp.asarray(_normal(10, 24) if len(shape) == 2 else _normal(2, 4, 3, 24), jnp.float64)
        product = weights.dot if len(shape) == 2 else weights.conv
        act = lambda x, kernel, scale: product(x, Rounded(kernel, scheme, sizes, scale))  # noqa: E731
        y, back = jax.vjp(act, x, kernel, scale)
        g = np.random.default_rng(3).normal(size=y.shape)
        dx, dkernel, dscale = map(np.asarray, back(jnp.asarray(g)))
        np.testing.assert_array_equal(y, product(x, qtensor.quantize(kernel, scheme, sizes, scale=scale)))
    if len(shape) == 2:
        read, unread = np.asarray(x)[None], lambda made: made[0]
    else:  # a convolution is a product with shifted pictures
        pad = shape[0] // 2
        padded = np.pad(np.asarray(x), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        windows = [(slice(None), slice(i, i + 4), slice(j, j + 3)) for i, j in np.ndindex(shape[:2])]
        read = np.stack([padded[w].reshape(-1, 24) for w in windows])

        def unread(made):
            total = np.zeros(padded.shape)
            for window, part in zip(windows, made, strict=True):
                total[window] += part.reshape(2, 4, 3, 24)
            return total[:, pad : pad + 4, pad : pad + 3]

    flat = lambda array: np.asarray(array).reshape(-1, *array.shape[-2:])  # noqa: E731
    parts = sizes or (scheme.group or 24,) * (24 // (scheme.group or 24))
    found = flat(kernel), flat(scale), parts, scheme.top, not scheme.group
    expected = _lsq64(read, g.reshape(-1, 20), *found)
    assert 0 < np.mean(expected[1] == 0) < 0.5
    np.testing.assert_allclose(dx, unread(expected[0]), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(flat(dkernel), expected[1], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(flat(dscale), expected[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_scales_start_as_lsqs_do(shape):
    kernel = _normal(*shape)
    taps = tuple(range(len(shape) % 2, len(shape) - 2))
    found = qtensor.first_scale(jnp.asarray(kernel), W8)
    expected = 2 * np.abs(kernel.astype(np.float64)).mean((*taps, -2), keepdims=True) / np.sqrt(127)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    groups = kernel.astype(np.float64).reshape(*shape[:-2], 3, 8, shape[-1])
    expected = 2 * np.abs(groups).mean(-2) / np.sqrt(7)
    np.testing.assert_allclose(qtensor.first_scale(jnp.asarray(kernel), W4), expected, rtol=1e-6)


def test_a_row_does_not_depend_on_the_others():
    w, kernel = (qtensor.quantize(jnp.asarray(_normal(*SHAPES[name])), W8A8) for name in ("dense", "conv"))
    x, pictures = jnp.asarray(_normal(4, 5, 24)), jnp.asarray(_normal(4, 8, 6, 24))
    loud = lambda x: x.at[1:].multiply(1000)  # noqa: E731
    np.testing.assert_array_equal(weights.dot(x, w)[0], weights.dot(loud(x), w)[0])
    np.testing.assert_array_equal(weights.conv(pictures, kernel)[0], weights.conv(loud(pictures), kernel)[0])


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(layers.Dense(x.shape[-1], use_bias=False, name="dense")(x)), None


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_scan_and_remat_take_them(scheme, trained, remat):
    depth, kernel, x = 3, jnp.asarray(_normal(3, 24, 24)), jnp.asarray(_normal(5, 24, seed=1))
    w = Rounded(kernel, scheme) if trained else qtensor.quantize(kernel, scheme)
    layer = nn.remat(_Layer, prevent_cse=False) if remat else _Layer
    stacked = nn.scan(layer, length=depth, variable_axes={"params": 0}, split_rngs={"params": True})()
    apply = lambda w, x: stacked.apply({"params": {"dense": {"kernel": w}}}, x, None)[0]  # noqa: E731

    def unrolled(w, x):
        for i in range(depth):
            x = jnp.tanh(weights.dot(x, jax.tree.map(lambda leaf, i=i: leaf[i], w)))
        return x

    for function in (lambda f: f, lambda f: jax.grad(lambda w, x: jnp.sum(jnp.sin(f(w, x))), 1)):
        np.testing.assert_allclose(jax.jit(function(apply))(w, x), function(unrolled)(w, x), rtol=1e-5, atol=1e-5)


def integer_products(text: str) -> tuple[int, int]:
    """(matrix products, convolutions) of int8 and int8 to int32 in a program's text."""
    types = dict(re.findall(r"(%?[\w.-]+) = (\w+)\[", text))
    found = {"dot": 0, "convolution": 0}
    for out, op, operands in re.findall(r"= (\w+)\[[^ ]* (dot|convolution)\(([^)]*)\)", text):
        names = [name.split()[-1] for name in operands.split(", ")]
        found[op] += out == "s32" and all(types.get(name) == "s8" for name in names)
    return found["dot"], found["convolution"]


@pytest.mark.parametrize(
    ("where", "scheme", "expected"),
    [
        ("dense", W8A8, (1, 0)),
        ("conv", W8A8, (0, 1)),
        ("pointwise", W8A8, (1, 0)),
        ("dense", W8, (0, 0)),
        ("conv", W8, (0, 0)),
    ],
)
def test_the_compiled_program_multiplies_integers(where, scheme, expected):
    w = qtensor.quantize(jnp.asarray(_normal(*SHAPES[where])), scheme)
    x = jnp.asarray(_normal(2, 5, 24) if where == "dense" else _normal(2, 8, 6, 24))
    compiled = jax.jit(weights.dot if where == "dense" else weights.conv).lower(x, w).compile()
    assert integer_products(compiled.as_text()) == expected


@pytest.mark.parametrize("where", ["dense", "conv"])
def test_so_does_a_tpus(where):
    """By XLA:TPU's own compiler, without a chip, where jax[tpu] is installed: it writes products as convolutions."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    shape = (640, 640) if where == "dense" else (3, 3, 640, 640)
    w = jax.eval_shape(lambda kernel: qtensor.quantize(kernel, W8A8), jax.ShapeDtypeStruct(shape, jnp.float32))
    x = jax.ShapeDtypeStruct((4, 256, 640) if where == "dense" else (4, 16, 16, 640), jnp.bfloat16)
    there = jax.sharding.SingleDeviceSharding(chip)
    x, w = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there), (x, w))
    compiled = jax.jit(weights.dot if where == "dense" else weights.conv).lower(x, w).compile()
    assert sum(integer_products(compiled.as_text())) == 1
