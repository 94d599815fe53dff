"""The small DiT of the tests of quantization."""

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import models
from jdiff.pipelines import ClassPipeline


def contrasting_dit(process):
    """A pipeline of a small DiT whose random weights have some contrast, and the generator that made them."""
    fields = {
        "image_size": 8,
        "channels": 3,
        "num_classes": 4,
        "width": 64,
        "depth": 2,
        "heads": 2,
        "learn_sigma": False,
    }
    model, rng = models.create("DiT-S/2", **fields), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.dummy_inputs())["params"]
    leaf = lambda x: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(np.prod(x.shape[-2:-1])), x.dtype)  # noqa: E731
    return ClassPipeline(model, jax.tree.map(leaf, shapes), process), rng
