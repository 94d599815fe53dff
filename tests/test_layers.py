"""Group norm and nearest-neighbour enlargement: against PyTorch and against their plain forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jdiff import layers


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
