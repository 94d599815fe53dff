"""Meshes and placements on eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdiff import optim, sharding, tree


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (2, 4, (2, 4)), (2, -1, (2, 4)), (-1, 8, (1, 8)), (8, 1, (8, 1))]
)
def test_meshes_that_fit(data, fsdp, shape):
    mesh = sharding.make_mesh(data, fsdp)
    assert tuple(mesh.shape.items()) == (("data", shape[0]), ("fsdp", shape[1]))


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (2, 2), (16, 1), (-1, -1), (0, 8), (-2, 4)])
def test_meshes_that_do_not_fit_are_one_line_naming_the_keys(data, fsdp):
    with pytest.raises(ValueError, match=rf"mesh\.data={data}.*mesh\.fsdp={fsdp}") as error:
        sharding.make_mesh(data, fsdp)
    assert "\n" not in str(error.value)


def _leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_leaf_spec_splits_the_largest_axis_that_divides():
    assert sharding.leaf_spec("kernel", _leaf(12, 256, 1024), 4) == P(None, None, "fsdp")
    assert sharding.leaf_spec("kernel", _leaf(12, 1024, 256), 4) == P(None, "fsdp", None)
    assert sharding.leaf_spec("kernel", _leaf(256, 256), 4) == P(None, "fsdp")  # a tie goes to the last
    assert sharding.leaf_spec("kernel", _leaf(256, 1001), 4) == P("fsdp", None)  # 1001 does not divide
    assert sharding.leaf_spec("kernel", _leaf(255, 1001), 4) == P()  # nothing does
    assert sharding.leaf_spec("kernel", _leaf(64, 64), 4) == P()  # too small to be worth it
    assert sharding.leaf_spec("kernel", _leaf(), 4) == P()
    assert sharding.leaf_spec("kernel", _leaf(1024, 1024), 1) == P()
    assert sharding.leaf_spec("a/pos_embed", _leaf(1024, 1024), 4) == P()


def test_optimizer_state_follows_its_parameter():
    params = {"blocks": {"kernel": _leaf(4, 128, 256), "bias": _leaf(4, 128)}, "head": {"kernel": _leaf(512, 64)}}
    tx = optim.make_optimizer(optim.make_schedule("cosine", 1e-3, 10, 100), 0.1)
    state = jax.eval_shape(tx.init, params)
    mesh = sharding.make_mesh(2, 4)
    where = {path: s.spec for path, s in tree.flatten(sharding.shardings(mesh, params)).items()}
    assert where["blocks/kernel"] == P(None, None, "fsdp") and where["head/kernel"] == P("fsdp", None)
    moments = 0
    for path, placed in tree.flatten(sharding.shardings(mesh, state)).items():
        for parameter, spec in where.items():
            if path.endswith(parameter):
                assert placed.spec == spec, path
                moments += 1
    assert moments == 2 * len(where)


def test_put_batch_lays_rows_over_all_devices():
    mesh = sharding.make_mesh(2, 4)
    rows = {"image": np.arange(16 * 3, dtype=np.float32).reshape(16, 3), "label": np.arange(16)}
    batch = sharding.put_batch(mesh, rows)
    assert {s.data.shape for s in batch["image"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(batch["image"], rows["image"])
    assert batch["label"].sharding.is_equivalent_to(sharding.batch_sharding(mesh), 1)
    assert sharding.replicated(mesh).is_fully_replicated
