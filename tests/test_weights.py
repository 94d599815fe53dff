"""Weights that stand for arrays: QTensor, LoRAWeight and both, against dense arithmetic and through Flax."""

import dataclasses
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


def _lora(rng, w, *stack, **parts):
    """An adapter for a kernel; `stack` are the leading axes of stacked layers, the same for all its parts."""
    spatial = w.shape[len(stack) : -2]
    a = _normal(rng, *stack, *spatial, w.shape[-2], RANK)
    return LoRAWeight(w, a, _normal(rng, *stack, RANK, w.shape[-1]), jnp.full(stack, 0.5, jnp.float32), **parts)


def _dora(rng, w, *stack):
    return _lora(rng, w, *stack, magnitude=jnp.asarray(rng.uniform(1, 9, (*stack, w.shape[-1])), jnp.float32))


def _make(kind, *shape, stack=()):
    """nested: an adapter with a strength and a scale a rank, around a DoRA, around another adapter."""
    rng = np.random.default_rng(0)
    w = _quantized(rng, *stack, *shape) if "q" in kind else _normal(rng, *stack, *shape)
    if "nested" in kind:
        w = _dora(rng, _lora(rng, w, *stack), *stack)
        scale = jnp.broadcast_to(jnp.asarray([0.5, -1.0, 2.0]), (*stack, RANK))
        return dataclasses.replace(_lora(rng, w, *stack, strength=jnp.full(stack, 0.7)), scale=scale)
    if "dora" in kind:
        return _dora(rng, w, *stack)
    return _lora(rng, w, *stack) if "lora" in kind else w


def _dense(w):
    """The kernel that a weight stands for, formed; DoRA's norm is no function of the factors."""
    w0, adapters = weights.unwrap(w)
    total = w0 = w0.qvalue.astype(jnp.float32) * w0.scale if isinstance(w0, QTensor) else w0
    for lora in adapters:
        stack = lora.b.shape[:-2]
        spatial = (1,) * (w0.ndim - 2 - len(stack))
        scale = lora.scale.reshape(*stack, *spatial, 1, -1)
        change = (lora.a * scale) @ lora.b.reshape(*stack, *spatial, *lora.b.shape[-2:])
        if lora.magnitude is not None:
            fan = tuple(range(len(stack), w0.ndim - 1))
            norm = jax.lax.stop_gradient(jnp.linalg.norm((w0 + change).reshape(*stack, -1, w0.shape[-1]), axis=-2))
            norm, magnitude = (jnp.expand_dims(x, fan) for x in (norm, lora.magnitude))
            change = magnitude / norm * (w0 + change) - w0
        strength = 1.0 if lora.strength is None else lora.strength.reshape(*stack, *spatial, 1, 1)
        total += strength * change
    return total


KINDS = ["array", "q", "lora", "qlora", "qdora", "nested"]


@pytest.mark.parametrize("kind", KINDS)
def test_dot(kind):
    w, x = _make(kind, IN, OUT), _normal(np.random.default_rng(1), 2, 5, IN)
    assert (w.shape, np.dtype(w.dtype)) == ((IN, OUT), np.float32)
    np.testing.assert_allclose(weights.dot(x, w), x @ _dense(w), rtol=1e-5, atol=1e-4)
    assert weights.dot(x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["array", "lora", "dora", "nested"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_conv(kind, strides):
    w, x = _make(kind, 3, 3, IN, OUT), _normal(np.random.default_rng(1), 2, 8, 6, IN)
    np.testing.assert_allclose(weights.conv(x, w, strides), weights.conv(x, _dense(w), strides), rtol=1e-5, atol=2e-4)
    assert weights.conv(x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["q", "qlora", "qdora"])
def test_conv_of_a_quantized_kernel(kind):
    """One scale a column of the whole kernel, shape (1, 1, 1, out)."""
    rng = np.random.default_rng(0)
    w = QTensor(
        _quantized(rng, 3, 3, IN, OUT).qvalue, jnp.asarray(rng.uniform(0.001, 0.02, (1, 1, 1, OUT)), jnp.float32)
    )
    w = {"q": lambda rng, w: w, "qlora": _lora, "qdora": _dora}[kind](rng, w)
    x = _normal(rng, 2, 8, 6, IN)
    np.testing.assert_allclose(weights.conv(x, w), weights.conv(x, _dense(w)), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_take(kind):
    w, ids = _make(kind, IN, OUT), jnp.asarray([[0, 11], [3, 3]])
    found = weights.take(w, ids, jnp.float32)
    np.testing.assert_allclose(found, _dense(w)[ids], rtol=1e-5, atol=1e-5)
    assert weights.take(w, ids, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["q", "lora", "qlora", "nested"])
def test_weights_are_trees_with_named_leaves(kind):
    names = set(tree.flatten({"kernel": _make(kind, IN, OUT)}))
    adapter = ("w", "a", "b", "scale")
    expected = {
        "q": {"kernel/qvalue", "kernel/scale"},
        "lora": {f"kernel/{x}" for x in adapter},
        "qlora": {"kernel/w/qvalue", "kernel/w/scale", "kernel/a", "kernel/b", "kernel/scale"},
        "nested": {f"kernel/{x}" for x in ("a", "b", "scale", "strength")}
        | {f"kernel/w/{x}" for x in ("a", "b", "scale", "magnitude")}
        | {f"kernel/w/w/{x}" for x in adapter},
    }
    assert names == expected[kind]


class _Layer(nn.Module):
    """A scan's body with one Dense of ours."""

    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(layers.Dense(x.shape[-1], name="dense")(x)), None


def _stack_axes():
    return {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


def _scanned(depth, x, bias, remat=False):
    """A function from a stacked kernel to `depth` layers' output."""
    layer = nn.remat(_Layer, prevent_cse=False) if remat else _Layer
    stacked = nn.scan(layer, length=depth, **_stack_axes())()
    return lambda w: stacked.apply({"params": {"dense": {"kernel": w, "bias": bias}}}, x, None)[0]


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
    apply = _scanned(depth, x, bias, remat)
    expected = x
    for i in range(depth):
        expected = jnp.tanh(expected @ _dense(w)[i] + bias[i])
    np.testing.assert_allclose(jax.jit(apply)(w), expected, rtol=1e-4, atol=1e-4)
    if "lora" in kind or "dora" in kind:  # the adapters' gradients pass through as well
        trained = {name: getattr(w, name) for name in ("a", "b", "magnitude") if getattr(w, name) is not None}
        loss = lambda form, parts: apply(form(dataclasses.replace(w, **parts))).sum()  # noqa: E731
        found, formed = (jax.jit(jax.grad(loss, 1), static_argnums=0)(form, trained) for form in (lambda w: w, _dense))
        for name in trained:
            np.testing.assert_allclose(found[name], formed[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_slices_them(kind):
    depth, rng = 4, np.random.default_rng(1)
    x, w = _normal(rng, 2, IN), _make(kind, IN, OUT, stack=(depth,))
    many = nn.vmap(layers.Dense, in_axes=None, axis_size=depth, **_stack_axes())(OUT, use_bias=False)
    found = many.apply({"params": {"kernel": w}}, x)
    np.testing.assert_allclose(found, jnp.einsum("bi,zio->zbo", x, _dense(w)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora", "qdora"])
def test_strength_zero_is_the_kernel_bit_by_bit(kind):
    w, x = _make(kind, IN, OUT), _normal(np.random.default_rng(1), 5, IN)
    off = dataclasses.replace(w, strength=jnp.float32(0))
    np.testing.assert_array_equal(weights.dot(x, off), weights.dot(x, w.w))
    assert np.abs(weights.dot(x, w) - weights.dot(x, w.w)).max() > 1


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_drops_from_the_adapters_input_alone(kind):
    """What is dropped is the input of `a`, and of DoRA's rescaled kernel; the rest grows by 1 / (1 - rate)."""
    w, x, key, rate = _make(kind, IN, OUT), _normal(np.random.default_rng(1), 400, IN), jax.random.key(3), 0.25
    dropping = dataclasses.replace(w, key=jax.random.key_data(key), rate=rate)
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    assert abs(kept.mean() - 0.75) < 0.02
    expected = x @ w.w + (x * kept / (1 - rate)) @ (_dense(w) - w.w)
    np.testing.assert_allclose(weights.dot(x, dropping), expected, rtol=1e-4, atol=1e-3)


def test_tables_drop_nothing():
    w, ids = _make("lora", IN, OUT), jnp.arange(IN)
    dropping = dataclasses.replace(w, key=jax.random.key_data(jax.random.key(0)), rate=0.5)
    np.testing.assert_array_equal(weights.take(dropping, ids, jnp.float32), weights.take(w, ids, jnp.float32))


def test_stacked_layers_drop_by_keys_of_their_own():
    depth, rng, rate = 3, np.random.default_rng(1), 0.5
    x, w = _normal(rng, 5, IN), _make("lora", IN, IN, stack=(depth,))
    keys = jax.random.split(jax.random.key(1), depth)
    dropping = dataclasses.replace(w, key=jax.random.key_data(keys), rate=rate)
    expected = x
    for i in range(depth):
        kept = jax.random.bernoulli(keys[i], rate, x.shape)
        expected = jnp.tanh(expected @ w.w[i] + (expected * kept / (1 - rate)) @ (_dense(w) - w.w)[i])
    found = jax.jit(_scanned(depth, x, jnp.zeros((depth, IN)), remat=True))(dropping)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


DENSE, SPATIAL = (37, 53), (3, 3, 37, 53)
MOVES = "parameter|copy|transpose|bitcast|reshape|reverse|convert|get-tuple-element|dynamic-slice|slice"
"""What may have a kernel's shape: the parameter, its parts, and the compiler's copies of it in another layout or dtype."""
SHAPES = {"dense": (DENSE, 0), "conv": (SPATIAL, 0), "scan": (DENSE, 4)}
"""Name -> (shape of a kernel, stacked layers)."""


def _made(compiled, shape, stack):
    """The instructions of a compiled program whose result has the shape of the kernel, or of all the stacked ones, in
    whatever order of axes, other than moves of what is there already. A fusion counts by what is inside it."""
    leads = ((), (1,), (stack,)) if stack else ((),)
    sizes = {tuple(sorted((*lead, *kernel))) for lead in leads for kernel in (shape, (np.prod(shape[:-1]), shape[-1]))}
    lines = []
    for line in compiled.as_text().splitlines():
        found = re.match(r"\s*(?:ROOT )?%?\S+ = f32\[([\d,]*)\]\S* ([\w-]+)\((.*)", line)
        if not found or not found[1]:
            continue
        size = tuple(sorted(int(n) for n in found[1].split(",")))
        if size in sizes and found[2] != "fusion" and not re.fullmatch(MOVES, found[2]):
            lines.append(line)
    return lines


def _adapter_gradient(kind, shape, stack, form=lambda w: w):
    """The compiled gradient of a loss by the adapters of the second of two layers, and its value by name."""
    rng = np.random.default_rng(0)
    w = _make(kind, *shape, stack=(stack,) if stack else ())
    x = _normal(rng, 5, 6, 6, 37) if shape == SPATIAL else _normal(rng, 5, 37)
    if stack:  # a square kernel would not show which is which, so the body goes from 37 to 53 and back
        body = lambda x, w: (jnp.sin(0.1 * weights.dot(x, w))[:, :37], None)  # noqa: E731
        apply = lambda x, w: jax.lax.scan(jax.checkpoint(body), x, w)[0]  # noqa: E731
    else:
        apply = weights.conv if shape == SPATIAL else weights.dot
    trained = {name: getattr(w, name) for name in ("a", "b", "magnitude") if getattr(w, name) is not None}

    def loss(trained, first, w):
        adapted = form(dataclasses.replace(w, **trained))
        return jnp.sum(jnp.sin(apply(jnp.sin(x * first), adapted)))

    gradient = jax.jit(jax.grad(loss, (0, 1)))  # by what comes before it as well
    arguments = (trained, jnp.ones(37), w)
    return gradient.lower(*arguments).compile(), gradient(*arguments)


@pytest.mark.parametrize(
    ("kind", "where"),
    [*((kind, where) for kind in ("lora", "dora") for where in SHAPES), ("qlora", "dense"), ("qlora", "scan")],
)
def test_an_adapters_gradient_forms_no_kernel(kind, where):
    """Neither a @ b nor the frozen kernel's gradient is in the compiled program. DoRA may square the kernel to sum it up."""
    compiled, found = _adapter_gradient(kind, *SHAPES[where])
    made = _made(compiled, *SHAPES[where])
    square = re.compile(r" multiply\((%?[\w.-]+), \1\)")
    assert not [line for line in made if kind != "dora" or not square.search(line)]
    _, formed = _adapter_gradient(kind, *SHAPES[where], form=_dense)
    for path, expected in tree.flatten(formed).items():
        np.testing.assert_allclose(tree.flatten(found)[path], expected, rtol=1e-3, atol=2e-3, err_msg=path)


@pytest.mark.parametrize("where", SHAPES)
def test_the_check_for_formed_kernels_can_fail(where):
    compiled, _ = _adapter_gradient("lora", *SHAPES[where], form=_dense)
    assert _made(compiled, *SHAPES[where])
