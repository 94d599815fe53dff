"""Guards that no other test pins down, and that each guard has a test which fails without it (mutations.py)."""

import json

import jax
import numpy as np
import pytest
from conftest import TINY, wait_until
from mutations import GUARDS, ROOT, survives
from safetensors.numpy import load_file

from jdiff import checkpoint, models, sharding
from jdiff.convert import tensors
from jdiff.paths import whole
from jdiff.pipelines import to_uint8


def test_strided_arrays_are_written_as_what_they_are(tmp_path):
    """safetensors#825: strided and Fortran-ordered arrays were written as garbage, without a word."""
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {"fortran": np.asfortranarray(x), "transposed": x.T, "strided": x[::2, ::3], "backwards": x[::-1]}
    tensors.write(tmp_path / "a.safetensors", arrays, {})
    for found in (load_file(tmp_path / "a.safetensors"), tensors.read(tmp_path / "a.safetensors")[0]):
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_deeper_model_restores_no_shallower_one(tmp_path):
    """orbax#2972: a model of 16 layers restored a checkpoint of 12 in part, without error."""
    where = sharding.replicated(sharding.make_mesh())

    def params(depth):
        model = models.create("DiT-S/2", image_size=8, channels=3, num_classes=2, width=16, depth=depth, heads=2)
        shapes = jax.eval_shape(model.init, jax.random.key(0), *model.dummy_inputs())["params"]
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)

    saved = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype), where), params(12))
    with checkpoint.Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, {"params": saved}, {})
        checkpoints.wait()
        with pytest.raises(
            checkpoint.CheckpointError, match=r"another model.*expected float32\[16,.*found float32\[12,"
        ):
            checkpoints.restore_newest(lambda meta: {"params": params(16)})


def test_a_picture_of_nan_is_an_error():
    """diffusers#7188: an autoencoder in half precision made NaN, which were written as black pictures."""
    pictures = np.zeros((3, 4, 4, 3), np.float32)
    pictures[1, 2, 2, 0] = np.nan
    with pytest.raises(FloatingPointError, match=r"picture\(s\) \[1\] hold NaN"):
        to_uint8(pictures)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    dest = tmp_path / "a"
    with whole(dest) as partial:
        partial.write_text("first")
        assert not dest.exists()
    with pytest.raises(OSError, match="full"), whole(dest) as partial:
        partial.write_text("sec")
        raise OSError("full")
    assert dest.read_text() == "first" and [*tmp_path.iterdir()] == [dest]


@pytest.mark.runs
def test_a_signal_while_scoring_saves_at_once_and_scores_at_the_next_start(commands, image_folder, tmp_path):
    """A scoring may take longer than a machine that is taken away waits; none of it is lost, nor left out."""
    classifier, run = tmp_path / "classifier", tmp_path / "run"
    folder = ("--config.data.name=imagefolder", f"--config.data.path={image_folder}", "--config.log.tensorboard=false")
    small = (
        "--config.data.image_size=16",
        "--config.model.widths=8,16",
        "--config.batch_size=8",
        "--config.total_steps=1",
    )
    made = commands.run(
        *("launch.py", "--config", "configs/classifier_openmoji.py", "--workdir", classifier, *small, *folder),
        "--config.data.split=all",
    )
    assert made.returncode == 0, made.stderr
    scoring = ("--config.eval_every=2", f"--config.eval.network={classifier}", "--config.eval.num=4000")
    keys = (*TINY, *folder, *scoring, "--config.total_steps=3", "--config.sample_every=2", "--config.log_every=1")
    arguments = ("launch.py", "--config", "configs/dit_s2.py", "--workdir", run, *keys, "--config.checkpoint_every=100")
    records = lambda: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]  # noqa: E731
    process = commands.start(*arguments)
    wait_until(
        lambda: (run / "metrics.jsonl").exists() and len(records()) == 2, process, 120
    )  # scored next: 500 batches
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "stopped by SIGTERM at step 2" in err, err
    assert checkpoint.steps(run) == [2] and not any("fid" in record for record in records())
    assert not (run / "samples").exists()
    done = commands.run(*arguments, "--config.eval.num=16")
    assert done.returncode == 0 and "resumed from step 2" in done.stderr, done.stderr
    assert [record["step"] for record in records() if "fid" in record] == [2, 3]
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["step_00000002.png", "step_00000003.png"]


@pytest.mark.faults
@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_without_its_guard_a_test_fails(guard, record_property):
    problem = survives(guard)
    record_property("fault", [f"without: {guard.name}", f"{guard.test} fails", problem or "so"])
    assert not problem


def test_every_guard_stands_where_its_row_says():
    """The rows are of today's source: a full run of them takes minutes, and is `pytest -m faults`."""
    for guard in GUARDS:
        assert (ROOT / guard.file).read_text().count(guard.old) == 1, guard.name
        assert (
            f"def {guard.test.partition('::')[2].partition('[')[0]}("
            in (ROOT / guard.test.partition("::")[0]).read_text()
        ), guard.name
