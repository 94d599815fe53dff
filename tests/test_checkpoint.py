"""A checkpoint comes back as it was saved, or is known to be damaged: never as something else."""

import gc
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from jdiff import checkpoint, sharding, tree

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""Orbax drops coroutines when it reads damaged files; they are collected in any test after."""
FACTS = {"config": {"model": {"name": "DiT-S/2"}}, "window": []}


def make_items(step, mesh=None):
    """A small state of several dtypes, its values from `step`."""
    rng = np.random.default_rng(step)
    mesh = mesh or sharding.make_mesh(-1, min(4, len(jax.devices())))
    where = NamedSharding(mesh, PartitionSpec("fsdp"))
    params = {
        "kernel": jnp.asarray(rng.normal(size=(64, 48)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "codes": jnp.asarray(rng.integers(-9, 9, 7), jnp.int8),
    }
    average = jax.tree.map(lambda x: x + 1, params)
    frozen = {"pos_embed": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
    progress = {"step": jnp.int32(step), "opt_state": (params["kernel"] * 2, None)}
    items = {"params": params, "frozen": frozen, "ema_params": average, "progress": progress}
    place = lambda x: jax.device_put(x, where if x.ndim == 2 and x.shape[0] == 64 else sharding.replicated(mesh))  # noqa: E731
    return jax.tree.map(place, items)


def target_of(items):
    """The shapes to restore `items` into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items)


TARGET = target_of(make_items(0))


def assert_equal(found, expected):
    """The same trees, dtypes and bytes."""
    assert tree.differences(expected, found) == []
    for path, leaf in tree.flatten(found).items():
        assert np.asarray(leaf).tobytes() == np.asarray(tree.flatten(expected)[path]).tobytes(), path


def restore_newest(workdir):
    """The newest whole checkpoint's items and metadata, as a training run gets them."""
    with checkpoint.Checkpoints(workdir, 3) as checkpoints:
        return checkpoints.restore_newest(lambda meta: TARGET)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A workdir with checkpoints of steps 1 and 2; copy it before you change it."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    with checkpoint.Checkpoints(workdir, 3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_items(step), FACTS)
    return workdir


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """That workdir, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_a_restore_equals_what_was_saved(saved):
    items, meta = restore_newest(saved)
    assert_equal(items, make_items(2))
    assert items["params"]["kernel"].sharding.is_equivalent_to(TARGET["params"]["kernel"].sharding, 2)
    assert meta["step"] == 2 and meta["config"] == FACTS["config"]
    assert meta["checksums"] == tree.checksums(make_items(2)) and set(meta["arrays"]) == set(meta["checksums"])
    assert meta["jdiff_version"] and "git_revision" in meta
    assert checkpoint.steps(saved) == [1, 2] and not (saved / "damaged").exists()


def test_a_part_can_be_restored(saved):
    meta = checkpoint.read_meta(saved, 1)
    items = checkpoint.restore(saved, 1, {"ema_params": TARGET["ema_params"]}, meta)
    assert_equal(items, {"ema_params": make_items(1)["ema_params"]})


def _change(name):
    other = make_items(0)
    if name == "shape":
        other["params"]["kernel"] = jnp.zeros((64, 49))
    if name == "dtype":
        other["params"]["half"] = jnp.zeros(5, jnp.float32)
    if name == "missing":
        del other["params"]["codes"]
    if name == "more":
        other["ema_params"]["new"] = jnp.zeros(1)
    return target_of(jax.device_put(other, sharding.replicated(sharding.make_mesh(2, 4))))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("shape", ["params/kernel", "float32[64,49]", "float32[64,48]"]),
        ("dtype", ["params/half", "float32[5]", "bfloat16[5]"]),
        ("missing", ["params/codes", "int8[7]"]),
        ("more", ["ema_params/new", "float32[1]", "nothing"]),
    ],
)
def test_another_model_is_an_error_that_changes_nothing(copy, change, named):
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    with (
        checkpoint.Checkpoints(copy, 3) as checkpoints,
        pytest.raises(checkpoint.CheckpointError, match="another model") as error,
    ):
        checkpoints.restore_newest(lambda meta: _change(change))
    assert not isinstance(error.value, checkpoint.Damaged)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in named)
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


def check_damaged(workdir, what):
    """The damage is found and the older checkpoint used, or it did not matter: the values are those saved."""
    items, meta = restore_newest(workdir)
    assert meta["step"] in (1, 2), what
    assert_equal(items, make_items(meta["step"]))
    if meta["step"] == 1:
        assert checkpoint.steps(workdir) == [1] and (workdir / "damaged" / "2").is_dir(), what
    else:
        assert checkpoint.steps(workdir) == [1, 2], what
    return meta["step"] == 1


def damages(data, places):
    """Ways to damage a file's bytes: one byte flipped at each place, cut in half, emptied."""
    yield from ((f"byte {i}", data[:i] + bytes([data[i] ^ 0x55]) + data[i + 1 :]) for i in sorted(places))
    yield "half", data[: len(data) // 2]
    yield "empty", b""


def try_all(copy, places_of):
    """Damages every file of step 2 in every way; returns the (file, way) that were found out, and those without effect."""
    folder, found, harmless = copy / "checkpoints" / "2", [], []
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        good = file.read_bytes()
        for way, bad in damages(good, places_of(len(good))):
            if bad == good:
                continue
            file.write_bytes(bad)
            name = str(file.relative_to(folder))
            if check_damaged(copy, (name, way)):
                found.append((name, way))
                shutil.move(copy / "damaged" / "2", folder)
            else:
                harmless.append((name, way))
            file.write_bytes(good)
    gc.collect()  # what Orbax left behind complains here, not in a later test
    return found, harmless


def test_damage_to_any_file_is_found_or_harmless(copy):
    places = lambda size: {size // 3, size - 1} if size else set()  # noqa: E731
    found, harmless = try_all(copy, places)
    print(f"{len(found)} found, {len(harmless)} harmless: {harmless}")
    files = {name for name, _ in found}
    assert "meta/metadata" in files
    for item in ("params", "frozen", "ema_params", "progress"):
        assert any(name.startswith(f"{item}/") and "/d/" in name for name in files)


@pytest.mark.slow
def test_damage_at_many_places_is_found_or_harmless(copy):
    rng = np.random.default_rng(0)
    found, _ = try_all(copy, lambda size: set(rng.integers(0, size, 25).tolist()) if size else set())
    assert len(found) > 100


@pytest.mark.parametrize("name", ["meta", "params", "meta/metadata", "params/manifest.ocdbt", "_CHECKPOINT_METADATA"])
def test_a_missing_file_or_item_is_found_or_harmless(copy, name):
    path = copy / "checkpoints" / "2" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert check_damaged(copy, name) or name == "_CHECKPOINT_METADATA"


def test_a_forged_array_is_found_by_its_checksum(copy, caplog):
    """Whole files, written by Orbax itself, with other numbers than the metadata tells of."""
    meta = copy / "checkpoints" / "2" / "meta"
    with checkpoint.Checkpoints(copy, 3) as checkpoints:
        checkpoints.save(3, make_items(3), FACTS)
    shutil.rmtree(copy / "checkpoints" / "2")
    shutil.move(copy / "checkpoints" / "3", copy / "checkpoints" / "2")
    facts = json.loads((meta / "metadata").read_text())
    facts.pop("self")
    facts["checksums"]["params/kernel"] = "0" * 16
    (meta / "metadata").write_text(json.dumps({**facts, "self": tree.digest(facts)}))
    _, restored = restore_newest(copy)
    assert restored["step"] == 1 and "checksum of params/kernel" in caplog.text


def test_a_changed_fact_is_found(copy):
    path = copy / "checkpoints" / "2" / "meta" / "metadata"
    path.write_text(path.read_text().replace("DiT-S/2", "DiT-B/2"))
    with pytest.raises(checkpoint.Damaged, match="not what was written"):
        checkpoint.read_meta(copy, 2)


def test_a_fallback_is_said_aloud_and_training_goes_on(copy, caplog):
    (copy / "checkpoints" / "2" / "meta" / "metadata").write_text("{")
    assert restore_newest(copy)[1]["step"] == 1
    assert "2 is damaged" in caplog.text and "trying the one before" in caplog.text and "moved" in caplog.text
    with checkpoint.Checkpoints(copy, 3) as checkpoints:
        checkpoints.save(2, make_items(2), FACTS)
    items, meta = restore_newest(copy)
    assert meta["step"] == 2
    assert_equal(items, make_items(2))


def test_when_none_is_whole_nothing_moves_and_it_stays_an_error(copy):
    for step in (1, 2):
        (copy / "checkpoints" / str(step) / "meta" / "metadata").write_text("{")
    for _ in range(2):  # a second start must not take the emptied folder for a fresh one
        with pytest.raises(checkpoint.CheckpointError, match=r"none of the checkpoints of steps \[1, 2\] is whole"):
            restore_newest(copy)
        assert checkpoint.steps(copy) == [1, 2] and not (copy / "damaged").exists()


def test_an_empty_workdir_is_a_fresh_start(tmp_path):
    assert restore_newest(tmp_path / "new") is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", ["params", "ema_params", "progress"])
def test_a_state_that_is_not_finite_is_never_written(tmp_path, place, value):
    items = make_items(1)
    if place == "progress":
        items[place]["opt_state"] = (items[place]["opt_state"][0].at[0, 0].set(value), None)
    else:
        items[place]["kernel"] = items[place]["kernel"].at[7, 5].set(value)
    with checkpoint.Checkpoints(tmp_path, 3) as checkpoints, pytest.raises(FloatingPointError, match=f"{place}/"):
        checkpoints.save(1, items, FACTS)
    assert checkpoint.steps(tmp_path) == []


def test_the_newest_are_kept(tmp_path):
    with checkpoint.Checkpoints(tmp_path, 2) as checkpoints:
        for step in (1, 2, 5, 9):
            checkpoints.save(step, make_items(step), FACTS)
    assert checkpoint.steps(tmp_path) == [5, 9]


def test_tensorstores_counters_are_not_read(tmp_path, monkeypatch):
    """Its lists of them are never given back: a long run would grow with every checkpoint."""
    read = []
    monkeypatch.setattr(tensorstore, "experimental_collect_matching_metrics", lambda *a, **k: read.append(a) or [])
    with checkpoint.Checkpoints(tmp_path, 3) as checkpoints:
        checkpoints.save(1, make_items(1), FACTS)
    assert restore_newest(tmp_path) and not read


def test_an_unfinished_save_does_not_count_and_is_cleared(copy):
    unfinished = copy / "checkpoints" / "3.orbax-checkpoint-tmp-7"
    shutil.copytree(copy / "checkpoints" / "2", unfinished)
    assert checkpoint.steps(copy) == [1, 2]
    assert restore_newest(copy)[1]["step"] == 2 and not unfinished.exists()


def test_a_newer_format_is_refused_without_damage(copy):
    path = copy / "checkpoints" / "2" / "meta" / "metadata"
    facts = json.loads(path.read_text()) | {"format": 99}
    facts.pop("self")
    path.write_text(json.dumps({**facts, "self": tree.digest(facts)}))
    with pytest.raises(checkpoint.CheckpointError, match="format 99") as error:
        restore_newest(copy)
    assert not isinstance(error.value, checkpoint.Damaged) and checkpoint.steps(copy) == [1, 2]


RESTORE = """
import sys
import jax
sys.path.insert(0, sys.argv[3])
from pathlib import Path
import test_checkpoint as t
from jdiff import checkpoint, sharding
n = len(jax.devices())
target = t.target_of(t.make_items(0, sharding.make_mesh(1, n)))
with checkpoint.Checkpoints(Path(sys.argv[1]), 3) as checkpoints:
    items, meta = checkpoints.restore_newest(lambda meta: target)
t.assert_equal(items, t.make_items(2, sharding.make_mesh(1, n)))
assert len(items["params"]["kernel"].sharding.device_set) == n == int(sys.argv[2]), n
"""


@pytest.mark.parametrize("devices", [4, 1])
def test_a_restore_fits_fewer_devices(saved, commands, devices):
    result = commands.run("-c", RESTORE, saved, devices, Path(__file__).parent, devices=devices)
    assert result.returncode == 0, result.stderr
