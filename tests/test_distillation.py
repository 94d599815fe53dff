"""Distillation: adapters over integers, and models trained through them, come nearer to their teacher without any data."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import checkpoint, loading, train

pytestmark = pytest.mark.usefixtures("compiled")


def changed(config, **changes):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def teacher(class_config, tmp_path_factory):
    """A run, trained a little."""
    workdir = tmp_path_factory.mktemp("teacher") / "a"
    train.fit(changed(class_config, total_steps=20), workdir)
    return workdir


@pytest.fixture(scope="module")
def copy(teacher, tmp_path_factory):
    """The teacher in int4."""
    path = tmp_path_factory.mktemp("copy") / "a_int4"
    loading.save_quantized(loading.quantized(loading.open_checkpoint(teacher), "w4"), path)
    return path


@pytest.fixture(scope="module")
def config(class_config, teacher, copy):
    """Adapters over the copy; the pictures that the config names are not there."""
    more = {"total_steps": 30, "checkpoint_every": 15, "log_every": 1, "optim__lr": 3e-3, "data__path": "not there"}
    settings = {
        "distill__teacher": str(teacher),
        "distill__count": 12,
        "lora__rank": 8,
        "lora__targets": ("all-linear",),
    }
    return changed(class_config, init_from=str(copy), **settings, **more)


@pytest.fixture(scope="module")
def distilled(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("distilled") / "run"
    train.fit(config, workdir)
    return workdir


def _answer(model, params):
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(32, 8, 8, 3)), jnp.float32), jnp.arange(32) % 3  # 2: no label
    return np.asarray(jax.jit(model.apply)({"params": params}, x, jnp.linspace(500, 999, 32), y))[..., :3]


def _error(found, exact):
    return float(np.square(found - exact).sum() / np.square(exact).sum())


def _losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.runs
def test_adapters_take_back_what_rounding_changed(teacher, copy, distilled):
    """On inputs that were not trained on, and as any adapters: over the copy, and opened alone."""
    exact = _answer(*jdiff.load(teacher))
    before, after = (_error(_answer(*jdiff.load(copy, lora=lora)), exact) for lora in ((), [distilled]))
    assert after < before / 2
    losses = _losses(distilled)
    assert np.mean(losses[-5:]) < losses[0] / 2
    np.testing.assert_array_equal(_answer(*jdiff.load(distilled)), _answer(*jdiff.load(copy, lora=[distilled])))
    pictures = jdiff.pipeline(distilled)([0, 1], steps=2)
    assert np.isfinite(pictures).all()


@pytest.mark.runs
def test_a_checkpoint_holds_no_teacher_and_a_resumed_run_goes_on(config, distilled, tmp_path):
    arrays = checkpoint.read_meta(distilled, 30)["arrays"]
    assert all(path.split("/")[1] in ("lora", "step", "opt_state") for path in arrays)
    assert not [path for path in arrays if "teacher" in path]
    again = shutil.copytree(distilled, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "30")
    train.fit(config, again)
    sums = [checkpoint.read_meta(folder, 30)["checksums"] for folder in (distilled, again)]
    assert sums[0] == sums[1]


@pytest.mark.runs
def test_a_model_trained_through_integers_has_a_teacher_too(config, teacher, tmp_path):
    """Its checkpoints hold no teacher, and its quantized copy answers."""
    settings = {"init_from": str(teacher), "lora__rank": 0, "quant__mode": "lsq", "quant__recipe": "w4"}
    train.fit(changed(config, optim__lr=1e-3, **settings), tmp_path / "run")
    assert not [path for path in checkpoint.read_meta(tmp_path / "run", 30)["arrays"] if "teacher" in path]
    assert np.isfinite(_answer(*jdiff.load(tmp_path / "run", quantize="w4"))).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distill__teacher": "nowhere"}, "nowhere does not exist"),
        (
            {"distill__teacher": "COPY"},
            r"distill\.teacher=.* is quantized itself: give the checkpoint that it was made",
        ),
        ({"diffusion__schedule": "cosine"}, r"was trained with another diffusion\.\* than this config has"),
        ({"diffusion__kind": "flow", "sample__sampler": "euler"}, r"another diffusion\.\*"),
        ({"model__learn_sigma": False}, r"has learn_sigma True, and the model False"),
        ({"model__label_dropout": 0.0, "sample__guidance": 1.0}, r"has null_label 2, and the model None"),
        ({"distill__count": 0}, r"distill\.count=0 must be above 0"),
    ],
)
def test_a_mistake_is_one_line(config, copy, changes, said):
    changes = {key: str(copy) if value == "COPY" else value for key, value in changes.items()}
    with pytest.raises(ValueError, match=said) as error:
        train.Setup(changed(config, **changes))
    assert "\n" not in str(error.value)
