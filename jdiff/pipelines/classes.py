"""From labels to pictures. One denoising loop serves every caller: the training loop's grids, the tools, a user's script."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jdiff import diffusion, sharding
from jdiff.diffusion.process import Process
from jdiff.pipelines.loras import WithLoras
from jdiff.pipelines.pictures import to_uint8
from jdiff.pipelines.progress import Callback, Preview, Report
from jdiff.pipelines.rows import gather, over, pinned, spread

Shown = Callable[[np.ndarray], np.ndarray]
STATIC = ("guidance_scale", "guidance_channels", "guidance_rescale", "guidance_interval", "sampler", "steps")


class ClassPipeline(WithLoras):
    """Class-conditional sampling with a model, its parameters and its diffusion process, over all devices of a mesh.

    preview: samples (B, H, W, C) -> uint8 RGB, for a model of latents; pixels need none.
    class_names: what the labels mean, for captions and messages.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        process: Process,
        *,
        mesh: Mesh | None = None,
        class_names: Sequence[str] = (),
        preview: Shown | None = None,
        loras: Sequence[tuple[str, float]] = (),
    ):
        self.loras = list(loras)
        self.model, self.params, self.process = model, params, process
        self.mesh = mesh or sharding.make_mesh()
        self.class_names, self.preview = list(class_names), preview or to_uint8

    @property
    def sampler(self) -> str:
        """The process's quick deterministic sampler: ddim, euler."""
        return self.process.samplers[-1 if self.process.schedule is not None else 0]

    @cached_property
    def _begin(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        return jax.jit(partial(_begin, self.mesh, self.model))

    @cached_property
    def _denoise(self) -> Callable[..., jax.Array]:
        """Some steps: their bounds are traced, so a call in parts compiles once."""
        fixed = partial(_denoise, self.mesh, self.model, self.process)
        return jax.jit(fixed, static_argnames=STATIC, donate_argnames="x_BHWC")

    def __call__(
        self,
        labels: Sequence[int],
        *,
        steps: int = 50,
        guidance_scale: float = 4.0,
        guidance_channels: int | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        sampler: str | None = None,
        seed: int = 0,
        first_index: int = 0,
        params: Any = None,
        callback: Callback | None = None,
        callback_every: int = 1,
    ) -> np.ndarray:
        """Samples one picture a label: float32 (len(labels), H, W, C), in [-1, 1] for pixels, latents as the model has them.

        Picture i depends on (seed, first_index + i, its label) alone, whatever batch it stands in. sampler: of the
        process's `samplers`, `self.sampler` when None. guidance_channels=3 is the official
        DiT sampler. params: other parameters than the pipeline's own, same tree. callback: told every `callback_every` steps
        and at the end; see `progress.Callback`.

        ValueError for a label out of range, or guidance on a model without an unconditional label.
        """
        allowed = self.model.num_classes + (self.model.null_label is not None)
        for label in labels:
            if not 0 <= label < allowed:
                raise ValueError(
                    f"label {label} is out of range: the model has the classes 0..{self.model.num_classes - 1}"
                )
        if guidance_scale != 1 and self.model.null_label is None:
            raise ValueError(
                f"guidance={guidance_scale} needs an unconditional label; this model has label_dropout=0: use 1"
            )
        if steps < 1:
            raise ValueError(f"steps={steps} must be above 0")
        if not len(labels):
            raise ValueError("labels is empty: give at least one")
        inputs = {
            "label": np.asarray(labels, np.int32),
            "index": (first_index + np.arange(len(labels))).astype(np.uint32),
        }
        inputs = spread(self.mesh, inputs, 1 if guidance_scale == 1 else 2)
        settings = {
            "guidance_scale": float(guidance_scale),
            "guidance_channels": guidance_channels,
            "guidance_rescale": guidance_rescale,
            "guidance_interval": guidance_interval,
            "sampler": sampler or self.sampler,
            "steps": steps,
        }
        params = self.params if params is None else params
        x_BHWC, keys_B = self._begin(inputs["index"], jax.random.key(seed))
        report = Report(callback, callback_every, steps)
        for first, last in report.parts():
            x_BHWC = self._denoise(params, x_BHWC, inputs["label"], keys_B, first, last, **settings)
            here = lambda x=x_BHWC: gather(x)[: len(labels)]  # noqa: E731
            report(last, x_BHWC, Preview(lambda here=here: self.pictures(here()), here))
        return gather(x_BHWC)[: len(labels)]

    def many(self, labels: Sequence[int], batch_size: int, first: int = 0, **settings: Any) -> Iterator[np.ndarray]:
        """Pictures of all labels from the first-th on, uint8 (batch_size or fewer, H', W', 3) at a time. settings: as of a call."""
        return map(self.pictures, self.many_samples(labels, batch_size, first, **settings))

    def many_samples(
        self, labels: Sequence[int], batch_size: int, first: int = 0, **settings: Any
    ) -> Iterator[np.ndarray]:
        """As `many`, samples as a call gives them."""
        count = len(labels)
        for start in range(first, count, batch_size):
            # the last batch is filled up to the others' size, so that it does not compile anew
            rows = [labels[min(start + i, count - 1)] for i in range(min(batch_size, count))]
            yield self(rows, first_index=start, **settings)[: count - start]

    def pictures(self, samples_BHWC: np.ndarray) -> np.ndarray:
        """Samples -> uint8 RGB (B, H', W', 3)."""
        return self.preview(samples_BHWC)


def _begin(mesh: Mesh, model: Any, index_B: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(noise, the keys of the steps), each sample's from its own index."""
    keys_B2 = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index)))(index_B)
    shape = (model.image_size, model.image_size, model.channels)
    return over(mesh, (diffusion.sample_noise(keys_B2[:, 0], shape), keys_B2[:, 1]))


def _denoise(
    mesh: Mesh,
    model: Any,
    process: Process,
    params: Any,
    x_BHWC: jax.Array,
    label_B: jax.Array,
    keys_B: jax.Array,
    first: int,
    last: int,
    *,
    guidance_scale: float,
    guidance_channels: int | None,
    guidance_rescale: float,
    guidance_interval: tuple[float, float] | None,
    sampler: str,
    steps: int,
) -> jax.Array:
    """Steps `first`..`last` - 1 of the one loop: guidance around the model, the sampler around both."""
    guided = diffusion.guide(
        pinned(mesh, partial(model.apply, {"params": params})),
        label_B,
        model.null_label,
        guidance_scale,
        channels=guidance_channels,
        rescale=guidance_rescale,
        interval=guidance_interval,
    )
    made = process.sample(pinned(mesh, guided), x_BHWC, keys_B, sampler, steps, (first, last))
    return over(mesh, made.astype(jnp.float32))
