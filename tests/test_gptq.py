"""GPTQ against the paper's loop in numpy float64, and what it is for: less error in products with inputs like those seen."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_dit import contrasting_dit

from jdiff import gptq, qtensor, quant
from jdiff.diffusion.process import Process
from jdiff.evaluate import calibration
from jdiff.evaluate.subject import Classes
from jdiff.qtensor import Scheme

SCHEMES = {"w4": Scheme(bits=4, group=64), "w8": Scheme()}


def _inputs(rows, C, seed=0):
    """Channels that go together, and differ in size."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, C // 4)) @ rng.normal(size=(C // 4, C)) + 0.3 * rng.normal(size=(rows, C))
    return mixed * np.exp(rng.normal(size=C))


def _by_the_paper(w, x, scale, top):
    """Algorithm 1 of arXiv:2210.17323 with blocks of one row: the inverse is updated by elimination, without its factor."""
    moment = x.T @ x / len(x)
    moment += gptq.DAMPING * np.diag(moment).mean() * np.eye(len(w))
    order = np.argsort(-np.diag(x.T @ x))
    w, scale, rounded = w[order].copy(), scale[order], np.zeros_like(w)
    inverse = np.linalg.inv(moment[np.ix_(order, order)])
    for i in range(len(w)):
        rounded[i] = np.clip(np.round(w[i] / scale[i]), -top, top)
        error = (w[i] - rounded[i] * scale[i]) / inverse[i, i]
        w[i:] -= np.outer(inverse[i:, i], error)
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    whole = np.zeros_like(rounded)
    whole[order] = rounded
    return whole


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_the_papers(scheme):
    x, w = _inputs(400, 128), np.random.default_rng(1).normal(size=(128, 24))
    seen = quant.moment(None, jnp.asarray(x, jnp.float32), jnp.zeros(()))
    np.testing.assert_allclose(seen, x.T @ x / len(x), rtol=1e-4, atol=1e-3)
    made = gptq.quantize(jnp.asarray(w, jnp.float32), seen, SCHEMES[scheme])
    nearest = qtensor.quantize(jnp.asarray(w, jnp.float32), SCHEMES[scheme])
    np.testing.assert_array_equal(made.scale, nearest.scale)
    scale = np.broadcast_to(np.asarray(qtensor.spread(nearest), np.float64), w.shape)
    expected = _by_the_paper(w, x, scale, {"w4": 7, "w8": 127}[scheme])
    # an integer on the edge may fall to the other side in float32, and those after it make up for that
    assert (np.asarray(made.qvalue, np.float64) == expected).mean() > 0.9
    error = lambda q: np.square(x @ (np.asarray(q) * scale - w)).sum()  # noqa: E731
    np.testing.assert_allclose(error(made.qvalue.astype(jnp.float32)), error(expected), rtol=0.05)
    assert error(expected) < error(nearest.qvalue.astype(jnp.float32)) / 2


def test_inputs_without_any_relation_change_nothing():
    """Nothing that one row loses can be made up for by another."""
    w = jnp.asarray(np.random.default_rng(1).normal(size=(64, 8)), jnp.float32)
    moment = jnp.diag(jnp.asarray(np.random.default_rng(2).uniform(0.5, 2, 64), jnp.float32)).at[3, 3].set(0)
    for scheme in SCHEMES.values():
        made, nearest = gptq.quantize(w, moment, scheme), qtensor.quantize(w, scheme)
        np.testing.assert_array_equal(made.qvalue, nearest.qvalue)


@pytest.mark.slow
def test_a_model_errs_less():
    """On inputs that it was not calibrated on; layer by layer as the one kernel."""
    pipe, rng = contrasting_dit(Process(None))
    subject = Classes(pipe, [0, 1, 2, 3])
    pictures = rng.normal(size=(2, 4, 8, 8, 3)).astype(np.float32)
    rules, batches = quant.RECIPES["w4"]["dit"], calibration.shown(subject, pictures[0])
    moments = calibration.moments_of(subject, rules, batches)
    made = quant.quantize(subject.params, rules, moments=moments)
    kernel = subject.params["blocks"]["mlp"]["fc2"]["kernel"][1]
    one = gptq.quantize(kernel, moments["blocks/mlp/fc2/kernel"][1], quant.SCHEMES["w4"])
    np.testing.assert_array_equal(made["blocks"]["mlp"]["fc2"]["kernel"].qvalue[1], one.qvalue)
    batch = calibration.at_levels(subject, pictures[1], 5)
    exact = calibration.output(subject.model, subject.params, batch)
    error = lambda params: float(jnp.square(calibration.output(subject.model, params, batch) - exact).sum())  # noqa: E731
    assert error(made) < error(quant.quantize(subject.params, rules)) / 1.5
