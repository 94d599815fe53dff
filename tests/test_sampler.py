"""Samplers against diffusers' schedulers with shared noise, exact denoisers, and guidance against its formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import diffusion, target

SHAPE = (3, 4, 4, 2)
WEIGHT = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32) * 0.5


def _model(x, t):
    """An arbitrary smooth network with 2C channels; NumPy and JAX alike."""
    tanh = jnp.tanh if isinstance(x, jax.Array) else np.tanh
    return tanh(x @ WEIGHT.astype(x.dtype) + (0.001 * t).astype(x.dtype).reshape(-1, 1, 1, 1))


ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)).astype(np.float32)


def _eps_model(x, t):
    """`_model` as an eps prediction whose x_0 stays bounded; else every error is blown up by sqrt(1 / abar)."""
    join, table = (jnp.concatenate, jnp.asarray(ABAR)) if isinstance(x, jax.Array) else (np.concatenate, ABAR)
    out, a = _model(x, t), table[t].reshape(-1, 1, 1, 1)
    return join([(1 - a) ** 0.5 * x + a**0.5 * out[..., : SHAPE[-1]], out[..., SHAPE[-1] :]], axis=-1)


def _inputs(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), SHAPE, dtype), jax.random.split(jax.random.key(2), SHAPE[0])


def _noise(keys_B, t, dtype=jnp.float32):
    return np.asarray(diffusion.sample_noise(jax.vmap(lambda k: jax.random.fold_in(k, t))(keys_B), SHAPE[1:], dtype))


def _drive(scheduler, model, x_T, step):
    """Runs a diffusers scheduler from x_T with `step(output, t, x)`; channels last, which it does not mind."""
    import torch

    x = np.asarray(x_T)
    for t in scheduler.timesteps:
        out = model(x, np.full(SHAPE[0], int(t)))
        x = step(torch.tensor(out), t, torch.tensor(x)).prev_sample.numpy()
    return x


@pytest.mark.parametrize("prediction_type", ["eps", "v", "x0"])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_ddpm_equals_diffusers(variance, prediction_type, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    import torch
    from diffusers.schedulers import scheduling_ddpm

    x_T, keys_B = _inputs()
    scheduler = diffusers.DDPMScheduler(
        variance_type=variance,
        clip_sample=False,
        prediction_type={"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction_type],
    )
    scheduler.set_timesteps(50)

    def step(out, t, x):
        # Its learned range splits axis 1, and its noise comes from `randn_tensor`.
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, **k: torch.tensor(noise).movedim(-1, 1))
        noise = _noise(keys_B, int(t))
        out = out if variance == "learned_range" else out[..., : SHAPE[-1]]
        result = scheduler.step(out.movedim(-1, 1), t, x.movedim(-1, 1))
        result.prev_sample = result.prev_sample.movedim(1, -1)
        return result

    model = _eps_model if prediction_type == "eps" else _model
    expected = _drive(scheduler, model, x_T, step)
    schedule = diffusion.make_schedule("linear")

    @jax.jit
    def sample(x_T, keys_B):
        return diffusion.ddpm(
            model, schedule, x_T, keys_B, "ddim50", variance=variance, prediction_type=prediction_type
        )

    np.testing.assert_allclose(sample(x_T, keys_B), expected, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["eps", "v", "x0"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(
    ("spacing", "steps_offset", "set_alpha_to_one", "clip"),
    [("leading", 0, True, False), ("leading", 1, False, False), ("trailing", 0, True, True)],
)
def test_ddim_equals_diffusers(spacing, steps_offset, set_alpha_to_one, clip, eta, prediction_type):
    diffusers = pytest.importorskip("diffusers")
    import torch

    x_T, keys_B = _inputs()
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=clip,
        prediction_type={"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction_type],
        timestep_spacing=spacing,
        steps_offset=steps_offset,
        set_alpha_to_one=set_alpha_to_one,
        rescale_betas_zero_snr=spacing == "trailing" and prediction_type != "eps",
    )
    scheduler.set_timesteps(50)

    def step(out, t, x):
        noise = torch.tensor(_noise(keys_B, int(t)))
        return scheduler.step(out[..., : SHAPE[-1]], t, x, eta=eta, variance_noise=noise, use_clipped_model_output=clip)

    expected = _drive(scheduler, _model, x_T, step)
    full = diffusion.make_schedule("scaled_linear", zero_terminal_snr=scheduler.config.rescale_betas_zero_snr)
    schedule = diffusion.respace(full, 50, spacing, steps_offset, set_alpha_to_one)

    @jax.jit
    def sample(x_T, keys_B):
        return diffusion.ddim(
            _model, schedule, x_T, keys_B, None, eta=eta, prediction_type=prediction_type, clip_denoised=clip
        )

    np.testing.assert_allclose(sample(x_T, keys_B), expected, atol=1e-4)


def test_flow_euler_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    import torch

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 50, 50))
    x_T, _ = _inputs()
    x = np.asarray(x_T)
    for i, t in enumerate(scheduler.timesteps):
        velocity = _model(x, np.full(SHAPE[0], i / 50))[..., : SHAPE[-1]]  # our time is 1 - sigma
        x = scheduler.step(torch.tensor(-velocity), t, torch.tensor(x)).prev_sample.numpy()
    got = jax.jit(lambda x: diffusion.flow_euler(_model, x, 50))(x_T)
    np.testing.assert_allclose(got, x, atol=1e-4)


# Data N(MEAN, STD^2) has exact denoisers and, as an ODE, exact solutions.
MEAN, STD = 0.4, 0.3


def _exact_velocity(x, t):
    t = t.reshape(-1, 1, 1, 1)
    variance = (t * STD) ** 2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def _exact_eps(schedule):
    abar = jnp.asarray(schedule.alphas_cumprod)

    def denoise(x, t):
        a = abar[t].reshape(-1, 1, 1, 1)
        return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * MEAN) / (a * STD**2 + 1 - a)

    return denoise


def test_flow_orders_of_convergence():
    with jax.enable_x64(True):
        x_T, _ = _inputs(jnp.float64)
        exact = MEAN + STD * x_T

        def error(sampler, steps):
            return float(np.abs(sampler(_exact_velocity, x_T, steps) - exact).max())

        euler = error(diffusion.flow_euler, 64) / error(diffusion.flow_euler, 128)
        heun = error(diffusion.flow_heun, 64) / error(diffusion.flow_heun, 128)
        assert error(diffusion.flow_heun, 128) < 1e-3
    assert euler == pytest.approx(2.0, abs=0.15)
    assert heun == pytest.approx(4.0, abs=0.4)


@pytest.mark.parametrize("name", ["ddpm", "ddpm_fixed_large", "ddim", "ddim_eta", "euler", "heun"])
def test_samplers_recover_a_gaussian(name):
    schedule = diffusion.make_schedule("linear")
    denoise = _exact_eps(schedule)
    x_T = jax.random.normal(jax.random.key(3), (256, 8, 8, 1))
    keys_B = jax.random.split(jax.random.key(4), 256)
    samplers = {
        "ddpm": lambda x, k: diffusion.ddpm(denoise, schedule, x, k, 1000, variance="fixed_small"),
        "ddpm_fixed_large": lambda x, k: diffusion.ddpm(denoise, schedule, x, k, 1000, variance="fixed_large"),
        "ddim": lambda x, k: diffusion.ddim(denoise, schedule, x, steps=100),
        "ddim_eta": lambda x, k: diffusion.ddim(denoise, schedule, x, k, 250, eta=0.5),
        "euler": lambda x, k: diffusion.flow_euler(_exact_velocity, x, 200),
        "heun": lambda x, k: diffusion.flow_heun(_exact_velocity, x, 30),
    }
    samples = np.asarray(jax.jit(samplers[name])(x_T, keys_B))
    assert samples.mean() == pytest.approx(MEAN, abs=0.01)
    assert samples.std() == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_sample_depends_on_its_own_key(name):
    schedule = diffusion.make_schedule("cosine")
    x_T, keys_B = _inputs()
    samplers = {
        "ddpm": lambda x, k: diffusion.ddpm(_model, schedule, x, k, 20),
        "ddim": lambda x, k: diffusion.ddim(_model, schedule, x, k, 20, eta=1.0),
    }
    sample = jax.jit(samplers[name])
    together = sample(x_T, keys_B)
    apart = sample(x_T[2:], keys_B[2:])
    np.testing.assert_allclose(together[2:], apart, rtol=1e-5, atol=1e-5)
    other = sample(x_T, keys_B[::-1])
    assert not np.allclose(together[0], other[0])


def test_sampling_is_one_loop():
    schedule = diffusion.make_schedule("linear")
    x_T, keys_B = _inputs()
    calls = []

    def denoise(x, t):
        calls.append(t)
        return _model(x, t)

    jax.make_jaxpr(lambda x, k: diffusion.ddpm(denoise, schedule, x, k, 250))(x_T, keys_B)
    jax.make_jaxpr(lambda x: diffusion.ddim(denoise, schedule, x, steps=50))(x_T)
    jax.make_jaxpr(lambda x: diffusion.flow_heun(denoise, x, 50))(x_T)
    assert len(calls) <= 8  # traced, not unrolled


def test_low_precision_denoiser_keeps_float32_state():
    schedule = diffusion.make_schedule("linear")
    x_T, keys_B = _inputs(jnp.bfloat16)
    low = lambda x, t: _model(x, t).astype(jnp.bfloat16)  # noqa: E731
    assert diffusion.ddpm(low, schedule, x_T, keys_B, 5).dtype == jnp.float32
    assert diffusion.ddim(low, schedule, x_T, steps=1).dtype == jnp.float32
    assert diffusion.flow_euler(low, x_T, 5).dtype == jnp.float32
    assert np.isfinite(diffusion.ddpm(low, schedule, x_T, keys_B, 1)).all()


# --- guidance -------------------------------------------------------------------------------------------------

Y = jnp.array([1, 2, 3])
NULL = 10


def _labelled(x, t, y):
    return _model(x, t) * (1.0 + 0.3 * y.reshape(-1, 1, 1, 1)) + 0.1 * y.reshape(-1, 1, 1, 1)


def _halves():
    x, _ = _inputs()
    t_B = jnp.array([100, 500, 900])
    return x, t_B, np.asarray(_labelled(x, t_B, Y)), np.asarray(_labelled(x, t_B, jnp.full(3, NULL)))


def test_guidance_formulas():
    x, t_B, cond, uncond = _halves()
    mixed = uncond + 4.0 * (cond - uncond)
    everywhere = diffusion.guide(_labelled, Y, NULL, 4.0)(x, t_B)
    np.testing.assert_allclose(everywhere[..., :2], mixed[..., :2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(everywhere[..., 2:], cond[..., 2:], rtol=1e-5)  # the variance half is the conditional's
    first = diffusion.guide(_labelled, Y, NULL, 4.0, channels=1)(x, t_B)
    np.testing.assert_allclose(first[..., :1], mixed[..., :1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first[..., 1:], cond[..., 1:], rtol=1e-5)
    each = diffusion.guide(_labelled, Y, NULL, jnp.array([1.0, 4.0, 0.0]))(x, t_B)[..., :2]
    for got, want in zip(each, (cond[0], mixed[1], uncond[2]), strict=True):
        np.testing.assert_allclose(got, want[..., :2], rtol=1e-5, atol=1e-5)


def test_guidance_of_many_rows_is_that_of_each():
    """A CPU takes half of the rows at a time where there are many; elsewhere all are one batch."""
    rows = diffusion.guidance.LEAST_ROWS * jax.device_count()
    x, t_B = (jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (rows, *n)), jnp.float32) for n in ((8, 8, 2), ()))
    labels, sizes = jnp.arange(rows) % NULL, []

    def spy(x, t, y):
        sizes.append(len(x))
        return _labelled(x, t, y)

    guided = lambda: diffusion.guide(spy, labels, NULL, 4.0, rescale=0.7)(x, t_B)  # noqa: E731
    found = guided()
    with target.compiling_for("tpu"):
        np.testing.assert_allclose(found, guided(), rtol=1e-5, atol=1e-5)
    assert sizes == [rows, 2 * rows]


def test_guidance_rescale():
    x, t_B, cond, uncond = _halves()
    cond, uncond = cond[..., :2], uncond[..., :2]
    mixed = uncond + 4.0 * (cond - uncond)
    std = lambda a: a.std((1, 2, 3), keepdims=True)  # noqa: E731
    got = diffusion.guide(_labelled, Y, NULL, 4.0, rescale=0.7)(x, t_B)[..., :2]
    np.testing.assert_allclose(got, 0.7 * mixed * std(cond) / std(mixed) + 0.3 * mixed, rtol=1e-4, atol=1e-5)
    flat = diffusion.guide(lambda x, t, y: jnp.zeros_like(x), Y, NULL, 4.0, rescale=0.7)(x, t_B)
    assert not np.asarray(flat).any()  # a new model gives zeros


def test_guidance_interval():
    x, t_B, cond, uncond = _halves()
    got = jax.jit(diffusion.guide(_labelled, Y, NULL, 4.0, interval=(0.3, 0.7)))(x, t_B)[..., :2]
    np.testing.assert_allclose(got[1], (uncond + 4.0 * (cond - uncond))[1, ..., :2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[0], cond[0, ..., :2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[2], cond[2, ..., :2], rtol=1e-5, atol=1e-5)
    sizes = []

    def spy(x, t, y):
        jax.debug.callback(lambda a: sizes.append(len(a)), x)
        return _labelled(x, t, y)

    denoise = diffusion.guide(spy, Y, NULL, 4.0, interval=(0.3, 0.7))
    for times in (jnp.full(3, 0.5), jnp.full(3, 0.1)):  # flow time 0.1 is noise level 0.9
        jax.block_until_ready(denoise(x, times))
    jax.effects_barrier()
    assert sizes == [6, 3]


def test_guidance_takes_trees_and_scale_one_is_a_single_call():
    x, t_B, *_ = _halves()
    sizes = []

    def model(x, t, cond):
        sizes.append(len(x))
        return x * cond["text"].mean(axis=(1, 2)).reshape(-1, 1, 1, 1) + cond["size"].reshape(-1, 1, 1, 1)

    cond = {"text": jnp.ones((3, 5, 7)), "size": jnp.arange(3.0)}
    null = {"text": jnp.zeros((5, 7)), "size": 0.0}
    got = diffusion.guide(model, cond, null, 3.0)(x, t_B)
    np.testing.assert_allclose(got, 3.0 * (x + cond["size"].reshape(-1, 1, 1, 1)), rtol=1e-5, atol=1e-6)
    diffusion.guide(model, cond, null, 1.0)(x, t_B)
    assert sizes == [6, 3]


def test_bad_input_is_one_clear_line():
    x_T, keys_B = _inputs()
    schedule = diffusion.make_schedule("linear")
    zero = diffusion.make_schedule("linear", zero_terminal_snr=True)
    cases = [
        (lambda: diffusion.ddpm(_model, zero, x_T, keys_B, 10), "'eps' is undefined at zero terminal SNR"),
        (lambda: diffusion.ddpm(_model, schedule, x_T, keys_B, 10, variance="beta"), "unknown variance 'beta'"),
        (lambda: diffusion.ddpm(lambda x, t: x, schedule, x_T, keys_B, 10), "needs a model with 2C channels"),
        (lambda: diffusion.ddim(_model, schedule, x_T, steps=1001), "cannot take 1001 steps"),
        (lambda: diffusion.ddim(_model, schedule, x_T, eta=0.5), "needs keys_B"),
        (lambda: diffusion.ddim(_model, schedule, x_T, keys_B, eta=2.0), "eta must lie"),
        (lambda: diffusion.ddim(lambda x, t: x[..., :1], schedule, x_T), "must give 2 or 4 channels"),
        (lambda: diffusion.flow_euler(_model, x_T, 0), "steps must be at least 1"),
        (lambda: diffusion.guide(_labelled, Y, NULL, 2.0, interval=(200, 800)), "guidance interval"),
        (lambda: diffusion.guide(_labelled, Y, NULL, 2.0, rescale=7.5), "guidance rescale"),
        (lambda: diffusion.guide(_labelled, Y, NULL, 2.0, channels=0), "guided channels"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
