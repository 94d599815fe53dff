"""Schedulers by name or from diffusers' `scheduler_config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jdiff.diffusion.schedule import Schedule
from jdiff.diffusion.schedulers.plan import Plan
from jdiff.diffusion.schedulers.settings import STABLE_DIFFUSION_V1, Settings, make_settings, noise_schedule
from jdiff.tree import nearest

CLASSES = {
    "PNDMScheduler": "pndm",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
}


@dataclass(frozen=True)
class Scheduler:
    """A kind of sampler on a noise schedule; equal and hashable by its contents. Made by `make_scheduler`.

    Attributes:
      kind: one of SCHEDULERS.
      settings: what it reads, defaults filled in.
      given: the settings as they were given, those of other kinds included, for `replace_kind`.
    """

    kind: str
    settings: Settings
    given: tuple[tuple[str, Any], ...]

    @property
    def schedule(self) -> Schedule:
        """The noise schedule that the model was trained on."""
        return noise_schedule(self.settings)

    def plan(self, steps: int, strength: float = 1.0) -> Plan:
        """This scheduler on so many steps, with `strength` below 1 for image-to-image.

        Raises:
          ValueError: steps outside 1..num_train_timesteps or too many for the spacing, a strength outside (0, 1] or so
            small that no step is left.
        """
        return Plan(self.kind, self.settings, steps, strength)

    def replace_kind(self, kind: str, **changes: Any) -> "Scheduler":
        """Another sampler with the same settings, but for `changes`; errors as in `make_scheduler`.

        As in diffusers' `from_config`, a setting that was not given takes the new kind's own default: Stable Diffusion
        v1's PNDM has "leading" timesteps, its Euler "linspace".
        """
        return make_scheduler(kind, {**dict(self.given), **changes})


def make_scheduler(name: str, config: Mapping[str, Any] | None = None) -> Scheduler:
    """The scheduler `name`, one of SCHEDULERS, with the keys of a diffusers `scheduler_config.json`.

    Without `config` the settings are those of Stable Diffusion v1. `_class_name` and `algorithm_type` do not choose
    here, and settings that only other kinds have are set aside, so that one config serves every kind.

    Raises:
      ValueError: an unknown kind or key, with the nearest that exists; a value of the wrong type or out of range; a key
        that asks for something that this kind, or this library, does not do.
    """
    config = STABLE_DIFFUSION_V1 if config is None else config
    settings = make_settings(name, config)
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    return Scheduler(name, settings, tuple(sorted(given.items())))


def from_config(config: Mapping[str, Any]) -> Scheduler:
    """The scheduler that a diffusers `scheduler_config.json` describes, by its `_class_name`; errors as above."""
    name = config.get("_class_name")
    if name not in CLASSES:
        known = ", ".join(CLASSES)
        raise ValueError(f"scheduler config: unknown _class_name={name!r}{nearest(str(name), CLASSES)}; known: {known}")
    kind = CLASSES[name]
    if kind == "dpmpp_2m" and config.get("algorithm_type") == "sde-dpmsolver++":
        kind = "dpmpp_2m_sde"
    return make_scheduler(kind, config)
