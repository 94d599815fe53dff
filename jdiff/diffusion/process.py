"""A diffusion process by its settings: what is predicted, how the loss weighs it, and how it is run backwards."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jdiff.diffusion.loss import flow_loss, gaussian_loss
from jdiff.diffusion.sampler import ddim, ddpm, flow_euler, flow_heun
from jdiff.diffusion.schedule import (
    ModelFn,
    Schedule,
    make_schedule,
    respace,
    sample_noise,
    sample_times,
    sample_timesteps,
)

SAMPLERS = {"gaussian": ("ddpm", "ddim"), "flow": ("euler", "heun")}


@dataclass(frozen=True)
class Process:
    """Gaussian diffusion (`schedule` given) or flow matching (`schedule` None).

    variance: "learned_range" for a model with two halves, else "fixed_small" or "fixed_large".
    """

    schedule: Schedule | None
    prediction_type: str = "eps"
    variance: str = "fixed_small"
    snr_gamma: float | None = None
    time_sampling: str = "uniform"

    @property
    def samplers(self) -> tuple[str, ...]:
        """The names that `sample` takes, the quicker one last."""
        return SAMPLERS["flow" if self.schedule is None else "gaussian"]

    def losses(self, model_fn: ModelFn, x_0_BHWC: jax.Array, keys_B: jax.Array) -> dict[str, jax.Array]:
        """Per-sample `loss` and its parts, and `time`, the noise level in [0, 1]: all from each sample's own key."""
        keys_B2 = jax.vmap(jax.random.split)(keys_B)
        noise_BHWC = sample_noise(keys_B2[:, 0], x_0_BHWC.shape[1:], x_0_BHWC.dtype)
        if self.schedule is None:
            t_B = sample_times(keys_B2[:, 1], self.time_sampling)
            return {**flow_loss(model_fn, x_0_BHWC, t_B, noise_BHWC), "time": 1.0 - t_B}
        t_B = sample_timesteps(keys_B2[:, 1], len(self.schedule))
        losses = gaussian_loss(
            model_fn,
            self.schedule,
            x_0_BHWC,
            t_B,
            noise_BHWC,
            prediction_type=self.prediction_type,
            variance=self.variance,
            snr_gamma=self.snr_gamma,
        )
        return {**losses, "time": t_B / len(self.schedule)}

    def sample(self, denoise: ModelFn, x_T: jax.Array, keys_B: jax.Array, sampler: str, steps: int) -> jax.Array:
        """Noise -> data by one of `samplers`; ValueError for another name or a number of steps that does not fit."""
        if sampler not in self.samplers:
            raise ValueError(f"sampler={sampler!r} does not fit this model; use one of {list(self.samplers)}")
        if self.schedule is None:
            return {"euler": flow_euler, "heun": flow_heun}[sampler](denoise, x_T, steps)
        # a schedule that ends in pure noise must be entered at its end (arXiv:2305.08891, section 3.3)
        spacing = "trailing" if self.schedule.alphas_cumprod[-1] == 0 else "sections"
        kept = respace(self.schedule, steps, spacing=spacing)
        if sampler == "ddim":
            return ddim(denoise, kept, x_T, keys_B, steps=None, prediction_type=self.prediction_type)
        prediction_type, variance = self.prediction_type, self.variance
        return ddpm(denoise, kept, x_T, keys_B, steps=None, prediction_type=prediction_type, variance=variance)


def make_process(settings: Mapping[str, Any], learn_sigma: bool) -> Process:
    """The process that a config's `diffusion` describes, for a model with or without a variance half."""
    if settings["kind"] == "flow":
        return Process(None, time_sampling=settings["time_sampling"])
    return Process(
        make_schedule(settings["schedule"], zero_terminal_snr=settings["zero_terminal_snr"]),
        settings["prediction_type"],
        "learned_range" if learn_sigma else settings["variance"],
        settings["snr_gamma"],
    )
