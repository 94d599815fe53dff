"""What the page and the API can ask of a pipeline: one job at a time, within limits, told while it goes on."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jdiff.app.stream import stream
from jdiff.app.uploads import check_loras, fitted, keep_outside
from jdiff.loading import attach
from jdiff.pipelines import ClassPipeline, TextPipeline


@dataclass(frozen=True)
class Limits:
    """What one job may ask for. side: of a picture, in pixels; waiting: jobs in the queue."""

    side: int = 1024
    steps: int = 150
    pictures: int = 4
    prompt: int = 2000
    loras: int = 4
    waiting: int = 16


@dataclass(frozen=True)
class Progress:
    """How far a job is. pictures: uint8 (B, H, W, 3) of what there is, noise and all, or None."""

    done: int
    total: int
    seconds: float
    pictures: np.ndarray | None = None


@dataclass(frozen=True)
class Made:
    """A job's pictures, and what made each."""

    pictures: list[Image.Image]
    facts: list[dict[str, Any]]


Job = Iterator[Progress | Made]
Work = Callable[[Callable[[Progress], None]], Made]


class Studio:
    """Jobs over a pipeline, in the order in which they come to the device. name: of the model, for the pictures' facts."""

    def __init__(self, pipe: TextPipeline | ClassPipeline, name: str, limits: Limits = Limits()):
        self.pipe, self.name, self.limits = pipe, name, limits
        self._device = threading.Lock()

    def from_prompt(
        self,
        prompt: str,
        negative: str = "",
        *,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        strength: float | None = None,
        width: int,
        height: int,
        steps: int = 30,
        guidance: float = 7.5,
        scheduler: str | None = None,
        seed: int = 0,
        count: int = 1,
        loras: Sequence[Path] = (),
        scales: str = "",
        preview_every: int = 0,
    ) -> Job:
        """Progress, then what was made: `count` pictures of a prompt, from nothing, an image, or within its mask (white is made
        anew, and what is outside keeps its own pixels).

        An image is resized to the area of width x height and keeps its shape. scales: the LoRAs' strengths, by comma.
        preview_every: steps between two previews; 0 is none. ValueError for what cannot be.
        """
        pipe = self.pipe
        assert isinstance(pipe, TextPipeline)
        if not prompt.strip():
            raise ValueError("the prompt is empty: say what to show")
        for title, text in (("prompt", prompt), ("negative prompt", negative)):
            if len(text) > self.limits.prompt:
                raise ValueError(f"the {title} has {len(text)} characters, above {self.limits.prompt}")
        self._check(width=width, height=height, steps=steps, count=count)
        if image is not None:
            width, height = fitted(image.size, width, height, pipe.geometry.downscale)
            self._check(width=width, height=height)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        if mask is not None:
            mask = mask.resize((width, height), Image.Resampling.NEAREST)
            if not mask.getbbox():
                raise ValueError("nothing is painted: brush over what is to be made anew")
        settings = {
            "negative_prompt": negative,
            "image": image,
            "mask": mask,
            "strength": strength,
            "width": width,
            "height": height,
            "steps": steps,
            "guidance_scale": guidance,
            "scheduler": scheduler,
            "seed": seed,
        }
        prompts = [prompt] * count
        chosen = self._loras(loras, scales)

        def work(tell: Callable[[Progress], None]) -> Made:
            params, names = self._adapted({"unet": pipe.unet, "vae": pipe.vae, "text": pipe.text}, pipe.params, chosen)
            pictures = pipe(prompts, params=params, callback=reporter(tell, preview_every), **settings)
            if image is not None and mask is not None:
                feather = pipe.geometry.downscale / 4
                pictures = [keep_outside(picture, image, mask, feather) for picture in pictures]
            return Made(pictures, [{**fact, **names} for fact in pipe.facts(prompts, **settings)])

        return self._job(work)

    def from_labels(
        self,
        labels: Sequence[int],
        *,
        steps: int = 50,
        guidance: float = 4.0,
        sampler: str | None = None,
        seed: int = 0,
        count: int = 1,
        loras: Sequence[Path] = (),
        scales: str = "",
        preview_every: int = 0,
    ) -> Job:
        """As `from_prompt`: `count` pictures of each class."""
        pipe = self.pipe
        assert isinstance(pipe, ClassPipeline)
        if not labels:
            raise ValueError("there is no class: choose one or more")
        self._check(steps=steps, count=count)
        if len(labels) > 8 * self.limits.pictures:
            raise ValueError(f"{len(labels)} classes are above this app's limit of {8 * self.limits.pictures}")
        rows = [label for label in labels for _ in range(count)]
        settings = {"steps": steps, "guidance_scale": guidance, "sampler": sampler or pipe.sampler, "seed": seed}
        chosen = self._loras(loras, scales)

        def work(tell: Callable[[Progress], None]) -> Made:
            params, names = self._adapted({"dit": pipe.model}, {"dit": pipe.params}, chosen)
            samples = pipe(rows, params=params["dit"], callback=reporter(tell, preview_every), **settings)
            pictures = [Image.fromarray(picture) for picture in pipe.pictures(samples)]
            name = lambda label: {"class": pipe.class_names[label]} if pipe.class_names else {}  # noqa: E731
            facts = [{**name(row), "labels": row, "index": i, **settings, **names} for i, row in enumerate(rows)]
            return Made(pictures, facts)

        return self._job(work)

    def _job(self, work: Work) -> Job:
        """`work` when the device is free; a generator, so that what is wrong with a request is said before it is asked."""

        def alone(tell: Callable[[Progress], None]) -> Made:
            with self._device:
                made = work(tell)
            return Made(made.pictures, [{"run": self.name, **fact} for fact in made.facts])

        made = yield from stream(alone)
        yield made

    def _check(self, **asked: int) -> None:
        most = {"width": self.limits.side, "height": self.limits.side, "steps": self.limits.steps}
        for name, value in asked.items():
            limit = most.get(name, self.limits.pictures)
            if not 1 <= value <= limit:
                raise ValueError(f"{name}={value} is outside this app's limits of 1..{limit}")

    def _loras(self, paths: Sequence[Path], scales: str) -> list[tuple[Path, float]]:
        if len(paths) > self.limits.loras:
            raise ValueError(f"{len(paths)} LoRA files are above this app's limit of {self.limits.loras}")
        return check_loras(paths, scales)

    def _adapted(self, modules: dict[str, Any], params: Any, loras: list[tuple[Path, float]]) -> tuple[Any, dict]:
        """(parameters by model, the facts of their adapters)."""
        params, names = attach(modules, params, loras, self.pipe.mesh, self.pipe.quantized)
        there = dict([*self.pipe.loras, *names])
        return params, {"lora": there} if there else {}


def reporter(tell: Callable[[Progress], None], preview_every: int) -> Callable[..., None]:
    """A pipeline's callback that tells of every step, with a picture every so many (none after the last)."""
    start = time.monotonic()

    def callback(done: int, total: int, preview: Callable[[], np.ndarray]) -> None:
        shows = preview_every > 0 and done % preview_every == 0 and done < total
        tell(Progress(done, total, time.monotonic() - start, preview() if shows else None))

    return callback
