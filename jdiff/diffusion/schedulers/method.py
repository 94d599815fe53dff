"""One form for every sampler: between two calls of the model it is a linear map, and its coefficients are a table.

What a step may use is x, the model's output, fresh noise, and a few arrays kept from earlier calls (the memory); what
it gives is the next x and the next memory. So a method is written once for each call as row vectors over these
arrays, in NumPy's float64 and in the papers' own formulas, and the traced step is the same for all (`plan.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jdiff.diffusion.schedulers.settings import Settings

Row = np.ndarray


@dataclass(frozen=True)
class Call:
    """What is at hand when call `i` of the model has returned, each as a row vector.

    `x_0` and `eps` are the clean data and the noise that the output implies; `x_0` is clipped where the settings say
    so. `count` is the number of calls that this run has made before, which is below i when it began later.
    """

    i: int
    count: int
    x: Row
    output: Row
    noise: Row
    x_0: Row
    eps: Row
    memory: tuple[Row, ...]


@dataclass(frozen=True)
class Method:
    """A sampler on N steps, laid out over its M calls of the model.

    Attributes:
      timesteps: (M,) what the model is told; integers, or floats between them.
      signal, sigma: (M,) the level of x at each call, signal^2 + sigma^2 = 1.
      step: gives the next x and the next memory after a call.
      memory: how many arrays are kept.
      exploding: x is held as x_0 + (sigma / signal) eps and scaled for the model, as Karras et al. do.
      order: calls to a step, by which image-to-image counts where to begin.
      init_noise_sigma: factor of the standard normal noise that a run from the first call begins with.
    """

    timesteps: np.ndarray
    signal: np.ndarray
    sigma: np.ndarray
    step: Callable[[Call], list[Row]]
    memory: int = 0
    exploding: bool = False
    order: int = 1
    init_noise_sigma: float = 1.0


def call(method: Method, settings: Settings, i: int, start: int) -> tuple[Call, Row]:
    """Call i's row vectors, and the row of x_0 before it is clipped.

    Columns: x, output, noise, clipped x_0, then the memory.
    """
    x, output, noise, clipped, *memory = np.eye(4 + method.memory)
    signal, sigma = method.signal[i], method.sigma[i]
    x_t = signal * x if method.exploding else x
    # What `schedule.split_prediction` does to arrays, done to coefficients: cancellations then happen in float64.
    if settings.prediction_type == "epsilon":
        x_0, eps = (x_t - sigma * output) / signal, output
    elif settings.prediction_type == "v_prediction":
        x_0, eps = signal * x_t - sigma * output, sigma * x_t + signal * output
    else:
        x_0, eps = output, (x_t - signal * output) / sigma
    used = clipped if settings.clip_sample else x_0
    return Call(i, i - start, x, output, noise, used, eps, tuple(memory)), x_0


def spaced_timesteps(settings: Settings, steps: int, extra: int = 0) -> np.ndarray:
    """`steps` timesteps, descending, float64, as 2305.08891, table 2 names their spacing.

    "leading" and "linspace" are laid out for steps + extra, of which the lowest `extra` are left out.

    Raises ValueError where they would not fit into the schedule.
    """
    total, count = settings.num_train_timesteps, steps + extra
    if settings.timestep_spacing == "linspace":
        timesteps = np.linspace(0, total - 1, count)
    elif settings.timestep_spacing == "leading":
        timesteps = np.arange(count) * float(total // count) + settings.steps_offset
    else:
        return np.round(total - np.arange(steps) * (total / steps)) - 1
    timesteps = timesteps[::-1][:steps]
    if timesteps[0] >= total:
        raise ValueError(
            f"steps={steps} with steps_offset={settings.steps_offset} reaches timestep {timesteps[0]:.0f} of "
            f"0..{total - 1}; use fewer steps"
        )
    return timesteps


def check_descending(steps: int, values: np.ndarray) -> None:
    """ValueError where two of a method's timesteps or noise levels fall together."""
    if not np.all(np.diff(values) < 0):
        raise ValueError(f"steps={steps} is too many: two of them fall on the same noise level; use fewer steps")
