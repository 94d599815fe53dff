"""Static steps and balancing: what is seen of activations, of own pictures and of data sets, exact folds, channels far apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_pictures
from tiny_dit import contrasting_dit
from tiny_sd import make_folder

import jdiff
from jdiff import qtensor, quant, weights
from jdiff.data import DataError, open_source
from jdiff.diffusion.process import Process
from jdiff.evaluate import calibration
from jdiff.evaluate.subject import Classes, Texts
from jdiff.pipelines import ClassPipeline
from jdiff.qtensor import Observed, Scheme

RULES = {name: recipe["dit"] for name, recipe in quant.RECIPES.items()}
LABELS, SETTINGS = [0, 1, 2, 3], {"steps": 3, "guidance_scale": 1.5}


def _normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def pipe():
    """A DiT of flow matching with random weights of some contrast."""
    return contrasting_dit(Process(None))[0]


@pytest.fixture(scope="module")
def subject(pipe):
    return Classes(pipe, LABELS)


@pytest.fixture(scope="module")
def batches(subject):
    return calibration.shown(subject, subject.samples(seed=0, **SETTINGS)[0])


@pytest.fixture(scope="module")
def twin(pipe):
    """The same function, whose kernels' inputs have some channels 64 times as large, and the rows for them divided by that."""
    s = jnp.ones((2, 64)).at[:, ::13].set(1 / 64)
    params = pipe.params
    for path in pipe.model.dividable:
        params = pipe.model.divide_inputs(params, path, s)
    return Classes(ClassPipeline(pipe.model, params, pipe.process), LABELS)


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
    observed = Observed(kernel, jnp.zeros(seen.shape), quant.largest)
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
        Classes(pipe, [])


def test_batches_cover_all_noise_with_labels_and_without(pipe, batches):
    assert len(batches) == 2 * calibration.BINS
    level = 1 - np.stack([batch["t"][: len(LABELS)] for batch in batches[::2]])
    np.testing.assert_array_equal(
        np.floor(level * calibration.BINS).astype(int), np.repeat(np.arange(10)[:, None], 4, 1)
    )
    for with_label, without in zip(batches[::2], batches[1::2], strict=True):
        np.testing.assert_array_equal(with_label["x_t"], without["x_t"])
        assert with_label["y"][: len(LABELS)].tolist() == LABELS and set(without["y"].tolist()) == {4}


@pytest.mark.slow
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


@pytest.mark.slow
def test_channels_far_apart_are_balanced(subject, pipe, twin, batches):
    """In floats the twin is the model. Naive rounding fails on it; balanced, it is as near as the model without outliers."""
    run = jax.jit(lambda params, batch: calibration.predict(pipe.model, params, batch))
    exact = [run(pipe.params, batch) for batch in batches]
    np.testing.assert_allclose(run(twin.params, batches[0]), exact[0], rtol=1e-3, atol=1e-3)

    def error(params, recipe, peaks):
        rounded = quant.quantize(params, RULES[recipe], peaks=peaks)
        return sum(float(jnp.square(run(rounded, x) - y).sum()) for x, y in zip(batches, exact, strict=True))

    plain, far = (calibration.peaks_of(one, RULES["w8a8"], batches) for one in (subject, twin))
    for recipe in ("w8a8", "w8a8-static"):
        original, naive = error(pipe.params, recipe, plain), error(twin.params, recipe, far)
        params, peaks, alphas = calibration.balance(twin, RULES[recipe], batches, far)
        assert naive > 10 * original
        assert error(params, recipe, peaks) < 1.5 * original
        assert all(alphas[path] is not None for path in ("blocks/attn/qkv/kernel", "blocks/mlp/fc1/kernel"))
        # never worse than what it began with
        params, peaks, _ = calibration.balance(subject, RULES[recipe], batches, plain)
        assert error(params, recipe, peaks) <= original


@pytest.mark.runs
def test_balanced_peaks_are_those_that_would_be_seen(twin, batches):
    seen = calibration.peaks_of(twin, RULES["w8a8"], batches)
    params, peaks, _ = calibration.balance(twin, RULES["w8a8"], batches, seen)
    for path, peak in calibration.peaks_of(twin.changed(params), RULES["w8a8"], batches).items():
        np.testing.assert_allclose(peaks[path], peak, rtol=1e-3, err_msg=path)


@pytest.fixture
def named(pipe):
    """The model, whose classes have names; those of the pictures are among them."""
    return ClassPipeline(pipe.model, pipe.params, pipe.process, class_names=["wasp", "ant", "fly", "bee"])


def test_a_folder_of_pictures_is_shown(named, tmp_path):
    """As the model has them, with its own labels for their names; no more than asked for, over all of them."""
    source = open_source("imagefolder", path=str(make_pictures(tmp_path / "pictures", each=5)), image_size=8)
    assert source.class_names == ["ant", "bee"]
    subject, x_0 = calibration.of_data(named, source, 100)
    assert subject.y.tolist() == [1] * 5 + [3] * 5
    image = source.read(9, False, np.random.default_rng(0))["image"]
    np.testing.assert_allclose(x_0[9], image / 127.5 - 1, atol=1e-6)
    subject, x_0 = calibration.of_data(named, source, 4)
    assert subject.y.tolist() == [1, 1, 3, 3] and x_0.shape == (4, 8, 8, 3)
    assert calibration.shown(subject, x_0)[0]["y"][:4].tolist() == [1, 1, 3, 3]


class _Latents:
    """What a cache of latents is to calibration."""

    name, kind, class_names, num_classes, has_captions = "latents", "latent", ["ant", "bee"], 2, False

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def read(self, index, flip, rng):
        return {"latent": np.full((8, 8, 3), index, np.float32), "label": index % 2}


def test_latents_are_shown_as_they_are(named):
    subject, x_0 = calibration.of_data(named, _Latents(3), 10)
    np.testing.assert_array_equal(x_0[:, 0, 0, 0], [0, 1, 2])
    assert subject.y.tolist() == [1, 3, 1]


def test_data_that_cannot_be_shown_are_refused(pipe, named, tmp_path):
    pictures = str(make_pictures(tmp_path / "pictures", each=1))
    with pytest.raises(DataError, match="latents holds no records: there is nothing to calibrate on"):
        calibration.of_data(named, _Latents(0), 4)
    with pytest.raises(ValueError, match="has the class 'ant', which the model has not: it has"):
        others = ClassPipeline(pipe.model, pipe.params, pipe.process, class_names=["a", "b", "c", "d"])
        calibration.of_data(others, open_source("imagefolder", path=pictures, image_size=8), 4)
    with pytest.raises(ValueError, match=r"pictures of \(16, 16, 3\) are not what the model takes"):
        calibration.of_data(named, open_source("imagefolder", path=pictures, image_size=16), 4)


@pytest.mark.slow
def test_a_model_of_texts_is_calibrated_on_captions(tmp_path):
    """Its steps are fixed by what it sees of pictures encoded by its autoencoder; much smaller or larger ones are worse."""
    pipe = jdiff.pipeline(make_folder(tmp_path / "sd"))
    folder = make_pictures(tmp_path / "pictures", each=1)
    with pytest.raises(DataError, match="imagefolder has no captions"):
        calibration.of_data(pipe, open_source("imagefolder", path=str(folder), image_size=16), 4)
    for path in folder.rglob("*.png"):
        path.with_suffix(".txt").write_text("a red fox")
    subject, x_0 = calibration.of_data(pipe, open_source("captions", path=str(folder), image_size=16), 4)
    assert isinstance(subject, Texts) and x_0.shape == (2, 8, 8, 4) and subject.prompts == ["a red fox"] * 2
    np.testing.assert_allclose(subject.pictures(x_0), pipe.decode(x_0))
    batches = calibration.shown(subject, x_0)
    np.testing.assert_array_equal(batches[1]["y"][:2], np.stack([subject.empty] * 2))
    rules = quant.RECIPES["w8a8-static"]["unet"]
    peaks = calibration.peaks_of(subject, rules, batches)
    exact, parts = calibration.output(subject.model, subject.params, batches[8]), subject.model.concatenated()

    def error(factor):
        scaled = {path: factor * peak for path, peak in peaks.items()}
        params = quant.quantize(subject.params, rules, parts, scaled)
        return float(jnp.linalg.norm(calibration.output(subject.model, params, batches[8]) - exact))

    assert 0 < error(1) < min(error(1 / 8), error(8)) / 2
