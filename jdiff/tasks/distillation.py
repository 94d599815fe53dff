"""Training towards a teacher, without data: the model's output is to be that of a teacher's, on the teacher's own pictures.

So adapters over integers, or a model that is trained through them, take back what rounding changed: EfficientDM's idea
(arXiv:2310.03270). The teacher makes `distill.count` pictures as `sample` says; each is noised anew whenever it is read, to any
level, and half of them are asked about without their label, since guidance weighs both answers. The tree has `teacher/…` beside
the model, which no checkpoint holds.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jdiff import tree
from jdiff.diffusion.process import Process
from jdiff.diffusion.schedule import sample_noise
from jdiff.loading import pipeline
from jdiff.pipelines import ClassPipeline
from jdiff.tasks import Losses, LossFn, mean_gradient, use_given
from jdiff.tasks.class_to_image import ClassToImage


def distillation_loss(model: Any, teacher: Any, process: Process) -> LossFn:
    """||y - y_0||^2 / ||y_0||^2 of the model's output y and the teacher's y_0, on batches of `latent` and `label`; the tree is
    {"dit": …, "teacher": …}."""

    def loss(params: Any, batch: Mapping[str, jax.Array], keys_B: jax.Array) -> Losses:
        keys_B3 = jax.vmap(lambda key: jax.random.split(key, 3))(keys_B)
        y_B = batch["label"]
        if model.null_label is not None:
            y_B = jnp.where(jax.vmap(jax.random.bernoulli)(keys_B3[:, 0]), model.null_label, y_B)
        level_B = jax.vmap(jax.random.uniform)(keys_B3[:, 1])
        x_0_BHWC = batch["latent"]
        noise_BHWC = sample_noise(keys_B3[:, 2], x_0_BHWC.shape[1:], x_0_BHWC.dtype)
        x_BHWC, t_B = process.noised(x_0_BHWC, level_B, noise_BHWC)
        pair = ((model, params["dit"]), (teacher, params["teacher"]))
        y, y_0 = (m.apply({"params": p}, x_BHWC, t_B, y_B).astype(jnp.float32) for m, p in pair)
        over = lambda values: jnp.square(values).sum((1, 2, 3))  # noqa: E731
        return {"loss": over(y - y_0) / over(y_0), "time": level_B}

    return loss


class Own:
    """The teacher's own pictures as a `data.Source`: `made` is filled by whoever has the teacher."""

    kind: Literal["image", "latent"] = "latent"
    has_captions = False
    buckets = None

    def __init__(self, pipe: ClassPipeline, path: str, count: int):
        model = pipe.model
        self.name, self.class_names, self.num_classes = f"{path} itself", pipe.class_names, model.num_classes
        self.shape = (model.image_size, model.image_size, model.channels)
        self.labels = [i % model.num_classes for i in range(count)]
        self.fingerprint = tree.digest({"teacher": tree.fingerprint(pipe.params), "count": count})
        self.made: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        """A picture as the teacher made it: there is nothing to mirror."""
        assert self.made is not None
        return {"latent": self.made[index], "label": self.labels[index]}


def _noise(process: Process) -> list[float] | None:
    """A diffusion's noise by time; None: flow matching."""
    return None if process.schedule is None else process.schedule.alphas_cumprod.tolist()


class Distillation(ClassToImage):
    """See `jdiff.tasks.Task`. The teacher may be of another size than the model."""

    base = "teacher/.*"

    def __init__(self, config: Any, mesh: Mesh, workdir: Path | None = None):
        path = f"distill.teacher={config.distill.teacher}"
        teacher = pipeline(config.distill.teacher, mesh=mesh, precision=config.precision)
        if not isinstance(teacher, ClassPipeline):
            raise ValueError(f"{path} is a model of texts, and distillation is of models of classes")
        if teacher.quantized is not None:
            raise ValueError(f"{path} is quantized itself: give the checkpoint that it was made from")
        self.teacher, self.own = teacher, Own(teacher, config.distill.teacher, config.distill.count)
        super().__init__(config, mesh, workdir)
        for key in ("learn_sigma", "null_label"):
            theirs, ours = (getattr(model, key) for model in (teacher.model, self.model))
            if theirs != ours:
                raise ValueError(f"{path} has {key} {theirs}, and the model {ours}: they would answer other questions")
        theirs, ours = teacher.process, self.pipe.process
        if theirs.prediction_type != ours.prediction_type or _noise(theirs) != _noise(ours):
            raise ValueError(f"{path} was trained with another diffusion.* than this config has: take the teacher's")
        self.title, self.frozen = f"{self.title} after {config.distill.teacher}", f"{self.frozen}|teacher/.*"
        self.pipe.preview = teacher.preview
        self.loss = distillation_loss(self.model, teacher.model, ours)
        self.gradient = mean_gradient(self.loss)

    def open_source(self) -> Own:
        """The teacher's own pictures."""
        return self.own

    def given(self) -> Any:
        """The weights of init_from, and the teacher's, who makes the pictures."""
        given, s = super().given(), self.config.sample
        if self.own.made is None:  # here, and not in the reader's thread, beside other work of the devices
            settings = {"steps": s.steps, "guidance_scale": s.guidance, "sampler": s.sampler}
            # other pictures than a grid's, or a report's
            made = self.teacher.many_samples(
                self.own.labels, self.config.batch_size, seed=self.config.seed + 1, **settings
            )
            self.own.made = np.concatenate(list(made))
        return {**given, "teacher": jax.tree.map(np.asarray, self.teacher.params)}

    def init(self, key: jax.Array, given: Any) -> Any:
        """The model's own initialisation and the teacher's, but for what is given."""
        teacher = self.teacher.model
        full = {
            name: m.init(key, *m.dummy_inputs())["params"] for name, m in (("dit", self.model), ("teacher", teacher))
        }
        return use_given(full, given)
