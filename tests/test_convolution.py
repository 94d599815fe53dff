"""Convolutions by products equal XLA's own, forward and backward, whichever way is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import convolution
from jdiff.convolution import convolve

CASES = [
    # B, H, W, kernel, strides, padding, channels, features
    (2, 8, 8, (3, 3), (1, 1), "SAME", 5, 7),
    (2, 9, 7, (3, 3), (2, 2), ((1, 1), (1, 1)), 5, 7),
    (1, 9, 9, (3, 3), (2, 2), ((0, 1), (0, 1)), 5, 7),
    (2, 8, 12, (2, 2), (2, 2), "VALID", 5, 7),
    (2, 7, 8, (1, 1), (1, 1), "VALID", 5, 7),
    (2, 7, 8, (1, 1), (2, 2), "VALID", 20, 7),
    (2, 6, 6, (4, 1), (1, 1), "SAME", 20, 18),
    (2, 19, 19, (3, 3), (3, 2), ((2, 0), (0, 2)), 20, 18),  # rows that no tap reads
    (2, 24, 24, (3, 3), (1, 1), "SAME", 20, 18),  # more than SOME_PIXELS
    (2, 24, 24, (3, 3), (1, 1), "SAME", 3, 18),
    (2, 24, 24, (3, 3), (1, 1), "SAME", 20, 3),
    (2, 48, 48, (3, 3), (2, 2), ((1, 1), (1, 1)), 20, 3),
    (2, 36, 36, (3, 3), (1, 1), "SAME", 4, 5),  # neither wide nor narrow, of many pixels
    (2, 12, 12, (3, 3), (1, 1), "SAME", 4, 5),
    (2, 18, 20, (3, 3), (1, 1), "SAME", 20, 18),  # between FEW_PIXELS and SOME_PIXELS
]


def _arrays(case):
    B, H, W, size, _, _, channels, features = case
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(B, H, W, channels))), jnp.asarray(rng.normal(size=(*size, channels, features)))


def _plain(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """So that small arrays go every way."""
    for name, value in {"WIDE": 30, "NARROW": 9, "FEW_CHANNELS": 4, "MANY_PIXELS": 2000}.items():
        monkeypatch.setattr(convolution, name, value)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_plain_convolution(case):
    with jax.enable_x64(True):
        x, kernel = _arrays(case)
        found, back = jax.vjp(lambda x, k: convolve(x, k, *case[4:6]), x, kernel)
        expected, plain_back = jax.vjp(lambda x, k: _plain(x, k, *case[4:6]), x, kernel)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        g = jnp.cos(jnp.arange(expected.size, dtype=expected.dtype)).reshape(expected.shape)
        for ours, theirs in zip(back(g), plain_back(g), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-11)


@pytest.mark.parametrize("case", [CASES[0], CASES[8]], ids=str)
def test_bf16_is_summed_in_fp32(case):
    """Taps that add up in bf16 would be off by several units of its last place."""
    x, kernel = (a.astype(jnp.bfloat16) for a in _arrays(case))
    found, back = jax.vjp(lambda x, k: convolve(x, k, *case[4:6]), x, kernel)
    assert found.dtype == jnp.bfloat16
    wide, wide_back = jax.vjp(lambda x, k: _plain(x, k, *case[4:6]), x.astype(jnp.float32), kernel.astype(jnp.float32))
    g = jnp.ones(found.shape, jnp.bfloat16)
    for ours, theirs in zip(back(g), wide_back(g.astype(jnp.float32)), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(found.astype(jnp.float32), wide, rtol=2**-8, atol=0.02)


def test_no_kernel_is_transposed_for_the_gradient_of_the_input():
    """Which XLA:CPU does, at 0.4 GB/s."""
    x, kernel = jnp.zeros((1, 8, 8, 40)), jnp.zeros((3, 3, 40, 48))
    gradient = jax.jit(jax.grad(lambda x: convolve(x, kernel).sum()))
    text = gradient.lower(x).compile().as_text()
    assert "reverse(" not in text and "convolution(" not in text


def test_limits_are_reached(monkeypatch):
    """Every way is taken by some case above."""
    taken, ways = set(), {"_xla", "_rows", "_input_gradient", "_reads", "_put"}
    for name in ways:
        inner = getattr(convolution, name)
        monkeypatch.setattr(
            convolution, name, lambda *args, _name=name, _inner=inner, **kw: (taken.add(_name), _inner(*args, **kw))[1]
        )
    for case in CASES:
        x, kernel = _arrays(case)
        jax.eval_shape(jax.grad(lambda k, x=x, case=case: convolve(x, k, *case[4:6]).sum()), kernel)
    assert taken == ways
