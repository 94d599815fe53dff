"""Losses and their gradients against an independent PyTorch computation in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import diffusion

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
