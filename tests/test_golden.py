"""The folder for other runtimes, read as docs/int8.md describes it, with numpy's integers and none of jdiff's products."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_dit import contrasting_dit
from tiny_sd import make_folder

import jdiff
from jdiff import loading, quant
from jdiff.convert import ConversionError
from jdiff.diffusion.process import Process
from jdiff.evaluate import calibration, golden
from jdiff.evaluate.subject import Classes, Texts


def _classes(recipe):
    pipe, rng = contrasting_dit(Process(None))
    subject = Classes(pipe, [1, 3])
    rules, peaks = quant.RECIPES[recipe]["dit"], None
    if recipe == "w8a8-static":
        x_0 = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
        peaks = calibration.peaks_of(subject, rules, calibration.shown(subject, x_0))
    return subject.changed(quant.quantize(subject.params, rules, peaks=peaks))


def _texts(recipe, folder):
    loading.save_quantized(
        loading.quantized(loading.open_checkpoint(make_folder(folder / "sd")), recipe), folder / "copy"
    )
    return Texts(jdiff.pipeline(folder / "copy"), ["a red fox", "two green apples"])


def _of(arrays, name):
    """A product's arrays."""
    return {key.removeprefix(name + "/"): x for key, x in arrays.items() if key.startswith(name + "/")}


def _sums(facts, x, w):
    """The product of integers, one tap of a window after another."""
    if facts["operation"] == "product":
        return x @ w
    (top, bottom), (left, right) = facts["padding"]
    (down, along), (kh, kw) = facts["strides"], w.shape[:2]
    x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(x.shape[1:3], (kh, kw), (down, along), strict=True))
    tap = lambda i, j: x[:, i : i + down * (rows - 1) + 1 : down, j : j + along * (columns - 1) + 1 : along]  # noqa: E731
    return sum(tap(i, j) @ w[i, j] for i in range(kh) for j in range(kw))


def _replay(facts, arrays, made):
    """(sums by part, output) of one product, from the files alone."""
    w, scale = arrays["weight"].astype(np.int64), arrays["scale"].astype(np.float64)
    assert not arrays["zero_point"].any() and arrays["zero_point"].shape == scale.shape
    ends = np.cumsum(facts["parts"])
    pieces = [slice(end - size, end) for end, size in zip(ends, facts["parts"], strict=True)]
    if facts["activations"] == "float32":
        return None, _sums(facts, made["input"].astype(np.float64), w * np.repeat(scale, facts["parts"], axis=-2))
    x, x_scale = made["input"].astype(np.int64), made["input_scale"].astype(np.float64)
    assert not made["input_zero_point"].any()
    sums = [_sums(facts, x[..., piece], w[..., piece, :]) for piece in pieces]
    columns = scale.reshape(-1, scale.shape[-1])
    return np.stack(sums), sum(s * x_scale[p] * columns[p] for p, s in enumerate(sums))


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-static", "w4", pytest.param("texts", marks=pytest.mark.slow)])
def test_each_product_is_replayed_from_the_files(recipe, tmp_path):
    subject = _texts("w8a8", tmp_path) if recipe == "texts" else _classes(recipe)
    golden.write(tmp_path / "golden", subject, seed=3)
    index = json.loads((tmp_path / "golden" / "index.json").read_text())
    weights, made = (load_file(tmp_path / "golden" / f"{file}.safetensors") for file in ("model", "golden"))
    integers = 0
    for facts in index["products"]:
        arrays, here = _of(weights, facts["name"]), _of(made, facts["name"])
        sums, output = _replay(facts, arrays, here)
        assert ("accumulator" in here) == (sums is not None)
        if sums is not None:
            assert here["accumulator"].dtype == np.int32
            np.testing.assert_array_equal(here["accumulator"], sums, err_msg=facts["name"])
            integers += 1
        np.testing.assert_allclose(
            here["output"], output, rtol=1e-5, atol=1e-5 * np.abs(output).max(), err_msg=facts["name"]
        )
    kinds = {(facts["operation"], facts["activations"], len(facts["parts"]) > 1) for facts in index["products"]}
    if recipe == "texts":
        assert {("product", "int8", False), ("convolution", "int8", False), ("convolution", "int8", True)} <= kinds
        assert any(facts.get("strides") == [2, 2] for facts in index["products"])
    else:
        assert len(index["products"]) == 2 * 5 + 1 and integers == (0 if recipe == "w4" else 8)
    # the model's own run: its output, and inputs that stand for it
    batch = {name: made[f"model/{name}"] for name in ("x_t", "t", "y")}
    output = calibration.predict(subject.model, subject.params, batch)
    np.testing.assert_allclose(made["model/output"], output, rtol=1e-3, atol=1e-3 * np.abs(output).max())


def test_dit_from_the_files(tmp_path):
    """The products' inputs are those of the run: the last block's mlp is what numpy makes of the hidden layer before it."""
    subject = _classes("w8a8")
    golden.write(tmp_path / "golden", subject)
    weights, made = (load_file(tmp_path / "golden" / f"{file}.safetensors") for file in ("model", "golden"))
    hidden = made["blocks/mlp/fc1/1/output"] + weights["blocks/mlp/fc1/bias"][1]
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    step = made["blocks/mlp/fc2/1/input_scale"][0]
    found = made["blocks/mlp/fc2/1/input"] * step
    assert np.abs(found - hidden).max() < 0.51 * step.max()


def test_what_cannot_be_exported_is_refused(tmp_path):
    subject = _classes("w8")
    with pytest.raises(ConversionError, match="there exists"):
        (tmp_path / "there").mkdir()
        golden.write(tmp_path / "there", subject)
    plain = subject.changed(
        jax.tree.map(lambda w: w, subject.model.init(jax.random.key(0), *subject.model.dummy_inputs())["params"])
    )
    with pytest.raises(ValueError, match="no kernel of this model is quantized"):
        golden.write(tmp_path / "golden", plain)
