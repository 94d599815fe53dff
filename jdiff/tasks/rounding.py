"""Training through integers over any task: the model that a recipe is for acts as what it will be rounded to.

What is trained stays in floats, and so do checkpoints: `quant.quantize` makes of them what training ran. With quant.mode=lsq the
tree has `scales/MODEL/…/kernel/scale` beside its models, the learned scales (arXiv:1902.08153), trained, averaged and kept like
any parameter.
"""

from typing import Any

import jax

from jdiff import quant, tree
from jdiff.loading import learned_scales, parts_of
from jdiff.tasks import Batch, Losses, Roundable
from jdiff.tasks.wrapper import Wrapper


class Rounding(Wrapper):
    """See `Wrapper`."""

    def __init__(self, task: Roundable, config: Any):
        super().__init__(task, f"{task.title} in {config.quant.recipe}")
        self.learns = config.quant.mode == "lsq"
        self.frozen, self.base = task.frozen, task.base
        self.name, module = task.main
        self.rules, self.parts = quant.find_recipe(config.quant.recipe)[self.name], parts_of(module)

    def init(self, key: jax.Array, given: Any) -> Any:
        """The task's, and LSQ's scales. ValueError when the recipe does not fit the model."""
        full = self.task.init(key, given)
        scales = quant.first_scales(full[self.name], self.rules, self.parts)
        if not self.learns:
            return full
        return {**full, "scales": {self.name: tree.nested({f"{path}/scale": x for path, x in scales.items()})}}

    def _rounded(self, rounding: Any, full: Any) -> Any:
        """The task's own tree, its model rounded by `quant.train` or `quant.quantize`."""
        models = {name: params for name, params in full.items() if name != "scales"}
        scales = learned_scales(full, self.name)
        return {**models, self.name: rounding(models[self.name], self.rules, self.parts, scales=scales)}

    def loss(self, full: Any, batch: Batch, keys_B: jax.Array) -> Losses:
        """The task's, straight through the rounding."""
        return self.task.loss(self._rounded(quant.train, full), batch, keys_B)

    def changed(self, full: Any) -> Any:
        """Its model as `quant.quantize` makes it."""
        return self._rounded(quant.quantize, full)
