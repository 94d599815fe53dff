"""What a report measures: a kernel alone, drift along samplers, floors; of models of classes and of texts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_dit import contrasting_dit
from tiny_sd import make_folder

import jdiff
from jdiff import qtensor, quant, tree, weights
from jdiff.diffusion.process import Process
from jdiff.diffusion.schedule import make_schedule
from jdiff.evaluate import calibration, rounding, rounding_page
from jdiff.evaluate.subject import Classes, Texts

STEPS = {"steps": 3, "guidance_scale": 1.5}


@pytest.fixture(scope="module")
def classes():
    """A DiT of noise prediction with random weights of some contrast."""
    pipe, _ = contrasting_dit(Process(make_schedule("linear")))
    return Classes(pipe, [0, 1, 2, 3])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return Texts(
        jdiff.pipeline(make_folder(tmp_path_factory.mktemp("sd"), levels=1)), ["a red fox", "two green apples"]
    )


@pytest.fixture
def subject(request):
    return request.getfixturevalue(request.param)


def _quantized(subject, recipe="w8a8"):
    kind = "dit" if isinstance(subject, Classes) else "unet"
    parts = subject.model.concatenated() if kind == "unet" else {}
    return quant.quantize(subject.params, quant.RECIPES[recipe][kind], parts)


def _noise(subject, rows):
    return (
        np.random.default_rng(0).normal(size=(rows, 8, 8, 3 if isinstance(subject, Classes) else 4)).astype(np.float32)
    )


@pytest.mark.parametrize("subject", ["classes", pytest.param("texts", marks=pytest.mark.slow)], indirect=True)
def test_each_kernel_alone(subject):
    """A line for each kernel and block; products in floats err as the float model does with that kernel rounded by hand."""
    x_0, recipe = _noise(subject, len(subject.y)), "w8"
    alone, (whole, floor) = rounding.sensitivity(subject, _quantized(subject, recipe), {"itself": subject}, x_0)
    floats, made = (weights.flatten(p) for p in (subject.params, _quantized(subject, recipe)))
    kernels = {path: leaf for path, leaf in made.items() if isinstance(leaf, qtensor.QTensor)}
    lines = {(one.name + "/kernel", block) for one in alone for block in [one.block]}
    stacked = lambda leaf: range(leaf.shape[0]) if len(leaf.shape) % 2 else [None]  # noqa: E731
    assert lines == {(path, block) for path, leaf in kernels.items() for block in stacked(leaf)}
    assert [one.error for one in alone] == sorted((one.error for one in alone), reverse=True)
    assert (floor.error, floor.again) == (0, 0) and whole.error > alone[-1].error
    batch = calibration.at_levels(subject, x_0, 0)
    run = jax.jit(lambda params: calibration.predict(subject.model, params, batch)[: len(x_0)])
    exact = np.asarray(run(subject.params), np.float64)
    above_noise = [one for one in alone if one.error > 1e-8]  # float32's own is about 1e-12
    for one in (above_noise[0], above_noise[-1]):
        path = f"{one.name}/kernel"
        q = kernels[path] if one.block is None else jax.tree.map(lambda a, i=one.block: a[i], kernels[path])
        kernel = floats[path].at[... if one.block is None else one.block].set(qtensor.dequantize(q))
        made = np.asarray(run(tree.nested({**floats, path: kernel})), np.float64)
        axes = (1, 2, 3)
        error = (np.square(made - exact).sum(axes) / np.square(exact).sum(axes)).mean()
        np.testing.assert_allclose(one.error, error, rtol=0.02)


def test_the_worst_kernel_is_named(classes):
    """One block's kernel of much coarser steps."""
    flat = weights.flatten(_quantized(classes))
    path = "blocks/mlp/fc1/kernel"
    w = weights.flatten(classes.params)[path]
    coarse = jnp.round(w[1] / (jnp.abs(w[1]).max() / 2))
    scale = jnp.broadcast_to(jnp.abs(w[1]).max() / 2, flat[path].scale[1].shape)
    flat[path] = replace(
        flat[path],
        qvalue=flat[path].qvalue.at[1].set(coarse.astype(jnp.int8)),
        scale=flat[path].scale.at[1].set(scale),
    )
    alone, _ = rounding.sensitivity(classes, tree.nested(flat), {}, _noise(classes, 4))
    assert (alone[0].name, alone[0].block) == ("blocks/mlp/fc1", 1) and alone[0].error > 10 * alone[1].error
    assert alone[0].again == pytest.approx(alone[0].error, rel=0.5)
    assert str(alone[0]) in rounding.ranking(alone, []).splitlines()[1]


@pytest.mark.parametrize(
    ("subject", "other"),
    [("classes", "ddpm"), pytest.param("texts", "pndm", marks=pytest.mark.slow)],
    indirect=["subject"],
)
def test_distances(subject, other):
    """Nothing for the model itself; more for w4 than for w8; far more for other noise. By sampler, after each of its steps."""
    others = {"itself": subject, "w8": subject.changed(_quantized(subject, "w8"))}
    if other == "ddpm":
        others["w4"] = subject.changed(_quantized(subject, "w4"))
    found, x_0, pictures = rounding.compare(subject, others, [other, "ddim"], **STEPS)
    np.testing.assert_array_equal(x_0, subject.samples(seed=0, sampler=other, **STEPS)[0])
    np.testing.assert_array_equal(pictures, found["itself"].pictures[other])
    itself, seed = found["itself"], found["another seed"]
    assert set(itself.error) == {0.0} and all(set(steps) == {0.0} for steps in itself.drift.values())
    assert min(itself.psnr.values()) > 90
    assert all(
        (itself.pictures[s] == subject.pictures(subject.samples(seed=0, sampler=s, **STEPS)[0])).all()
        for s in (other, "ddim")
    )
    coarsest = found["w4" if other == "ddpm" else "w8"]
    for sampler in (other, "ddim"):
        assert len(itself.drift[sampler]) == (4 if sampler == "pndm" else 3)
        assert 0 < found["w8"].drift[sampler][-1] <= coarsest.drift[sampler][-1] < seed.drift[sampler][-1] / 2
        assert found["w8"].psnr[sampler] >= coarsest.psnr[sampler] > seed.psnr[sampler]
        # a sampler's last step gives the pictures, and a drift is what it says
        x, way = subject.samples(seed=0, sampler=sampler, **STEPS)
        np.testing.assert_array_equal(way[-1], x)
        y, _ = others["w8"].samples(seed=0, sampler=sampler, **STEPS)
        assert found["w8"].drift[sampler][-1] == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x))
    assert all(
        0 < w8 <= coarse < far for w8, coarse, far in zip(found["w8"].error, coarsest.error, seed.error, strict=True)
    )
    text = rounding.tables(found)
    assert text.count("PSNR, dB") == 2 and "another seed" in text.splitlines()[0]
    assert found["w8"].size < itself.size / 2 and text.splitlines()[-1].startswith("weights, MB")


def test_the_page(tmp_path):
    pictures = np.zeros((4, 8, 8, 3), np.uint8)
    drift, ratio = {"ddim": [0.1, 0.2], "euler": [0.1, 0.3]}, {"ddim": 40.0, "euler": 41.0}
    distance = rounding.Distance([0.1] * 10, drift, ratio, {"ddim": pictures, "euler": pictures}, 12_340_000)
    alone = [rounding.Alone("mlp/fc1", block, 0.1 / block, 0.1) for block in range(1, 100)]
    whole = [rounding.Alone("bf16", None, 0.1, 0.1)]
    found = {"w8": distance, "bf16": distance}
    rounding_page.write(tmp_path / "page.html", "a < b", pictures, found, {"w8": (alone, whole)})
    page = (tmp_path / "page.html").read_text()
    assert "a &lt; b" in page and page.count("<img") == 2 + 3 and "mlp/fc1 99" in page and "12.34" in page


def test_what_cannot_be_asked(tmp_path):
    pipe = jdiff.pipeline(make_folder(tmp_path / "sd", in_channels=9))
    with pytest.raises(ValueError, match="repaints part of a picture"):
        Texts(pipe, ["a fox"])
    with pytest.raises(ValueError, match="prompts is empty"):
        Texts(pipe, [])
