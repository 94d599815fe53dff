"""A diffusion process by its settings: what is predicted, how the loss weighs it, and how it is run backwards."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.diffusion.loss import flow_loss, gaussian_loss
from jdiff.diffusion.sampler import Part, ddim, ddpm, flow_euler, flow_heun
from jdiff.diffusion.schedule import (
    ModelFn,
    Schedule,
    TimestepBias,
    add_noise,
    make_schedule,
    offset_noise,
    respace,
    sample_noise,
    sample_times,
    sample_timesteps,
)
from jdiff.diffusion.schedulers import STABLE_DIFFUSION_V1, Scheduler, make_scheduler
from jdiff.diffusion.schedulers.scheduler import CLASSES

PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
"""Our names and diffusers'."""
SAMPLERS = {"gaussian": ("ddpm", "ddim"), "flow": ("euler", "heun")}


@dataclass(frozen=True)
class Process:
    """Gaussian diffusion (`schedule` given) or flow matching (`schedule` None).

    variance: "learned_range" for a model with two halves, else "fixed_small" or "fixed_large".
    noise_offset: see `offset_noise`. input_perturbation: the gamma of `gaussian_loss`'s `input_noise`. Both are Gaussian
    diffusion's alone, as is timestep_bias.
    """

    schedule: Schedule | None
    prediction_type: str = "eps"
    variance: str = "fixed_small"
    snr_gamma: float | None = None
    time_sampling: str = "uniform"
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    timestep_bias: TimestepBias | None = None

    @property
    def samplers(self) -> tuple[str, ...]:
        """The names that `sample` takes, the quicker one last."""
        return SAMPLERS["flow" if self.schedule is None else "gaussian"]

    def losses(self, model_fn: ModelFn, x_0_BHWC: jax.Array, keys_B: jax.Array) -> dict[str, jax.Array]:
        """Per-sample `loss` and its parts, and `time`, the noise level in [0, 1]: all from each sample's own key."""
        keys_B4 = jax.vmap(lambda key: jax.random.split(key, 4))(keys_B)
        noise_BHWC = sample_noise(keys_B4[:, 0], x_0_BHWC.shape[1:], x_0_BHWC.dtype)
        if self.schedule is None:
            t_B = sample_times(keys_B4[:, 1], self.time_sampling)
            return {**flow_loss(model_fn, x_0_BHWC, t_B, noise_BHWC), "time": 1.0 - t_B}
        t_B = sample_timesteps(keys_B4[:, 1], len(self.schedule), self.timestep_bias)
        if self.noise_offset:
            noise_BHWC = offset_noise(keys_B4[:, 2], noise_BHWC, self.noise_offset)
        input_noise_BHWC = None
        if self.input_perturbation:
            more_BHWC = sample_noise(keys_B4[:, 3], noise_BHWC.shape[1:], noise_BHWC.dtype)
            input_noise_BHWC = noise_BHWC + self.input_perturbation * more_BHWC
        losses = gaussian_loss(
            model_fn,
            self.schedule,
            x_0_BHWC,
            t_B,
            noise_BHWC,
            prediction_type=self.prediction_type,
            variance=self.variance,
            snr_gamma=self.snr_gamma,
            input_noise_BHWC=input_noise_BHWC,
        )
        return {**losses, "time": t_B / len(self.schedule)}

    def noised(self, x_0_BHWC: jax.Array, level_B: jax.Array, noise_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x_0 with noise, the times that a model is told) at noise levels in [0, 1)."""
        if self.schedule is None:
            level = level_B.reshape(-1, *(1,) * (x_0_BHWC.ndim - 1))
            return (1.0 - level) * x_0_BHWC + level * noise_BHWC, 1.0 - level_B
        t_B = (level_B * len(self.schedule)).astype(jnp.int32)
        return add_noise(self.schedule, x_0_BHWC, noise_BHWC, t_B), jnp.asarray(self.schedule.timesteps)[t_B]

    def sample(
        self,
        denoise: ModelFn,
        x_T: jax.Array,
        keys_B: jax.Array,
        sampler: str,
        steps: int,
        part: Part | None = None,
    ) -> jax.Array:
        """Noise -> data by one of `samplers`, or some of its steps; ValueError for another name or a number of steps that does
        not fit."""
        if sampler not in self.samplers:
            raise ValueError(f"sampler={sampler!r} does not fit this model; use one of {list(self.samplers)}")
        if self.schedule is None:
            return {"euler": flow_euler, "heun": flow_heun}[sampler](denoise, x_T, steps, part)
        # a schedule that ends in pure noise must be entered at its end (arXiv:2305.08891, section 3.3)
        spacing = "trailing" if self.schedule.alphas_cumprod[-1] == 0 else "sections"
        kept = respace(self.schedule, steps, spacing=spacing)
        settings: dict[str, Any] = {"steps": None, "prediction_type": self.prediction_type, "part": part}
        if sampler == "ddim":
            return ddim(denoise, kept, x_T, keys_B, **settings)
        return ddpm(denoise, kept, x_T, keys_B, variance=self.variance, **settings)


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


def make_text_scheduler(settings: Mapping[str, Any], kind: str, base: Mapping[str, Any] | None = None) -> Scheduler:
    """The scheduler `kind` that fits a model trained under a text task's `diffusion`.

    base: the `scheduler_config.json` that training starts from, Stable Diffusion v1's when None; a None in `settings` keeps what
    it says. ValueError for settings that do not go together, or that `kind` does not have.
    """
    config = dict(STABLE_DIFFUSION_V1 if base is None else base)
    if settings["schedule"] is not None:
        limits = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (0.0001, 0.02)}
        name = {"cosine": "squaredcos_cap_v2"}.get(settings["schedule"], settings["schedule"])
        start, end = limits[settings["schedule"]]
        config |= {"beta_schedule": name, "beta_start": start, "beta_end": end}
    if settings["prediction_type"] is not None:
        config["prediction_type"] = PREDICTION_TYPES[settings["prediction_type"]]
    if settings["zero_terminal_snr"]:
        # a schedule that ends in pure noise must be entered at its end (arXiv:2305.08891, section 3.3)
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return make_scheduler(kind, config)


def make_text_process(settings: Mapping[str, Any], scheduler: Scheduler) -> Process:
    """The process of a text task's `diffusion`, on the noise schedule of `scheduler`; for its losses."""
    ours = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    bias = settings["timestep_bias"]
    return Process(
        scheduler.schedule,
        ours[scheduler.settings.prediction_type],
        snr_gamma=settings["snr_gamma"],
        noise_offset=settings["noise_offset"],
        input_perturbation=settings["input_perturbation"],
        timestep_bias=None if bias["strategy"] == "none" else TimestepBias(**bias),
    )


def scheduler_record(scheduler: Scheduler) -> dict[str, Any]:
    """The diffusers `scheduler_config.json` that `schedulers.from_config` makes this scheduler of."""
    kind, more = scheduler.kind, {}
    if kind.startswith("dpmpp_2m"):
        kind, more = "dpmpp_2m", {"algorithm_type": "sde-dpmsolver++" if kind.endswith("sde") else "dpmsolver++"}
    names = {kind: name for name, kind in CLASSES.items()}
    return {**dict(scheduler.given), **more, "_class_name": names[kind]}
