"""How far a pipeline's call is, told while it runs."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np


@dataclass(frozen=True)
class Preview:
    """What there is at a step, noise and all, to be asked for before the callback returns: `preview()` is uint8 (B, H, W, 3),
    `preview.samples()` float32 (B, h, w, C), as the model has it."""

    pictures: Callable[[], np.ndarray]
    samples: Callable[[], np.ndarray]

    def __call__(self) -> np.ndarray:
        return self.pictures()


Callback = Callable[[int, int, Preview], None]
"""(steps done, steps in all, preview). What it raises ends the call."""


class Report:
    """Tells a callback how far a call is, over all its groups of rows, each of `steps` steps."""

    def __init__(self, callback: Callback | None, every: int, steps: int, groups: int = 1):
        if every < 1:
            raise ValueError(f"callback_every={every} must be above 0")
        self.callback, self.steps, self.total, self.before = callback, steps, steps * groups, 0
        self.every = steps if callback is None else every

    def parts(self) -> list[tuple[int, int]]:
        """(first, last) of each part between two reports."""
        return [(i, min(i + self.every, self.steps)) for i in range(0, self.steps, self.every)]

    def __call__(self, done: int, x: jax.Array, preview: Preview) -> None:
        """After `done` steps of a group have made x."""
        if self.callback is not None:
            jax.block_until_ready(x)  # else steps are reported as they are queued
            self.callback(self.before + done, self.total, preview)
        self.before += self.steps * (done == self.steps)
