"""One optimizer step of a LoRA, and of a DoRA, on a UNet: peft's and PyTorch's loss, gradients and update."""

import jax
import jax.numpy as jnp
import numpy as np
import peft_peer
import pytest
import torch
from test_lora import UNET_MODULES, VARIANTS, tiny_unet
from test_sd_models import exact_waves

from jdiff import lora, optim, tree

LR, DECAY = 1e-3, 0.1
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-8, 1e-7)}
"""dtype -> (of the loss, and of each leaf's gradient by its norm; of the whole step by its norm). Adam divides each gradient by
its own size, so that rounding shows in the step where a gradient is all but zero."""


def _relative(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("lora", torch.float32), ("dora", torch.float64), pytest.param("lora", torch.float64, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_step_equals_peft_and_pytorch(variant, dtype):
    with jax.enable_x64(dtype == torch.float64):
        _compare_a_step(VARIANTS[variant][0], dtype, *TOLERANCES[dtype])


def _compare_a_step(settings, dtype, tolerance, of_the_update):
    peer, module, base = tiny_unet(dtype)
    peft_peer.inject(exact_waves(peer, dtype), UNET_MODULES, **settings)
    rng = np.random.default_rng(0)
    x, target, context = (rng.normal(size=shape) for shape in ((2, 8, 8, 4), (2, 8, 8, 4), (2, 5, 24)))
    t = np.array([3, 987])
    adapters = tree.nested(jax.tree.map(jnp.asarray, peft_peer.adapters(peer, peft_peer.slashed)))

    # theirs
    trained = {name: value for name, value in peer.named_parameters() if value.requires_grad}
    assert len(trained) == sum(path.split("/")[-1] != "scale" for path in tree.flatten(adapters))
    nchw = lambda y: torch.tensor(y.transpose(0, 3, 1, 2), dtype=dtype)  # noqa: E731
    out = peer(nchw(x), torch.tensor(t), torch.tensor(context, dtype=dtype)).sample
    expected_loss = torch.nn.functional.mse_loss(out, nchw(target))
    expected_loss.backward()
    expected = _flat(peer, lambda p: p.grad)
    start = _flat(peer, lambda p: p.clone())
    factors = [value for name, value in trained.items() if "magnitude" not in name]
    magnitudes = [value for name, value in trained.items() if "magnitude" in name]
    groups = [{"params": factors, "weight_decay": DECAY}, {"params": magnitudes, "weight_decay": 0.0}]
    torch.optim.AdamW([group for group in groups if group["params"]], lr=LR, betas=(0.9, 0.999), eps=1e-8).step()
    moved = _flat(peer, lambda p: p)

    # ours: only a, b and magnitude are differentiated
    ours, scales = tree.set_apart(adapters, r".*/scale")
    given = [jnp.asarray(y, jnp.dtype(str(dtype).removeprefix("torch."))) for y in (x, t, context, target)]

    @jax.jit
    def value_and_grad(ours, scales, base, x, t, context, target):
        def loss(ours):
            attached = lora.attach(base, tree.merge(ours, scales))
            return jnp.mean(jnp.square(module.apply({"params": attached}, x, t, context) - target))

        return jax.value_and_grad(loss)(ours)

    loss, gradient = value_and_grad(ours, scales, base, *given)
    tx = optim.make_optimizer(optim.make_schedule("constant", LR, 0, 10), DECAY)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(ours), ours)

    assert float(loss) == pytest.approx(expected_loss.item(), rel=tolerance)
    found, updates = tree.flatten(gradient), tree.flatten(updates)
    assert set(found) == set(expected) and found["conv_in/kernel/a"].dtype == given[0].dtype
    for path, value in expected.items():
        assert _relative(found[path], value) < tolerance, path
    whole = lambda values: np.concatenate([np.ravel(values[path]) for path in expected])  # noqa: E731
    assert _relative(whole(updates), whole(moved) - whole(start)) < of_the_update


def _flat(peer, of):
    """What `of` takes of each trained parameter, by our paths, float64."""
    found = tree.nested(peft_peer.adapters(peer, peft_peer.slashed, of=of))
    return {p: np.array(x, np.float64) for p, x in tree.flatten(found).items() if not p.endswith("/scale")}
