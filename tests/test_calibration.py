"""Static steps and balancing: what is seen of activations, exact folds, and a model whose channels are far apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import models, qtensor, quant, weights
from jdiff.diffusion.process import Process
from jdiff.evaluate import calibration
from jdiff.pipelines import ClassPipeline
from jdiff.qtensor import Observed, Scheme

RULES = {name: recipe["dit"] for name, recipe in quant.RECIPES.items()}
LABELS, SETTINGS = [0, 1, 2, 3], {"steps": 3, "guidance_scale": 1.5}


def _normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def pipe():
    """A DiT of flow matching with random weights of some contrast."""
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
    return ClassPipeline(model, jax.tree.map(leaf, shapes), Process(None))


@pytest.fixture(scope="module")
def batches(pipe):
    return calibration.shown(pipe, LABELS, **SETTINGS)


@pytest.fixture(scope="module")
def twin(pipe):
    """The same function, whose kernels' inputs have some channels 64 times as large, and the rows for them divided by that."""
    s = jnp.ones((2, 64)).at[:, ::13].set(1 / 64)
    params = pipe.params
    for path in pipe.model.dividable:
        params = pipe.model.divide_inputs(params, path, s)
    return ClassPipeline(pipe.model, params, pipe.process)


@pytest.mark.parametrize("where", ["dense", "conv"])
def test_what_is_seen(where):
    kernel = _normal(3, 24, 24) if where == "dense" else _normal(3, 3, 24, 24)
    x = _normal(5, 24, seed=1) if where == "dense" else _normal(2, 8, 6, 24, seed=1)

    def apply(params):
        if where == "dense":
            return jax.lax.scan(lambda x, w: (jnp.tanh(weights.dot(x, w)), None), x, params["kernel"])[0]
        return weights.conv(x, params["kernel"])

    (seen,) = jax.jit(lambda params: quant.observe(apply, params, ["kernel"]))({"kernel": kernel}).values()
    expected, inputs = x, []
    for i in range(3 if where == "dense" else 1):
        inputs.append(np.abs(expected).max(tuple(range(x.ndim - 1))))
        expected = jnp.tanh(expected @ kernel[i]) if where == "dense" else expected
    np.testing.assert_allclose(seen, np.stack(inputs) if where == "dense" else inputs[0], rtol=1e-6)
    observed = Observed(kernel, jnp.zeros(seen.shape))
    np.testing.assert_allclose(apply({"kernel": observed}), apply({"kernel": kernel}), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sizes", [(), (16, 8)])
def test_static_steps(sizes):
    """A step a part for all tokens; what is beyond it is clipped."""
    x, kernel = np.asarray(_normal(40, 24)), _normal(24, 20, seed=1)
    peak = np.abs(x[:20]).max(0)
    w = qtensor.quantize(kernel, Scheme(integer=True, static=True), sizes, jnp.asarray(peak))
    assert w.step.shape == (len(sizes or (24,)),)
    expected, start = 0, 0
    for row, size in enumerate(sizes or (24,)):
        part = slice(start, start + size)
        step = np.float32(peak[part].max()) / np.float32(127.5)
        whole = np.clip(np.round(x[:, part] / step), -127, 127).astype(np.int64)
        scale = np.asarray(w.scale, np.float64)[row]
        expected += whole @ np.asarray(w.qvalue, np.int64)[part] * np.float64(step) * scale
        start += size
    np.testing.assert_allclose(weights.dot(jnp.asarray(x), w), expected, rtol=2e-6, atol=1e-5)


def test_static_steps_must_be_seen(pipe):
    with pytest.raises(ValueError, match="blocks/attn/proj/kernel takes a static step"):
        quant.quantize(pipe.params, RULES["w8a8-static"])
    with pytest.raises(ValueError, match="labels is empty"):
        calibration.shown(pipe, [], **SETTINGS)


def test_batches_cover_all_noise_with_labels_and_without(pipe, batches):
    assert len(batches) == 2 * calibration.BINS
    level = 1 - np.stack([batch["t"][: len(LABELS)] for batch in batches[::2]])
    np.testing.assert_array_equal(
        np.floor(level * calibration.BINS).astype(int), np.repeat(np.arange(10)[:, None], 4, 1)
    )
    for with_label, without in zip(batches[::2], batches[1::2], strict=True):
        np.testing.assert_array_equal(with_label["x_t"], without["x_t"])
        assert with_label["label"][: len(LABELS)].tolist() == LABELS and set(without["label"].tolist()) == {4}


def test_dividing_inputs_changes_nothing(pipe, batches):
    for path in pipe.model.dividable:
        s = jnp.exp(_normal(2, 64, seed=5))
        divided = pipe.model.divide_inputs(pipe.params, path, s)
        before, after = (calibration.predict(pipe.model, params, batches[0]) for params in (pipe.params, divided))
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
        look = lambda params, path=path: quant.observe(  # noqa: E731
            lambda p: calibration.predict(pipe.model, p, batches[0]), params, [path]
        )[path]
        np.testing.assert_allclose(look(divided), look(pipe.params) / s, rtol=1e-4)


@pytest.mark.runs
def test_channels_far_apart_are_balanced(pipe, twin, batches):
    """In floats the twin is the model. Naive rounding fails on it; balanced, it is as near as the model without outliers."""
    run = jax.jit(lambda params, batch: calibration.predict(pipe.model, params, batch))
    exact = [run(pipe.params, batch) for batch in batches]
    np.testing.assert_allclose(run(twin.params, batches[0]), exact[0], rtol=1e-3, atol=1e-3)

    def error(params, recipe, peaks):
        rounded = quant.quantize(params, RULES[recipe], peaks=peaks)
        return sum(float(jnp.square(run(rounded, x) - y).sum()) for x, y in zip(batches, exact, strict=True))

    plain, far = (calibration.peaks_of(p, batches) for p in (pipe, twin))
    for recipe in ("w8a8", "w8a8-static"):
        original, naive = error(pipe.params, recipe, plain), error(twin.params, recipe, far)
        params, peaks, alphas = calibration.balance(twin, RULES[recipe], batches, far)
        assert naive > 10 * original
        assert error(params, recipe, peaks) < 1.5 * original
        assert all(alphas[path] is not None for path in ("blocks/attn/qkv/kernel", "blocks/mlp/fc1/kernel"))
        # never worse than what it began with
        params, peaks, _ = calibration.balance(pipe, RULES[recipe], batches, plain)
        assert error(params, recipe, peaks) <= original


@pytest.mark.runs
def test_balanced_peaks_are_those_that_would_be_seen(twin, batches):
    params, peaks, _ = calibration.balance(twin, RULES["w8a8"], batches, calibration.peaks_of(twin, batches))
    balanced = ClassPipeline(twin.model, params, twin.process)
    for path, peak in calibration.peaks_of(balanced, batches).items():
        np.testing.assert_allclose(peaks[path], peak, rtol=1e-3, err_msg=path)
