"""Which spelling a checkpoint's names have, told from the names."""

from collections.abc import Iterable
from typing import Any

from jdiff.convert import clip, vae
from jdiff.convert.engine import Arrays, Naming, plan, plausible

PREFIXES = {
    "UNet": ("model.diffusion_model.",),
    "AutoencoderKL": ("first_stage_model.",),
    "CLIPText": (f"cond_stage_model.transformer.{clip.PREFIX}", "cond_stage_model.transformer."),
}
"""Class -> where CompVis' whole models have it."""


def prefixed(prefix: str) -> Any:
    """A speller that puts `prefix` in front."""
    return lambda name: prefix + name


def averaged(name: str) -> str:
    """CompVis' name of a UNet's moving average: the parameter's own without its dots (ldm/modules/ema.py)."""
    return "model_ema." + f"diffusion_model.{name}".replace(".", "")


def namings(module: Any) -> list[Naming]:
    """Every spelling of a module's names that jdiff reads, the present one first."""
    kind = type(module).__name__
    compvis = [Naming("compvis", prefixed(prefix)) for prefix in PREFIXES.get(kind, ())]
    if kind == "DiT":
        return [Naming("dit"), Naming("diffusers")]
    if kind == "Inception":
        return [Naming("torchvision")]
    if kind == "CLIP":
        return [Naming("diffusers")]
    if kind == "CLIPText":
        return [Naming("diffusers"), Naming("diffusers", prefixed(clip.PREFIX)), *compvis]
    older = [Naming("diffusers", vae.old_attention)] if kind == "AutoencoderKL" else []
    return [Naming("diffusers"), *older, Naming("compvis"), *compvis]


def find(module: Any, names: Arrays, among: Iterable[Naming] | None = None) -> Naming:
    """The spelling under which most of the arrays' names are the module's; the first of equals. Errors as `plausible`'s."""
    plausible(module, names)
    candidates = list(namings(module) if among is None else among)

    def matched(naming: Naming) -> int:
        return sum(name in names for entry in plan(module, naming) for name in entry.names)

    return max(candidates, key=matched)
