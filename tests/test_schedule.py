"""Noise tables, respacing, conversions and draws, against closed forms and diffusers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import diffusion


def _keys(seeds):
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(
    ("name", "theirs", "limits"),
    [
        ("linear", "linear", (1e-4, 0.02)),
        ("scaled_linear", "scaled_linear", (0.00085, 0.012)),
        ("cosine", "squaredcos_cap_v2", None),
    ],
)
def test_schedules_equal_diffusers(name, theirs, limits, zero_terminal_snr):
    diffusers = pytest.importorskip("diffusers")
    betas = dict(zip(("beta_start", "beta_end"), limits or (), strict=False))
    reference = diffusers.DDIMScheduler(
        beta_schedule=theirs, rescale_betas_zero_snr=zero_terminal_snr, **betas
    ).alphas_cumprod.numpy()
    schedule = diffusion.make_schedule(name, zero_terminal_snr=zero_terminal_snr)
    np.testing.assert_allclose(schedule.alphas_cumprod, reference, rtol=2e-4, atol=2e-6)  # theirs are float32
    assert (schedule.alphas_cumprod[-1] == 0.0) == zero_terminal_snr
    np.testing.assert_allclose(np.cumprod(1 - schedule.betas), schedule.alphas_cumprod, atol=1e-14)


def test_linear_and_cosine_formulas():
    linear = diffusion.make_schedule("linear", 250)
    assert linear.betas.dtype == np.float64
    np.testing.assert_allclose(linear.betas[[0, -1]], [4e-4, 0.08], rtol=1e-14)
    np.testing.assert_allclose(np.diff(linear.betas), (0.08 - 4e-4) / 249, rtol=1e-10)
    cosine = diffusion.make_schedule("cosine", 100)
    levels = [math.cos((i / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(100)]
    np.testing.assert_allclose(cosine.alphas_cumprod[:-1], np.array(levels[1:]) / levels[0], rtol=1e-12)
    assert cosine.betas[-1] == 0.999


def test_posterior_is_bayes_rule():
    schedule = diffusion.make_schedule("linear")
    t, x_0, x_t = 500, 0.3, -0.7
    abar, beta = schedule.alphas_cumprod[t - 1], schedule.betas[t]
    precision = 1 / (1 - abar) + (1 - beta) / beta
    mean = (np.sqrt(abar) * x_0 / (1 - abar) + np.sqrt(1 - beta) * x_t / beta) / precision
    of_x_0, of_x_t = schedule.posterior_mean_coefs
    assert schedule.posterior_variance[t] == pytest.approx(1 / precision, rel=1e-12)
    assert of_x_0[t] * x_0 + of_x_t[t] * x_t == pytest.approx(mean, rel=1e-12)
    assert schedule.posterior_log_variance[0] == schedule.posterior_log_variance[1]


def test_respacing():
    schedule = diffusion.make_schedule("linear")
    short = diffusion.respace(schedule, "250")
    assert len(short) == 250
    assert short.timesteps[[0, 1, 2, -1]].tolist() == [0, 4, 8, 999]
    np.testing.assert_allclose(np.cumprod(1 - short.betas), schedule.alphas_cumprod[short.timesteps], rtol=1e-12)
    assert short == diffusion.respace(schedule, 250) == diffusion.respace(schedule, [250])
    # 300 timesteps in sections of 10, 15 and 20; strides that end on .5 round to even.
    three = diffusion.respace(diffusion.make_schedule("linear", 300), "10,15,20").timesteps
    assert [np.sum(three < 100), np.sum(three < 200), len(three)] == [10, 25, 45]
    assert diffusion.respace(diffusion.make_schedule("cosine", 10), "3").timesteps.tolist() == [0, 4, 9]
    assert diffusion.respace(schedule, "ddim50").timesteps.tolist() == list(range(0, 1000, 20))
    assert diffusion.respace(schedule, 1000) == diffusion.respace(schedule, "ddim1000")
    np.testing.assert_allclose(diffusion.respace(schedule, 1000).betas, schedule.betas, rtol=1e-9)
    # Respaced twice is respaced once to the timesteps that remain.
    twice = diffusion.respace(short, 10)
    once = diffusion.keep_timesteps(schedule, twice.timesteps)
    assert twice == once


@pytest.mark.parametrize("steps", [7, 30, 50])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0)])
def test_spacings_equal_diffusers(spacing, offset, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    schedule = diffusion.make_schedule("linear")
    short = diffusion.respace(schedule, steps, spacing, offset, set_alpha_to_one=False)
    assert short.timesteps[::-1].tolist() == scheduler.timesteps.tolist()
    assert short.final_alpha_cumprod == schedule.alphas_cumprod[0]


def test_schedule_is_a_static_value():
    a, b = diffusion.make_schedule("linear", 50), diffusion.make_schedule("linear", 50)
    assert a == b
    assert hash(a) == hash(b)
    assert a != diffusion.make_schedule("cosine", 50)
    traces = []

    def noised(schedule, x, t_B):
        traces.append(schedule)
        return diffusion.add_noise(schedule, x, x, t_B)

    jitted = jax.jit(noised, static_argnums=0)
    jitted(a, jnp.ones((2, 3)), jnp.arange(2))
    jitted(b, jnp.ones((2, 3)), jnp.arange(2))
    assert len(traces) == 1
    with pytest.raises(ValueError, match="read-only"):
        a.betas[0] = 1.0


@pytest.mark.parametrize("prediction_type", ["eps", "v", "x0"])
def test_predictions_invert(prediction_type):
    schedule = diffusion.make_schedule("scaled_linear", zero_terminal_snr=prediction_type != "eps")
    t_B = jnp.array([0, 1, 400, 999 if prediction_type == "v" else 998])
    with jax.enable_x64(True):
        x_0, noise = jax.random.normal(jax.random.key(0), (2, 4, 3, 3, 2), jnp.float64)
        x_t = diffusion.add_noise(schedule, x_0, noise, t_B)
        target = diffusion.prediction_target(schedule, x_0, noise, t_B, prediction_type)
        got_x_0, got_eps = diffusion.split_prediction(schedule, target, x_t, t_B, prediction_type)
        assert got_x_0.dtype == got_eps.dtype == jnp.float64
        np.testing.assert_allclose(got_eps, noise, atol=1e-10)
        np.testing.assert_allclose(got_x_0, x_0, atol=1e-10)
    if prediction_type == "v":  # at zero SNR, x_t is the noise and v is -x_0
        np.testing.assert_array_equal(x_t[-1], noise[-1])
        np.testing.assert_array_equal(target[-1], -x_0[-1])


def test_low_precision_is_raised_to_float32():
    schedule = diffusion.make_schedule("linear")
    x = jnp.ones((1, 2, 2, 1), jnp.bfloat16)
    assert diffusion.add_noise(schedule, x, x, jnp.array([5])).dtype == jnp.float32


def test_draws_depend_on_their_own_key():
    draws = (
        lambda keys: diffusion.sample_timesteps(keys, 1000),
        diffusion.sample_times,
        lambda keys: diffusion.sample_times(keys, "logit_normal"),
        lambda keys: diffusion.sample_noise(keys, (2, 2, 3)),
    )
    for draw in draws:
        together, apart = draw(_keys([5, 6, 7, 8])), draw(_keys([8, 1, 6]))
        np.testing.assert_array_equal(together[3], apart[0])
        np.testing.assert_array_equal(together[1], apart[2])


def test_distribution_of_draws():
    keys = jax.random.split(jax.random.key(1), 20000)
    t = np.asarray(diffusion.sample_timesteps(keys, 10))
    assert t.dtype == np.int32
    np.testing.assert_allclose(np.bincount(t) / len(t), 0.1, atol=0.01)
    uniform = np.sort(diffusion.sample_times(keys))
    np.testing.assert_allclose(uniform, np.linspace(0, 1, len(uniform)), atol=0.015)
    logit = np.asarray(diffusion.sample_times(keys, "logit_normal"))
    np.testing.assert_allclose(np.quantile(np.log(logit / (1 - logit)), [0.16, 0.5, 0.84]), [-1, 0, 1], atol=0.04)


def test_bad_input_is_one_clear_line():
    schedule = diffusion.make_schedule("linear")
    x, t_B = jnp.ones((1, 2)), jnp.array([3])
    zero = diffusion.make_schedule("linear", zero_terminal_snr=True)
    cases = [
        (lambda: diffusion.make_schedule("sigmoid"), "unknown schedule 'sigmoid'; choose from linear, scaled_linear"),
        (lambda: diffusion.make_schedule("cosine", beta_end=0.1), "takes no beta_start"),
        (lambda: diffusion.make_schedule("linear", 10), "betas must lie"),
        (lambda: diffusion.make_schedule("linear", 0), "at least 1"),
        (lambda: diffusion.respace(schedule, "fast"), "cannot read the respacing 'fast'"),
        (lambda: diffusion.respace(schedule, "ddim37"), "no integer stride gives exactly 37"),
        (lambda: diffusion.respace(schedule, 1001), "cannot take 1001 steps from a section of 1000"),
        (lambda: diffusion.respace(schedule, 0), "at least one step"),
        (lambda: diffusion.respace(schedule, 10, "linspace"), "choose from sections, leading, trailing"),
        (lambda: diffusion.respace(schedule, "10", "trailing"), "needs an int"),
        (lambda: diffusion.respace(schedule, 1000, "leading", 1), "must be some of 0..999"),
        (lambda: diffusion.keep_timesteps(schedule, []), "not none"),
        (lambda: diffusion.prediction_target(schedule, x, x, t_B, "noise"), "choose from eps, v, x0"),
        (lambda: diffusion.split_prediction(zero, x, x, t_B, "eps"), "undefined at zero terminal SNR"),
        (lambda: diffusion.sample_times(_keys([0]), "beta"), "choose from uniform, logit_normal"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
