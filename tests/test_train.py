"""A step does what its equations say, a run that is stopped anywhere ends as if it had not been."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import wait_until

import jdiff
from jdiff import checkpoint, models, optim, train, tree
from jdiff import config as configs
from jdiff.diffusion.process import make_process
from jdiff.layers import sincos_positions_2d
from jdiff.report import SPEED
from jdiff.tasks import NOTHING, class_to_image, mean_gradient
from jdiff.tasks.class_to_image import class_loss


def make_batch(rows=8, seed=0):
    """Smooth pictures of two classes, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    label = np.arange(rows) % 2
    image = np.broadcast_to(60 + 120 * label[:, None, None, None], (rows, 8, 8, 3)) + rng.integers(
        0, 20, (rows, 8, 8, 3)
    )
    batch = {"image": image.astype(np.uint8), "label": label.astype(np.int32), "index": np.arange(rows, dtype=np.int32)}
    return {name: jnp.asarray(x) for name, x in batch.items()}


class Small:
    """A task: a model of two blocks and its loss. Also its optimizer; the state is the same at each `state()`."""

    def __init__(self, kind="gaussian", lr=1e-3):
        fields = {"image_size": 8, "channels": 3, "num_classes": 2, "width": 32, "depth": 2, "heads": 2}
        self.model = models.create("DiT-S/2", **fields)
        settings = configs.default().diffusion
        settings.kind = kind
        self.frozen, self.base = "dit/pos_embed", NOTHING
        self.loss_fn = class_loss(self.model, make_process(settings, learn_sigma=True))
        self.gradient = mean_gradient(self.loss_fn)
        self.tx = optim.make_optimizer(optim.make_schedule("constant", lr, 0, 100), 0.01)
        self.state = jax.jit(self._state, static_argnames="noise")  # op by op it compiles a program a shape

    def init(self, key, given):
        return {"dit": self.model.init(key, *self.model.dummy_inputs())["params"]}

    def _state(self, noise=0.02):
        state = train.init_state(self, self.tx, jax.random.key(0), {})
        # off the official initialisation, whose zeros hide most of the gradient
        keys = iter(jax.random.split(jax.random.key(1), 100))
        params = jax.tree.map(lambda x: x + noise * jax.random.normal(next(keys), x.shape), state.params)
        average = jax.tree.map(jnp.copy, params)
        return train.TrainState(state.step, params, state.frozen, state.base, self.tx.init(params), average)

    def step(self, **options):
        ema = optim.Ema(0.9)
        return jax.jit(partial(train.train_step, gradient=self.gradient, tx=self.tx, ema=ema, seed=0, **options))


@pytest.fixture(scope="module")
def small() -> Small:
    """The model that most tests here share."""
    return Small()


@pytest.fixture(scope="module")
def small_step(small):
    """Its compiled step."""
    return small.step()


def same(a, b) -> bool:
    """Equal bit by bit."""
    x, y = tree.flatten(a), tree.flatten(b)
    return x.keys() == y.keys() and all(np.asarray(x[k]).tobytes() == np.asarray(y[k]).tobytes() for k in x)


def test_a_step_is_the_mean_gradient_through_the_optimizer(small, small_step):
    state, batch = small.state(), make_batch()
    keys = train.sample_keys(0, state.step, 8)
    loss = lambda params: small.loss_fn(tree.merge(params, state.frozen), batch, keys)["loss"].mean()  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(state.params)
    updates, _ = jax.jit(small.tx.update)(grads, state.opt_state, state.params)
    expected = optax.apply_updates(state.params, updates)
    new, metrics = small_step(state, batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], jax.jit(optax.tree.norm)(grads), rtol=1e-4)
    for path, leaf in tree.flatten(new.params).items():
        # Adam's first step is lr * sign: compare the steps where the gradient is not all rounding
        clear = np.abs(tree.flatten(grads)[path]) > 1e-6
        np.testing.assert_allclose(np.asarray(leaf)[clear], np.asarray(tree.flatten(expected)[path])[clear], atol=2e-5)
    average = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state.params, new.params)
    for path, leaf in tree.flatten(new.ema_params).items():
        np.testing.assert_allclose(leaf, tree.flatten(average)[path], atol=1e-6, err_msg=path)
    assert int(new.step) == 1 and metrics["refused"] == 0


def test_accumulation_changes_nothing(small, small_step):
    a, metrics_a = small_step(small.state(), make_batch())
    b, metrics_b = small.step(accumulate=4)(small.state(), make_batch())
    for name, value in metrics_a.items():
        np.testing.assert_allclose(metrics_b[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for (path, x), y in zip(tree.flatten(a.opt_state).items(), jax.tree.leaves(b.opt_state), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-7, err_msg=path)  # the moments are the gradient itself


def test_clipping_bounds_the_gradient(small, small_step):
    _, free = small_step(small.state(), make_batch())
    limit = float(free["grad_norm"]) / 4
    new, metrics = small.step(clip_norm=limit)(small.state(), make_batch())
    moments = new.opt_state[0].mu  # 0.1 x the gradient that the optimizer saw
    np.testing.assert_allclose(optax.tree.norm(moments), 0.1 * limit, rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], free["grad_norm"], rtol=1e-5)  # as it was before clipping


@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_a_step_that_is_not_finite_changes_nothing(small, small_step, poison):
    state, batch = small.state(), make_batch()
    state, _ = small_step(state, batch)
    bad = {**batch, "image": batch["image"].astype(jnp.float32).at[3, 0, 0, 0].set(float(poison))}
    new, metrics = small_step(state, bad)
    assert metrics["refused"] == 1 and int(new.step) == int(state.step) + 1
    assert same(new.params, state.params) and same(new.opt_state, state.opt_state)
    assert same(new.ema_params, state.ema_params) and same(new.frozen, state.frozen)
    after, metrics = small_step(new, batch)
    assert metrics["refused"] == 0 and not same(after.params, new.params)


def test_an_infinite_gradient_of_a_finite_loss_is_refused(small):
    def loss_fn(params, batch, keys_B):
        losses, bias = small.loss_fn(params, batch, keys_B), params["dit"]["final_linear"]["bias"]
        root = jnp.sqrt(jnp.abs(bias[0] - bias[0]))
        return {**losses, "loss": losses["loss"] + root}  # 0, but its derivative is not finite

    gradient = mean_gradient(loss_fn)
    step = jax.jit(partial(train.train_step, gradient=gradient, tx=small.tx, ema=optim.Ema(), seed=0))
    state = small.state()
    new, metrics = step(state, make_batch())
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"]) and metrics["refused"] == 1
    assert same(new.params, state.params) and same(new.opt_state, state.opt_state)


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_quarters_average_to_the_loss(kind):
    small = Small(kind)
    _, metrics = small.step(accumulate=2)(small.state(), make_batch(16))
    assert metrics["quarter_counts"].sum() == 16 and (metrics["quarter_counts"] > 0).sum() >= 2
    np.testing.assert_allclose(metrics["quarter_sums"].sum() / 16, metrics["loss"], rtol=1e-5)


def test_the_loss_goes_down():
    small = Small("flow", lr=3e-3)
    step, state, batch, losses = small.step(), small.state(0.0), make_batch(16), []
    for _ in range(150):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-20:]) < 0.4 * np.mean(losses[:5])


def test_noise_depends_on_seed_step_and_row_alone():
    keys = lambda *a: jax.random.key_data(train.sample_keys(*a))  # noqa: E731
    base = keys(0, 5, 8)
    assert len(np.unique(base, axis=0)) == 8
    np.testing.assert_array_equal(keys(0, 5, 16)[:8], base)
    assert not (keys(0, 6, 8) == base).all(1).any() and not (keys(1, 5, 8) == base).all(1).any()


def test_labels_are_dropped_at_the_models_rate():
    model = models.create(
        "DiT-S/2", image_size=8, channels=3, num_classes=2, width=32, depth=1, heads=2, label_dropout=0.25
    )
    process = make_process(configs.default().diffusion, learn_sigma=True)
    seen = []

    class Spy:
        null_label, label_dropout = model.null_label, model.label_dropout

        def apply(self, variables, x_BHWC, t_B, y_B):
            seen.append(y_B)
            return jnp.concatenate([x_BHWC, x_BHWC], -1)

    batch = {"image": jnp.zeros((4000, 2, 2, 3), jnp.uint8), "label": jnp.ones(4000, jnp.int32)}
    class_loss(Spy(), process)({"dit": {}}, batch, train.sample_keys(0, jnp.int32(0), 4000))
    dropped = float((seen[0] == 2).mean())
    assert abs(dropped - 0.25) < 0.03 and set(np.unique(seen[0])) == {1, 2}


def tiny_config(folder, **changes):
    """A config of the tiny model on a folder of pictures, for runs in this process (on all eight devices)."""
    config = configs.load_file("configs/dit_s2.py") if os.path.exists("configs/dit_s2.py") else configs.default()
    values = {
        **{"model.depth": 2, "model.width": 32, "model.heads": 2, "data.image_size": 8, "batch_size": 8},
        **{"sample.steps": 2, "sample.count": 2, "log.tensorboard": False, "data.name": "imagefolder"},
        **{"data.path": str(folder), "total_steps": 12, "checkpoint_every": 4, "log_every": 2, **changes},
    }
    config.update_from_flattened_dict(values)
    return config


def test_refused_steps_are_named_and_end_the_run(image_folder, tmp_path, monkeypatch, caplog):
    def poisoned(model, process):
        real = original(model, process)

        def loss(params, batch, keys_B):
            losses = real(params, batch, keys_B)
            return {**losses, "loss": jnp.where(batch["index"] >= 0, jnp.nan, losses["loss"])}

        return loss

    original = class_loss
    monkeypatch.setattr(class_to_image, "class_loss", poisoned)
    with caplog.at_level(logging.WARNING), pytest.raises(FloatingPointError) as error:
        train.fit(tiny_config(image_folder, max_refused=3), tmp_path)
    assert "3 steps in a row" in str(error.value) and "step 3" in str(error.value) and "\n" not in str(error.value)
    refusals = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert len(refusals) == 3 and refusals[0].startswith("step 1 refused")
    named = json.loads(refusals[0].split("records ")[1])
    assert len(named) == 8 and set(named) <= set(range(24))
    assert checkpoint.steps(tmp_path) == []


LOSSES = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import jax
from functools import partial
from test_train import tiny_config
from jdiff import data, sharding, train
setup = train.Setup(tiny_config(sys.argv[2], **json.loads(sys.argv[3])))
state, losses = setup.fresh_state(), []
put = partial(sharding.put_batch, setup.mesh)
with data.to_device(setup.batches(0, Path(sys.argv[4])), put) as batches:
    for _ in range(20):
        state, metrics = setup.step(state, next(batches))
        losses.append(float(metrics["loss"]))
specs = {str(x.sharding.spec) for x in jax.tree.leaves(state.params)}
print(json.dumps({"losses": losses, "specs": sorted(specs), "devices": len(jax.devices())}))
"""


@pytest.mark.runs
def test_losses_agree_on_any_number_of_devices(image_folder, commands, tmp_path):
    found = {}
    # wide enough that fsdp has something to split
    wide = {"model.width": 64, "optim.lr": 1e-3}
    for devices, mesh in ((1, (-1, 1)), (2, (2, 1)), (8, (8, 1)), (8, (2, 4))):
        keys = json.dumps({**wide, "mesh.data": mesh[0], "mesh.fsdp": mesh[1]})
        result = commands.run("-c", LOSSES, os.path.dirname(__file__), image_folder, keys, tmp_path, devices=devices)
        assert result.returncode == 0, result.stderr
        found[devices, mesh] = json.loads(result.stdout.splitlines()[-1])
        assert found[devices, mesh]["devices"] == devices
    base = found.pop((1, (-1, 1)))["losses"]
    assert len(set(base)) == 20
    for key, value in found.items():
        np.testing.assert_allclose(value["losses"][:3], base[:3], rtol=1e-5, err_msg=str(key))
        np.testing.assert_allclose(value["losses"], base, rtol=1e-4, err_msg=str(key))
    assert any("fsdp" in spec for spec in found[8, (2, 4)]["specs"])


def run_arguments(commands, folder, workdir, **keys):
    """Of a tiny run through launch.py that logs each step and saves often."""
    keys = {"total_steps": 60, "checkpoint_every": 7, "sample_every": 50, "log_every": 1, "data.workers": 0, **keys}
    keys |= {"data.name": "imagefolder", "data.path": folder, "data.flip": "true", "optim.lr": 1e-3}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    return ["--config", "configs/dit_s2.py", "--workdir", workdir, *commands.tiny, *flags]


def outcome(workdir, step=60):
    """All that a run leaves: its last checkpoint's checksums and its records, without the machine's speed."""
    meta = checkpoint.read_meta(workdir, step)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    records = [{k: v for k, v in line.items() if k not in SPEED} for line in lines]
    pictures = {p.name: p.read_bytes() for p in (workdir / "samples").glob("*.png")}
    return {"checksums": meta["checksums"], "records": records, "window": meta["window"], "pictures": pictures}


@pytest.fixture(scope="module")
def whole(image_folder, commands, tmp_path_factory):
    """A run that nothing interrupts, and what it leaves."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    result = commands.run("launch.py", *run_arguments(commands, image_folder, workdir))
    assert result.returncode == 0, result.stderr
    found = outcome(workdir)
    assert [r["step"] for r in found["records"]] == list(range(1, 61))
    return workdir, found


def kill_when(process, condition):
    """kill -9 of the whole process group once `condition` holds."""
    wait_until(condition, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def lines_of(workdir):
    """How many records a run has written."""
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.runs
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_ends_as_the_uninterrupted_one(whole, image_folder, commands, tmp_path, workers):
    """Killed at a random step, then in a save, then resumed: all of it bit-equal."""
    arguments = run_arguments(commands, image_folder, tmp_path / "run", **{"data.workers": workers})
    at = random.randint(8, 40)
    kill_when(commands.start("launch.py", *arguments), lambda: lines_of(tmp_path / "run") >= at)
    saves = tmp_path / "run" / "checkpoints"
    before = checkpoint.steps(tmp_path / "run")
    kill_when(commands.start("launch.py", *arguments), lambda: any(saves.glob("*.orbax-checkpoint-tmp*")))
    result = commands.run("launch.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert "resumed from step" in result.stderr or not before, result.stderr
    found = outcome(tmp_path / "run")
    for name, value in whole[1].items():
        assert found[name] == value, f"killed at record {at}: {name} differs"


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(10))
def test_a_run_killed_at_any_time_loses_nothing(whole, image_folder, commands, tmp_path, turn):
    """Killed five times at random moments, saves among them."""
    arguments = run_arguments(commands, image_folder, tmp_path / "run", **{"data.workers": 2 * (turn % 2)})
    for _ in range(5):
        process = commands.start("launch.py", *arguments)
        try:
            process.communicate(timeout=random.uniform(2, 8))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert commands.run("launch.py", *arguments).returncode == 0
    assert outcome(tmp_path / "run") == whole[1]


@pytest.mark.runs
@pytest.mark.parametrize(
    ("signum", "code", "everyone", "workers"),
    [
        (signal.SIGTERM, 143, False, 0),
        (signal.SIGINT, 130, True, 2),
        pytest.param(signal.SIGTERM, 143, True, 2, marks=pytest.mark.slow),
    ],
    ids=["SIGTERM", "Ctrl-C in a terminal", "SIGTERM to a job's processes"],
)
def test_a_signal_saves_and_the_run_goes_on(whole, image_folder, commands, tmp_path, signum, code, everyone, workers):
    workdir = tmp_path / "run"
    keys = {"checkpoint_every": 10_000, "data.workers": workers}
    arguments = run_arguments(commands, image_folder, workdir, **keys)
    process = commands.start("launch.py", *arguments)
    wait_until(lambda: lines_of(workdir) >= 3, process)
    (os.killpg if everyone else os.kill)(process.pid, signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err and f"stopped by {signal.Signals(signum).name} at step" in err
    (saved,) = checkpoint.steps(workdir)
    assert f"at step {saved};" in err and 3 <= saved < 60
    result = commands.run("launch.py", *arguments)
    assert result.returncode == 0 and f"resumed from step {saved}" in result.stderr
    found = outcome(workdir)
    assert found["checksums"] == whole[1]["checksums"] and found["records"] == whole[1]["records"]


@pytest.mark.runs
def test_a_signal_while_compiling_saves_too(image_folder, commands, tmp_path):
    workdir = tmp_path / "run"
    process = commands.start("launch.py", *run_arguments(commands, image_folder, workdir, **{"model.depth": 3}))
    wait_until((workdir / "metrics.jsonl").exists, process)  # made before the first step
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and checkpoint.steps(workdir), err


@pytest.mark.runs
def test_load_gives_the_average_or_the_raw_parameters(whole, caplog):
    workdir, _ = whole
    model, average = jdiff.load(workdir)
    _, raw = jdiff.load(workdir, weights="raw")
    meta = checkpoint.read_meta(workdir, 60)
    expected = {"ema_params": average, "params": raw}
    for item, params in expected.items():
        sums = tree.checksums({item: {"dit": params}})
        kept = {k: v for k, v in meta["checksums"].items() if k.startswith(f"{item}/")}
        assert {k: v for k, v in sums.items() if not k.endswith("pos_embed")} == kept
    assert not same(average, raw) and model.image_size == 8 and model.num_classes == 2
    assert jdiff.load(workdir, step=56)[0] == model
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint of step 3"):
        jdiff.load(workdir, step=3)
    with pytest.raises(ValueError, match="weights='best'"):
        jdiff.load(workdir, weights="best")


@pytest.mark.runs
def test_load_falls_back_and_moves_nothing(whole, tmp_path, caplog):
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    (workdir / "checkpoints" / "60" / "meta" / "metadata").write_text("{}")
    _, params = jdiff.load(workdir)
    assert same(params, jdiff.load(whole[0], step=56)[1])
    assert "is damaged" in caplog.text
    assert checkpoint.steps(workdir) == checkpoint.steps(whole[0]) and not (workdir / "damaged").exists()


@pytest.mark.runs
def test_positions_are_kept_and_never_trained(whole):
    _, params = jdiff.load(whole[0])
    np.testing.assert_array_equal(params["pos_embed"], sincos_positions_2d(32, 4, 4)[None].astype(np.float32))
    meta = checkpoint.read_meta(whole[0], 60)
    assert "frozen/dit/pos_embed" in meta["arrays"]
    assert not [p for p in meta["arrays"] if "pos_embed" in p and not p.startswith("frozen/")]


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_load_says_what_is_missing(tmp_path, path):
    with pytest.raises(checkpoint.CheckpointError, match=r"does not exist|holds no checkpoint"):
        jdiff.load(tmp_path / path)
