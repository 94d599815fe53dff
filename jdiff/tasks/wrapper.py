"""A task whose models are changed on the way: what adapters and rounding have in common."""

from collections.abc import Mapping
from typing import Any

import jax
from PIL import Image

from jdiff.evaluate.samples import Samples
from jdiff.tasks import Batch, Losses, Task, mean_gradient


class Wrapper:
    """See `jdiff.tasks.Task`: the one that it wraps, but for `changed`, `loss` and `init`, which are a subclass's own."""

    adaptable = ()

    def __init__(self, task: Task, title: str):
        self.task, self.title, self.source, self.transform = task, title, task.source, task.transform

    def changed(self, full: Any) -> Any:
        """The task's own tree, of the whole one, as it is when nothing is trained."""
        raise NotImplementedError

    def loss(self, full: Any, batch: Batch, keys_B: jax.Array) -> Losses:
        """The task's, of its changed models."""
        raise NotImplementedError

    def given(self) -> Any:
        """The task's."""
        return self.task.given()

    def gradient(
        self, params: Any, frozen: Any, batch: Batch, keys_B: jax.Array, step: jax.Array
    ) -> tuple[Any, Losses]:
        """Of the loss alone, by what is trained."""
        return mean_gradient(self.loss)(params, frozen, batch, keys_B, step)

    def measure(self, full: Any) -> dict[str, float]:
        """The task's, of its changed models."""
        return self.task.measure(self.changed(full))

    def grid(self, full: Any) -> tuple[Image.Image, dict[str, Any]]:
        """The task's, of its changed models."""
        return self.task.grid(self.changed(full))

    def samples(self, full: Any) -> Samples:
        """The task's, of its changed models."""
        return self.task.samples(self.changed(full))

    def facts(self, measures: Mapping[str, float]) -> dict[str, Any]:
        """The task's."""
        return self.task.facts(measures)

    def macs(self) -> int:
        """The task's."""
        return self.task.macs()
