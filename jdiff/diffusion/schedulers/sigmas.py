"""Samplers that stand on noise levels sigma between the schedule's own (2206.00364): Euler, Euler ancestral, Heun."""

import numpy as np

from jdiff.diffusion.schedulers.method import Call, Method, Row, check_descending, spaced_timesteps
from jdiff.diffusion.schedulers.settings import Settings


def euler(settings: Settings, abar: np.ndarray, steps: int) -> Method:
    """Euler's method on dx/dsigma = (x - x_0) / sigma (2206.00364, algorithm 1 without churn)."""
    timesteps, sigmas = _table(settings, abar, steps)

    def step(c: Call) -> list[Row]:
        now, to = sigmas[c.i], sigmas[c.i + 1]
        return [c.x + (to - now) / now * (c.x - c.x_0)]

    return _method(settings, timesteps, sigmas, step)


def euler_ancestral(settings: Settings, abar: np.ndarray, steps: int) -> Method:
    """Euler down to below the next level, then fresh noise up to it (crowsonkb/k-diffusion, `sampling.py`)."""
    timesteps, sigmas = _table(settings, abar, steps)

    def step(c: Call) -> list[Row]:
        now, to = sigmas[c.i], sigmas[c.i + 1]
        up = to / now * np.sqrt(now**2 - to**2)
        down = to**2 / now
        return [c.x + (down - now) / now * (c.x - c.x_0) + up * c.noise]

    return _method(settings, timesteps, sigmas, step)


def heun(settings: Settings, abar: np.ndarray, steps: int) -> Method:
    """Heun's method (2206.00364, algorithm 1 without churn): every step but the last, which is Euler's, calls twice.

    The memory is a step's x and its first slope.
    """
    timesteps, sigmas = _table(settings, abar, steps)
    timesteps = np.repeat(timesteps, 2)[1:]
    sigmas = np.append(np.repeat(sigmas[:-1], 2)[1:], 0.0)  # each call's own level

    def step(c: Call) -> list[Row]:
        before, now, to = sigmas[max(c.i - 1, 0)], sigmas[c.i], sigmas[c.i + 1]
        slope = (c.x - c.x_0) / now
        if c.i % 2 == 0:
            return [c.x + (to - now) * slope, c.x, slope]
        x, first = c.memory
        return [x + (now - before) * (first + slope) / 2, x, first]

    return _method(settings, timesteps, sigmas, step, memory=2, order=2)


def training_sigmas(abar: np.ndarray) -> np.ndarray:
    """Noise over signal at each timestep, ascending (T,). At zero SNR diffusers sets abar to 2^-24 to keep it finite."""
    abar = np.where(abar == 0.0, 2.0**-24, abar)
    return np.sqrt((1.0 - abar) / abar)


def karras_sigmas(sigma_max: float, sigma_min: float, steps: int) -> np.ndarray:
    """Noise levels of 2206.00364, eq. 5, with rho 7, from sigma_max down to sigma_min."""
    return np.linspace(sigma_max ** (1 / 7), sigma_min ** (1 / 7), steps) ** 7


def timesteps_of(sigmas: np.ndarray, training: np.ndarray) -> np.ndarray:
    """The fractional timesteps at which log sigma, linear between the schedule's timesteps, takes these values."""
    return np.interp(np.log(sigmas), np.log(training), np.arange(len(training)))


def _table(settings: Settings, abar: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps (N,) in float32, sigmas (N + 1,)), descending; the last sigma is where the sampler ends."""
    training = training_sigmas(abar)
    timesteps = spaced_timesteps(settings, steps)
    sigmas = np.interp(timesteps, np.arange(len(training)), training)
    check_descending(steps, sigmas)
    if settings.use_karras_sigmas:
        sigmas = karras_sigmas(sigmas[0], sigmas[-1], steps)
        timesteps = timesteps_of(sigmas, training)
    last = training[0] if settings.final_sigmas_type == "sigma_min" else 0.0
    return timesteps.astype(np.float32), np.append(sigmas, last)


def _method(settings: Settings, timesteps: np.ndarray, sigmas: np.ndarray, step, **more) -> Method:
    signal = 1.0 / np.hypot(sigmas[:-1], 1.0)
    # with "leading" the first level lies below the schedule's last, and the noise stands for noised data
    top = sigmas[0] if settings.timestep_spacing in ("linspace", "trailing") else np.hypot(sigmas[0], 1.0)
    return Method(timesteps, signal, sigmas[:-1] * signal, step, exploding=True, init_noise_sigma=float(top), **more)
