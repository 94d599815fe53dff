"""The matrix product's gradients are autodiff's, and its copies are of what is narrow."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import target
from jdiff.product import product, split_product, written

SHAPES = [
    ((5, 7, 12), (12, 20)),
    ((5, 7, 20), (20, 12)),
    ((35, 12), (12, 12)),
    ((12,), (12, 20)),
    ((2, 3, 4, 9), (9, 2)),
]


def _arrays(shapes, dtype=np.float64):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape).astype(dtype)) for shape in shapes)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_gradients_equal_autodiff(shapes):
    with jax.enable_x64(True):
        x, kernel = _arrays(shapes)
        found, back = jax.vjp(product, x, kernel)
        expected, plain_back = jax.vjp(jnp.dot, x, kernel)
        np.testing.assert_array_equal(found, expected)
        g = jnp.cos(jnp.arange(expected.size, dtype=expected.dtype)).reshape(expected.shape)
        for ours, theirs in zip(back(g), plain_back(g), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-13)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_product_in_parts_is_the_product_split(platform):
    with jax.enable_x64(True), target.compiling_for(platform):
        x, kernel, g = _arrays(((5, 7, 12), (12, 21), (5, 7, 21)))
        found, back = jax.vjp(lambda x, kernel: split_product(x, kernel, 3), x, kernel)
        expected, plain_back = jax.vjp(jnp.dot, x, kernel)
        np.testing.assert_allclose(jnp.concatenate(found, -1), expected, atol=1e-13)
        for ours, theirs in zip(back(jnp.split(g, 3, -1)), plain_back(g), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-13)


def test_what_is_written_first_is_so_on_a_tpu_and_where_no_gradient_is_taken():
    barrier = lambda function: "optimization_barrier" in jax.jit(function).lower(jnp.ones(3)).as_text()  # noqa: E731
    twice = lambda x: 2 * written(3 * x)  # noqa: E731
    assert not barrier(twice)
    with target.compiling_for("tpu"):
        assert barrier(twice)
        assert not barrier(jax.grad(lambda x: twice(x).sum()))
        np.testing.assert_array_equal(twice(jnp.ones(3)), 6)
        np.testing.assert_array_equal(jax.grad(lambda x: twice(x).sum())(jnp.ones(3)), 6)


def test_gradients_under_vmap_and_in_bfloat16():
    x, kernel = _arrays(((3, 16, 8), (3, 8, 4)), np.float32)
    summed = lambda dot, x, kernel: jnp.sin(jax.vmap(dot)(x, kernel)).sum()  # noqa: E731
    for ours, theirs in zip(*(jax.grad(summed, (1, 2))(dot, x, kernel) for dot in (product, jnp.dot)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    low = x[0].astype(jnp.bfloat16), kernel[0].astype(jnp.bfloat16)
    assert {y.dtype for y in jax.grad(lambda *a: product(*a).sum(), (0, 1))(*low)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(("inputs", "outputs"), [(96, 320), (320, 96)])
def test_the_narrower_operand_is_the_one_that_is_copied(inputs, outputs):
    rows, shapes = 640, [jax.ShapeDtypeStruct((4, 160, width), jnp.float32) for width in (inputs, outputs)]
    gradient = jax.jit(lambda x, g: jax.vjp(product, x, jnp.zeros((inputs, outputs)))[1](g)[1])
    text = gradient.lower(*shapes).compile().as_text()
    transposed = {int(n) for n in re.findall(rf"f32\[(\d+),{rows}\]", text)}
    assert transposed == {96}, text
