"""Losses and their gradients against an independent PyTorch computation in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import diffusion
from jdiff.diffusion.process import Process
from jdiff.diffusion.schedule import TimestepBias

# The edges, and every regime of the bound: the decoder's likelihood at 0, then the KL term.
T = np.array([0, 0, 0, 1, 2, 10, 100, 400, 700, 998, 999])


def _batch(prediction_type="eps"):
    """Data, noise and a model's output near its target: far from it the decoder's likelihood is all rounding."""
    rng = np.random.default_rng(0)
    x_0 = rng.uniform(-1, 1, (len(T), 6, 6, 4))
    x_0.flat[::7], x_0.flat[::11] = 1.0, -1.0  # the open outer bins
    noise = rng.normal(size=x_0.shape)
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[T].reshape(-1, 1, 1, 1)
    target = {"eps": noise, "x0": x_0, "v": np.sqrt(abar) * noise - np.sqrt(1 - abar) * x_0}[prediction_type]
    prediction = target + (0.005 if prediction_type == "x0" else 0.3) * rng.normal(size=x_0.shape)
    out = np.concatenate([prediction, rng.uniform(-1.3, 1.3, x_0.shape)], axis=-1)
    return x_0, noise, out


def _torch_loss(x_0, noise, out, prediction_type, snr_gamma=None):
    """(loss, mse, vb, gradient of the mean loss) for a linear schedule."""
    torch = pytest.importorskip("torch")
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    column = lambda table: table[T].reshape(-1, 1, 1, 1)  # noqa: E731
    x_0, noise, out = (torch.tensor(a, dtype=torch.float64) for a in (x_0, noise, out))
    out.requires_grad_()
    prediction, frac = out.chunk(2, dim=-1)
    a, s = column(abar).sqrt(), column(1 - abar).sqrt()
    x_t = a * x_0 + s * noise
    target = {"eps": noise, "x0": x_0, "v": a * noise - s * x_0}[prediction_type]
    mse = (prediction - target).square().mean((1, 2, 3))

    fixed = prediction.detach()
    x_0_hat = {"eps": (x_t - s * fixed) / a, "x0": fixed, "v": a * x_t - s * fixed}[prediction_type]
    mean_of = lambda x: (  # noqa: E731
        column(betas * before.sqrt() / (1 - abar)) * x + column((1 - before) * (1 - betas).sqrt() / (1 - abar)) * x_t
    )
    posterior = betas * (1 - before) / (1 - abar)
    posterior[0] = posterior[1]
    weight = (frac + 1) / 2
    std = (0.5 * (weight * column(betas.log()) + (1 - weight) * column(posterior.log()))).exp()
    shift = (column(betas * before.sqrt() / (1 - abar)) * (x_0 - x_0_hat) / std).square()
    ratio = weight * column(betas.log() - posterior.log())  # torch.distributions' KL cancels to rounding at high t
    kl = (ratio + torch.expm1(-ratio) + shift) / 2
    cdf = lambda z: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))  # noqa: E731
    upper = torch.where(x_0 > 0.999, 1.0, cdf((x_0 + 1 / 255 - mean_of(x_0_hat)) / std))
    lower = torch.where(x_0 < -0.999, 0.0, cdf((x_0 - 1 / 255 - mean_of(x_0_hat)) / std))
    nll = -(upper - lower).clamp(min=1e-12).log()
    first = torch.tensor(T == 0).reshape(-1, 1, 1, 1)
    vb = torch.where(first, nll, kl).mean((1, 2, 3)) / math.log(2)

    snr = (abar / (1 - abar))[T]
    scale = 1.0
    if snr_gamma is not None:
        scale = snr.clamp(max=snr_gamma) / {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[prediction_type]
    loss = scale * mse + vb
    (gradient,) = torch.autograd.grad(loss.mean(), out)
    return tuple(value.detach().numpy() for value in (loss, mse, vb, gradient))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (np.float64, 1e-8)])
@pytest.mark.parametrize(
    ("prediction_type", "snr_gamma"), [("eps", None), ("v", None), ("x0", None), ("eps", 5.0), ("v", 5.0), ("x0", 5.0)]
)
def test_loss_and_gradient_equal_torch(prediction_type, snr_gamma, dtype, tolerance):
    inputs = [array.astype(dtype) for array in _batch(prediction_type)]
    loss, mse, vb, gradient = _torch_loss(*inputs, prediction_type, snr_gamma)
    schedule = diffusion.make_schedule("linear")
    with jax.enable_x64(dtype == np.float64):
        x_0, noise, out = map(jnp.asarray, inputs)

        def total(out):
            losses = diffusion.gaussian_loss(
                lambda x, t: out,
                schedule,
                x_0,
                jnp.asarray(T, jnp.int32),
                noise,
                prediction_type=prediction_type,
                snr_gamma=snr_gamma,
            )
            return losses["loss"].mean(), losses

        got_gradient, losses = jax.jit(jax.grad(total, has_aux=True))(out)
        losses = {key: np.asarray(value) for key, value in losses.items()}
        got_gradient = np.asarray(got_gradient)
    assert got_gradient.dtype == losses["loss"].dtype == dtype
    np.testing.assert_allclose(losses["mse"], mse, rtol=tolerance)
    np.testing.assert_allclose(losses["vb"], vb, rtol=tolerance, atol=1e-5 * tolerance)  # it spans 11 decades
    np.testing.assert_allclose(losses["loss"], loss, rtol=tolerance)
    scale = np.abs(gradient).reshape(len(T), -1).max(1).reshape(-1, 1, 1, 1)  # relative, sample by sample
    np.testing.assert_allclose(got_gradient / scale, gradient / scale, atol=tolerance)


def test_bound_trains_the_variance_alone():
    x_0, noise, out = (jnp.asarray(a, jnp.float32) for a in _batch())
    schedule = diffusion.make_schedule("linear")

    def bound(out):
        return diffusion.gaussian_loss(lambda x, t: out, schedule, x_0, jnp.asarray(T), noise)["vb"].sum()

    gradient = np.asarray(jax.grad(bound)(out))
    assert not gradient[..., :4].any()
    assert gradient[..., 4:].any()


def test_fixed_variance_has_no_bound():
    x_0, noise, _ = (jnp.asarray(a, jnp.float32) for a in _batch())
    schedule = diffusion.make_schedule("cosine")
    for variance in ("fixed_small", "fixed_large"):
        losses = diffusion.gaussian_loss(
            lambda x, t: jnp.zeros_like(x), schedule, x_0, jnp.asarray(T), noise, variance=variance
        )
        assert set(losses) == {"loss", "mse"}
        np.testing.assert_allclose(losses["loss"], np.square(noise).mean((1, 2, 3)), rtol=1e-5)


def test_bfloat16_output_is_raised_before_the_loss():
    x_0, noise, out = (jnp.asarray(a, jnp.bfloat16) for a in _batch())
    schedule = diffusion.make_schedule("linear")
    low = diffusion.gaussian_loss(lambda x, t: out, schedule, x_0, jnp.asarray(T), noise)
    x_0, noise, out = (a.astype(jnp.float32) for a in (x_0, noise, out))
    high = diffusion.gaussian_loss(lambda x, t: out, schedule, x_0, jnp.asarray(T), noise)
    for key in high:
        assert low[key].dtype == jnp.float32
        np.testing.assert_array_equal(low[key], high[key])


def test_model_of_a_respaced_schedule_sees_original_timesteps():
    short = diffusion.respace(diffusion.make_schedule("linear"), "ddim10")
    seen = []
    x = jnp.ones((2, 1, 1, 1))
    diffusion.gaussian_loss(lambda x, t: seen.append(t) or x, short, x, jnp.array([0, 9]), x, variance="fixed_small")
    assert seen[0].tolist() == [0, 900]


def test_flow_loss_follows_the_linear_path():
    x_0, noise, out = (jnp.asarray(a, jnp.float32) for a in _batch())
    t_B = jnp.linspace(0.0, 1.0, len(T))
    seen = {}

    def model(x, t):
        seen.update(x=x, t=t)
        return out

    losses = diffusion.flow_loss(model, x_0, t_B, noise)
    np.testing.assert_array_equal(seen["t"], t_B)
    np.testing.assert_array_equal(seen["x"][0], noise[0])
    np.testing.assert_array_equal(seen["x"][-1], x_0[-1])
    expected = np.square(np.asarray(out[..., :4]) - (x_0 - noise)).mean((1, 2, 3))
    np.testing.assert_allclose(losses["loss"], expected, rtol=1e-5)
    np.testing.assert_array_equal(losses["loss"], losses["mse"])


def test_min_snr_weights():
    schedule = diffusion.make_schedule("scaled_linear", zero_terminal_snr=True)
    t_B = jnp.array([0, 500, 999])
    snr = schedule.alphas_cumprod[np.asarray(t_B)] / (1 - schedule.alphas_cumprod[np.asarray(t_B)])
    assert snr[0] > 5.0 > snr[1]
    np.testing.assert_allclose(diffusion.snr_weight(schedule, t_B, "x0", 5.0), [5, snr[1], 0], rtol=1e-5)
    np.testing.assert_allclose(
        diffusion.snr_weight(schedule, t_B, "v", 5.0), [5 / (snr[0] + 1), snr[1] / (snr[1] + 1), 0], rtol=1e-5
    )
    plain = diffusion.make_schedule("scaled_linear")
    snr = plain.alphas_cumprod[0] / (1 - plain.alphas_cumprod[0])
    np.testing.assert_allclose(diffusion.snr_weight(plain, t_B, "eps", 5.0), [5 / snr, 1, 1], rtol=1e-5)


def test_bad_input_is_one_clear_line():
    x, t_B = jnp.ones((2, 2, 2, 3)), jnp.array([0, 1])
    schedule = diffusion.make_schedule("linear")
    zero = diffusion.make_schedule("linear", zero_terminal_snr=True)

    def loss(schedule=schedule, **kwargs):
        return diffusion.gaussian_loss(lambda x, t: x, schedule, x, t_B, x, **kwargs)

    cases = [
        (lambda: loss(prediction_type="noise"), "unknown prediction_type 'noise'; choose from eps, v, x0"),
        (lambda: loss(variance="learned"), "choose from learned_range, fixed_small, fixed_large"),
        (lambda: loss(), r"needs a model output of \(2, 2, 2, 6\), not \(2, 2, 2, 3\)"),
        (lambda: loss(zero, variance="fixed_small"), "'eps' is undefined at zero terminal SNR"),
        (lambda: diffusion.flow_loss(lambda x, t: x[..., :1], x, jnp.ones(2), x), "must give 3 or 6 channels"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def _process_losses(process, x_0, keys):
    """(losses, what the model was given) of `Process.losses` for a model that gives a quarter of its input."""
    seen = {}

    def model(x, t):
        seen["x_t"], seen["t"] = np.asarray(x), np.asarray(t)
        return x / 4

    losses = process.losses(model, x_0, keys)
    return {name: np.asarray(value) for name, value in losses.items()}, seen


@pytest.mark.parametrize("prediction_type", ["eps", "v", "x0"])
@pytest.mark.parametrize(("offset", "gamma"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.05, 0.2)])
def test_offset_and_perturbed_noise_equal_numpy(prediction_type, offset, gamma):
    """Offset noise is in the input and in the target; the perturbation in the input alone (2301.11706, algorithm 1)."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 5)
        x_0 = jax.random.normal(jax.random.key(1), (5, 4, 6, 3), jnp.float64)
        process = Process(
            diffusion.make_schedule("scaled_linear"),
            prediction_type,
            noise_offset=offset,
            input_perturbation=gamma,
        )
        losses, seen = _process_losses(process, x_0, keys)
        draws = jax.vmap(lambda key: jax.random.split(key, 4))(keys)
        normal = lambda i, shape: np.asarray(  # noqa: E731
            jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float64))(draws[:, i])
        )
        noise = normal(0, (4, 6, 3)) + offset * normal(2, (3,)).reshape(5, 1, 1, 3)
        more = normal(3, (4, 6, 3))
    x_0, t = np.asarray(x_0), seen["t"]
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[t].reshape(-1, 1, 1, 1)
    x_t = np.sqrt(abar) * x_0 + np.sqrt(1 - abar) * (noise + gamma * more)
    target = {"eps": noise, "x0": x_0, "v": np.sqrt(abar) * noise - np.sqrt(1 - abar) * x_0}[prediction_type]
    np.testing.assert_allclose(seen["x_t"], x_t, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(losses["loss"], np.square(x_t / 4 - target).mean((1, 2, 3)), rtol=1e-8)


def test_offset_noise_shifts_each_channel_by_its_own_number():
    keys = jax.random.split(jax.random.key(0), 20_000)
    shift = np.asarray(diffusion.offset_noise(keys, jnp.zeros((20_000, 2, 2, 3)), 0.1))
    assert (shift == shift[:, :1, :1]).all()
    means = shift[:, 0, 0]
    np.testing.assert_allclose(means.std(0), 0.1, rtol=0.03)
    assert np.abs(np.corrcoef(means.T) - np.eye(3)).max() < 0.03


@pytest.mark.parametrize(
    ("bias", "chosen", "multiplier"),
    [
        (TimestepBias("later", 4.0, portion=0.25), slice(750, 1000), 4.0),
        (TimestepBias("earlier", 0.5, portion=0.1), slice(0, 100), 0.5),
        (TimestepBias("range", 3.0, begin=200, end=500), slice(200, 500), 3.0),
        (TimestepBias("later", 2.0, portion=1.0), slice(0, 1000), 2.0),
    ],
)
def test_timesteps_are_drawn_with_their_bias(bias, chosen, multiplier):
    """As diffusers' training script weighs them: ones, times the multiplier where chosen, over their sum."""
    torch = pytest.importorskip("torch")
    weights = torch.ones(1000, dtype=torch.float64)
    weights[chosen] *= multiplier
    weights /= weights.sum()
    np.testing.assert_allclose(bias.probabilities(1000), weights.numpy(), rtol=1e-12)
    keys = jax.random.split(jax.random.key(0), 100_000)
    t = np.asarray(diffusion.sample_timesteps(keys, 1000, bias))
    assert t.dtype == np.int32 and t.min() >= 0 and t.max() <= 999
    inside = np.zeros(1000, bool)
    inside[chosen] = True
    assert abs(inside[t].mean() - float(weights[chosen].sum())) < 0.01
    tens, expected = np.bincount(t // 10, minlength=100), weights.numpy().reshape(100, 10).sum(1)
    assert np.abs(tens / len(t) - expected).max() < 0.002
    _, seen = _process_losses(
        Process(diffusion.make_schedule("linear"), timestep_bias=bias), jnp.zeros((2000, 1, 1, 1)), keys[:2000]
    )
    assert abs(inside[seen["t"]].mean() - float(weights[chosen].sum())) < 0.05


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        (TimestepBias("sooner", 2.0), "unknown timestep bias 'sooner'; choose from later, earlier, range"),
        (TimestepBias("later", 0.0), "multiplier of 0.0"),
        (TimestepBias("later", 2.0, portion=0.0), "portion=0.0, 0 of 1000"),
        (TimestepBias("earlier", 2.0, portion=1.5), "portion=1.5"),
        (TimestepBias("range", 2.0, begin=500, end=500), "range 500 to 500"),
        (TimestepBias("range", 2.0, begin=-1, end=500), "range -1 to 500"),
        (TimestepBias("range", 2.0, begin=0, end=1001), "range 0 to 1001"),
    ],
)
def test_a_bias_that_cannot_be_is_one_line(bias, said):
    with pytest.raises(ValueError, match=said) as error:
        bias.probabilities(1000)
    assert "\n" not in str(error.value)
