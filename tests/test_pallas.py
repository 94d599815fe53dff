"""Kernels for TPUs, interpreted, against PyTorch and plain formulas."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental import pallas

import jdiff
from jdiff import attention, layers, qtensor, quant, sharding, target, weights
from jdiff.pallas import integers, whole_attention


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
    rounded, _ = on_mesh(mesh, lambda *qkv: whole_attention.rounded(*qkv, step)[0])
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
    integers, (m,) = on_mesh(mesh, lambda m: m.integers(jnp.float32(0.04))[0], m)
    with target.compiling_for("tpu"):
        assert m.rounds(True)
        found = np.asarray(jax.jit(integers)(m))
    assert found.dtype == np.int8
    assert np.abs(found - np.clip(exact, -127, 127)).max() < 0.501


def kernel_of(inputs, outputs, peak):
    """Of integers; peak: the inputs' largest value, None for steps found as they come."""
    w = jnp.asarray(np.random.default_rng(5).normal(size=(inputs, outputs)), jnp.float32)
    scheme = qtensor.Scheme(integer=True, static=peak is not None)
    return qtensor.quantize(w, scheme, peak=None if peak is None else jnp.full(inputs, peak, jnp.float32))


def prologue(what):
    """One of (2, 128, 128) and its values in fp32 or more."""
    if what == "modulated":
        m = modulated_input(2, 128, 128)
        return m, exact_modulated(m)
    if what == "activated":
        x = normal(2, 128, 128) * 3
        gelu = torch.nn.functional.gelu(torch.from_numpy(np.asarray(x, np.float32)), approximate="tanh")
        return layers.Activated(x), gelu.numpy()
    qkv = [normal(2, 128, 2, 64, seed=i) for i in range(3)]
    exact = torch_attention(*qkv).reshape(2, 128, 128)
    return attention.Attended(*qkv) if what == "attended" else attention.JoinedAttended(side_by_side(*qkv), 2), exact


def side_by_side(*arrays):
    """(B, L, N, K) each -> (B, L, 3 N K)."""
    return jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in arrays], -1)


@pytest.mark.parametrize("mesh", [None, (2, 1, 1), (1, 1, 2)])
def test_joined_attention_is_that_of_its_parts(mesh):
    """Read where one product left them, unless devices share out the heads; with the gradient of parts."""
    qkv = [normal(2, 128, 4, 32, seed=i) for i in range(3)]
    attend = lambda joined: attention.JoinedAttended(joined, 4).floats()  # noqa: E731
    joined, (array,) = on_mesh(mesh, attend, side_by_side(*qkv))
    square = lambda *args: (attention.Attended(*args).floats().astype(jnp.float32) ** 2).sum()  # noqa: E731
    with target.compiling_for("tpu"):
        text = str(jax.make_jaxpr(joined)(array))
        assert "whole_attention" in text and ("split" in text) == (mesh == (1, 1, 2))
        found = jax.jit(joined)(array)
        gradient = jax.grad(lambda joined: (attend(joined).astype(jnp.float32) ** 2).sum())(side_by_side(*qkv))
        expected = jax.grad(square, (0, 1, 2))(*qkv)
    np.testing.assert_allclose(
        np.asarray(found, np.float32), torch_attention(*qkv).reshape(found.shape), rtol=0, atol=0.02
    )
    np.testing.assert_array_equal(gradient, side_by_side(*expected))


@pytest.mark.parametrize("mesh", [None, (2, 1, 2)])
@pytest.mark.parametrize(
    ("what", "fixed"),
    # what is activated XLA:TPU rounds by a fixed step behind the product before
    [(what, fixed) for what in ("modulated", "attended", "joined") for fixed in (True, False)] + [("activated", False)],
)
def test_a_prologue_is_made_in_integers_for_an_integer_kernel(what, fixed, mesh):
    """As near to the exact product as when floats are rounded, whole and in parts; with the gradient that floats have."""
    x, exact = prologue(what)
    w = kernel_of(128, 96, np.abs(exact).max() if fixed else None)
    expected = exact @ np.asarray(qtensor.dequantize(w), np.float64)
    products = lambda x: [weights.dot(x, w), *weights.split_dot(x, w, 3)]  # noqa: E731
    value = lambda x: sum((y.astype(jnp.float32) ** 2).sum() for y in products(x))  # noqa: E731
    plain = lambda x: value(x.floats())  # noqa: E731
    on_devices, (there,) = on_mesh(mesh, products, x)
    with target.compiling_for("tpu"):
        assert "pallas_call" in str(jax.make_jaxpr(products)(x))
        found, rounded = jax.jit(on_devices)(there), jax.jit(products)(x.floats())
        assert "pallas_call" not in str(jax.make_jaxpr(jax.grad(value))(x))
        gradients = jax.jit(jax.grad(value))(x), jax.jit(jax.grad(plain))(x)
    for made, usual in zip(*([y[0], jnp.concatenate(y[1:], -1)] for y in (found, rounded)), strict=True):
        error, least = (np.square(np.asarray(y, np.float64) - expected).mean() for y in (made, usual))
        assert made.shape == expected.shape and 0 < least < 1e-3 * np.square(expected).mean()
        assert error < 1.02 * least
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        one, other = (np.asarray(g, np.float64) for g in (one, other))
        assert np.linalg.norm(one - other) < 5e-3 * np.linalg.norm(other)  # bfloat16, added up in another order


def test_a_tokens_step_is_nan_where_it_is_not_finite_and_zeros_stay():
    x = normal(1, 32, 128).at[0, 3, 5].set(jnp.inf).at[0, 7].set(0)
    with target.compiling_for("tpu"):
        found, step = layers.Activated(x).integers(None)
    bad = np.isnan(np.asarray(step[0, :, 0]))
    assert [*np.flatnonzero(bad)] == [3] and not np.asarray(found[0, 7]).any()
    assert (np.abs(np.asarray(found[0])[~bad]).max(-1) == 127).sum() == 30


def test_what_does_not_fit_into_vector_memory_is_left_to_the_compiler():
    row = lambda L, N, K: jax.ShapeDtypeStruct((2, L, N, K), jnp.bfloat16)  # noqa: E731
    sizes = {
        (256, 16, 72): True,
        (384, 8, 160): True,
        (256, 32, 128): False,
        (512, 16, 128): False,
        (640, 2, 64): False,
    }
    assert {size: whole_attention.takes(row(*size), row(*size)) for size in sizes} == sizes
    tokens = lambda D: jax.ShapeDtypeStruct((2, 64, D), jnp.bfloat16)  # noqa: E731
    assert integers.takes(tokens(2**15)) and not integers.takes(tokens(2**16))


@pytest.mark.parametrize("kind", ["float", "weight-only", "adapter", "fp32"])
def test_a_prologue_is_made_in_floats_for_all_others(kind):
    m = modulated_input(2, 64, 128)
    if kind == "fp32":
        m = jax.tree.map(lambda x: x.astype(jnp.float32), m)
    w = kernel_of(128, 96, 10.0)
    dense = qtensor.dequantize(w)
    kernel = {
        "float": dense,
        "weight-only": qtensor.quantize(dense, qtensor.Scheme()),
        "adapter": weights.LoRAWeight(w, jnp.ones((128, 2)), jnp.ones((2, 96)), jnp.float32(1)),
        "fp32": w,
    }[kind]
    with target.compiling_for("tpu"):
        assert "pallas_call" not in str(jax.make_jaxpr(lambda m: weights.dot(m, kernel))(m))
        np.testing.assert_array_equal(weights.dot(m, kernel), weights.dot(m.floats(), kernel))


def test_a_dit_samples_by_kernels_and_trains_without(monkeypatch):
    """As near to the model in fp32 as without kernels, in floats and in integers; no gradient goes through one."""
    sizes = {"image_size": 32, "depth": 2, "width": 128, "heads": 2, "num_classes": 10}
    model = jdiff.create("DiT-S/2", dtype=jnp.bfloat16, **sizes)
    inputs = normal(4, 32, 32, 4).astype(jnp.float32), jnp.asarray([3.0, 200.0, 500.0, 800.0]), jnp.arange(4)
    start = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.1, p.shape), p.dtype), start)
    exact = jax.jit(jdiff.create("DiT-S/2", **sizes).apply)({"params": params}, *inputs)
    apply = lambda p: model.apply({"params": p}, *inputs).astype(jnp.float32)  # noqa: E731
    rules = quant.find_recipe("w8a8-static")["dit"]
    peaks = jax.jit(lambda p: quant.observe(apply, p, quant.choose(p, rules)))(params)
    static = jax.jit(lambda p: quant.quantize(p, rules, peaks=peaks))(params)
    error = lambda p: float(np.square(jax.jit(lambda p: apply(p))(p) - exact).mean() / np.square(exact).mean())  # noqa: E731
    with target.compiling_for("tpu"):
        for tree, kernels in ((params, {"whole_attention"}), (static, {"whole_attention", "modulated"})):
            assert set(re.findall(r"jaxpr=(whole_attention|modulated)", str(jax.make_jaxpr(apply)(tree)))) == kernels
        found = [error(p) for p in (params, static)]
        gradient = jax.make_jaxpr(jax.grad(lambda p: (apply(p) ** 2).sum()))(params)
        assert "pallas_call" not in str(gradient)
        monkeypatch.setattr(whole_attention, "_takes", lambda *args: False)
        monkeypatch.setattr(layers.Modulated, "rounds", lambda self, fixed: False)
        plain = [error(p) for p in (params, static)]
    assert all(0 < one < 1.05 * other < 1e-2 for one, other in zip(found, plain, strict=True)), (found, plain)
