"""From labels to pictures, told step by step."""

import jax
import numpy as np
import pytest

import jdiff
from jdiff import config as configs
from jdiff import sharding
from jdiff.diffusion.process import make_process
from jdiff.pipelines import ClassPipeline


def make_pipe(kind, devices=2):
    sizes = {"image_size": 8, "channels": 3, "num_classes": 3}
    small = {"depth": 1, "width": 16, "heads": 2}
    model = jdiff.create("DiT-S/2", **sizes, **small, learn_sigma=kind == "gaussian")
    params = jax.jit(model.init)(jax.random.key(0), *model.dummy_inputs())["params"]
    noisy = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    settings = {**configs.default().diffusion.to_dict(), "kind": kind}
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    return ClassPipeline(model, noisy, make_process(settings, model.learn_sigma), mesh=mesh)


@pytest.fixture(scope="module")
def pipes():
    return {kind: make_pipe(kind) for kind in ("gaussian", "flow")}


@pytest.mark.parametrize(("kind", "sampler"), [("gaussian", "ddpm"), ("gaussian", "ddim"), ("flow", "heun")])
def test_a_call_in_parts_makes_the_same_pictures(pipes, kind, sampler):
    pipe, seen = pipes[kind], []
    settings = {"steps": 5, "sampler": sampler, "seed": 3}
    whole = pipe([0, 2, 1], **settings)
    parts = pipe([0, 2, 1], callback=lambda *call: seen.append((*call[:2], call[2]())), callback_every=2, **settings)
    np.testing.assert_array_equal(parts, whole)
    assert [(done, total) for done, total, _ in seen] == [(2, 5), (4, 5), (5, 5)]
    np.testing.assert_array_equal(seen[-1][2], pipe.pictures(whole))
    assert (seen[0][2] != seen[-1][2]).any()  # what there was on the way


def test_what_a_callback_raises_ends_the_call(pipes):
    def enough(done, total, preview):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipes["gaussian"]([0], steps=5, callback=enough)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "steps=0 must be above 0"),
        ({"steps": 5, "callback_every": 0}, "callback_every=0 must be above 0"),
        ({"steps": 5, "sampler": "euler"}, "sampler='euler' does not fit this model"),
    ],
)
def test_wrong_settings_are_named(pipes, settings, said):
    with pytest.raises(ValueError, match=said):
        pipes["gaussian"]([0], **settings)
