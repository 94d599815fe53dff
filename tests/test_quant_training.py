"""Training through integers: a run falls, goes on and is sharded like any other, and its quantized copy is what was trained."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import checkpoint, loading, quant, sharding, train, weights
from jdiff.qtensor import QTensor

pytestmark = pytest.mark.usefixtures("compiled")
W4 = quant.RECIPES["w4"]["dit"]


@pytest.fixture(scope="module")
def base(class_config, tmp_path_factory):
    """A trained run."""
    workdir = tmp_path_factory.mktemp("base") / "a"
    train.fit(class_config, workdir)
    return workdir


def changed(config, **changes):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def runs(base, class_config, tmp_path_factory):
    """A run of each mode, of twelve steps in int4."""
    made = {}
    for mode in ("train", "lsq"):
        more = {"total_steps": 12, "checkpoint_every": 6, "log_every": 1, "optim__lr": 3e-3}
        config = changed(class_config, init_from=str(base), quant__mode=mode, quant__recipe="w4", **more)
        made[mode] = config, tmp_path_factory.mktemp(mode) / "run"
        train.fit(*made[mode])
    return made


@pytest.mark.runs
@pytest.mark.parametrize("mode", ["train", "lsq"])
def test_its_copy_computes_what_was_trained(mode, runs, tmp_path):
    """The loss falls; what loads is floats; the copy's answer is that of training's forward."""
    config, workdir = runs[mode]
    losses = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 12 and np.mean(losses[-4:]) < np.mean(losses[:4])
    model, params = jdiff.load(workdir)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    opened = loading.open_checkpoint(workdir)
    loading.save_quantized(loading.quantized(opened, "w4"), tmp_path / "copy")
    _, copied = jdiff.load(tmp_path / "copy")
    rng = np.random.default_rng(0)
    x, t, y = jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32), jnp.arange(4) * 200.0, jnp.asarray([0, 1, 0, 1])
    apply = jax.jit(lambda params: model.apply({"params": params}, x, t, y))
    trained = apply(quant.train(params, W4, scales=opened.scales))
    np.testing.assert_allclose(apply(copied), trained, rtol=1e-5, atol=1e-5)
    assert np.abs(apply(params) - trained).max() > 1e-3
    assert (opened.scales is None) == (mode == "train")
    if mode == "lsq":
        started = quant.first_scales(jdiff.load(config.init_from)[1], W4)
        for path, scale in opened.scales.items():
            np.testing.assert_array_equal(weights.flatten(copied)[path].scale, np.abs(scale))
            assert np.abs(scale - started[path]).max() > 1e-4
        with pytest.raises(ValueError, match=r"quantize='w8a8': this run has learned scales for w4: use that"):
            jdiff.load(workdir, quantize="w8a8")


@pytest.mark.runs
@pytest.mark.parametrize("mode", ["train", "lsq"])
def test_a_resumed_run_equals_an_uninterrupted_one(mode, runs, tmp_path):
    config, workdir = runs[mode]
    again = shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "12")
    train.fit(config, again)
    sums = [checkpoint.read_meta(folder, 12)["checksums"] for folder in (workdir, again)]
    assert sums[0] == sums[1]
    assert any("scales/dit" in path for path in sums[0]) == (mode == "lsq")


@pytest.mark.slow
def test_it_is_spread_and_accumulated_like_any_other(base, class_config, tmp_path):
    """The same gradient whole and in two parts, on eight devices and with what is trained spread over them."""
    found = []
    for more in ({"mesh__fsdp": 1}, {"mesh__fsdp": 8, "accumulate": 2}):
        config = changed(
            class_config, init_from=str(base), quant__mode="lsq", quant__recipe="w8a8", batch_size=16, **more
        )
        setup = train.Setup(config)
        state = setup.fresh_state()
        kernel = state.params["dit"]["blocks"]["mlp"]["fc1"]["kernel"]
        assert kernel.sharding.is_fully_replicated == (more["mesh__fsdp"] == 1)
        with setup.batches(0, tmp_path) as batches:
            _, metrics = setup.step(state, sharding.put_batch(setup.mesh, next(batches)))
        found.append([float(metrics[name]) for name in ("loss", "grad_norm")])
    np.testing.assert_allclose(*found, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quant__mode": "qat"}, r"quant\.mode='qat' is not one of \['none', 'train', 'lsq'\]"),
        ({"quant__mode": "train", "quant__recipe": "w8a8-static"}, r"quant\.recipe='w8a8-static' is not one of"),
        ({"quant__recipe": "w4"}, r"quant\.recipe='w4' does nothing with quant\.mode='none'"),
        ({"quant__mode": "train", "lora__rank": 2}, r"quant\.mode='train' trains the model itself, and lora\.rank=2"),
        ({"quant__mode": "lsq"}, r"quant\.mode='lsq' needs init_from"),
        (
            {"quant__mode": "train", "quant__recipe": "w4", "model__width": 32},
            r"blocks/attn/proj/kernel has 32 inputs, no multiple of the 64",
        ),
    ],
)
def test_a_mistake_is_one_line(class_config, changes, said):
    with pytest.raises(ValueError, match=said) as error:
        train.Setup(changed(class_config, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.runs
def test_starts_that_cannot_be_are_one_line(base, runs, class_config, tmp_path):
    """A quantized checkpoint into training in floats, and kernels without the scales that they were trained with."""
    loading.save_quantized(loading.quantized(loading.open_checkpoint(base), "w8"), tmp_path / "copy")
    for start, said in (
        (tmp_path / "copy", r"copy is quantized \(w8\) and cannot be trained itself"),
        (runs["lsq"][1], "has learned scales, without which its kernels are not what was trained: resume it"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            train.Setup(changed(class_config, init_from=str(start), quant__mode="train")).fresh_state()
        assert "\n" not in str(error.value)


def test_trees_and_scales_that_do_not_fit_are_refused(base):
    _, params = jdiff.load(base)
    with pytest.raises(ValueError, match=r"rule 'block/.\*' gets no array: it matches none of"):
        quant.train(params, ((r"block/.*", "w8"),))
    with pytest.raises(ValueError, match="would have a static step, which is not trained: use w8a8"):
        quant.train(params, quant.RECIPES["w8a8-static"]["dit"])
    scales = quant.first_scales(params, W4)
    made = weights.flatten(quant.quantize(params, W4))
    assert set(scales) == {path for path, leaf in made.items() if isinstance(leaf, QTensor)}
    del scales["blocks/mlp/fc2/kernel"]
    with pytest.raises(ValueError, match=r"no learned scales for blocks/mlp/fc2/kernel \(2, 256, 64\)"):
        quant.train(params, W4, scales=scales)
