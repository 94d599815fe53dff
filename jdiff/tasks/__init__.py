"""What can be trained. A task gives `train.py` everything that depends on a model; `train.py` knows none.

The parameters of a task are one tree whose top level names its models: `dit/…`; `vae/…`, `disc/…`.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from jdiff import data, tree, weights
from jdiff.data import Source
from jdiff.evaluate.samples import Samples
from jdiff.tree import nearest

Batch = Mapping[str, jax.Array]
Losses = dict[str, jax.Array]
"""Per-sample arrays (B,): `loss`, its parts, and where there is one `time`, the noise level in [0, 1]."""
GradientFn = Callable[[Any, Any, Batch, jax.Array, jax.Array], tuple[Any, Losses]]
"""(params, frozen, batch, keys_B, step) -> (gradient of the mean loss as a tree like params, losses)."""
LossFn = Callable[[Any, Batch, jax.Array], Losses]
"""(full tree, batch, keys_B) -> losses."""


class Task(Protocol):
    """One kind of training. Made by `make_task`, which raises ValueError for a config or data set that cannot work.

    title: what is trained, for the log. source: where its records come from. transform: what is made of each record in the
    reader (None: nothing). frozen: regex of the leaves that are never trained; base: of those that a checkpoint does not hold,
    since `given` gives them again. adaptable: the models that adapters can be trained for, with `loss`.
    """

    title: str
    source: Source
    transform: Callable[[dict[str, Any], np.random.Generator], dict[str, Any]] | None
    frozen: str
    base: str
    adaptable: tuple[str, ...]
    loss: LossFn

    def given(self) -> Any:
        """Pretrained leaves on the host, a part of the full tree ({}: none). Called for a fresh start only."""
        ...

    def init(self, key: jax.Array, given: Any) -> Any:
        """The full tree, its leaves from `given` where they are there. Traced: see `use_given`."""
        ...

    def gradient(
        self, params: Any, frozen: Any, batch: Batch, keys_B: jax.Array, step: jax.Array
    ) -> tuple[Any, Losses]:
        """See `GradientFn`. Traced; params and frozen are the two halves of the full tree."""
        ...

    def measure(self, full: Any) -> dict[str, float]:
        """Numbers of the averaged parameters on data set apart: for the record at sampling steps, and each checkpoint."""
        ...

    def grid(self, full: Any) -> tuple[Image.Image, dict[str, Any]]:
        """Validation pictures from the averaged parameters, always of the same inputs and noise; facts for the PNG."""
        ...

    def samples(self, full: Any) -> Samples:
        """What eval_every scores, from the averaged parameters. Tasks whose config has no such key go without."""
        ...

    def facts(self, measures: Mapping[str, float]) -> dict[str, Any]:
        """What a checkpoint says of the task: `main`, the name of the model that `jdiff.load` gives; `models`, a record
        (`models.describe`) of each model that is rebuilt from the checkpoint; `class_names`; `data_fingerprint`."""
        ...

    def macs(self) -> int:
        """Multiply-accumulates of a record's forward pass through what is trained."""
        ...


class Roundable(Task, Protocol):
    """A task whose config has `quant`. main: name and module of the model that it rounds."""

    main: tuple[str, Any]


def make_task(config: Any, mesh: Mesh, workdir: Path | None = None) -> Task:
    """The config's task, checked, its data listed; nothing is compiled yet. workdir: for files that a task keeps by its run."""
    module = "distillation" if config.get("distill") and config.distill.teacher is not None else config.task
    name = "".join(part.title() for part in module.split("_"))
    task = getattr(importlib.import_module(f"jdiff.tasks.{module}"), name)(config, mesh, workdir)
    if config.get("quant") and config.quant.mode != "none":
        from jdiff.tasks.rounding import Rounding

        return Rounding(task, config)
    if config.lora.rank == 0:
        return task
    from jdiff.tasks.adapters import Adapters

    return Adapters(task, config)


NOTHING = r"(?!)"
"""A regex that no path matches."""


def open_source(config: Any) -> Source:
    """The source that a config's `data` names."""
    d = config.data
    return data.open_source(d.name, path=d.path, image_size=d.image_size, split=d.split, only=d.only)


def mean_gradient(loss_fn: LossFn) -> GradientFn:
    """The gradient of the batch's mean `loss` by the trainable leaves."""

    def gradient(params: Any, frozen: Any, batch: Batch, keys_B: jax.Array, step: jax.Array) -> tuple[Any, Losses]:
        def total(params: Any) -> tuple[jax.Array, Losses]:
            losses = loss_fn(tree.merge(params, frozen), batch, keys_B)
            return losses["loss"].mean(), losses

        return jax.grad(total, has_aux=True)(params)

    return gradient


def use_given(full: Any, given: Any) -> Any:
    """`full` with its leaves from `given` where they are there. ValueError names one that `full` has not, or not so.

    Under jit what was initialised in their place is never computed.
    """
    want, have = tree.flatten(full), weights.flatten(given)
    for path, leaf in have.items():
        if path not in want:
            raise ValueError(f"{path} is given, and the model has no such array{nearest(path, want)}")
        if tree.describe(leaf) != tree.describe(want[path]):  # an integer kernel's are its shape and its scales' dtype
            found, expected = tree.describe(leaf), tree.describe(want[path])
            raise ValueError(f"{path} is given as {found}, and the model takes {expected}")
    return tree.map_with_path(lambda path, leaf: have.get(path, leaf), full)
