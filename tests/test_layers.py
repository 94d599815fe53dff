"""Layer norm, group norm and nearest-neighbour enlargement: against PyTorch and against their plain forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jdiff import layers, sums, target


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_equals_pytorch(dtype, platform):
    """Of what is rounded to `dtype` already, to that type's own rounding, far from zero too."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(5 + 0.5 * rng.normal(size=(2, 9, 384)), jnp.float32).astype(dtype)
    g = jnp.asarray(rng.normal(size=x.shape), jnp.float32).astype(dtype)
    with target.compiling_for(platform):
        found, back = jax.vjp(lambda x: layers.layer_norm(x, 1e-6), x)
        (ours,) = back(g)
    peer = torch.tensor(np.asarray(x.astype(jnp.float32))).double().requires_grad_()
    expected = torch.nn.functional.layer_norm(peer, (384,), eps=1e-6)
    expected.backward(torch.tensor(np.asarray(g.astype(jnp.float32))).double())
    assert found.dtype == ours.dtype == dtype
    rounding = 1e-5 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(found.astype(jnp.float32), expected.detach().numpy(), rtol=rounding, atol=rounding)
    np.testing.assert_allclose(ours.astype(jnp.float32), peer.grad.numpy(), rtol=2 * rounding, atol=4 * rounding)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_sum_along_a_row_is_in_fp32(platform):
    x = jnp.ones((3, 4000), jnp.bfloat16)  # in bfloat16 a sum of ones ends at 256
    with target.compiling_for(platform):
        found = sums.row_sum(x)
    assert found.dtype == jnp.float32 and found.shape == (3, 1)
    np.testing.assert_array_equal(found, 4000)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_group_norm_equals_pytorch(dtype):
    rng = np.random.default_rng(0)
    x, scale, bias = 3 + rng.normal(size=(2, 5, 7, 24)), rng.normal(size=24), rng.normal(size=24)
    x, scale, bias = (jnp.asarray(a, jnp.float32) for a in (x, scale, bias))
    found, back = jax.vjp(lambda *args: layers.group_norm(*args, 6, 1e-5), x.astype(dtype), scale, bias)
    peer = torch.tensor(np.asarray(x.astype(dtype).astype(jnp.float32))).permute(0, 3, 1, 2).requires_grad_()
    gain, offset = (torch.tensor(np.asarray(a)).requires_grad_() for a in (scale, bias))
    expected = torch.nn.functional.group_norm(peer, 6, gain, offset)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    np.testing.assert_allclose(found.astype(jnp.float32), expected.detach().permute(0, 2, 3, 1).numpy(), atol=tolerance)
    g = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape).astype(dtype)
    expected.backward(torch.tensor(np.asarray(g.astype(jnp.float32))).permute(0, 3, 1, 2))
    theirs = (peer.grad.permute(0, 2, 3, 1), gain.grad, offset.grad)
    for ours, grad in zip(back(g), theirs, strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), grad.numpy(), atol=tolerance * np.abs(grad.numpy()).max())


def test_group_norm_refuses_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="10 channels do not divide into 4 groups"):
        layers.GroupNorm(4).init(jax.random.key(0), jnp.zeros((1, 2, 2, 10)))


@pytest.mark.parametrize("size", [(10, 14), (9, 13), (10, 13)], ids=str)
def test_upsample_enlarges_as_pytorch_does(size):
    x = np.random.default_rng(0).normal(size=(1, 5, 7, 3)).astype(np.float32)
    module = layers.Upsample()
    params = module.init(jax.random.key(0), jnp.asarray(x))["params"]
    centre = np.zeros((3, 3, 3, 3), np.float32)
    centre[1, 1] = np.eye(3)  # a convolution that changes nothing
    found = module.apply({"params": {"conv": {**params["conv"], "kernel": centre}}}, x, size)
    expected = torch.nn.functional.interpolate(torch.tensor(x).permute(0, 3, 1, 2), size=size, mode="nearest")
    np.testing.assert_array_equal(found, expected.permute(0, 2, 3, 1).numpy())


def test_gated_gelu_equals_pytorch():
    rng = np.random.default_rng(0)
    h, gate, g = 3 * rng.normal(size=(3, 5, 40))
    with jax.enable_x64(True):
        found, back = jax.vjp(layers.gelu_gated, jnp.asarray(h), jnp.asarray(gate))
        ours = back(jnp.asarray(g))
    peer, peer_gate = (torch.tensor(x, requires_grad=True) for x in (h, gate))
    expected = peer * torch.nn.functional.gelu(peer_gate)
    expected.backward(torch.tensor(g))
    np.testing.assert_allclose(found, expected.detach(), atol=1e-12)
    for found, grad in zip(ours, (peer.grad, peer_gate.grad), strict=True):
        np.testing.assert_allclose(found, grad, atol=1e-12)
