"""LoRA and DoRA as operations on trees: properties, and parity with peft on diffusers' and transformers' models."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft_peer
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import jdiff
from jdiff import convert, lora, models, tree, weights
from jdiff.lora import Rule
from jdiff.weights import LoRAWeight, QTensor

KERNELS = {
    "attn/to_q/kernel": (12, 20),
    "mid/conv1/kernel": (3, 3, 6, 10),
    "mid/conv_shortcut/kernel": (1, 1, 6, 10),
    "blocks/attn/qkv/kernel": (3, 12, 36),
}
BIASES = {"attn/to_q/bias": (20,), "blocks/attn/qkv/bias": (3, 36), "names/embedding": (9, 12)}
EVERY = [Rule(r".*", 4, 6.0)]


def _random(shapes, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return tree.nested({p: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for p, s in shapes.items()})


def _base(seed=0):
    return _random({**KERNELS, **BIASES}, seed)


def _adapters(base, seed=0, dora=False, rules=EVERY):
    """Adapters in which nothing is zero and no magnitude is the norm."""
    rng = np.random.default_rng(seed)
    found = lora.by_path(lora.init(jax.random.key(seed), base, rules, dora=dora))
    for parts in found.values():
        parts["b"] = jnp.asarray(0.3 * rng.normal(size=parts["b"].shape), jnp.float32)
        if dora:
            parts["magnitude"] *= rng.uniform(0.5, 1.5, parts["magnitude"].shape).astype(np.float32)
    return tree.nested(found)


def _equal(found, expected, atol=0.0):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(tree.flatten(found).items(), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=path)


def _run(params, x=None):
    """Something of every kernel of `_base`, by the door that layers use."""
    rng = np.random.default_rng(7)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, picture = normal(5, 12), normal(2, 6, 6, 6)
    stacked = jax.lax.scan(lambda _, w: (None, weights.dot(x, w)), None, params["blocks"]["attn"]["qkv"]["kernel"])[1]
    return {
        "attn": weights.dot(x, params["attn"]["to_q"]["kernel"]),
        "conv1": weights.conv(picture, params["mid"]["conv1"]["kernel"]),
        "conv_shortcut": weights.conv(picture, params["mid"]["conv_shortcut"]["kernel"]),
        "blocks": stacked,
    }


def _shapes(name):
    module = models.create(name)
    return jax.eval_shape(lambda key: module.init(key, *module.dummy_inputs()), jax.random.key(0))["params"]


def _kernels(shapes):
    return {path: leaf.shape for path, leaf in tree.flatten(shapes).items() if path.endswith("kernel")}


ATTENTION = {
    "sd15/unet": (128, {"to_q", "to_k", "to_v", "to_out_0"}),
    "sd15/text": (48, {"q_proj", "k_proj", "v_proj", "out_proj"}),
    "sd15/vae": (8, {"to_q", "to_k", "to_v", "to_out_0"}),
    "DiT-S/2": (2, {"qkv", "proj"}),
}
MLP = {"sd15/unet": 32, "sd15/text": 24, "sd15/vae": 0, "DiT-S/2": 2}


@pytest.mark.parametrize("name", ATTENTION)
def test_targets_are_the_models_layers(name):
    shapes = _shapes(name)
    find = lambda pattern: set(lora.targets(shapes, [Rule(pattern, 4)]))  # noqa: E731
    kernels = _kernels(shapes)
    count, layers = ATTENTION[name]
    attention, linear = find("attn"), find("all-linear")
    assert (len(attention), {path.split("/")[-2] for path in attention}) == (count, layers)
    assert len(find("attn+mlp") - attention) == MLP[name] and find("attn+mlp") >= attention
    assert linear == {path for path, shape in kernels.items() if len(shape) in (2, 3)} >= find("attn+mlp")
    small = {path for path, shape in kernels.items() if len(shape) == 4 and shape[0] in (1, 3)}
    if small:
        assert find("conv") == small
    else:
        with pytest.raises(ValueError, match="rule 'conv' matches no kernel"):
            find("conv")
    assert find("all") == linear | small
    rest = set(kernels) - find("all")
    assert rest == ({"x_embedder/kernel"} if name == "DiT-S/2" else set())  # a convolution of 2x2


def test_a_linear_projection_is_no_convolution():
    """SD 2.x has products where SD 1.x has convolutions of the same name."""
    find = lambda name, pattern: set(lora.targets(_shapes(name), [Rule(pattern, 4)]))  # noqa: E731
    path = "mid_block/attentions_0/proj_in/kernel"
    assert path in find("sd15/unet", "conv") and path not in find("sd15/unet", "all-linear")
    assert path in find("sd21/unet", "all-linear") and path not in find("sd21/unet", "conv")


def test_the_first_rule_that_matches_wins():
    base = _base()
    rules = [Rule(r"blocks/.*", 2), Rule("conv", 3, 1.5), Rule("all-linear", 4)]
    chosen = {path: rule.rank for path, rule in lora.targets({"dit": base}, [Rule("attn", 2), *rules[1:2]]).items()}
    assert chosen == {f"dit/{p}": 3 if "conv" in p else 2 for p in KERNELS}
    found = lora.by_path(lora.init(jax.random.key(0), base, rules))
    assert {path: parts["a"].shape[-1] for path, parts in found.items()} == {
        "attn/to_q/kernel": 4,
        "mid/conv1/kernel": 3,
        "mid/conv_shortcut/kernel": 3,
        "blocks/attn/qkv/kernel": 2,
    }
    assert found["mid/conv1/kernel"]["scale"] == 0.5
    np.testing.assert_array_equal(found["blocks/attn/qkv/kernel"]["scale"], [1.0, 1.0, 1.0])
    rslora = lora.by_path(lora.init(jax.random.key(0), base, [Rule("attn", 4, 6.0)], rslora=True))
    assert rslora["attn/to_q/kernel"]["scale"] == 3.0


@pytest.mark.parametrize("method", ["kaiming", "gaussian"])
def test_factors_start_as_pefts(method):
    """Of the same distribution, for products, convolutions and stacked layers, from shapes alone."""
    torch.manual_seed(0)
    peer = torch.nn.ModuleDict({"lin": torch.nn.Linear(50, 600), "conv": torch.nn.Conv2d(40, 8, 3)})
    config = peft_peer.LoraConfig(
        r=128, target_modules=["lin", "conv"], init_lora_weights=method == "kaiming" or method
    )
    theirs = peft_peer.adapters(peft_peer.inject_adapter_in_model(config, peer), lambda name: name)
    shapes = {"lin/kernel": (50, 600), "conv/kernel": (3, 3, 40, 8), "blocks/kernel": (3, 50, 600)}
    base = tree.nested({p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()})
    ours = lora.by_path(lora.init(jax.random.key(0), base, [Rule(".*", 128)], method=method))
    for path, name in (("lin/kernel", "lin"), ("conv/kernel", "conv"), ("blocks/kernel", "lin")):
        a, expected = np.asarray(ours[path]["a"]), theirs[name]["a"]
        assert not ours[path]["b"].any() and not theirs[name]["b"].any()
        assert a.shape[-expected.ndim :] == expected.shape and abs(a.mean()) < 0.02 * a.std() + 1e-4
        assert a.std() == pytest.approx(expected.std(), rel=0.03)
        if method == "kaiming":
            assert np.abs(a).max() == pytest.approx(np.abs(expected).max(), rel=0.01)
    layers = ours["blocks/kernel"]["a"]
    assert not np.array_equal(layers[0], layers[1]) and not np.array_equal(layers[0], ours["lin/kernel"]["a"])


@pytest.mark.parametrize(
    ("method", "dora"),
    [("kaiming", False), ("kaiming", True), ("gaussian", False), ("gaussian", True), ("pissa", False)],
)
def test_new_adapters_change_nothing(method, dora):
    base = _base()
    rules = EVERY if method != "pissa" else [Rule("attn", 4, 6.0)]
    adapters = lora.init(jax.random.key(0), base, rules, method=method, dora=dora)
    start = lora.unmerge(base, adapters) if method == "pissa" else base
    attached = lora.attach(start, adapters)
    _equal(_run(attached), _run(base), atol=2e-5 if dora or method == "pissa" else 0)
    assert lora.count(adapters) == sum(
        parts[name].size
        for parts in lora.by_path(adapters).values()
        for name in ("a", "b", "magnitude")
        if name in parts
    )


def test_pissa_is_pefts():
    torch.manual_seed(0)
    peer = torch.nn.ModuleDict({"lin": torch.nn.Linear(30, 40)})
    kernel = peer["lin"].weight.detach().numpy().T.copy()
    config = peft_peer.LoraConfig(r=5, lora_alpha=8, target_modules=["lin"], init_lora_weights="pissa")
    peer = peft_peer.inject_adapter_in_model(config, peer)
    (theirs,) = peft_peer.adapters(peer, lambda name: name).values()
    base = {"lin": {"kernel": jnp.asarray(kernel)}, "blocks": {"kernel": jnp.stack([kernel, kernel[::-1]])}}
    adapters = lora.init(jax.random.key(0), base, [Rule(".*", 5, 8)], method="pissa")
    ours = adapters["lin"]["kernel"]
    signs = np.sign(np.sum(theirs["b"] * ours["b"], axis=1))
    # singular vectors whose values lie close are known less well than their products
    np.testing.assert_allclose(ours["a"] * signs, theirs["a"], atol=3e-4)
    np.testing.assert_allclose(ours["b"] * signs[:, None], theirs["b"], atol=3e-4)
    residue = lora.unmerge(base, adapters)
    np.testing.assert_allclose(residue["lin"]["kernel"], peer["lin"].base_layer.weight.detach().numpy().T, atol=1e-5)
    np.testing.assert_allclose(residue["blocks"]["kernel"][0], residue["lin"]["kernel"], atol=1e-5)
    np.testing.assert_allclose(residue["blocks"]["kernel"][1], residue["lin"]["kernel"][::-1], atol=1e-5)


def test_what_adapters_are_more_than_their_start():
    zeros, start = jax.tree.map(jnp.zeros_like, _base()), _adapters(_base(), 1)
    trained = _adapters(_base(), 2, rules=[Rule(".*", 3, 5.0)])
    both = lora.relative(trained, start)
    assert {parts["a"].shape[-1] for parts in lora.by_path(both).values()} == {3 + 4}
    expected = jax.tree.map(lambda x, y: x - y, *(lora.merge(zeros, adapters) for adapters in (trained, start)))
    _equal(lora.merge(zeros, both), expected, atol=1e-5)
    with pytest.raises(ValueError, match="is DoRA, which has no difference"):
        lora.relative(_adapters(_base(), dora=True), start)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_attach_merge_and_detach(dora):
    base = _base()
    adapters = _adapters(base, dora=dora)
    for strength in (1.0, -0.6):
        attached = lora.attach(base, adapters, strength)
        _equal(_run(attached), _run(lora.merge(base, adapters, strength)), atol=3e-5)
    _equal(_run(lora.attach(base, adapters)), _run(lora.merge(base, adapters)), atol=3e-5)
    changed = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), _run(attached), _run(base))
    assert min(jax.tree.leaves(changed)) > 0.1
    kernel = attached["attn"]["to_q"]["kernel"]
    assert kernel.w is base["attn"]["to_q"]["kernel"] and attached["names"] == base["names"]
    stripped, (found,) = lora.detach(attached)
    assert jax.tree.leaves(stripped)[0] is jax.tree.leaves(base)[0]
    _equal(stripped, base)
    _equal(found, adapters)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_strength_zero_is_the_base_bit_by_bit(dora):
    base = _base()
    run = jax.jit(_run)
    _equal(run(lora.attach(base, _adapters(base, dora=dora), 0.0)), run(base))


def test_merging_is_undone():
    base, adapters = _base(), _adapters(_base())
    for strength in (1.0, 0.7):
        merged = lora.merge(base, adapters, strength)
        assert jax.tree.leaves(tree.differences(base, merged)) == []
        _equal(lora.unmerge(merged, adapters, strength), base, atol=1e-6)
    with pytest.raises(ValueError, match=r"DoRA, which forgets the columns' lengths.*keep the base"):
        lora.unmerge(base, _adapters(base, dora=True))


def test_a_merge_is_computed_wide_and_keeps_the_dtype():
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _base())
    adapters = jax.tree.map(lambda x: x.astype(jnp.float16), _adapters(base))
    wide = lora.merge(*(jax.tree.map(lambda x: x.astype(jnp.float32), t) for t in (base, adapters)))
    _equal(lora.merge(base, adapters), jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide))


def test_adapters_add_up():
    """Each DoRA is relative to the base alone, so that the order does not matter."""
    base = _base()
    first, second = _adapters(base, 1), _adapters(base, 2, rules=[Rule("attn", 2), Rule("conv", 3)])
    third = _adapters(base, 3, dora=True, rules=[Rule("conv", 2)])
    both = lora.attach(lora.attach(base, first, 0.8), second, -0.5)
    _equal(_run(both), _run(lora.merge(lora.merge(base, first, 0.8), second, -0.5)), atol=5e-5)
    _equal(_run(both), _run(lora.attach(lora.attach(base, second, -0.5), first, 0.8)), atol=5e-5)
    mixed = [lora.attach(lora.attach(base, x), y) for x, y in ((first, third), (third, first))]
    _equal(*map(_run, mixed), atol=5e-5)


def test_adapters_of_different_kernels_keep_their_numbers():
    """The second reaches a kernel that the first does not, and the third one that neither does."""
    base = _base()
    kinds = [[Rule("conv", 2)], [Rule("all-linear", 2), Rule("conv", 3)], [Rule(r"attn/.*", 5)]]
    every = [_adapters(base, i, rules=rules, dora=i == 1) for i, rules in enumerate(kinds)]
    attached = base
    for adapters in every:
        attached = lora.attach(attached, adapters, 1.0)
    stripped, found = lora.detach(attached)
    _equal(stripped, base)
    for one, expected in zip(found, every, strict=True):
        _equal(one, expected)
    for index, strength in enumerate((0.3, 0.0, 2.0)):
        attached = lora.set_strength(attached, index, strength)
    strengths = {
        path: [float(jnp.ravel(x.strength)[0]) for x in weights.unwrap(w)[1]]
        for path, w in (("mid", attached["mid"]["conv1"]["kernel"]), ("attn", attached["attn"]["to_q"]["kernel"]))
    }
    assert strengths == {"mid": [pytest.approx(0.3), 0.0], "attn": [0.0, 2.0]}
    with pytest.raises(ValueError, match=r"no attachment 3; there are \[0, 1, 2\]"):
        lora.set_strength(attached, 3, 1.0)


def test_another_strength_compiles_nothing():
    base, traces = _base(), []

    @jax.jit
    def run(params):
        traces.append(1)
        return _run(params)

    attached = lora.attach(lora.attach(base, _adapters(base, 1), 1.0), _adapters(base, 2, dora=True), 0.8)
    found = [run(lora.set_strength(attached, 1, strength)) for strength in (0.8, 0, np.float64(0.1), jnp.float32(-2))]
    assert len(traces) == 1
    _equal(found[0], run(attached))
    assert len(traces) == 1
    assert not np.array_equal(found[0]["attn"], found[2]["attn"])


def test_a_quantized_base():
    rng = np.random.default_rng(0)

    def quantized(*shape):
        columns = (*shape[: len(shape) % 2], *(1,) * (len(shape) - len(shape) % 2 - 1), shape[-1])
        qvalue, scale = rng.integers(-127, 128, shape), rng.uniform(0.001, 0.02, columns)
        return QTensor(jnp.asarray(qvalue, jnp.int8), jnp.asarray(scale, jnp.float32))

    base = tree.nested({path: quantized(*shape) for path, shape in KERNELS.items()})
    wide = jax.tree.map(
        lambda q: q.qvalue.astype(jnp.float32) * q.scale, base, is_leaf=lambda leaf: isinstance(leaf, QTensor)
    )
    for dora in (False, True):
        start = lora.init(jax.random.key(0), base, EVERY, dora=dora)
        _equal(start, lora.init(jax.random.key(0), wide, EVERY, dora=dora), atol=1e-5)
        adapters = _adapters(wide, dora=dora)
        attached = lora.attach(base, adapters, 0.9)
        _equal(_run(attached), _run(lora.merge(wide, adapters, 0.9)), atol=1e-4)
        stripped, (found,) = lora.detach(attached)
        _equal(stripped, base)
        _equal(found, adapters)
        with pytest.raises(ValueError, match=r"attn/to_q/kernel is quantized: dequantize it first"):
            lora.merge(base, adapters)


def test_dropout_has_a_key_a_kernel_and_layer():
    base, adapters = _base(), _adapters(_base())
    key = jax.random.key(0)
    attached = lora.attach(base, adapters, dropout=0.5, key=key)
    keys = [np.asarray(leaf) for path, leaf in tree.flatten(attached).items() if path.endswith("/key")]
    assert sorted(x.ndim for x in keys) == [1, 1, 1, 2]
    assert len({tuple(row) for x in keys for row in x.reshape(-1, x.shape[-1])}) == 6
    run = jax.jit(lambda key: _run(lora.attach(base, adapters, dropout=0.5, key=key)))
    _equal(run(key), run(key))
    assert not np.array_equal(run(key)["attn"], run(jax.random.key(1))["attn"])
    assert not np.array_equal(run(key)["blocks"][0], run(key)["blocks"][1])
    draws = jax.vmap(lambda key: _run(lora.attach(base, adapters, dropout=0.2, key=key)))(jax.random.split(key, 600))
    expected = _run(lora.attach(base, adapters))
    for path, x in tree.flatten(draws).items():
        error = np.abs(x.mean(0) - tree.flatten(expected)[path]) / (x.std(0) / np.sqrt(600) + 1e-6)
        assert error.max() < 6, path
    _equal(_run(lora.attach(base, adapters, dropout=0.0, key=key)), expected)


def test_a_low_rank_change_is_recovered():
    base = _base()
    adapters = _adapters(base, rules=[Rule(".*", 3)])
    tuned = lora.merge(base, adapters)
    tuned["attn"]["to_q"]["bias"] = tuned["attn"]["to_q"]["bias"] + 1
    for how in ({"rank": 3}, {"energy": 0.999999}):
        found, shares = lora.extract(base, tuned, **how)
        assert {parts["a"].shape[-1] for parts in lora.by_path(found).values()} == {3}
        _equal(lora.merge(base, found), lora.merge(base, adapters), atol=1e-5)
        assert shares == {**dict.fromkeys(KERNELS, pytest.approx(1, abs=1e-5)), "attn/to_q/bias": 0.0}
    some, shares = lora.extract(base, tuned, "conv", rank=1)
    assert set(lora.by_path(some)) == {path for path in KERNELS if "conv" in path}
    assert shares["attn/to_q/kernel"] == 0.0 < shares["mid/conv1/kernel"] < 1
    capped, _ = lora.extract(base, tuned, r".*shortcut.*", rank=1000)
    assert capped["mid"]["conv_shortcut"]["kernel"]["a"].shape == (1, 1, 6, 6)


def test_the_share_is_of_the_squared_change():
    base = _base()
    tuned = jax.tree.map(lambda x, y: x + y, base, _base(1))
    found, shares = lora.extract(base, tuned, rank=2)
    halves, _ = lora.extract(base, tuned, energy=0.5)
    for path in KERNELS:
        old, new, made = (tree.flatten(t)[path] for t in (base, tuned, lora.merge(base, found)))
        assert 1 - np.sum((made - new) ** 2) / np.sum((new - old) ** 2) == pytest.approx(shares[path], abs=1e-4)
        matrices = np.asarray(new - old).reshape(*old.shape[: old.ndim % 2], -1, old.shape[-1])
        squares = (np.linalg.svd(matrices, compute_uv=False) ** 2).reshape(-1, min(matrices.shape[-2:])).sum(0)
        assert shares[path] == pytest.approx(squares[:2].sum() / squares.sum(), abs=1e-4)
        least = 1 + int(np.argmax(np.cumsum(squares) >= squares.sum() / 2))
        assert lora.by_path(halves)[path]["a"].shape[-1] == least


@pytest.mark.parametrize("per_rank", [False, True], ids=["one scale", "a scale a rank"])
def test_resize_keeps_the_best_approximation(per_rank):
    zeros = jax.tree.map(jnp.zeros_like, _base())
    adapters = _adapters(_base(), rules=[Rule(".*conv.*", 8, 4.0), Rule(".*", 5, 4.0)])
    if per_rank:
        for parts in lora.by_path(adapters).values():
            shape = (*parts["scale"].shape, parts["a"].shape[-1])
            parts["scale"] = jnp.asarray(np.random.default_rng(0).uniform(0.2, 2, shape), jnp.float32)
        adapters = tree.nested(lora.by_path(adapters))
    before, after = (tree.flatten(lora.merge(zeros, x)) for x in (adapters, lora.resize(adapters, 3)))
    for path in KERNELS:
        matrices = np.asarray(before[path]).reshape(
            -1, np.prod(before[path].shape[-2 - 2 * ("conv" in path) : -1]), before[path].shape[-1]
        )
        u, s, vt = np.linalg.svd(matrices, full_matrices=False)
        best = (u[..., :3] * s[:, None, :3]) @ vt[:, :3]
        np.testing.assert_allclose(after[path], best.reshape(before[path].shape), atol=1e-5)
    once = lora.by_path(lora.resize(adapters, 6))
    assert {path: parts["a"].shape[-1] for path, parts in once.items()} == {p: 6 if "conv" in p else 5 for p in KERNELS}
    with pytest.raises(ValueError, match="rank 8 must be at least 1 and below the adapters' largest, 8"):
        lora.resize(adapters, 8)


def test_resizing_dora_keeps_magnitudes():
    adapters = _adapters(_base(), dora=True)
    small = lora.by_path(lora.resize(adapters, 2))
    for path, parts in lora.by_path(adapters).items():
        np.testing.assert_array_equal(small[path]["magnitude"], parts["magnitude"])
        assert small[path]["a"].shape == (*parts["a"].shape[:-1], 2)


def _without(adapters, part):
    return {"attn": {"to_q": {"kernel": {k: v for k, v in adapters["attn"]["to_q"]["kernel"].items() if k != part}}}}


@pytest.mark.parametrize(
    ("error", "call"),
    [
        ("rule 'attn' has rank 0; it must be at least 1", lambda b, x: Rule("attn", 0)),
        (r"rule '\(' is no regex", lambda b, x: Rule("(", 4)),
        (r"rule 'atn' matches no kernel \(did you mean 'attn'\?\)", lambda b, x: lora.targets(b, [Rule("atn", 4)])),
        ("rule 'names/embedding' matches no kernel", lambda b, x: lora.targets(b, [Rule("names/embedding", 4)])),
        ("rules before 'attn' take all", lambda b, x: lora.targets(b, [Rule("all", 4), Rule("attn", 4)])),
        (r"method 'pisa' is unknown \(did you mean 'pissa'\?\)", lambda b, x: lora.init(KEY, b, EVERY, method="pisa")),
        ("mid/conv1/kernel is a convolution, which has no pissa", lambda b, x: lora.init(KEY, b, CONV, method="pissa")),
        ("pissa does not go with DoRA", lambda b, x: lora.init(KEY, b, EVERY, method="pissa", dora=True)),
        ("to_q/kernel has rank 12 itself", lambda b, x: lora.init(KEY, b, [Rule("attn", 13)], method="pissa")),
        ("to_q/kernel is only a shape, and DoRA", lambda b, x: lora.init(KEY, _abstract(b), EVERY, dora=True)),
        ("to_q/kernel is only a shape, and pissa", lambda b, x: lora.init(KEY, _abstract(b), EVERY, method="pissa")),
        ("has a column that is zero", lambda b, x: lora.init(KEY, jax.tree.map(lambda y: y * 0, b), EVERY, dora=True)),
        (r"no kernel 'atn/to_q/kernel' \(did you mean 'attn/to_q/kernel'", lambda b, x: lora.attach(b, {"atn": x["attn"]})),
        (r"'attn/to_q/kernel' lacks \['b'\]", lambda b, x: lora.attach(b, _without(x, "b"))),
        (r"'attn/to_q/kernel' lacks \['scale'\]", lambda b, x: lora.attach(b, _without(x, "scale"))),
        (r"unknown parts \['alpha'\]", lambda b, x: lora.attach(b, _changed(x, alpha=jnp.ones(())))),
        (r"has a of shape \(12, 0\): its rank must", lambda b, x: lora.attach(b, _changed(x, a=jnp.ones((12, 0))))),
        (r"a of shape \(\): its rank must", lambda b, x: lora.attach(b, _changed(x, a=jnp.ones(())))),
        (r"has a of shape \(11, 4\), expected \(12, 4\) for a kernel \(12, 20\)",
         lambda b, x: lora.attach(b, _changed(x, a=jnp.ones((11, 4))))),
        (r"has b of shape \(3, 20\), expected \(4, 20\)", lambda b, x: lora.merge(b, _changed(x, b=jnp.ones((3, 20))))),
        (r"has scale of shape \(3,\), expected \(\) or \(4,\)",
         lambda b, x: lora.attach(b, _changed(x, scale=jnp.ones(3)))),
        (r"has magnitude of shape \(12,\), expected \(20,\)",
         lambda b, x: lora.attach(b, _changed(x, magnitude=jnp.ones(12)))),
        (r"dropout=1.0 must be at least 0", lambda b, x: lora.attach(b, x, dropout=1.0, key=KEY)),
        (r"dropout=0.1 needs a key", lambda b, x: lora.attach(b, x, dropout=0.1)),
        (r"to_q/kernel has adapters attached: detach", lambda b, x: lora.merge(lora.attach(b, x), x)),
        (r"two adapters of index 0", lambda b, x: lora.detach({"kernel": _twice()})),
        (r"either a rank or an energy", lambda b, x: lora.extract(b, b)),
        (r"energy=1.5 must be above 0", lambda b, x: lora.extract(b, b, energy=1.5)),
        (r"rank 0", lambda b, x: lora.extract(b, _base(1), rank=0)),
        (r"equal in every kernel that 'all' matches", lambda b, x: lora.extract(b, b, rank=1)),
        (r"differ in 1 leaves; the first: missing: names/embedding",
         lambda b, x: lora.extract(b, {k: v for k, v in b.items() if k != "names"}, rank=1)),
        (r"rank 0 must be at least 1", lambda b, x: lora.resize(x, 0)),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(error, call):
    base = _base()
    adapters = _adapters(base)
    with pytest.raises(ValueError, match=error) as raised:
        call(base, adapters)
    assert "\n" not in str(raised.value)


KEY, CONV = jax.random.key(0), [Rule("conv", 4)]


def _abstract(base):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base)


def _changed(adapters, **parts):
    return {"attn": {"to_q": {"kernel": {**adapters["attn"]["to_q"]["kernel"], **parts}}}}


def _twice():
    w = jnp.ones((4, 4))
    return LoRAWeight(LoRAWeight(w, w, w, jnp.ones(())), w, w, jnp.ones(()))


VARIANTS = {"lora": [{}, {"use_rslora": True}], "dora": [{"use_dora": True}]}
"""Of one structure each, so that they share what is compiled."""
UNET_MODULES = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj", "linear_1"),
    *("conv_in", "conv1", "conv2", "conv_shortcut", "conv", "proj_in"),
)


def tiny_unet(dtype=torch.float32):
    """diffusers' UNet of two levels, the upper with attention, and ours with its weights."""
    torch.manual_seed(0)
    peer = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=4,
    )
    peer = peer.eval().to(dtype).requires_grad_(False)
    return peer, *_ours(peer, jnp.dtype(str(dtype).removeprefix("torch.")))


def _ours(peer, dtype=jnp.float32):
    module = models.from_config(json.loads(peer.to_json_string()), dtype)
    params = convert.from_torch(module, {name: value.numpy() for name, value in peer.state_dict().items()})
    return module, jax.tree.map(jnp.asarray, params)


def _jnp(values):
    return jax.tree.map(jnp.asarray, values)


def _compare(found, expected, base):
    scale = np.abs(expected).max()
    assert scale > 0.05 and np.abs(expected - base).max() > 0.05 * scale
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * max(1, scale))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_unet_equals_peft(variant):
    peer, module, params = tiny_unet()
    rng = np.random.default_rng(0)
    x, t, context = rng.normal(size=(2, 8, 8, 4)), np.array([3, 987]), rng.normal(size=(2, 5, 24))
    inputs = (*(torch.tensor(y, dtype=torch.float32) for y in (x.transpose(0, 3, 1, 2),)), torch.tensor(t))
    forward = lambda: peer(*inputs, torch.tensor(context, dtype=torch.float32)).sample.permute(0, 2, 3, 1).numpy()  # noqa: E731
    with torch.no_grad():
        base = forward()
        apply = jax.jit(module.apply)
        for i, settings in enumerate(VARIANTS[variant]):
            peft_peer.inject(peer, UNET_MODULES, seed=i, **settings)
            adapters = tree.nested(_jnp(peft_peer.adapters(peer, peft_peer.slashed)))
            assert adapters["conv_in"]["kernel"]["scale"] == peft_peer.ALPHA / (2 if "use_rslora" in settings else 4)
            left = set(_kernels(params)) - set(lora.by_path(adapters))
            assert {path.split("/")[-2] for path in left} == {"linear_2", "proj_out", "conv_out"}
            found = apply(
                {"params": lora.attach(params, adapters)}, *(jnp.asarray(y, jnp.float32) for y in (x, t, context))
            )
            _compare(found, forward(), base)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_text_encoder_equals_peft(variant):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = CLIPTextConfig(vocab_size=99, bos_token_id=97, eos_token_id=98, **sizes)
    peer = CLIPTextModel(config).eval().requires_grad_(False)
    module = models.from_config(config.to_dict())
    params = convert.from_torch(module, {name: value.numpy() for name, value in peer.state_dict().items()})
    ids = np.random.default_rng(0).integers(0, 99, (2, 9))
    base, apply = peer(torch.tensor(ids)).last_hidden_state.numpy(), jax.jit(module.apply)
    for i, settings in enumerate(VARIANTS[variant]):
        modules = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "token_embedding")
        peft_peer.inject(peer, modules, seed=i, **settings)
        with torch.no_grad():
            expected = peer(torch.tensor(ids)).last_hidden_state.numpy()
        adapters = tree.nested(_jnp(peft_peer.adapters(peer, peft_peer.slashed)))
        assert len(lora.by_path(adapters)) == 13
        attached = lora.attach(_jnp(params), adapters, 1.0)
        _compare(apply({"params": attached}, ids), expected, base)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dit_equals_peft(variant):
    """diffusers keeps q, k and v apart, with ranks and alphas of their own; ours is one kernel, and its adapter one."""
    torch.manual_seed(0)
    module = jdiff.create("DiT-S/2", image_size=8, num_classes=5, width=32, depth=2, heads=4, freq_shift=1)
    peer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=5,
        norm_eps=1e-6,
    ).eval()
    first, second = peer.requires_grad_(False).transformer_blocks
    second.norm1.emb.load_state_dict(first.norm1.emb.state_dict())  # diffusers keeps a copy in every block
    params = convert.from_torch(module, {name: value.numpy() for name, value in peer.state_dict().items()})
    rng = np.random.default_rng(0)
    x, t, y = rng.normal(size=(2, 8, 8, 4)).astype(np.float32), np.array([3, 987]), np.array([1, 4])
    inputs = torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(y)
    forward = lambda: peer(*inputs, return_dict=False)[0].permute(0, 2, 3, 1).numpy()  # noqa: E731
    own = {"rank_pattern": {"to_k": 3, "to_v": 2}, "alpha_pattern": {"to_v": 5}}
    modules = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "pos_embed.proj")
    with torch.no_grad():
        base, apply = forward(), jax.jit(module.apply)
        for i, settings in enumerate(VARIANTS[variant]):
            peft_peer.inject(peer, modules, seed=i, **own, **settings)
            adapters = _jnp(peft_peer.of_dit(peft_peer.adapters(peer, str), 2))
            scale = adapters["blocks"]["attn"]["qkv"]["kernel"]["scale"]
            assert scale.shape == (2, 9) and len(set(np.unique(scale).tolist())) == 3
            _compare(
                apply({"params": lora.attach(_jnp(params), adapters)}, x, t.astype(np.float32), y), forward(), base
            )


def test_several_adapters_with_strengths_equal_peft():
    torch.manual_seed(0)
    peer = torch.nn.ModuleDict({"lin": torch.nn.Linear(12, 20, bias=False)})
    attached = {"lin": {"kernel": jnp.asarray(peer["lin"].weight.detach().numpy().T)}}
    x = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    for i, (name, strength) in enumerate((("one", 0.8), ("two", -0.3))):
        peft_peer.inject(peer, ["lin"], name, seed=i, r=3 + i)
        adapters = tree.nested(_jnp(peft_peer.adapters(peer, peft_peer.slashed, name)))
        attached = lora.attach(attached, adapters, strength)
        peer["lin"].set_scale(name, strength)
    peer["lin"].set_adapter(["one", "two"])
    expected = peer["lin"](torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(weights.dot(x, attached["lin"]["kernel"]), expected, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dropout_equals_peft(kind, variant):
    """The same mask in both: what it meets, and what it leaves alone."""

    class Masked(torch.nn.Module):
        def forward(self, x):
            return x * torch.tensor(mask.transpose(0, 3, 1, 2) if kind == "conv" else mask) / 0.75

    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 20) if kind == "linear" else torch.nn.Conv2d(12, 20, 3, 2, 1)
    peer = torch.nn.ModuleDict({"layer": layer})
    w = layer.weight.detach().numpy()
    w = w.T if kind == "linear" else w.transpose(2, 3, 1, 0)
    peft_peer.inject(peer, ["layer"], lora_dropout=0.25, **VARIANTS[variant][0])
    (parts,) = _jnp(peft_peer.adapters(peer, str)).values()
    x = np.random.default_rng(0).normal(size=(6, 12) if kind == "linear" else (2, 6, 6, 12)).astype(np.float32)
    key = jax.random.key(5)
    mask = np.asarray(jax.random.bernoulli(key, 0.75, x.shape), np.float32)
    adapted = LoRAWeight(jnp.asarray(w), **parts, key=jax.random.key_data(key), rate=0.25)
    peer["layer"].lora_dropout["default"] = Masked()
    peer.train()
    bias = layer.bias.detach().numpy()
    if kind == "linear":
        expected = peer["layer"](torch.tensor(x)).detach().numpy()
        np.testing.assert_allclose(weights.dot(x, adapted) + bias, expected, atol=1e-5)
    else:
        expected = peer["layer"](torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
        found = weights.conv(jnp.asarray(x), adapted, (2, 2), ((1, 1), (1, 1)))
        np.testing.assert_allclose(found + bias, expected, atol=1e-5)


def test_a_merge_equals_pefts():
    for settings in (*VARIANTS["lora"], *VARIANTS["dora"]):
        torch.manual_seed(0)
        peer = torch.nn.ModuleDict({"lin": torch.nn.Linear(12, 20), "conv": torch.nn.Conv2d(6, 10, 3)})
        base = {
            "lin": {"kernel": peer["lin"].weight.detach().numpy().T.copy()},
            "conv": {"kernel": peer["conv"].weight.detach().numpy().transpose(2, 3, 1, 0).copy()},
        }
        peft_peer.inject(peer, ["lin", "conv"], **settings)
        merged = lora.merge(base, tree.nested(peft_peer.adapters(peer, peft_peer.slashed)))
        for layer in peer.values():
            layer.merge()
        expected = peer["conv"].base_layer.weight.detach().numpy().transpose(2, 3, 1, 0)
        np.testing.assert_allclose(merged["conv"]["kernel"], expected, atol=1e-5)
        np.testing.assert_allclose(merged["lin"]["kernel"], peer["lin"].base_layer.weight.detach().numpy().T, atol=1e-5)


def test_names_are_regexes():
    assert all(re.compile(part) for pair in lora.TARGETS.values() for part in pair)
