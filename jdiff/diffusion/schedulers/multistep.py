"""Exponential integrators in half the log-SNR, lambda, of the predicted x_0: DPM-Solver++ and UniPC."""

import math

import numpy as np

from jdiff.diffusion.schedulers.method import Call, Method, Row, check_descending, spaced_timesteps
from jdiff.diffusion.schedulers.settings import Settings
from jdiff.diffusion.schedulers.sigmas import karras_sigmas, timesteps_of, training_sigmas


def dpmpp_2m(settings: Settings, abar: np.ndarray, steps: int, stochastic: bool = False) -> Method:
    """DPM-Solver++(2M), midpoint (2211.01095, algorithm 2); the memory is the x_0 predicted before.

    The last of fewer than 15 steps is of order 1 with `lower_order_final`, and so is any that ends at no noise.
    """
    timesteps, sigmas = _table(settings, abar, steps)
    signal, sigma = _levels(sigmas)
    first_order_at_end = (
        settings.euler_at_final or (settings.lower_order_final and steps < 15) or settings.final_sigmas_type == "zero"
    )
    power = 2 if stochastic else 1

    def step(c: Call) -> list[Row]:
        i, (before,) = c.i, c.memory
        shrink = sigmas[i + 1] / sigmas[i]  # exp(-h), where h is lambda's growth
        x_0 = c.x_0
        if c.count > 0 and not (i == steps - 1 and first_order_at_end):
            ratio = math.log(sigmas[i + 1] / sigmas[i]) / math.log(sigmas[i] / sigmas[i - 1])
            x_0 = x_0 + ratio / 2 * (c.x_0 - before)
        x = sigma[i + 1] / sigma[i] * shrink ** (power - 1) * c.x + signal[i + 1] * (1.0 - shrink**power) * x_0
        if stochastic:
            x = x + sigma[i + 1] * math.sqrt(1.0 - shrink**2) * c.noise
        return [x, c.x_0]

    return Method(timesteps, signal[:-1], sigma[:-1], step, memory=1)


def dpmpp_2m_sde(settings: Settings, abar: np.ndarray, steps: int) -> Method:
    """The stochastic form of `dpmpp_2m` (diffusers' sde-dpmsolver++; 2211.01095, appendix E.2)."""
    return dpmpp_2m(settings, abar, steps, stochastic=True)


def unipc(settings: Settings, abar: np.ndarray, steps: int) -> Method:
    """UniPC with B(h) = expm1(h), "bh2" (2302.04867, algorithms 5 and 7 on x_0): each call first corrects the last step.

    The memory is the x that step began at (corrected), and the x_0 predicted at as many calls as `solver_order` says.
    """
    timesteps, sigmas = _table(settings, abar, steps)
    signal, sigma = _levels(sigmas)

    def order_at(i: int, count: int) -> int:
        order = min(settings.solver_order, count + 1)
        return min(order, steps - i) if settings.lower_order_final else order

    def update(x: Row, i: int, outputs: list[Row], target: Row | None = None) -> Row:
        """x from call i to i + 1 by the x_0 of call i, i - 1, … and, to correct it, call i + 1's own (`target`)."""
        to_go = math.log(sigmas[i] / sigmas[i + 1]) if sigmas[i + 1] > 0.0 else math.inf
        base = sigma[i + 1] / sigma[i] * x - signal[i + 1] * math.expm1(-to_go) * outputs[0]
        ratios = [math.log(sigmas[i] / sigmas[i - k]) / to_go for k in range(1, len(outputs))]
        nodes = [*ratios, 1.0] if target is not None else ratios
        if not nodes:
            return base
        slopes = [(m - outputs[0]) / r for m, r in zip(outputs[1:], ratios, strict=True)]
        if target is not None:
            slopes.append(target - outputs[0])
        # the paper sets a lone coefficient to 1/2 (its appendix F)
        weights = np.array([0.5]) if len(nodes) == 1 else _weights(-to_go, np.array(nodes))
        return base - signal[i + 1] * math.expm1(-to_go) * (weights @ np.stack(slopes))

    def step(c: Call) -> list[Row]:
        begun, *past = c.memory
        x = c.x
        if c.count > 0:
            x = update(begun, c.i - 1, past[: order_at(c.i - 1, c.count - 1)], c.x_0)
        outputs = [c.x_0, *past][: settings.solver_order]
        return [update(x, c.i, outputs[: order_at(c.i, c.count)]), x, *outputs]

    if not settings.lower_order_final and not 0.0 < sigmas[-1] < sigmas[-2]:
        raise ValueError("unipc without lower_order_final must end at noise: set final_sigmas_type to 'sigma_min'")
    return Method(timesteps, signal[:-1], sigma[:-1], step, memory=1 + settings.solver_order)


def _weights(hh: float, nodes: np.ndarray) -> np.ndarray:
    """Solves 2302.04867's R(h) a = b(h), eq. 8 in its `bh2` form, at nodes r_1, r_2, …"""
    phi, factorial, b = math.expm1(hh) / hh - 1.0, 1, []
    for k in range(1, len(nodes) + 1):
        b.append(phi * factorial / math.expm1(hh))
        factorial *= k + 1
        phi = phi / hh - 1.0 / factorial
    return np.linalg.solve(np.vander(nodes, increasing=True).T, np.array(b))


def _table(settings: Settings, abar: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps (N,) in int32, sigmas (N + 1,)), descending; the last sigma is where the sampler ends.

    The timesteps are laid out for N + 1, the lowest left out. Karras' levels span the whole schedule, and the model is
    told the nearest timestep of each (diffusers' DPM-Solver++ cuts off the fraction if the schedule is the cosine one).
    """
    training = training_sigmas(abar)
    if settings.use_karras_sigmas:
        sigmas = karras_sigmas(training[-1], training[0], steps)
        timesteps = timesteps_of(sigmas, training).round()
    else:
        timesteps = spaced_timesteps(settings, steps, extra=1).round()
        sigmas = training[timesteps.astype(int)]
    check_descending(steps, sigmas)
    last = training[0] if settings.final_sigmas_type == "sigma_min" else 0.0
    return timesteps.astype(np.int32), np.append(sigmas, last)


def _levels(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    signal = 1.0 / np.hypot(sigmas, 1.0)
    return signal, sigmas * signal
