"""Samplers: from noise to data in one traced loop over a denoiser `(x_BHWC, t_B) -> prediction`.

All can be jitted and differentiated. A sample's noise depends on its own key and the timestep alone, hence
its picture does not depend on the batch it is drawn in. Work is in at least float32, as is the result.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.diffusion.loss import learned_log_variance, posterior_mean, split_channels
from jdiff.diffusion.schedule import (
    VARIANCES,
    ModelFn,
    Schedule,
    check_choice,
    check_prediction,
    respace,
    sample_noise,
    split_prediction,
    take,
    upcast,
)

Steps = int | str | Sequence[int] | None
Part = tuple[int | jax.Array, int | jax.Array]
"""(first, last): the steps `first`..`last` - 1 alone, numbers or traced; what a sampler begins with is then what the part before
gave. Traced bounds compile once for all parts, and take the reverse-mode gradient away."""


def ddpm(
    denoise: ModelFn,
    schedule: Schedule,
    x_T: jax.Array,
    keys_B: jax.Array,
    steps: Steps = 250,
    *,
    prediction_type: str = "eps",
    variance: str = "learned_range",
    clip_denoised: bool = False,
    part: Part | None = None,
) -> jax.Array:
    """Ancestral sampling, DDPM (2006.11239) algorithm 2 on a respaced schedule (2102.09672, section 4).

    Args:
      denoise: gives C channels, or 2C of which the second half is read by `learned_range` only.
      schedule: the training schedule, or a respaced one together with `steps=None`.
      x_T: standard normal noise (B, H, W, C).
      keys_B: one typed PRNG key a sample.
      steps: what `respace` takes; 250 as DiT's `sample.py`.
      variance: `learned_range`, or `fixed_small` (posterior variance), or `fixed_large` (beta).
      clip_denoised: clip each predicted x_0 to [-1, 1]: for pixels, not for latents.
      part: all steps when None.

    Raises:
      ValueError: unknown names, steps that do not fit, wrong channels, eps prediction at zero terminal SNR.
    """
    check_choice("variance", variance, VARIANCES)
    schedule = _prepare(schedule, steps, prediction_type)

    def step(x, t_B, key_B, prediction, rest):
        x_0, _ = _denoised(schedule, prediction, x, t_B, prediction_type, clip_denoised)
        if variance == "learned_range":
            if not rest.shape[-1]:
                raise ValueError("variance 'learned_range' needs a model with 2C channels")
            log_variance = learned_log_variance(schedule, rest, t_B)
        else:
            small = variance == "fixed_small"
            log_variance = take(schedule.posterior_log_variance if small else np.log(schedule.betas), t_B, x)
        noise = sample_noise(key_B, x.shape[1:], x.dtype) * (t_B[0] > 0)
        return posterior_mean(schedule, x_0, x, t_B) + jnp.exp(0.5 * log_variance) * noise

    return _loop(denoise, schedule, x_T, keys_B, step, part)


def ddim(
    denoise: ModelFn,
    schedule: Schedule,
    x_T: jax.Array,
    keys_B: jax.Array | None = None,
    steps: Steps = 50,
    *,
    eta: float = 0.0,
    prediction_type: str = "eps",
    clip_denoised: bool = False,
    part: Part | None = None,
) -> jax.Array:
    """DDIM sampling (2010.02502, eq. 12); arguments as `ddpm`, a variance half of the model is ignored.

    `eta` 0 is deterministic and needs no keys, 1 has DDPM's variance. After clipping, eps is derived anew
    from the clipped x_0, as guided-diffusion and DiT do (diffusers: `use_clipped_model_output=True`). For
    Stable Diffusion v1 give `respace(schedule, 50, "leading", steps_offset=1, set_alpha_to_one=False)`, for
    zero terminal SNR `respace(schedule, 50, "trailing")`, each with `steps=None`.

    Raises:
      ValueError: as `ddpm`, and eta outside [0, 1] or above 0 without keys.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], not {eta}")
    if eta and keys_B is None:
        raise ValueError("eta above 0 needs keys_B, one key a sample")
    schedule = _prepare(schedule, steps, prediction_type)
    abar = schedule.alphas_cumprod
    abar_prev = np.append(schedule.final_alpha_cumprod, abar[:-1])
    sigma = eta * np.sqrt((1.0 - abar_prev) / (1.0 - abar) * (1.0 - abar / abar_prev))
    of_eps = np.sqrt(np.maximum(1.0 - abar_prev - sigma**2, 0.0))

    def step(x, t_B, key_B, prediction, rest):
        x_0, eps = _denoised(schedule, prediction, x, t_B, prediction_type, clip_denoised)
        x = take(np.sqrt(abar_prev), t_B, x) * x_0 + take(of_eps, t_B, x) * eps
        return x if key_B is None else x + take(sigma, t_B, x) * sample_noise(key_B, x.shape[1:], x.dtype)

    return _loop(denoise, schedule, x_T, keys_B if eta else None, step, part)


def flow_euler(denoise: ModelFn, x_T: jax.Array, steps: int, part: Part | None = None) -> jax.Array:
    """Euler's method on a velocity model from noise at time 0 to data at time 1, in equal steps.

    The model is given t_B in [0, 1) in x's dtype; of 2C channels the second half is ignored (SiT,
    2401.08740). diffusers counts the other way: its sigma is 1 - t and its model output is minus ours.
    """
    return _integrate(denoise, x_T, steps, part, heun=False)


def flow_heun(denoise: ModelFn, x_T: jax.Array, steps: int, part: Part | None = None) -> jax.Array:
    """Heun's second-order method, two model calls a step; otherwise as `flow_euler`."""
    return _integrate(denoise, x_T, steps, part, heun=True)


def _prepare(schedule: Schedule, steps: Steps, prediction_type: str) -> Schedule:
    schedule = schedule if steps is None else respace(schedule, steps)
    check_prediction(schedule, prediction_type)
    return schedule


def _loop(denoise, schedule, x_T, keys_B, step, part):
    timesteps = jnp.asarray(schedule.timesteps)

    def body(i, x):
        t_B = jnp.full(x.shape[:1], len(schedule) - 1 - i, jnp.int32)
        prediction, rest = split_channels(upcast(denoise(x, timesteps[t_B])), x)
        key_B = None if keys_B is None else jax.vmap(jax.random.fold_in)(keys_B, timesteps[t_B])
        return step(x, t_B, key_B, prediction, rest).astype(x.dtype)

    first, last = part or (0, len(schedule))
    return jax.lax.fori_loop(first, last, body, upcast(x_T))


def _denoised(schedule, prediction, x, t_B, prediction_type, clip):
    x_0, eps = split_prediction(schedule, prediction, x, t_B, prediction_type)
    if not clip:
        return x_0, eps
    x_0 = jnp.clip(x_0, -1.0, 1.0)
    return x_0, split_prediction(schedule, x_0, x, t_B, "x0")[1]


def _integrate(denoise, x_T, steps, part, heun):
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    x_T = upcast(x_T)
    times = jnp.asarray(np.linspace(0.0, 1.0, steps + 1), x_T.dtype)

    def velocity(x, time):
        return split_channels(upcast(denoise(x, jnp.full(x.shape[:1], time))), x)[0]

    def body(i, x):
        dt = times[i + 1] - times[i]
        v = velocity(x, times[i])
        if heun:
            v = 0.5 * (v + velocity(x + dt * v, times[i + 1]))
        return (x + dt * v).astype(x.dtype)

    first, last = part or (0, steps)
    return jax.lax.fori_loop(first, last, body, x_T)
