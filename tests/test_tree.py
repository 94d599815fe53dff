"""Paths, rules, partition and merge, and checksums that see every flipped bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jdiff import sharding, tree
from jdiff.weights import LoRAWeight, QTensor

DTYPES = ("float32", "bfloat16", "float16", "int8", "int32", "uint8", "bool")


def _special_tree():
    q = QTensor(jnp.ones((4, 3), jnp.int8), jnp.ones((1, 3)))
    lora = LoRAWeight(QTensor(jnp.ones((4, 3), jnp.int8), jnp.ones((1, 3))), jnp.ones((4, 2)), jnp.zeros((2, 3)), 0.5)
    return {"blocks": {"qkv": {"kernel": lora, "bias": jnp.zeros(3)}, "fc": {"kernel": q}}, "list": [jnp.ones(1), None]}


def test_first_match_wins_and_covers_the_whole_path():
    rules = (("a/kernel", 1), (r".*kernel", 2), (r"a", 3))
    assert tree.match(rules, "a/kernel") == 1
    assert tree.match(rules, "b/kernel") == 2
    with pytest.raises(KeyError, match="a/bias") as error:  # `a` matches its beginning alone
        tree.match(rules, "a/bias")
    assert all(pattern in str(error.value) for pattern, _ in rules)


def test_apply_rules_refuses_a_leaf_without_a_rule():
    with pytest.raises(KeyError, match="qkv/bias"):
        tree.apply_rules(((r".*kernel.*", True),), _special_tree())


def test_paths_name_the_leaves_of_special_weights():
    paths = list(tree.flatten(_special_tree()))
    assert "blocks/qkv/kernel/w/qvalue" in paths and "blocks/qkv/kernel/a" in paths
    assert "blocks/fc/kernel/scale" in paths and "list/0" in paths and len(paths) == 9


@pytest.mark.parametrize("pattern", [r".*/(a|b)", r".*", r"nothing", r".*bias", r".*qvalue"])
def test_merge_undoes_partition(pattern):
    full = _special_tree()
    chosen = tree.apply_rules(((pattern, True), (r".*", False)), full)
    yes, no = tree.partition(full, chosen)
    assert set(tree.flatten(yes)) | set(tree.flatten(no)) == set(tree.flatten(full))
    assert not set(tree.flatten(yes)) & set(tree.flatten(no))
    for merged in (tree.merge(yes, no), tree.merge(no, yes)):
        assert jax.tree.structure(merged) == jax.tree.structure(full)
        assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(full), strict=True))


def test_differences_lists_missing_unexpected_and_changed():
    shape = lambda *s, dtype="float32": jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    want = {"a": shape(2), "b": shape(3), "c": shape(1)}
    have = {"b": shape(3, dtype="bfloat16"), "c": shape(1), "d": shape(4)}
    lines = tree.differences(want, have)
    assert lines[0].startswith("missing: a float32[2]") and lines[1].startswith("unexpected: d")
    assert lines[2] == "differs: b expected float32[3], found bfloat16[3]" and len(lines) == 3
    assert tree.differences(want, want) == []


def _bytes(dtype, shape=(2, 2)):
    rng = np.random.default_rng(1)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    return rng.normal(size=shape).astype(jnp.dtype(dtype)) if "float" in dtype else rng.integers(0, 99, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_the_checksum(dtype):
    array = _bytes(dtype)
    raw = np.frombuffer(array.tobytes(), np.uint8)
    variants = {"0": jnp.asarray(array)}
    for bit in range(8 * raw.size):
        if dtype == "bool" and bit % 8:
            continue  # a bool has one bit
        flipped = raw.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        variants[str(bit + 1)] = jnp.asarray(np.frombuffer(flipped.tobytes(), array.dtype).reshape(array.shape))
    sums = tree.checksums(variants)
    assert len(set(sums.values())) == len(variants)
    assert sums["0"] == tree.checksums({"x": array})["x"]


def test_any_flipped_bit_of_a_double_changes_the_checksum():
    with jax.enable_x64(True):
        array = _bytes("float64", (3,))
        words = array.view(np.uint64)
        variants = {str(b): (words ^ (np.arange(3) == b // 64) * np.uint64(1 << b % 64)) for b in range(192)}
        sums = tree.checksums({"x": array} | {k: v.view(np.float64) for k, v in variants.items()})
    assert len(set(sums.values())) == 193


@pytest.mark.parametrize("dtype", DTYPES[:-1])
def test_swapped_and_negated_elements_change_the_checksum(dtype):
    array = _bytes(dtype, (7,))
    others = {}
    for i in range(7):
        for j in range(i):
            swapped = array.copy()
            swapped[[i, j]] = swapped[[j, i]]
            if not (swapped == array).all():
                others[f"swap{i}{j}"] = swapped
            if "float" in dtype:  # signs are the top bits, where sums lose most
                negated = array.copy()
                negated[[i, j]] *= -1
                others[f"negate{i}{j}"] = negated
    mirrored = np.concatenate([array, -array]) if "float" in dtype else np.arange(14).astype(dtype)
    sums = tree.checksums({"x": array, "m": mirrored, "n": np.roll(mirrored, 7), **others})
    assert sums["m"] != sums["n"] and sums["x"] not in [sums[k] for k in others]


def test_swapped_arrays_change_the_checksums():
    a, b = jnp.arange(6.0), jnp.arange(6.0)[::-1]
    assert tree.checksums({"a": a, "b": b}) != tree.checksums({"a": b, "b": a})
    assert tree.checksums({}) == {}


def test_the_checksum_does_not_depend_on_sharding():
    mesh = sharding.make_mesh(2, 4)
    array = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    specs = (PartitionSpec(), PartitionSpec("fsdp"), PartitionSpec(None, "data"), PartitionSpec(("data", "fsdp"), None))
    sums = {tree.checksums({"x": jax.device_put(array, NamedSharding(mesh, s))})["x"] for s in specs}
    assert sums == {tree.checksums({"x": array})["x"]}


def test_digest_ignores_order_and_sees_values():
    assert tree.digest({"a": 1, "b": 2}) == tree.digest({"b": 2, "a": 1}) != tree.digest({"a": 1, "b": 3})


def test_nearest():
    assert "'optim.lr'" in tree.nearest("optm.lr", ["optim.lr", "seed"]) and tree.nearest("zzz", ["seed"]) == ""


SPLIT = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jdiff import sharding, tree
where = NamedSharding(sharding.make_mesh(8), PartitionSpec(None, "data"))
split = {str(i): jax.device_put(jnp.ones((64 + 8 * (i % 5), 256)), where) for i in range(200)}
for _ in range(10):
    assert tree.not_finite(split) == []
"""


def test_many_split_arrays_are_checked_one_after_another(commands):
    """All at once XLA:CPU's sums over eight devices wait for one another, until it aborts."""
    done = commands.run("-c", SPLIT, devices=8, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
