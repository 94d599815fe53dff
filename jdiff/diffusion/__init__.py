"""Diffusion as pure functions over a denoiser `model_fn(x_BHWC, t_B)`: schedules, losses, samplers."""

from jdiff.diffusion.guidance import guide
from jdiff.diffusion.loss import flow_loss, gaussian_loss, snr_weight
from jdiff.diffusion.sampler import ddim, ddpm, flow_euler, flow_heun
from jdiff.diffusion.schedule import (
    Schedule,
    TimestepBias,
    add_noise,
    keep_timesteps,
    make_schedule,
    offset_noise,
    prediction_target,
    respace,
    sample_noise,
    sample_times,
    sample_timesteps,
    split_prediction,
)
from jdiff.diffusion.schedulers import SCHEDULERS, Plan, Scheduler, make_scheduler

__all__ = [
    "SCHEDULERS",
    "Plan",
    "Schedule",
    "Scheduler",
    "TimestepBias",
    "add_noise",
    "ddim",
    "ddpm",
    "flow_euler",
    "flow_heun",
    "flow_loss",
    "gaussian_loss",
    "guide",
    "keep_timesteps",
    "make_schedule",
    "make_scheduler",
    "offset_noise",
    "prediction_target",
    "respace",
    "sample_noise",
    "sample_times",
    "sample_timesteps",
    "snr_weight",
    "split_prediction",
]
