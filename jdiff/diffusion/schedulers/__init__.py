"""Samplers of Stable Diffusion's kind, built from diffusers' `scheduler_config.json` and run in one traced loop.

A `Scheduler` (a kind and its settings) makes a `Plan` (tables for so many steps), and `run` follows it.
"""

from jdiff.diffusion.schedulers.plan import Plan, run
from jdiff.diffusion.schedulers.scheduler import Scheduler, from_config, make_scheduler
from jdiff.diffusion.schedulers.settings import SCHEDULERS, STABLE_DIFFUSION_V1

__all__ = ["SCHEDULERS", "STABLE_DIFFUSION_V1", "Plan", "Scheduler", "from_config", "make_scheduler", "run"]
