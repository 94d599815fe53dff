"""Weights that stand for arrays: QTensor, LoRAWeight and both, against dense arithmetic and through Flax."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import layers, tree, weights
from jdiff.weights import LoRAWeight, QTensor

IN, OUT, RANK = 12, 20, 3


def _normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _quantized(rng, *shape):
    qvalue = jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
    return QTensor(qvalue, jnp.asarray(rng.uniform(0.001, 0.02, (*shape[:-2], 1, shape[-1])), jnp.float32))


def _lora(rng, w, *stack):
    """An adapter for a kernel; `stack` are the leading axes of stacked layers, the same for all four parts."""
    spatial = w.shape[len(stack) : -2]
    a = _normal(rng, *stack, *spatial, w.shape[-2], RANK)
    return LoRAWeight(w, a, _normal(rng, *stack, RANK, w.shape[-1]), jnp.full(stack, 0.5, jnp.float32))


def _make(kind, *shape, stack=()):
    rng = np.random.default_rng(0)
    w = _quantized(rng, *stack, *shape) if "q" in kind else _normal(rng, *stack, *shape)
    return _lora(rng, w, *stack) if "lora" in kind else w


def _dense(w):
    """The kernel that a weight stands for, formed."""
    if isinstance(w, LoRAWeight):
        scale = w.scale.reshape(w.scale.shape + (1,) * (w.a.ndim - w.scale.ndim))
        b = w.b.reshape(w.b.shape[:-2] + (1,) * (w.a.ndim - w.b.ndim) + w.b.shape[-2:])
        return _dense(w.w) + scale * (w.a @ b)
    return w.qvalue.astype(jnp.float32) * w.scale if isinstance(w, QTensor) else w


KINDS = ["array", "q", "lora", "qlora"]


@pytest.mark.parametrize("kind", KINDS)
def test_dot(kind):
    w, x = _make(kind, IN, OUT), _normal(np.random.default_rng(1), 2, 5, IN)
    assert (w.shape, np.dtype(w.dtype)) == ((IN, OUT), np.float32)
    np.testing.assert_allclose(weights.dot(x, w), x @ _dense(w), rtol=1e-5, atol=1e-4)
    assert weights.dot(x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["array", "lora"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_conv(kind, strides):
    w, x = _make(kind, 3, 3, IN, OUT), _normal(np.random.default_rng(1), 2, 8, 6, IN)
    np.testing.assert_allclose(weights.conv(x, w, strides), weights.conv(x, _dense(w), strides), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("kind", ["q", "qlora"])
def test_conv_of_a_quantized_kernel(kind):
    """One scale a column of the whole kernel, shape (1, 1, 1, out)."""
    rng = np.random.default_rng(0)
    w = QTensor(
        _quantized(rng, 3, 3, IN, OUT).qvalue, jnp.asarray(rng.uniform(0.001, 0.02, (1, 1, 1, OUT)), jnp.float32)
    )
    w = _lora(rng, w) if kind == "qlora" else w
    x = _normal(rng, 2, 8, 6, IN)
    np.testing.assert_allclose(weights.conv(x, w), weights.conv(x, _dense(w)), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_take(kind):
    w, ids = _make(kind, IN, OUT), jnp.asarray([[0, 11], [3, 3]])
    found = weights.take(w, ids, jnp.float32)
    np.testing.assert_allclose(found, _dense(w)[ids], rtol=1e-5, atol=1e-5)
    assert weights.take(w, ids, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["q", "lora", "qlora"])
def test_weights_are_trees_with_named_leaves(kind):
    names = set(tree.flatten({"kernel": _make(kind, IN, OUT)}))
    expected = {
        "q": {"kernel/qvalue", "kernel/scale"},
        "lora": {f"kernel/{x}" for x in ("w", "a", "b", "scale")},
        "qlora": {"kernel/w/qvalue", "kernel/w/scale", "kernel/a", "kernel/b", "kernel/scale"},
    }
    assert names == expected[kind]


class _Layer(nn.Module):
    """A scan's body with one Dense of ours."""

    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(layers.Dense(x.shape[-1], name="dense")(x)), None


def _stack_axes():
    return {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_modules_take_them_as_parameters(kind):
    rng = np.random.default_rng(1)
    x, dense = _normal(rng, 2, IN), layers.Dense(OUT)
    w = _make(kind, IN, OUT)
    params = {"kernel": w, "bias": _normal(rng, OUT)}
    np.testing.assert_allclose(dense.apply({"params": params}, x), x @ _dense(w) + params["bias"], rtol=1e-5, atol=1e-4)
    ids = jnp.asarray([1, 0])
    found = layers.Embed(IN, OUT).apply({"params": {"embedding": w}}, ids)
    np.testing.assert_allclose(found, _dense(w)[ids], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remat", [False, True])
def test_scan_slices_them(kind, remat):
    depth, rng = 4, np.random.default_rng(1)
    x, bias = _normal(rng, 2, IN), _normal(rng, depth, IN)
    w = _make(kind, IN, IN, stack=(depth,))
    layer = nn.remat(_Layer, prevent_cse=False) if remat else _Layer
    stacked = nn.scan(layer, length=depth, **_stack_axes())()
    apply = lambda w: stacked.apply({"params": {"dense": {"kernel": w, "bias": bias}}}, x, None)[0]  # noqa: E731
    expected = x
    for i in range(depth):
        expected = jnp.tanh(expected @ _dense(w)[i] + bias[i])
    np.testing.assert_allclose(jax.jit(apply)(w), expected, rtol=1e-4, atol=1e-4)
    if "lora" in kind:  # the adapters' gradients pass through as well
        part = lambda a, b: apply(LoRAWeight(w.w, a, b, w.scale)).sum()  # noqa: E731
        form = lambda a, b: apply(_dense(LoRAWeight(w.w, a, b, w.scale))).sum()  # noqa: E731
        for found, formed in zip(jax.grad(part, (0, 1))(w.a, w.b), jax.grad(form, (0, 1))(w.a, w.b), strict=True):
            np.testing.assert_allclose(found, formed, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_slices_them(kind):
    depth, rng = 4, np.random.default_rng(1)
    x, w = _normal(rng, 2, IN), _make(kind, IN, OUT, stack=(depth,))
    many = nn.vmap(layers.Dense, in_axes=None, axis_size=depth, **_stack_axes())(OUT, use_bias=False)
    found = many.apply({"params": {"kernel": w}}, x)
    np.testing.assert_allclose(found, jnp.einsum("bi,zio->zbo", x, _dense(w)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_an_adapters_gradient_forms_no_kernel(kind):
    """Neither a @ b nor the frozen kernel's gradient is ever made: no product or sum has the kernel's shape."""
    w, x = _make(kind, IN, OUT), _normal(np.random.default_rng(1), 5, IN)

    def loss(adapters):
        return jnp.sum(jnp.sin(weights.dot(x, LoRAWeight(w.w, *adapters, w.scale))))

    compiled = jax.jit(jax.grad(loss)).lower((w.a, w.b))
    made = re.compile(rf"-> tensor<({IN}x{OUT}|{OUT}x{IN})xf32>")
    lines = [line for line in compiled.as_text().splitlines() if made.search(line)]
    assert not [line for line in lines if "dot_general" in line]
    if kind == "lora":
        assert not [line for line in lines if "transpose" not in line]
    formed = jax.grad(lambda adapters: jnp.sum(jnp.sin(x @ _dense(LoRAWeight(w.w, *adapters, w.scale)))))((w.a, w.b))
    for found, expected in zip(jax.grad(loss)((w.a, w.b)), formed, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_the_check_for_formed_kernels_can_fail():
    w, x = _make("lora", IN, OUT), _normal(np.random.default_rng(1), 5, IN)
    text = jax.jit(lambda a: x @ _dense(LoRAWeight(w.w, a, w.b, w.scale))).lower(w.a).as_text()
    assert re.search(rf"dot_general.*-> tensor<{IN}x{OUT}xf32>", text)
