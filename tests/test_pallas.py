"""Kernels for TPUs, interpreted, against PyTorch and plain formulas."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental import pallas

from jdiff import attention, layers, qtensor, sharding, target, weights
from jdiff.pallas import whole_attention


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """No TPU is at hand."""
    monkeypatch.setattr(pallas, "pallas_call", partial(pallas.pallas_call, interpret=True))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def torch_attention(*arrays):
    q, k, v = (torch.from_numpy(np.asarray(x, np.float32)).transpose(1, 2) for x in arrays)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).numpy()


def on_mesh(mesh, function, *arrays):
    """The function, and its arrays, on a mesh of (data, fsdp, tensor); as they are for None."""
    if mesh is None:
        return function, arrays
    made = sharding.make_mesh(*mesh, jax.devices()[: math.prod(mesh)])
    return sharding.in_use(made, function), jax.device_put(arrays, sharding.batch_sharding(made))


@pytest.mark.parametrize(
    ("L", "S", "N", "K", "mesh"),
    [(256, 256, 3, 72, None), (128, 256, 2, 64, None), (256, 128, 4, 40, (2, 1, 2)), (128, 128, 3, 72, (1, 2, 2))],
)
def test_whole_attention_equals_pytorch(L, S, N, K, mesh):
    """In floats and in integers; alone, and each device of a mesh with its rows, and its heads where they divide."""
    q, k, v = normal(2, L, N, K), normal(2, S, N, K, seed=1), normal(2, S, N, K, seed=2)
    expected = torch_attention(q, k, v)
    attend, arrays = on_mesh(mesh, attention.attention, q, k, v)
    step = jnp.float32(expected.max() / 100)
    rounded, _ = on_mesh(mesh, lambda *qkv: whole_attention.attend(*qkv, step))
    with target.compiling_for("tpu"):
        assert "whole_attention" in str(jax.make_jaxpr(attend)(*arrays))
        found, integers = jax.jit(attend)(*arrays), jax.jit(rounded)(*arrays)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=0, atol=0.02)
    assert np.square(np.asarray(found, np.float32) - expected).mean() < 1e-5 * np.square(expected).mean()
    assert integers.dtype == jnp.int8
    exact = expected.reshape(integers.shape) / float(step)
    assert np.abs(np.asarray(integers) - np.clip(exact, -127, 127)).max() < 1.1


def modulated_input(B, L, D):
    x = jnp.asarray(np.random.default_rng(0).normal(1, 3, (B, L, D)), jnp.bfloat16)
    return layers.Modulated(x, normal(B, D, seed=1), normal(B, D, seed=2), 1e-6)


def exact_modulated(m):
    x, shift, scale = (np.asarray(y, np.float64) for y in (m.x_BLD, m.shift_BD, m.scale_BD))
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + m.eps)
    return normed * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize(("B", "L", "mesh"), [(3, 64, None), (12, 32, None), (2, 512, None), (4, 96, (2, 1, 2))])
def test_modulated_integers_equal_float64(B, L, mesh):
    """Of rows fewer and more than a register's, in parts of a row, and on a mesh; by a step that some numbers are beyond."""
    m = modulated_input(B, L, 128)
    exact = exact_modulated(m) / 0.04
    assert np.abs(exact).max() > 127
    integers, (m,) = on_mesh(mesh, lambda m: m.integers(jnp.float32(0.04)), m)
    with target.compiling_for("tpu"):
        assert m.rounds()
        found = np.asarray(jax.jit(integers)(m))
    assert found.dtype == np.int8
    assert np.abs(found - np.clip(exact, -127, 127)).max() < 0.501


def static_kernel(inputs, outputs, peak):
    w = jnp.asarray(np.random.default_rng(5).normal(size=(inputs, outputs)), jnp.float32)
    return qtensor.quantize(w, qtensor.Scheme(integer=True, static=True), peak=jnp.full(inputs, peak, jnp.float32))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("what", ["modulated", "attended"])
def test_a_prologue_is_made_in_integers_for_an_integer_kernel(what, parts):
    """As near to the product of floats as when floats are rounded, and with the gradient that floats have."""
    if what == "modulated":
        x = modulated_input(2, 64, 128)
        exact = exact_modulated(x)
    else:
        qkv = [normal(2, 128, 2, 64, seed=i) for i in range(3)]
        x = attention.Attended(*qkv)
        exact = torch_attention(*qkv).reshape(x.shape)
    w = static_kernel(128, 96, np.abs(exact).max())
    expected = exact @ np.asarray(qtensor.dequantize(w), np.float64)
    value = lambda x: sum((y.astype(jnp.float32) ** 2).sum() for y in weights.split_dot(x, w, parts))  # noqa: E731
    plain = lambda x: value(x.floats())  # noqa: E731
    with target.compiling_for("tpu"):
        assert "pallas_call" in str(jax.make_jaxpr(lambda x: weights.split_dot(x, w, parts))(x))
        found, rounded = (
            np.concatenate(jax.jit(lambda x: weights.split_dot(x, w, parts))(each), -1).astype(np.float64)
            for each in (x, x.floats())
        )
        assert "pallas_call" not in str(jax.make_jaxpr(jax.grad(value))(x))
        gradients = jax.jit(jax.grad(value))(x), jax.jit(jax.grad(plain))(x)
    assert found.shape == expected.shape
    error = np.square(rounded - expected).mean()
    assert 0 < error < 1e-3 * np.square(expected).mean()
    assert np.square(found - expected).mean() < 1.02 * error
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["float", "dynamic", "weight-only", "adapter", "fp32"])
def test_a_prologue_is_made_in_floats_for_all_others(kind):
    m = modulated_input(2, 64, 128)
    if kind == "fp32":
        m = jax.tree.map(lambda x: x.astype(jnp.float32), m)
    w = static_kernel(128, 96, 10.0)
    dense = qtensor.dequantize(w)
    kernel = {
        "float": dense,
        "dynamic": qtensor.quantize(dense, qtensor.Scheme(integer=True)),
        "weight-only": qtensor.quantize(dense, qtensor.Scheme()),
        "adapter": weights.LoRAWeight(w, jnp.ones((128, 2)), jnp.ones((2, 96)), jnp.float32(1)),
        "fp32": w,
    }[kind]
    with target.compiling_for("tpu"):
        assert "pallas_call" not in str(jax.make_jaxpr(lambda m: weights.dot(m, kernel))(m))
        np.testing.assert_array_equal(weights.dot(m, kernel), weights.dot(m.floats(), kernel))
