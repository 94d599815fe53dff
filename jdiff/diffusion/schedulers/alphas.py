"""Samplers that stand on the training schedule's own timesteps: PNDM, DDIM, DDPM and LCM."""

import numpy as np

from jdiff.diffusion.schedulers.method import Call, Method, Row, check_descending, spaced_timesteps
from jdiff.diffusion.schedulers.settings import Settings


def ddim(settings: Settings, abar: np.ndarray, steps: int) -> Method:
    """DDIM with eta 0 (2010.02502, eq. 12).

    As in diffusers, a step always spans num_train_timesteps // steps, and eps is not derived anew from a clipped x_0.
    """
    timesteps = spaced_timesteps(settings, steps).round().astype(np.int32)
    check_descending(steps, timesteps)

    def step(c: Call) -> list[Row]:
        to = _abar_at(settings, abar, timesteps[c.i] - settings.num_train_timesteps // steps)
        return [np.sqrt(to) * c.x_0 + np.sqrt(1.0 - to) * c.eps]

    return Method(timesteps, *_levels(abar, timesteps), step)


def ddpm(settings: Settings, abar: np.ndarray, steps: int) -> Method:
    """Ancestral sampling (2006.11239, algorithm 2) between the timesteps kept; `variance_type` "fixed_small" or
    "fixed_large"."""
    timesteps = spaced_timesteps(settings, steps).round().astype(np.int32)
    check_descending(steps, timesteps)
    levels = np.append(abar[timesteps], 1.0)

    def step(c: Call) -> list[Row]:
        now, to = levels[c.i], levels[c.i + 1]
        alpha, beta = now / to, 1.0 - now / to
        small = beta * (1.0 - to) / (1.0 - now)
        variance = beta if settings.variance_type == "fixed_large" else small
        mean = np.sqrt(to) * beta / (1.0 - now) * c.x_0 + np.sqrt(alpha) * (1.0 - to) / (1.0 - now) * c.x
        return [mean + np.sqrt(variance) * (timesteps[c.i] > 0) * c.noise]

    return Method(timesteps, *_levels(abar, timesteps), step)


def lcm(settings: Settings, abar: np.ndarray, steps: int) -> Method:
    """Latent consistency sampling (2310.04378, algorithm 1): to x_0 at once, then noise of the next level.

    Its timesteps are some of the `original_inference_steps` that the model was distilled on; `timestep_spacing` and
    `steps_offset` do not bear on it. The boundary condition's scalings are of 2310.04378, section 4.1, with
    sigma_data 0.5.
    """
    total, original = settings.num_train_timesteps, settings.original_inference_steps
    if not steps <= original <= total:
        raise ValueError(
            f"lcm needs steps <= original_inference_steps <= {total}, not steps={steps}, "
            f"original_inference_steps={original}"
        )
    distilled = np.arange(original, 0, -1) * (total // original) - 1
    timesteps = distilled[np.linspace(0, original, steps, endpoint=False).astype(int)].astype(np.int32)

    def step(c: Call) -> list[Row]:
        scaled = timesteps[c.i] * settings.timestep_scaling
        denoised = scaled / np.hypot(scaled, 0.5) * c.x_0 + 0.25 / (scaled**2 + 0.25) * c.x
        if c.i == steps - 1:
            return [denoised]
        to = abar[timesteps[c.i + 1]]
        return [np.sqrt(to) * denoised + np.sqrt(1.0 - to) * c.noise]

    return Method(timesteps, *_levels(abar, timesteps), step)


def pndm(settings: Settings, abar: np.ndarray, steps: int) -> Method:
    """PLMS: PNDM (2202.09778, eq. 9 and 12) whose start-up is one step of Heun's kind in place of Runge-Kutta.

    The second timestep is called twice: the second call repeats the first step with the mean of both outputs. Hence
    N steps are N + 1 calls, and the memory is the x of the first call and three outputs. Image-to-image begins as in
    diffusers, by dropping leading calls; the second call then repeats the first step whichever timesteps remain, and
    its third is given an x that is one step noisier than its timestep says.
    """
    spaced = spaced_timesteps(settings, steps).round().astype(np.int32)
    check_descending(steps, spaced)
    timesteps = np.insert(spaced, 1, spaced[1]) if steps > 1 else spaced
    stride = settings.num_train_timesteps // steps

    def step(c: Call) -> list[Row]:
        x, (first, *past), t = c.x, c.memory, timesteps[c.i]
        if c.count == 1:
            x, t, mean, kept = first, t + stride, (c.output + past[0]) / 2, past
        else:
            known = min(c.count, 4) - (c.count > 1)  # outputs before this one, the second call's not among them
            weights = np.array(((1,), (3, -1), (23, -16, 5), (55, -59, 37, -9))[known])
            mean = weights / weights.sum() @ np.stack([c.output, *past[:known]])
            kept = [c.output, *past[:2]]
        now, to = _abar_at(settings, abar, t), _abar_at(settings, abar, t - stride)
        if settings.prediction_type == "v_prediction":
            mean = np.sqrt(now) * mean + np.sqrt(1.0 - now) * x
        scale = now * np.sqrt(1.0 - to) + np.sqrt(now * (1.0 - now) * to)
        after = np.sqrt(to / now) * x - (to - now) / scale * mean
        return [after, x, *kept]

    return Method(timesteps, *_levels(abar, timesteps), step, memory=4)


def _abar_at(settings: Settings, abar: np.ndarray, t: int) -> float:
    """The level at t; below the schedule it is clean data's, or with `set_alpha_to_one` false that of timestep 0."""
    return abar[t] if t >= 0 else 1.0 if settings.set_alpha_to_one else abar[0]


def _levels(abar: np.ndarray, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.sqrt(abar[timesteps]), np.sqrt(1.0 - abar[timesteps])
