"""What a text pipeline is asked for, checked and in one form, before any model runs.

Shapes: B pictures, H W their size, h w the latents', C latent channels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from jdiff.data.images import to_rgb
from jdiff.diffusion import Plan, Scheduler

Pictures = Image.Image | np.ndarray | Sequence[Image.Image | np.ndarray]
DRAWS = ("image", "masked", "steps")


@dataclass(frozen=True)
class Geometry:
    """What of the models bears on a request: their latents, the factor between picture and latent, what they draw unasked.

    repaints: the UNet takes a mask and a masked picture beside the latents.
    """

    channels: int
    downscale: int
    default_size: tuple[int, int]
    repaints: bool = False


@dataclass(frozen=True)
class Request:
    """One call's wishes; every sequence has B entries.

    images: float32 (B, H, W, 3) in [-1, 1]; masks: float32 (B, H, W, 1), 1 where it is repainted. latents: standard normal
    noise (B, h, w, C) that the pictures start from. draws: given in place of the pipeline's own random numbers.
    """

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    seeds: tuple[int, ...]
    indices: tuple[int, ...]
    size: tuple[int, int]
    scheduler: Scheduler
    plan: Plan
    guidance_scale: float
    guidance_rescale: float
    clip_skip: int
    images: np.ndarray | None
    masks: np.ndarray | None
    latents: np.ndarray | None
    draws: Mapping[str, np.ndarray]

    def facts(self) -> list[dict[str, Any]]:
        """What made each picture, as JSON's plain values."""
        shared = {
            "steps": self.plan.steps,
            "scheduler": self.scheduler.kind,
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
            "clip_skip": self.clip_skip,
            "height": self.size[0],
            "width": self.size[1],
        }
        if self.images is not None:
            shared |= {"strength": self.plan.strength, "mask": self.masks is not None}
        if self.latents is not None:
            shared["latents"] = "given"  # the seed alone does not make it
        each = zip(self.prompts, self.negatives, self.seeds, self.indices, strict=True)
        return [{"prompt": p, "negative_prompt": n, "seed": s, "index": i, **shared} for p, n, s, i in each]


def make_request(
    geometry: Geometry,
    scheduler: Scheduler,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] = "",
    image: Pictures | None = None,
    mask: Pictures | None = None,
    strength: float | None = None,
    steps: int = 50,
    guidance_scale: float = 7.5,
    guidance_rescale: float = 0.0,
    seed: int | Sequence[int] = 0,
    first_index: int = 0,
    latents: np.ndarray | None = None,
    height: int | None = None,
    width: int | None = None,
    clip_skip: int = 0,
    noise: Mapping[str, np.ndarray] | None = None,
) -> Request:
    """Checks and completes what `TextPipeline.__call__` is given; a ValueError or TypeError names what cannot be."""
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    if not prompts:
        raise ValueError("prompt is empty: give one text or a list of them")
    count = len(prompts)
    negatives = (negative_prompt,) * count if isinstance(negative_prompt, str) else tuple(negative_prompt)
    if len(negatives) != count:
        raise ValueError(f"negative_prompt has {len(negatives)} texts for {count} prompts: give one, or one for each")
    for text in (*prompts, *negatives):
        if not isinstance(text, str):
            raise TypeError(f"a prompt is a text, found a {type(text).__name__}: {text!r}")
    seeds, indices = _seeds(seed, first_index, count)
    if image is None and mask is not None:
        raise ValueError("mask without image: give the image that it masks")
    if image is None and strength is not None:
        raise ValueError(f"strength={strength} without image: it says how much of an image is made anew")
    if geometry.repaints and mask is None:
        raise ValueError("this UNet repaints part of a picture: give image and mask")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale={guidance_scale} must be a finite number")
    if guidance_scale == 1 and any(negatives):
        raise ValueError(
            f"negative_prompt={next(filter(None, negatives))!r} does nothing at guidance_scale=1: leave it out"
        )
    if not 0.0 <= guidance_rescale <= 1.0:
        raise ValueError(f"guidance_rescale={guidance_rescale} must lie in 0..1")
    images = None if image is None else 2.0 * _arrays(image, "image", 3, count) - 1.0
    masks = None if mask is None else (_arrays(mask, "mask", 1, count) >= 0.5).astype(np.float32)
    size = _size(geometry, height, width, images)
    if masks is not None and masks.shape[1:3] != size:
        raise ValueError(
            f"the mask is {_by(masks.shape[1:3])} and the image {_by(size)} (height x width): they must agree"
        )
    shape = (count, *(n // geometry.downscale for n in size), geometry.channels)
    if latents is not None:
        latents = np.asarray(latents, np.float32)
        if latents.shape != shape:
            raise ValueError(
                f"latents have the shape {latents.shape}, expected {shape}: (pictures, height, width, channels)"
            )
    if strength is None:
        strength = 0.8 if images is not None and masks is None else 1.0
    plan = scheduler.plan(steps, strength)
    draws = _draws(noise or {}, shape, plan.calls)
    shared = (float(guidance_scale), float(guidance_rescale), clip_skip, images, masks, latents, draws)
    return Request(prompts, negatives, seeds, indices, size, scheduler, plan, *shared)


def _seeds(seed: int | Sequence[int], first_index: int, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Each picture's seed and index: one seed and running indices, or a seed for each and the same index."""
    one = isinstance(seed, int | np.integer)
    seeds = (int(seed),) * count if one else tuple(int(s) for s in seed)
    if len(seeds) != count:
        raise ValueError(f"seed has {len(seeds)} numbers for {count} prompts: give one, or one for each")
    for number in (*seeds, first_index, first_index + count - 1):
        if not 0 <= number < 2**32:
            raise ValueError(f"seed and first_index must lie in 0..{2**32 - 1}, found {number}")
    return seeds, tuple(first_index + i * one for i in range(count))


def _arrays(value: Pictures, what: str, channels: int, count: int) -> np.ndarray:
    """One picture for all, or one for each, as float32 (count, H, W, channels) in [0, 1]."""
    single = isinstance(value, Image.Image) or (isinstance(value, np.ndarray) and value.ndim < 4)
    given = [value] if single else value
    if not isinstance(given, list | tuple | np.ndarray):
        raise TypeError(f"{what} is a {type(value).__name__}: give a PIL image, a numpy array, or a list of them")
    found = [_array(each, what, channels) for each in given]
    if len(found) not in (1, count):
        raise ValueError(f"{what} has {len(found)} pictures for {count} prompts: give one, or one for each")
    sizes = {x.shape[:2] for x in found}
    if len(sizes) > 1:
        raise ValueError(f"{what} has pictures of {', '.join(map(_by, sorted(sizes)))}: one call makes one size")
    return np.stack(found if len(found) == count else found * count)


def _array(value: Any, what: str, channels: int) -> np.ndarray:
    """One picture: RGB over white, or for one channel grey; bytes, or floats in [0, 1]."""
    if isinstance(value, Image.Image):
        value = np.asarray(to_rgb(value) if channels == 3 else to_rgb(value).convert("L"))
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{what} is a {type(value).__name__}: give a PIL image, a numpy array, or a list of them")
    array = value[..., None] if channels == 1 and value.ndim == 2 else value
    if array.ndim != 3 or array.shape[-1] != channels:
        raise ValueError(f"{what} has the shape {value.shape}, expected (height, width, {channels})")
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255.0
    if array.dtype == bool:
        return array.astype(np.float32)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{what} is an array of {array.dtype}: give uint8, or floats in 0..1")
    array = array.astype(np.float32)
    if not (array.min() >= 0.0 and array.max() <= 1.0):
        raise ValueError(f"{what} has values of {array.min():.3g}..{array.max():.3g}: floats must lie in 0..1")
    return array


def _size(geometry: Geometry, height: int | None, width: int | None, images: np.ndarray | None) -> tuple[int, int]:
    """The image's own size, else what is asked for, else the models'."""
    natural = geometry.default_size if images is None else images.shape[1:3]
    size = (height if height is not None else natural[0], width if width is not None else natural[1])
    if images is not None and size != natural:
        raise ValueError(f"the image is {_by(natural)} and {_by(size)} is asked for (height x width): resize it first")
    for name, value in zip(("height", "width"), size, strict=True):
        step = geometry.downscale
        if value < step or value % step:
            near = max(step, round(value / step) * step)
            raise ValueError(f"{name}={value} must be a multiple of {step}, such as {near}")
    return size


def _draws(noise: Mapping[str, np.ndarray], shape: tuple[int, ...], calls: int) -> dict[str, np.ndarray]:
    found = {}
    for name, value in noise.items():
        if name not in DRAWS:
            raise ValueError(f"noise has the unknown entry {name!r}; it may have {', '.join(DRAWS)}")
        expected = (calls, *shape) if name == "steps" else shape
        found[name] = np.asarray(value, np.float32)
        if found[name].shape != expected:
            raise ValueError(f"noise[{name!r}] has the shape {found[name].shape}, expected {expected}")
    return found


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"
