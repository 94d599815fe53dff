"""Meshes and placements on eight virtual devices."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdiff import models, optim, sharding, train, tree


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((-1, 1), (8, 1, 1)),
        ((2, 4), (2, 4, 1)),
        ((2, -1), (2, 4, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((1, 2, -1), (1, 2, 4)),
        ((-1, 1, 8), (1, 1, 8)),
    ],
)
def test_meshes_that_fit(sizes, shape):
    mesh = sharding.make_mesh(*sizes)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), shape, strict=True))


@pytest.mark.parametrize(
    ("sizes", "near"),
    [
        ((3, 1, 1), "8 x 1 x 1"),
        ((-1, 3, 1), "4 x 2 x 1"),
        ((2, 2, 1), "2 x 4 x 1"),
        ((2, 2, 3), "2 x 2 x 2"),
        ((16, 1, 1), "8 x 1 x 1"),
        ((-1, -1, 1), "one of them may be -1"),
        ((0, 8, 1), "positive"),
        ((-2, 4, 1), "positive"),
    ],
)
def test_meshes_that_do_not_fit_are_one_line_with_the_nearest_that_do(sizes, near):
    with pytest.raises(ValueError, match=r"mesh\.data={}, mesh\.fsdp={}, mesh\.tensor={}".format(*sizes)) as error:
        sharding.make_mesh(*sizes)
    assert "\n" not in str(error.value) and near in str(error.value)


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


def test_a_kernel_whose_outputs_may_be_cut_is_split_along_its_inputs():
    """A third of attention's qkv is no whole number of the outputs' eighths."""
    for path in ("params/dit/blocks/attn/qkv/kernel", "opt_state/0/mu/dit/blocks/attn/qkv/kernel/qvalue"):
        assert sharding.leaf_spec(path, _leaf(12, 384, 1152), 8) == P(None, "fsdp", None)
        assert sharding.leaf_spec(path, _leaf(12, 380, 1152), 8) == P(None, None, "fsdp")  # 380 does not divide
    assert sharding.leaf_spec("params/dit/blocks/mlp/fc1/kernel", _leaf(12, 384, 1536), 8) == P(None, None, "fsdp")


def test_a_bias_that_is_cut_lies_whole_on_every_device():
    """Its thirds would lie across the devices' pieces, and each piece be passed on by itself."""
    state = {"params": {"dit": {"blocks": {"attn": {"qkv": {"bias": _leaf(28, 3456)}}}}}}
    mesh = sharding.make_mesh(1, 8)
    assert sharding.shardings(mesh, state)["params"]["dit"]["blocks"]["attn"]["qkv"]["bias"].spec == P()
    assert sharding.unsplit(mesh, state) == []  # which names what is whole by chance
    assert sharding.leaf_spec("params/dit/blocks/attn/qkv/bias", _leaf(28, 3456), 4, tensor=2) == P(None, "tensor")


def test_tensor_splits_outputs_then_inputs():
    """Of two products in a row the first gives each device the part that it needs for the second."""

    def spec(path, *shape, fsdp=2, tensor=2):
        return sharding.leaf_spec(path, _leaf(*shape), fsdp, tensor)

    assert spec("params/dit/blocks/mlp/fc1/kernel", 12, 256, 1024) == P(None, "fsdp", "tensor")
    assert spec("ema_params/dit/blocks/mlp/fc2/kernel", 12, 1024, 256) == P(None, "tensor", "fsdp")
    assert spec("params/dit/blocks/mlp/fc1/bias", 12, 1024) == P(None, "tensor")
    assert spec("params/dit/blocks/mlp/fc2/bias", 12, 256) == P()
    assert spec("frozen/dit/pos_embed", 1, 256, 256) == P()
    assert spec("base/unet/mid_block/resnets_0/conv1/kernel", 3, 3, 64, 128) == P(None, None, "fsdp", "tensor")
    assert spec("base/unet/mid_block/resnets_0/conv2/kernel", 3, 3, 128, 64) == P(None, None, "tensor", "fsdp")
    assert spec("base/text/layers_0/self_attn/out_proj/kernel", 256, 256) == P("tensor", "fsdp")
    assert spec("base/vae/decoder/mid_block/attentions_0/to_q/kernel", 256, 256) == P("fsdp", "tensor")
    # an integer kernel's scales lie as its outputs do; adapters as the kernel that they are for
    unet = "unet/down_blocks_0/attentions_0/transformer_blocks_0/attn1"
    assert spec(f"base/{unet}/to_q/kernel/qvalue", 256, 256) == P("fsdp", "tensor")
    assert spec(f"base/{unet}/to_q/kernel/scale", 1, 256) == P(None, "tensor")
    assert spec(f"base/{unet}/to_out_0/kernel/scale", 1, 256) == P()
    assert spec(f"params/lora/{unet}/to_q/kernel/b", 4, 256) == P(None, "tensor")
    assert spec(f"params/lora/{unet}/to_q/kernel/a", 256, 4) == P()
    assert spec(f"params/lora/{unet}/to_out_0/kernel/a", 256, 4) == P("tensor", None)
    assert spec(f"params/lora/{unet}/to_q/kernel/scale", 3) == P()
    with pytest.raises(ValueError, match=r"mesh\.tensor=5 .*mlp/fc1/kernel.*1024.*4 and 8"):
        spec("params/dit/blocks/mlp/fc1/kernel", 12, 256, 1024, tensor=5)


@pytest.mark.parametrize("name", ["dit", "unet", "vae", "text"])
def test_every_rule_of_a_family_finds_its_arrays(name):
    """A module that is renamed would else be left whole on every device without a word."""
    named = {"dit": "DiT-S/2", "unet": "sd15/unet", "vae": "sd15/vae", "text": "sd15/text"}
    model = models.create(named[name])
    shapes = {name: jax.eval_shape(model.init, jax.random.key(0), *model.dummy_inputs())["params"]}
    paths = [path.partition("/")[2] for path in tree.flatten(shapes)]
    for pattern, how in sharding.TABLES[name]:
        assert any(re.fullmatch(pattern, path) for path in paths), pattern
        assert how in ("outputs", "parts", "inputs", "replicate")
    split = [s.spec for s in jax.tree.leaves(sharding.shardings(sharding.make_mesh(2, 2, 2), shapes))]
    large = [leaf for leaf in jax.tree.leaves(shapes) if leaf.size >= sharding.SMALL]
    assert sum("tensor" in spec for spec in split) > len(large) / 2


def test_what_fsdp_cannot_split_is_listed():
    mesh, state = sharding.make_mesh(2, 4), {"a": {"kernel": _leaf(255, 1001)}, "b": {"kernel": _leaf(256, 1001)}}
    assert sharding.unsplit(mesh, state) == ["a/kernel float32[255,1001]"]
    assert sharding.unsplit(sharding.make_mesh(8), state) == []


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


def test_what_no_pass_reads_is_split_over_data_too():
    """Moments and averages: of devices that hold the same parameters each has, and updates, a part of its own."""
    params = {
        "blocks": {"kernel": _leaf(4, 128, 256), "odd": _leaf(5, 66, 260), "bias": _leaf(4, 128)},
        "pos_embed": _leaf(1, 256, 128),
    }
    tx = optim.make_optimizer(optim.make_schedule("cosine", 1e-3, 10, 100), 0.1)
    state = jax.eval_shape(partial(train.make_state, tx=tx, frozen="pos_embed"), params)
    where = {path: s.spec for path, s in tree.flatten(sharding.shardings(sharding.make_mesh(2, 4), state)).items()}
    assert where["params/blocks/kernel"] == P(None, None, "fsdp") and where["params/blocks/odd"] == P(
        None, None, "fsdp"
    )
    unread = {path: spec for path, spec in where.items() if path.startswith(("opt_state", "ema_params"))}
    assert {spec for path, spec in unread.items() if path.endswith("kernel")} == {P(None, None, ("fsdp", "data"))}
    assert {spec for path, spec in unread.items() if path.endswith("odd")} == {P(None, "data", "fsdp")}
    assert {spec for path, spec in unread.items() if path.endswith("bias")} == {P()}
    assert sum(path.endswith("kernel") for path in unread) == 3  # two moments and the average
    assert all("data" not in spec for path, spec in where.items() if path not in unread)
    assert sharding.leaf_spec("ema_params/blocks/kernel", _leaf(4, 128, 256), 1, data=2) == P("data", None, None)


def test_put_batch_lays_rows_over_all_devices():
    mesh = sharding.make_mesh(2, 4)
    rows = {"image": np.arange(16 * 3, dtype=np.float32).reshape(16, 3), "label": np.arange(16)}
    batch = sharding.put_batch(mesh, rows)
    assert {s.data.shape for s in batch["image"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(batch["image"], rows["image"])
    assert batch["label"].sharding.is_equivalent_to(sharding.batch_sharding(mesh), 1)
    assert sharding.replicated(mesh).is_fully_replicated


@pytest.mark.parametrize(
    ("shape", "slices", "across"),
    [([8, 4, 1], 2, [2, 1, 1]), ([6, 4, 1], 4, [2, 2, 1]), ([1, 8, 2], 16, [1, 8, 2]), ([4, 4, 4], 1, [1, 1, 1])],
)
def test_slices_lie_along_data_first(shape, slices, across):
    assert sharding.across_slices(shape, slices) == across
