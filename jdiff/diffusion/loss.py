"""Training losses, one value a sample, computed in at least float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.diffusion.schedule import (
    VARIANCES,
    ModelFn,
    Schedule,
    add_noise,
    check_choice,
    check_prediction,
    prediction_target,
    split_prediction,
    take,
    upcast,
)


def gaussian_loss(
    model_fn: ModelFn,
    schedule: Schedule,
    x_0_BHWC: jax.Array,
    t_B: jax.Array,
    noise_BHWC: jax.Array,
    *,
    prediction_type: str = "eps",
    variance: str = "learned_range",
    snr_gamma: float | None = None,
    input_noise_BHWC: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Loss of a discrete diffusion model at given timesteps and noise, each entry of shape (B,).

    `mse` is the plain mean squared error of the prediction. With `variance="learned_range"` the model gives
    2C channels and `vb` is the variational bound's term in bits per dimension, which trains the variance alone
    (the mean is detached) and is added unscaled, as DiT does (facebookresearch/DiT,
    diffusion/gaussian_diffusion.py; IDDPM, 2102.09672, section 3.1). `loss` = Min-SNR weight * mse + vb; the
    weight is 1 unless `snr_gamma` is given (2303.09556).

    `input_noise` is the noise in x_t where it is not the target's: with noise + gamma * xi, xi another normal draw, that is
    input perturbation (2301.11706, algorithm 1), which likens training to the errors of sampling.

    Raises:
      ValueError: unknown names, wrong number of channels, or eps prediction at zero terminal SNR.
    """
    check_prediction(schedule, prediction_type)
    check_choice("variance", variance, VARIANCES)
    x_0, noise = upcast(x_0_BHWC), upcast(noise_BHWC)
    channels = x_0.shape[-1]
    x_t = add_noise(schedule, x_0, noise if input_noise_BHWC is None else input_noise_BHWC, t_B)
    out = upcast(model_fn(x_t, jnp.asarray(schedule.timesteps)[t_B]))
    expected = (*x_0.shape[:-1], 2 * channels if variance == "learned_range" else channels)
    if out.shape != expected:
        raise ValueError(f"variance '{variance}' needs a model output of {expected}, not {out.shape}")
    prediction, frac = out[..., :channels], out[..., channels:]
    target = prediction_target(schedule, x_0, noise, t_B, prediction_type)
    mse = _mean(jnp.square(target - prediction))
    loss = mse
    if snr_gamma is not None:
        loss = mse * snr_weight(schedule, t_B, prediction_type, snr_gamma).astype(mse.dtype)
    if variance != "learned_range":
        return {"loss": loss, "mse": mse}
    vb = _variational_bound(schedule, jax.lax.stop_gradient(prediction), frac, x_0, x_t, t_B, prediction_type)
    return {"loss": loss + vb, "mse": mse, "vb": vb}


def flow_loss(model_fn: ModelFn, x_0_BHWC: jax.Array, t_B: jax.Array, noise_BHWC: jax.Array) -> dict[str, jax.Array]:
    """Flow-matching loss of SiT's linear path (2401.08740): time 0 is noise, time 1 is data.

    x_t = t x_0 + (1 - t) noise; the model is given t in [0, 1] unscaled and predicts the velocity
    x_0 - noise. Where it gives 2C channels the second half is discarded. Entries `loss` and `mse` (equal) have
    shape (B,). Raises ValueError for another number of channels.
    """
    x_0, noise = upcast(x_0_BHWC), upcast(noise_BHWC)
    t = t_B.astype(x_0.dtype).reshape(t_B.shape + (1,) * (x_0.ndim - 1))
    out = upcast(model_fn(t * x_0 + (1.0 - t) * noise, t_B.astype(x_0.dtype)))
    mse = _mean(jnp.square(split_channels(out, x_0)[0] - (x_0 - noise)))
    return {"loss": mse, "mse": mse}


def snr_weight(schedule: Schedule, t_B: jax.Array, prediction_type: str, snr_gamma: float) -> jax.Array:
    """Min-SNR-gamma weights (B,) of 2303.09556: min(SNR, gamma) over SNR (eps), SNR + 1 (v) or 1 (x0)."""
    check_prediction(schedule, prediction_type)
    snr = schedule.snr
    divisor = {"eps": snr, "v": snr + 1.0, "x0": np.ones_like(snr)}[prediction_type]
    return jnp.asarray(np.minimum(snr, snr_gamma) / divisor)[t_B]


def split_channels(out: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A model's (prediction, rest) for input x, where it gives C or 2C channels; else a ValueError."""
    channels = x.shape[-1]
    if out.shape not in (x.shape, (*x.shape[:-1], 2 * channels)):
        raise ValueError(f"for {x.shape} the model must give {channels} or {2 * channels} channels, not {out.shape}")
    return out[..., :channels], out[..., channels:]


def learned_log_variance(schedule: Schedule, frac: jax.Array, t_B: jax.Array) -> jax.Array:
    """Log variance between the posterior's (frac -1) and log beta (frac +1), 2102.09672, eq. 15."""
    low, high = take(schedule.posterior_log_variance, t_B, frac), take(np.log(schedule.betas), t_B, frac)
    weight = (frac + 1.0) / 2.0
    return weight * high + (1.0 - weight) * low


def posterior_mean(schedule: Schedule, x_0: jax.Array, x_t: jax.Array, t_B: jax.Array) -> jax.Array:
    """Mean of q(x_{t-1} | x_t, x_0), DDPM (2006.11239) eq. 7."""
    of_x_0, of_x_t = schedule.posterior_mean_coefs
    return take(of_x_0, t_B, x_t) * x_0 + take(of_x_t, t_B, x_t) * x_t


def _variational_bound(schedule, prediction, frac, x_0, x_t, t_B, prediction_type) -> jax.Array:
    predicted_x_0, _ = split_prediction(schedule, prediction, x_t, t_B, prediction_type)
    mean = posterior_mean(schedule, predicted_x_0, x_t, t_B)
    log_variance = learned_log_variance(schedule, frac, t_B)
    # Both terms vanish with the noise: each is formed from its difference, lest float32 leave only rounding.
    log_range = np.log(schedule.betas) - schedule.posterior_log_variance
    log_ratio = (frac + 1.0) / 2.0 * take(log_range, t_B, frac)
    error = take(schedule.posterior_mean_coefs[0], t_B, x_t) * (x_0 - predicted_x_0)
    kl = 0.5 * (log_ratio + jnp.expm1(-log_ratio) + jnp.square(error) * jnp.exp(-log_variance))
    nll = -_discretized_log_likelihood(x_0, mean, 0.5 * log_variance)
    return jnp.where(t_B == 0, _mean(nll), _mean(kl)) / math.log(2.0)


def _discretized_log_likelihood(x, mean, log_scale):
    """Log probability of x's 8-bit bin, x in [-1, 1], outer bins open (DDPM eq. 13, with a tanh CDF)."""
    inverse = jnp.exp(-log_scale)
    upper = _normal_cdf(inverse * (x - mean + 1.0 / 255.0))
    lower = _normal_cdf(inverse * (x - mean - 1.0 / 255.0))
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1.0 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))


def _normal_cdf(x):
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def _mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))
