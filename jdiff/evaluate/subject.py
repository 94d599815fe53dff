"""A model as its pipeline asks it: by labels or by texts, so that what measures or calibrates one knows neither."""

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jdiff.diffusion.process import Process
from jdiff.pipelines import ClassPipeline, TextPipeline, from_uint8
from jdiff.pipelines.progress import Callback, Preview
from jdiff.pipelines.rows import place

Trajectory = list[np.ndarray]
"""What there was after each step, or each call of the model: float32 (B, h, w, C)."""


class Subject(Protocol):
    """model, params: `model.apply({"params": params}, x_BHWC, t_B, y)`. sampler: the pipeline's own."""

    model: Any
    params: Any
    mesh: Mesh
    process: Process
    sampler: str

    @property
    def y(self) -> np.ndarray:
        """What the B pictures are asked for: labels (B,) or contexts (B, S, E)."""
        ...

    @property
    def empty(self) -> np.ndarray | None:
        """What asks for nothing: a label (), a context (S, E); None where the model knows none."""
        ...

    def changed(self, params: Any) -> "Subject":
        """The same, with other parameters."""
        ...

    def samples(
        self, *, seed: int, steps: int, guidance_scale: float, sampler: str | None = None
    ) -> tuple[np.ndarray, Trajectory]:
        """(pictures as the model has them, float32 (B, h, w, C), how they came to be). sampler: another than the own."""
        ...

    def pictures(self, x_BhwC: np.ndarray) -> np.ndarray:
        """Samples as uint8 (B, H, W, 3)."""
        ...

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Pictures, uint8 (B, H, W, 3), as the model has them. ValueError where nothing here makes latents of them."""
        ...


class Classes:
    """See `Subject`: a pipeline, and a label for each picture. ValueError for no label."""

    def __init__(self, pipe: ClassPipeline, labels: Sequence[int]):
        if not len(labels):
            raise ValueError("labels is empty: give at least one")
        self.pipe, self.model, self.params = pipe, pipe.model, pipe.params
        self.mesh, self.process, self.sampler = pipe.mesh, pipe.process, pipe.sampler
        self.y = np.asarray(labels, np.int32)
        null = pipe.model.null_label
        self.empty = None if null is None else np.asarray(null, np.int32)

    def changed(self, params: Any) -> "Classes":
        """See `Subject`."""
        pipe = copy.copy(self.pipe)
        pipe.params = place(pipe.mesh, params)
        return Classes(pipe, self.y.tolist())

    def samples(self, **settings: Any) -> tuple[np.ndarray, Trajectory]:
        """See `Subject`."""
        trajectory, callback = _follow()
        return self.pipe(self.y.tolist(), callback=callback, **settings), trajectory

    def pictures(self, x_BhwC: np.ndarray) -> np.ndarray:
        """See `Subject`."""
        return self.pipe.pictures(x_BhwC)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """See `Subject`."""
        size, channels = self.model.image_size, self.model.channels
        if images.shape[1:] != (size, size, 3) or channels != 3:
            raise ValueError(
                f"pictures of {images.shape[1:]} are not what the model takes, {(size, size, channels)}: a model of latents "
                "takes a cache of them (tools/cache_latents.py)"
            )
        return np.asarray(from_uint8(jnp.asarray(images)))


class Texts:
    """See `Subject`: a pipeline, and a prompt for each picture. ValueError for no prompt, or for a model that repaints."""

    def __init__(self, pipe: TextPipeline, prompts: Sequence[str]):
        if not prompts:
            raise ValueError("prompts is empty: give at least one")
        if pipe.geometry.repaints:
            raise ValueError("the model repaints part of a picture, and prompts alone are nothing to ask it")
        self.pipe, self.prompts, self.model, self.params = pipe, list(prompts), pipe.unet, pipe.params["unet"]
        self.mesh, self.process, self.sampler = pipe.mesh, Process(pipe.scheduler.schedule), pipe.scheduler.kind

    @cached_property
    def _contexts(self) -> np.ndarray:
        return self.pipe.encode([*self.prompts, ""])

    @property
    def y(self) -> np.ndarray:
        """See `Subject`."""
        return self._contexts[:-1]

    @property
    def empty(self) -> np.ndarray:
        """See `Subject`."""
        return self._contexts[-1]

    def changed(self, params: Any) -> "Texts":
        """See `Subject`."""
        pipe = copy.copy(self.pipe)
        pipe.params = {**pipe.params, "unet": place(pipe.mesh, params)}
        return Texts(pipe, self.prompts)

    def samples(self, *, sampler: str | None = None, **settings: Any) -> tuple[np.ndarray, Trajectory]:
        """See `Subject`."""
        trajectory, callback = _follow()
        return self.pipe(self.prompts, scheduler=sampler, output="latent", callback=callback, **settings), trajectory

    def pictures(self, x_BhwC: np.ndarray) -> np.ndarray:
        """See `Subject`."""
        return self.pipe.decode(x_BhwC)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """See `Subject`."""
        return self.pipe.latents_of(images)


def _follow() -> tuple[Trajectory, Callback]:
    """(a trajectory, the callback that fills it as a pipeline's call goes on)."""
    trajectory: Trajectory = []

    def note(done: int, total: int, preview: Preview) -> None:
        trajectory.append(preview.samples())

    return trajectory, note
