"""AdamW, schedules, clipping and averaging against PyTorch, diffusers and plain loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdiff import optim, tree

SHAPES = {"blocks": {"kernel": (5, 4), "bias": (4,)}, "embedding": (6, 4), "head": {"kernel": (3, 2)}}


def _random(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: (scale * rng.normal(size=s)).astype(np.float32), SHAPES, is_leaf=is_shape)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torch(weight_decay):
    torch = pytest.importorskip("torch")
    params = _random(0)
    theirs = {path: torch.nn.Parameter(torch.tensor(x)) for path, x in tree.flatten(params).items()}
    decayed = [p for path, p in theirs.items() if path.endswith("kernel")]
    others = [p for path, p in theirs.items() if not path.endswith("kernel")]
    assert len(decayed) == len(others) == 2
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    tx = optim.make_optimizer(optim.make_schedule("constant", 1e-2, 0, 20), weight_decay, b2=0.95)
    ours, state = jax.tree.map(jnp.asarray, params), tx.init(params)
    update = jax.jit(tx.update)
    for step in range(20):
        grads = _random(step + 1)
        for path, g in tree.flatten(grads).items():
            theirs[path].grad = torch.tensor(g)
        reference.step()
        updates, state = update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
    for path, value in tree.flatten(ours).items():
        np.testing.assert_allclose(value, theirs[path].detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=path)


def test_warm_up_moves_from_its_first_step():
    schedule = optim.make_schedule("constant", 1.0, 4, 100)
    np.testing.assert_allclose([schedule(i) for i in (0, 1, 3, 4, 99)], [0.25, 0.5, 1.0, 1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_decays_end_at_zero(name, warmup):
    schedule = optim.make_schedule(name, 2.0, warmup, 110)
    middle = warmup + (110 - warmup) // 2
    np.testing.assert_allclose([schedule(warmup), schedule(middle), schedule(110)], [2.0, 1.0, 0.0], atol=1e-6)
    rates = [float(schedule(i)) for i in range(warmup, 111)]
    assert all(a > b for a, b in itertools.pairwise(rates)) and rates[-2] > 0


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        optim.make_schedule("cosin", 1.0, 0, 10)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_clipping_equals_torch(scale):
    torch = pytest.importorskip("torch")
    grads = tree.flatten(_random(3, scale))
    theirs = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads.values()]
    for p, g in zip(theirs, grads.values(), strict=True):
        p.grad = torch.tensor(g)
    norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    ours = optax.tree.norm(list(grads.values()))
    np.testing.assert_allclose(ours, norm.item(), rtol=1e-5)
    factor = optim.clip_scale(ours, 1.0)
    for p, g in zip(theirs, grads.values(), strict=True):
        np.testing.assert_allclose(g * factor, p.grad.numpy(), rtol=1e-4)  # torch adds 1e-6 to the norm
    assert optim.clip_scale(ours, None) == 1.0
    assert np.isfinite(optim.clip_scale(jnp.float32(0.0), 1.0))


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_equals_a_plain_loop(warmup):
    ema, average = optim.Ema(0.95, warmup), np.float64(1.0)
    ours = {"w": jnp.float32(1.0)}
    for step in range(60):
        decay = min(0.95, 1 - (1 + step) ** (-2 / 3)) if warmup else 0.95
        average = decay * average + (1 - decay) * np.sin(step)
        ours = ema.update(ours, {"w": jnp.float32(np.sin(step))}, jnp.int32(step))
    np.testing.assert_allclose(ours["w"], average, rtol=1e-5)
    assert warmup is False or float(ema.rate(jnp.int32(0))) == 0.0  # the first average is the parameters themselves


def test_ema_warm_up_equals_diffusers():
    torch = pytest.importorskip("torch")
    training_utils = pytest.importorskip("diffusers.training_utils")
    p = torch.nn.Parameter(torch.ones(3))
    reference = training_utils.EMAModel([p], decay=0.9, use_ema_warmup=True, inv_gamma=1.0, power=2 / 3)
    ema, ours = optim.Ema(0.9, True), {"w": jnp.ones(3)}
    for step in range(50):
        with torch.no_grad():
            p.copy_(torch.tensor([np.sin(step), np.cos(step), step / 10]))
        reference.step([p])
        ours = ema.update(ours, {"w": jnp.asarray(p.detach().numpy())}, jnp.int32(step))
        np.testing.assert_allclose(ema.rate(jnp.int32(step)), reference.cur_decay_value, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ours["w"], reference.shadow_params[0].numpy(), rtol=1e-5)


def test_decay_reaches_kernels_and_lora_factors_only():
    expected = {
        "blocks/attn/kernel": True,
        "kernel": True,
        "kernel/a": True,
        "x/kernel/b": True,
        "x/bias": False,
        "pos_embed": False,
        "y_embedder/embedding": False,
        "norm/scale": False,
        "kernel/w/qvalue": False,
    }
    assert {path: tree.match(optim.DECAYED, path) for path in expected} == expected
