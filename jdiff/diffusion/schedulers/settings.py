"""What a diffusers `scheduler_config.json` says, checked: no key is guessed, cast, or dropped unread."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from jdiff.diffusion.schedule import Schedule, make_schedule
from jdiff.tree import nearest

SCHEDULERS = ("pndm", "ddim", "ddpm", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm")

STABLE_DIFFUSION_V1: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "skip_prk_steps": True,
}


@dataclass(frozen=True)
class Settings:
    """The keys of diffusers that are honoured, under its names and with its defaults (but see `_DEFAULTS`).

    With `rescale_betas_zero_snr` the predictions must be "v_prediction" or "sample": eps does not determine x_0
    at zero SNR. `solver_type` is "midpoint" for DPM-Solver++ and "bh2" for UniPC; as in diffusers each takes the
    other's name for its own.
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    skip_prk_steps: bool = False
    variance_type: str | None = "fixed_small"
    use_karras_sigmas: bool = False
    final_sigmas_type: str = "zero"
    lower_order_final: bool = True
    euler_at_final: bool = False
    solver_order: int = 2
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0


_DEFAULTS: dict[str, dict[str, Any]] = {
    "pndm": {"timestep_spacing": "leading", "set_alpha_to_one": False},
    "ddim": {"timestep_spacing": "leading", "clip_sample": True},
    "ddpm": {"timestep_spacing": "leading", "clip_sample": True},
    "heun": {"beta_start": 0.00085, "beta_end": 0.012},
    "lcm": {
        **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        "timestep_spacing": "leading",
    },
}
"""Where a kind's defaults differ from those of `Settings`."""

_DPM = ("dpmpp_2m", "dpmpp_2m_sde")

_READ_BY = {
    "clip_sample_range": ("ddim", "ddpm", "heun", "lcm"),
    "set_alpha_to_one": ("pndm", "ddim"),
    "skip_prk_steps": ("pndm",),
    "variance_type": ("ddpm",),
    "final_sigmas_type": ("euler", *_DPM, "unipc"),
    "lower_order_final": (*_DPM, "unipc"),
    "euler_at_final": _DPM,
    "algorithm_type": _DPM,
    "lambda_min_clipped": _DPM,
    "solver_order": (*_DPM, "unipc"),
    "solver_type": (*_DPM, "unipc"),
    "predict_x0": ("unipc",),
    "disable_corrector": ("unipc",),
    "original_inference_steps": ("lcm",),
    "timestep_scaling": ("lcm",),
}
"""Keys that belong to some kinds. The others set them aside, so that one file's settings serve every kind."""

_ONLY = {
    "rescale_betas_zero_snr": tuple(kind for kind in SCHEDULERS if kind not in ("pndm", "heun")),
    "clip_sample": ("ddim", "ddpm", "heun", "lcm"),
    "use_karras_sigmas": ("euler", "heun", *_DPM, "unipc"),
}
"""Switches that change the picture, so that a kind without them must refuse rather than set them aside."""

_CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "skip_prk_steps": (True,),
    "variance_type": (None, "fixed_small", "fixed_large"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "solver_order": (1, 2, 3),
    "solver_type": ("midpoint", "bh2", "logrho"),
    # From here on: what is not written here, accepted where it says that it is off.
    "trained_betas": (None,),
    "thresholding": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "lambda_min_clipped": (-math.inf,),
    "predict_x0": (True,),
    "disable_corrector": ([], ()),
    "solver_p": (None,),
}

_HARMLESS = (
    *("_class_name", "_diffusers_version", "dynamic_thresholding_ratio", "sample_max_value"),
    *("flow_shift", "time_shift_type"),
)
"""Names of the file, and numbers of methods that `_CHOICES` keeps off."""


def make_settings(kind: str, config: Mapping[str, Any]) -> Settings:
    """The settings that a scheduler of `kind` reads from diffusers' `config`.

    Raises:
      ValueError: an unknown kind or key, with the nearest that exists; a value of the wrong type or out of range;
        a key that asks for something that this kind, or this library, does not do.
    """
    if kind not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {kind!r}{nearest(kind, SCHEDULERS)}; choose from {', '.join(SCHEDULERS)}")
    types = {field.name: type(field.default) for field in fields(Settings)}
    known = {*types, *_READ_BY, *_CHOICES, *_HARMLESS}
    values = dict(_DEFAULTS.get(kind, {}))
    for key, value in config.items():
        if key not in known:
            raise ValueError(f"unknown scheduler setting {key!r}{nearest(key, known)}")
        if key in _HARMLESS or kind not in _READ_BY.get(key, SCHEDULERS):
            continue
        if key in _CHOICES:
            _check_choice(kind, key, value, _CHOICES[key])
        elif not _is_a(value, types[key]):
            raise ValueError(f"scheduler setting {key}={value!r} is not of type {types[key].__name__}")
        if key in types:
            values[key] = value
    settings = Settings(**values)
    _check(kind, settings)
    noise_schedule(settings)
    return settings


@functools.cache
def noise_schedule(settings: Settings) -> Schedule:
    """The noise schedule that the model was trained on; ValueError for betas that cannot be."""
    total, rescale = settings.num_train_timesteps, settings.rescale_betas_zero_snr
    if settings.beta_schedule == "squaredcos_cap_v2":
        return make_schedule("cosine", total, zero_terminal_snr=rescale)
    return make_schedule(settings.beta_schedule, total, settings.beta_start, settings.beta_end, rescale)


def _check_choice(kind: str, key: str, value: Any, choices: tuple[Any, ...]) -> None:
    # `1 == True` in Python, and a file that says one for the other is not to be trusted
    if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices):
        names = " or ".join(repr(choice) for choice in choices[:3])
        hint = nearest(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
        raise ValueError(f"scheduler setting {key}={value!r} is not supported by {kind}{hint}; it must be {names}")


def _is_a(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)


def _check(kind: str, settings: Settings) -> None:
    for key, kinds in _ONLY.items():
        if getattr(settings, key) and kind not in kinds:
            raise ValueError(f"{kind} has no {key}; set it to false, or use one of {', '.join(kinds)}")
    for key in ("num_train_timesteps", "clip_sample_range", "original_inference_steps", "timestep_scaling"):
        if not getattr(settings, key) > 0:
            raise ValueError(f"scheduler setting {key}={getattr(settings, key)} must be above 0")
    if settings.steps_offset < 0:
        raise ValueError(f"scheduler setting steps_offset={settings.steps_offset} must not be below 0")
    if kind == "pndm" and not settings.skip_prk_steps:
        raise ValueError("pndm is written without its Runge-Kutta steps: set skip_prk_steps to true, or use ddim")
    if kind == "pndm" and settings.prediction_type == "sample":
        raise ValueError("pndm extrapolates eps or v: prediction_type 'sample' needs another scheduler, such as ddim")
    if kind in _DPM and settings.solver_order != 2:
        raise ValueError(f"{kind} is of order 2, not solver_order={settings.solver_order}; unipc has 1, 2 and 3")
    if settings.rescale_betas_zero_snr and settings.prediction_type == "epsilon":
        raise ValueError("prediction_type 'epsilon' is undefined with rescale_betas_zero_snr; use 'v_prediction'")
