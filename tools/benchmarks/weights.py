"""Random weights that are nowhere zero, so that no product is trivial and no gradient vanishes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import tree


def random_dit(model: Any, seed: int = 0) -> Any:
    """A DiT's, whose initial ones make every block the identity; its positions as they are."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *model.dummy_inputs())["params"])
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: Any) -> jax.Array:
        if path == "pos_embed":
            return model.init(jax.random.key(0), *model.dummy_inputs())["params"]["pos_embed"]
        scale = 0.7 / np.sqrt(np.prod(leaf.shape[-2:-1])) if path.endswith("kernel") else 0.05
        return jnp.asarray(rng.normal(size=leaf.shape) * scale, jnp.float32)

    return tree.map_with_path(draw, shapes)


def moved(module: Any) -> Any:
    """A module's initial ones, each moved a little; leaf by leaf, since a UNet's noise in one program takes its memory twice."""
    params = jax.jit(lambda key: module.init(key, *module.dummy_inputs())["params"])(jax.random.key(0))
    move = jax.jit(lambda x, key: x + 0.01 * jax.random.normal(key, x.shape), donate_argnums=0)
    leaves, structure = jax.tree.flatten(params)
    del params
    keys = jax.random.split(jax.random.key(1), len(leaves))
    for i, key in enumerate(keys):
        leaves[i] = move(leaves[i], key)
    return jax.tree.unflatten(structure, leaves)
