"""What all tasks share: given leaves are used or refused by name, and every task of the config is there."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import config as configs
from jdiff.tasks import Task, mean_gradient, use_given


@pytest.mark.parametrize("name", configs.TASKS)
def test_every_task_of_the_config_has_all_of_the_protocol(name):
    found = getattr(importlib.import_module(f"jdiff.tasks.{name}"), "".join(p.title() for p in name.split("_")))
    for method in ("given", "init", "measure", "grid", "facts", "macs"):
        assert callable(getattr(found, method)) and getattr(found, method).__doc__ and hasattr(Task, method)


def test_given_leaves_are_used_and_others_kept():
    full = {"a": {"kernel": jnp.zeros((2, 3)), "bias": jnp.ones(3)}}
    found = jax.jit(use_given)(full, {"a": {"kernel": np.full((2, 3), 7, np.float32)}})
    assert (found["a"]["kernel"] == 7).all() and (found["a"]["bias"] == 1).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"a": {"kernal": np.zeros((2, 3), np.float32)}}, r"a/kernal is given.*did you mean 'a/kernel'"),
        ({"a": {"kernel": np.zeros((3, 2), np.float32)}}, r"a/kernel is given as float32\[3,2\].*takes float32\[2,3\]"),
        ({"a": {"kernel": np.zeros((2, 3), np.float16)}}, r"a/kernel is given as float16"),
    ],
)
def test_given_leaves_that_do_not_fit_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        use_given({"a": {"kernel": jnp.zeros((2, 3))}}, given)


def test_the_mean_gradient_is_of_the_trainable_leaves():
    def loss(full, batch, keys_B):
        return {"loss": full["w"] * batch["x"] * full["fixed"]}

    params, frozen = {"w": jnp.float32(2.0), "fixed": None}, {"w": None, "fixed": jnp.float32(3.0)}
    batch = {"x": jnp.array([1.0, 5.0])}
    grads, losses = mean_gradient(loss)(params, frozen, batch, jax.random.split(jax.random.key(0), 2), jnp.int32(0))
    assert grads == {"w": 9.0, "fixed": None} and losses["loss"].tolist() == [6, 30]
