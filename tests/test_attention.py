"""Attention behind its one door: against PyTorch."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from jdiff import attention, sharding, target
from jdiff.pallas import splash


def qkv(L, S, B=2, N=3, K=8):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, n, N, K)), jnp.float32) for n in (L, S, S)]


def torch_attention(q, k, v, causal=False):
    """Output and gradients of sum(out * cos(out)) by PyTorch."""
    leaves = [torch.tensor(np.asarray(x)).transpose(1, 2).requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal)
    (out * out.cos()).sum().backward()
    return [x.detach().transpose(1, 2).numpy() for x in (out, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(
    ("L", "S", "causal", "most"),
    [
        (7, 7, False, 2**20),
        (7, 7, True, 2**20),
        (50, 33, False, 200),
        (64, 64, False, 1024),
        (5, 1000, False, 1000),
        (500, 400, False, 50_000),
    ],
)
def test_attention_and_its_gradient_equal_pytorch(monkeypatch, L, S, causal, most, platform):
    monkeypatch.setattr(attention, "MOST_SCORES", most)
    inputs = qkv(L, S)

    def value(q, k, v):
        out = attention.attention(q, k, v, causal)
        return (out * jnp.cos(out)).sum(), out

    with target.compiling_for(platform):
        (_, out), gradients = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(*inputs)
    for found, expected in zip((out, *gradients), torch_attention(*inputs, causal), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("tokens", [4096, 16384])
def test_attention_of_large_pictures_fits(tokens):
    """All scores at once would take tokens^2 * 4 bytes a head; forward and gradient stay far below."""
    x = jax.ShapeDtypeStruct((1, tokens, 2, 16), jnp.float32)
    gradient = jax.grad(lambda q, k, v: attention.attention(q, k, v).sum(), (0, 1, 2))
    memory = jax.jit(gradient).lower(x, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 150 * 2**20


@pytest.mark.parametrize(
    ("L", "S", "K", "mesh", "most"),
    [(1024, 1024, 40, None, 4096), (128, 1152, 72, (2, 1, 2), 4096), (128, 1536, 40, None, 512)],
)
def test_splash_equals_pytorch(monkeypatch, L, S, K, mesh, most):
    """Interpreted, since no TPU is at hand: alone, each device of a mesh with its rows and heads, and with gradients of queries by
    some keys each. 1152 keys are no multiple of the largest block."""
    monkeypatch.setattr(splash, "MOST_KEYS", most)
    interpreted = partial(splash_attention_kernel.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha_single_device", interpreted)
    inputs = qkv(L, S, N=2, K=K)

    def value(q, k, v):
        out = attention.attention(q, k, v)
        return (out * jnp.cos(out)).sum(), out

    if mesh is not None:
        made = sharding.make_mesh(*mesh, jax.devices()[: math.prod(mesh)])
        value, inputs = sharding.in_use(made, value), jax.device_put(inputs, sharding.batch_sharding(made))
    step = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))
    with target.compiling_for("tpu"):
        assert "splash_mha_dkv" in str(jax.make_jaxpr(step)(*inputs))
        (_, out), gradients = step(*inputs)
    for found, expected in zip((out, *gradients), torch_attention(*inputs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
